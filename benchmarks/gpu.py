"""`python -m benchmarks gpu`: attention beside cuDNN and FlashAttention, in one process.

Peers take turns, two calls a round, in an order that rotates; before every call a write of 400 MB
empties the L2 cache, and the GPU pauses for half a millisecond, so that the host is ahead and what
is measured is the GPU's time.
CUDA events, median over all calls. Under a power limit the clock moves by ten percent within
minutes: taking turns lets every peer see the same clock, so compare within a row, not between
files.

cuDNN and FlashAttention-2 are torch's. `pip install -r requirements/peers_gpu.txt` brings the
forward of FlashAttention-3, and FlashAttention-4, which compiles seconds a kernel before its first
cell; with FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 in the environment it keeps what it compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from math import exp, log
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import plots
from benchmarks.peers_cpu import Unavailable, need
from benchmarks.peers_gpu import DEFAULT_PEERS, PEERS, Call, Inputs
from benchmarks.problems import Problem, gpu_grid, gpu_more

FLUSH_BYTES = 400_000_000
CALLS_PER_TURN = 2
WARM_UP_SECONDS = 2.0  # before the first cell: a cool card runs faster than it can keep up
METERED_SAMPLES = 2  # a stretch that holds fewer says nothing of power and clock
PAUSE = 1_000_000  # clocks of the GPU: more than a pass of autograd takes on the host
OURS = "flashcore"
NAMES = {"fwd": "forward", "bwd": "backward"}

Cell = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", choices=("grid", "more"), default="grid", help="which problems")
    parser.add_argument("--direction", choices=("fwd", "bwd"), default="fwd")
    parser.add_argument("--quick", action="store_true", help="12 cells of the grid, 10 rounds")
    parser.add_argument("--rounds", type=int, default=0, help="default 20: 40 calls of each peer")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(DEFAULT_PEERS))
    parser.add_argument("--filter", default="", help="only cells whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help="a folder of results/")


def run(options: argparse.Namespace) -> None:
    torch = need("torch")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu: torch finds no CUDA device")
    device = torch.cuda.get_device_name()
    problems = gpu_more() if options.set == "more" else gpu_grid(options.quick)
    problems = [p for p in problems if options.filter in p.cell]
    rounds = options.rounds or (10 if options.quick else 20)
    meter = Meter()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    warm_up(torch)
    ceilings = [matmul_tflops(torch, flush)]
    cells: list[Cell] = []
    for p in problems:
        rows = measure(torch, p, options.direction, options.peers, rounds, flush, meter)
        cells += rows
        print(line(p, rows), flush=True)
    ceilings.append(matmul_tflops(torch, flush))
    result = {
        "device": device,
        "direction": options.direction,
        "driver": nvidia_smi("driver_version"),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": commit(),
        "matmul_tflops": ceilings,
        "rounds": rounds,
        "cells": cells,
    }
    meter.close()
    name = f"{NAMES[options.direction]}_{'quick' if options.quick else options.set}"
    folder = options.out or Path("benchmarks/results") / device.split()[-1].lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report = markdown(result)
    path.with_suffix(".md").write_text(report, encoding="utf-8")
    plots.gpu(result, path.with_suffix(".png"))
    print(report)


# ---- measuring ----------------------------------------------------------------------------------


def measure(
    torch: Any,
    p: Problem,
    direction: str,
    peers: list[str],
    rounds: int,
    flush: Any,
    meter: Meter,
) -> list[Cell]:
    x = Inputs(torch, p)
    calls: dict[str, Call] = {}
    refusals: dict[str, str] = {}
    for name in peers:
        try:
            calls[name] = PEERS[name](p, x, direction)
            check(torch, p, x, calls[name](), direction)
        except Unavailable as reason:
            calls.pop(name, None)
            refusals[name] = str(reason)
        except Exception as error:  # a peer that fails has no number, the others have
            calls.pop(name, None)
            text = str(error).partition("\n")[0][:100]
            refusals[name] = f"{type(error).__name__}: {text}" if text else type(error).__name__
    began = time.monotonic()
    microseconds = take_turns(torch, calls, rounds, flush, PAUSE)
    metered = meter.since(began)
    cells = []
    for name in peers:
        cell: Cell = {"cell": p.cell, "direction": direction, "peer": name}
        if name in refusals:
            cell["refusal"] = refusals[name]
        else:
            us = median(microseconds[name])
            cell |= {"us": round(us, 2), "tflops": round(p.flops(direction) / us * 1e-6, 1)}
            cell |= metered
        cells.append(cell)
    return cells


def take_turns(
    torch: Any, calls: dict[str, Call], rounds: int, flush: Any, pause: int = 0
) -> dict[str, list[float]]:
    """Microseconds of every call. The first round warms up and is not counted."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        events = []
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            for _ in range(CALLS_PER_TURN):
                flush.fill_(turn % 100)
                if pause:
                    torch.cuda._sleep(pause)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                calls[name]()
                end.record()
                events.append((name, begin, end))
        torch.cuda.synchronize()
        if turn:
            for name, begin, end in events:
                times[name].append(begin.elapsed_time(end) * 1e3)
    return times


