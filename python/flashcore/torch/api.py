"""flashcore.attention for torch tensors that may need gradients."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import flashcore as fc
from flashcore import _core
from flashcore.torch import autograd, operators

if TYPE_CHECKING:
    from flashcore.options import Options

    if sys.version_info >= (3, 11):
        from typing import Unpack
    else:
        from typing_extensions import Unpack

_INT64 = torch.iinfo(torch.int64)
_autocasts = torch._C._is_any_autocast_enabled


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out_dtype: torch.dtype | str | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    **options: Unpack[Options],
) -> Any:
    """`flashcore.attention` with gradients of q, k, v, bias and sinks, and of out and lse.

    Works in eager mode, under torch.func (grad, vjp, jacrev, vmap), torch.utils.checkpoint,
    torch.compile(fullgraph=True) and torch.export, on CPU and CUDA tensors. Without a gradient to
    record it is a call of `flashcore.attention`.

    Parameters
    ----------
    q, k, v : Tensor
        As for `flashcore.attention`.
    rng : (int, int) or int64 tensor (2,), optional
        Seed and offset of dropout. Default: drawn from torch's generator of q's device, so
        torch.manual_seed, checkpointing and CUDA graphs treat it as any other dropout.
    out_dtype, return_lse, return_max_logits, **options
        As for `flashcore.attention`, without out= and stream=: results are new tensors, on the
        current stream.

    Returns
    -------
    Tensor or flashcore.Result
        As `flashcore.attention`. lse is differentiable, max_logits is not.

    Raises
    ------
    ArgumentError, UnsupportedError, DeviceError
        As `flashcore.attention`. Also UnsupportedError for gradients of alibi_slopes, gradients of
        gradients, and forward-mode differentiation.

    Notes
    -----
    Under torch.autocast q, k and v are cast to its dtype, as for
    torch.nn.functional.scaled_dot_product_attention; a bias that is not float32 is cast with them.

    Examples
    --------
    >>> q = torch.randn(1, 128, 8, 64, requires_grad=True)
    >>> flashcore.torch.attention(q, q, q, causal=True).sum().backward()
    """
    given: dict[str, Any] = options  # type: ignore[assignment]
    if _autocasts():
        q, k, v = _autocast(given, q, k, v)
    if out_dtype is not None:
        out_dtype = _dtype(out_dtype)
    learned: tuple[Any, ...] = ()  # bias and sinks, if there is one
    if given:
        _check(given)
        if given.get("dropout_p") and given.get("rng") is None:
            given["rng"] = torch.randint(_INT64.min, _INT64.max, (2,), device=q.device)
        if "bias" in given or "sinks" in given:
            learned = given.get("bias"), given.get("sinks")

    call: Any = autograd.attention
    if autograd.recorded(q, k, v, learned):
        _check_tensors(q=q, k=k, v=v, **dict(zip(("bias", "sinks"), learned)))
        call = operators.attention
    elif not autograd.transformed():
        if not autograd.require_grad(q, k, v, learned):
            result = _core.attention(
                q, k, v, given, None, out_dtype, return_lse, return_max_logits, None
            )
            return fc.Result(*result) if return_lse or return_max_logits else result
        call = None
    bias = sinks = None
    if learned:
        bias, sinks = given.pop("bias", None), given.pop("sinks", None)
    only_out = not (return_lse or return_max_logits)
    if call:
        result = call(q, k, v, bias, sinks, given, return_max_logits, out_dtype, only_out)
    else:
        inputs = (q, k, v) if bias is None and sinks is None else (q, k, v, bias, sinks)
        result = autograd.record((given, return_max_logits, out_dtype, only_out), *inputs)
    if only_out:
        return result
    out, lse, max_logits = result
    return fc.Result(out, lse if return_lse else None, max_logits if return_max_logits else None)


def explain(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> fc.Plan:
    """`flashcore.explain` for tensors that may require grad."""
    if options.get("dropout_p") and options.get("rng") is None:
        options["rng"] = (0, 0)  # `attention` draws them; which they are changes no plan
    with torch.no_grad():
        return fc.explain(q, k, v, **options)


def _check_tensors(**tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and (x is not None or name in "qkv"):
            raise fc.ArgumentTypeError(
                f"[attention] {name} must be a torch tensor, got {type(x).__module__}."
                f"{type(x).__name__}: flashcore.attention takes the arrays of other frameworks"
            )


def _autocast(options: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:  # float64 and what is no number with a fraction stay
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    bias = options.get("bias")
    if bias is not None and bias.dtype != torch.float32:
        options["bias"] = cast(bias)
    return tuple(cast(x) for x in tensors)


def _check(options: dict[str, Any]) -> None:
    """What the core cannot see or would say in other words."""
    for name in ("out", "stream"):
        if name in options and options.pop(name) is not None:
            raise fc.UnsupportedError(
                f"[attention] {name}= is not an option of flashcore.torch.attention, whose result "
                "is a new tensor on the current stream: use torch.cuda.stream, or "
                "flashcore.attention under torch.no_grad()"
            )
    for name, x in autograd.tensors_in(options).items():
        if x.requires_grad and name not in ("bias", "sinks") and torch.is_grad_enabled():
            raise fc.UnsupportedError(
                f"[attention] {name} requires grad, but only q, k, v, bias and sinks have one: "
                f"pass {name}.detach(), or a learned bias="
            )


def _dtype(dtype: Any) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise fc.ArgumentTypeError(
            f"[attention] out_dtype must be None, a torch dtype or its name, got {dtype!r}"
        )
    return found
