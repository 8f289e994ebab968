"""Laws that hold for every input, and random problems against the reference."""

import cases
import numpy as np
from helpers import backward, check_backward, check_forward, forward
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashcore as fc
from flashcore.testing import assert_close_to_reference

EXAMPLES = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def problems(draw):
    """Any shape and any combination of options that api.md allows."""
    pick = lambda *values: draw(st.sampled_from(values))
    batch, rows, keys = draw(st.integers(1, 3)), draw(st.integers(1, 80)), draw(st.integers(1, 80))
    group, heads_kv = pick(1, 1, 2, 3), pick(1, 2)
    broadcast = st.sampled_from(["", "", "bhqk", "qk", "hq", "bk", "k"])
    lengths = lambda n: draw(st.none() | st.tuples(*[st.integers(0, n)] * batch))
    varlen = draw(st.integers(0, 3)) == 0
    side = st.none() | st.integers(0, 60)
    sizes = lambda n: draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch))
    case = cases.Case(
        "random",
        dtype=pick("f32", "f32", "f64", "bf16", "f16"),
        b=batch,
        q=rows,
        k=keys,
        h=(group * heads_kv, heads_kv),
        d=draw(st.integers(1, 70)),
        dv=draw(st.none() | st.integers(1, 70)),
        causal=draw(st.booleans()),
        window=pick((None, None), (draw(side), draw(side))),
        align=pick("bottom_right", "top_left"),
        q_offset=draw(st.none() | st.integers(-50, 50)),
        softcap=pick(0.0, 0.0, 1.0, 20.0),
        alibi=pick("", "", "h", "bh"),
        bias=draw(broadcast),
        mask=draw(broadcast),
        sinks=draw(st.booleans()),
        dropout=pick(0.0, 0.0, 0.0, 0.3),
    )
    if varlen:
        case = case.but(packed_q=tuple(sizes(60)), packed_k=tuple(sizes(60)))
        if not sum(case.packed_q):
            case = case.but(packed_q=(1, *case.packed_q[1:]))
        if max(case.packed_k) == 0:
            case = case.but(packed_k=(1, *case.packed_k[1:]))
    else:
        case = case.but(
            layout=pick("bshd", "bhsd"),
            strides=pick("packed", "permuted", "sliced"),
            lengths_q=lengths(rows),
            lengths_k=lengths(keys),
            blocks=pick(None, None, None, (16, 16), (7, 33)),
        )
    return case


@EXAMPLES
@given(problems(), st.integers(0, 2**20))
def test_random_problem_forward(case, seed):
    check_forward(case.arrays(seed), case.options(seed))


@EXAMPLES
@given(problems(), st.integers(0, 2**20))
def test_random_problem_backward(case, seed):
    check_backward(case.arrays(seed), case.options(seed), dlse=True)


SMALL = cases.Case("laws", q=40, k=90, h=(4, 2), d=24)
seeds = st.integers(0, 2**20)


