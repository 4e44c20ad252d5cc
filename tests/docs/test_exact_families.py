"""docs/exact-families.md says of every family what `batch_invariant` does with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from families import SERVED, is_known, tiny
from packaging.version import Version

from specdec import batch_invariant
from specdec.errors import UnsupportedModelError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "exact-families.md").read_text()
NO_INTERFACE = "does not use transformers' attention interface"
WORDS = {"jetmoe": "runs aten.index_add", "doge": "does not run with the batch-invariant attention"}
# Before 5.24. The last two: its "sdpa" attention leaves out soft-caps, so the stock logits are others.
OLDER = {
    "gptj": NO_INTERFACE,
    "codegen": NO_INTERFACE,
    "aria_text": "AriaExperts",
    "gemma2": "gives other logits",
    "vaultgemma": "gives other logits",
}
# The comparison of bits on a CPU, whose vectorised functions round by where an element lies; a GPU's do not.
ROUNDING_OF_A_CPU = "on cpu is not batch-invariant"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def listed(heading: str) -> list[str]:
    """The families in the table whose first column has that heading."""
    table = PAGE.split(f"| {heading} |")[1].split("\n\n")[0]
    return [family for line in table.splitlines()[2:] for family in line.split("|")[1].strip().split(", ")]


def refusal(family: str) -> str | None:
    """None if the model is served, apart from the rounding of this CPU."""
    try:
        with batch_invariant(tiny(family)):
            return None
    except UnsupportedModelError as error:
        return None if ROUNDING_OF_A_CPU in str(error) else str(error)


def test_every_family_is_in_one_of_the_tables():
    assert sorted(listed("served") + listed("refused")) == sorted(SERVED)
    assert all(family in PAGE.split("With transformers 5.17")[1] for family in OLDER)


@pytest.mark.parametrize("family", [family for family in SERVED if family != "llama4"])
def test_a_family_is_served_or_refused_as_the_page_says(family):
    if not is_known(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    found = refusal(family)
    if family in listed("refused"):
        assert found is not None and WORDS.get(family, NO_INTERFACE) in found
    elif Version(transformers.__version__) < Version("5.24") and family in OLDER:
        assert found is None or OLDER[family] in found
    else:
        assert found is None
