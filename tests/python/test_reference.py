"""The reference itself: gradients against finite differences, bits against published ones."""

import numpy as np
import pytest
from cases import Case

from flashcore import reference

TINY = Case("small enough for finite differences", dtype="f64", b=2, q=4, k=5, h=(2, 1), d=3, dv=2)
CASES = [
    TINY,
    TINY.but(causal=True, q=6, k=4),
    TINY.but(window=(1, 1), align="top_left"),
    TINY.but(softcap=0.7),
    TINY.but(alibi="bh", causal=True, q_offset=(2, 0)),
    TINY.but(bias="hq", mask="bk"),
    TINY.but(bias="bhqk", layout="bhsd", h=(2, 2)),
    TINY.but(sinks=True, causal=True, q=6, k=4),
    TINY.but(lengths_q=(2, 4), lengths_k=(5, 0), sinks=True, bias="k"),
    TINY.but(dropout=0.4),
    TINY.but(packed_q=(2, 0, 3), packed_k=(3, 2, 4), causal=True, bias="bq"),
    TINY.but(softcap=0.7, bias="hqk", sinks=True, dropout=0.3, causal=True, alibi="h"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_match_finite_differences(case):
    arrays, options = case.arrays(), case.options()
    wide = {name: arrays[name].astype(np.longdouble) for name in arrays}
    for name in ("bias", "sinks"):
        if name in options:
            options[name] = options[name].astype(np.longdouble)

    def loss(**changed):
        a = {**wide, **{n: x for n, x in changed.items() if n in wide}}
        o = {**options, **{n: x for n, x in changed.items() if n in options}}
        r = reference.attention(a["q"], a["k"], a["v"], precision=np.longdouble, **o)
        lse = np.where(np.isfinite(r.lse), r.lse, 0)
        return (r.out * a["dout"]).sum() + (lse * a["dlse"]).sum()

    grads = reference.attention_backward(
        wide["dout"],
        wide["q"],
        wide["k"],
        wide["v"],
        dlse=wide["dlse"],
        precision=np.longdouble,
        **options,
    )
    step = np.longdouble(1e-5)
    for name, grad in zip(("q", "k", "v", "bias", "sinks"), grads):
        x = wide.get(name, options.get(name))
        if x is None:
            assert grad is None
            continue
        assert grad.shape == x.shape
        for at in np.ndindex(x.shape):
            up, down = x.copy(), x.copy()
            up[at] += step
            down[at] -= step
            slope = (loss(**{name: up}) - loss(**{name: down})) / (2 * step)
            assert abs(slope - grad[at]) < 1e-8 * (1 + abs(slope)), (name, at)


def test_forward_is_the_formula():
    """Against four lines that share nothing with the reference."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 7, 1, 4)) for _ in range(3))
    s = np.einsum("id,jd->ij", q[0, :, 0], k[0, :, 0]) / 2
    s[np.triu_indices(7, 1)] = -np.inf
    p = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    result = reference.attention(q, k, v, causal=True)
    np.testing.assert_allclose(result.out[0, :, 0], p @ v[0, :, 0], rtol=1e-13)
    np.testing.assert_allclose(result.lse[0, 0], np.log(np.exp(s).sum(1)), rtol=1e-13)
    np.testing.assert_allclose(result.max_logits[0, 0], s.max(1), rtol=1e-13)


def test_excluded_keys_may_be_nan():
    case = TINY.but(q=5, k=5, causal=True, b=1)
    arrays = case.arrays()
    clean = reference.attention(arrays["q"], arrays["k"], arrays["v"], causal=True)
    arrays["k"][0, 4], arrays["v"][0, 4] = np.nan, np.inf
    dirty = reference.attention(arrays["q"], arrays["k"], arrays["v"], causal=True)
    # With a NaN about, the reference multiplies row by row, and NumPy may round differently.
    np.testing.assert_allclose(dirty.out[0, :4], clean.out[0, :4], rtol=1e-13)
    np.testing.assert_allclose(dirty.lse[0, :, :4], clean.lse[0, :, :4], rtol=1e-13)


def test_philox_known_answers():
    def words(counter, key):
        out = reference.philox4x32_10(np.array(counter, np.uint32), key)
        return [f"{int(x):08x}" for x in out]

    ones = 2**32 - 1
    assert words([0] * 4, (0, 0)) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words([ones] * 4, (ones, ones)) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    assert words([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0)) == [
        "d16cfe09",
        "94fdcceb",
        "5001e420",
        "24126ea1",
    ]


def test_half_precision_is_less_exact():
    case = Case("any", dtype="bf16", b=1, q=40, k=60, d=32)
    a = case.arrays()
    exact, half = (
        reference.attention(a["q"], a["k"], a["v"], precision=p).out
        for p in (np.float64, a["q"].dtype)
    )
    assert 1e-4 < np.abs(exact - half).max() < 2e-2
