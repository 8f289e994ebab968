"""Block masks on the Hopper kernels, against the float64 reference, the CPU backend and the dense
kernels."""

import numpy as np
import pytest
from cases import Case
from gpu import ONE_PART, assert_near_the_cpu, assert_same_bits, check, on_gpu, run
from test_sm90_backward import Call
from test_sm90_backward import assert_same_bits as assert_same_gradients
from test_sm90_backward import check as check_backward
from test_sm90_forward import random_case, with_scores

import flashcore as fc
from flashcore.testing import assert_close_to_reference, to_numpy

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

KERNELS = [32, 64, 96, 128, 192, 256]  # head dims, one per kernel
BASE = Case("", dtype="bf16", q=300, k=420, h=(2, 1), blocks=(128, 128))


def of_blocks(kept, block=(128, 128), shape=None) -> fc.BlockMask:
    """A mask that keeps the given (query, key) blocks."""
    kept = np.asarray(kept, bool)
    shape = shape or tuple(n * b for n, b in zip(kept.shape[-2:], block))
    dense = kept.repeat(block[0], -2).repeat(block[1], -1)[..., : shape[0], : shape[1]]
    return fc.BlockMask.from_dense(dense, block=block)


# ---- forward ------------------------------------------------------------------------------------

VARIANTS = [
    BASE,
    BASE.but(dtype="f16", causal=True),
    BASE.but(q=129, k=1),
    BASE.but(q=1, k=700),
    BASE.but(causal=True, q=420, k=300),
    BASE.but(causal=True, align="top_left", h=(4, 2)),
    BASE.but(window=(90, 150)),
    BASE.but(window=(5, 3), q=300, k=300),
    BASE.but(window=(300, 0), sinks=True),
    BASE.but(softcap=1.5, causal=True),
    BASE.but(alibi="bh", dtype="f16"),
    BASE.but(dropout=0.3, h=(4, 2), window=(90, None)),
    BASE.but(lengths_q=(113, 299), lengths_k=(60, 420), causal=True),
    BASE.but(layout="bhsd", strides="sliced"),
    BASE.but(packed_q=(5, 130, 0, 300), packed_k=(7, 200, 9, 190), causal=True),
    BASE.but(packed_q=(5, 130, 0, 300), packed_k=(7, 420, 9, 190), sinks=True),
    BASE.but(k=0),
    BASE.but(q=0),
    BASE.but(b=0),
]


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_option(case, d):
    check(case.but(d=d))


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("blocks", [(64, 64), (64, 128), (128, 64), (192, 320), (256, 256)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 30)}], ids=str)
def test_block_sizes(d, blocks, options):
    check(BASE.but(d=d, blocks=blocks, q=600, k=650, b=1, **options))


@pytest.mark.parametrize("n", range(100))
def test_random_combination(n):
    case = random_case(n)
    sizes = {} if case.packed_q is not None else {"q": 2 * case.q, "k": 2 * case.k}
    sizes |= dict.fromkeys(("lengths_q", "lengths_k")) if n % 2 else {}
    check(case.but(blocks=((64, 64), (128, 128), (128, 64), (64, 256))[n % 4], **sizes))


def lower_triangle(n: int) -> np.ndarray:
    return np.tri(n, dtype=bool)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("length", [640, 600])
def test_the_causal_pattern_is_causal(d, length, dtype):
    """Bit for bit what the lists of all blocks give, and the dense kernel where its tiles are those
    (at head dim 192 they have 112 keys)."""
    done = run(Case("causal", dtype=dtype, q=length, k=length, h=(4, 2), d=d, causal=True))
    triangle = of_blocks(lower_triangle(5), shape=(length, length)).map(on_gpu)
    every = of_blocks(np.ones((5, 5)), shape=(length, length)).map(on_gpu)
    got = done.again(block_mask=triangle)
    assert_same_bits(got, done.again(block_mask=every))
    if d != 192:
        assert_same_bits(got, done.again(**ONE_PART))
    a = done.arrays
    assert_close_to_reference(got, a["q"], a["k"], a["v"], causal=True)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("d", [32, 64])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("window", [None, (2500, 0)])
