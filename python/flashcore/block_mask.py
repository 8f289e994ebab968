"""Block-sparse attention: which (query block, key block) pairs are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashcore import block_lists, block_patterns, block_picture
from flashcore._arguments import block_size, check_integers, integer, seqlens
from flashcore.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bools = NDArray[np.bool_]

__all__ = ["BlockMask"]


class BlockMask:
    """The block pairs that attention computes; every other pair is excluded.

    A block is kept or excluded whole. A mask combines with causal, window_size, mask and lengths: a
    key is visible when all of them let it be, so a finer pattern is a block mask plus one of those.
    Time is proportional to the kept blocks.

    Make one with `from_dense`, `from_blocks`, `from_bsr`, `from_intervals`, `from_documents`,
    `from_flex`, `butterfly`, `sliding`, `dilated` or `strips`, from others by `|`, `&` and
    `reblocked`, or from the four lists directly.

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
        seqlen_q and seqlen_k. A call that is not packed must have these lengths. Default: whole
        blocks, and calls of any length with as many blocks may use it.

    Raises
    ------
    ArgumentError
        Shapes that do not belong together. The lists themselves are checked by each call.

    Notes
    -----
    The arrays may be of any framework; they must be on the device of q. The constructors give NumPy
    arrays; `map` moves them. Field names follow PyTorch's FlexAttention.
    """

    __slots__ = (
        "block",
        "kv_indices",
        "kv_num_blocks",
        "lengths",
        "q_indices",
        "q_num_blocks",
        "shape",
    )

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
        self.block = block_size("BlockMask", block)
        lists = {"kv": (kv_num_blocks, kv_indices), "q": (q_num_blocks, q_indices)}
        for name, (count, indices) in lists.items():
            for field, array in ((f"{name}_num_blocks", count), (f"{name}_indices", indices)):
                check_integers("BlockMask", field, array)
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
        self.lengths = None if shape is None else seqlens("BlockMask", shape)
        self.shape = self.lengths or whole
        expected = block_patterns.block_counts(self.shape, self.block)
        if expected != blocks:
            raise ArgumentError(
                f"[BlockMask] shape {self.shape} has {expected} blocks of {self.block}, but the "
                f"lists have {blocks}"
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
        return cls._from_kept(*block_patterns.dense(m, block, keep_partial))

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
        return cls._from_kept(*block_patterns.bsr(indptr, indices, shape, block))

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
        return cls._from_kept(*block_patterns.intervals(start, end, seqlen_k, block, keep_partial))

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
        return cls._from_kept(
            *block_patterns.butterfly(seqlen_q, seqlen_k, block, factors, global_blocks)
        )

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
        return cls._from_kept(
            *block_patterns.sliding(seqlen_q, seqlen_k, block, window_size, align, global_blocks)
        )

    @classmethod
    def dilated(
        cls,
        seqlen_q: int,
        seqlen_k: int | None = None,
        block: tuple[int, int] = (128, 128),
        *,
        step: int,
        reach: int,
        global_blocks: int = 0,
    ) -> BlockMask:
        """A sliding window with gaps: blocks at 0, step, 2 step, ... reach * step on either side.

        Parameters
        ----------
        seqlen_q, seqlen_k : int
            Lengths; seqlen_k defaults to seqlen_q. Where they differ the pattern is stretched.
        block : (int, int)
            Rows and keys in a block.
        step : int
            Distance from one kept block to the next, in blocks; at least 1.
        reach : int
            Kept blocks on each side of the diagonal.
        global_blocks : int
            The first so many blocks see, and are seen by, everything.
        """
        return cls._from_kept(
            *block_patterns.dilated(seqlen_q, seqlen_k, block, step, reach, global_blocks)
        )

    @classmethod
    def strips(
        cls,
        seqlen_q: int,
        seqlen_k: int | None = None,
        block: tuple[int, int] = (128, 128),
        *,
        rows: int = 0,
        columns: int = 0,
    ) -> BlockMask:
        """The first so many rows and columns of blocks: global tokens, to be united with others."""
        return cls._from_kept(*block_patterns.strips(seqlen_q, seqlen_k, block, rows, columns))

    @classmethod
    def from_documents(
        cls,
        cu_seqlens: Any,
        block: tuple[int, int] = (128, 128),
        *,
        causal: bool = False,
        keep_partial: bool = False,
    ) -> BlockMask:
        """Documents one after the other in one sequence, none of which sees another.

        Parameters
        ----------
        cu_seqlens : int array (documents + 1,)
            Where each begins, from 0 to the length of the sequence.
        block : (int, int)
            Rows and keys in a block.
        causal : bool
            Leave out the blocks above the diagonal too. Those on it are kept whole: pass
            causal=True to `attention` as well.
        keep_partial : bool
            A document may end inside a block. False: refused. True: such a block is kept whole, so
            neighbours see each other in it unless mask= says the rest.

        Notes
        -----
        Packed sequences (cu_seqlens_q, cu_seqlens_k of `attention`) need no block mask for that.
        """
        return cls._from_kept(*block_patterns.documents(cu_seqlens, block, causal, keep_partial))

    @classmethod
    def from_blocks(
        cls, kept: Any, block: tuple[int, int] = (128, 128), shape: tuple[int, int] | None = None
    ) -> BlockMask:
        """Which blocks are kept, one by one. Made where kept is: nothing waits for a GPU.

        Parameters
        ----------
        kept : bool array (q_blocks, kv_blocks), (H, q_blocks, kv_blocks) or with batch in front
            True = kept. NumPy, PyTorch, CuPy or JAX; so will the lists be. B and H may be 1.
        block : (int, int)
            Rows and keys in a block.
        shape : (int, int), optional
            seqlen_q and seqlen_k. Default: whole blocks, and calls of any length with as many.

        Raises
        ------
        ArgumentError
            kept is not boolean or has another rank, or shape has another number of blocks.
        """
        if (
            not hasattr(kept, "dtype")
            or "bool" not in str(kept.dtype)
            or kept.ndim not in (2, 3, 4)
        ):
            raise ArgumentError(
                "[BlockMask.from_blocks] kept must be a boolean array (q_blocks, kv_blocks), "
                "optionally with heads and batch in front, got "
                f"{getattr(kept, 'dtype', type(kept).__name__)} {tuple(getattr(kept, 'shape', ()))}"
            )
        return cls._from_kept(kept, block_size("BlockMask.from_blocks", block), shape)

    @classmethod
    def from_flex(cls, mask: Any) -> BlockMask:
        """The blocks of a torch.nn.attention.flex_attention.BlockMask.

        Its mask_mod is not read: blocks that it cuts are kept whole, so pass causal=, window_size=
        or mask= for what it does inside them. Nothing waits for a GPU.
        """
        block, lengths = tuple(mask.BLOCK_SIZE), tuple(mask.seq_lengths)
        _, kv_blocks = block_patterns.block_counts(lengths, block)
        kept = block_lists.kept_of(mask.kv_num_blocks, mask.kv_indices, kv_blocks)
        if mask.full_kv_num_blocks is not None:
            kept = kept | block_lists.kept_of(
                mask.full_kv_num_blocks, mask.full_kv_indices, kv_blocks
            )
        return cls._from_kept(kept, block, lengths)

    @classmethod
    def _from_kept(
        cls, kept: Any, block: tuple[int, int], shape: tuple[int, int] | None
    ) -> BlockMask:
        kept = kept.reshape((1,) * (4 - kept.ndim) + tuple(kept.shape))
        columns = kept.swapaxes(2, 3)
        return cls(*block_lists.lists_of(kept), *block_lists.lists_of(columns), block, shape)

    # ---- from others -----------------------------------------------------------------------------

    def __or__(self, other: BlockMask) -> BlockMask:
        """The blocks that either keeps. For arrays of PyTorch, or that NumPy can read."""
        return self._combined(other, lambda a, b: a | b)

    def __and__(self, other: BlockMask) -> BlockMask:
        """The blocks that both keep."""
        return self._combined(other, lambda a, b: a & b)

    def _combined(self, other: BlockMask, rule: Callable[[Any, Any], Any]) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        if (self.block, self.shape) != (other.block, other.shape):
            raise ArgumentError(
                f"[BlockMask] masks of {self.shape} in blocks of {self.block} and of {other.shape} "
                f"in blocks of {other.block} do not combine: see reblocked"
            )
        return self._from_kept(
            rule(self._kept(), other._kept()), self.block, self.lengths or other.lengths
        )

    def reblocked(self, block: tuple[int, int], *, keep_partial: bool = False) -> BlockMask:
        """The same pairs in blocks of another size. For arrays that NumPy can read.

        Parameters
        ----------
        block : (int, int)
            The new size. A block of it that would be kept in part is refused, or, with
            keep_partial, kept whole.
        """
        kept, block, _ = block_patterns.reblocked(
            self.to_blocks(), self.block, self.shape, block, keep_partial
        )
        return self._from_kept(kept, block, self.lengths)

    # ---- reading ---------------------------------------------------------------------------------

    def map(self, function: Callable[[Any], Any]) -> BlockMask:
        """A mask whose four arrays went through function, e.g. cupy.asarray, to move them."""
        return BlockMask(
            function(self.kv_num_blocks),
            function(self.kv_indices),
            function(self.q_num_blocks),
            function(self.q_indices),
            self.block,
            self.lengths,
        )

    def to_blocks(self) -> Bools:
        """bool (B, H, q_blocks, kv_blocks): True = kept. For arrays that NumPy can read."""
        import numpy as np

        count, indices = np.asarray(self.kv_num_blocks), np.asarray(self.kv_indices)
        kept: Bools = block_lists.kept_of(count, indices, self.q_num_blocks.shape[2])
        return kept

    def _kept(self) -> Any:
        """The same, where the lists are if they are PyTorch's."""
        return block_lists.kept_of(self.kv_num_blocks, self.kv_indices, self.q_num_blocks.shape[2])

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
        kept = self.to_blocks()
        return "\n".join([repr(self)] + (block_picture.text(kept[0, 0]) if kept.size else []))

    def plot(self, path: Any = None, *, batch: int = 0, head: int = 0) -> bytes:
        """A PNG of one batch and head, kept blocks dark; written to path if that is given.

        For arrays that NumPy can read. A mask without blocks is refused.
        """
        kept = self.to_blocks()
        batch, head = (
            integer("BlockMask.plot", "batch", batch),
            integer("BlockMask.plot", "head", head),
        )
        if kept.size == 0 or batch >= kept.shape[0] or head >= kept.shape[1]:
            raise ArgumentError(
                f"[BlockMask.plot] batch {batch}, head {head} of a mask with {kept.shape}: "
                "(batch, heads, query blocks, key blocks) has no such picture"
            )
        picture = block_picture.png(kept[batch, head])
        if path is not None:
            with open(path, "wb") as file:
                file.write(picture)
        return picture
