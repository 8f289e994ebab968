"""New arrays for outputs and device workspaces, one allocator per framework.

The extension makes an allocator when it meets the first array of a framework, which is imported
here by name and found loaded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple


class Allocator(NamedTuple):
    """like(array): a new array of its shape, dtype, order of dimensions and device.

    make(like, shape, dtype, zero, stream): any other.

    like    an array of that framework: the new one is on its device
    shape   None: as like(like) would have it
    dtype   the name of a dtype; None if shape is
    zero    fill with zeros
    stream  the raw CUDA stream that the caller named, or None for the framework's current one:
            frameworks recycle memory in stream order, so memory belongs to the stream that uses it

    empty(shape, strides, dtype=, device=): as make, of the framework itself, where a call of it
    takes no Python function in between; None elsewhere.

    dtypes: what empty calls a dtype, by its name.
    """

    like: Callable[[Any], Any]
    make: Callable[[Any, Any, Any, bool, Any], Any]
    empty: Callable[..., Any] | None = None
    dtypes: dict[str, Any] = {}  # noqa: RUF012 (never written)


_ALIGNMENT = 64  # bytes: what JAX asks of memory that it takes over without a copy


def torch_allocator() -> Allocator:
    import torch

    cuda: Any = torch.cuda

    def on_stream(device: Any, stream: int) -> Any:
        legacy = stream == 0
        return cuda.stream(
            cuda.default_stream(device) if legacy else cuda.ExternalStream(stream, device)
        )

    def make(like: Any, shape: Any, dtype: Any, zero: bool, stream: Any) -> Any:
        if stream is not None and like.is_cuda:
            with on_stream(like.device, stream):
                return make(like, shape, dtype, zero, None)
        if shape is None:
            return torch.zeros_like(like) if zero else torch.empty_like(like)
        new = torch.zeros if zero else torch.empty
        return new(shape, dtype=getattr(torch, dtype), device=like.device)

    names = "float16", "bfloat16", "float32", "float64", "uint8"
    dtypes = {name: getattr(torch, name) for name in names}
    # empty_strided: its arguments are read in half the time that torch.empty takes.
    return Allocator(torch.empty_like, make, torch.empty_strided, dtypes)


def numpy_allocator() -> Allocator:
    import numpy as np

    def make(like: Any, shape: Any, dtype: Any, zero: bool, stream: Any) -> Any:
        if shape is None:
            return (np.zeros_like if zero else np.empty_like)(like, subok=False)
        return (np.zeros if zero else np.empty)(shape, _numpy_dtype(dtype))

    return Allocator(functools.partial(np.empty_like, subok=False), make)


class _RawStream:
    """A raw stream in the form of the CUDA stream protocol."""

    def __init__(self, stream: int) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.stream)


def cupy_allocator() -> Allocator:
    import cupy

    def on_stream(stream: int, device_id: int) -> Any:
        if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14
            return cupy.cuda.Stream.from_external(_RawStream(stream))
        return cupy.cuda.ExternalStream(stream, device_id)

    def make(like: Any, shape: Any, dtype: Any, zero: bool, stream: Any) -> Any:
        with contextlib.ExitStack() as scope:
            scope.enter_context(like.device)
            if stream is not None:
                scope.enter_context(on_stream(stream, like.device.id))
            if shape is None:
                return cupy.zeros_like(like) if zero else cupy.empty_like(like)
            return (cupy.zeros if zero else cupy.empty)(shape, _numpy_dtype(dtype))

    return Allocator(lambda like: make(like, None, None, False, None), make)


def jax_allocator() -> Allocator:
    """A JAX array may not be written, so this makes a NumPy array, which `jax_array` turns into
    one: aligned so that JAX need not copy it."""
    import numpy as np

    def make(like: Any, shape: Any, dtype: Any, zero: bool, stream: Any) -> Any:
        kind = like.dtype if shape is None else np.dtype(_numpy_dtype(dtype))
        shape = like.shape if shape is None else shape
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        memory = (np.zeros if zero else np.empty)(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start : start + size].view(kind).reshape(shape)

    return Allocator(lambda like: make(like, None, None, False, None), make)


def jax_array(buffer: Any, like: Any) -> Any:
    """The buffer as a JAX array on like's device. Nobody else holds the buffer."""
    import jax

    return jax.device_put(buffer, like.device)


def packed(array: Any) -> Any:
    """A copy with the elements in order."""
    if hasattr(array, "contiguous"):
        return array.contiguous()
    if type(array).__module__.partition(".")[0] == "cupy":
        import cupy

        return cupy.ascontiguousarray(array)
    import numpy as np

    return np.ascontiguousarray(array)


def _numpy_dtype(name: str) -> Any:
    if name != "bfloat16":
        return name
    import ml_dtypes  # bfloat16 is not among NumPy's own dtypes

    return ml_dtypes.bfloat16