def test_the_causal_pattern_is_causal_in_tiles_of_any_size(d, block, window, dtype):
    """Long sequences have tiles of 128 rows, which lists of blocks of 64 cannot have. Scores are
    large, so that references are raised at many places."""
    length = 4110
    case = Case("long", dtype=dtype, b=1, q=length, k=length, h=(12, 1), d=d, scale=d**0.5 / 4)
    case = case.but(causal=True) if window is None else case.but(window=window)
    arrays = case.arrays()
    inputs = tuple(on_gpu(arrays[name]) for name in "qkv")
    options = case.options()
    plan = fc.explain(*inputs, **options)
    if not plan.kernel:
        pytest.skip("refused")
    assert "-window-2x128x64" in plan.kernel
    triangle = of_blocks(lower_triangle(-(-length // block)), (block, block), (length, length))
    triangle = triangle.map(on_gpu)
    kernel = fc.explain(*inputs, **options, block_mask=triangle).kernel
    assert ("-blocks-2x128x64" if block == 128 else "-blocks-4x64x64") in kernel
    dense = fc.attention(*inputs, **options, return_lse=True)
    assert_same_bits(fc.attention(*inputs, **options, return_lse=True, block_mask=triangle), dense)


@pytest.mark.parametrize("d", KERNELS)
def test_all_blocks_are_the_dense_kernel(d):
    done = run(Case("full", dtype="bf16", q=512, k=640, h=(4, 2), d=d))
    got = done.again(block_mask=of_blocks(np.ones((4, 5))).map(on_gpu))
    if d != 192:
        assert_same_bits(got, done.again(**ONE_PART))
    assert_near_the_cpu(got, done.on_the_cpu())


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 3.0}], ids=str)
def test_rows_and_columns_that_keep_nothing(d, options):
    kept = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    mask = of_blocks(kept)
    done = run(Case("holes", dtype="bf16", q=512, k=512, h=(4, 2), d=d, **options))
    got = done.again(block_mask=mask.map(on_gpu))
    a = done.arrays
    assert_close_to_reference(got, a["q"], a["k"], a["v"], block_mask=mask, **options)
    for rows in (slice(128, 256), slice(384, 512)):
        assert (got.out[:, rows] == 0).all() and (got.lse[:, :, rows] == -np.inf).all()
    none = done.again(block_mask=of_blocks(np.zeros((4, 4)), shape=(512, 512)).map(on_gpu))
    assert (none.out == 0).all() and (none.lse == -np.inf).all()


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_in_excluded_keys_reaches_nothing(d, causal, poison):
    """Of blocks that are left out, and of keys past the diagonal in those that are kept."""
    rng = np.random.default_rng(d)
    kept = rng.random((4, 5)) < 0.5
    kept[:, 1] = False
    kept[0, 2] = kept[3, 2] = True
    case = Case("poison", dtype="bf16", b=1, q=500, k=600, h=(2, 1), d=d, causal=causal)
    arrays = case.arrays()
    for name in "kv":
        arrays[name][:, 128:256] = poison  # of no list
        arrays[name][:, 300] = poison  # row 200 faces it
    mask = of_blocks(kept, shape=(500, 600))
    done = run(case, arrays)
    got = done.again(block_mask=mask.map(on_gpu))
    sees = mask.to_dense()[0, 0, :, 300] & (not causal or np.arange(500) + 100 >= 300)
    out = to_numpy(got.out).astype(float)
    assert np.isfinite(out[:, ~sees]).all() and np.isnan(out[:, sees]).any(-1).all()
    for name in "kv":
        arrays[name][:, 128:256] = arrays[name][:, 300] = 0
    clean = fc.attention(
        *(arrays[name] for name in "qkv"), causal=causal, block_mask=mask, return_lse=True
    )
    eps = 2.0**-7
    np.testing.assert_allclose(
        out[:, ~sees], clean.out.astype(float)[:, ~sees], rtol=0, atol=4 * eps * 4
    )


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("jump", [-80, 40, 95, 300])
def test_scores_that_change_from_block_to_block(d, jump):
    case = Case("stairs", dtype="bf16", b=1, q=256, k=896, h=(2, 1), d=d)
    arrays = with_scores(case, jump * ((896 - np.arange(896)) // 128))
    kept = np.array([[1, 1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 1, 0, 0]])
    check(case, arrays=arrays, scale=1.0, block_mask=of_blocks(kept))


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 9.0}], ids=str)
def test_more_tiles_than_multiprocessors(d, options):
    """Tiles of unlike length, taken as they come: still the same bits every time."""
    rng = np.random.default_rng(d)
    kept = rng.random((2, 12, 9, 11)) < rng.choice((0.05, 0.3, 1.0), (2, 12, 9, 1))
    mask = of_blocks(kept, shape=(1100, 1300))
    case = Case("many tiles", dtype="bf16", b=2, q=1100, k=1300, h=(12, 4), d=d, **options)
    done = run(case, block_mask=mask)
    assert_near_the_cpu(done.result, done.on_the_cpu())
    for _ in range(3):
        assert_same_bits(done.result, done.again())