def near(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@settings(EXAMPLES, max_examples=15)
@given(seeds)
def test_permuting_keys_changes_nothing(seed):
    a = SMALL.arrays(seed)
    order = np.random.default_rng(seed).permutation(90)
    b = {**a, "k": a["k"][:, order], "v": a["v"][:, order]}
    one, other = forward(a, {}), forward(b, {})
    near(one.out, other.out)
    near(one.lse, other.lse)
    g, p = backward(a, {}), backward(b, {})
    near(g.dq, p.dq)
    near(g.dk[:, order], p.dk)
    near(g.dv[:, order], p.dv)


@settings(EXAMPLES, max_examples=15)
@given(seeds)
def test_permuting_rows_permutes_the_result_bitwise(seed):
    a = SMALL.but(q=64).arrays(seed)
    order = np.random.default_rng(seed).permutation(64)
    np.testing.assert_array_equal(
        forward({**a, "q": a["q"][:, order]}, {}).out, forward(a, {}).out[:, order]
    )


@settings(EXAMPLES, max_examples=15)
@given(seeds, st.floats(0.01, 100))
def test_scale_moves_into_q_and_k(seed, factor):
    a = SMALL.arrays(seed)
    factor = np.float32(factor)
    b = {**a, "q": a["q"] * factor, "k": a["k"] / factor}
    near(forward(a, {}).out, forward(b, {}).out, 1e-4)
    two = {**a, "q": a["q"] * np.float32(2)}
    np.testing.assert_array_equal(
        forward(two, {"scale": 0.125}).out, forward(a, {"scale": 0.25}).out
    )


@settings(EXAMPLES, max_examples=15)
@given(seeds, st.floats(-50, 50))
def test_a_constant_bias_moves_lse_alone(seed, constant):
    a = SMALL.arrays(seed)
    plain, moved = forward(a, {}), forward(a, {"bias": np.full((1, 1, 1, 1), constant, np.float32)})
    near(plain.out, moved.out, 1e-4)
    near(plain.lse + np.float32(constant), moved.lse, 1e-5)


@settings(EXAMPLES, max_examples=15)
@given(seeds)
def test_output_is_linear_in_v_and_inside_its_hull(seed):
    a = SMALL.arrays(seed)
    out = forward(a, {}).out
    near(forward({**a, "v": 3 * a["v"] + 1}, {}).out, 3 * out + 1)
    low, high = (f(a["v"].repeat(2, 2), axis=1, keepdims=True) for f in (np.min, np.max))
    assert (out >= low - 1e-5).all() and (out <= high + 1e-5).all()


@settings(EXAMPLES, max_examples=15)
@given(seeds, st.lists(st.integers(0, 90), min_size=1, max_size=5))
def test_merge_in_any_grouping(seed, cuts):
    """Any partition of the keys, merged at once, in pairs, or in reverse, is the whole."""
    a = SMALL.arrays(seed)
    edges = [0, *sorted(cuts), 90]
    parts = [
        fc.attention(a["q"], a["k"][:, i:j], a["v"][:, i:j], return_lse=True)
        for i, j in zip(edges, edges[1:])
    ]
    outs, lses = [p.out for p in parts], [p.lse for p in parts]
    assert_close_to_reference((*fc.merge(outs, lses), None), a["q"], a["k"], a["v"])
    assert_close_to_reference((*fc.merge(outs[::-1], lses[::-1]), None), a["q"], a["k"], a["v"])
    out, lse = outs[0], lses[0]
    for o, l in zip(outs[1:], lses[1:]):
        out, lse = fc.merge([out, o], [lse, l])
    whole = forward(a, {})
    near(out, whole.out)
    near(lse, whole.lse)


@settings(EXAMPLES, max_examples=15)
@given(seeds)
def test_a_window_wider_than_the_keys_is_none(seed):
    a = SMALL.arrays(seed)
    np.testing.assert_array_equal(forward(a, {"window_size": (500, 500)}).out, forward(a, {}).out)


@settings(EXAMPLES, max_examples=10)
@given(seeds)
def test_each_way_to_say_causal(seed):
    a = SMALL.arrays(seed)
    want = forward(a, {"causal": True}).out
    i, j = np.arange(40)[:, None], np.arange(90)
    visible = (j <= i + 50)[None, None]
    near(want, forward(a, {"window_size": (None, 0)}).out, 0)
    near(want, forward(a, {"mask": visible}).out)
    bias = np.where(visible, 0, -np.inf).astype(np.float32)
    near(want, forward(a, {"bias": bias}).out)


@settings(EXAMPLES, max_examples=10)
@given(seeds)
def test_grouped_heads_are_repeated_heads(seed):
    a = SMALL.arrays(seed)
    repeated = {**a, "k": a["k"].repeat(2, axis=2), "v": a["v"].repeat(2, axis=2)}
    np.testing.assert_array_equal(
        forward(a, {"causal": True}).out, forward(repeated, {"causal": True}).out
    )
    g, r = backward(a, {"causal": True}), backward(repeated, {"causal": True})
    near(g.dk, r.dk.reshape(2, 90, 2, 2, 24).sum(3))
    near(g.dv, r.dv.reshape(2, 90, 2, 2, 24).sum(3))
