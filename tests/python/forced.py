"""Runs one kernel on the cases it takes. For CPU kernels a program of its own: see test_kernels.py.

FLASHCORE_FORCE=cpu-avx2-fwd-float32 python forced.py cpu-avx2-fwd-float32
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
from cases import Case

import flashcore as fc
from flashcore import reference
from flashcore.testing import assert_close_to_reference, assert_grads_close_to_reference

DTYPE_OF = {np.dtype(t).name: name for name, t in cases.DTYPES.items()}

# Small, and together they reach every branch a kernel can have. A kernel runs those it accepts.
CORE = [
    Case("full tiles and a tail"),
    Case("causal with groups", causal=True, h=(4, 2)),
    Case("more rows than keys: rows that see nothing", causal=True, q=200, k=90),
    Case("top-left", causal=True, align="top_left"),
    Case("one row", q=1, k=300, h=(8, 1)),
    Case("one key", q=130, k=1),
    Case("the next head dim up", d=40, causal=True),
    Case("128", d=128),
    Case("128, causal", d=128, causal=True),
    Case("256", d=256, q=70, k=80),
    Case("256, causal", d=256, q=80, k=70, causal=True),
    Case("an odd head dim", d=33, dv=17),
    Case("a window", window=(30, 2)),
    Case("everything that moves the score", softcap=2.0, alibi="h", bias="hqk", sinks=True),
    Case(
        "everything that excludes",
        causal=True,
        window=(90, None),
        mask="bhqk",
        lengths_q=(113, 40),
        lengths_k=(60, 203),
        blocks=(32, 48),
    ),
    Case("dropout", dropout=0.3, causal=True),
    Case("packed sequences", packed_q=(30, 0, 64, 1), packed_k=(40, 5, 64, 0), causal=True),
    Case("strides", strides="sliced", layout="bhsd"),
]


# For the rows of a GPU's table, at their own head dims: each row is the library's choice for one.
GPU = [
    Case("two query tiles, a tail of keys", q=200, k=300),
    Case("causal", causal=True, q=300, k=200, h=(4, 2)),
    Case("causal, long keys", causal=True, b=1, q=70, k=1700),
    Case("causal, very long keys", causal=True, b=1, q=70, k=8300, h=(1, 1)),
    Case("long keys", b=1, q=70, k=1700),
    Case("very long keys", b=1, q=70, k=8300, h=(1, 1)),
    Case("softcap", causal=True, softcap=3.0, q=200, k=300),
    Case("dropout and ALiBi", dropout=0.2, alibi="h", q=130, k=300),
    Case("a window", window=(90, 20), q=200, k=300),
    Case("packed sequences", packed_q=(30, 0, 164, 1), packed_k=(40, 5, 300, 0)),
    Case("block lists", blocks=(128, 128), q=200, k=300),
    Case("lists of small blocks", blocks=(64, 64), q=200, k=300),
    Case("small blocks", blocks=(64, 64), causal=True, softcap=3.0, q=200, k=300),
    Case("many tiles", b=3, q=130, k=100, h=(50, 50)),
    Case("many tiles, longer", b=3, q=150, k=300, h=(50, 50)),
    Case("block lists, many tiles of many keys", blocks=(128, 128), b=1, q=200, k=2300, h=(140, 1)),
    Case("many tiles of 256 rows", b=1, q=200, k=100, h=(88, 1)),
    Case("many tiles, causal", b=3, q=130, k=100, h=(50, 50), causal=True),
    Case("many tiles, causal, long keys", q=130, k=1700, h=(70, 1), causal=True),
    Case("many tiles, causal, very long keys", q=130, k=5000, h=(70, 1), causal=True),
    Case("in a fixed order", b=1, q=400, k=250, fixed=True),
    Case("in a fixed order, many tiles", b=1, q=400, k=256, h=(70, 70), fixed=True),
]


def cases_of(kernel: fc.Kernel) -> list[Case]:
    """The core cases this kernel's row says it takes; for a GPU, those among which its own are."""
    dtype = DTYPE_OF.get(kernel.dtype)
    if dtype is None:
        return []
    if kernel.backend != "cpu":
        dims = {"d": kernel.head_dim, "dv": kernel.head_dim_v}
        return [case.but(dtype=dtype, **dims) for case in GPU]
    taken = []
    for case in CORE:
        # Long double, in which float64 is checked, is slow: one batch is enough there.
        one = dtype == "f64" and not (case.lengths_q or case.packed_q)
        taken.append(case.but(dtype=dtype, **({"b": 1} if one else {})))
    return taken


def run(kernel: fc.Kernel, case: Case, to_device: Callable[[Any], Any] = lambda x: x) -> bool:
    """False if the library chooses another kernel."""
    arrays, values = case.arrays(), case.options()
    options = {name: to_device(x) for name, x in values.items()}
    q, k, v = (to_device(arrays[name]) for name in "qkv")
    options["deterministic"] = case.fixed
    plan = fc.explain(q, k, v, direction=kernel.direction, **options)
    if plan.kernel != kernel.name:
        return False
    if kernel.direction == "forward":
        result = fc.attention(q, k, v, **options, return_lse=True)
        assert_close_to_reference(result, arrays["q"], arrays["k"], arrays["v"], **values)
        return True
    # The forward kernels may be forced out: out and lse come from the definition.
    dense = dict(values)
    if case.blocks:
        dense["block_mask"] = values["block_mask"].to_dense()
    exact = reference.attention(arrays["q"], arrays["k"], arrays["v"], **dense)
    out = to_device(exact.out.astype(arrays["q"].dtype))
    lse = to_device(exact.lse.astype(arrays["dlse"].dtype))
    grads = fc.attention_backward(
        to_device(arrays["dout"]), q, k, v, out, lse, **options, dlse=to_device(arrays["dlse"])
    )
    assert_grads_close_to_reference(
        grads, arrays["dout"], arrays["q"], arrays["k"], arrays["v"], dlse=arrays["dlse"], **values
    )
    return True


def main(name: str) -> None:
    kernel = next(k for k in fc.kernels() if k.name == name)
    ran = 0
    for case in cases_of(kernel):
        try:
            assert run(kernel, case), "another kernel was chosen"
        except AssertionError as e:
            raise AssertionError(f"{name} on {case}: {e}") from e
        ran += 1
    print(ran)


if __name__ == "__main__":
    main(sys.argv[1])