def test_lists_of_one_batch_and_head_serve_all():
    kept = np.random.default_rng(0).random((3, 4)) < 0.5
    done = run(BASE.but(d=128, b=3, h=(4, 2), q=384, k=512, blocks=None))
    one = done.again(block_mask=of_blocks(kept).map(on_gpu))
    wide = np.broadcast_to(kept, (3, 4, 3, 4))
    assert_same_bits(one, done.again(block_mask=of_blocks(wide).map(on_gpu)))


def test_lists_with_room_and_strides():
    """Entries past the count are not read, and lists may lie in a larger tensor."""
    done = run(BASE.but(d=128, q=384, k=512, blocks=None))
    mask = of_blocks(np.random.default_rng(0).random((2, 2, 3, 4)) < 0.5)
    want = done.again(block_mask=mask.map(on_gpu))
    wide = np.full((*mask.kv_indices.shape[:-1], 9), 2**30, np.int32)
    wide[..., : mask.kv_indices.shape[-1]] = mask.kv_indices
    roomy = fc.BlockMask(
        on_gpu(mask.kv_num_blocks),
        on_gpu(wide)[..., : mask.kv_indices.shape[-1]],
        on_gpu(mask.q_num_blocks),
        on_gpu(mask.q_indices),
        mask.block,
        mask.lengths,
    )
    assert_same_bits(want, done.again(block_mask=roomy))


def test_cuda_graph_capture_and_replay():
    done = run(BASE.but(d=64, q=256, k=384, h=(4, 4)))
    q, k, v = done.inputs
    out = torch.empty_like(done.result.out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fc.attention(q, k, v, out=out, **done.options)
    q.mul_(0.5)
    expected = fc.attention(q, k, v, **done.options)
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("block", [(32, 64), (64, 32), (100, 128), (16, 256)])
def test_other_block_sizes_are_refused(block):
    done = run(BASE.but(d=128, blocks=None, q=400, k=512))
    mask = fc.BlockMask.from_dense(np.ones((400, 512), bool), block=block)
    with pytest.raises(fc.UnsupportedError, match=r"blocks of a multiple of 64 rows and keys"):
        done.again(block_mask=mask.map(on_gpu))


def test_masks_elsewhere_are_refused():
    done = run(BASE.but(d=128))
    with pytest.raises(fc.ArgumentError, match="cpu"):
        fc.attention(*done.inputs, block_mask=done.values["block_mask"])


# ---- backward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradients(case, d):
    check_backward(case.but(d=d))


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("blocks", [(64, 64), (64, 128), (128, 64), (192, 320), (256, 256)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 30)}], ids=str)
def test_gradients_of_block_sizes(d, blocks, options):
    check_backward(BASE.but(d=d, blocks=blocks, q=600, k=650, b=1, **options))


@pytest.mark.parametrize("n", range(60))
def test_gradients_of_a_random_combination(n):
    case = random_case(n)
    sizes = {} if case.packed_q is not None else {"q": 2 * case.q, "k": 2 * case.k}
    sizes |= dict.fromkeys(("lengths_q", "lengths_k")) if n % 2 else {}
    check_backward(case.but(blocks=((64, 64), (128, 128), (128, 64), (64, 256))[n % 4], **sizes))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("block", [64, 128])
