"""What a jitted call costs in JAX, beside a custom call whose handler does nothing."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = Callable[[], Any]


def jax_calls(device: str, shape: tuple[int, ...]) -> dict[str, Call]:
    """The first is what the others are measured against. On a GPU a call is enqueued and not waited
    for: the time is the host's."""
    import jax
    import jax.numpy as jnp

    import flashcore.jax as fj

    dtype = jnp.bfloat16 if device == "cuda" else jnp.float32
    place = jax.devices("gpu" if device == "cuda" else "cpu")[0]
    q, k, v = (
        jax.device_put(jax.random.normal(key, shape, dtype), place)
        for key in jax.random.split(jax.random.key(0), 3)
    )
    out = jax.ShapeDtypeStruct(shape, dtype)
    calls: dict[str, Callable[..., Any]] = {
        "flashcore.jax.attention": lambda q, k, v: fj.attention(q, k, v),
        "flashcore.jax.attention, causal=True": lambda q, k, v: fj.attention(q, k, v, causal=True),
        "jax.nn.dot_product_attention": jax.nn.dot_product_attention,
    }
    if register_empty("CUDA" if device == "cuda" else "cpu"):
        empty = jax.ffi.ffi_call("flashcore_empty", out, vmap_method="sequential")
        calls = {"empty FFI call": lambda q, k, v: empty(q, k, v), **calls}

    def timed(call: Callable[..., Any]) -> Call:
        if device == "cuda":
            return lambda: call(q, k, v)
        return lambda: call(q, k, v).block_until_ready()

    found = {f"{name}, jitted": timed(jax.jit(call)) for name, call in calls.items()}
    found["flashcore.jax.attention, not jitted"] = timed(fj.attention)
    return found


def register_empty(platform: str) -> bool:
    """Compiles benchmarks/cpp/empty_ffi.cpp; False where there is no C++ compiler."""
    import jax

    here = Path(__file__).resolve().parent
    # Not removed: the library stays loaded.
    library = Path(tempfile.mkdtemp(), "empty_ffi.so")
    build = [os.environ.get("CXX", "c++"), "-O2", "-std=c++20", "-shared", "-fPIC"]
    build += [f"-I{here.parent / 'cpp'}", str(here / "cpp" / "empty_ffi.cpp"), "-o", str(library)]
    try:
        subprocess.run(build, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    handler = ctypes.CDLL(str(library)).empty
    jax.ffi.register_ffi_target("flashcore_empty", jax.ffi.pycapsule(handler), platform=platform)
    return True
