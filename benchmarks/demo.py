"""`python -m benchmarks demo`: exact attention against standard attention over growing N.

Standard attention writes the N x N matrix of scores to memory, then the matrix of probabilities,
then multiplies. flashcore computes the same function tile by tile. Both results are compared with
float64 on a few rows. The best device there is: CUDA through torch or CuPy, else the CPU through
NumPy.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plots

MB = 1e6
NUM_HEADS, HEAD_DIM = 8, 64
CPU_SEQLENS = (256, 512, 1024, 2048, 4096, 8192)
GPU_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CHECKED_ROWS = 64


@dataclass
class Point:
    """One N. A figure is None where standard attention does not fit in memory."""

    seqlen: int
    ours_ms: float
    ours_mb: float
    ours_error: float
    standard_ms: float | None = None
    standard_mb: float | None = None
    standard_error: float | None = None


class Device:
    """Arrays, timing and memory of one framework."""

    name = ""
    dtype = ""
    seqlens: tuple[int, ...] = ()

    def inputs(self, seqlen: int) -> list[Any]:
        raise NotImplementedError

    def standard(self, q: Any, k: Any, v: Any) -> Any:
        raise NotImplementedError

    def host(self, x: Any) -> np.ndarray:
        raise NotImplementedError

    def milliseconds(self, call: Callable[[], Any]) -> float:
        raise NotImplementedError

    def peak_mb(self, call: Callable[[], Any]) -> float:
        """Largest memory in use during the call, beyond what was in use before it."""
        raise NotImplementedError

    def fits(self, seqlen: int) -> bool:
        """Whether three N x N matrices fit, which standard attention may need at once."""
        raise NotImplementedError


class NumPyDevice(Device):
    dtype = "float32"
    seqlens = CPU_SEQLENS

    def __init__(self) -> None:
        import flashcore as fc

        cpu = fc.devices()[0]
        self.name = f"{cpu.name}, {cpu.isa}, {fc.get_num_threads()} threads, NumPy"

    def inputs(self, seqlen: int) -> list[Any]:
        rng = np.random.default_rng(seqlen)
        shape = (1, NUM_HEADS, seqlen, HEAD_DIM)
        return [rng.standard_normal(shape, dtype=np.float32) for _ in range(3)]

    def standard(self, q: Any, k: Any, v: Any) -> Any:
        s = q @ k.swapaxes(2, 3)
        s *= np.float32(1 / math.sqrt(HEAD_DIM))
        i, j = np.ogrid[: s.shape[2], : s.shape[3]]
        s[..., j > i] = -np.inf
        s -= s.max(-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(-1, keepdims=True)
        return s @ v

    def host(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def milliseconds(self, call: Callable[[], Any]) -> float:
        call()
        times: list[float] = []
        while not times or (len(times) < 7 and sum(times) < 1.5):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return 1e3 * min(times)

    def peak_mb(self, call: Callable[[], Any]) -> float:
        before, peak = resident_mb("VmRSS"), Path("/proc/self/clear_refs")
        peak.write_text("5", encoding="ascii")  # resets VmHWM
        result = call()
        grown = resident_mb("VmHWM") - before
        return float(max(grown, result.nbytes / MB))

    def fits(self, seqlen: int) -> bool:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 2 * NUM_HEADS * seqlen**2 * 4 < 0.8 * available


class TorchDevice(Device):
    dtype = "bfloat16"
    seqlens = GPU_SEQLENS

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"

    def inputs(self, seqlen: int) -> list[Any]:
        generator = self.torch.Generator(device="cuda").manual_seed(seqlen)
        shape = (1, NUM_HEADS, seqlen, HEAD_DIM)
        return [
            self.torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(3)
        ]

    def standard(self, q: Any, k: Any, v: Any) -> Any:
        s = (q @ k.transpose(2, 3)) * (1 / math.sqrt(HEAD_DIM))
        ones = self.torch.ones(s.shape[2:], dtype=self.torch.bool, device="cuda")
        s.masked_fill_(ones.triu_(1), float("-inf"))
        return self.torch.softmax(s, dim=-1) @ v

    def host(self, x: Any) -> np.ndarray:
        return np.asarray(x.float().cpu().numpy())

    def milliseconds(self, call: Callable[[], Any]) -> float:
        for _ in range(3):
            call()
        event: Any = self.torch.cuda.Event
        events = []
        for _ in range(15):
            begin, end = (event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        self.torch.cuda.synchronize()
        return float(np.median([begin.elapsed_time(end) for begin, end in events]))

    def peak_mb(self, call: Callable[[], Any]) -> float:
        cuda = self.torch.cuda
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        call()
        cuda.synchronize()
        return float(cuda.max_memory_allocated() - before) / MB

    def fits(self, seqlen: int) -> bool:
        free = int(self.torch.cuda.mem_get_info()[0])
        return 3 * NUM_HEADS * seqlen**2 * 2 < 0.8 * free


class CuPyDevice(Device):
    dtype = "float16"
    seqlens = GPU_SEQLENS

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.name = f"{properties['name'].decode()}, CuPy {cupy.__version__}"

    def inputs(self, seqlen: int) -> list[Any]:
        rng = self.cupy.random.default_rng(seqlen)
        shape = (1, NUM_HEADS, seqlen, HEAD_DIM)
        return [
            rng.standard_normal(shape, dtype=self.cupy.float32).astype(self.cupy.float16)
            for _ in range(3)
        ]

    def standard(self, q: Any, k: Any, v: Any) -> Any:
        cupy = self.cupy
        s = (q @ k.swapaxes(2, 3)) * cupy.float16(1 / math.sqrt(HEAD_DIM))
        i = cupy.arange(s.shape[2])[:, None]
        s[..., cupy.arange(s.shape[3])[None, :] > i] = -cupy.inf
        s -= s.max(-1, keepdims=True)
        cupy.exp(s, out=s)
        s /= s.sum(-1, keepdims=True, dtype=cupy.float32).astype(cupy.float16)
        return s @ v

    def host(self, x: Any) -> np.ndarray:
        return np.asarray(x.get())

    def milliseconds(self, call: Callable[[], Any]) -> float:
        from cupyx.profiler import benchmark

        return 1e3 * float(np.median(benchmark(call, n_warmup=3, n_repeat=15).gpu_times))

    def peak_mb(self, call: Callable[[], Any]) -> float:
        pool = self.cupy.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        call()
        self.cupy.cuda.get_current_stream().synchronize()
        return float(pool.total_bytes() - before) / MB

    def fits(self, seqlen: int) -> bool:
        free = int(self.cupy.cuda.runtime.memGetInfo()[0])
        return 3 * NUM_HEADS * seqlen**2 * 2 < 0.8 * free


def resident_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / MB
    return 0.0


def best_device() -> Device:
    """The first of torch on CUDA, CuPy, NumPy for which flashcore has a kernel that runs here."""
    import flashcore as fc

    if any(k.usable and k.backend != "cpu" for k in fc.kernels()):
        try:
            import torch

            if torch.cuda.is_available():
                return TorchDevice()
        except ImportError:
            pass
        try:
            import cupy

            if cupy.is_available():
                return CuPyDevice()
        except ImportError:
            pass
        print("A GPU is here, but neither torch nor CuPy: the CPU is shown.")
    return NumPyDevice()


def measure(device: Device, seqlen: int) -> Point:
    import flashcore as fc

    q, k, v = device.inputs(seqlen)

    def ours() -> Any:
        return fc.attention(q, k, v, layout="bhsd", causal=True)

    def standard() -> Any:
        return device.standard(q, k, v)

    expected = exact_rows(*(device.host(x) for x in (q, k, v)))

    def error(out: Any) -> float:
        return float(np.abs(device.host(out)[0, :, -CHECKED_ROWS:] - expected).max())

    point = Point(
        seqlen,
        ours_error=error(ours()),
        ours_mb=device.peak_mb(ours),
        ours_ms=device.milliseconds(ours),
    )
    if device.fits(seqlen):
        point.standard_error = error(standard())
        point.standard_mb = device.peak_mb(standard)
        point.standard_ms = device.milliseconds(standard)
    return point


def exact_rows(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The last rows of every head, from the definition in float64."""
    q, k, v = (x[0].astype(np.float64) for x in (q[:, :, -CHECKED_ROWS:], k, v))
    s = q @ k.swapaxes(1, 2) / math.sqrt(HEAD_DIM)
    n = s.shape[2]
    s[:, np.arange(n) > np.arange(n - s.shape[1], n)[:, None]] = -np.inf
    s = np.exp(s - s.max(-1, keepdims=True))
    out: np.ndarray = (s / s.sum(-1, keepdims=True)) @ v
    return out


