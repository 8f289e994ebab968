"""The two primitives that XLA runs: shapes, and lowering to the custom calls of the extension.

A primitive here is one call on one device. Batching (vmap.py), division over devices (sharding.py)
and gradients (autodiff.py) are around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import PartitionSpec

from flashcore import _core
from flashcore.errors import ArgumentError, UnsupportedError
from flashcore.jax.spec import BACKWARD, FORWARD, Spec, result_dtype, result_like, result_shape

_ALIGNMENT = 256  # of the workspace; XLA aligns what it gives by less


def described(spec: Spec, operands: Sequence[Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """What the planner asks of arrays: (name, dtype, shape)."""
    return [(name, x.dtype.name, tuple(x.shape)) for name, x in zip(spec.operands, operands)]


def check(spec: Spec, operands: Sequence[Any]) -> None:
    """Every check of the core that needs no values, as an error while tracing.

    The CPU's kernels take every call, so what is refused here is refused everywhere.
    """
    attributes = dict(spec.attributes)
    try:
        _core.xla_workspace(spec.backward, "cpu", 0, described(spec, operands), attributes)
    except ArgumentError as error:
        sized = {"bias", "mask", "kv_indices"}.intersection(spec.operands)
        if spec.packed and sized and not {"max_seqlen_q", "max_seqlen_k"} <= attributes.keys():
            raise ArgumentError(
                f"{error}. While tracing, the longest sequence is known from max_seqlen_q and "
                "max_seqlen_k alone: pass them"
            ) from None
        raise


def bind(spec: Spec, *operands: Any) -> list[Any]:
    primitive = _BACKWARD if spec.backward else _FORWARD
    results: list[Any] = primitive.bind(*operands, spec=spec)
    return results


def _abstract(*avals: Any, spec: Spec) -> list[Any]:
    by_name = spec.named(avals)
    shapes = {name: aval.shape for name, aval in by_name.items()}
    dtype = by_name["q"].dtype.name

    def result(name: str) -> Any:
        source, dims = result_like(spec, name)
        like = by_name[source]  # decides over which axes of a mesh it varies
        parts = like.sharding.spec
        sharding = like.sharding.update(spec=PartitionSpec(*(parts[d] for d in dims)))
        return like.update(
            shape=result_shape(spec, name, shapes),
            dtype=jax.numpy.dtype(result_dtype(spec, name, dtype)),
            weak_type=False,
            sharding=sharding,
        )

    return [result(name) for name in spec.results]


def _lower(platform: str) -> Any:
    def lower(context: Any, *operands: Any, spec: Spec) -> Any:
        attributes = dict(spec.attributes)
        if platform == "cpu":  # the workspace is for this many threads
            attributes["num_threads"] = _core.get_num_threads()
        tensors = described(spec, context.avals_in)
        tensors += zip(
            spec.results,
            (x.dtype.name for x in context.avals_out),
            (tuple(x.shape) for x in context.avals_out),
        )
        workspace = _core.xla_workspace(spec.backward, platform, 0, tensors, attributes)
        avals_out = list(context.avals_out)
        if workspace:
            attributes["workspace"] = len(avals_out)
            avals_out.append(jax.core.ShapedArray((workspace + _ALIGNMENT,), np.dtype(np.uint8)))
        for names in (spec.operands, spec.results):
            attributes |= {name: i for i, name in enumerate(names) if not _fixed(spec, name)}
        target = "flashcore_attention_backward" if spec.backward else "flashcore_attention"
        rule = jax.ffi.ffi_lowering(target)
        results = rule(
            context.replace(avals_out=avals_out),
            *operands,
            **{name: _typed(x) for name, x in attributes.items()},
        )
        return results[: len(spec.results)]

    return lower


def _fixed(spec: Spec, name: str) -> bool:
    """Whether its place in the custom call is always the same: cpp/bindings/xla_call.cpp."""
    if spec.backward:
        return name in BACKWARD or name in ("dq", "dk", "dv")
    return name in FORWARD or name == "out"


def _typed(x: int | float) -> Any:
    return np.float64(x) if isinstance(x, float) else np.int64(x)


def _refuse(context: Any, *operands: Any, spec: Spec) -> Any:
    platforms = ", ".join(context.module_context.platforms)
    raise UnsupportedError(
        f"[{spec.call}] is lowered for {platforms}, but there are kernels for cpu and cuda alone: "
        "jax.nn.dot_product_attention runs everywhere"
    )


def _primitive(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(_abstract)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="spec"))
    mlir.register_lowering(primitive, _refuse)
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(primitive, _lower(platform), platform=platform)
    return primitive


_FORWARD = _primitive("flashcore_attention")
_BACKWARD = _primitive("flashcore_attention_backward")
