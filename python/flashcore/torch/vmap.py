"""torch.vmap of attention: the mapped dimension becomes part of the batch.

Where that would change the result (dropout bits depend on the batch index) or cannot be said
(packed sequences, sinks of each call), the calls are made one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_PER_BATCH = ("seqlens_q", "seqlens_k", "q_offset")  # (B,)


class _Fold:
    """Between a mapped dimension of size n, wherever it is, and n * batch in front."""

    def __init__(self, n: int, batch: int) -> None:
        self.n, self.batch = n, batch

    def apart(self, x: Tensor, dim: int | None) -> Tensor:
        """(n, ...)"""
        return x.expand(self.n, *x.shape) if dim is None else x.movedim(dim, 0)

    def fold(self, x: Tensor, dim: int | None) -> Tensor:
        """(n * batch, ...) of a tensor that has the batch in front, or 1 for all of it."""
        x = self.apart(x, dim)
        return x.expand(-1, self.batch, *x.shape[2:]).flatten(0, 1)

    def shared(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """As fold, but what is the same for all calls and the whole batch stays so."""
        return x if x is None or (dim is None and x.shape[0] == 1) else self.fold(x, dim)

    def unfold(self, x: Tensor) -> Tensor:
        return x.reshape(self.n, self.batch, *x.shape[1:])

    def options(self, options: dict[str, Any], dims: dict[str, Any]) -> dict[str, Any]:
        folded = dict(options)
        for name, x in options.items():
            dim = dims[name]
            if not isinstance(x, Tensor):
                continue
            if name in _PER_BATCH:
                folded[name] = self.fold(x, dim)
            elif name == "mask":
                folded[name] = self.shared(x, dim)
            elif x.ndim > 1:  # alibi_slopes: (B, Hq), or (Hq,) of each call
                x = self.apart(x, dim)
                folded[name] = self.fold(x if x.ndim == 3 else x[:, None], 0)
        return folded


def _fold(
    n: int, q: Tensor, q_dim: int | None, sinks: Any, options: dict[str, Any]
) -> _Fold | None:
    """None: the calls must be made one by one. sinks: not None if each call has its own."""
    sizes = [size for d, size in enumerate(q.shape) if d != q_dim]
    known = (*_PER_BATCH, "mask", "alibi_slopes")
    block_mask = options.get("block_mask")
    if (
        len(sizes) != 4
        or sinks is not None
        or options.get("dropout_p")
        or any(isinstance(x, Tensor) and name not in known for name, x in options.items())
        or (block_mask is not None and block_mask.kv_num_blocks.shape[0] != 1)
    ):
        return None
    return _Fold(n, sizes[0])


def _one_by_one(function: Callable[..., Any], n: int, dims: Any, args: Any) -> tuple[Any, Any]:
    flat, spec = pytree.tree_flatten(args)
    flat_dims, _ = pytree.tree_flatten(dims)

    def call(i: int) -> Any:
        at = [x if d is None else x.select(d, i) for x, d in zip(flat, flat_dims)]
        return function(*pytree.tree_unflatten(at, spec))

    results = zip(*(call(i) for i in range(n)))
    return _mapped(*(x[0] if x[0] is None else torch.stack(x) for x in results))


def _mapped(*results: Any) -> tuple[Any, Any]:
    """With the dimension that is mapped: the first, of what there is."""
    return results, tuple(None if x is None else 0 for x in results)


def forward(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The rule of autograd.TransformedAttention."""
    from flashcore.torch.autograd import attention

    q, k, v, bias, sinks, options, return_max_logits, out_dtype = args
    fold = _fold(info.batch_size, q, dims[0], dims[4], options)
    if fold is None:
        return _one_by_one(attention, info.batch_size, dims, args)
    out, lse, max_logits = attention(
        fold.fold(q, dims[0]),
        fold.fold(k, dims[1]),
        fold.fold(v, dims[2]),
        fold.shared(bias, dims[3]),
        sinks,
        fold.options(options, dims[5]),
        return_max_logits,
        out_dtype,
    )
    return _mapped(*(x if x is None else fold.unfold(x) for x in (out, lse, max_logits)))


def backward(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The rule of autograd.AttentionBackward."""
    from flashcore.torch.autograd import gradients

    dout, q, k, v, bias, sinks, out, lse, dlse, options = args
    fold = _fold(info.batch_size, q, dims[1], sinks, options)
    if fold is None:
        return _one_by_one(gradients, info.batch_size, dims, args)
    dbias: Any
    dq, dk, dv, dbias, dsinks = gradients(
        *(fold.fold(x, dim) for x, dim in zip((dout, q, k, v), dims)),
        None if bias is None else fold.fold(bias, dims[4]),  # each call has its own dbias
        sinks,
        *(None if x is None else fold.fold(x, dim) for x, dim in zip((out, lse, dlse), dims[6:])),
        fold.options(options, dims[9]),
    )
    if bias is not None:
        dbias = fold.unfold(dbias)
        if fold.apart(bias, dims[4]).shape[1] != fold.batch:
            dbias = dbias.sum(1, keepdim=True)
    return _mapped(fold.unfold(dq), fold.unfold(dk), fold.unfold(dv), dbias, dsinks)
