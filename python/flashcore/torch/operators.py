"""torch.ops.flashcore.attention and attention_backward: what torch.compile, torch.export, dispatch
modes and torch.library.opcheck see of flashcore.

An operator takes tensors and numbers by position, so the options are spread over fields here, one
list for both operators. None means not given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flashcore as fc
from flashcore.torch import autograd

_FIELDS = {
    "mask": "Tensor?",
    "alibi_slopes": "Tensor?",
    "q_offset_tensor": "Tensor?",
    "rng_tensor": "Tensor?",
    "cu_seqlens_q": "Tensor?",
    "cu_seqlens_k": "Tensor?",
    "seqlens_q": "Tensor?",
    "seqlens_k": "Tensor?",
    "page_table": "Tensor?",
    "q_descale": "Tensor?",
    "k_descale": "Tensor?",
    "v_descale": "Tensor?",
    "kv_num_blocks": "Tensor?",
    "kv_indices": "Tensor?",
    "q_num_blocks": "Tensor?",
    "q_indices": "Tensor?",
    "block": "SymInt[]?",
    "block_lengths": "SymInt[]?",
    "layout": "str?",
    "scale": "float?",
    "causal": "bool?",
    "window_size": "SymInt[]?",
    "align": "str?",
    "q_offset": "SymInt?",
    "softcap": "float?",
    "dropout_p": "float?",
    "rng": "SymInt[]?",
    "max_seqlen_q": "SymInt?",
    "max_seqlen_k": "SymInt?",
    "num_splits": "SymInt?",
    "split_size": "SymInt?",
    "deterministic": "bool?",
}
Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # empty where there is none

_BLOCK_LISTS = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
_OPEN = -1  # a side of window_size without a bound: lists of integers hold no None


def spread(options: dict[str, Any]) -> list[Any]:
    """The options as values of _FIELDS."""
    given = dict(options)
    for name in ("q_offset", "rng"):
        if isinstance(given.get(name), Tensor):
            given[name + "_tensor"] = given.pop(name)
    if given.get("rng") is not None:  # operators have signed integers
        given["rng"] = [(int(x) + 2**63) % 2**64 - 2**63 for x in given["rng"]]
    if given.get("window_size") is not None:
        given["window_size"] = [_OPEN if w is None else w for w in given["window_size"]]
    block_mask = given.pop("block_mask", None)
    if block_mask is not None:
        given["block"] = block_mask.block
        given["block_lengths"] = block_mask.lengths
        for name in _BLOCK_LISTS:
            given[name] = torch.as_tensor(getattr(block_mask, name))
    unknown = given.keys() - _FIELDS.keys()
    if unknown:
        raise TypeError(f"attention() got options that it does not have: {sorted(unknown)}")
    return [given.get(name) for name in _FIELDS]


def gathered(values: tuple[Any, ...]) -> dict[str, Any]:
    """The options that `spread` gave. An operator leaves out trailing values that are None."""
    options = {name: x for name, x in zip(_FIELDS, values) if x is not None}
    for name in ("q_offset", "rng"):
        if name + "_tensor" in options:
            options[name] = options.pop(name + "_tensor")
    if "block" in options:
        lists = {name: options.pop(name) for name in _BLOCK_LISTS}
        options["block_mask"] = fc.BlockMask(
            **lists, block=options.pop("block"), shape=options.pop("block_lengths", None)
        )
    return options


# ---- the kernels, and their shapes for tensors without data --------------------------------------


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_max_logits: bool = False,
    out_dtype: torch.dtype | None = None,
    *values: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, max_logits = autograd.forward(
        q, k, v, bias, sinks, gathered(values), return_max_logits, out_dtype
    )
    return out, lse, _or_empty(max_logits, lse)


def _attention_backward(*args: Any) -> Grads:
    inputs: list[Any] = [*args[:9], gathered(args[9:])]
    dq, dk, dv, dbias, dsinks = autograd.backward(*inputs)
    return dq, dk, dv, _or_empty(dbias, dq), _or_empty(dsinks, dq)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Operators cannot return None."""
    return like.new_empty(0) if x is None else x


def _like(x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    # As the core does: the order of an overlapping tensor need not end with its last dimension.
    packed = made.stride(-1) == 1 or x.shape[-1] == 1
    return made if packed else x.new_empty(x.shape)


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_max_logits: bool = False,
    out_dtype: torch.dtype | None = None,
    *values: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options = dict(zip(_FIELDS, values))
    dtype = out_dtype or q.dtype
    if q.shape[-1] == v.shape[-1] and q.dtype == dtype:
        out = _like(q)
    else:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype)
    if options.get("cu_seqlens_q") is not None:
        heads_outside = q.transpose(0, 1)
    else:
        heads_outside = q if options.get("layout") == "bhsd" else q.transpose(1, 2)
    rows = heads_outside.shape[:-1]
    lse = q.new_empty(rows, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return out, lse, lse.new_empty(rows if return_max_logits else 0)


def _attention_backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> Grads:
    none = q.new_empty(0)
    return (
        _like(q),
        _like(k),
        _like(v),
        none if bias is None else bias.new_empty(bias.shape),
        none.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


# ---- their derivatives: those of autograd.py, by position ----------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, bias, sinks, _, _, *values = inputs
    options = gathered(tuple(values))
    autograd.TransformedAttention.setup_context(ctx, (q, k, v, bias, sinks, options), output)


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    return (*autograd.TransformedAttention.backward(ctx, *grads)[:7], *(None for _ in _FIELDS))


# ---- registration --------------------------------------------------------------------------------

_library = torch.library.Library("flashcore", "DEF")
_options = ", ".join(f"{kind} {name}=None" for name, kind in _FIELDS.items())
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? sinks=None, "
    f"bool return_max_logits=False, ScalarType? out_dtype=None, {_options})"
    " -> (Tensor out, Tensor lse, Tensor max_logits)"
)
_library.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, "
    f"Tensor out, Tensor lse, Tensor? dlse, {_options})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)
for _key in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _key)
    _library.impl("attention_backward", _attention_backward, _key)
torch.library.register_fake("flashcore::attention", _attention_fake, lib=_library)
torch.library.register_fake("flashcore::attention_backward", _attention_backward_fake, lib=_library)
torch.library.register_autograd(
    "flashcore::attention", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "flashcore::attention_backward", autograd.AttentionBackward.backward, lib=_library
)


# ---- calling them --------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    options: dict[str, Any],
    return_max_logits: bool,
    out_dtype: torch.dtype | None,
    only_out: bool,
) -> Any:
    result = torch.ops.flashcore.attention(
        q, k, v, bias, sinks, return_max_logits, out_dtype, *spread(options)
    )
    return result[0] if only_out else result


def attention_backward(*args: Any) -> autograd.Grads:
    *grads, dbias, dsinks = torch.ops.flashcore.attention_backward(*args[:9], *spread(args[9]))
    _, _, _, _, bias, sinks, *_ = args
    return (*grads, None if bias is None else dbias, None if sinks is None else dsinks)
