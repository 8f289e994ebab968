"""`python -m benchmarks host`: what a call costs before and after the work itself.

One query and one key of one head: the time of a call is that of Python, of reading the arrays, of
checking and of allocating the result. The calls take turns in one process, a round of thousands
each, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import flashcore as fc
from benchmarks.cpu import versions
from benchmarks.gpu import commit, nvidia_smi
from benchmarks.host_jax import jax_calls
from benchmarks.peaks import cpu_name

SHAPE = (1, 1, 1, 8)  # (batch, seqlen, heads, head_dim)
CUDA_SHAPE = (1, 1, 1, 64)  # a head_dim that every library beside takes

Call = Callable[[], Any]


class Group(NamedTuple):
    """Calls to compare. The first is what the others are measured against."""

    calls: dict[str, Call]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--calls", type=int, default=2000, help="calls of a round")
    parser.add_argument("--rounds", type=int, default=51)


def run(options: argparse.Namespace) -> None:
    fc.set_num_threads(1)
    cuda = options.device == "cuda"
    # A stream takes a thousand launches ahead, then the host waits for the device.
    calls = min(options.calls, 200) if cuda else options.calls
    shape = CUDA_SHAPE if cuda else SHAPE
    groups: list[Group] = []
    wait: Call = lambda: None
    if find_spec("torch"):
        import torch

        torch.set_num_threads(1)
        groups += torch_groups(options.device, shape)
        if cuda:
            wait = torch.cuda.synchronize
    if not cuda:
        groups.append(numpy_calls())
    elif find_spec("cupy"):
        groups.append(cupy_calls(shape))
    if find_spec("jax"):
        os.environ.setdefault(
            "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
        )  # the others need memory too
        groups.append(Group(jax_calls(options.device, shape)))
    print(heading(cuda, calls, options.rounds))
    for line in table(groups, measure(groups, calls, options.rounds, wait)):
        print(line)


def heading(cuda: bool, calls: int, rounds: int) -> str:
    libraries = ["torch", "jax", *(["cupy-cuda13x", "flash-attn-4"] if cuda else ["numpy"])]
    found = ", ".join(f"{name} {version}" for name, version in versions(libraries).items())
    device = f"{nvidia_smi('name')}, driver {nvidia_smi('driver_version')}, " if cuda else ""
    return (
        f"# What a call costs: {device}{cpu_name()}\n\n"
        f"flashcore-attention {fc.__version__}, commit {commit()}, {found}. "
        f"{rounds} rounds of {calls} calls of each, in turns.\n"
    )


def torch_groups(device: str, shape: tuple[int, ...]) -> list[Group]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import flashcore.torch as ft

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    out = torch.empty_like(q)
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    dq, dk, dv = (x.clone().requires_grad_() for x in (q, k, v))
    dqh, dkh, dvh = (x.detach().requires_grad_() for x in (qh, kh, vh))
    plain = {
        "torch.empty_like": lambda: torch.empty_like(q),
        "flashcore.attention": lambda: fc.attention(q, k, v),
        "flashcore.attention, causal=True": lambda: fc.attention(q, k, v, causal=True),
        "flashcore.attention, return_lse=True": lambda: fc.attention(q, k, v, return_lse=True),
        "flashcore.attention, out=": lambda: fc.attention(q, k, v, out=out),
        "flashcore.torch.attention": lambda: ft.attention(q, k, v),
        "torch SDPA": lambda: scaled_dot_product_attention(qh, kh, vh),
    }
    recorded = {
        "torch.empty_like, beside recorded calls": lambda: torch.empty_like(q),
        "flashcore.torch.attention, recorded": lambda: ft.attention(dq, dk, dv),
        "flashcore.torch.attention, recorded, causal=True": lambda: ft.attention(
            dq, dk, dv, causal=True
        ),
        "torch SDPA, recorded": lambda: scaled_dot_product_attention(dqh, dkh, dvh),
    }
    if device == "cuda":
        plain["torch zero_, one launch"] = lambda: out.zero_()
    flash_attn_4 = cute_attention() if device == "cuda" else None
    if flash_attn_4:
        plain["flash-attn-4"] = lambda: flash_attn_4(q, k, v)
        recorded["flash-attn-4, recorded"] = lambda: flash_attn_4(dq, dk, dv)
    return [Group(plain, torch.no_grad), Group(recorded, torch.enable_grad)]


def cute_attention() -> Any:
    """flash-attn-4's function; None where it is not installed or does not run."""
    try:
        return importlib.import_module("flash_attn.cute").flash_attn_func
    except Exception:  # whatever an optional package raises while it is imported
        return None


def numpy_calls() -> Group:
    import numpy as np

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(SHAPE, np.float32) for _ in range(3))
    out = np.empty_like(q)
    return Group(
        {
            "numpy.empty_like": lambda: np.empty_like(q),
            "flashcore.attention, NumPy": lambda: fc.attention(q, k, v),
            "flashcore.attention, NumPy, out=": lambda: fc.attention(q, k, v, out=out),
        }
    )


def cupy_calls(shape: tuple[int, ...]) -> Group:
    import cupy

    q, k, v = (cupy.random.standard_normal(shape).astype(cupy.float16) for _ in range(3))
    out = cupy.empty_like(q)
    return Group(
        {
            "cupy.empty_like": lambda: cupy.empty_like(q),
            "flashcore.attention, CuPy": lambda: fc.attention(q, k, v),
            "flashcore.attention, CuPy, out=": lambda: fc.attention(q, k, v, out=out),
        }
    )


def measure(groups: list[Group], calls: int, rounds: int, wait: Call) -> dict[str, list[float]]:
    """Nanoseconds of a call, one figure per round."""
    found: dict[str, list[float]] = {name: [] for group in groups for name in group.calls}
    for turn in range(rounds + 1):
        for group in groups:
            with group.scope():
                for name, call in group.calls.items():
                    wait()
                    start = time.perf_counter_ns()
                    for _ in range(calls):
                        call()
                    if turn > 0:  # the first round warms up
                        found[name].append((time.perf_counter_ns() - start) / calls)
                    wait()
    return found


def table(groups: list[Group], found: dict[str, list[float]]) -> list[str]:
    lines = [
        "| call | median, ns | least, ns | beyond the first of its group, least |",
        "|---|---|---|---|",
    ]
    for group in groups:
        base = min(found[next(iter(group.calls))])
        for name in group.calls:
            least = min(found[name])
            beyond = "" if least == base else f"{least - base:.0f}"
            lines.append(f"| {name} | {median(found[name]):.0f} | {least:.0f} | {beyond} |")
    return lines
