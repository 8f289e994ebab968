"""Which blocks each constructor of BlockMask keeps.

Every function checks its arguments and returns (kept, block, shape): kept is a boolean array whose
last two dimensions are query and key blocks, after batch and heads where there are any.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from flashcore._arguments import block_size, integer, lengths, numpy_array, pair, seqlens
from flashcore.errors import ArgumentError

Pattern = tuple[Any, tuple[int, int], tuple[int, int]]


def dense(m: Any, block: tuple[int, int], keep_partial: bool) -> Pattern:
    import numpy as np

    block = block_size("BlockMask.from_dense", block)
    m = numpy_array("BlockMask.from_dense", "m", m)
    if m.dtype != np.bool_ or m.ndim not in (2, 3, 4):
        raise ArgumentError(
            "[BlockMask.from_dense] "
            "m must be a boolean array (seqlen_q, seqlen_k), optionally with heads and batch "
            f"in front, got {m.dtype} {m.shape}"
        )
    m = m.reshape((1,) * (4 - m.ndim) + m.shape)
    rows = np.arange(0, m.shape[2], block[0])
    cols = np.arange(0, m.shape[3], block[1])
    visible = np.add.reduceat(m, rows, axis=2, dtype=np.int64) if len(rows) else m[:, :, :0]
    visible = np.add.reduceat(visible, cols, axis=3) if len(cols) else visible[..., :0]
    height = np.minimum(block[0], m.shape[2] - rows)
    width = np.minimum(block[1], m.shape[3] - cols)
    kept = visible > 0
    _refuse_mixed(
        kept & (visible < height[:, None] * width),
        "BlockMask.from_dense",
        "m",
        block,
        keep_partial,
    )
    return kept, block, (m.shape[2], m.shape[3])


def bsr(indptr: Any, indices: Any, shape: tuple[int, int], block: tuple[int, int]) -> Pattern:
    import numpy as np

    block = block_size("BlockMask.from_bsr", block)
    shape = seqlens("BlockMask.from_bsr", shape)
    q_blocks, kv_blocks = block_counts(shape, block)
    indptr = numpy_array("BlockMask.from_bsr", "indptr", indptr)
    indices = numpy_array("BlockMask.from_bsr", "indices", indices)
    for name, array in (("indptr", indptr), ("indices", indices)):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ArgumentError(
                "[BlockMask.from_bsr] "
                f"{name} must be a 1-D integer array, got {array.dtype} {array.shape}"
            )
    if len(indptr) != q_blocks + 1:
        raise ArgumentError(
            "[BlockMask.from_bsr] "
            f"indptr must have {q_blocks + 1} entries for seqlen_q {shape[0]} in blocks of "
            f"{block[0]}, got {len(indptr)}"
        )
    counts = np.diff(indptr.astype(np.int64))
    if indptr[0] != 0 or indptr[-1] != len(indices) or (counts < 0).any():
        raise ArgumentError(
            "[BlockMask.from_bsr] "
            f"indptr must rise from 0 to len(indices) = {len(indices)}, got {indptr.tolist()}"
        )
    rows = np.repeat(np.arange(q_blocks), counts)
    columns = indices.astype(np.int64)
    outside = (columns < 0) | (columns >= kv_blocks)
    if outside.any():
        raise ArgumentError(
            "[BlockMask.from_bsr] "
            f"indices must be in 0..{kv_blocks - 1}, got {columns[outside][0]} in query block "
            f"{rows[outside][0]}"
        )
    wrong = (np.diff(columns) <= 0) & (np.diff(rows) == 0)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ArgumentError(
            "[BlockMask.from_bsr] "
            f"indices must ascend without repeats within a query block, got {columns[at]} then "
            f"{columns[at + 1]} in query block {rows[at]}"
        )
    kept = np.zeros((1, 1, q_blocks, kv_blocks), bool)
    kept[0, 0, rows, columns] = True
    return kept, block, shape


def intervals(
    start: Any, end: Any, seqlen_k: int, block: tuple[int, int], keep_partial: bool
) -> Pattern:
    import numpy as np

    block = block_size("BlockMask.from_intervals", block)
    seqlen_k = integer("BlockMask.from_intervals", "seqlen_k", seqlen_k)
    start = numpy_array("BlockMask.from_intervals", "start", start)
    end = numpy_array("BlockMask.from_intervals", "end", end)
    if start.shape != end.shape or start.ndim not in (1, 2, 3):
        raise ArgumentError(
            "[BlockMask.from_intervals] "
            "start and end must have one shape (seqlen_q,), optionally with heads and batch in "
            f"front, got {start.shape} and {end.shape}"
        )
    if start.size and not (start.dtype.kind in "iu" and end.dtype.kind in "iu"):
        raise ArgumentError(
            "[BlockMask.from_intervals] "
            f"start and end must be integers, got {start.dtype} and {end.dtype}"
        )
    shape = (start.shape[-1], seqlen_k)
    q_blocks, kv_blocks = block_counts(shape, block)
    lead = (1,) * (3 - start.ndim) + start.shape[:-1]
    flat = (lead[0] * lead[1], shape[0])
    low = start.astype(np.int64).reshape(flat)
    high = np.maximum(low, end.astype(np.int64).reshape(flat))
    if low.size and (low.min() < 0 or high.max() > seqlen_k):
        raise ArgumentError(
            "[BlockMask.from_intervals] "
            f"start and end must be within 0..{seqlen_k}, got {low.min()}..{high.max()}"
        )
    low, high = np.where(high > low, low, 0), np.where(high > low, high, 0)
    # How many rows of each query block touch, and wholly cover, each key block.
    lists = np.broadcast_to(np.arange(len(low))[:, None], low.shape)
    rows = np.broadcast_to(np.arange(shape[0]) // block[0], low.shape)
    whole = np.where(high == seqlen_k, kv_blocks, high // block[1])

    def spread(first: Any, last: Any) -> Any:
        steps = np.zeros((len(low), q_blocks, kv_blocks + 1), np.int32)
        np.add.at(steps, (lists, rows, first), 1)
        np.add.at(steps, (lists, rows, np.maximum(first, last)), -1)
        return np.cumsum(steps, axis=-1)[..., :-1]

    kept = spread(low // block[1], -(-high // block[1])) > 0
    covered = spread(np.minimum(-(-low // block[1]), kv_blocks), whole)
    height = np.minimum(block[0], shape[0] - np.arange(q_blocks) * block[0])
    mixed = kept & (covered < height[:, None])
    sizes = (*lead, q_blocks, kv_blocks)
    _refuse_mixed(
        mixed.reshape(sizes), "BlockMask.from_intervals", "the intervals", block, keep_partial
    )
    return kept.reshape(sizes), block, shape


def butterfly(
    seqlen_q: int,
    seqlen_k: int | None,
    block: tuple[int, int],
    factors: int | None,
    global_blocks: int,
) -> Pattern:
    import numpy as np

    call = "BlockMask.butterfly"
    shape = lengths(call, seqlen_q, seqlen_k)
    block = block_size(call, block)
    q_blocks, kv_blocks = block_counts(shape, block)
    n = max(q_blocks, kv_blocks, 1)
    every = max(n - 1, 0).bit_length()
    factors = every if factors is None else integer(call, "factors", factors)
    global_blocks = integer(call, "global_blocks", global_blocks)
    row = (np.arange(q_blocks) * n // max(q_blocks, 1))[:, None]
    column = np.arange(kv_blocks) * n // max(kv_blocks, 1)
    distance = row ^ column
    kept = (distance & (distance - 1)) == 0  # zero or one bit set
    kept &= distance < 1 << min(factors, every)
    return _with_global(kept, global_blocks), block, shape


def sliding(
    seqlen_q: int,
    seqlen_k: int | None,
    block: tuple[int, int],
    window_size: tuple[int | None, int | None],
    align: str,
    global_blocks: int,
) -> Pattern:
    import numpy as np

    call = "BlockMask.sliding"
    shape = lengths(call, seqlen_q, seqlen_k)
    block = block_size(call, block)
    global_blocks = integer(call, "global_blocks", global_blocks)
    if align not in ("bottom_right", "top_left"):
        raise ArgumentError(
            f"[BlockMask.sliding] align must be 'bottom_right' or 'top_left', got {align!r}"
        )
    left, right = (
        None if w is None or w == -1 else integer(call, f"window_size[{i}]", w)
        for i, w in enumerate(pair(call, "window_size", window_size))
    )
    q_blocks, kv_blocks = block_counts(shape, block)
    offset = shape[1] - shape[0] if align == "bottom_right" else 0
    first_row = np.arange(q_blocks)[:, None] * block[0]
    last_row = np.minimum(first_row + block[0], shape[0]) - 1
    first_key = np.arange(kv_blocks) * block[1]
    last_key = np.minimum(first_key + block[1], shape[1]) - 1
    kept = np.ones((q_blocks, kv_blocks), bool)
    if left is not None:
        kept &= last_key >= first_row + offset - left
    if right is not None:
        kept &= first_key <= last_row + offset + right
    return _with_global(kept, global_blocks), block, shape


def dilated(
    seqlen_q: int,
    seqlen_k: int | None,
    block: tuple[int, int],
    step: int,
    reach: int,
    global_blocks: int,
) -> Pattern:
    import numpy as np

    call = "BlockMask.dilated"
    shape = lengths(call, seqlen_q, seqlen_k)
    block = block_size(call, block)
    step, reach = integer(call, "step", step, 1), integer(call, "reach", reach)
    global_blocks = integer(call, "global_blocks", global_blocks)
    q_blocks, kv_blocks = block_counts(shape, block)
    n = max(q_blocks, kv_blocks, 1)
    row = (np.arange(q_blocks) * n // max(q_blocks, 1))[:, None]
    distance = np.abs(row - np.arange(kv_blocks) * n // max(kv_blocks, 1))
    kept = (distance % step == 0) & (distance <= step * reach)
    return _with_global(kept, global_blocks), block, shape


def strips(
    seqlen_q: int, seqlen_k: int | None, block: tuple[int, int], rows: int, columns: int
) -> Pattern:
    import numpy as np

    call = "BlockMask.strips"
    shape = lengths(call, seqlen_q, seqlen_k)
    block = block_size(call, block)
    kept = np.zeros(block_counts(shape, block), bool)
    kept[: integer(call, "rows", rows), :] = True
    kept[:, : integer(call, "columns", columns)] = True
    return kept, block, shape


def documents(cu_seqlens: Any, block: tuple[int, int], causal: bool, keep_partial: bool) -> Pattern:
    import numpy as np

    call = "BlockMask.from_documents"
    block = block_size(call, block)
    cu = numpy_array(call, "cu_seqlens", cu_seqlens)
    if cu.ndim != 1 or cu.dtype.kind not in "iu" or len(cu) < 1:
        raise ArgumentError(
            f"[{call}] cu_seqlens must be a 1-D integer array, got {cu.dtype} {cu.shape}"
        )
    cu = cu.astype(np.int64)
    if cu[0] != 0 or (np.diff(cu) < 0).any():
        raise ArgumentError(f"[{call}] cu_seqlens must rise from 0, got {cu.tolist()}")
    length = int(cu[-1])
    lengths_of = np.diff(cu)
    start, end = np.repeat(cu[:-1], lengths_of), np.repeat(cu[1:], lengths_of)
    kept, block, shape = intervals(start, end, length, block, True)
    if not keep_partial and length:
        inside = [int(x) for x in cu[1:-1] if x % block[0] or x % block[1]]
        if inside:
            raise ArgumentError(
                f"[{call}] a document ends at {inside[0]}, inside a block of {block}: use smaller "
                "blocks, or keep_partial=True and say the rest with mask="
            )
    if causal:
        last_row = np.arange(1, kept.shape[-2] + 1) * block[0] - 1
        kept &= np.arange(kept.shape[-1]) * block[1] <= last_row[:, None]
    return kept, block, shape


def reblocked(
    kept: Any, old: tuple[int, int], shape: tuple[int, int], new: Any, keep_partial: bool
) -> Pattern:
    call = "BlockMask.reblocked"
    new = block_size(call, new)
    unit = gcd(old[0], new[0]), gcd(old[1], new[1])
    units = block_counts(shape, unit)
    fine = kept.repeat(old[0] // unit[0], 2).repeat(old[1] // unit[1], 3)
    sizes = (new[0] // unit[0], new[1] // unit[1])
    try:
        coarse, *_ = dense(fine[:, :, : units[0], : units[1]], sizes, keep_partial)
    except ArgumentError:
        raise ArgumentError(
            f"[{call}] some blocks of {new} would be kept in part: use smaller ones, or "
            "keep_partial=True and say the rest with mask=, causal= or window_size="
        ) from None
    return coarse, new, shape


def block_counts(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _with_global(kept: Any, global_blocks: int) -> Any:
    kept[:global_blocks, :] = True
    kept[:, :global_blocks] = True
    return kept


def _refuse_mixed(
    mixed: Any, call: str, what: str, block: tuple[int, int], keep_partial: bool
) -> None:
    import numpy as np

    if keep_partial or not mixed.any():
        return
    at = tuple(int(i) for i in np.argwhere(mixed)[0])
    raise ArgumentError(
        f"[{call}] "
        f"{what} would keep only a part of block {at} (batch, head, query block, key block), but a "
        f"block is kept or excluded whole: use smaller blocks than {block}, or keep_partial=True "
        "and say the rest with mask=, causal= or window_size="
    )
