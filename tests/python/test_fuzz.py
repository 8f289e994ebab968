"""A hundred thousand random calls: each result is right, or refused with one of flashcore's errors.

Every call is made from its number alone, so a failure names the number that repeats it:

    python -c "import fuzz; fuzz.one(4711)"            # in this directory
"""

import json
import os

import fuzz
from helpers import run_python

COUNT = int(os.environ.get("FLASHCORE_FUZZ_COUNT", "100000"))


def test_every_result_is_right_or_refused():
    """In a process of its own, so that a crash is a failure of this test and of no other."""
    said = run_python(f"import fuzz; fuzz.main({COUNT})", timeout=1800)
    counts = json.loads(said.strip().splitlines()[-1])
    assert counts["right"] + counts["refused"] == COUNT
    assert counts["right"] > COUNT * 0.3, counts
    assert counts["refused"] > COUNT * 0.2, counts


def test_the_fuzzer_finds_a_wrong_result(monkeypatch):
    """A checker that cannot fail proves nothing."""
    import flashcore as fc

    real = fc.attention

    def wrong(*args, **kwargs):
        result = real(*args, **kwargs)
        if result.out.size:
            result.out.reshape(-1)[-1] += 1
        return result

    monkeypatch.setattr(fc, "attention", wrong)
    failures = 0
    for n in range(60):
        try:
            fuzz.one(n)
        except fuzz.Wrong:
            failures += 1
    assert failures > 10
