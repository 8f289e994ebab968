"""Packed sequences: against the reference, and against the same sequences one by one."""

import cases
import numpy as np
import pytest
from helpers import backward, check_backward, check_forward, forward, same_bits

import flashcore as fc


@pytest.mark.parametrize("case", cases.VARLEN, ids=str)
def test_forward_matches_reference(case):
    check_forward(case.arrays(), case.options())


@pytest.mark.parametrize("case", cases.VARLEN, ids=str)
def test_backward_matches_reference(case):
    check_backward(case.arrays(), case.options(), dlse=True)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_sequences_one_by_one(dtype, causal):
    case = cases.Case(
        "one by one",
        dtype=dtype,
        packed_q=(5, 130, 1, 64),
        h=(4, 2),
        packed_k=(9, 200, 31, 64),
        causal=causal,
    )
    a, o = case.arrays(), case.options()
    whole, grads = forward(a, o), backward(a, o)
    for rows, keys in _spans(o):
        one = {
            "q": a["q"][None, rows],
            "k": a["k"][None, keys],
            "v": a["v"][None, keys],
            "dout": a["dout"][None, rows],
        }
        alone = forward(one, {"causal": causal})
        assert same_bits(whole.out[rows], alone.out[0])
        assert same_bits(whole.lse[:, rows], alone.lse[0])
        g = backward(one, {"causal": causal}, result=alone)
        assert same_bits(
            (grads.dq[rows], grads.dk[keys], grads.dv[keys]), (g.dq[0], g.dk[0], g.dv[0])
        )


def test_max_seqlen_bounds_change_nothing():
    case = cases.Case("bounds", packed_q=(5, 64, 130), packed_k=(7, 64, 100), causal=True)
    a, o = case.arrays(), case.options()
    exact = forward(a, o)
    for bound in (
        {"max_seqlen_q": 130, "max_seqlen_k": 100},
        {"max_seqlen_q": 194},
        {"max_seqlen_k": 171},
    ):
        assert same_bits(tuple(forward(a, {**o, **bound})), tuple(exact))


def test_padded_equals_packed():
    """Valid lengths of a padded batch and cu_seqlens say the same thing."""
    lengths_q, lengths_k = (30, 0, 17), (41, 5, 50)
    packed = cases.Case("packed", packed_q=lengths_q, packed_k=lengths_k, causal=True)
    a, o = packed.arrays(), packed.options()
    padded = {
        name: np.full((3, 50) + a[name].shape[1:], np.nan, np.float32)
        for name in ("q", "k", "v", "dout")
    }
    for b, (rows, keys) in enumerate(_spans(o)):
        for name, span in (("q", rows), ("k", keys), ("v", keys), ("dout", rows)):
            padded[name][b, : span.stop - span.start] = a[name][span]
    options = {
        "causal": True,
        "seqlens_q": np.array(lengths_q, np.int32),
        "seqlens_k": np.array(lengths_k, np.int32),
    }
    one, other = forward(a, o), forward(padded, options)
    g_one, g_other = backward(a, o), backward(padded, options, result=other)
    for b, (rows, keys) in enumerate(_spans(o)):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        assert same_bits(one.out[rows], other.out[b, :n])
        assert same_bits(one.lse[:, rows], other.lse[b, :, :n])
        for name, span, size in (("dq", rows, n), ("dk", keys, m), ("dv", keys, m)):
            assert same_bits(getattr(g_one, name)[span], getattr(g_other, name)[b, :size])
            assert not getattr(g_other, name)[b, size:].any()


def test_ten_thousand_small_sequences():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, 12_000)
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    q, k, v = (rng.standard_normal((cu[-1], 1, 8)).astype(np.float32) for _ in range(3))
    out = fc.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
    first = cu[:-1][lengths > 0]
    np.testing.assert_array_equal(out[first], v[first])  # one visible key
    some = rng.choice(np.flatnonzero(lengths), 200, replace=False)
    for b in some:
        span = slice(cu[b], cu[b + 1])
        alone = fc.attention(q[None, span], k[None, span], v[None, span], causal=True)
        assert same_bits(out[span], alone[0])


def test_a_large_padded_batch():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((20_000, 2, 1, 8)).astype(np.float32) for _ in range(3))
    out = fc.attention(q, k, v, causal=True)
    np.testing.assert_array_equal(out[:, 0], v[:, 0])
    assert np.isfinite(out).all()


def _spans(options):
    cu_q, cu_k = options["cu_seqlens_q"], options["cu_seqlens_k"]
    return [
        (slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])) for b in range(len(cu_q) - 1)
    ]