def check(
    torch: Any, p: Problem, x: Inputs, got: Any, direction: str = "fwd", kept: Any = None
) -> None:
    """The timed call itself, on the heads of its last key head (of its last document).

    kept: which pairs of these heads are visible, if not all that the problem says.
    Passes when its errors are at most twice those of plain attention in the same dtype: three times
    for gradients, whose sums are longer.
    """
    group = p.num_heads // p.heads_kv
    rows = slice(-p.lengths[-1], None) if p.lengths else -1

    def part(t: Any, heads: int) -> Any:  # (heads, S, D)
        return t[rows, ..., -heads:, :].transpose(-2, -3)

    inputs = [part(x.q, group), part(x.k, 1), part(x.v, 1), part(x.dout, group)]
    exact, plain = (
        definition(torch, p, direction, dtype, inputs, kept) for dtype in (torch.float64, x.q.dtype)
    )
    factor = 2 if direction == "fwd" else 3
    results = {"out": got} if direction == "fwd" else dict(zip(("dq", "dk", "dv"), got))
    for (name, g), e, same in zip(results.items(), exact, plain):
        allowed = (factor * (same - e).abs().max() + 1e-5).item()
        error = (part(g, e.shape[0]).double() - e).abs().max().item()
        if not error <= allowed:
            raise Unavailable(f"WRONG {name}: error {error:.1e}, allowed {allowed:.1e}")


def definition(
    torch: Any, p: Problem, direction: str, dtype: Any, inputs: list[Any], kept: Any = None
) -> tuple[Any, ...]:
    """(out,) or (dq, dk, dv); inputs: q, k, v, dout (heads, S, D); dtype: of operands."""
    q, k, v, dout = (t.to(dtype) for t in inputs)
    scale = p.head_dim**-0.5
    diagonal = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    j = torch.arange(k.shape[1], device=q.device)[None, :]
    hidden = (j > diagonal) & bool(p.causal or p.window)
    if p.window:
        hidden |= j < diagonal - p.window
    if kept is not None:
        hidden = hidden | ~kept
    s = (q @ k.mT).double() * scale
    weights = torch.softmax(s.masked_fill_(hidden, float("-inf")), dim=-1).nan_to_num_()
    out = weights.to(dtype) @ v
    if direction == "fwd":
        return (out.double(),)
    delta = (out.double() * dout.double()).sum(-1, keepdim=True)
    ds = (weights * ((dout @ v.mT).double() - delta) * scale).to(dtype)
    dk, dv = ds.mT @ q, weights.to(dtype).mT @ dout
    return (ds @ k).double(), dk.double().sum(0, keepdim=True), dv.double().sum(0, keepdim=True)


def warm_up(torch: Any) -> None:
    """Products until the card is as hot, and its clock as low, as the cells will make it."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    until = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < until:
        for _ in range(20):
            _ = a @ b
        torch.cuda.synchronize()


def matmul_tflops(torch: Any, flush: Any) -> float:
    """The rate of an 8192^3 bfloat16 product, hot, as cuBLAS does it."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    us = median(take_turns(torch, {"matmul": lambda: a @ b}, 15, flush)["matmul"])
    return round(2 * n**3 / us * 1e-6, 1)


