"""The ceilings of this CPU, by compiling and running benchmarks/cpp/peaks.cpp."""

from __future__ import annotations

import os
import subprocess
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
