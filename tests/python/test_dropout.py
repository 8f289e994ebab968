"""Dropout bits are a pure function of (seed, offset, b, h, i, j): everywhere, for everyone."""

import cases
import numpy as np
import pytest
from helpers import backward, check_backward, forward, same_bits

import flashcore as fc
from flashcore import reference


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 2**-17, 1 - 2**-16])
@pytest.mark.parametrize("rng", [(0, 0), (1, 2), (-1, -1), (2**62 + 5, 3), (7, 2**40)])
def test_mask_is_the_definition(p, rng):
    shape = (2, 3, 21, 37)
    np.testing.assert_array_equal(
        fc.dropout_mask(shape, p, rng), reference.dropout_mask(shape, p, rng)
    )


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("h,layout", [((2, 2), "bshd"), ((4, 1), "bhsd")])
def test_kernels_drop_what_the_mask_says(dtype, h, layout):
    """With one-hot values the output is P itself: its zeros are the dropped entries."""
    keys = 70
    case = cases.Case(
        "one-hot v", dtype=dtype, b=2, q=50, k=keys, d=16, dv=keys, h=h, layout=layout
    )
    a = case.arrays()
    eye = np.eye(keys, dtype=a["v"].dtype)
    a["v"][...] = eye[:, None] if layout == "bshd" else eye
    rng = (99, 3)
    p = forward(a, {"dropout_p": 0.4, "rng": rng, "layout": layout}).out
    kept = p if layout == "bhsd" else p.swapaxes(1, 2)
    np.testing.assert_array_equal(kept != 0, fc.dropout_mask((2, h[0], 50, keys), 0.4, rng))


def test_statistics():
    p = 0.3
    keep = fc.dropout_mask((4, 4, 512, 512), p, (5, 6)).astype(np.float64)
    n = keep.size
    sigma = np.sqrt(p * (1 - p) / n)
    assert abs(keep.mean() - (1 - p)) < 5 * sigma
    x = keep - (1 - p)
    for axis in range(4):  # neighbours along every axis are independent
        a, b = np.moveaxis(x, axis, 0)[:-1], np.moveaxis(x, axis, 0)[1:]
        assert abs((a * b).mean()) < 5 * p * (1 - p) / np.sqrt(a.size)
    for axis in (0, 1, 2, 3):  # and no head, batch, row or key is luckier
        count = n // keep.shape[axis]
        means = np.moveaxis(x, axis, 0).reshape(keep.shape[axis], -1).mean(1)
        assert np.abs(means).max() < 6 * np.sqrt(p * (1 - p) / count)


def test_seeds_and_offsets_are_unrelated():
    masks = [
        fc.dropout_mask((1, 1, 256, 256), 0.5, rng)
        for rng in ((0, 0), (1, 0), (0, 1), (1, 1), (2**32, 0), (0, 2**32))
    ]
    for n, a in enumerate(masks):
        for b in masks[:n]:
            assert abs((a == b).mean() - 0.5) < 0.02


def test_rng_as_an_array_is_the_same():
    case = cases.Case("rng array")
    a = case.arrays()
    assert same_bits(
        tuple(forward(a, {"dropout_p": 0.2, "rng": (7, 8)})),
        tuple(forward(a, {"dropout_p": 0.2, "rng": np.array([7, 8], np.int64)})),
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_same_bits_for_every_split_and_thread_count(dtype):
    case = cases.Case("splits", dtype=dtype, q=10, k=600, d=32, dv=600)
    a = case.arrays()
    a["v"][...] = np.eye(600, dtype=a["v"].dtype)[:, None]
    options = {"dropout_p": 0.25, "rng": (1, 2)}
    want = fc.dropout_mask((2, 2, 10, 600), 0.25, (1, 2))
    for more in ({"num_splits": 1}, {"num_splits": 4}, {"split_size": 100}):
        out = forward(a, {**options, **more}).out
        np.testing.assert_array_equal(out.swapaxes(1, 2) != 0, want)


def test_lse_is_of_the_undropped_softmax():
    case = cases.Case("lse", causal=True)
    a = case.arrays()
    plain = forward(a, {"causal": True})
    dropped = forward(a, {"causal": True, "dropout_p": 0.5, "rng": (1, 1)})
    assert same_bits((plain.lse, plain.max_logits), (dropped.lse, dropped.max_logits))


def test_p_of_zero_changes_nothing():
    a = cases.Case("p = 0").arrays()
    assert same_bits(tuple(forward(a, {})), tuple(forward(a, {"dropout_p": 0.0, "rng": (1, 2)})))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_gradients(dtype, p):
    case = cases.Case("gradients", dtype=dtype, q=70, k=90, h=(4, 2), causal=True, dropout=p)
    check_backward(case.arrays(), case.options(), dlse=True)


def test_backward_regenerates_the_same_mask():
    """One key: dv is dout / (1 - p) where kept, 0 where dropped, summed over rows."""
    case = cases.Case("one key", q=33, k=1, d=8, b=1, h=(1, 1))
    a = case.arrays()
    options = {"dropout_p": 0.5, "rng": (3, 4)}
    keep = fc.dropout_mask((1, 1, 33, 1), 0.5, (3, 4))[0, 0, :, 0]
    dv = backward(a, options).dv[0, 0, 0]
    np.testing.assert_allclose(dv, 2 * a["dout"][0, keep, 0].sum(0), rtol=1e-5, atol=1e-5)
