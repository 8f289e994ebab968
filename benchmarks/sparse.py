"""`python -m benchmarks sparse`: time against density, and against length for so many keys a query.

Block masks on flashcore beside its own dense kernels on the same inputs, and beside FlexAttention
on the same mask. Measured as in `python -m benchmarks gpu`; rates count the kept blocks alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import dataclass
from functools import lru_cache
from math import log
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import plots
from benchmarks.gpu import (
    CALLS_PER_TURN,
    FLUSH_BYTES,
    NAMES,
    PAUSE,
    Cell,
    Meter,
    commit,
    matmul_tflops,
    nvidia_smi,
    take_turns,
)
from benchmarks.gpu import check as check_against_definition
from benchmarks.peers_cpu import Unavailable, need
from benchmarks.peers_gpu import Call, Inputs, flashcore, torch_function
from benchmarks.problems import Problem

LONGEST_CHECKED = 16384
DENSITIES = (0.1, 0.26, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Sparse:
    problem: Problem
    block: int
    density: float = 0.0  # of blocks, each head its own at random; or
    keys: int = 0  # each block of queries keeps the blocks of so many keys up to its own

    @property
    def cell(self) -> str:
        pattern = f"local{self.keys}" if self.keys else f"random{self.density:g}"
        return self.problem.cell.replace("-full-", f"-{pattern}x{self.block}-")

    def kept(self, torch: Any) -> Any:
        """bool (1, heads or 1, query blocks, key blocks), on the device."""
        p = self.problem
        n, m = -(-p.seqlen_q // self.block), -(-p.seqlen_k // self.block)
        if self.keys:
            i, j = torch.arange(n, device="cuda")[:, None], torch.arange(m, device="cuda")
            return ((j <= i) & (j > i - self.keys // self.block))[None, None]
        generator = torch.Generator(device="cuda").manual_seed(1)
        chance = torch.rand(1, p.num_heads, n, m, generator=generator, device="cuda")
        return chance < self.density


def density_cells() -> list[Sparse]:
    """16,384 tokens of 16 heads; the third group are the cells of the table of peers."""
    return [
        Sparse(Problem(16384 // n, 16, n, n, 128), 128, density=density)
        for n in (4096, 8192, 16384)
        for density in DENSITIES
    ] + [
        Sparse(Problem(2, 16, 8192, 8192, 128), 64, density=0.26),
        Sparse(Problem(2, 32, 8192, 8192, 64), 128, density=0.26),
        Sparse(Problem(2, 8, 8192, 8192, 256), 128, density=0.26),
    ]


def length_cells() -> list[Sparse]:
    """256 keys per query: the time should be linear in the length."""
    return [
        Sparse(Problem(16, 8, n, n, 64), 64, keys=256)
        for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    ]


SETS = {"density": density_cells, "length": length_cells}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", choices=list(SETS), default="density", help="which problems")
    parser.add_argument("--direction", choices=("fwd", "bwd"), default="fwd")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(DEFAULT_PEERS))
    parser.add_argument("--filter", default="", help="only cells whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help="a folder of results/")


def run(options: argparse.Namespace) -> None:
    torch = need("torch")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks sparse: torch finds no CUDA device")
    device = torch.cuda.get_device_name()
    meter = Meter()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    ceilings = [matmul_tflops(torch, flush)]
    cells: list[Cell] = []
    for s in SETS[options.set]():
        if options.filter in s.cell:
            rows = measure(torch, s, options, flush, meter)
            cells += rows
            print(line(s, rows), flush=True)
    ceilings.append(matmul_tflops(torch, flush))
    meter.close()
    result = {
        "device": device,
        "set": options.set,
        "direction": options.direction,
        "driver": nvidia_smi("driver_version"),
        "torch": torch.__version__,
        "commit": commit(),
        "matmul_tflops": ceilings,
        "rounds": options.rounds,
        "cells": cells,
    }
    folder = options.out or Path("benchmarks/results") / device.split()[-1].lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sparse_{options.set}_{NAMES[options.direction]}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report = markdown(result)
    path.with_suffix(".md").write_text(report, encoding="utf-8")
    plots.sparse(result, path.with_suffix(".png"))
    print(report)


# ---- peers --------------------------------------------------------------------------------------


def block_mask(s: Sparse, kept: Any) -> Any:
    lengths = s.problem.seqlen_q, s.problem.seqlen_k
    return need("flashcore").BlockMask.from_blocks(kept, (s.block, s.block), lengths)


def flashcore_sparse(s: Sparse, x: Inputs, kept: Any, direction: str) -> Call:
    return flashcore(s.problem, x, direction, block_mask=block_mask(s, kept))


def dense(s: Sparse, x: Inputs, kept: Any, direction: str) -> Call:
    """Every block: what the time of a density is a fraction of."""
    if s.problem.seqlen_k > LONGEST_CHECKED:
        raise Unavailable("takes too long")
    return flashcore(s.problem, x, direction)


def flex(s: Sparse, x: Inputs, kept: Any, direction: str) -> Call:
    """FlexAttention, compiled, with every kept block marked as full."""
    torch = need("torch")
    module = importlib.import_module("torch.nn.attention.flex_attention")
    ours = block_mask(s, kept)
    count, indices = ours.kv_num_blocks, ours.kv_indices
    mask = module.BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        torch.zeros_like(indices),
        count,
        indices,
        BLOCK_SIZE=s.block,
        seq_lengths=(s.problem.seqlen_q, s.problem.seqlen_k),
    )
    compiled = compiled_flex(s.problem, s.block)

    def function(q: Any, k: Any, v: Any) -> Any:
        return compiled(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask).transpose(1, 2)

    return torch_function(function, x, direction)


@lru_cache(maxsize=1)
def compiled_flex(problem: Problem, block: int) -> Any:
    """For one problem, whatever blocks are kept: compiling takes seconds."""
    torch = need("torch")
    module = importlib.import_module("torch.nn.attention.flex_attention")
    torch._dynamo.reset()  # else the cells share one kernel, with shapes it does not know
    return torch.compile(module.flex_attention)


def deterministic(s: Sparse, x: Inputs, kept: Any, direction: str) -> Call:
    return flashcore(s.problem, x, direction, block_mask=block_mask(s, kept), deterministic=True)


DEFAULT_PEERS = {"flashcore": flashcore_sparse, "dense": dense, "flex": flex}
PEERS = DEFAULT_PEERS | {"deterministic": deterministic}


# ---- measuring ----------------------------------------------------------------------------------


def measure(
    torch: Any, s: Sparse, options: argparse.Namespace, flush: Any, meter: Meter
) -> list[Cell]:
    p, direction = s.problem, options.direction
    x, kept = Inputs(torch, p), s.kept(torch)
    density = kept.double().mean().item()
    calls: dict[str, Call] = {}
    refusals: dict[str, str] = {}
    for name in options.peers:
        try:
            calls[name] = PEERS[name](s, x, kept, direction)
            if p.seqlen_k <= LONGEST_CHECKED:
                shown = None if name == "dense" else pairs(s, kept)
                check_against_definition(torch, p, x, calls[name](), direction, shown)
        except Unavailable as reason:
            calls.pop(name, None)
            refusals[name] = str(reason)
        except Exception as error:  # a peer that fails has no number, the others have
            calls.pop(name, None)
            refusals[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    microseconds = take_turns(torch, calls, options.rounds, flush, PAUSE)
    cells = []
    for name in options.peers:
        cell: Cell = {"cell": s.cell, "direction": direction, "peer": name}
        cell |= {"seqlen": p.seqlen_k, "density": round(density, 4)}
        if name in refusals:
            cell["refusal"] = refusals[name]
        else:
            us = median(microseconds[name])
            counted = p.flops(direction) * (1.0 if name == "dense" else density)
            cell |= {"us": round(us, 2), "tflops": round(counted / us * 1e-6, 1)}
        cells.append(cell)
    return cells


def pairs(s: Sparse, kept: Any) -> Any:
    """bool (seqlen_q, seqlen_k) of the last head."""
    return kept[0, -1].repeat_interleave(s.block, 0).repeat_interleave(s.block, 1)


# ---- the report ---------------------------------------------------------------------------------


def line(s: Sparse, rows: list[Cell]) -> str:
    shown = [f"{c['peer']} {c['us']:.0f}" if "us" in c else f"{c['peer']} –" for c in rows]
    return f"{s.cell:<40} us: {', '.join(shown)}"


def by_peer(cells: list[Cell]) -> list[dict[str, Cell]]:
    """Of each cell, its rows by peer."""
    names = dict.fromkeys(c["cell"] for c in cells)
    return [{c["peer"]: c for c in cells if c["cell"] == name} for name in names]


def markdown(result: dict[str, Any]) -> str:
    low, high = min(result["matmul_tflops"]), max(result["matmul_tflops"])
    lines = [
        f"# Block masks, {NAMES[result['direction']]}, on {result['device']}",
        "",
        f"Driver {result['driver']}, torch {result['torch']}, commit {result['commit']}. Median of "
        f"{CALLS_PER_TURN * result['rounds']} calls that take turns in one process, L2 flushed "
        f"before each; every timed call up to {LONGEST_CHECKED} keys was checked against float64 "
        "first. TFLOP/s count kept blocks. 8192^3 bf16 matmul in the same process: "
        f"{low:.0f} to {high:.0f} TFLOP/s.",
        "",
        "| cell | density | us | TFLOP/s | us / (density x dense us) | flex us / us | us / us in a "
        "fixed order |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = by_peer(result["cells"])
    for row in rows:
        mine, whole, other, fixed = (row.get(name, {}) for name in PEERS)
        if "us" not in mine:
            lines.append(f"| {mine['cell']} | {mine['density']} | – | – | – | – | – |")
            continue
        over = mine["us"] / (mine["density"] * whole["us"]) if "us" in whole else None
        gain = other["us"] / mine["us"] if "us" in other else None
        cost = mine["us"] / fixed["us"] if "us" in fixed else None
        lines.append(
            f"| {mine['cell']} | {mine['density']} | {mine['us']:.1f} | {mine['tflops']:.0f} | "
            + " | ".join("–" if r is None else f"{r:.2f}" for r in (over, gain, cost))
            + " |"
        )
    if result["set"] == "length":
        slope = slope_of([row["flashcore"] for row in rows if "us" in row["flashcore"]])
        lines += ["", f"Slope of log time over log length, from 2048 on: {slope:.3f}."]
    reasons = dict.fromkeys((c["peer"], c["refusal"]) for c in result["cells"] if "refusal" in c)
    if reasons:
        lines += ["", "– means no number:", ""] + [f"* {peer}: {why}" for peer, why in reasons]
    return "\n".join(lines) + "\n"


def slope_of(cells: list[Cell]) -> float:
    """Least squares."""
    points: list[tuple[float, float]] = [
        (log(c["seqlen"]), log(c["us"])) for c in cells if c["seqlen"] >= 2048
    ]
    if len(points) < 2:
        return float("nan")
    x = sum(a for a, _ in points) / len(points)
    y = sum(b for _, b in points) / len(points)
    rise: float = sum((a - x) * (b - y) for a, b in points)
    return rise / sum((a - x) * (a - x) for a, _ in points)
