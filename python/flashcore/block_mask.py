"""Block-sparse attention: which (query block, key block) pairs are kept."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashcore.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bools = NDArray[np.bool_]

__all__ = ["BlockMask"]

_PICTURE = 48  # most rows and columns that str() draws


class BlockMask:
    """The block pairs that attention computes; every other pair is excluded.

    A block is kept or excluded whole. A mask combines with causal, window_size, mask and lengths: a
    key is visible when all of them let it be, so a finer pattern is a block mask plus one of those.
    Time is proportional to the kept blocks.

    Make one with `from_dense`, `from_bsr`, `from_intervals`, `butterfly` or `sliding`, or from the
    four lists directly.

    Parameters
    ----------
    kv_num_blocks : int32 array (B, H, q_blocks)
        How many key blocks each query block keeps. B and H may be 1: the same for all.
    kv_indices : int32 array (B, H, q_blocks, capacity)
        Which, ascending; entries past the count are ignored.
    q_num_blocks, q_indices : int32 arrays (B, H, kv_blocks) and (B, H, kv_blocks, capacity)
        The transpose: the query blocks of each key block. The backward pass reads it.
    block : (int, int)
        Rows and keys in a block.
    shape : (int, int), optional
        seqlen_q and seqlen_k, for `to_dense`; default: whole blocks.

    Raises
    ------
    ArgumentError
        Shapes that do not belong together. The lists themselves are checked by each call.

    Notes
    -----
    The arrays may be of any framework; they must be on the device of q. The constructors give NumPy
    arrays; `map` moves them. Field names follow PyTorch's FlexAttention.
    """

    __slots__ = ("block", "kv_indices", "kv_num_blocks", "q_indices", "q_num_blocks", "shape")

    def __init__(
        self,
        kv_num_blocks: Any,
        kv_indices: Any,
        q_num_blocks: Any,
        q_indices: Any,
        block: tuple[int, int],
        shape: tuple[int, int] | None = None,
    ) -> None:
        self.kv_num_blocks, self.kv_indices = kv_num_blocks, kv_indices
        self.q_num_blocks, self.q_indices = q_num_blocks, q_indices
        self.block = _block("BlockMask", block)
        lists = {"kv": (kv_num_blocks, kv_indices), "q": (q_num_blocks, q_indices)}
        for name, (count, indices) in lists.items():
            for field, array in ((f"{name}_num_blocks", count), (f"{name}_indices", indices)):
                _check_integers("BlockMask", field, array)
            if len(count.shape) != 3 or tuple(indices.shape[:-1]) != tuple(count.shape):
                raise ArgumentError(
                    "[BlockMask] "
                    f"{name}_num_blocks must be (B, H, blocks) and {name}_indices (B, H, blocks, "
                    f"capacity), got {tuple(count.shape)} and {tuple(indices.shape)}"
                )
        if tuple(kv_num_blocks.shape[:2]) != tuple(q_num_blocks.shape[:2]):
            raise ArgumentError(
                "[BlockMask] kv_num_blocks and q_num_blocks must have one batch and head size, got "
                f"{tuple(kv_num_blocks.shape)} and {tuple(q_num_blocks.shape)}"
            )
        blocks = (int(kv_num_blocks.shape[2]), int(q_num_blocks.shape[2]))
        whole = (blocks[0] * self.block[0], blocks[1] * self.block[1])
        self.shape = whole if shape is None else _shape("BlockMask", shape)
        if _blocks(self.shape, self.block) != blocks:
            raise ArgumentError(
                f"[BlockMask] shape {self.shape} has {_blocks(self.shape, self.block)} blocks of "
                f"{self.block}, but the lists have {blocks}"
            )

    # ---- constructors ----------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls, m: Any, block: tuple[int, int] = (128, 128), *, keep_partial: bool = False
    ) -> BlockMask:
        """The blocks of a dense mask over single positions.

        Parameters
        ----------
        m : bool array (seqlen_q, seqlen_k), (H, seqlen_q, seqlen_k) or (B, H, seqlen_q, seqlen_k)
            True = visible. Anything that NumPy can read. B and H may be 1.
        block : (int, int)
            Rows and keys in a block. Blocks at the end may be shorter.
        keep_partial : bool
            A block with both True and False inside cannot be expressed. False: refused. True: kept
            whole; pass mask=m as well, and the result is that of m exactly.

        Raises
        ------
        ArgumentError
            m is not boolean or has another rank, or a block is mixed and keep_partial is False.
        """
        import numpy as np

        block = _block("BlockMask.from_dense", block)
        m = _array("BlockMask.from_dense", "m", m)
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
        return cls._from_kept(kept, block, (m.shape[2], m.shape[3]))

    @classmethod
    def from_bsr(
        cls,
        indptr: Any,
        indices: Any,
        shape: tuple[int, int],
        block: tuple[int, int] = (128, 128),
    ) -> BlockMask:
        """The blocks of a block-compressed-row matrix, as SciPy's bsr_array stores it.

        Parameters
        ----------
        indptr : int array (q_blocks + 1,)
            Query block r keeps the key blocks indices[indptr[r]:indptr[r + 1]].
        indices : int array (number of kept blocks,)
            Ascending within each query block.
        shape : (int, int)
            seqlen_q, seqlen_k.
        block : (int, int)
            Rows and keys in a block.

        Raises
        ------
        ArgumentError
            indptr does not fit shape or decreases; indices are outside, unsorted or repeated.
        """
        import numpy as np

        block = _block("BlockMask.from_bsr", block)
        shape = _shape("BlockMask.from_bsr", shape)
        q_blocks, kv_blocks = _blocks(shape, block)
        indptr = _array("BlockMask.from_bsr", "indptr", indptr)
        indices = _array("BlockMask.from_bsr", "indices", indices)
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
        return cls._from_kept(kept, block, shape)

    @classmethod
    def from_intervals(
        cls,
        start: Any,
        end: Any,
        seqlen_k: int,
        block: tuple[int, int] = (128, 128),
        *,
        keep_partial: bool = False,
    ) -> BlockMask:
        """One interval of visible keys per query row: row i sees the keys start[i] <= j < end[i].

        The form in which document masks, prefix masks and chunked windows are usually known. No
        array of seqlen_q x seqlen_k is built. An interval that is the same for all rows of a query
        block and ends on block boundaries is exact; others need keep_partial.

        Parameters
        ----------
        start, end : int arrays (seqlen_q,), (H, seqlen_q) or (B, H, seqlen_q)
            Keys, within 0..seqlen_k. end <= start: the row sees nothing.
        seqlen_k : int
            Number of keys.
        block : (int, int)
            Rows and keys in a block.
        keep_partial : bool
            Some rows may see a block only in part. False: refused. True: such a block is kept
            whole, so its rows see more than their interval unless mask=, causal= or window_size=
            says the rest.

        Raises
        ------
        ArgumentError
            Wrong shapes or values, or a partly visible block and keep_partial is False.
        """
        import numpy as np

        block = _block("BlockMask.from_intervals", block)
        seqlen_k = _integer("BlockMask.from_intervals", "seqlen_k", seqlen_k)
        start = _array("BlockMask.from_intervals", "start", start)
        end = _array("BlockMask.from_intervals", "end", end)
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
        q_blocks, kv_blocks = _blocks(shape, block)
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
        return cls._from_kept(kept.reshape(sizes), block, shape)

    @classmethod
    def butterfly(
        cls,
        seqlen_q: int,
        seqlen_k: int | None = None,
        block: tuple[int, int] = (128, 128),
        *,
        factors: int | None = None,
        global_blocks: int = 0,
    ) -> BlockMask:
        """The flat block butterfly: block i keeps blocks i and i XOR 2^f for f < factors.

        A fixed pattern of about log2(blocks) + 1 blocks per row through which any two positions are
        connected in log2(blocks) layers [1]_.

        Parameters
        ----------
        seqlen_q, seqlen_k : int
            Lengths; seqlen_k defaults to seqlen_q. Where they differ the pattern is stretched.
        block : (int, int)
            Rows and keys in a block.
        factors : int, optional
            How many butterfly factors; default: all.
        global_blocks : int
            The first so many blocks see, and are seen by, everything.

        References
        ----------
        .. [1] Dao et al., "Pixelated Butterfly: Simple and Efficient Sparse training for Neural
           Network Models", ICLR 2022, https://arxiv.org/abs/2112.00029
        """
        import numpy as np

        call = "BlockMask.butterfly"
        shape = _lengths(call, seqlen_q, seqlen_k)
        block = _block(call, block)
        q_blocks, kv_blocks = _blocks(shape, block)
        n = max(q_blocks, kv_blocks, 1)
        every = max(n - 1, 0).bit_length()
        factors = every if factors is None else _integer(call, "factors", factors)
        global_blocks = _integer(call, "global_blocks", global_blocks)
        row = (np.arange(q_blocks) * n // max(q_blocks, 1))[:, None]
        column = np.arange(kv_blocks) * n // max(kv_blocks, 1)
        distance = row ^ column
        kept = (distance & (distance - 1)) == 0  # zero or one bit set
        kept &= distance < 1 << min(factors, every)
        return cls._from_kept(_with_global(kept, global_blocks), block, shape)

    @classmethod
    def sliding(
        cls,
        seqlen_q: int,
        seqlen_k: int | None = None,
        block: tuple[int, int] = (128, 128),
        *,
        window_size: tuple[int | None, int | None],
        align: str = "bottom_right",
        global_blocks: int = 0,
    ) -> BlockMask:
        """Every block that a sliding window touches, kept whole, and optional global blocks.

        Pass the same window_size to `attention` too for a window of exact width; for that alone, no
        block mask is needed.

        Parameters
        ----------
        seqlen_q, seqlen_k : int
            Lengths; seqlen_k defaults to seqlen_q.
        block : (int, int)
            Rows and keys in a block.
        window_size : (int or None, int or None)
            Keys to the left and right of the one that a row faces, inclusive; None or -1 is open.
        align : "bottom_right" or "top_left"
            Which key row 0 faces: seqlen_k - seqlen_q, or 0.
        global_blocks : int
            The first so many blocks see, and are seen by, everything.
        """
        import numpy as np

        call = "BlockMask.sliding"
        shape = _lengths(call, seqlen_q, seqlen_k)
        block = _block(call, block)
        global_blocks = _integer(call, "global_blocks", global_blocks)
        if align not in ("bottom_right", "top_left"):
            raise ArgumentError(
                f"[BlockMask.sliding] align must be 'bottom_right' or 'top_left', got {align!r}"
            )
        left, right = (
            None if w is None or w == -1 else _integer(call, f"window_size[{i}]", w)
            for i, w in enumerate(_two(call, "window_size", window_size))
        )
        q_blocks, kv_blocks = _blocks(shape, block)
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
        return cls._from_kept(_with_global(kept, global_blocks), block, shape)

    @classmethod
    def _from_kept(cls, kept: Any, block: tuple[int, int], shape: tuple[int, int]) -> BlockMask:
        kept = kept.reshape((1,) * (4 - kept.ndim) + kept.shape)
        return cls(*_lists(kept), *_lists(kept.swapaxes(2, 3)), block, shape)

    # ---- reading ---------------------------------------------------------------------------------

    def map(self, function: Callable[[Any], Any]) -> BlockMask:
        """A mask whose four arrays went through function, e.g. cupy.asarray, to move them."""
        return BlockMask(
            function(self.kv_num_blocks),
            function(self.kv_indices),
            function(self.q_num_blocks),
            function(self.q_indices),
            self.block,
            self.shape,
        )

    def to_blocks(self) -> Bools:
        """bool (B, H, q_blocks, kv_blocks): True = kept. For arrays that NumPy can read."""
        import numpy as np

        count, indices = np.asarray(self.kv_num_blocks), np.asarray(self.kv_indices)
        kept = np.zeros((*count.shape, self.q_num_blocks.shape[2]), bool)
        listed = np.arange(indices.shape[-1]) < count[..., None]
        b, h, row, _ = np.nonzero(listed)
        kept[b, h, row, indices[listed]] = True
        return kept

    def to_dense(self) -> Bools:
        """bool (B, H, seqlen_q, seqlen_k): True = visible, as far as this mask goes."""
        rows = self.to_blocks().repeat(self.block[0], 2)[:, :, : self.shape[0]]
        return rows.repeat(self.block[1], 3)[..., : self.shape[1]]

    @property
    def density(self) -> float:
        """Kept blocks as a fraction of all, over batch and heads."""
        kept = self.to_blocks()
        return float(kept.mean()) if kept.size else 0.0

    def __repr__(self) -> str:
        batch, heads, q_blocks = self.kv_num_blocks.shape
        return (
            f"BlockMask(batch={batch}, heads={heads}, blocks={q_blocks}x"
            f"{self.q_num_blocks.shape[2]}, block={self.block}, shape={self.shape}, "
            f"density={self.density:.3f})"
        )

    def __str__(self) -> str:
        """The repr and a picture of the first batch and head, one row of text per query block."""
        import numpy as np

        lines = [repr(self)]
        kept = self.to_blocks()
        if kept.size == 0:
            return lines[0]
        picture = kept[0, 0]
        for axis in (0, 1):  # a character of a large picture stands for several blocks: any kept
            step = -(-picture.shape[axis] // _PICTURE)
            at = np.arange(0, picture.shape[axis], step)
            picture = np.logical_or.reduceat(picture, at, axis=axis)
        lines += ["".join("█" if x else "·" for x in row) for row in picture]
        return "\n".join(lines)


def _integer(call: str, name: str, value: Any, least: int = 0) -> int:
    allowed = f"[{call}] {name} must be an integer >= {least}, got {value!r}"
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(allowed) from None
    if number < least:
        raise ArgumentError(allowed)
    return number


def _two(call: str, name: str, value: Any) -> tuple[Any, Any]:
    try:
        first, second = value
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"[{call}] {name} must be a pair, got {value!r}") from None
    return first, second


def _block(call: str, block: Any) -> tuple[int, int]:
    try:
        rows, keys = (_integer(call, "block", n, 1) for n in _two(call, "block", block))
    except ArgumentError as error:
        raise type(error)(
            f"[{call}] block must be two positive integers (rows, keys), got {block!r}"
        ) from None
    return rows, keys


def _shape(call: str, shape: Any) -> tuple[int, int]:
    try:
        seqlen_q, seqlen_k = (_integer(call, "shape", n) for n in _two(call, "shape", shape))
    except ArgumentError as error:
        raise type(error)(
            f"[{call}] shape must be (seqlen_q, seqlen_k), both integers >= 0, got {shape!r}"
        ) from None
    return seqlen_q, seqlen_k


def _lengths(call: str, seqlen_q: Any, seqlen_k: Any) -> tuple[int, int]:
    seqlen_q = _integer(call, "seqlen_q", seqlen_q)
    return seqlen_q, seqlen_q if seqlen_k is None else _integer(call, "seqlen_k", seqlen_k)


def _array(call: str, name: str, value: Any) -> Any:
    import numpy as np

    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"[{call}] {name} must be an array that NumPy can read, got {type(value).__name__}"
        ) from error


def _check_integers(call: str, name: str, array: Any) -> None:
    """An array of any framework. Which integers, each call checks."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise ArgumentTypeError(
            f"[{call}] {name} must be an int32 array, got {type(array).__name__}"
        )
    if "int" not in str(array.dtype):  # "int32", "torch.int32"
        raise ArgumentError(f"[{call}] {name} must be an int32 array, got {array.dtype}")


def _blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
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


def _lists(kept: Any) -> tuple[Any, Any]:
    """Counts and ascending indices of the True entries along the last axis."""
    import numpy as np

    count = kept.sum(-1, dtype=np.int32)
    capacity = max(int(count.max(initial=0)), 1)
    indices = np.zeros((*count.shape, capacity), np.int32)
    position = np.cumsum(kept, axis=-1) - 1
    *where, column = np.nonzero(kept)
    indices[(*where, position[kept])] = column
    return count, indices
