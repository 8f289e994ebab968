"""`python -m benchmarks cpu`: flashcore beside the other CPU libraries, in one run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from importlib import metadata
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import plots, side_effects
from benchmarks.peaks import cpu_name, cpu_peaks, torch_matmul
from benchmarks.peers_cpu import PEERS
from benchmarks.problems import SHORT_DTYPE, Problem, cpu_backward, cpu_forward
from benchmarks.workers import Sample, Workers

DTYPES = ("float32", "bfloat16", "float16")
PACKAGES = ("flashcore-attention", "torch", "onnxruntime", "openvino", "jax", "numpy")
OURS = "flashcore"

Cell = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two shapes, 3 rounds")
    parser.add_argument("--rounds", type=int, default=0, help="default 5; 3 for backward")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--directions", nargs="+", choices=("fwd", "bwd"), default=["fwd", "bwd"])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--no-side-effects", action="store_true", help="skip memory and slowdown")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--name", default="cpu", help="file name of the results")


def run(options: argparse.Namespace) -> None:
    cells: list[Cell] = []
    result = {
        "device": cpu_name(),
        "versions": versions(),
        "peaks": cpu_peaks() | torch_matmul(),
        "cells": cells,
    }
    path = options.out / options.name
    cores = len(os.sched_getaffinity(0))
    for threads in options.threads:
        if threads > cores:
            print(f"{threads} threads: this process may use {cores} cores, not measured")
            continue
        workers = Workers(options.peers, threads)
        for dtype in options.dtypes:
            for direction in options.directions:
                problems = (cpu_forward if direction == "fwd" else cpu_backward)(
                    dtype, options.quick
                )
                rounds = options.rounds or (3 if options.quick or direction == "bwd" else 5)
                for p in problems:
                    samples = workers.measure(p, direction, rounds)
                    cells += (
                        record(p, direction, threads, peer, sample)
                        for peer, sample in samples.items()
                    )
                    print(line(p, direction, threads, samples), flush=True)
                    save(result, path)  # a run that is cut short keeps what it has
        workers.close()
    if not options.no_side_effects:
        result |= side_effects.measure()
        save(result, path)
    plots.cpu(result, path.with_suffix(".png"))
    print(markdown(result))


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def record(p: Problem, direction: str, threads: int, peer: str, s: Sample) -> Cell:
    """One peer's number. With one thread the clock is CPU seconds, with more it is wall time."""
    cell: Cell = {"cell": p.cell, "direction": direction, "threads": threads, "peer": peer}
    if s.refusal:
        return cell | {"refusal": s.refusal}
    seconds = s.seconds("cpu" if threads == 1 else "wall")
    return cell | {
        "us": round(seconds * 1e6, 2),
        "gflops": round(p.flops(direction) / seconds * 1e-9, 2),
        "wall_us": round(s.seconds("wall") * 1e6, 2),
    }


def line(p: Problem, direction: str, threads: int, samples: dict[str, Sample]) -> str:
    clock = "cpu" if threads == 1 else "wall"
    shown = [
        f"{name} {p.flops(direction) / s.seconds(clock) * 1e-9:.0f}"
        for name, s in samples.items()
        if not s.refusal
    ]
    wrong = [f"{name}: {s.refusal}" for name, s in samples.items() if "WRONG" in s.refusal]
    return f"{p.cell} {direction} {threads}T GF/s: {', '.join(shown + wrong)}"


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"python": sys.version.split()[0]}


# ---- the report ---------------------------------------------------------------------------------


