"""What a source distribution and a wheel hold, and that a wheel is enough to train."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from importlib.metadata import version
from pathlib import Path

import pytest
from launching import ROOT
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from packaging.version import Version
from setuptools import find_packages

import tic_grpo_trl
from tic_grpo_trl.version import require_tested_trl, requirements


BUILD = "import setuptools.build_meta as backend, sys; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a distribution of a source folder as pip does, without a network."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", folder], cwd=source, capture_output=True, text=True, check=True
    )
    return folder / done.stdout.splitlines()[-1]


def tracked_files() -> list[str]:
    """The files of the repository; of a source distribution that is tested, its own."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [name for name in names if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """A source distribution of the repository, and a wheel built from nothing but that."""
    folder = tmp_path_factory.mktemp("dist")
    checkout = folder / "checkout"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, checkout], check=True)
    for name in tracked_files():  # with what is not committed yet
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    source = build("sdist", checkout, folder)
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    return source, build("wheel", folder / source.name.removesuffix(".tar.gz"), folder)


@pytest.fixture(scope="module")
def fresh(distributions, tmp_path_factory) -> Path:
    """The folder of commands of a new environment that has the wheel and, of this one, only the other libraries."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # without running its .pth files
    install = "from pip._internal.cli.main import main; main()"
    subprocess.run(
        [
            folder / "bin/python",
            "-c",
            install,
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--ignore-installed",
            distributions[1],
        ],
        check=True,
        timeout=120,
    )
    return folder / "bin"


def run(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_source_distribution_holds_the_repository(distributions):
    with tarfile.open(distributions[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "examples/recipes/starter.yaml", "accelerate_configs/zero3.yaml", "constraints.txt"} <= held
    left_out = {name for name in tracked_files() if name not in held}
    assert {name.partition("/")[0] for name in left_out} <= {".ci", ".gitignore"}


def test_wheel_holds_the_package_with_recipes_and_starter(distributions):
    held = set(zipfile.ZipFile(distributions[1]).namelist())
    package = {name for name in tracked_files() if name.startswith("tic_grpo_trl/")}
    assert package <= held
    for source, target in (("examples/recipes", "recipes"), ("accelerate_configs", "accelerate_configs")):
        files = [Path(name).name for name in tracked_files() if name.startswith(f"{source}/")]
        assert len(files) > 5
        assert {f"tic_grpo_trl/{target}/{name}" for name in files} <= held
    folders = {name.partition("/")[0] for name in held}
    assert folders == {"tic_grpo_trl", f"tic_grpo_trl-{tic_grpo_trl.__version__}.dist-info"}


def test_every_package_is_listed(distributions):
    with tarfile.open(distributions[0]) as archive:
        sources = archive.extractfile(next(name for name in archive.getnames() if name.endswith("SOURCES.txt")))
        listed = {Path(line).parent.as_posix() for line in sources.read().decode().splitlines() if line.endswith(".py")}
    assert {name.replace(".", "/") for name in find_packages(ROOT, include=["tic_grpo_trl*"])} <= listed


def test_metadata_is_complete_and_has_absolute_links_only(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Home-page"]
    assert {url.partition(",")[0] for url in metadata.get_all("Project-URL")} >= {"Documentation", "Issues"}
    assert {"vllm", "deepspeed", "wandb"} <= set(metadata.get_all("Provides-Extra"))
    blocks = MarkdownIt("commonmark").enable("table").parse(metadata.get_payload())
    tokens = [token for block in blocks for token in block.children or []]
    links = [token.attrs[name] for token in tokens for name in ("href", "src") if name in token.attrs]
    assert len(links) > 20
    assert [link for link in links if not link.startswith("https://")] == []


def test_starter_trains_from_the_wheel_alone(fresh, tmp_path):
    where = run(fresh / "python", "-c", "import tic_grpo_trl; print(tic_grpo_trl.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(fresh.parent), where
    small = "--max_steps 8 --train_size 64 --test_size 16 --per_device_train_batch_size 16".split()
    small += "--per_device_eval_batch_size 16 --eval_steps 8".split()
    done = run(fresh / "tic-grpo", "train", "--config", "starter", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/starter/summary.json").read_text())
    assert summary["updates"] == 8
    assert (tmp_path / "runs/starter/model.safetensors").exists()


def test_commands_of_the_wheel_answer_without_torch(fresh, tmp_path):
    stop = "import sys; sys.modules['torch'] = sys.modules['trl'] = None; from tic_grpo_trl.__main__ import main; "
    for words, wanted in ((["--version"], tic_grpo_trl.__version__), (["recipes"], "zero3"), ([], "dry-run")):
        done = run(fresh / "python", "-c", f"{stop}sys.argv = ['tic-grpo', *{words}]; main()", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert wanted in done.stdout
    printed = run(fresh / "tic-grpo", "recipes", "starter", cwd=tmp_path).stdout
    assert printed == (ROOT / "examples/recipes/starter.yaml").read_text()


def test_editable_installs_find_the_recipes_of_the_checkout():
    from tic_grpo_trl.scripts.recipes import accelerate_config_path, recipe_path

    assert recipe_path("starter").resolve() == ROOT / "examples/recipes/starter.yaml"
    assert accelerate_config_path("zero3").resolve() == ROOT / "accelerate_configs/zero3.yaml"


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE))


def test_tested_versions_are_those_of_the_constraints():
    """The extra `tested` is for users without a checkout."""
    pinned = pins("constraints.txt")
    tested = {name: str(each.specifier).removeprefix("==") for name, each in requirements("tested").items()}
    assert tested == {name: pinned[name] for name in requirements()}


@pytest.mark.parametrize("extra", ["", "test", "wandb"])
def test_oldest_versions_are_the_lower_bounds(extra):
    """Those of the tests' tools too, where `make test-oldest` needs them."""
    pinned = pins("constraints-oldest.txt")
    for name, requirement in requirements(extra).items():
        (lowest,) = [Version(each.version).release for each in requirement.specifier if each.operator == ">="]
        if name in pinned or not extra:
            found = Version(pinned[name])
            assert requirement.specifier.contains(found), f"{name} {found} in constraints-oldest.txt is not allowed"
            assert found.release[: len(lowest)] == lowest, f"{name} {found} in constraints-oldest.txt is not the lowest"


@pytest.mark.parametrize(("found", "wanted"), [("1.99.0", "TRL 1.99.0 is installed"), (None, "TRL is not installed")])
def test_an_untested_trl_is_refused_in_one_sentence(found, wanted, tmp_path):
    folder = tmp_path / "trl-1.99.0.dist-info"
    code = "import tic_grpo_trl; tic_grpo_trl.TICGRPOConfig"
    if found:
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {found}\n")
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"
    else:
        code = (
            "import importlib.metadata as m\n"
            "def gone(name, version=m.version):\n"
            "    if name == 'trl': raise m.PackageNotFoundError(name)\n"
            "    return version(name)\n"
            f"m.version = gone\n{code}"
        )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert wanted in last
    assert f"pip install '{requirements()['trl']}'" in last


def test_the_installed_trl_is_allowed():
    assert requirements()["trl"].specifier.contains(version("trl"))
    assert isinstance(requirements("deepspeed")["deepspeed"], Requirement)
    require_tested_trl()
