"""Every causal language model of transformers through both trainers; `make models` writes what comes out."""

import pytest
from launching import ROOT
from zoo import architectures
from zoo_runs import look_at


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_garbage_collection")]

PAGE = (ROOT / "docs/models.md").read_text().splitlines()


@pytest.mark.parametrize("name", architectures())
def test_the_numbers_are_trl_s(tmp_path, name):
    found = look_at(name, tmp_path)
    for kind, measured in (found.measured | found.variants).items():
        assert not measured.wrong, (kind, measured)
    assert {measured.layout for measured in found.variants.values()} <= {"padded"}
    if found.measured:
        assert found.row() in PAGE, "run make models"
    else:
        assert f"- `{name}`: {found.failures['eager']}" in PAGE, "run make models"


def test_enough_of_them_can_be_built():
    assert sum(line.startswith("| `") for line in PAGE) >= 90
