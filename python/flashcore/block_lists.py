"""From kept blocks to the lists of a BlockMask, and back, by whichever framework holds them.

On a GPU nothing waits for the device: every list has room for all blocks, since how many are kept
is not known on the host.
"""

from __future__ import annotations

import sys
from typing import Any


def framework(x: Any) -> str:
    """The package that x's type is of."""
    return type(x).__module__.partition(".")[0]


def lists_of(kept: Any) -> tuple[Any, Any]:
    """Counts and ascending indices, both int32, of the True entries along the last axis."""
    name = framework(kept)
    if name == "torch":
        return _of_torch(sys.modules["torch"], kept)
    if name == "cupy":
        return _of_array_module(sys.modules["cupy"], kept)
    if name in ("jax", "jaxlib"):
        return _of_array_module(sys.modules["jax"].numpy, kept)
    return _of_numpy(kept)


def kept_of(count: Any, indices: Any, blocks: int) -> Any:
    """The inverse: bool (..., blocks). For torch tensors where they are, else through NumPy."""
    if framework(count) == "torch":
        torch = sys.modules["torch"]
        listed = torch.arange(indices.shape[-1], device=count.device) < count[..., None]
        # What is not listed is sent to one column too many.
        column = torch.where(listed, indices, blocks).long()
        kept = torch.zeros((*count.shape, blocks + 1), dtype=torch.bool, device=count.device)
        return kept.scatter_(-1, column, True)[..., :blocks]
    import numpy as np

    count, indices = np.asarray(count), np.asarray(indices)
    kept = np.zeros((*count.shape, blocks), bool)
    listed = np.arange(indices.shape[-1]) < count[..., None]
    *where, _ = np.nonzero(listed)
    kept[(*where, indices[listed])] = True
    return kept


def _of_torch(torch: Any, kept: Any) -> tuple[Any, Any]:
    order = torch.argsort((~kept).to(torch.uint8), dim=-1, stable=True)
    return kept.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _of_array_module(xp: Any, kept: Any) -> tuple[Any, Any]:
    order = xp.argsort((~kept).astype("uint8"), axis=-1)  # stable in both
    return kept.sum(-1).astype("int32"), order.astype("int32")


def _of_numpy(kept: Any) -> tuple[Any, Any]:
    import numpy as np

    count = kept.sum(-1, dtype=np.int32)
    capacity = max(int(count.max(initial=0)), 1)
    indices = np.zeros((*count.shape, capacity), np.int32)
    position = np.cumsum(kept, axis=-1) - 1
    *where, column = np.nonzero(kept)
    indices[(*where, position[kept])] = column
    return count, indices
