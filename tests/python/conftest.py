"""What every test shares: where flashcore comes from, GPU skips with their reason, time limits."""

from __future__ import annotations

import collections
import os
import pathlib
import signal

import pytest

# The references' matrices are small: threads would only get in each other's way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# JAX would take most of a GPU's memory when it starts, and torch is there too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import flashcore as fc  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
GPU_TEST_SECONDS = 60


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped, by name, without one")
    config.addinivalue_line("markers", "slow: takes over ten seconds")
    package = pathlib.Path(fc.__file__).resolve().parent
    if package == ROOT / "python" / "flashcore":
        raise pytest.UsageError("flashcore was imported from the source tree: install the wheel")


def pytest_sessionstart(session: pytest.Session) -> None:
    from forced import cases_of

    untested = [k.name for k in fc.kernels() if k.usable and not cases_of(k)]
    if untested:
        raise pytest.UsageError(f"no case in forced.py fits the kernels {untested}: add one")


def cuda_missing() -> str:
    """Why GPU tests cannot run here; empty if they can."""
    if not any(device.kind == "cuda" for device in fc.devices()):
        return "no CUDA device, or flashcore was built without CUDA"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = cuda_missing() if gpu else ""
    for item in gpu:
        item.add_marker(
            pytest.mark.skip(reason=reason) if reason else pytest.mark.usefixtures("gpu_time_limit")
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names what was skipped: a count alone hides a test that never runs."""
    skipped = collections.Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped[report.nodeid.partition("[")[0], reason.removeprefix("Skipped: ")] += 1
    if skipped:
        terminalreporter.section("skipped, by name")
        for (name, reason), count in sorted(skipped.items()):
            terminalreporter.line(f"{count:4d}  {name}: {reason}")


@pytest.fixture
def gpu_time_limit():
    """A kernel that hangs must cost a minute, not the machine: SIGALRM ends the process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(GPU_TEST_SECONDS)
    yield
    signal.alarm(0)
