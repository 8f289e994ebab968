"""`python -m benchmarks host`: what a call costs before and after the work itself.

One query and one key of one head: the time of a call is that of Python, of reading the arrays, of
checking and of allocating the result. The calls take turns in one process, a round of thousands
each, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from statistics import median
from typing import Any

import flashcore as fc
from benchmarks.host_jax import jax_calls

SHAPE = (1, 1, 1, 8)  # (batch, seqlen, heads, head_dim)

Call = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--calls", type=int, default=2000, help="calls of a round")
    parser.add_argument("--rounds", type=int, default=51)


def run(options: argparse.Namespace) -> None:
    fc.set_num_threads(1)
    groups: list[dict[str, Call]] = []
    with ExitStack() as scope:
        wait: Call = lambda: None
        if find_spec("torch"):
            import torch

            torch.set_num_threads(1)
            groups.append(torch_calls(options.device))
            scope.enter_context(torch.no_grad())
            if options.device == "cuda":
                wait = torch.cuda.synchronize
        if options.device == "cpu":
            groups.append(numpy_calls())
        if find_spec("jax"):
            groups.append(jax_calls(options.device, SHAPE))
        for line in table(groups, measure(groups, options.calls, options.rounds, wait)):
            print(line)


def torch_calls(device: str) -> dict[str, Call]:
    """The first is what the others are measured against: the bare allocation of the result."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(SHAPE, device=device).to(dtype) for _ in range(3))
    out = torch.empty_like(q)
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    return {
        "torch.empty_like": lambda: torch.empty_like(q),
        "flashcore.attention": lambda: fc.attention(q, k, v),
        "flashcore.attention, causal=True": lambda: fc.attention(q, k, v, causal=True),
        "flashcore.attention, return_lse=True": lambda: fc.attention(q, k, v, return_lse=True),
        "flashcore.attention, out=": lambda: fc.attention(q, k, v, out=out),
        "torch SDPA": lambda: scaled_dot_product_attention(qh, kh, vh),
    }


def numpy_calls() -> dict[str, Call]:
    import numpy as np

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(SHAPE, np.float32) for _ in range(3))
    out = np.empty_like(q)
    return {
        "numpy.empty_like": lambda: np.empty_like(q),
        "flashcore.attention, NumPy": lambda: fc.attention(q, k, v),
        "flashcore.attention, NumPy, out=": lambda: fc.attention(q, k, v, out=out),
    }


def measure(
    groups: list[dict[str, Call]], calls: int, rounds: int, wait: Call
) -> dict[str, list[float]]:
    """Nanoseconds of a call, one figure per round."""
    every = {name: call for group in groups for name, call in group.items()}
    found: dict[str, list[float]] = {name: [] for name in every}
    for turn in range(rounds + 1):
        for name, call in every.items():
            wait()
            start = time.perf_counter_ns()
            for _ in range(calls):
                call()
            if turn > 0:  # the first round warms up
                found[name].append((time.perf_counter_ns() - start) / calls)
            wait()
    return found


def table(groups: list[dict[str, Call]], found: dict[str, list[float]]) -> list[str]:
    lines = [
        "| call | median, ns | least, ns | beyond the first of its group, least |",
        "|---|---|---|---|",
    ]
    for group in groups:
        base = min(found[next(iter(group))])
        for name in group:
            least = min(found[name])
            beyond = "" if least == base else f"{least - base:.0f}"
            lines.append(f"| {name} | {median(found[name]):.0f} | {least:.0f} | {beyond} |")
    return lines
