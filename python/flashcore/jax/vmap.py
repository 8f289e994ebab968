"""jax.vmap of attention: the mapped dimension becomes part of the batch.

Where that would change the result (dropout bits depend on the batch index) or cannot be said
(packed sequences, sinks of each call), the calls are made one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from flashcore.jax.sharding import divided
from flashcore.jax.spec import Spec

_BROADCAST = ("bias", "mask", "kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")


@functools.cache
def mappable(spec: Spec) -> Callable[..., list[Any]]:
    """The call of a spec on arrays that jax.vmap may map."""
    function = custom_vmap(divided(spec))
    function.def_vmap(functools.partial(_rule, spec))
    return function


def _rule(
    spec: Spec, n: int, mapped: Sequence[bool], *operands: Any
) -> tuple[list[Any], list[bool]]:
    one_by_one = (
        spec.packed
        or spec.drops
        or "dsinks" in spec.results
        or any(m and name == "sinks" for name, m in zip(spec.operands, mapped))
    )
    results = (_one_by_one if one_by_one else _folded)(spec, n, mapped, operands)
    return results, [True] * len(results)


def _one_by_one(spec: Spec, n: int, mapped: Sequence[bool], operands: Sequence[Any]) -> list[Any]:
    def call(own: list[Any]) -> list[Any]:
        rest = iter(own)
        return mappable(spec)(*(next(rest) if m else x for x, m in zip(operands, mapped)))

    results: list[Any] = jax.lax.map(call, [x for x, m in zip(operands, mapped) if m])
    return results


def _is_shared(spec: Spec, name: str, x: Any) -> bool:
    """Whether one operand can serve all calls: it says nothing of the batch."""
    if name in ("sinks", "alibi_slopes"):
        return x.ndim == 1
    own = name == "bias" and "dbias" in spec.results  # each call has a dbias
    return name in _BROADCAST and x.shape[0] == 1 and not own


def _folded(spec: Spec, n: int, mapped: Sequence[bool], operands: Sequence[Any]) -> list[Any]:
    batch = operands[0].shape[1 if mapped[0] else 0]

    def fold(name: str, x: Any, is_mapped: bool) -> Any:
        """(n * batch, ...); what is the same for all calls and batches stays as it is."""
        if not is_mapped and _is_shared(spec, name, x):
            return x
        apart = x if is_mapped else x[None]
        if name == "alibi_slopes" and apart.ndim == 2:
            apart = apart[:, None]  # (heads) of each call
        rest = apart.shape[2:]
        return jnp.broadcast_to(apart, (n, batch, *rest)).reshape(n * batch, *rest)

    results = mappable(spec)(
        *(fold(name, x, m) for name, x, m in zip(spec.operands, operands, mapped))
    )
    apart = [x.reshape(n, batch, *x.shape[1:]) for x in results]
    if "dbias" in spec.results:
        at = spec.operands.index("bias")
        if operands[at].shape[1 if mapped[at] else 0] != batch:  # broadcast over the batch
            where = spec.results.index("dbias")
            apart[where] = apart[where].sum(1, keepdims=True)
    return apart
