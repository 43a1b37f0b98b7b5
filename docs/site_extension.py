"""What the site needs beyond its theme: links into the repository, equations without a script, Markdown docstrings."""

import html
import inspect
import os
import pydoc
import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging


logger = logging.getLogger(__name__)

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGE = ROOT / "tic_grpo_trl"
NOTEBOOKS = ROOT / "examples" / "notebooks"

# Pages whose text is a file of the repository's root.
PAGES_OF_ROOT = {"overview": "README.md", "changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
LINK = re.compile(r"(?<=\]\()([^()\s#:]+)((?:#[^()\s]*)?)(?=\))")


def target_on_site(path: Path, anchor: str) -> str | None:
    """Where a link to a file of the repository leads on the site.

    Args:
        path: the file, absolute.
        anchor: of a heading, with its `#`, or empty.

    Returns:
        A path from the root of the documentation; `None` for a file that has no page and is copied into the site.
    """
    for page, name in PAGES_OF_ROOT.items():
        if path == ROOT / name:
            return f"/{page}.md{anchor}"
    if path.is_relative_to(NOTEBOOKS):
        return f"/notebooks/{path.name}{anchor}"
    if path.is_relative_to(PACKAGE) and (path.suffix == ".py" or path.is_dir()):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        return f"/api/{parts[0]}.md" if parts and (DOCS / "api" / f"{parts[0]}.md").exists() else "/api/index.md"
    if path.is_relative_to(DOCS):
        return f"/{path.relative_to(DOCS).as_posix()}{anchor}"
    return None


def read_source(app: Sphinx, docname: str, content: list[str]) -> None:
    """Make relative links, which are GitHub's, those of the site."""
    source = Path(app.env.doc2path(docname)).resolve()
    if docname in PAGES_OF_ROOT:
        source = ROOT / PAGES_OF_ROOT[docname]
        content[0] = source.read_text(encoding="utf-8")
    elif source.parent == DOCS / "notebooks":
        source = NOTEBOOKS / source.name

    def rewritten(match: re.Match) -> str:
        path = (source.parent / match[1]).resolve()
        if not path.exists():
            return match[0]  # for Sphinx to complain about
        if path.is_dir() and (path / "README.md").exists():
            path = path / "README.md"
        target = target_on_site(path, match[2])
        return target or "/" + Path(os.path.relpath(path, DOCS)).as_posix()

    content[0] = LINK.sub(rewritten, content[0])


def mathml(node, as_block: bool) -> str:
    """An equation as MathML, by docutils; what that does not know is a warning that names the place."""
    try:
        math = tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logger.warning("%s In: %s", error, node.astext(), location=node)
        return f"<code>{html.escape(node.astext())}</code>"
    # browsers leave no space between a function and its argument
    return re.sub(r"(<mo>&ApplyFunction;</mo>)(?!\s*<mo[^>]*>[(\[])", r'\1<mspace width="0.17em"/>', math)


def visit_math(self, node) -> None:
    """Inline equations."""
    self.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def visit_math_block(self, node) -> None:
    """Displayed equations, in a box that scrolls where a screen is narrower."""
    self.body.append(f'<div class="equation">{mathml(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def markdown_to_rst(lines: list[str], module: str) -> list[str]:
    """The little Markdown of this package's docstrings as reStructuredText.

    Args:
        lines: of a docstring.
        module: that it is in, for the names that it mentions.

    Returns:
        The lines with code spans, references in brackets and tables in the other syntax, and with what is only a
        character here and markup there escaped.
    """
    result: list[str] = []
    table: list[list[str]] = []
    after = ""  # the last line that was not blank
    for line in [*lines, ""]:
        text = line.lstrip()
        if text.startswith("| "):
            table.append([line[: -len(text)], *(cell.strip() for cell in text.rstrip()[2:-2].split(" | "))])
        elif not text.startswith("|--"):
            is_code = line.startswith("    ") and result and not result[-1] and not after.startswith(" ")
            result += [*list_table(table), *(["::", ""] if is_code else []), line]
            table = []
        after = line if text else after
    text = DISPLAYED.sub(displayed_math, "\n".join(result[:-1]))
    return spans(text, module).split("\n")


DISPLAYED = re.compile(r"^( *)\$\$(.+?)\$\$$", re.DOTALL | re.MULTILINE)
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?:\((\w+)\.py\))?")
SPAN = re.compile(
    r"(\[`~?[\w.]+`\](?:\([^)]*\))?|``[^`]+``|:\w+:`[^`]+`|`[^`]+`|\$[^$\n]+\$|\.\. math:: .*"
    r"|(?<![*\w])\*[^\s*][^*\n]*(?<=\S)\*(?![*\w]))"
)


def spans(text: str, module: str) -> str:
    """Code spans and references of a docstring; a span may go on in the next line."""
    pieces = SPAN.split(text)
    for i, piece in enumerate(pieces):
        if reference := REFERENCE.fullmatch(piece):
            short, name, neighbour = reference.groups()
            where = f"{module.rpartition('.')[0]}.{neighbour}" if neighbour else module
            pieces[i] = reference_to(short, name, where)
        elif re.fullmatch(r"\$[^$\n]+\$", piece):
            pieces[i] = f":math:`{piece[1:-1]}`"
        elif re.fullmatch(r"`[^`]+`", piece):
            pieces[i] = f"`{piece}`"
        elif not i % 2:  # plain text
            pieces[i] = re.sub(r"(?<!\\)([|]|\*(?=\S)|(?<=\w)_(?=\W|$))", r"\\\1", piece)
    return "".join(pieces)


def reference_to(short: str, name: str, module: str) -> str:
    """A link to a name of the package where it is defined; only its name where that is data, which has no entry."""
    found = (pydoc.locate(prefix + name) for prefix in (f"{module}.", "tic_grpo_trl.", ""))
    target = next((target for target in found if target is not None), None)
    title = name.rpartition(".")[2] if short else name
    if inspect.ismodule(target):
        name = target.__name__
    elif inspect.isclass(target) or inspect.isroutine(target):
        if target.__module__.startswith(("tic_grpo_trl", "research")):
            name = f"{target.__module__}.{target.__qualname__}"
    elif target is not None:
        return f"``{title}``"
    return f":py:obj:`{title} <{name}>`"


def displayed_math(match: re.Match) -> str:
    """An equation between double dollars as a directive; nothing in it is markup."""
    indent, equation = match[1], " ".join(match[2].split())
    return f"{indent}.. math:: {equation}"


def list_table(rows: list[list[str]]) -> list[str]:
    """Rows of (indentation, cell, …), the first one the heading, as a `list-table`."""
    if not rows:
        return []
    indent = rows[0][0]
    lines = [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
    for row in rows:
        for number, cell in enumerate(row[1:]):
            lines.append(f"{indent}   {' ' if number else '*'} - {cell}")
    return [*lines, ""]


def read_docstring(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Convert a docstring before napoleon reads its sections."""
    lines[:] = markdown_to_rst(lines, name if what == "module" else getattr(obj, "__module__", None) or "tic_grpo_trl")


def write_api_pages() -> None:
    """Write one page for each room of the package and of `research/`, with an entry for each of its modules."""
    folder = DOCS / "api"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pages: dict[str, list[str]] = {}
    for package in (PACKAGE, ROOT / "research"):
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if parts[-1] != "__main__" and path.parent.name != "runner" and module.count("."):
                pages.setdefault(module.split(".")[1], []).append(module)
    for page, modules in pages.items():
        entries = [f"## `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n" for module in modules]
        (folder / f"{page}.md").write_text("\n".join([f"# {modules[0].rpartition('.')[2]}\n", *entries]))
    text = "Public names of the package, from their docstrings; `[source]` beside each leads to the code."
    listed = "\n".join(["```{toctree}", ":maxdepth: 1", "", *pages, "```"])
    (folder / "index.md").write_text(f"# API reference\n\n{text}\n\n{listed}\n")


def setup(app: Sphinx) -> dict:
    """Register everything above, write the reference, and copy the notebooks to where Sphinx reads pages."""
    write_api_pages()
    folder = DOCS / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy2(notebook, folder)
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
