"""The error rule accepts what it should and names what it refuses."""

import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, Case

from flashcore import reference, testing

CASE = Case("any", b=1, q=20, k=30, d=16, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_attention_passes(dtype):
    case = CASE.but(dtype=dtype)
    a = case.arrays()
    plain = reference.attention(a["q"], a["k"], a["v"], precision=a["q"].dtype, causal=True)
    out = plain.out.astype(a["q"].dtype)
    testing.assert_close_to_reference(
        (out, plain.lse, plain.max_logits), a["q"], a["k"], a["v"], causal=True
    )
    grads = reference.attention_backward(
        a["dout"], a["q"], a["k"], a["v"], precision=a["q"].dtype, causal=True
    )
    grads = [None if g is None else g.astype(a["q"].dtype) for g in grads]
    testing.assert_grads_close_to_reference(grads, a["dout"], a["q"], a["k"], a["v"], causal=True)


@pytest.mark.parametrize("wrong", [1.0, np.nan, np.inf])
def test_one_wrong_element_is_found(wrong):
    a = CASE.arrays()
    out = reference.attention(a["q"], a["k"], a["v"], causal=True).out.astype(np.float32)
    out[0, 7, 1, 3] += wrong
    with pytest.raises(AssertionError, match=r"out float32: error .* at \(0, 7, 1, 3\)"):
        testing.assert_close_to_reference(out, a["q"], a["k"], a["v"], causal=True)


def test_wrong_shape_and_wrong_infinity():
    exact = np.array([1.0, -np.inf])
    testing.assert_within_rule("lse", exact.astype(np.float32), exact, exact)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_within_rule("lse", exact[:1], exact, exact)
    for bad in (np.inf, np.nan, 0.0):
        with pytest.raises(AssertionError, match=r"at \(1,\)"):
            testing.assert_within_rule("lse", np.array([1.0, bad], np.float32), exact, exact)


def test_a_mask_that_is_forgotten_is_found():
    a = CASE.arrays()
    full = reference.attention(a["q"], a["k"], a["v"]).out.astype(np.float32)
    with pytest.raises(AssertionError, match="elements are outside"):
        testing.assert_close_to_reference(full, a["q"], a["k"], a["v"], causal=True)


@pytest.mark.parametrize("seed", [292, 712, 1632])  # of the few in 3000 where plain is this lucky
def test_dsinks_from_a_rounded_out_pass(seed):
    """The backward is given out in 16 bits. One head's dsinks is one number: where plain attention
    gets it right by luck, that rounding alone is more than 64 times as inexact."""
    rng = np.random.default_rng(seed)
    q, k, v, dout = (
        rng.standard_normal((1, n, 1, 16)).astype(ml_dtypes.bfloat16) for n in (8, 4, 4, 8)
    )
    sinks = np.zeros(1, np.float32)
    exact = reference.attention(q, k, v, sinks=sinks)
    p_sink = np.exp(sinks[:, None] - exact.lse)
    out = exact.out.astype(q.dtype).astype(np.float64)
    dsinks = -(p_sink * np.swapaxes((out * dout.astype(np.float64)).sum(-1), 1, 2)).sum((0, 2))
    grads = reference.Grads(None, None, None, None, dsinks.astype(np.float32))
    testing.assert_grads_close_to_reference(grads, dout, q, k, v, sinks=sinks)
