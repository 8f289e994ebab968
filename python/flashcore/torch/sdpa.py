"""torch.nn.functional.scaled_dot_product_attention on flashcore."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

import flashcore as fc
from flashcore.torch.api import attention, explain
from flashcore.torch.autograd import require_grad

_functional = torch.nn.functional
_torch_sdpa = _functional.scaled_dot_product_attention


def register_sdpa(*, strict: bool = False) -> contextlib.ExitStack:
    """Makes torch.nn.functional.scaled_dot_product_attention run flashcore where it can.

    Modules that look the function up when they call it (torch.nn.MultiheadAttention, Hugging Face
    "sdpa") follow; a name that was imported from torch before, and a graph compiled before, do not.

    Parameters
    ----------
    strict : bool
        What flashcore cannot run: False leaves it to torch, True raises the reason.

    Returns
    -------
    contextlib.ExitStack
        The way back: its close(), or the end of a `with` block, restores torch's function.

    Examples
    --------
    >>> with flashcore.torch.register_sdpa():
    ...     out = model(tokens)
    """

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        try:
            options = _options(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
            return attention(query, key, value, **options)
        except fc.Error:
            if strict:
                raise
        return _torch_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    name = scaled_dot_product_attention.__name__
    before = getattr(_functional, name)  # another register_sdpa's, perhaps
    setattr(_functional, name, scaled_dot_product_attention)
    way_back = contextlib.ExitStack()
    way_back.callback(setattr, _functional, name, before)
    return way_back


def _options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> dict[str, Any]:
    """The call in flashcore's words. Raises UnsupportedError if it has none."""

    def refuse(name: str, got: Any, allowed: str) -> Any:
        raise fc.UnsupportedError(
            f"[scaled_dot_product_attention] {name} is {got}; flashcore takes {allowed}. "
            "torch's own function, register_sdpa(strict=False), takes it"
        )

    for name, x in (("query", q), ("key", k), ("value", v)):
        if type(x) not in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
            refuse(name, f"a {type(x).__name__}", "plain tensors")
        if x.ndim != 4:
            refuse(name, f"{x.ndim}-D", "(batch, heads, length, head_dim)")
        if x.device.type not in ("cpu", "cuda"):
            refuse(name, f"on {x.device}", "cpu and cuda tensors")
        if x.shape[0] != q.shape[0]:
            refuse(name, f"a batch of {x.shape[0]}", f"query's, {q.shape[0]}")
        if x.shape[1] != q.shape[1] and not enable_gqa:
            refuse(name, f"of {x.shape[1]} heads", f"query's, {q.shape[1]}, without enable_gqa")
    if attn_mask is not None and is_causal:
        refuse("is_causal", "given with attn_mask", "one of them")
    if attn_mask is not None and attn_mask.ndim > 4:
        refuse("attn_mask", f"{attn_mask.ndim}-D", "up to 4 dimensions")

    options: dict[str, Any] = {"layout": "bhsd"}
    if is_causal:
        options.update(causal=True, align="top_left")
    if scale is not None:
        options["scale"] = scale
    if dropout_p:
        options["dropout_p"] = dropout_p
    if attn_mask is not None:
        mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        options["mask" if mask.dtype == torch.bool else "bias"] = mask
    if not q.is_cuda:  # the CPU kernels take every call
        return options
    if torch.compiler.is_compiling():
        refuse("query", "on a GPU inside torch.compile", "it in flashcore.torch.attention there")
    # A call that no kernel runs says so by itself, but only after dropout has drawn its seed, and
    # of backward nothing.
    directions = ["forward"] if dropout_p else []
    if require_grad(q, k, v, (attn_mask,)):
        directions.append("backward")
    for direction in directions:
        rng = (0, 0) if dropout_p else None
        plan = explain(q, k, v, direction=direction, rng=rng, **options)
        if plan.kernel is None:
            refuse("query", f"refused {direction}, {plan.refusals}", "what a kernel of it takes")
    return options
