"""The examples run, and the C and C++ ones build against the installed wheel alone."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NEEDS = ("torch", "jax", "cupy", "transformers")


def needs_gpu(script):
    return script.stem.endswith("_gpu")


@pytest.mark.parametrize(
    "script",
    [pytest.param(s, id=s.name, marks=[pytest.mark.gpu] if needs_gpu(s) else []) for s in SCRIPTS],
)
def test_python_example_runs(script, tmp_path):
    for name in NEEDS:
        if re.search(rf"^\s*(import|from) {name}\b", script.read_text(), re.MULTILINE):
            module = pytest.importorskip(name)
            if name == "jax" and needs_gpu(script) and module.default_backend() != "gpu":
                pytest.skip("JAX sees no GPU")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_examples():
    names = {path.name for path in EXAMPLES.iterdir()}
    assert {"minimal.py", "minimal.c", "minimal.cpp"} <= names


def _cmake():
    if importlib.util.find_spec("cmake"):
        return [sys.executable, "-m", "cmake"]
    return [shutil.which("cmake")] if shutil.which("cmake") else None


def _environment():
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    environment["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), environment["PATH"]))
    return environment


@pytest.mark.skipif(_cmake() is None, reason="cmake is not installed")
@pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")
def test_c_and_cpp_examples_through_find_package(tmp_path):
    """With the prefix that `python -m flashcore --cmake-dir` prints."""

    def run(*command):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=_environment(), cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    prefix = run(sys.executable, "-m", "flashcore", "--cmake-dir").strip()
    run(
        *_cmake(),
        "-S",
        str(EXAMPLES),
        "-B",
        "build",
        f"-DCMAKE_PREFIX_PATH={prefix}",
        "-DCMAKE_BUILD_TYPE=Release",
    )
    run(*_cmake(), "--build", "build")
    for language in ("c", "cpp"):
        assert run(str(tmp_path / "build" / f"minimal_{language}"))


def test_headers_compile_alone(tmp_path):
    """Each public header as the first and only include, at the strictest of each language."""
    include = subprocess.run(
        [sys.executable, "-m", "flashcore", "--include-dir"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for compiler, standard, header, suffix in (
        ("gcc", "c99", "flashcore/flashcore.h", "c"),
        ("g++", "c++11", "flashcore/flashcore.h", "cpp"),
        ("g++", "c++20", "flashcore/flashcore.h", "cpp"),
        ("g++", "c++20", "flashcore/flashcore.hpp", "cpp"),
    ):
        if not shutil.which(compiler):
            pytest.skip(f"{compiler} is not installed")
        source = tmp_path / f"alone.{suffix}"
        source.write_text(f"#include <{header}>\n")
        done = subprocess.run(
            [
                compiler,
                f"-std={standard}",
                "-Wall",
                "-Wextra",
                "-pedantic",
                "-Werror",
                "-fsyntax-only",
                f"-I{include}",
                str(source),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
