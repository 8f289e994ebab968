"""Gradients of q, k, v, bias and sinks, through out and lse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from flashcore.errors import UnsupportedError
from flashcore.jax.spec import FORWARD, Spec
from flashcore.jax.vmap import mappable

_DIFFERENTIABLE = (*FORWARD, "bias", "sinks")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(spec: Spec, operands: list[Any]) -> list[Any]:
    """The results of a forward spec."""
    return mappable(spec)(*operands)


def _forward(spec: Spec, operands: list[CustomVJPPrimal]) -> tuple[list[Any], Any]:
    # As sizes, 0 or 1: JAX may give the backward pass the structure that another forward pass had.
    wanted = {
        name: jnp.zeros(int(x.perturbed), bool)
        for name, x in zip(spec.operands, operands)
        if name in ("bias", "sinks")
    }
    for name, x in zip(spec.operands, operands):
        if x.perturbed and name not in _DIFFERENTIABLE and _is_real(x.value):
            raise UnsupportedError(
                f"[attention] {name} is differentiated, but only q, k, v, bias and sinks have "
                f"gradients: pass jax.lax.stop_gradient({name}), or a learned bias="
            )
    values = [x.value for x in operands]
    with_lse = ("out", "lse", *(name for name in spec.results if name == "max_logits"))
    results = _once(spec._replace(results=with_lse))(*values)
    named = dict(zip(with_lse, results, strict=True))
    return [named[name] for name in spec.results], (values, named["out"], named["lse"], wanted)


def _backward(spec: Spec, saved: Any, gradients: list[Any]) -> tuple[list[Any]]:
    values, out, lse, wanted = saved
    named = spec.named(values)
    given = {
        f"d{name}": x
        for name, x in zip(spec.results, gradients)
        if name != "max_logits" and not isinstance(x, SymbolicZero)
    }
    extra = {name: x for name, x in named.items() if name not in FORWARD}
    operands = {name: named[name] for name in FORWARD} | {"out": out, "lse": lse}
    operands["dout"] = given["dout"] if "dout" in given else jnp.zeros_like(out)
    if "dlse" in given:
        operands["dlse"] = given["dlse"]
    operands |= extra
    results = ("dq", "dk", "dv", *(f"d{name}" for name, size in wanted.items() if size.shape[0]))
    backward = Spec(tuple(operands), results, spec.attributes)
    computed = dict(zip(results, _once(backward)(*operands.values()), strict=True))

    def gradient(name: str, x: Any) -> Any:
        found = computed.get(f"d{name}")
        return None if found is None else found.astype(x.dtype)

    return ([gradient(name, x) for name, x in named.items()],)


attention.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_real(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


@functools.cache
def _once(spec: Spec) -> Callable[..., Sequence[Any]]:
    """A call inside of a gradient: it has none of its own."""
    call = mappable(spec)
    function = jax.custom_vjp(lambda *operands: call(*operands))

    def refuse(*_: Any) -> NoReturn:
        raise UnsupportedError(
            "[attention] the gradient of a gradient (jax.hessian, jax.grad of jax.grad) is not "
            "built: jax.nn.dot_product_attention has it"
        )

    function.defvjp(refuse, refuse)
    return function