def test_gradients_of_the_causal_pattern(d, dtype, block):
    call = Call(Case("causal", dtype=dtype, q=600, k=600, h=(4, 2), d=d, causal=True))
    triangle = of_blocks(lower_triangle(-(-600 // block)), (block, block), (600, 600)).map(on_gpu)
    for fixed in (False, True):
        call.check(call.run(block_mask=triangle, deterministic=fixed))


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_of_rows_and_columns_that_keep_nothing(d, fixed, accumulate):
    kept = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    call = Call(
        Case("holes", dtype="bf16", q=512, k=512, h=(4, 2), d=d), block_mask=of_blocks(kept)
    )
    into = {}
    if accumulate:
        into = {"d" + name: torch.full_like(call.tensors[name], 2.0).float() for name in "qkv"}
    got = call.run(deterministic=fixed, accumulate=accumulate, **into)
    if not accumulate:
        call.check(got)
    for x, rows in (
        (got.dq, slice(128, 384)),
        (got.dk, slice(384, 512)),
        (got.dv, slice(128, 256)),
    ):
        assert (x[:, rows] == (2.0 if accumulate else 0.0)).all()


LISTS = [
    BASE.but(b=1, q=300, k=420),
    # More tiles than multiprocessors, and several of a head at a time.
    BASE.but(b=3, q=900, k=1500, h=(12, 6)),
    BASE.but(b=3, q=900, k=900, h=(12, 12), causal=True),
    BASE.but(b=2, q=700, k=900, h=(12, 4), blocks=(64, 64)),
    BASE.but(b=2, q=700, k=900, h=(12, 12), blocks=(128, 192), window=(300, 100)),
    BASE.but(b=2, q=700, k=900, h=(12, 12), blocks=(256, 256), softcap=9.0, dropout=0.1),
    BASE.but(packed_q=(705, 130, 0, 300), packed_k=(307, 620, 9, 190), h=(16, 16), causal=True),
    BASE.but(b=3, q=700, k=900, h=(12, 6), lengths_q=(113, 699, 0), lengths_k=(900, 1, 420)),
]


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("case", LISTS, ids=str)
def test_deterministic(case, d):
    """Tiles that wait for those that a query block's list names."""
    call = Call(case.but(d=d))
    first = call.run(deterministic=True)
    call.check(first)
    for _ in range(30):
        assert_same_gradients(call.run(deterministic=True), first)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_fixed_order_is_the_same_however_lists_are_stored(d):
    kept = np.random.default_rng(d).random((8, 8)) < 0.4
    case = Case("stored", dtype="bf16", b=2, q=1024, k=1024, h=(8, 4), d=d)
    call = Call(case, block_mask=of_blocks(kept))
    want = call.run(deterministic=True)
    call.check(want)
    on_device = torch.from_numpy(kept).cuda()
    for blocks in (on_device, on_device.expand(2, 8, 8, 8)):  # lists with room for every block
        call.options["block_mask"] = fc.BlockMask.from_blocks(blocks)
        assert_same_gradients(call.run(deterministic=True), want)


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_lists_that_are_not_each_others_transpose_do_not_hang(d, options):
    rng = np.random.default_rng(d)
    one, other = (of_blocks(rng.random((8, 8, 8)) < 0.5, shape=(1024, 1024)) for _ in range(2))
    case = Case("two masks", dtype="bf16", b=6, q=1024, k=1024, h=(8, 8), d=d, **options)
    call = Call(case, block_mask=one)
    call.options["block_mask"] = fc.BlockMask(
        one.kv_num_blocks, one.kv_indices, other.q_num_blocks, other.q_indices, (128, 128)
    )
    for _ in range(3):
        call.run(deterministic=True)  # waits for it


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("case", LISTS[1:3], ids=str)
def test_deterministic_on_two_streams(case, d):
    """Neither waits for a tile that the other one keeps from being taken."""
    call = Call(case.but(d=d))
    t, options = call.tensors, {name: on_gpu(x) for name, x in call.options.items()}
    inputs = [t[name] for name in ("dout", "q", "k", "v", "out", "lse")]
    want = call.run(deterministic=True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    grads = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                grads.append(fc.attention_backward(*inputs, **options, deterministic=True))
    torch.cuda.synchronize()
    for got in grads:
        assert_same_gradients(want, got)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("d", KERNELS)
def test_poison_in_excluded_blocks_reaches_no_gradient(d, block, fixed, which, poison):
    """Queries or keys that a list leaves out, beside others that it does not."""
    kept = np.random.default_rng(d).random((6, 6)) < 0.6
    kept[np.arange(6), np.arange(6)] = True
    bad = slice(block, 2 * block)
    (kept if which == "q" else kept.T)[1] = False  # nobody sees them
    case = Case("poison", dtype="bf16", b=1, q=6 * block, k=6 * block, h=(4, 2), d=d)
    call = Call(case, block_mask=of_blocks(kept, (block, block)))
    clean = call.run(deterministic=True)
    call.poison(which, (slice(None), bad), poison)
    got = call.run(deterministic=fixed)
    for name in ("dq", "dk", "dv"):
        x, want = getattr(got, name).float(), getattr(clean, name).float()
        torch.testing.assert_close(x, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("q_offset", [-50, 0, 40, 1000, (64, -7)], ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (90, 30)}], ids=str)
def test_gradients_where_the_diagonal_is_moved(d, block, q_offset, options):
    check_backward(BASE.but(d=d, blocks=(block, block), q_offset=q_offset, **options))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("d", KERNELS)
def test_poison_past_the_diagonal_reaches_no_gradient(d, block, fixed, which, poison):
    """One query or key: in blocks that are kept it meets others on the far side of the diagonal."""
    n = 6 * block
    kept = np.random.default_rng(d).random((6, 6)) < 0.6
    kept[np.arange(6), np.arange(6)] = True
    bad = n // 2 + 5
    case = Case("poison", dtype="bf16", b=1, q=n, k=n, h=(4, 2), d=d, causal=True)
    call = Call(case, block_mask=of_blocks(kept, (block, block)))
    clean = call.run(deterministic=True)
    call.poison(which, (slice(None), bad), poison)
    got = call.run(deterministic=fixed)
    sees = kept.repeat(block, 0).repeat(block, 1) & np.tri(n, dtype=bool)
    others = np.arange(n) != bad
    rows, keys = (others, ~sees[bad]) if which == "q" else (~sees[:, bad], others)
    for name, which_rows in (("dq", rows), ("dk", keys), ("dv", keys)):
        x, want = (getattr(g, name)[:, torch.as_tensor(which_rows)].float() for g in (got, clean))
        torch.testing.assert_close(x, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_gradients_of_more_tiles_than_multiprocessors(d, options):
    rng = np.random.default_rng(d)
    kept = rng.random((2, 12, 9, 11)) < rng.choice((0.05, 0.3, 1.0), (2, 12, 9, 1))
    case = Case("many tiles", dtype="bf16", b=2, q=1100, k=1300, h=(12, 4), d=d, **options)
    done = run(case, block_mask=of_blocks(kept, shape=(1100, 1300)))
    q, k, v = done.inputs
    dout = on_gpu(done.arrays["dout"])
    call = (dout, q, k, v, done.result.out, done.result.lse)
    first = fc.attention_backward(*call, **done.options, deterministic=True)
    a, cpu = done.arrays, done.on_the_cpu()
    want = fc.attention_backward(a["dout"], a["q"], a["k"], a["v"], cpu.out, cpu.lse, **done.values)
    for got in (first, fc.attention_backward(*call, **done.options)):
        for x, y in zip(got[:3], want):
            y = y.astype(float)
            np.testing.assert_allclose(
                to_numpy(x).astype(float), y, rtol=0, atol=2.0**-6 * np.abs(y).max()
            )
    for x, y in zip(first, fc.attention_backward(*call, **done.options, deterministic=True)):
        assert x is y is None or torch.equal(x, y)


def test_gradients_in_a_cuda_graph():
    done = run(BASE.but(d=64, q=256, k=384, h=(4, 4)))
    q, k, v = done.inputs
    call = (torch.ones_like(done.result.out), q, k, v, done.result.out, done.result.lse)
    want = fc.attention_backward(*call, **done.options)
    into = {"d" + name: torch.zeros_like(x) for name, x in zip("qkv", done.inputs)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fc.attention_backward(*call, **done.options, **into)
    for _ in range(2):
        for x in into.values():
            x.zero_()
        graph.replay()
        for x, y in zip(into.values(), want):
            torch.testing.assert_close(x.float(), y.float(), rtol=0.02, atol=0.02)


def test_other_block_sizes_are_refused_by_the_backward_pass():
    done = run(BASE.but(d=128, blocks=None, q=400, k=512))
    mask = fc.BlockMask.from_dense(np.ones((400, 512), bool), block=(32, 128)).map(on_gpu)
    x = done.result
    with pytest.raises(fc.UnsupportedError, match=r"blocks of a multiple of 64 rows and keys"):
        fc.attention_backward(x.out, *done.inputs, x.out, x.lse, block_mask=mask)
