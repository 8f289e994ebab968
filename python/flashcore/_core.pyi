"""The compiled extension. Options travel as one dict; OPTION_NAMES is what it may hold."""

from collections.abc import Mapping, Sequence
from typing import Any

VERSION: str
OPTION_NAMES: tuple[str, ...]
XLA_FFI_VERSIONS: tuple[tuple[int, int], tuple[int, int]]  # oldest, newest

# name, direction, backend, isa, dtype, mask, head_dim, head_dim_v, block_m, block_n, usable
_Kernel = tuple[str, str, str, str, str, str, int, int, int, int, bool]
# kind, id, name, isa, multiprocessors, memory_bytes
_Device = tuple[str, int, str, str, int, int]

def attention(
    q: Any,
    k: Any,
    v: Any,
    options: Mapping[str, Any],
    out: Any,
    out_dtype: Any,
    return_lse: bool,
    return_max_logits: bool,
    stream: Any,
    /,
) -> Any: ...
def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    options: Mapping[str, Any],
    dlse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    accumulate: bool,
    stream: Any,
    /,
) -> tuple[Any, Any, Any, Any, Any]: ...
def explain(
    q: Any, k: Any, v: Any, options: Mapping[str, Any], backward: bool, /
) -> tuple[_Kernel | None, int, int, bool, list[tuple[str, str]]]: ...
def merge(
    outs: Sequence[Any], lses: Sequence[Any], layout: str, out_dtype: Any, stream: Any, /
) -> tuple[Any, Any]: ...
def dropout_mask(keep: Any, p: float, rng: tuple[int, int], stream: Any, /) -> None: ...
def kernels() -> list[_Kernel]: ...
def devices() -> list[_Device]: ...
def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def xla_handlers() -> list[tuple[str, str, Any]]: ...
def xla_workspace(
    backward: bool,
    platform: str,
    device_id: int,
    tensors: list[tuple[str, str, tuple[int, ...]]],
    attributes: dict[str, int | float],
    /,
) -> int: ...
def xla_explain(
    backward: bool,
    platform: str,
    device_id: int,
    tensors: list[tuple[str, str, tuple[int, ...]]],
    attributes: dict[str, int | float],
    /,
) -> tuple[_Kernel | None, int, int, bool, list[tuple[str, str]]]: ...
