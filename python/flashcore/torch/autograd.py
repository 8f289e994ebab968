"""Forward and backward as two autograd functions, for eager mode and functorch.

Options are one dict, as the compiled core takes them. bias and sinks are apart from it because they
have gradients. What torch records instead of runs is in operators.py; both share the formulas here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from flashcore import _core
from flashcore.errors import UnsupportedError
from flashcore.torch import vmap

Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
transformed = torch._C._are_functorch_transforms_active  # by grad, vjp, vmap, ...
_dispatch_modes = torch._C._len_torch_dispatch_stack


def recorded(tensors: Sequence[Tensor]) -> bool:
    """Whether torch sees operators only: it compiles or exports, a dispatch mode listens, or a
    tensor is of a class of its own (fake, functional, distributed)."""
    return (
        torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or not _PLAIN.issuperset(map(type, tensors))
    )


def require_grad(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd records what is done with them."""
    if torch.is_grad_enabled():
        for x in tensors:  # noqa: SIM110 (any() takes three times as long)
            if x.requires_grad:
                return True
    return False


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
    if dout.stride(-1) != 1 or (dout.is_cuda and not _copyable(dout)):
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


class Attention(Function):
    """(q, k, v, bias, sinks, options, return_max_logits, out_dtype) -> (out, lse, max_logits)"""

    forward = staticmethod(forward)
    vmap = staticmethod(vmap.forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        q, k, v, bias, sinks, options, *_ = inputs
        out, lse, max_logits = output
        tensors: dict[str, Tensor] = {}
        if options:
            # Saved as tensors: hooks see them, and writing to one before backward is noticed.
            tensors = {name: x for name, x in options.items() if isinstance(x, Tensor)}
            options = {name: x for name, x in options.items() if name not in tensors}
        ctx.names, ctx.options = tuple(tensors), options
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse, *tensors.values())
        ctx.set_materialize_grads(False)
        if max_logits is not None:
            ctx.mark_non_differentiable(max_logits)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
        q, k, v, bias, sinks, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        options = {**ctx.options, **dict(zip(ctx.names, tensors))}
        grads = gradients(dout, q, k, v, bias, sinks, out, lse, dlse, options)
        return (*grads, None, None, None)

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


# Function.apply asks inspect for the signature first, which costs more than the call; functorch
# needs it, plain autograd does not.
_apply: Any = super(Function, Attention).apply


def attention(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`Attention` where it is recorded by autograd or transformed by functorch."""
    apply = Attention.apply if transformed() else _apply
    return apply(*args)


def gradients(dout: Tensor, *args: Any) -> Grads:
    """`backward` by whichever way the call is made: recorded, transformed or run."""
    if recorded((dout, *args[:3])):
        from flashcore.torch import operators

        return operators.attention_backward(dout, *args)
    # Grad is enabled in backward for create_graph=True alone.
    if transformed() or torch.is_grad_enabled():
        return AttentionBackward.apply(dout, *args)
    return backward(dout, *args)
