"""The ceilings of this CPU, by compiling and running benchmarks/cpp/peaks.cpp."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def cpu_peaks() -> dict[str, float]:
    """GFLOP/s and GB/s of one core, or {} where there is no C++ compiler."""
    source = Path(__file__).parent / "cpp" / "peaks.cpp"
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/peaks"
        compiler = os.environ.get("CXX", "c++")
        build = [compiler, "-O3", "-std=c++20", str(source), "-o", binary]
        try:
            subprocess.run(build, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return {}
        lines = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    return {name: float(value) for name, value in (line.split() for line in lines.splitlines())}


def torch_matmul() -> dict[str, float]:
    """torch's bfloat16 product of 2048 x 2048 matrices on one core, or {} without torch."""
    code = """
import os, time, torch
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
torch.set_num_threads(1)
a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
seconds = []
for _ in range(12):
    start = time.process_time()
    a @ b
    seconds.append(time.process_time() - start)
print(2 * 2048**3 / sorted(seconds)[len(seconds) // 2] * 1e-9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return {"torch_bf16_matmul": float(done.stdout)} if done.returncode == 0 else {}


def cpu_name() -> str:
    """Vendor, family and model: a virtual machine often hides the marketing name."""
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    isa = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in info["flags"].split()]
    return (
        f"{info['model name']} family {info['cpu family']} model {info['model']}, "
        f"{len(os.sched_getaffinity(0))} cores, {' '.join(isa)}"
    )
