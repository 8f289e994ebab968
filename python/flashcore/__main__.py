"""python -m flashcore: what this installation can do, and where its C and C++ parts are."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import flashcore as fc
from flashcore import _core

# Where the compiled parts are: not the package's own folder in an editable installation.
ROOT = Path(_core.__file__).resolve().parent


def info() -> None:
    print(f"flashcore {fc.__version__}  {ROOT}")
    print("\ndevices")
    for d in fc.devices():
        units = "threads" if d.kind == "cpu" else "SMs"
        memory = f", {d.memory_bytes / 2**30:.0f} GiB" if d.memory_bytes else ""
        print(f"  {d.kind}:{d.id}  {d.name}, {d.isa}, {d.multiprocessors} {units}{memory}")
    print("\nkernels (* = runs here)")
    for k in fc.kernels():
        head_dim = f"head_dim <= {k.head_dim}" if k.head_dim else "any head_dim"
        mark = "*" if k.usable else " "
        print(f" {mark} {k.name:<32} {k.isa:<12} tile {k.block_m} x {k.block_n}, {head_dim}")


def demo() -> None:
    """Exact attention beside standard attention, which stores all N x N scores, on the CPU."""
    import numpy as np

    rng = np.random.default_rng(0)
    print(f"{'N':>6}  {'standard':>10}  {'flashcore':>10}  largest difference   (8 heads, causal)")
    for n in (256, 512, 1024, 2048, 4096):
        q, k, v = (rng.standard_normal((1, n, 8, 64), np.float32) for _ in range(3))
        start = time.perf_counter()
        qt, kt, vt = (x.swapaxes(1, 2) for x in (q, k, v))
        scores = qt @ kt.swapaxes(2, 3) * np.float32(1 / 8)
        scores[..., np.triu(np.ones((n, n), bool), 1)] = -np.inf
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        standard = (scores @ vt).swapaxes(1, 2)
        middle = time.perf_counter()
        exact = fc.attention(q, k, v, causal=True)
        end = time.perf_counter()
        difference = np.abs(exact - standard).max()
        print(f"{n:6}  {middle - start:8.4f} s  {end - middle:8.4f} s  {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flashcore", description=__doc__)
    parser.add_argument(
        "command",
        nargs="?",
        choices=("info", "demo"),
        default="info",
        help="info: devices and kernels (default); demo: beside standard attention, needs NumPy",
    )
    parser.add_argument(
        "--cmake-dir",
        action="store_true",
        help="print the directory for CMAKE_PREFIX_PATH or flashcore_DIR: find_package(flashcore)",
    )
    parser.add_argument(
        "--include-dir", action="store_true", help="print the directory of flashcore/flashcore.h"
    )
    arguments = parser.parse_args()
    if arguments.cmake_dir:
        print(ROOT / "lib" / "cmake" / "flashcore")
    elif arguments.include_dir:
        print(ROOT / "include")
    else:
        {"info": info, "demo": demo}[arguments.command]()


if __name__ == "__main__":
    main()
