"""Arrays that are divided over devices: each device computes the batches and heads that it has.

Shardy asks for a rule (which dimensions go together) and then for the call on one device. Batch
and heads may be divided; lengths and head_dim may not. Query heads are groups times repeats (g, r):
g may be divided in everything, and where each device has one g, r may be divided in q while k and v
are repeated. Dropout bits depend on the index of batch and head, so a call that drops is not
divided.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flashcore.jax import primitives
from flashcore.jax.spec import Spec

Dim = tuple[str, ...]  # factors, the first varies slowest: ("b",), ("g", "r"), ("s",)

_ROWS = {  # tensors of vectors: is it of queries, and which head_dim
    "q": (True, "d"),
    "dq": (True, "d"),
    "out": (True, "e"),
    "dout": (True, "e"),
    "k": (False, "d"),
    "dk": (False, "d"),
    "v": (False, "e"),
    "dv": (False, "e"),
}
_SCORES = ("bias", "mask", "dbias")
_PER_BATCH = ("seqlens_q", "seqlens_k", "q_offset_tensor")


@functools.cache
def divided(spec: Spec) -> Callable[..., list[Any]]:
    """The call for arrays that may be divided over devices."""

    def call(*operands: Any) -> list[Any]:
        return primitives.bind(spec, *operands)

    call.__name__ = f"flashcore_{spec.call}"
    function = custom_partitioning(call)
    function.def_partition(
        partition=functools.partial(_partition, spec),
        sharding_rule=functools.partial(_rule, spec),
    )
    return function


# ---- which dimensions go together ----------------------------------------------------------------


class _Factors:
    """The dimensions of each tensor of a call, as factors."""

    def __init__(self, spec: Spec, shapes: dict[str, Sequence[int]]) -> None:
        self.spec, self.shapes = spec, shapes
        head = 1 if spec.packed or spec.bhsd else 2
        self.heads, self.groups = shapes["q"][head], shapes["k"][head]
        self.repeats = self.heads // self.groups
        self.head: Dim = ("g", "r") if self.repeats > 1 else ("g",)
        self.batch: Dim = () if spec.packed else ("b",)
        self.free = 0

    def alone(self) -> Dim:
        """A dimension that goes with no other."""
        self.free += 1
        return (f"x{self.free}",)

    def of(self, name: str) -> list[Dim]:
        rank, head = len(self.shapes[name]), self.head
        batch = [self.batch] if self.batch else []
        if name in _ROWS:
            is_query, last = _ROWS[name]
            middle: list[Dim] = [("s",) if is_query else ("t",), head if is_query else ("g",)]
            if self.spec.bhsd:
                middle.reverse()
            return [*batch, *middle, (last,)]
        if name in ("lse", "dlse", "max_logits"):
            return [*batch, head, ("s",)]
        # The rest may have a batch, of padded or packed sequences, and heads; or 1 for all of them.
        lead: list[Dim] = []
        if name in _PER_BATCH:
            lead = [self.batch]
        elif name in ("sinks", "dsinks", "alibi_slopes"):
            lead = [self.batch, head][-rank:]
        elif name in _SCORES or name.endswith(("_num_blocks", "_indices")):
            lead = [self.batch, head]
        dims = zip(self.shapes[name], lead + [()] * (rank - len(lead)))
        return [dim if dim and size > 1 else self.alone() for size, dim in dims]

    def summed(self, name: str) -> Dim:
        """The factors over which a gradient is a sum, whose parts other devices may have."""
        if name in ("dk", "dv"):
            return ("r",)
        if name == "dsinks":
            return ("b",)
        if name == "dbias":
            batch, heads = (size == 1 for size in self.shapes["bias"][:2])
            return ("b",) * batch + ("g", "r") * heads
        return ()


def _rule(spec: Spec, mesh: Any, operand_types: Any, result_types: Any) -> tuple[str, Any]:
    shapes = spec.named(x.shape for x in operand_types)
    shapes |= dict(zip(spec.results, (x.shape for x in result_types)))
    factors = _Factors(spec, shapes)
    # An axis of the mesh that does not divide the key heads would be divided itself, between g and
    # r, and JAX has no words for a part of an axis: then query and key heads do not go together.
    indivisible = mesh.empty or any(factors.groups % n for n in mesh.shape.values())
    if factors.repeats > 1 and (factors.groups == 1 or indivisible):
        factors.head = ("h",)
    operands = [factors.of(name) for name in spec.operands]
    results = [factors.of(name) for name in spec.results]

    def text(tensors: list[list[Dim]]) -> str:
        return ", ".join(
            " ".join(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims)
            for dims in tensors
        )

    every = dict.fromkeys(f for dims in (*operands, *results) for dim in dims for f in dim)
    whole = () if spec.drops else ("b", "g", "r", "h")
    options: dict[str, Any] = {
        "need_replication_factors": tuple(f for f in every if f not in whole)
    }
    if "r" in every:
        options["r"] = factors.repeats  # a size that no dimension shows by itself
    return f"{text(operands)} -> {text(results)}", options


# ---- one device ----------------------------------------------------------------------------------


def _partition(spec: Spec, mesh: Mesh, operands: Any, results: Any) -> tuple[Any, ...]:
    shapes = spec.named(tuple(x.shape) for x in operands)
    shapes |= dict(zip(spec.results, (tuple(x.shape) for x in results)))
    factors = _Factors(spec, shapes)
    axes: dict[str, tuple[str, ...]] = {}
    sharding = operands[0].sharding
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        if not spec.drops:
            axes = _divide(factors, mesh, sharding.spec)
    elif mesh.empty:  # what XLA came up with has no axes: every device computes everything
        mesh = Mesh(np.array(sorted(sharding.device_set, key=lambda d: d.id)), ("devices",))

    def placed(name: str) -> NamedSharding:
        dims = (sum((axes.get(f, ()) for f in dim), ()) for dim in factors.of(name))
        return NamedSharding(mesh, PartitionSpec(*(dim or None for dim in dims)))

    def call(*local: Any) -> list[Any]:
        computed = primitives.bind(spec, *local)
        return [_summed(factors, axes, name, x) for name, x in zip(spec.results, computed)]

    return (
        mesh,
        call,
        [placed(name) for name in spec.results],
        tuple(placed(name) for name in spec.operands),
    )


def _divide(factors: _Factors, mesh: Mesh, spec: PartitionSpec) -> dict[str, tuple[str, ...]]:
    """The axes of the mesh that divide each factor: those of q, where every device gets as much."""
    dims = [(x,) if isinstance(x, str) else x or () for x in spec]
    dims += [()] * (len(factors.shapes["q"]) - len(dims))
    of = dict(zip(factors.of("q"), dims))

    def size(names: Sequence[str]) -> int:
        return math.prod(mesh.shape[name] for name in names)

    axes: dict[str, tuple[str, ...]] = {}
    if factors.batch and factors.shapes["q"][0] % size(of[factors.batch]) == 0:
        axes["b"] = of[factors.batch]
    axes["g"] = axes["r"] = ()
    for name in of[factors.head]:
        if not axes["r"] and factors.groups % size((*axes["g"], name)) == 0:
            axes["g"] += (name,)
        elif size(axes["g"]) == factors.groups and factors.repeats % size((*axes["r"], name)) == 0:
            axes["r"] += (name,)
        else:
            axes["g"] = axes["r"] = ()
            break
    return axes


def _summed(factors: _Factors, axes: dict[str, tuple[str, ...]], name: str, x: Any) -> Any:
    names = sum((axes.get(f, ()) for f in factors.summed(name)), ())
    return jax.lax.psum(x, names) if names else x