# ---- what is shown ------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="where to plot")
    parser.add_argument("--cpu", action="store_true", help="the CPU, even beside a GPU")


def run(options: argparse.Namespace) -> None:
    device = NumPyDevice() if options.cpu else best_device()
    points = list(progress(device))
    print(table(device, points))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if plot(device, points, options.out):
        print(f"plot: {options.out}")


def progress(device: Device) -> Any:
    """Points one by one, with a bar that advances by the work done, which grows as N squared."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        for seqlen in device.seqlens:
            print(f"N = {seqlen} ...", flush=True)
            yield measure(device, seqlen)
        return
    columns = (TextColumn("{task.description}"), BarColumn(40), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=sum(n * n for n in device.seqlens))
        for seqlen in device.seqlens:
            bar.update(task, description=f"N = {seqlen:>6,}")
            yield measure(device, seqlen)
            bar.advance(task, seqlen * seqlen)


def table(device: Device, points: list[Point]) -> str:
    title = f"Causal attention, {NUM_HEADS} heads x {HEAD_DIM}, {device.dtype}: {device.name}"
    head = (
        f"{'N':>8} | {'standard':>30} | {'flashcore':>30} | {'faster':>7} | {'smaller':>8}\n"
        f"{'':>8} | {'ms':>10} {'MB':>9} {'error':>9} | {'ms':>10} {'MB':>9} {'error':>9} |"
        f" {'':>7} |"
    )
    lines = [title, "", head, "-" * 96]
    for p in points:
        standard, faster, smaller = f"{'does not fit':>30}", "", ""
        if p.standard_ms is not None and p.standard_mb is not None:
            standard = f"{p.standard_ms:>10.2f} {p.standard_mb:>9.1f} {p.standard_error:>9.1e}"
            faster = f"{p.standard_ms / p.ours_ms:.1f}x"
            smaller = f"{p.standard_mb / p.ours_mb:.0f}x"
        lines.append(
            f"{p.seqlen:>8} | {standard} | {p.ours_ms:>10.2f} {p.ours_mb:>9.1f} "
            f"{p.ours_error:>9.1e} | {faster:>7} | {smaller:>8}"
        )
    lines += [
        "",
        "MB: peak memory of the call, its output included. error: largest difference from float64",
        f"in the last {CHECKED_ROWS} rows of every head. ms: the best of several calls on the CPU,",
        "the median on a GPU.",
    ]
    return "\n".join(lines)


def plot(device: Device, points: list[Point], path: Path) -> bool:
    plt = plots.pyplot()
    if plt is None:
        return False
    ours, standard = plots.COLOURS["flashcore"], plots.COLOURS["torch"]
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(10, 4.1))
    shown = [p for p in points if p.standard_ms is not None]
    panels = ((time_axis, "ms", "milliseconds a call"), (memory_axis, "mb", "peak memory, MB"))
    for axis, unit, title in panels:
        our_values = [float(getattr(p, f"ours_{unit}")) for p in points]
        standard_values = [float(getattr(p, f"standard_{unit}")) for p in shown]
        seqlens = [p.seqlen for p in points]
        axis.plot(
            seqlens[: len(shown)], standard_values, "o-", color=standard, markersize=4, linewidth=2
        )
        axis.plot(seqlens, our_values, "o-", color=ours, markersize=4, linewidth=2)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(seqlens, [f"{n // 1024}k" if n >= 1024 else str(n) for n in seqlens])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("sequence length N")
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        for text, x, y, colour in (
            ("standard", shown[-1].seqlen, standard_values[-1], standard),
            ("flashcore", seqlens[-1], our_values[-1], ours),
        ):
            axis.annotate(
                text,
                (x, y),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontweight="bold",
            )
        last = len(shown) - 1
        ratio = standard_values[-1] / our_values[last]
        x = shown[-1].seqlen
        axis.annotate(
            "",
            (x, our_values[last]),
            xytext=(x, standard_values[-1]),
            arrowprops={"arrowstyle": "<->", "color": "#777777", "shrinkA": 5, "shrinkB": 5},
        )
        axis.annotate(
            f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x",
            (x, math.sqrt(standard_values[-1] * our_values[last])),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color="#555555",
        )
        axis.margins(x=0.04)
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * 2.2)
    figure.suptitle(
        "Exact attention without the N x N matrix",
        x=0.012,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    caption = f"causal, {NUM_HEADS} heads x {HEAD_DIM}, {device.dtype}; {device.name}"
    figure.text(0.012, 0.905, caption, fontsize=8.5, color="#666666")
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path)
    plt.close(figure)
    return True
