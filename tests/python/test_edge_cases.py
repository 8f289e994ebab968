"""What broke other libraries: each test names the situation, and holds for every later kernel."""

import cases
import ml_dtypes
import numpy as np
import pytest
from helpers import backward, check_backward, check_forward, forward, same_bits

import flashcore as fc
from flashcore import reference
from flashcore.testing import assert_close_to_reference, assert_grads_close_to_reference, to_numpy

DTYPES = ["f32", "bf16", "f16", "f64"]
POISON = [np.nan, np.inf, -np.inf]


# ---- what is not visible cannot matter -----------------------------------------------------------


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_in_padding_reaches_nothing(dtype, poison):
    case = cases.Case(
        "padding", dtype=dtype, lengths_q=(113, 40), lengths_k=(33, 203), causal=True, h=(4, 2)
    )
    _check_poison(
        case,
        poison,
        lambda a: [
            (a["q"], (1, slice(40, None))),
            (a["dout"], (1, slice(40, None))),
            (a["k"], (0, slice(33, None))),
            (a["v"], (0, slice(33, None))),
        ],
    )


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_in_masked_keys_reaches_nothing(dtype, poison):
    mask = np.ones((1, 1, 1, 203), bool)
    mask[..., 10:15] = mask[..., 60:130] = mask[..., 202] = False
    case = cases.Case("masked keys", dtype=dtype)
    _check_poison(
        case,
        poison,
        lambda a: [(a[name], (slice(None), ~mask[0, 0, 0])) for name in "kv"],
        mask=mask,
    )


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_outside_every_window_reaches_nothing(dtype, poison):
    """Keys left of the first row's window, and right of the last row's diagonal."""
    case = cases.Case(
        "outside the window", dtype=dtype, q=50, k=200, causal=True, q_offset=100, window=(20, None)
    )
    _check_poison(
        case,
        poison,
        lambda a: [
            (a[name], (slice(None), keys))
            for name in "kv"
            for keys in (slice(0, 80), slice(150, None))
        ],
    )


@pytest.mark.parametrize("poison", POISON, ids=str)
def test_poison_in_excluded_blocks_reaches_nothing(poison):
    kept = np.ones((1, 1, 4, 4), bool)
    kept[..., 2] = False
    mask = fc.BlockMask.from_dense(kept.repeat(32, 2).repeat(32, 3), block=(32, 32))
    case = cases.Case("excluded blocks", q=128, k=128)
    _check_poison(
        case,
        poison,
        lambda a: [(a[name], (slice(None), slice(64, 96))) for name in "kv"],
        block_mask=mask,
    )


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_in_rows_that_see_nothing_reaches_no_gradient(dtype, poison):
    case = cases.Case("rows without keys", dtype=dtype, q=90, k=40, causal=True)
    _check_poison(
        case,
        poison,
        lambda a: [(a["q"], (slice(None), slice(0, 50))), (a["dout"], (slice(None), slice(0, 50)))],
    )


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_in_the_future_reaches_no_earlier_row(dtype, poison):
    """The last key is visible to the last row alone: no other output may change."""
    case = cases.Case("future keys", dtype=dtype, q=40, k=40, causal=True)
    clean, dirty = case.arrays(), case.arrays()
    for name in "kv":
        dirty[name][:, -1] = poison
    want, got = forward(clean, {"causal": True}), forward(dirty, {"causal": True})
    assert same_bits(want.out[:, :-1], got.out[:, :-1])
    assert same_bits(want.lse[..., :-1], got.lse[..., :-1])


@pytest.mark.parametrize("poison", POISON, ids=str)
def test_poison_around_packed_sequences_reaches_nothing(poison):
    """The second of three sequences is poison: the others do not notice."""
    case = cases.Case("packed", packed_q=(30, 20, 10), packed_k=(25, 40, 35))
    o, clean, dirty = case.options(), case.arrays(), case.arrays()
    for name, span in (
        ("q", slice(30, 50)),
        ("dout", slice(30, 50)),
        ("k", slice(25, 65)),
        ("v", slice(25, 65)),
    ):
        dirty[name][span] = poison
    want, got = forward(clean, o), forward(dirty, o)
    rows, keys = np.r_[0:30, 50:60], np.r_[0:25, 65:100]
    assert same_bits(want.out[rows], got.out[rows])
    g_want, g_got = backward(clean, o), backward(dirty, o)
    assert same_bits(g_want.dq[rows], g_got.dq[rows])
    assert same_bits((g_want.dk[keys], g_want.dv[keys]), (g_got.dk[keys], g_got.dv[keys]))


