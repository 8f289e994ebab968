"""The installed wheel: what it holds, what it says of itself, what importing it costs."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys

from helpers import run_python

import flashcore as fc

PACKAGE = pathlib.Path(fc.__file__).parent
FRAMEWORKS = ("numpy", "torch", "jax", "cupy", "ml_dtypes", "scipy")


def module(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "flashcore", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_quick():
    """At most 60 ms of processor time, in one try of twenty: a busy machine takes twice as long."""
    code = """
import time
start = time.process_time()
import flashcore
print(time.process_time() - start)
"""
    times = (float(run_python(code)) for _ in range(20))
    assert any(t <= 0.060 for t in times)


def test_import_brings_no_framework():
    code = f"import sys, flashcore; print([m for m in {FRAMEWORKS!r} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_versions_agree():
    header = (PACKAGE / "include" / "flashcore" / "flashcore.h").read_text()
    version = ".".join(
        re.search(rf"FLASHCORE_VERSION_{part} (\d+)", header)[1]
        for part in ("MAJOR", "MINOR", "PATCH")
    )
    assert importlib.metadata.version("flashcore-attention") == version
    assert fc.__version__ == version


def test_directories_exist():
    cmake, include = pathlib.Path(module("--cmake-dir")), pathlib.Path(module("--include-dir"))
    assert list(cmake.rglob("flashcore*onfig.cmake"))
    assert (include / "flashcore" / "flashcore.h").exists()
    assert (include / "flashcore" / "dlpack.h").exists()
    assert (include / "flashcore" / "flashcore.hpp").exists()


def test_library_has_a_soname():
    assert (PACKAGE / "lib" / "libflashcore.so.1").exists()


def test_wheel_tag():
    wheel = importlib.metadata.distribution("flashcore-attention").read_text("WHEEL")
    assert "cp310-abi3" in wheel


def test_nothing_of_the_build_machine_is_inside():
    """No path of the tree that built it, in any file of the package."""
    root = str(pathlib.Path(__file__).resolve().parents[2]).encode()
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix != ".pyc" and len(root) > 4:
            assert root not in path.read_bytes(), path


def test_info_lists_this_machine():
    said = module()
    assert fc.__version__ in said
    assert fc.devices()[0].name in said


def test_devices_and_their_order():
    devices = fc.devices()
    assert devices[0].kind == "cpu" and devices[0].multiprocessors >= 1
    assert all(d.kind == "cuda" for d in devices[1:])
