"""flashcore: exact, IO-aware attention on any DLPack array.

    import flashcore as fc
    out = fc.attention(q, k, v, causal=True)

One compiled core serves NumPy, PyTorch, CuPy and JAX arrays; importing flashcore imports none of
them. See `attention` for the options and their semantics, `explain` for what a call would run.
"""

from __future__ import annotations

from flashcore import _threadpool
from flashcore._core import VERSION as __version__
from flashcore.api import (
    attention,
    attention_backward,
    devices,
    dropout_mask,
    explain,
    get_num_threads,
    kernels,
    merge,
    set_num_threads,
)
from flashcore.block_mask import BlockMask
from flashcore.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceError,
    Error,
    UnsupportedError,
)
from flashcore.options import Options
from flashcore.results import Device, Grads, Kernel, Plan, Result

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BlockMask",
    "Device",
    "DeviceError",
    "Error",
    "Grads",
    "Kernel",
    "Options",
    "Plan",
    "Result",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_backward",
    "devices",
    "dropout_mask",
    "explain",
    "get_num_threads",
    "kernels",
    "merge",
    "set_num_threads",
]

_threadpool.register()
