"""jax.nn.dot_product_attention, by flashcore."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flashcore.errors import ArgumentError, UnsupportedError
from flashcore.jax import arguments
from flashcore.jax.api import attention

_CALL = "dot_product_attention"


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any | None = None,
    mask: Any | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any | None = None,
    key_value_seq_lengths: Any | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """The signature and meaning of `jax.nn.dot_product_attention`; the kernels of flashcore.

    Parameters
    ----------
    query : array (B, T, N, H) or (T, N, H)
    key, value : array (B, S, K, H) or (S, K, H)
        K divides N.
    bias : array, optional
        Added to the scores; broadcastable to (B, N, T, S). float32, or query's dtype; other
        floating dtypes are read as float32, as they are added to float32 scores.
    mask : bool array, optional
        True = visible; broadcastable to (B, N, T, S).
    scale : float, optional
        Default 1/sqrt(H). Static.
    is_causal : bool
        Row i sees the keys j <= i, also where T and S differ.
    query_seq_lengths, key_value_seq_lengths : int32 array (B,), optional
        Valid lengths. Rows past them are 0.
    local_window_size : int or (int, int), optional
        Row i sees the keys i - left <= j <= i + right.
    implementation : None
        "xla" and "cudnn" are those of jax.nn, and refused here.
    return_residual : bool
        Also return the logsumexp of each row, (B, T, N), in query's dtype, without gradient.

    Returns
    -------
    array, shape of query; or (array, residual)

    Raises
    ------
    ArgumentError, UnsupportedError
        As `flashcore.jax.attention`.

    Notes
    -----
    One difference: a row that sees no key is 0 here (residual -inf). jax.nn gives such a row the
    mean of all values.
    """
    if implementation is not None:
        raise UnsupportedError(
            f"[{_CALL}] implementation must be None, got {implementation!r}: this is flashcore's; "
            "jax.nn.dot_product_attention has 'xla' and 'cudnn'"
        )
    residual = arguments.flag(_CALL, "return_residual", return_residual)
    q, k, v = (_four(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    options: dict[str, Any] = {"align": "top_left"}
    options["causal"] = arguments.flag(_CALL, "is_causal", is_causal)
    if scale is not None:
        options["scale"] = arguments.number(_CALL, "scale", scale)
    if local_window_size is not None:
        is_pair = isinstance(local_window_size, (tuple, list))
        options["window_size"] = local_window_size if is_pair else (local_window_size,) * 2
    if bias is not None:
        bias = _four("bias", bias)
        options["bias"] = bias if bias.dtype == q.dtype else _as_scores(bias, q)
    if mask is not None:
        options["mask"] = _four("mask", mask)
    if query_seq_lengths is not None:
        options["seqlens_q"] = query_seq_lengths
    if key_value_seq_lengths is not None:
        options["seqlens_k"] = key_value_seq_lengths
    result = attention(q, k, v, return_lse=residual, **options)
    if not residual:
        return result.reshape(query.shape)
    lse = jax.lax.stop_gradient(result.lse).swapaxes(1, 2).astype(q.dtype)
    return result.out.reshape(query.shape), lse.reshape(query.shape[:-1])


def _four(name: str, x: Any) -> Any:
    """With dimensions of size 1 in front, as jax.nn has it."""
    x = arguments.array(_CALL, name, x)
    if name in ("query", "key", "value") and x.ndim not in (3, 4):
        raise ArgumentError(
            f"[{_CALL}] {name} must have 3 or 4 dimensions, (length, heads, head_dim) or with a "
            f"batch in front, got {x.dtype} {x.shape}"
        )
    if x.ndim > 4:
        raise ArgumentError(
            f"[{_CALL}] {name} must be broadcastable to (batch, heads, T, S), got {x.shape}"
        )
    return x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))


def _as_scores(bias: Any, q: Any) -> Any:
    """The scores' dtype, in which it is added."""
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ArgumentError(
            f"[{_CALL}] bias must be a floating array, got {bias.dtype}: a boolean one is a mask="
        )
    return bias.astype(jnp.float64 if q.dtype == jnp.float64 else jnp.float32)
