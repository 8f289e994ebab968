"""One process per library and thread count, measured in turn.

A process of its own keeps two OpenMP runtimes or thread pools from disturbing each other, and lets
each be pinned. The parent sends small requests; a worker prepares a problem, checks its result
against the definition in float64 and then times single calls when its turn comes. Two clocks are
read: wall time, and the CPU seconds of the whole process. On one pinned core the second is not
inflated by other programs that share the machine.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from benchmarks.peers_cpu import PEERS, Arrays, Unavailable, make_inputs
from benchmarks.problems import Problem

REST = 0.05  # seconds before a timed burst, for spinning threads of others to go to sleep
BURST = 0.03  # a burst repeats the call until it is about this long
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}


@dataclass
class Sample:
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    refusal: str = ""

    def seconds(self, clock: str) -> float:
        return float(median(getattr(self, clock)))


def reference(p: Problem, direction: str, x: Arrays) -> list[np.ndarray]:
    """Results for the last query head (out, dq) or the last key head (dk, dv), in float64."""
    group = p.num_heads // p.heads_kv
    k, v = (x[n][0, :, -1].astype(np.float64) for n in ("k", "v"))
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    scale = 1 / np.sqrt(p.head_dim)
    out = dq = np.empty(0)
    for h in range(p.num_heads - (group if direction == "bwd" else 1), p.num_heads):
        q, dout = (x[n][0, :, h].astype(np.float64) for n in ("q", "dout"))
        s = scale * (q @ k.T)
        if p.causal:
            s[~np.tri(p.seqlen_q, p.seqlen_k, p.seqlen_k - p.seqlen_q, dtype=bool)] = -np.inf
        s = np.exp(s - s.max(-1, keepdims=True))
        s /= s.sum(-1, keepdims=True)
        out = s @ v
        if direction == "bwd":
            dv += s.T @ dout
            ds = scale * s * (dout @ v.T - (dout * out).sum(-1, keepdims=True))
            dq = ds @ k
            dk += ds.T @ q
    return [out] if direction == "fwd" else [dq, dk, dv]


def check(p: Problem, got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for name, g, e in zip(("out",) if len(got) == 1 else ("dq", "dk", "dv"), got, expected):
        error = float(np.abs(g[0, :, -1] - e).max() / np.abs(e).max())
        if not error < TOLERANCE[p.dtype]:
            raise Unavailable(f"WRONG {name}: relative error {error:.1e}")


def serve(pipe: Any, name: str, threads: int, cores: list[int]) -> None:
    """The worker's loop. Pinned before the library is imported, so that its pool is too."""
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, cores)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    peer: Any = None
    refusal = ""
    try:
        peer = PEERS[name](threads)
    except Unavailable as reason:
        refusal = str(reason)
    call: Any = None
    repeats = 1
    while True:
        request, *args = pipe.recv()
        if request == "stop":
            return
        if request == "prepare":
            p, direction, expected = args
            try:
                if peer is None:
                    raise Unavailable(refusal)
                call = None
                call = peer.prepare(p, direction, make_inputs(p))
                check(p, peer.result(call()), expected)
                begin = time.perf_counter()
                call()
                repeats = max(1, min(1000, int(BURST / (time.perf_counter() - begin))))
                pipe.send("")
            except Unavailable as reason:
                pipe.send(str(reason))
            except Exception as error:  # a peer that fails has no number, the others have
                pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
        elif request == "time":
            time.sleep(REST)
            call()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                call()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            pipe.send((wall / repeats, cpu / repeats))


class Workers:
    """The named peers at one thread count."""

    def __init__(self, names: list[str], threads: int) -> None:
        context = mp.get_context("spawn")
        available = sorted(os.sched_getaffinity(0))
        cores = available[-threads:]
        self.threads = threads
        self.workers: dict[str, tuple[Any, Any]] = {}
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, threads, cores))
            process.daemon = True
            process.start()
            self.workers[name] = (process, ours)

    def measure(self, p: Problem, direction: str, rounds: int) -> dict[str, Sample]:
        samples = {name: Sample() for name in self.workers}
        expected = reference(p, direction, make_inputs(p))
        for name, (_, pipe) in self.workers.items():
            pipe.send(("prepare", p, direction, expected))
            samples[name].refusal = pipe.recv()
        running = [name for name in self.workers if not samples[name].refusal]
        for turn in range(rounds):
            for i in range(len(running)):
                name = running[(i + turn) % len(running)]
                pipe = self.workers[name][1]
                pipe.send(("time",))
                wall, cpu = pipe.recv()
                samples[name].wall.append(wall)
                samples[name].cpu.append(cpu)
        return samples

    def close(self) -> None:
        for process, pipe in self.workers.values():
            pipe.send(("stop",))
            process.join(timeout=10)
