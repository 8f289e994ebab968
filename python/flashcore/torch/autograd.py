"""Forward and backward as autograd functions, for eager mode and functorch.

Options are one dict, as the compiled core takes them. bias and sinks are apart from it because they
have gradients. What torch records instead of runs is in operators.py; both share the formulas here.

Forward is there twice. Eager mode pays for every step of Python and every output of a function, so
`Attention` is made of as few as there can be; functorch needs them apart, `TransformedAttention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from flashcore import _core
from flashcore.errors import UnsupportedError
from flashcore.torch import vmap

Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_NO_TENSORS = frozenset((bool, int, float, str, tuple, type(None)))  # isinstance takes longer
transformed = torch._C._are_functorch_transforms_active  # by grad, vjp, vmap, ...
_dispatch_modes = torch._C._len_torch_dispatch_stack


_is_traced = torch.compiler.is_dynamo_compiling  # by torch.compile and strict torch.export
_grad_is_enabled = torch.is_grad_enabled


def recorded(q: Tensor, k: Tensor, v: Tensor, others: tuple[Tensor | None, ...] = ()) -> bool:
    """Whether torch sees operators only: it compiles or exports, a dispatch mode listens, or a
    tensor is of a class of its own (fake, functional, distributed)."""
    for x in others:
        if x is not None and type(x) not in _PLAIN:
            return True
    plain = type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN
    return not plain or _is_traced() or _dispatch_modes() > 0


def require_grad(q: Tensor, k: Tensor, v: Tensor, others: tuple[Tensor | None, ...] = ()) -> bool:
    """Whether autograd records what is done with them."""
    if not _grad_is_enabled():
        return False
    for x in others:  # noqa: SIM110 (any() takes three times as long)
        if x is not None and x.requires_grad:
            return True
    return q.requires_grad or k.requires_grad or v.requires_grad


def tensors_in(options: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: x
        for name, x in options.items()
        if type(x) not in _NO_TENSORS and isinstance(x, Tensor)
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    options: dict[str, Any],
    return_max_logits: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, max_logits)"""
    if bias is not None or sinks is not None:
        options = {**options, "bias": bias, "sinks": sinks}
    return _core.attention(q, k, v, options, None, out_dtype, True, return_max_logits, None)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: dict[str, Any],
) -> Grads:
    """The gradients of q, k, v, bias, sinks, each in its tensor's dtype."""
    if bias is not None or sinks is not None:
        options = {**options, "bias": bias, "sinks": sinks}
    # Gradients come with whatever strides the next operation left.
    if not dout.is_contiguous() and (
        dout.stride(-1) != 1 or (dout.is_cuda and not _copyable(dout))
    ):
        dout = dout.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    dq, dk, dv, dbias, dsinks = _core.attention_backward(
        dout, q, k, v, out, lse, options, dlse, None, None, None, False, None
    )
    return dq, dk, dv, dbias if bias is None else dbias.to(bias.dtype), dsinks


def _copyable(t: Tensor) -> bool:
    """Whether the GPU's copy engine can read it: 16-byte steps from a 16-byte base."""
    return t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])


def _save(ctx: Any, options: dict[str, Any], *tensors: Tensor | None) -> None:
    """What backward needs, q, k, v, out, lse, bias, sinks, as tensors wherever it is one: hooks see
    those, and writing to one before backward is noticed."""
    if options:
        arrays = tensors_in(options)
        if arrays:
            options = {name: x for name, x in options.items() if name not in arrays}
            tensors += tuple(arrays.values())
        ctx.options = options, arrays.keys()
    ctx.save_for_backward(*tensors)


def _gradients_of_saved(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Grads:
    q, k, v, out, lse, *others = ctx.saved_tensors
    bias, sinks, *arrays = others or (None, None)
    options, names = getattr(ctx, "options", ({}, ()))
    if arrays:
        options = {**options, **dict(zip(names, arrays))}
    if dout is None:
        dout = torch.zeros_like(out)
    return gradients(dout, q, k, v, bias, sinks, out, lse, dlse, options)


class Attention(Function):
    """(call, q, k, v) or (call, q, k, v, bias, sinks) -> out, or (out, lse, max_logits)

    call is (options, return_max_logits, out_dtype, only_out): torch looks at every argument of a
    function three times, so what is no tensor is one of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[dict[str, Any], bool, torch.dtype | None, bool],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Any:
        options, return_max_logits, out_dtype, only_out = call
        alone = bias is None and sinks is None
        given = options if alone else {**options, "bias": bias, "sinks": sinks}
        result = _core.attention(q, k, v, given, None, out_dtype, True, return_max_logits, None)
        out, lse, max_logits = result
        if options or not alone:
            _save(ctx, options, q, k, v, out, lse, bias, sinks)
        else:
            ctx.save_for_backward(q, k, v, out, lse)
        if only_out:
            return out
        ctx.set_materialize_grads(False)
        if max_logits is not None:
            ctx.mark_non_differentiable(max_logits)
        return result

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, _: None = None
    ) -> tuple[Any, ...]:
        grads = _gradients_of_saved(ctx, dout, dlse)
        return (None, *grads)[: len(ctx.needs_input_grad)]


class TransformedAttention(Function):
    """(q, k, v, bias, sinks, options, return_max_logits, out_dtype) -> (out, lse, max_logits)"""

    forward = staticmethod(forward)
    vmap = staticmethod(vmap.forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        out, lse, max_logits = output
        _save(ctx, inputs[5], *inputs[:3], out, lse, *inputs[3:5])
        ctx.set_materialize_grads(False)
        if max_logits is not None:
            ctx.mark_non_differentiable(max_logits)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
        return (*_gradients_of_saved(ctx, dout, dlse), None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedError(
            "[attention] forward-mode differentiation (jvp, jacfwd) is not built; reverse mode is: "
            "torch.func.vjp, torch.func.jacrev, backward()"
        )


class AttentionBackward(Function):
    """(dout, q, k, v, bias, sinks, out, lse, dlse, options) -> gradients, with none of their own"""

    forward = staticmethod(backward)
    vmap = staticmethod(vmap.backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            "[attention] the gradient of a gradient (create_graph=True, torch.func.hessian) is not "
            "built: use torch.nn.functional.scaled_dot_product_attention under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), which has it"
        )


# Function.apply unwraps what functorch may have left behind, which costs as much as the rest of it.
record: Any = super(Function, Attention).apply


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    options: dict[str, Any],
    return_max_logits: bool,
    out_dtype: torch.dtype | None,
    only_out: bool = False,
) -> Any:
    """(out, lse, max_logits) where a gradient is to be recorded or transformed; out if it alone is
    asked for."""
    if transformed():
        result = TransformedAttention.apply(
            q, k, v, bias, sinks, options, return_max_logits, out_dtype
        )
        return result[0] if only_out else result
    call = options, return_max_logits, out_dtype, only_out
    return record(call, q, k, v, bias, sinks)


def gradients(dout: Tensor, *args: Any) -> Grads:
    """`backward` by whichever way the call is made: recorded, transformed or run."""
    if recorded(args[0], args[1], args[2], (dout,)):
        from flashcore.torch import operators

        return operators.attention_backward(dout, *args)
    # Grad is enabled in backward for create_graph=True alone.
    if transformed() or torch.is_grad_enabled():
        return AttentionBackward.apply(dout, *args)
    return backward(dout, *args)
