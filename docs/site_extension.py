"""Extend Sphinx with links into the repository, equations without JavaScript, Markdown docstrings and API pages."""

import ast
import html
import inspect
import os
import pydoc
import re
import shutil
from importlib.metadata import metadata
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
RESEARCH = ROOT / "research"
NOTEBOOKS = ROOT / "examples" / "notebooks"

# Pages that show a file of the repository's root
PAGES_OF_ROOT = {"index": "README.md", "changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
TOCTREE = re.compile(r"^```\{toctree\}.*?^```$", re.DOTALL | re.MULTILINE)
# A link in a text, or the target of one at the end of a page
LINK = re.compile(r"((?<=\]\()|^\[[^\]\n]+\]: )([^()\s#:]+)((?:#[^()\s]*)?)(?=\)|$)", re.MULTILINE)
HOME = metadata("tic-grpo-trl")["Home-page"]
# README.md, which a package index shows too, has absolute links to files of the repository
ABSOLUTE = re.compile(re.escape(HOME) + r"/(?:blob|raw|tree)/main/")


def target_on_site(path: Path, anchor: str) -> str | None:
    """Find the page of the site that shows a file of the repository.

    Args:
        path: absolute path of the file.
        anchor: anchor of a heading with its `#`, or an empty string.

    Returns:
        A path from the root of the documentation, or `None` if the file has no page and is copied into the site.
    """
    for page, name in PAGES_OF_ROOT.items():
        if path == ROOT / name:
            return f"/{page}.md{anchor}"
    if path.is_relative_to(NOTEBOOKS):
        return f"/notebooks/{path.name}{anchor}"
    if path.is_relative_to(PACKAGE) or path.is_relative_to(RESEARCH):
        page = api_page(path.relative_to(ROOT).with_suffix("").parts)
        return f"/api/{page}.md" if (DOCS / "api" / f"{page}.md").exists() else "/api/index.md"
    if path.is_relative_to(DOCS):
        return f"/{path.relative_to(DOCS).as_posix()}{anchor}"
    return None


def read_source(app: Sphinx, docname: str, content: list[str]) -> None:
    """Replace links between files of the repository, which work on GitHub, by links between pages of the site."""
    source = Path(app.env.doc2path(docname)).resolve()
    if docname in PAGES_OF_ROOT:
        source = ROOT / PAGES_OF_ROOT[docname]
        content[0] = "\n\n".join([source.read_text(encoding="utf-8"), *TOCTREE.findall(content[0])])
    elif source.parent == DOCS / "notebooks":
        source = NOTEBOOKS / source.name

    def rewritten(match: re.Match) -> str:
        path = (source.parent / match[2]).resolve()
        if not path.exists():
            return match[0]  # Sphinx warns of it
        if path.is_dir() and not (path / "README.md").exists():
            return f"{match[1]}{HOME}/tree/main/{path.relative_to(ROOT).as_posix()}"
        if path.is_dir():
            path = path / "README.md"
        target = target_on_site(path, match[3])
        return match[1] + (target or "/" + Path(os.path.relpath(path, DOCS)).as_posix())

    text = ABSOLUTE.sub("", content[0]) if source == ROOT / "README.md" else content[0]
    content[0] = LINK.sub(rewritten, text)


def mathml(node, as_block: bool) -> str:
    """Convert an equation to MathML with docutils, or warn and show its source."""
    try:
        math = tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logger.warning("%s In: %s", error, node.astext(), location=node)
        return f"<code>{html.escape(node.astext())}</code>"
    # browsers put no space between a function and its argument
    return re.sub(r"(<mo>&ApplyFunction;</mo>)(?!\s*<mo[^>]*>[(\[])", r'\1<mspace width="0.17em"/>', math)


def visit_math(self, node) -> None:
    """Write an inline equation."""
    self.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def visit_math_block(self, node) -> None:
    """Write a displayed equation in a box that scrolls on a narrow screen."""
    self.body.append(f'<div class="equation">{mathml(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def markdown_to_rst(lines: list[str], module: str) -> list[str]:
    """Convert the Markdown of this package's docstrings to reStructuredText.

    Args:
        lines: lines of a docstring.
        module: name of its module, in which references are looked up.

    Returns:
        The lines with code spans, references, equations and tables converted, and other special characters escaped.
    """
    result: list[str] = []
    table: list[list[str]] = []
    after = ""  # the last line that is not blank
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
    """Convert code spans and references, which may extend over two lines."""
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
    """Link a name to its definition, or only print it if it is data, which has no entry in the API pages."""
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
    """Convert an equation between double dollars to a directive."""
    indent, equation = match[1], " ".join(match[2].split())
    return f"{indent}.. math:: {equation}"


def list_table(rows: list[list[str]]) -> list[str]:
    """Convert rows of (indentation, cell, …), of which the first is the heading, to a `list-table`."""
    if not rows:
        return []
    indent = rows[0][0]
    lines = [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
    for row in rows:
        for number, cell in enumerate(row[1:]):
            lines.append(f"{indent}   {' ' if number else '*'} - {cell}")
    return [*lines, ""]


def read_docstring(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Convert a docstring before napoleon parses its sections."""
    lines[:] = markdown_to_rst(lines, name if what == "module" else getattr(obj, "__module__", None) or "tic_grpo_trl")


def api_page(parts: tuple[str, ...]) -> str:
    """Name the API page of a module, given as the parts of its path: one page per room of a package."""
    return ".".join(parts[:2]) if parts[0] == RESEARCH.name else "".join(parts[1:2])


def purpose(path: Path) -> str:
    """Read the first sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def write_api_pages() -> None:
    """Write a page for each room of the package and of `research/`, with an entry for each module, and an index."""
    folder = DOCS / "api"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pages: dict[str, dict[str, Path]] = {}
    for path in [*sorted(PACKAGE.rglob("*.py")), *sorted(RESEARCH.rglob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if path.parent in (PACKAGE, RESEARCH) and parts[-1] in ("__init__", "version"):
            continue
        if parts[-1] != "__main__" and "runner" not in parts:
            module = ".".join(part for part in parts if part != "__init__")
            pages.setdefault(api_page(parts), {})[module] = path
    for page, modules in pages.items():
        title, *_ = modules
        entries = [f"```{{eval-rst}}\n.. automodule:: {module}\n```\n" for module in modules]
        if len(modules) > 1:
            entries = [f"## {module}\n\n{entry}" for module, entry in zip(modules, entries, strict=True)]
        (folder / f"{page}.md").write_text("\n".join([f"# {title}\n", *entries]))
    rows = [
        f"| [`{next(iter(each))}`]({page}.md) | {purpose(next(iter(each.values())))} |" for page, each in pages.items()
    ]
    toctree = "\n".join(["```{toctree}", ":hidden:", "", *pages, "```"])
    table = "\n".join(["| module | contents |", "|---|---|", *rows])
    (folder / "index.md").write_text(f"# API reference\n\n{table}\n\n{toctree}\n")


def setup(app: Sphinx) -> dict:
    """Register the functions above, write the API pages, and copy the notebooks into the documentation's folder."""
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
