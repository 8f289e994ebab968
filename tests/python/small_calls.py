"""Small calls on a Hopper GPU, forward and backward, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/python/small_calls.py
    compute-sanitizer --tool synccheck python tests/python/small_calls.py

Prints each call before it is made, so that the tool's report follows the call it is about. Values
are the tests' subject; here results must only be finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from cases import Case

import flashcore as fc
from flashcore.testing import to_numpy

SMALL = Case("few tiles", dtype="bf16", b=1, q=200, k=300, h=(2, 2))
MANY = Case("more than multiprocessors", dtype="bf16", b=3, q=150, k=300, h=(50, 50), d=128)
PACKED = Case("many", dtype="bf16", packed_q=(80, 0, 81, 1, 479), packed_k=(80, 0, 81, 1, 479))
DIMS = (32, 64, 96, 128, 192, 256)
# Each is made in any order and in a fixed one.
CASES = [
    *(case.but(d=d)
      for d in DIMS
      for case in (SMALL.but(h=(2, 1)), SMALL.but(causal=True), SMALL.but(window=(70, 0)),
                   SMALL.but(softcap=3.0, dropout=0.1), SMALL.but(blocks=(128, 128)),
                   # Tiles without steps.
                   SMALL.but(q=40, causal=True, align="top_left"),
                   SMALL.but(b=2, lengths_q=(200, 0), lengths_k=(1, 300)))),
    *(SMALL.but(**options)
      for options in ({"d": 192, "dv": 128}, {"d": 192, "dv": 128, "causal": True},
                      {"alibi": "h", "sinks": True}, {"strides": "sliced"},
                      {"d": 128, "dtype": "f16"},
                      # In parts, forward.
                      {"q": 60, "k": 5000}, {"q": 60, "k": 5000, "d": 128})),
    MANY,
    MANY.but(d=256),
    MANY.but(d=256, causal=True),
    MANY.but(h=(100, 50)),
    MANY.but(d=104, dtype="f16"),
    MANY.but(lengths_q=(60, 150, 0), lengths_k=(1, 300, 200)),
    MANY.but(blocks=(128, 128)),
    MANY.but(blocks=(64, 64), causal=True, d=64),
    MANY.but(b=1, q=6200, causal=True, align="top_left"),
    MANY.but(b=1, q=6200, window=(6200, 10), align="top_left"),
    # Large tiles, forward.
    MANY.but(b=1, q=200, h=(88, 88), d=64),
    MANY.but(b=1, q=200, k=620, h=(140, 140), d=32, causal=True),
    *(MANY.but(d=d, **options)
      for d in (64, 96, 128)
      for options in ({"causal": True}, {"window": (64, 0)})),
    *(PACKED.but(d=d, h=h, causal=causal)
      for d in (64, 128)
      for h, causal in (((50, 50), False), ((50, 50), True), ((50, 25), True))),
]  # fmt: skip


def run(case: Case, fixed: bool, to_device: Callable[[Any], Any]) -> None:
    arrays = {name: to_device(x) for name, x in case.arrays().items()}
    q, k, v, dout = (arrays[name] for name in ("q", "k", "v", "dout"))
    options = {name: to_device(x) for name, x in case.options().items()} | {"deterministic": fixed}
    plan = fc.explain(q, k, v, direction="backward", **options)
    print(f"{case} {'in a fixed order' if fixed else ''}: {plan.kernel}", flush=True)
    out, lse = fc.attention(q, k, v, return_lse=True, **options)[:2]
    grads = fc.attention_backward(dout, q, k, v, out, lse, **options)
    for x in (out, *grads[:3]):  # reading them waits for the device
        assert np.isfinite(to_numpy(x).astype(np.float32)).all()


def main() -> None:
    from gpu import on_gpu

    for case in CASES:
        for fixed in (False, True):
            run(case, fixed, on_gpu)


if __name__ == "__main__":
    main()
