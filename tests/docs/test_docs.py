"""All Markdown of the repository: links lead somewhere, the migration guide runs, and the site builds."""

import dataclasses
import functools
import itertools
import json
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from importlib.metadata import metadata
from pathlib import Path
from urllib.parse import unquote

import pytest
import trl
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import CPU
from markdown_it import MarkdownIt
from trl import GRPOConfig, ModelConfig

from research.lighteval.runs import LightevalConfig
from tic_grpo_trl import ALGORITHMS, TICGRPOConfig, TICGRPOTrainer, __version__
from tic_grpo_trl.evaluation import EvaluationConfig
from tic_grpo_trl.scripts.evaluate import TableArguments
from tic_grpo_trl.scripts.train import TrainArguments
from tic_grpo_trl.starter import STARTER_MODEL, exact_match_reward, make_dataset


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOT_OURS = {"_build", "runs", "build", "dist", "node_modules"}
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "*.ipynb")
    for path in ROOT.rglob(pattern)
    if not any(part in NOT_OURS or part.startswith(".") for part in path.relative_to(ROOT).parts)
    and path.parent not in (DOCS / "notebooks", DOCS / "api")  # generated when the site is built
)


def text_of(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    if not page.endswith(".ipynb"):
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def tokens_of(page: str) -> list:
    """Block tokens and, behind each, its inline ones."""
    blocks = MarkdownIt("commonmark").enable("table").parse(text_of(page))
    return [token for block in blocks for token in [block, *(block.children or [])]]


def links_of(page: str) -> list[str]:
    targets = (token.attrs.get("href", token.attrs.get("src")) for token in tokens_of(page))
    return [str(target) for target in targets if target is not None]


def anchors_of(page: str) -> set[str]:
    """As GitHub and myst_heading_anchors make them of headings."""
    tokens, anchors = tokens_of(page), []
    for before, token in itertools.pairwise(tokens):
        if before.type == "heading_open":
            words = "".join(child.content for child in token.children if child.type in ("text", "code_inline"))
            anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            anchors.append(f"{anchor}-{anchors.count(anchor)}" if anchor in anchors else anchor)
    return set(anchors)


# Links

# README.md, which a package index shows too, has absolute links to files of the repository
HOME = metadata("tic-grpo-trl")["Home-page"]


def test_links_of_the_readme_lead_to_files_of_the_repository():
    links = [link for link in links_of("README.md") if link.startswith(HOME)]
    assert len(links) > 20
    for link in links:
        match = re.fullmatch(rf"{re.escape(HOME)}/(?:blob|raw|tree)/main/([^#]+)(?:#(.*))?", link)
        assert (ROOT / match[1]).exists(), link
        assert match[2] is None or match[2] in anchors_of(match[1]), link


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_anchors_lead_somewhere(page):
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = unquote(link).partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors_of(path.resolve().relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_code_spans_exist(page):
    for name in re.findall(r"`((?:tests|examples|accelerate_configs|research)/[\w./]+\.\w+)`", text_of(page)):
        assert (ROOT / name).exists(), name


# Names in code spans

# Pages on options only, where `name=value` is one
OPTION_PAGES = [
    f"docs/{name}.md" for name in ("method", "algorithms", "diagnostics", "scaling", "migrating", "vllm", "carry_over")
]


def spans_of(page: str) -> list[str]:
    return [token.content for token in tokens_of(page) if token.type == "code_inline"]


@functools.cache
def known_options() -> set[str]:
    """Fields of the configs and flags of the programs that start them."""
    classes = (TICGRPOConfig, ModelConfig, TrainArguments, EvaluationConfig, TableArguments, LightevalConfig)
    fields = {field.name for each in classes for field in dataclasses.fields(each)}
    return fields | {action.dest for action in launch_command_parser()._actions} | {"config", "peft_config"}


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_targets_exist(page):
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for span in spans_of(page):
        assert not (made := re.match(r"make ([a-z0-9-]+)", span)) or made[1] in targets, span
        for flag in re.findall(r"(?:^|[ ,])--([a-z]\w*)(?=[ =]|$)", span if span.startswith("--") else ""):
            assert flag in known_options(), span


@pytest.mark.parametrize("page", OPTION_PAGES)
def test_options_exist(page):
    for span in spans_of(page):
        if re.match(r"[a-z]\w+=[\w\"'.-]+", span):
            for part in span.split(", "):
                assert part.partition("=")[0] in known_options(), span


@pytest.mark.parametrize("page", PAGES)
def test_algorithms_exist(page):
    named = {span for span in spans_of(page) if re.fullmatch(r"(tic_)?grpo(_\w+|2)?|gspo", span)}
    assert named <= {*ALGORITHMS, "grpo_trainer", "tic_grpo_trl"}


# Migrating


DIFF = re.search(r"```diff\n(.*?)```", text_of("docs/migrating.md"), re.DOTALL)[1]


def script_of(sign: str) -> str:
    """The script before (-) or after (+) the diff."""
    return "\n".join(line[1:] for line in DIFF.splitlines() if not line or line[0] in (" ", sign))


def run(code: str) -> dict:
    names = {"model": STARTER_MODEL, "reward": exact_match_reward, "dataset": make_dataset("train", 4, seed=0)}
    exec(compile(code, "migrating.md", "exec"), names)
    return names


def test_the_script_before_the_diff_is_one_that_trl_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl, "GRPOConfig", lambda **fields: GRPOConfig(**fields, **CPU))
    assert run(script_of("-"))["trainer"].state.global_step == 4


def test_the_script_after_the_diff_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = run(script_of("+"))["trainer"]
    assert isinstance(trainer, TICGRPOTrainer)
    assert trainer.args.resolved_algorithm["algorithm"] == "tic_grpo"
    assert trainer.state.global_step == 4
    assert "trajectory_ratio/ess" in trainer._metrics["train"] or any(
        "trajectory_ratio/ess" in entry for entry in trainer.state.log_history
    )


def test_the_settings_that_keep_trl_s_algorithm_are_trl_s(tmp_path):
    code = re.search(r"```python\n(args = .*?)```", text_of("docs/migrating.md"), re.DOTALL)[1]
    names = {"TICGRPOConfig": TICGRPOConfig}
    exec(code, names)
    of_trl = GRPOConfig(str(tmp_path), **CPU)
    for name in ("importance_sampling_level", "epsilon", "delta", "loss_type", "scale_rewards"):
        assert getattr(names["args"], name) == getattr(of_trl, name), name
    assert names["args"].clip_mode == "two_sided"
    assert names["args"].epsilon_high == of_trl.epsilon  # TRL's, unset, is epsilon


# Carry-over


def test_the_simulation_runs_as_printed(capsys):
    code = re.search(r"```python\n(.*?)```", text_of("docs/carry_over.md"), re.DOTALL)[1]
    exec(compile(code, "carry_over.md", "exec"), {})
    rows = [list(map(float, line.split())) for line in capsys.readouterr().out.splitlines()]
    steps = {(oversampling, late): share for oversampling, late, share, _, _ in rows}
    assert len(steps) == len(rows) == 12
    assert 0.1 < steps[3, 4] < steps[3, 1] < steps[1.5, 1] < 0.5
    assert all(oldest <= late + -(-oversampling // 1) - 1 for oversampling, late, _, _, oldest in rows)


# Citation


def test_the_citation_is_the_model_card_s():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert citation["version"] == __version__
    assert paper["title"] == TICGRPOTrainer._paper["title"]
    assert TICGRPOTrainer._paper["id"] in paper["url"]
    authors = " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    assert authors in TICGRPOTrainer._paper["citation"]


# The site


def test_docstrings_in_markdown_become_restructured_text(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    from site_extension import markdown_to_rst

    source = r"""`a_`, [`Clip`], |o_i|, *all* of **kwargs, $a = b$.

$$x_ =
|y|$$

    | mode | bound |
    |---|---|
    | `x` | 1/|o| |

See [`~trl.GRPOConfig`] and [`LEVELS`]."""
    expected = r"""``a_``, :py:obj:`Clip <tic_grpo_trl.objective.Clip>`, \|o_i\|, *all* of \*\*kwargs, :math:`a = b`.

.. math:: x_ = |y|

    .. list-table::
       :header-rows: 1

       * - mode
         - bound
       * - ``x``
         - 1/\|o\|


See :py:obj:`GRPOConfig <trl.GRPOConfig>` and ``LEVELS``."""
    assert markdown_to_rst(source.splitlines(), "tic_grpo_trl.objective") == expected.splitlines()


class Fetched(HTMLParser):
    """What a browser would fetch to show a page."""

    def __init__(self, html: str):
        super().__init__()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(attributes.get("src") or "")
        elif tag == "link" and attributes.get("rel") in ("stylesheet", "preload", "icon"):
            self.addresses.append(attributes.get("href") or "")


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_needs_no_network(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-d", tmp_path / "doctrees"]
    built = subprocess.run([*command, DOCS, tmp_path / "html"], capture_output=True, text=True)
    assert built.returncode == 0, textwrap.shorten(built.stderr, 4000)
    pages = list((tmp_path / "html").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not [address for address in Fetched(html).addresses if re.match(r"(https?:)?//", address)], page
        assert "$$" not in re.sub(r"<(pre|script)\b.*?</\1>", "", html, flags=re.DOTALL), page
    method = (tmp_path / "html" / "method.html").read_text(encoding="utf-8")
    assert method.count("<math") > 30