class Meter:
    """Power and SM clock, sampled by nvidia-smi in the background."""

    def __init__(self) -> None:
        # Instant power: the plain one is a mean over the last second, of other cells.
        query = "--query-gpu=power.draw.instant,clocks.sm --format=csv,noheader,nounits -lms 50"
        self.samples: list[tuple[float, float, float]] = []
        try:
            self.process: Any = subprocess.Popen(
                ["nvidia-smi", *query.split()], stdout=subprocess.PIPE, text=True
            )
        except OSError:
            self.process = None
            return
        import threading

        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        for text in self.process.stdout:
            try:
                watts, mhz = (float(part) for part in text.split(","))
            except ValueError:
                continue
            self.samples.append((time.monotonic(), watts, mhz))

    def since(self, began: float) -> dict[str, int]:
        """Mean watts and MHz. Empty if the stretch was too short to say, or nobody samples."""
        chosen = [s for s in self.samples if s[0] >= began]
        if len(chosen) < METERED_SAMPLES:
            return {}
        return {
            "watts": round(mean(s[1] for s in chosen)),
            "mhz": round(mean(s[2] for s in chosen)),
        }

    def close(self) -> None:
        if self.process:
            self.process.terminate()


def nvidia_smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def commit() -> str:
    """Of this tree; FLASHCORE_COMMIT names it where there is no git to ask."""
    if given := os.environ.get("FLASHCORE_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# ---- the report ---------------------------------------------------------------------------------


def line(p: Problem, rows: list[Cell]) -> str:
    shown = [f"{c['peer']} {c['tflops']:.0f}" if "us" in c else f"{c['peer']} –" for c in rows]
    return f"{p.cell:<36} TFLOP/s: {', '.join(shown)}"


def ratio_to_best(rows: list[Cell]) -> float | None:
    rates = {c["peer"]: c["tflops"] for c in rows if "tflops" in c}
    ours = rates.pop(OURS, None)
    rates.pop("eager", None)
    return ours / max(rates.values()) if ours and rates else None


def markdown(result: dict[str, Any]) -> str:
    cells = result["cells"]
    peers = list(dict.fromkeys(c["peer"] for c in cells))
    low, high = min(result["matmul_tflops"]), max(result["matmul_tflops"])
    ceiling = (low + high) / 2
    metered = any("watts" in c for c in cells)
    lines = [
        f"# {NAMES[result['direction']].capitalize()} on {result['device']}",
        "",
        f"Driver {result['driver']}, torch {result['torch']}, cuDNN {result['cudnn']}, commit "
        f"{result['commit']}. TFLOP/s, median of {CALLS_PER_TURN * result['rounds']} calls that "
        "take turns in one process, L2 flushed before each; every timed call was checked against "
        f"float64 first. 8192^3 bf16 matmul in the same process: {low:.0f} to {high:.0f} TFLOP/s.",
        "",
        f"| cell | {' | '.join(peers)} | ours / best | us | % of matmul |" + " W | MHz |" * metered,
        "|---" * (len(peers) + 4 + 2 * metered) + "|",
    ]
    ratios = []
    for name in dict.fromkeys(c["cell"] for c in cells):
        rows = [c for c in cells if c["cell"] == name]
        rate = {c["peer"]: c.get("tflops") for c in rows}
        best = max((r for r in rate.values() if r), default=0)
        shown = [
            "–" if not r else f"**{r:.0f}**" if r == best else f"{r:.0f}"
            for r in (rate[p] for p in peers)
        ]
        ours = next((c for c in rows if c["peer"] == OURS and "us" in c), None)
        ratio = ratio_to_best(rows)
        if ratio:
            ratios.append(ratio)
        tail = [f"{ratio:.2f}" if ratio else "–"]
        tail += (
            [f"{ours['us']:.1f}", f"{100 * ours['tflops'] / ceiling:.0f}"] if ours else ["–", "–"]
        )
        meter: Cell = next((c for c in rows if "watts" in c), {})
        if metered:
            tail += [str(meter.get("watts", "–")), str(meter.get("mhz", "–"))]
        lines.append(f"| {name} | " + " | ".join(shown + tail) + " |")
    if ratios:
        geometric = exp(sum(log(r) for r in ratios) / len(ratios))
        lines += [
            "",
            f"Ours / best peer: geometric mean {geometric:.3f}, lowest {min(ratios):.2f}, "
            f"{sum(r >= 1 for r in ratios)} of {len(ratios)} cells at 1 or above.",
        ]
    reasons = dict.fromkeys((c["peer"], c["refusal"]) for c in cells if "refusal" in c)
    if reasons:
        lines += ["", "– means no number:", ""]
        lines += [f"* {peer}: {why}" for peer, why in reasons]
    return "\n".join(lines) + "\n"