def _check_poison(case, poison, places, **more):
    options = {**case.options(), **more}
    clean, dirty = case.arrays(), case.arrays()
    for array, at in places(clean):
        array[at] = 0
    for array, at in places(dirty):
        array[at] = poison
    assert same_bits(tuple(forward(clean, options)), tuple(forward(dirty, options)))
    check_forward(dirty, options)
    grads = backward(dirty, options)
    for want, got in zip(backward(clean, options)[:3], grads):
        assert np.isfinite(got.astype(np.float32)).all()
        atol = 0 if got.dtype.itemsize > 2 else 0.02  # a path around NaN may add in another order
        np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=0, atol=atol)


# ---- extreme scores ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("keys", [129, 191, 192, 193, 255, 128])
def test_every_score_is_about_minus_120(dtype, keys):
    """exp(-120) underflows float32: a padded key that counts as score 0 would take everything."""
    case = cases.Case("all scores very negative", dtype=dtype, q=70, k=keys, d=16)
    arrays = _with_scores_near(case, -120.0)
    result = forward(arrays, {"scale": 1.0})
    assert (np.abs(result.lse.astype(np.float64) + 120 - np.log(keys)) < 3).all()
    check_forward(arrays, {"scale": 1.0})
    check_backward(arrays, {"scale": 1.0})


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_one_row_with_lse_minus_122(dtype):
    case = cases.Case("decode with a tiny denominator", dtype=dtype, q=1, k=77, d=64)
    arrays = _with_scores_near(case, -122.0 - np.log(77))
    result = forward(arrays, {"scale": 1.0, "causal": True})
    exact = reference.attention(arrays["q"], arrays["k"], arrays["v"], scale=1.0)
    assert np.abs(exact.lse + 122).max() < 3
    # A score of -122 is known to 1e-5 in float32, and so is what follows from it.
    np.testing.assert_allclose(result.lse, exact.lse, rtol=0, atol=4e-5)
    np.testing.assert_allclose(
        result.out.astype(np.float64), exact.out, atol=2e-5 if dtype == "f32" else 2e-2
    )


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_scores(dtype, size):
    """Softmax is a choice of one key; the result is that key's value, not NaN."""
    case = cases.Case("softmax of a winner", dtype=dtype, causal=True)
    arrays = case.arrays()
    options = {"causal": True, "scale": size}
    check_forward(arrays, options)
    # Backward computes P from lse, so it is as inexact as lse's own rounding: eps * max|S|.
    exact = reference.attention_backward(
        *(arrays[name] for name in ("dout", "q", "k", "v")), **options
    )
    result = forward(arrays, options)
    lse = np.finfo(result.lse.dtype).eps * np.abs(result.lse).max()
    eps = lse + float(ml_dtypes.finfo(case.np_dtype).eps)
    for name, got, want in zip(("dq", "dk", "dv"), backward(arrays, options), exact):
        magnitude = np.abs(want).max() if name == "dv" else 100 * size
        error = np.abs(got.astype(np.float64) - want).max()
        assert error <= 4 * eps * magnitude, (name, error, eps * magnitude)


def test_scores_that_grow_along_the_keys():
    """Every tile has a new maximum, so every tile rescales what came before."""
    case = cases.Case("growing", q=65, k=1000, d=16)
    arrays = case.arrays()
    arrays["q"][...], arrays["k"][...] = 1, 0
    arrays["k"][..., 0] = np.linspace(-300, 300, 1000)[None, :, None]
    check_forward(arrays, {"scale": 1.0})
    arrays["k"] = arrays["k"][:, ::-1].copy()
    check_forward(arrays, {"scale": 1.0})


def test_bias_of_minus_infinity_excludes():
    case = cases.Case("-inf bias", q=20, k=70, b=1)
    arrays = case.arrays()
    bias = np.zeros((1, 1, 20, 70), np.float32)
    bias[..., 30:] = -np.inf
    bias[..., 5, :] = -np.inf
    result = forward(arrays, {"bias": bias})
    masked = forward(arrays, {"mask": bias == 0})
    np.testing.assert_allclose(result.out, masked.out, atol=1e-6)
    assert (result.out[:, 5] == 0).all() and np.isneginf(result.lse[..., 5]).all()
    grads = backward(arrays, {"bias": bias}, result=result)
    assert all(np.isfinite(g).all() for g in grads if g is not None)