class Table:
    """Lookup of GFLOP/s by (direction, threads, cell, peer)."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self.cells = list(cells)
        self.by_key = {(c["direction"], c["threads"], c["cell"], c["peer"]): c for c in self.cells}

    def rate(self, direction: str, threads: int, cell: str, peer: str) -> float | None:
        value: float | None = self.by_key.get((direction, threads, cell, peer), {}).get("gflops")
        return value

    def ratios(
        self, direction: str, threads: int, peers: Iterable[str], ours: str = OURS, **wanted: bool
    ) -> list[float]:
        """ours / best of peers, over the cells in which both have a number."""
        ratios = []
        for c in self.cells:
            key = (c["direction"], c["threads"], c["peer"])
            if key != (direction, threads, ours) or "gflops" not in c:
                continue
            if not all(has(c["cell"], name) == value for name, value in wanted.items()):
                continue
            others = [self.rate(direction, threads, c["cell"], peer) for peer in peers]
            best = max((r for r in others if r), default=None)
            if best:
                ratios.append(c["gflops"] / best)
        return ratios


def has(cell: str, name: str) -> bool:
    if name == "decode":
        return "-q1k" in cell
    if name == "short":
        return "-s512-" in cell
    return f"-{name}-" in f"{cell}-"


def span(ratios: list[float]) -> str:
    if not ratios:
        return "not measured"
    mean = exp(sum(log(r) for r in ratios) / len(ratios))
    if len(ratios) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def ratio_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, the goal, what was measured): geometric mean and range over the cells."""
    t, peaks = Table(result["cells"]), result["peaks"]
    rows: list[tuple[str, str, str]] = []
    everyone = [p for p in PEERS if not p.startswith(OURS)]
    avx2 = "flashcore-avx2"

    def row(what: str, goal: str, direction: str, peers: Iterable[str], **kw: Any) -> None:
        for threads in (1, 2):
            got = t.ratios(direction, threads, peers, **kw)
            if got:
                rows.append((f"{what}, {threads}T", goal, span(got)))

    def share(what: str, goal: str, peak: str, **kw: bool) -> None:
        """Of a ceiling of one core, on one thread."""
        if not (top := peaks.get(peak)):
            return
        got = [
            c["gflops"] / top
            for c in t.cells
            if (c["direction"], c["threads"], c["peer"]) == ("fwd", 1, OURS)
            and "gflops" in c
            and all(has(c["cell"], name) == value for name, value in kw.items())
        ]
        rows.append((what, goal, span(got)))

    fp32, bf16, fp16 = {"fp32": True}, {"bf16": True}, {"fp16": True}
    full, causal = {"full": True, "decode": False}, {"causal": True}
    top32 = "fma_avx512" if "fma_avx512" in peaks else "fma_avx2"
    row("fp32 full / best of all", ">= 1.0", "fwd", everyone, **fp32, **full)
    row("fp32 full / torch", ">= 2", "fwd", ["torch"], **fp32, **full)
    share("fp32 full / FMA peak, 1T", ">= 0.70", top32, **fp32, **full)
    long = causal | {"short": False}
    row("fp32 causal >= 1024 / best of all", ">= 1.4", "fwd", everyone, **fp32, **long)
    row("fp32 causal >= 1024 / torch", ">= 2.4", "fwd", ["torch"], **fp32, **long)
    row("bf16 full / openvino", ">= 1.15", "fwd", ["openvino"], **bf16, **full)
    row("bf16 causal / openvino", ">= 2", "fwd", ["openvino"], **bf16, **causal)
    row("bf16 / torch", ">= 3.7", "fwd", ["torch"], decode=False, **bf16)
    share("bf16 full / bf16 dot peak, 1T", "", "bf16_avx512", **bf16, **full)
    share("bf16 full / torch's bf16 matmul, 1T", ">= 0.80", "torch_bf16_matmul", **bf16, **full)
    share("bf16 causal / torch's bf16 matmul, 1T", ">= 0.70", "torch_bf16_matmul", **bf16, **causal)
    row("fp16 / torch", ">= 2.5", "fwd", ["torch"], decode=False, **fp16)
    row("one query, fp32 / torch", ">= 4", "fwd", ["torch"], decode=True, **fp32)
    row("one query, bf16 / torch", ">= 15", "fwd", ["torch"], decode=True, **bf16)
    row("backward fp32 full / torch", ">= 1.7", "bwd", ["torch"], **fp32, **full)
    row("backward fp32 causal / torch", ">= 2", "bwd", ["torch"], **fp32, **causal)
    row("backward bf16 / torch", ">= 1.7", "bwd", ["torch"], **bf16)
    row("AVX2 fp32 full / torch", ">= 1.1", "fwd", ["torch"], ours=avx2, **fp32, **full)
    row("AVX2 fp32 causal / torch", ">= 1.3", "fwd", ["torch"], ours=avx2, **fp32, **causal)
    rows += decode_rows(t, peaks) + scaling_rows(t)
    return rows


