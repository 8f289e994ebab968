"""out, lse and max_logits of every case against the float64 reference, by the error rule."""

import cases
import pytest
from helpers import check_forward


@pytest.mark.parametrize("case", cases.FORWARD, ids=str)
def test_matches_reference(case):
    check_forward(case.arrays(), case.options())
