"""Every gradient of every case against the float64 reference, by the error rule."""

import cases
import numpy as np
import pytest
from helpers import backward, check_backward, forward

import flashcore as fc
from flashcore.testing import assert_grads_close_to_reference


@pytest.mark.parametrize("case", cases.BACKWARD, ids=str)
def test_matches_reference(case):
    check_backward(case.arrays(), case.options(), dlse=True)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_without_dlse(dtype):
    case = cases.Case("dlse left out", dtype=dtype, causal=True, h=(4, 2), sinks=True)
    check_backward(case.arrays(), case.options())


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_accumulate_adds(dtype):
    case = cases.Case("accumulate", dtype=dtype, bias="hqk", sinks=True)
    arrays, options = case.arrays(), case.options()
    plain = backward(arrays, options)
    into = {name: np.full(x.shape, 3, np.float32) for name, x in zip(("dq", "dk", "dv"), plain)}
    sums = backward(arrays, options, accumulate=True, **into)
    for name in into:
        assert getattr(sums, name) is into[name]
        fresh = backward(arrays, options, **{name: np.empty_like(into[name])})
        np.testing.assert_allclose(into[name], getattr(fresh, name) + 3, rtol=1e-5, atol=1e-5)


def test_float32_gradients_of_16_bit_inputs():
    case = cases.Case("float32 gradients", dtype="bf16", causal=True)
    arrays = case.arrays()
    into = {"d" + name: np.empty(arrays[name].shape, np.float32) for name in "qkv"}
    grads = backward(arrays, case.options(), **into)
    assert grads.dq is into["dq"]
    assert_grads_close_to_reference(
        grads, arrays["dout"], arrays["q"], arrays["k"], arrays["v"], causal=True
    )


def test_strided_gradient_outputs():
    case = cases.Case("outputs with strides of their own", h=(4, 2))
    arrays, options = case.arrays(), case.options()
    plain = backward(arrays, options)
    into = {}
    for name in "qkv":
        b, s, h, d = arrays[name].shape
        room = np.full((h, s, b, d + 5), 7, np.float32)
        into["d" + name] = room.transpose(2, 1, 0, 3)[..., :d]
    grads = backward(arrays, options, **into)
    for got, want in zip(grads[:3], plain[:3]):
        np.testing.assert_array_equal(got, want)
        assert (got.base[..., -5:] == 7).all()


def test_out_and_lse_of_another_precision_still_work():
    case = cases.Case("float32 out of a bf16 forward", dtype="bf16", causal=True)
    arrays = case.arrays()
    result = forward(arrays, {"causal": True, "out_dtype": "float32"})
    assert result.out.dtype == np.float32
    grads = fc.attention_backward(
        arrays["dout"].astype(np.float32),
        arrays["q"],
        arrays["k"],
        arrays["v"],
        result.out,
        result.lse,
        causal=True,
    )
    assert_grads_close_to_reference(
        grads, arrays["dout"], arrays["q"], arrays["k"], arrays["v"], causal=True
    )