def _with_scores_near(case, score):
    arrays = case.arrays()
    q, k = (arrays[name].astype(np.float32) * 0.02 for name in "qk")
    arrays["q"] = (q + 1).astype(case.np_dtype)
    arrays["k"] = (k + score / case.d).astype(case.np_dtype)
    return arrays


# ---- rows that see nothing, and rows that see one ------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["causal", "mask", "lengths", "blocks", "window"])
def test_rows_that_see_nothing(dtype, how):
    """out 0, lse -inf, no gradient, by whichever rule they were hidden."""
    case = cases.Case("hidden rows", dtype=dtype, q=96, k=32, b=1)
    arrays, hidden = case.arrays(), slice(0, 64)
    options = {
        "causal": {"causal": True},
        "window": {"window_size": (4, 0)},
        "mask": {"mask": np.arange(96).reshape(1, 1, 96, 1) >= 64},
        "lengths": {"seqlens_k": np.zeros(1, np.int32)},
        "blocks": {
            "block_mask": fc.BlockMask.from_dense(
                np.broadcast_to(np.arange(96)[:, None] >= 64, (96, 32)).copy(), block=(32, 32)
            )
        },
    }[how]
    if how == "lengths":
        hidden = slice(0, 96)
    result = forward(arrays, options)
    assert (result.out[:, hidden] == 0).all()
    assert np.isneginf(result.lse[..., hidden]).all()
    assert np.isneginf(result.max_logits[..., hidden]).all()
    grads = backward(arrays, options, dlse=True)
    assert (grads.dq[:, hidden] == 0).all()
    arrays["dout"][:, hidden] = 1e4  # what flows into them goes nowhere
    assert same_bits((grads.dk, grads.dv), tuple(backward(arrays, options, dlse=True))[1:3])
    check_forward(arrays, options)


def test_rows_that_see_only_a_sink():
    case = cases.Case("only a sink", q=20, k=6, causal=True, sinks=True, b=1)
    options = case.options()
    result = forward(case.arrays(), options)
    assert (result.out[:, :14] == 0).all()
    np.testing.assert_allclose(
        result.lse[0, :, :14], options["sinks"][:, None].repeat(14, 1), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 64, 100])
def test_values_of_one_give_one(dtype, d):
    """P sums to one: rounding it must not bias the output. Within one unit in the last place in
    16 bits; in the wider types within the rounding of a sum of 777 terms."""
    case = cases.Case("ones", dtype=dtype, q=40, k=777, d=d, causal=True)
    arrays = case.arrays()
    arrays["v"][...] = 1
    out = forward(arrays, {"causal": True}).out
    units = 1 if out.dtype.itemsize == 2 else 32
    eps = float(ml_dtypes.finfo(out.dtype).eps)
    assert out.min() >= 1 - units * eps / 2 and out.max() <= 1 + units * eps


# ---- shapes and strides --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_dout_may_be_an_expanded_view(dtype):
    """The gradient of a sum is one number seen through strides of 0."""
    case = cases.Case("expanded dout", dtype=dtype, causal=True)
    arrays = case.arrays()
    for shape in ((1,) * 3 + (64,), (1, 1, 2, 64), (2, 1, 1, 64)):
        one = np.ones(shape, case.np_dtype)
        arrays["dout"] = np.broadcast_to(one, arrays["q"].shape)
        dense = {**arrays, "dout": arrays["dout"].copy()}
        assert same_bits(
            tuple(backward(arrays, {"causal": True})), tuple(backward(dense, {"causal": True}))
        )


def test_q_k_v_may_be_expanded_views():
    case = cases.Case("expanded inputs", h=(4, 4))
    arrays = case.arrays()
    for name in "qkv":
        arrays[name] = np.broadcast_to(arrays[name][:1, :, :1], arrays[name].shape)
    dense = {name: x.copy() for name, x in arrays.items()}
    assert same_bits(tuple(forward(arrays, {})), tuple(forward(dense, {})))