def decode_rows(t: Table, peaks: dict[str, float]) -> list[tuple[str, str, str]]:
    """Bytes of K and V read, against the read bandwidth of one core."""
    rows = []
    for dtype in DTYPES:
        p = cpu_forward(dtype)[-1]
        cell = t.by_key.get(("fwd", 1, p.cell, OURS), {})
        if "us" in cell and "read_bandwidth" in peaks:
            rate = p.kv_bytes() / cell["us"] * 1e-3
            what = f"one query, {SHORT_DTYPE[dtype]} / read bandwidth, 1T"
            rows.append((what, ">= 0.7", f"{rate / peaks['read_bandwidth']:.2f}"))
    return rows


def scaling_rows(t: Table) -> list[tuple[str, str, str]]:
    rows = []
    for direction in ("fwd", "bwd"):
        speedups = []
        for c in t.cells:
            if (c["direction"], c["threads"], c["peer"]) == (direction, 1, OURS):
                two = t.rate(direction, 2, c["cell"], OURS)
                if two and "gflops" in c:
                    speedups.append(two / c["gflops"])
        if speedups:
            rows.append(
                (f"2 threads / 1, {direction}, median", ">= 1.85", f"{median(speedups):.2f}")
            )
    return rows


def markdown(result: dict[str, Any]) -> str:
    cells = result["cells"]
    peers = list(dict.fromkeys(c["peer"] for c in cells))
    lines = [
        f"# Attention on the CPU: {result['device']}",
        "",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
        "",
        "GFLOP/s; a causal square counts as half the pairs, backward as 2.5 forwards. One thread: "
        "per CPU second of one pinned core. More threads: wall time. Medians; libraries take "
        "turns, each in a process of its own, and each result is checked against float64 first. "
        "Reproduce: `make bench`.",
        "",
        "Ceilings of one core: "
        + ", ".join(f"{name} {value:.0f}" for name, value in result["peaks"].items())
        + " (GFLOP/s, GB/s).",
        "",
        "## Against the goals",
        "",
        "| geometric mean (range) of the ratios | goal | measured |",
        "|---|---|---|",
        *(f"| {what} | {goal} | {got} |" for what, goal, got in ratio_rows(result)),
        *side_effects.rows(result),
    ]
    groups = dict.fromkeys((c["direction"], c["threads"]) for c in cells)
    for direction, threads in groups:
        names = dict.fromkeys(
            c["cell"] for c in cells if (c["direction"], c["threads"]) == (direction, threads)
        )
        title = {"fwd": "Forward", "bwd": "Backward"}[direction]
        lines += ["", f"## {title}, {threads} thread{'s' if threads > 1 else ''}", ""]
        lines += ["| cell | " + " | ".join(peers) + " |", "|---" * (len(peers) + 1) + "|"]
        t = Table(cells)
        for cell in names:
            rates = [t.rate(direction, threads, cell, peer) for peer in peers]
            best = max((r for r in rates if r), default=0)
            lines.append(f"| {cell} | " + " | ".join(shown_rate(r, best) for r in rates) + " |")
    lines += ["", *refusals(cells)]
    return "\n".join(lines) + "\n"


def shown_rate(rate: float | None, best: float) -> str:
    if rate is None:
        return "–"
    return f"**{rate:.0f}**" if rate == best else f"{rate:.0f}"


def refusals(cells: list[Cell]) -> list[str]:
    """Why a peer has no number, once per reason."""
    seen: dict[tuple[str, str], str] = {}
    for c in cells:
        if "refusal" in c:
            seen.setdefault((c["peer"], c["refusal"]), c["cell"])
    if not seen:
        return []
    return [
        "– means no number:",
        "",
        *(f"* {peer}: {why} (first at {cell})" for (peer, why), cell in seen.items()),
    ]
