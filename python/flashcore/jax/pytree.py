"""BlockMask as a pytree, so that it can be an argument of jit, vmap, scan and the like."""

from __future__ import annotations

from typing import Any

import jax

from flashcore.block_mask import BlockMask

LISTS = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")


def _flatten(mask: BlockMask) -> tuple[tuple[Any, ...], Any]:
    return tuple(getattr(mask, name) for name in LISTS), (
        mask.block,
        mask.shape,
        mask.lengths,
    )


def _unflatten(sizes: Any, lists: Any) -> BlockMask:
    # Not through the constructor: JAX puts other things than arrays in the place of leaves.
    mask = object.__new__(BlockMask)
    for name, x in zip(LISTS, lists):
        setattr(mask, name, x)
    mask.block, mask.shape, mask.lengths = sizes
    return mask


def register() -> None:
    jax.tree_util.register_pytree_node(BlockMask, _flatten, _unflatten)
