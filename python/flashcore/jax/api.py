"""flashcore.attention for JAX: traced, differentiated, mapped, divided over devices."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import jax

import flashcore as fc
from flashcore import _core
from flashcore.api import plan_of
from flashcore.errors import ArgumentError
from flashcore.jax import arguments, autodiff, primitives
from flashcore.jax.spec import Spec

if TYPE_CHECKING:
    from flashcore.options import Options

    if sys.version_info >= (3, 11):
        from typing import Unpack
    else:
        from typing_extensions import Unpack


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    out_dtype: Any | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    **options: Unpack[Options],
) -> Any:
    """`flashcore.attention` under jit, grad, vmap, scan, checkpoint, shard_map; on sharded arrays.

    Arrays are operands: q, k, v, bias, mask, sinks, alibi_slopes, lengths, the lists of a block
    mask, and q_offset and rng where they are arrays. Everything else is part of the compiled
    program, so under jit it is static.

    Parameters
    ----------
    q, k, v : array
        As for `flashcore.attention`: JAX arrays, traced or not, or NumPy arrays that JAX takes over
        as they are.
    rng : key, (int, int), int64 array (2,) or uint32 array (4,)
        For dropout, required when dropout_p > 0. A key of jax.random: its bits become seed and
        offset. Two integers, or an array of their bits: as for `flashcore.attention`.
    out_dtype, return_lse, return_max_logits, **options
        As for `flashcore.attention`, without out= and stream=: results are new arrays, on the
        stream that XLA chooses.

    Returns
    -------
    array or flashcore.Result
        As `flashcore.attention`. Gradients flow to q, k, v, bias and sinks, through out and lse;
        max_logits has none.

    Raises
    ------
    ArgumentError
        As `flashcore.attention`, while tracing. What depends on values, such as lengths out of
        range, is an error of the runtime, jax.errors.JaxRuntimeError, with the same text.
    UnsupportedError
        No compiled kernel takes the call on the platform that it is compiled for. Also gradients of
        alibi_slopes, gradients of gradients.

    Notes
    -----
    jax.vmap folds the mapped dimension into the batch; calls with dropout, packed sequences or
    sinks of each call are made one by one. Arrays sharded over batch or heads stay where they are:
    no communication, but for the sums that gradients of shared inputs need.

    Examples
    --------
    >>> loss = lambda q, k, v: flashcore.jax.attention(q, k, v, causal=True).sum()
    >>> dq, dk, dv = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    """
    with_lse = arguments.flag("attention", "return_lse", return_lse)
    with_max = arguments.flag("attention", "return_max_logits", return_max_logits)
    results = ("out", *("lse",) * with_lse, *("max_logits",) * with_max)
    given: dict[str, Any] = options  # type: ignore[assignment]
    spec, operands = arguments.read("attention", q, k, v, given, results, out_dtype)
    found = dict(zip(results, _run(spec, operands)))
    if not with_lse and not with_max:
        return found["out"]
    return fc.Result(found["out"], found.get("lse"), found.get("max_logits"))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run(spec: Spec, operands: list[Any]) -> list[Any]:
    primitives.check(spec, operands)
    results: list[Any] = autodiff.attention(spec, _varying_alike(operands))
    return [
        jax.lax.stop_gradient(x) if name == "max_logits" else x
        for name, x in zip(spec.results, results)
    ]


def _varying_alike(operands: list[Any]) -> list[Any]:
    """Inside of jax.shard_map: what is the same on some devices is marked as if it were not. The
    gradient of that is a sum over the devices, which is what such an operand needs."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    every = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(every - own)), to="varying") if every - own else x
        for x, own in zip(operands, varying)
    ]


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    direction: str = "forward",
    platform: str | None = None,
    **options: Any,
) -> fc.Plan:
    """`flashcore.explain` for shapes: arrays, traced values or jax.ShapeDtypeStruct.

    Parameters
    ----------
    q, k, v : array or jax.ShapeDtypeStruct
    direction : "forward" or "backward"
    platform : "cpu", "cuda" or "gpu", optional
        Default: where q is, else jax.default_backend().
    **options
        The options of `attention`; arrays may be jax.ShapeDtypeStruct here too.

    Returns
    -------
    flashcore.Plan
        kernel is None if no kernel of the platform takes the call; refusals says why.

    Raises
    ------
    ArgumentError
        As `attention`.
    """
    if direction not in ("forward", "backward"):
        raise ArgumentError(
            f"[explain] direction must be 'forward' or 'backward', got {direction!r}"
        )
    kind, device_id = _device(q, platform)
    for name in ("return_lse", "return_max_logits"):
        options.pop(name, None)
    out_dtype = options.pop("out_dtype", None)
    spec, operands = arguments.read("explain", q, k, v, options, ("out",), out_dtype)
    return plan_of(
        _core.xla_explain(
            direction == "backward",
            kind,
            device_id,
            primitives.described(spec, operands),
            dict(spec.attributes),
        )
    )


def _device(q: Any, platform: str | None) -> tuple[str, int]:
    device_id = 0
    if platform is None:
        platform = jax.default_backend()
        if isinstance(q, jax.Array) and not isinstance(q, jax.core.Tracer):
            device = min(q.devices(), key=lambda d: d.id)
            platform, device_id = device.platform, device.local_hardware_id or 0
    kind = "cuda" if platform == "gpu" else platform
    if kind not in ("cpu", "cuda"):
        raise ArgumentError(f"[explain] platform must be 'cpu', 'cuda' or 'gpu', got {platform!r}")
    return kind, device_id if kind == "cuda" else 0