@pytest.mark.parametrize("strides", ["packed", "permuted", "sliced"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_strides_and_layout_change_no_bit(dtype, layout, strides):
    plain = cases.Case("layout", dtype=dtype, h=(4, 2), causal=True)
    case = plain.but(layout=layout, strides=strides)
    want, arrays = plain.arrays(), case.arrays()
    if layout == "bhsd":
        for name in ("q", "k", "v", "dout"):
            arrays[name][...] = want[name].swapaxes(1, 2)
    options = {"causal": True, "layout": layout}
    expected, got = forward(want, {"causal": True}), forward(arrays, options)
    turn = (lambda x: x.swapaxes(1, 2)) if layout == "bhsd" else (lambda x: x)
    assert same_bits(expected.out, turn(got.out))
    assert same_bits((expected.lse, expected.max_logits), (got.lse, got.max_logits))
    grads = backward(arrays, options)
    assert same_bits(tuple(backward(want, {"causal": True}))[:3], tuple(turn(g) for g in grads[:3]))


def test_outputs_are_written_inside_their_bounds_only():
    case = cases.Case("canaries", q=37, k=53, d=24, h=(2, 1))
    arrays = case.arrays()
    room = np.full((2, 37 + 2, 2 + 2, 24 + 2), 7, np.float32)
    out = room[:, 1:-1, 1:-1, 1:-1]
    assert fc.attention(arrays["q"], arrays["k"], arrays["v"], out=out) is out
    assert same_bits(out, fc.attention(arrays["q"], arrays["k"], arrays["v"]))
    out[...] = 7
    assert (room == 7).all()


def test_element_offsets_beyond_2_to_the_31():
    """A view whose batches lie 2.2e9 elements apart; memory is touched only where it is used."""
    gap = 2**31 + 2**20
    try:
        base = np.empty(gap + 2**16, np.float16)  # 4.3 GB of addresses, not of memory
    except MemoryError:
        pytest.skip("not enough address space")
    case = cases.Case("far apart", dtype="f16", b=2, q=64, k=64, d=32)
    near = case.arrays()
    far = dict(near)
    for n, name in enumerate(("q", "k", "v", "dout")):
        inner = tuple(s // 2 for s in near[name].strides[1:])
        view = np.lib.stride_tricks.as_strided(
            base[n * 5000 :], near[name].shape, tuple(2 * s for s in (gap, *inner))
        )
        view[...] = near[name]
        far[name] = view
    assert same_bits(tuple(forward(near, {"causal": True})), tuple(forward(far, {"causal": True})))
    assert same_bits(
        tuple(backward(near, {"causal": True})), tuple(backward(far, {"causal": True}))
    )


@pytest.mark.parametrize("case", cases.EMPTY, ids=str)
def test_empty_shapes_in_both_directions(case):
    arrays, options = case.arrays(), case.options()
    result = forward(arrays, options)
    assert result.out.shape == arrays["dout"].shape
    assert (result.out == 0).all()
    grads = backward(arrays, options, dlse=True)
    assert (grads.dq.shape, grads.dk.shape) == (arrays["q"].shape, arrays["k"].shape)


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_thirty_runs_give_the_same_bits(dtype):
    case = cases.Case(
        "repeatable", dtype=dtype, q=150, k=260, h=(6, 2), causal=True, bias="hqk", sinks=True
    )
    arrays, options = case.arrays(), case.options()
    first = forward(arrays, options, deterministic=True)
    grads = backward(arrays, options, deterministic=True, dlse=True)
    for _ in range(30):
        assert same_bits(tuple(first), tuple(forward(arrays, options)))
        assert same_bits(
            tuple(grads), tuple(backward(arrays, options, deterministic=True, dlse=True))
        )


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_alone_or_in_a_batch(dtype):
    """split_size makes a sequence's result independent of what shares the call."""
    case = cases.Case("batch of five", dtype=dtype, b=5, q=3, k=700, h=(4, 2))
    arrays = case.arrays()
    for options in ({"split_size": 256}, {"split_size": 64, "causal": True}):
        whole = forward(arrays, options)
        for b in range(5):
            one = {name: arrays[name][b : b + 1] for name in ("q", "k", "v")}
            alone = forward(one, options)
            assert same_bits(tuple(alone), tuple(x[b : b + 1] for x in whole))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_any_number_of_splits_is_right(dtype, num_splits):
    case = cases.Case("splits", dtype=dtype, q=5, k=900, h=(4, 2), causal=True)
    arrays = case.arrays()
    result = forward(arrays, {"causal": True, "num_splits": num_splits})
    assert_close_to_reference(result, arrays["q"], arrays["k"], arrays["v"], causal=True)


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [8, 33, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_block_sparse_causal_is_causal(dtype, d):
    """Blocks of one key and row draw the diagonal exactly: gradients too, at every head dim."""
    case = cases.Case("diagonal of blocks", dtype=dtype, q=70, k=70, d=d, b=1, h=(2, 1))
    arrays = case.arrays()
    diagonal = np.tril(np.ones((70, 70), bool))
    mask = fc.BlockMask.from_dense(diagonal, block=(1, 1))
    coarse = fc.BlockMask.from_dense(diagonal, block=(16, 16), keep_partial=True)
    causal = {"causal": True}
    want, grads = forward(arrays, causal), backward(arrays, causal)
    for options in ({"block_mask": mask}, {"block_mask": coarse, "causal": True}):
        assert_close_to_reference(
            forward(arrays, options), arrays["q"], arrays["k"], arrays["v"], **causal
        )
        got = backward(arrays, options, result=want)
        assert_grads_close_to_reference(
            got, arrays["dout"], arrays["q"], arrays["k"], arrays["v"], **causal
        )
    assert grads.dq.shape == arrays["q"].shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_prefix_and_suffix_is_the_whole(dtype):
    case = cases.Case("prefix and suffix", dtype=dtype, q=60, k=200, h=(4, 2))
    a = case.arrays()
    whole = forward(a, {})
    wide = "float64" if dtype == "f64" else "float32"
    for cut in (1, 64, 199, 200):
        parts = [
            fc.attention(a["q"], a["k"][:, keys], a["v"][:, keys], return_lse=True, out_dtype=wide)
            for keys in (slice(0, cut), slice(cut, None))
        ]
        out, lse = fc.merge(
            [p.out for p in parts], [p.lse for p in parts], out_dtype=a["q"].dtype.name
        )
        assert out.dtype == a["q"].dtype
        assert_close_to_reference((out, lse, None), a["q"], a["k"], a["v"])
    assert whole.out.shape == out.shape


def test_merge_where_no_part_sees_anything():
    out = np.zeros((1, 3, 1, 4), np.float32)
    lse = np.full((1, 1, 3), -np.inf, np.float32)
    merged, total = fc.merge([out, out], [lse, lse])
    assert (merged == 0).all() and np.isneginf(total).all()


@pytest.mark.parametrize("q,k", [(30, 90), (90, 30), (1, 77), (77, 1)])
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_both_alignments_when_lengths_differ(dtype, align, q, k):
    case = cases.Case("alignment", dtype=dtype, q=q, k=k, causal=True, align=align)
    arrays, options = case.arrays(), case.options()
    check_forward(arrays, options)
    check_backward(arrays, options)
    offset = 0 if align == "top_left" else k - q
    assert same_bits(
        tuple(forward(arrays, options)),
        tuple(forward(arrays, {"causal": True, "q_offset": offset})),
    )


def test_max_seqlen_must_be_a_plain_number():
    """A 0-d array in its place is a device read in disguise."""
    case = cases.Case("0-d bound", packed_q=(3, 4), packed_k=(3, 4))
    arrays, options = case.arrays(), case.options()
    torch = pytest.importorskip("torch")
    for bad in (torch.tensor(4), "4", 4.0, [4]):
        with pytest.raises(fc.ArgumentError, match="max_seqlen_q"):
            forward(arrays, {**options, "max_seqlen_q": bad})
    assert to_numpy(None) is None


# ---- what is visible does matter -----------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 8, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_sees_only_nan_is_nan(dtype, rows):
    """And not taken for a row that sees nothing, although a maximum passes over NaN."""
    case = cases.Case("nan row", dtype=dtype, q=rows, k=9, d=16)
    arrays = case.arrays()
    arrays["q"][0, 0, 0, 0] = np.nan
    q, k, v = (arrays[name] for name in "qkv")
    result = fc.attention(q, k, v, return_lse=True, return_max_logits=True)
    assert np.isnan(to_numpy(result.out)[0, 0, 0]).all()
    assert np.isnan(result.lse[0, 0, 0]) and np.isnan(result.max_logits[0, 0, 0])
    assert np.isfinite(to_numpy(result.out)[0, 1:]).all()
    merged, lse = fc.merge([result.out], [result.lse])
    assert np.isnan(to_numpy(merged)[0, 0, 0]).all() and np.isnan(lse[0, 0, 0])


@pytest.mark.parametrize("scale", [1e6, 1e9, 1e12, -1e9])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_scores_of_any_magnitude(dtype, rows, scale):
    """The rounding of a score this large exceeds the range of the exponential."""
    case = cases.Case("huge", dtype=dtype, q=rows, k=70, d=16)
    arrays = case.arrays()
    q, k, v = (arrays[name] for name in "qkv")
    result = fc.attention(q, k, v, scale=scale, return_lse=True)
    exact = reference.attention(q, k, v, scale=scale)
    np.testing.assert_allclose(result.lse, exact.lse, rtol=1e-5)
    assert np.isfinite(result.out).all()
    if dtype == "f64":  # in float32 the scores themselves are only near the exact ones
        np.testing.assert_allclose(result.out, exact.out, rtol=1e-3)
