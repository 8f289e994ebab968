"""BlockMask: each constructor against its definition over single positions, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashcore as fc

BLOCK = (16, 24)


def blocks_to_dense(kept: Any, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    dense = np.asarray(kept, bool).repeat(block[0], -2).repeat(block[1], -1)
    return dense[..., : shape[0], : shape[1]]


def check_lists(mask: fc.BlockMask) -> None:
    """Both directions list the same pairs, ascending, as int32."""
    kept = mask.to_blocks()
    lists = [
        (mask.kv_num_blocks, mask.kv_indices, kept),
        (mask.q_num_blocks, mask.q_indices, kept.swapaxes(2, 3)),
    ]
    for count, indices, want in lists:
        assert count.dtype == np.int32 and indices.dtype == np.int32
        assert indices.shape[:-1] == count.shape == want.shape[:-1]
        for at in np.ndindex(count.shape):
            assert indices[at][: count[at]].tolist() == np.flatnonzero(want[at]).tolist()


@st.composite
def random_blocks(draw: Any) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    block = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    shape = draw(st.tuples(st.integers(0, 70), st.integers(0, 70)))
    sizes = draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    sizes += (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kept = rng.random(sizes) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return blocks_to_dense(kept, block, shape), block, shape


@given(random_blocks())
def test_dense_round_trip(case: Any) -> None:
    dense, block, shape = case
    mask = fc.BlockMask.from_dense(dense, block)
    assert mask.shape == shape and mask.block == block
    np.testing.assert_array_equal(mask.to_dense(), dense)
    check_lists(mask)
    kept = mask.to_blocks()
    assert mask.density == (kept.mean() if kept.size else 0.0)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_dense_ranks(lead: tuple[int, ...]) -> None:
    m = np.ones((*lead, 40, 50), bool)
    mask = fc.BlockMask.from_dense(m, BLOCK)
    assert mask.kv_num_blocks.shape == ((1, 1, *lead)[-2:] + (3,))


def test_dense_refuses_mixed_blocks() -> None:
    causal = np.tril(np.ones((48, 48), bool))
    with pytest.raises(fc.ArgumentError, match=r"only a part of block \(0, 0, 0, 0\)"):
        fc.BlockMask.from_dense(causal, BLOCK)
    mask = fc.BlockMask.from_dense(causal, BLOCK, keep_partial=True)
    want = [[1, 0], [1, 1], [1, 1]]
    np.testing.assert_array_equal(mask.to_blocks()[0, 0], want)


@pytest.mark.parametrize("m", [np.ones((4, 4)), np.ones(4, bool), np.ones((1, 1, 1, 4, 4), bool)])
def test_dense_refuses_other_arrays(m: np.ndarray) -> None:
    with pytest.raises(fc.ArgumentError, match="m must be a boolean array"):
        fc.BlockMask.from_dense(m)


@pytest.mark.parametrize("block", [(0, 8), (8,), (8, -1), (8, 8, 8), (1.5, 8), 16, None, "ab"])
def test_block_sizes(block: Any) -> None:
    with pytest.raises(fc.ArgumentError, match="block must be two positive integers"):
        fc.BlockMask.from_dense(np.ones((8, 8), bool), block)


def test_bsr() -> None:
    kept = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    indptr = np.concatenate([[0], kept.sum(1).cumsum()])
    mask = fc.BlockMask.from_bsr(indptr, np.nonzero(kept)[1], (40, 90), BLOCK)
    np.testing.assert_array_equal(mask.to_blocks()[0, 0], kept)
    check_lists(mask)


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 2, 3], [0, 1, 2], "indptr must have 4 entries"),
        ([0, 1, 2, 4], [0, 1, 2], "indptr must rise from 0 to"),
        ([1, 1, 2, 3], [0, 1, 2], "indptr must rise from 0 to"),
        ([0, 3, 2, 3], [0, 1, 2], "indptr must rise from 0 to"),
        ([0, 1, 2, 3], [0, 1, 4], r"indices must be in 0\.\.3, got 4 in query block 2"),
        ([0, 1, 2, 3], [0, -1, 2], r"indices must be in 0\.\.3, got -1 in query block 1"),
        ([0, 1, 3, 3], [3, 2, 1], "ascend without repeats within a query block, got 2 then 1"),
        ([0, 1, 3, 3], [3, 2, 2], "ascend without repeats within a query block, got 2 then 2"),
        ([0, 1, 2, 3], [0.0, 1.0, 2.0], "indices must be a 1-D integer array"),
        ([[0, 1, 2, 3]], [0, 1, 2], "indptr must be a 1-D integer array"),
    ],
)
def test_bsr_refuses(indptr: Any, indices: Any, message: str) -> None:
    with pytest.raises(fc.ArgumentError, match=message):
        fc.BlockMask.from_bsr(indptr, indices, (40, 90), BLOCK)


def test_bsr_may_begin_a_row_below_the_last() -> None:
    mask = fc.BlockMask.from_bsr([0, 1, 2, 3], [3, 2, 0], (40, 90), BLOCK)
    assert mask.to_blocks()[0, 0].sum() == 3


@st.composite
def random_intervals(draw: Any) -> tuple[np.ndarray, np.ndarray, int, tuple[int, int]]:
    block = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    seqlen_k = draw(st.integers(0, 40))
    sizes = draw(st.sampled_from([(), (2,), (2, 2)])) + (draw(st.integers(0, 30)),)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    start = rng.integers(0, seqlen_k + 1, sizes)
    end = rng.integers(0, seqlen_k + 1, sizes)
    if draw(st.booleans()):  # whole blocks: exact
        first = np.arange(sizes[-1]) // block[0] * block[0]
        start = start[..., first] // block[1] * block[1]
        end = np.minimum(-(-end[..., first] // block[1]) * block[1], seqlen_k)
    return start, end, seqlen_k, block


@given(random_intervals())
def test_intervals(case: Any) -> None:
    start, end, seqlen_k, block = case
    j = np.arange(seqlen_k)
    dense = (j >= start[..., None]) & (j < end[..., None])
    loose = fc.BlockMask.from_intervals(start, end, seqlen_k, block, keep_partial=True)
    want = fc.BlockMask.from_dense(dense, block, keep_partial=True)
    np.testing.assert_array_equal(loose.to_blocks(), want.to_blocks())
    check_lists(loose)
    try:
        exact = fc.BlockMask.from_dense(dense, block)
    except fc.ArgumentError:
        with pytest.raises(fc.ArgumentError, match="the intervals would keep only a part"):
            fc.BlockMask.from_intervals(start, end, seqlen_k, block)
    else:
        got = fc.BlockMask.from_intervals(start, end, seqlen_k, block)
        np.testing.assert_array_equal(got.to_blocks(), exact.to_blocks())


def test_intervals_refuse() -> None:
    zeros = np.zeros(8, int)
    with pytest.raises(fc.ArgumentError, match="one shape"):
        fc.BlockMask.from_intervals(zeros, zeros[:4], 8)
    with pytest.raises(fc.ArgumentError, match="must be integers"):
        fc.BlockMask.from_intervals(zeros, zeros + 0.5, 8)
    with pytest.raises(fc.ArgumentError, match=r"within 0\.\.8"):
        fc.BlockMask.from_intervals(zeros, zeros + 9, 8)
    with pytest.raises(fc.ArgumentError, match=r"within 0\.\.8"):
        fc.BlockMask.from_intervals(zeros - 1, zeros + 3, 8)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_butterfly(n: int) -> None:
    mask = fc.BlockMask.butterfly(n * 16, block=(16, 16))
    powers = {0, 1, 2, 4, 8}
    want = [[(i ^ j) in powers for j in range(n)] for i in range(n)]
    np.testing.assert_array_equal(mask.to_blocks()[0, 0], want)


def test_butterfly_options() -> None:
    mask = fc.BlockMask.butterfly(8 * 16, block=(16, 16), factors=1)
    np.testing.assert_array_equal(
        mask.to_blocks()[0, 0], np.kron(np.eye(4, dtype=bool), np.ones((2, 2), bool))
    )
    diagonal = fc.BlockMask.butterfly(8 * 16, block=(16, 16), factors=0)
    np.testing.assert_array_equal(diagonal.to_blocks()[0, 0], np.eye(8, dtype=bool))
    some = fc.BlockMask.butterfly(8 * 16, block=(16, 16), factors=0, global_blocks=1).to_blocks()
    assert some[0, 0, 0].all() and some[0, 0, :, 0].all() and some.sum() == 8 + 14
    stretched = fc.BlockMask.butterfly(4 * 16, 8 * 16, block=(16, 16)).to_blocks()[0, 0]
    assert stretched.shape == (4, 8) and stretched.any(0).all() and stretched.any(1).all()
    with pytest.raises(fc.ArgumentError, match="must be an integer >= 0"):
        fc.BlockMask.butterfly(64, factors=-1)


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("window", [(5, 3), (0, 0), (None, 7), (40, -1), (None, None)])
@pytest.mark.parametrize("shape", [(50, 50), (33, 70), (70, 33), (0, 20)])
def test_sliding(shape: tuple[int, int], window: Any, align: str) -> None:
    i = np.arange(shape[0])[:, None] + (shape[1] - shape[0] if align == "bottom_right" else 0)
    j = np.arange(shape[1])
    left, right = (10**6 if w in (None, -1) else w for w in window)
    dense = (j >= i - left) & (j <= i + right)
    mask = fc.BlockMask.sliding(*shape, BLOCK, window_size=window, align=align)
    want = fc.BlockMask.from_dense(dense, BLOCK, keep_partial=True)
    np.testing.assert_array_equal(mask.to_blocks(), want.to_blocks())


def test_sliding_refuses() -> None:
    with pytest.raises(fc.ArgumentError, match=r"window_size\[0\] must be an integer >= 0"):
        fc.BlockMask.sliding(64, window_size=(-2, 0))
    with pytest.raises(fc.ArgumentTypeError, match="window_size must be a pair, got 3"):
        fc.BlockMask.sliding(64, window_size=3)  # type: ignore[arg-type]
    with pytest.raises(fc.ArgumentError, match="global_blocks must be an integer >= 0"):
        fc.BlockMask.sliding(64, window_size=(1, 1), global_blocks=-1)
    with pytest.raises(fc.ArgumentError, match="align must be"):
        fc.BlockMask.sliding(64, window_size=(1, 1), align="top")


def test_lengths_that_are_none() -> None:
    with pytest.raises(fc.ArgumentTypeError, match=r"\[BlockMask\.from_bsr\] shape must be"):
        fc.BlockMask.from_bsr([0, 1], [0], 4)  # type: ignore[arg-type]
    with pytest.raises(fc.ArgumentTypeError, match=r"\[BlockMask\.from_intervals\] seqlen_k must"):
        fc.BlockMask.from_intervals([0], [1], "4")  # type: ignore[arg-type]
    with pytest.raises(fc.ArgumentTypeError, match=r"\[BlockMask\.butterfly\] seqlen_q must be"):
        fc.BlockMask.butterfly("4")  # type: ignore[arg-type]
    with pytest.raises(fc.ArgumentTypeError, match=r"\[BlockMask\.from_dense\] m must be an array"):
        fc.BlockMask.from_dense([[True], [True, False]])


def test_booleans_are_no_lengths() -> None:
    with pytest.raises(fc.ArgumentTypeError, match=r"block must be two positive integers"):
        fc.BlockMask.sliding(64, block=(True, 16), window_size=(1, 1))
    with pytest.raises(fc.ArgumentTypeError, match="seqlen_q must be an integer >= 0, got True"):
        fc.BlockMask.butterfly(True)
    with pytest.raises(fc.ArgumentTypeError, match=r"window_size\[0\] must be an integer"):
        fc.BlockMask.sliding(64, window_size=(True, None))


def test_lists_of_other_shapes() -> None:
    m = fc.BlockMask.butterfly(64, block=(16, 16))
    lists = [m.kv_num_blocks, m.kv_indices, m.q_num_blocks, m.q_indices]
    with pytest.raises(fc.ArgumentError, match="kv_num_blocks must be"):
        fc.BlockMask(lists[1], *lists[1:], m.block)
    with pytest.raises(fc.ArgumentError, match="one batch and head size"):
        fc.BlockMask(*lists[:2], *(x.repeat(2, 0) for x in lists[2:]), m.block)
    with pytest.raises(fc.ArgumentError, match=r"shape \(99, 64\) has"):
        fc.BlockMask(*lists, m.block, (99, 64))
    with pytest.raises(fc.ArgumentTypeError, match=r"\[BlockMask\] shape must be"):
        fc.BlockMask(*lists, m.block, 64)  # type: ignore[arg-type]
    with pytest.raises(fc.ArgumentTypeError, match="kv_num_blocks must be an int32 array, got int"):
        fc.BlockMask(1, 2, 3, 4, (1, 1))
    with pytest.raises(fc.ArgumentError, match="q_indices must be an int32 array, got float64"):
        fc.BlockMask(*lists[:3], lists[3].astype(float), m.block)
    assert fc.BlockMask(*lists, m.block).shape == (64, 64)


def test_picture() -> None:
    mask = fc.BlockMask.butterfly(64, block=(16, 16), factors=1)
    head, *picture = str(mask).split("\n")
    assert head == repr(mask) and "density=0.500" in head
    assert picture == ["██··", "██··", "··██", "··██"]
    large = str(fc.BlockMask.butterfly(128 * 500)).split("\n")
    assert len(large) <= 50 and all(len(line) <= 48 for line in large[1:])
    assert "blocks=0x0" in str(fc.BlockMask.butterfly(0))


def test_plot(tmp_path: Any) -> None:
    mask = fc.BlockMask.butterfly(64, block=(16, 16), factors=1)
    path = tmp_path / "mask.png"
    picture = mask.plot(path)
    assert path.read_bytes() == picture and picture.startswith(b"\x89PNG\r\n")
    image = pytest.importorskip("PIL.Image").open(path)
    assert image.size == (32, 32)
    dark = np.asarray(image)[::8, ::8] < 128
    np.testing.assert_array_equal(dark, mask.to_blocks()[0, 0])
    large = fc.BlockMask.butterfly(128 * 3000).plot()
    assert len(large) < 200_000
    with pytest.raises(fc.ArgumentError, match="batch 0, head 1 of a mask"):
        mask.plot(head=1)
    with pytest.raises(fc.ArgumentError, match="has no such picture"):
        fc.BlockMask.butterfly(0).plot()


def test_dilated() -> None:
    mask = fc.BlockMask.dilated(6 * 16, block=(16, 16), step=2, reach=1)
    i, j = np.arange(6)[:, None], np.arange(6)
    np.testing.assert_array_equal(mask.to_blocks()[0, 0], (i == j) | (np.abs(i - j) == 2))
    some = fc.BlockMask.dilated(96, block=(16, 16), step=1, reach=0, global_blocks=1)
    np.testing.assert_array_equal(some.to_blocks()[0, 0], (i == j) | (i == 0) | (j == 0))
    with pytest.raises(fc.ArgumentError, match="step must be an integer >= 1"):
        fc.BlockMask.dilated(64, step=0, reach=1)


def test_union_and_intersection() -> None:
    local = fc.BlockMask.sliding(64, block=(16, 16), window_size=(0, 0))
    strips = fc.BlockMask.strips(64, block=(16, 16), rows=1, columns=2)
    both, either = local & strips, local | strips
    a, b = local.to_blocks(), strips.to_blocks()
    assert b.sum() == 4 + 2 * 3
    np.testing.assert_array_equal(both.to_blocks(), a & b)
    np.testing.assert_array_equal(either.to_blocks(), a | b)
    check_lists(either)
    heads = fc.BlockMask.from_blocks(np.ones((3, 4, 4), bool), (16, 16), (64, 64))
    assert (heads & local).kv_num_blocks.shape == (1, 3, 4)
    with pytest.raises(fc.ArgumentError, match="do not combine: see reblocked"):
        local | fc.BlockMask.butterfly(64, block=(16, 32))
    with pytest.raises(TypeError):
        local | 3  # type: ignore[operator]


def test_reblocked() -> None:
    wide = fc.BlockMask.butterfly(100, 300, block=(16, 96))
    fine = wide.reblocked((8, 32))
    assert fine.block == (8, 32) and fine.shape == wide.shape
    np.testing.assert_array_equal(fine.to_dense(), wide.to_dense())
    np.testing.assert_array_equal(fine.reblocked((16, 96)).to_dense(), wide.to_dense())
    with pytest.raises(fc.ArgumentError, match="would be kept in part"):
        wide.reblocked((64, 64))
    loose = wide.reblocked((64, 64), keep_partial=True)
    want = fc.BlockMask.from_dense(wide.to_dense(), (64, 64), keep_partial=True)
    np.testing.assert_array_equal(loose.to_blocks(), want.to_blocks())


@pytest.mark.parametrize("causal", [False, True])
def test_documents(causal: bool) -> None:
    cu = np.array([0, 32, 32, 80, 96])
    document = np.repeat(np.arange(4), np.diff(cu))
    i, j = np.arange(96)[:, None], np.arange(96)
    visible = (document[:, None] == document) & ((j <= i) | (not causal))
    mask = fc.BlockMask.from_documents(cu, (16, 16), causal=causal)
    want = fc.BlockMask.from_dense(visible, (16, 16), keep_partial=True)
    np.testing.assert_array_equal(mask.to_blocks(), want.to_blocks())
    with pytest.raises(fc.ArgumentError, match="ends at 80, inside a block"):
        fc.BlockMask.from_documents(cu, (32, 32))
    loose = fc.BlockMask.from_documents(cu, (32, 32), causal=causal, keep_partial=True)
    want = fc.BlockMask.from_dense(visible, (32, 32), keep_partial=True)
    np.testing.assert_array_equal(loose.to_blocks(), want.to_blocks())
    with pytest.raises(fc.ArgumentError, match="cu_seqlens must rise from 0"):
        fc.BlockMask.from_documents([0, 5, 3])
    assert fc.BlockMask.from_documents([0]).shape == (0, 0)


def test_from_blocks() -> None:
    kept = np.random.default_rng(0).random((2, 3, 4)) < 0.5
    mask = fc.BlockMask.from_blocks(kept, (8, 16), (20, 64))
    np.testing.assert_array_equal(mask.to_blocks()[0], kept)
    check_lists(mask)
    assert fc.BlockMask.from_blocks(kept, (8, 16)).lengths is None
    with pytest.raises(fc.ArgumentError, match="must be a boolean array"):
        fc.BlockMask.from_blocks(kept.astype(int))
    with pytest.raises(fc.ArgumentError, match="has"):
        fc.BlockMask.from_blocks(kept, (8, 16), (200, 64))


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_from_blocks_of_a_framework(name: str) -> None:
    module = pytest.importorskip(name)
    kept = np.random.default_rng(1).random((2, 3, 5, 7)) < 0.5
    theirs = module.from_numpy(kept) if name == "torch" else module.numpy.asarray(kept)
    mask = fc.BlockMask.from_blocks(theirs)
    assert type(mask.q_indices) is type(theirs)
    plain = mask.map(np.asarray)
    np.testing.assert_array_equal(plain.to_blocks(), kept)
    check_lists(plain)
    if name == "torch":
        twice = mask | mask
        assert type(twice.q_indices) is type(theirs)
        np.testing.assert_array_equal(twice.map(np.asarray).to_blocks(), kept)


def test_from_flex() -> None:
    torch = pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    theirs = flex.create_block_mask(
        lambda b, h, i, j: (j <= i) & (j // 32 != 1), 1, 2, 160, 160, device="cpu", BLOCK_SIZE=32
    )
    mask = fc.BlockMask.from_flex(theirs)
    i, j = np.arange(5)[:, None], np.arange(5)
    assert mask.block == (32, 32) and mask.lengths == (160, 160)
    assert isinstance(mask.kv_indices, torch.Tensor)
    np.testing.assert_array_equal(mask.map(np.asarray).to_blocks()[0, 0], (j <= i) & (j != 1))


def test_attention_sees_exactly_the_kept_blocks() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 2, 16)).astype(np.float32) for n in (50, 60, 60))
    kept = rng.random((1, 2, 4, 3)) < 0.5
    dense = blocks_to_dense(kept, BLOCK, (50, 60))
    mask = fc.BlockMask.from_dense(dense, BLOCK)
    np.testing.assert_allclose(
        fc.attention(q, k, v, block_mask=mask), fc.attention(q, k, v, mask=dense), atol=1e-6
    )


def test_map_moves_the_lists() -> None:
    torch = pytest.importorskip("torch")
    mask = fc.BlockMask.butterfly(64, block=(16, 16)).map(torch.from_numpy)
    assert isinstance(mask.kv_indices, torch.Tensor)
    q = torch.randn(1, 64, 2, 16)
    want = fc.attention(q, q, q, block_mask=mask.map(lambda x: x.numpy()))
    assert torch.equal(fc.attention(q, q, q, block_mask=mask), want)


def test_a_mask_for_other_lengths_is_refused() -> None:
    q = np.zeros((1, 80, 2, 16), np.float32)
    with pytest.raises(fc.ArgumentError, match="block_mask is for seqlen_q 64"):
        fc.attention(q, q, q, block_mask=fc.BlockMask.butterfly(64, block=(16, 16)))
