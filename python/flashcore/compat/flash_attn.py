"""flash-attn 2.8's functions on flashcore, for torch tensors on CPU and CUDA.

    from flashcore.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

Names, defaults, order of arguments, shapes and corner cases are flash-attn's: the causal corner is
bottom right, a side of window_size that is -1 is open, the lse of a row that sees no key is +inf.
More than there: any dtype and head_dim flashcore has, gradients through lse. Less: S_dmask with
dropout, block_table, rotary, cache_batch_idx and cache_leftpad raise UnsupportedError.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flashcore as fc
from flashcore.torch import attention
from flashcore.torch import explain as explain_attention

__all__ = [
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]

# The direction whose plan calls return; empty: they run.
_explained: ContextVar[str] = ContextVar("_explained", default="")


def explain(
    function: Callable[..., Any], *args: Any, direction: str = "forward", **kwargs: Any
) -> fc.Plan:
    """What a call of one of these functions would run: explain(flash_attn_func, q, k, v, ...).

    Computes nothing and writes nothing, not into a cache either. direction: "forward" or
    "backward"; see `flashcore.explain`.
    """
    before = _explained.set(direction)
    try:
        plan: fc.Plan = function(*args, **kwargs)
        return plan
    finally:
        _explained.reset(before)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D) -> out (B, Sq, Hq, D).

    With return_attn_probs: (out, softmax_lse (B, Hq, Sq), S_dmask), S_dmask empty as it is there
    without dropout.
    """
    return _call(
        "flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with kv (B, Sk, 2, Hkv, D)."""
    k, v = _unpacked("flash_attn_kvpacked_func", "kv", kv, "(B, Sk, 2, Hkv, D)", 5)
    return _call(
        "flash_attn_kvpacked_func", q, k, v, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with qkv (B, S, 3, H, D)."""
    q, k, v = _unpacked("flash_attn_qkvpacked_func", "qkv", qkv, "(B, S, 3, H, D)", 5)
    return _call(
        "flash_attn_qkvpacked_func", q, k, v, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """q (total_q, Hq, D), k and v (total_k, Hkv, D) -> out (total_q, Hq, D).

    With return_attn_probs: (out, softmax_lse (Hq, total_q), S_dmask).
    """
    name = "flash_attn_varlen_func"
    _refuse(name, "block_table", block_table, "k and v packed, (total_k, Hkv, D)")
    return _call(
        name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with kv (total_k, 2, Hkv, D)."""
    name = "flash_attn_varlen_kvpacked_func"
    k, v = _unpacked(name, "kv", kv, "(total_k, 2, Hkv, D)", 4)
    return _call(
        name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with qkv (total, 3, H, D)."""
    name = "flash_attn_varlen_qkvpacked_func"
    q, k, v = _unpacked(name, "qkv", qkv, "(total, 3, H, D)", 4)
    return _call(
        name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q (B, Sq, Hq, D) over a cache (B, capacity, Hkv, D) filled to cache_seqlens.

    k and v (B, new, Hkv, D) are first written into the cache behind what it holds. No gradients.
    """
    name = "flash_attn_with_kvcache"
    rotated = "q and k rotated before the call"
    _refuse(name, "rotary_cos", rotary_cos, rotated)
    _refuse(name, "rotary_sin", rotary_sin, rotated)
    _refuse(name, "cache_batch_idx", cache_batch_idx, "k_cache[cache_batch_idx] and v_cache alike")
    _refuse(name, "cache_leftpad", cache_leftpad, "a cache that starts at 0, or flashcore's mask=")
    _refuse(name, "block_table", block_table, "a cache (B, capacity, Hkv, D)")
    if (k is None) != (v is None):
        raise fc.ArgumentError(f"[{name}] k and v must be given together, got only one")
    call = partial(
        _call, name, q, k_cache, v_cache, 0.0, softmax_scale, causal, window_size, softcap,
        alibi_slopes, False, True, num_splits=num_splits,
    )  # fmt: skip
    with torch.no_grad():
        capacity = k_cache.shape[1]
        filled = capacity if cache_seqlens is None else cache_seqlens
        if not isinstance(filled, Tensor):
            filled = torch.full((q.shape[0],), filled, dtype=torch.int32, device=q.device)
        if k is not None and v is not None:
            new = k.shape[1]
            if cache_seqlens is None:
                raise fc.ArgumentError(f"[{name}] k and v need cache_seqlens: where to write them")
            if new > capacity:
                raise fc.ArgumentError(
                    f"[{name}] k has {new} positions, the cache holds {capacity}"
                )
            if filled.device.type == "cpu" and bool(
                ((filled < 0) | (filled + new > capacity)).any()
            ):
                raise fc.ArgumentError(
                    f"[{name}] cache_seqlens must be within 0..{capacity - new}, the cache's "
                    f"{capacity} positions less the {new} of k, got {filled.tolist()}"
                )
            if _explained.get():
                return call(seqlens_k=filled)
            plan = explain(call, seqlens_k=filled)  # a refused call leaves the cache as it was
            if not plan.kernel:
                raise fc.UnsupportedError(f"[{name}] no kernel can run this call: {plan}")
            rows = torch.arange(q.shape[0], device=q.device)[:, None]
            places = filled[:, None] + torch.arange(new, device=q.device)
            k_cache[rows, places] = k
            v_cache[rows, places] = v
            filled = filled + new
        result = call(seqlens_k=filled)
    if _explained.get():
        return result
    return result[:2] if return_softmax_lse else result[0]


def _call(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    **options: Any,
) -> Any:
    if return_attn_probs and dropout_p > 0:
        raise fc.UnsupportedError(
            f"[{name}] return_attn_probs with dropout_p {dropout_p}: the probabilities are not "
            "kept. flashcore.dropout_mask gives the entries that flashcore.torch.attention(rng=) "
            "drops, and dropout_p=0 the lse"
        )
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # as flash-attn does
    options |= {
        "dropout_p": dropout_p,
        "scale": softmax_scale,
        "causal": causal,
        "window_size": (window_size[0], window_size[1]),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
    }
    if _explained.get():
        return explain_attention(q, k, v, direction=_explained.get(), **options)
    result = attention(q, k, v, return_lse=return_attn_probs, **options)
    if not return_attn_probs:
        return result
    lse = torch.where(result.lse == -torch.inf, torch.inf, result.lse)
    return result.out, lse, q.new_empty(0)


def _unpacked(
    name: str, argument: str, packed: Tensor, shape: str, dims: int
) -> tuple[Tensor, ...]:
    parts = len(argument)  # kv, qkv
    if packed.ndim != dims or packed.shape[-3] != parts:
        raise fc.ArgumentError(f"[{name}] {argument} must be {shape}, got {tuple(packed.shape)}")
    return packed.unbind(-3)


def _refuse(name: str, argument: str, value: Any, instead: str) -> None:
    if value is not None:
        raise fc.UnsupportedError(f"[{name}] {argument} is not built: pass {instead}")
