"""The type stub says what the extension has; a type checker accepts correct use and no other."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

import flashcore as fc
from flashcore import _core

PACKAGE = pathlib.Path(fc.__file__).parent


def test_py_typed_is_there():
    assert (PACKAGE / "py.typed").exists()


def test_the_stub_names_what_the_extension_has():
    tree = ast.parse((PACKAGE / "_core.pyi").read_text())
    in_stub = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    in_stub |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    public = {name for name in dir(_core) if not name.startswith("_")}
    assert {name for name in in_stub if not name.startswith("_")} == public


def test_every_public_name_has_a_docstring():
    for name in fc.__all__:
        if not name.startswith("__"):
            assert getattr(fc, name).__doc__, name


USE = """
import numpy as np
import flashcore as fc

x = np.ones((1, 4, 2, 8), np.float32)
fc.attention(x, x, x, causal=True, window_size=(4, None), rng=(1, 2))
plan: fc.Plan = fc.explain(x, x, x)
names: list[str] = [kernel.name for kernel in fc.kernels()]
mask: fc.BlockMask = fc.BlockMask.sliding(256, window_size=(64, 0))
grads: fc.Grads = fc.attention_backward(x, x, x, x, x, x)
"""
MISUSE = """
import flashcore as fc

fc.attention(1, 2, 3, causal="yes")
fc.explain(1, 2, 3).kernal
fc.set_num_threads("four")
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
@pytest.mark.parametrize("code,errors", [(USE, 0), (MISUSE, 3)], ids=["use", "misuse"])
def test_mypy_reads_the_types(tmp_path, code, errors):
    program = tmp_path / "program.py"
    program.write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.count("error:") == errors, done.stdout
