"""Small things several test files need."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np

import flashcore as fc
from flashcore.testing import assert_close_to_reference, assert_grads_close_to_reference


def forward(arrays: dict[str, np.ndarray], options: dict[str, Any], **more: Any):
    """(out, lse, max_logits) of flashcore.attention."""
    return fc.attention(
        arrays["q"],
        arrays["k"],
        arrays["v"],
        **options,
        return_lse=True,
        return_max_logits=True,
        **more,
    )


def backward(
    arrays: dict[str, np.ndarray],
    options: dict[str, Any],
    *,
    dlse: bool = False,
    result=None,
    **more: Any,
):
    """Grads of flashcore.attention_backward."""
    options = {name: x for name, x in options.items() if name != "out_dtype"}
    if result is None:
        result = forward(arrays, options)
    return fc.attention_backward(
        arrays["dout"],
        arrays["q"],
        arrays["k"],
        arrays["v"],
        result.out,
        result.lse,
        **options,
        **({"dlse": arrays["dlse"]} if dlse else {}),
        **more,
    )


def check_forward(arrays, options) -> None:
    assert_close_to_reference(
        forward(arrays, options), arrays["q"], arrays["k"], arrays["v"], **options
    )


def check_backward(arrays, options, *, dlse: bool = False) -> None:
    grads = backward(arrays, options, dlse=dlse)
    assert_grads_close_to_reference(
        grads,
        arrays["dout"],
        arrays["q"],
        arrays["k"],
        arrays["v"],
        **options,
        **({"dlse": arrays["dlse"]} if dlse else {}),
    )


def bits(x) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def same_bits(a, b) -> bool:
    """Bitwise equality of arrays, or of tuples of them."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b))
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and bits(a) == bits(b)


def run_python(code: str, timeout: float = 120, **environment: str) -> str:
    """Runs code in a fresh interpreter, away from the source tree; returns what it printed."""
    environment = {**os.environ, **environment}
    environment.pop("PYTHONPATH", None)
    here = os.path.dirname(os.path.abspath(__file__))
    code = f"import sys; sys.path.append({here!r})\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=os.path.sep,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
