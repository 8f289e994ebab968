"""What a call costs besides its time: memory, and the speed of others who share the process."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.peers_cpu import PEERS, Unavailable, make_inputs
from benchmarks.problems import Problem

MB = 1e6
SEQLENS = (1024, 2048, 4096, 8192)
STANDARD_SEQLENS = SEQLENS[:3]  # standard attention: 4 GB at the last one
MEMORY_PEERS = ("flashcore", "torch", "numpy")


def measure() -> dict[str, Any]:
    """{"memory": ..., "alternating": ...}; every figure from a process of its own."""
    memory = [
        {"peer": peer, "direction": direction, "seqlen": seqlen, "mb": mb}
        for peer in MEMORY_PEERS
        for direction in ("fwd", "bwd")
        for seqlen in (STANDARD_SEQLENS if peer == "numpy" else SEQLENS)
        if (mb := isolated(memory_growth, peer, direction, seqlen)) is not None
    ]
    slowdown = {
        name: value
        for name in ("torch", "numpy")
        if (value := isolated(alternating_slowdown, name)) is not None
    }
    return {"memory": memory, "alternating": slowdown}


def rows(result: dict[str, Any]) -> list[str]:
    """Markdown of what measure() found."""
    lines: list[str] = []
    if "alternating" in result:
        lines += [
            f"| calls that alternate with {name}'s matmul / each alone | <= 1.15 | {value:.2f} |"
            for name, value in result["alternating"].items()
        ]
    if result.get("memory"):
        lines += [
            "",
            "## Memory",
            "",
            "Growth of the resident set at its peak during one call, MB (1 x 8 heads x 64, fp32, "
            "2 threads; outputs included; bwd is forward and backward).",
            "",
            "| | " + " | ".join(str(n) for n in SEQLENS) + " |",
            "|---" * (len(SEQLENS) + 1) + "|",
        ]
        found = {(m["peer"], m["direction"], m["seqlen"]): m["mb"] for m in result["memory"]}
        for peer, direction in dict.fromkeys((k[0], k[1]) for k in found):
            shown = [
                f"{found[peer, direction, n]:.1f}" if (peer, direction, n) in found else "–"
                for n in SEQLENS
            ]
            lines.append(f"| {peer} {direction} | " + " | ".join(shown) + " |")
    return lines


def isolated(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a fresh process; None if a library is missing."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, function, args))
    process.start()
    value = ours.recv()
    process.join()
    return value


def _send(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        pipe.send(function(*args))
    except Unavailable:
        pipe.send(None)


# ---- memory -------------------------------------------------------------------------------------


def status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / MB
    return 0.0


def memory_growth(name: str, direction: str, seqlen: int) -> float:
    """Peak of the resident set in one call over its size before the call.

    A small call first, so that threads and libraries are loaded; the peak is then reset.
    """
    peer = PEERS[name](2)
    small = Problem(1, 8, 64, 64, 64, dtype="float32")
    large = Problem(1, 8, seqlen, seqlen, 64, dtype="float32")
    for d in ("fwd", "bwd"):
        peer.prepare(small, d, make_inputs(small))()
    x = make_inputs(large)
    call = peer.prepare(large, "fwd", x) if direction == "fwd" else None
    with suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but kept would hide growth
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_mb("VmRSS")
    # Backward: preparing it runs the forward, which belongs to the figure; so do the copies of the
    # inputs that it makes, the same for every library, which are taken off again.
    result = call() if call else peer.prepare(large, "bwd", x)()
    peak = status_mb("VmHWM") - before
    del result
    copies = 0 if call else sum(a.nbytes for a in x.values()) / MB
    return round(peak - copies, 1)


# ---- beside others ------------------------------------------------------------------------------


def alternating_slowdown(name: str) -> float:
    """Time of attention and a matmul of `name` in turns, over the sum of each alone."""
    fc = PEERS["flashcore"](2)
    p = Problem(1, 8, 512, 512, 64, dtype="float32")
    attend = fc.prepare(p, "fwd", make_inputs(p))
    if name == "torch":
        torch = PEERS["torch"](2).torch  # type: ignore[attr-defined]
        a = torch.rand(512, 512)
        other: Callable[[], Any] = lambda: a @ a  # noqa: E731
    else:
        b = np.random.default_rng(0).random((512, 512), dtype=np.float32)
        other = lambda: b @ b  # noqa: E731

    def seconds(*calls: Callable[[], Any]) -> float:
        times = []
        for _ in range(25):
            begin = time.perf_counter()
            for call in calls:
                call()
            times.append(time.perf_counter() - begin)
        return median(times)

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-2:])
    ratios = []
    for _ in range(3):
        alone = seconds(attend) + seconds(other)
        ratios.append(seconds(attend, other) / alone)
    return round(median(ratios), 3)
