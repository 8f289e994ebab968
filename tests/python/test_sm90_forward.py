"""The Hopper forward kernels, on torch tensors, against the float64 reference and the CPU backend.

A call that the installed build refuses is skipped with the refusal. Each test has a time limit of
its own (conftest.py), so that a kernel that hangs ends the run.
"""

import random

import cases
import numpy as np
import pytest
from cases import Case
from gpu import (
    ONE_PART,
    Run,
    assert_near_the_cpu,
    assert_same_bits,
    check,
    on_gpu,
    run,
    why_refused,
)

import flashcore as fc
from flashcore.testing import assert_close_to_reference, assert_within_rule, to_numpy

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

NAN, INF = float("nan"), float("inf")


def every_kernel(*dims: int) -> list:
    """(d, more) for a test whose call is small: at head dims 128 and 256 there are kernels for such
    calls alone, so there the call is also made for the one that a larger batch would get."""
    return [
        pytest.param(d, more, id=f"{d}-main" if more else f"{d}")
        for d in dims
        for more in (({}, ONE_PART) if d in (128, 256) else ({},))
    ]


# ---- every option -------------------------------------------------------------------------------

PLAIN = Case("", dtype="bf16", q=200, k=300, h=(2, 1))  # two query tiles, at least two key blocks
SQUARE = PLAIN.but(q=300, k=300)
PACKED = PLAIN.but(packed_q=(5, 130, 0, 1, 193, 64), packed_k=(7, 200, 9, 90, 193, 64))

VARIANTS = {
    "full": [PLAIN, PLAIN.but(dtype="f16"), PLAIN.but(q=129, k=1), PLAIN.but(q=1, k=700)],
    "causal": [
        PLAIN.but(causal=True),
        SQUARE.but(causal=True, dtype="f16"),
        PLAIN.but(causal=True, q=300, k=130),  # rows that see nothing
        PLAIN.but(causal=True, align="top_left"),
        PLAIN.but(causal=True, align="top_left", q=300, k=130),
        PLAIN.but(causal=True, q_offset=17),
        PLAIN.but(causal=True, q_offset=-140),
        PLAIN.but(causal=True, q_offset=500),  # past every key
        PLAIN.but(causal=True, q_offset=(180, -7)),
        PLAIN.but(causal=True, q_offset=(0, -300)),  # the second sequence sees nothing
    ],
    "window": [
        PLAIN.but(window=(100, None)),
        PLAIN.but(window=(None, 40)),
        PLAIN.but(window=(90, 150)),
        PLAIN.but(window=(5, 3)),
        SQUARE.but(window=(0, 0)),
        PLAIN.but(window=(5000, 5000)),
        PLAIN.but(window=(64, None), causal=True),
        SQUARE.but(window=(127, 0), dtype="f16"),
        PLAIN.but(window=(20, 10), q_offset=600),  # past every key
        PLAIN.but(window=(30, 30), q_offset=(-100, 300)),  # rows before and past the keys
        PLAIN.but(window=(200, 0), q=300, k=130),
    ],
    "softcap": [
        PLAIN.but(softcap=1.5),
        PLAIN.but(softcap=30.0, causal=True, dtype="f16"),
        PLAIN.but(softcap=2.0, window=(70, 9)),
        PLAIN.but(softcap=5.0, scale=2.0, q=300, k=130, causal=True),
    ],
    "alibi": [
        PLAIN.but(alibi="h"),
        PLAIN.but(alibi="bh", causal=True),
        PLAIN.but(alibi="bh", window=(90, 20), dtype="f16"),
        PLAIN.but(alibi="h", q_offset=-50, h=(4, 2)),
    ],
    "sinks": [
        PLAIN.but(sinks=True),
        PLAIN.but(sinks=True, causal=True, q=300, k=130),  # lse of unseen rows is the sink
        PLAIN.but(sinks=True, k=0),
        PLAIN.but(sinks=True, window=(30, 0), dtype="f16", h=(4, 1)),
    ],
    "dropout": [
        PLAIN.but(dropout=0.1),
        PLAIN.but(dropout=0.5, causal=True, dtype="f16"),
        PLAIN.but(dropout=0.9, h=(4, 2), window=(90, 90)),
        PLAIN.but(dropout=2**-16),
    ],
    "groups": [
        PLAIN.but(b=1, h=h, causal=causal)
        for h in ((2, 2), (6, 3), (8, 1), (7, 1), (14, 2), (16, 4))
        for causal in (False, True)
    ],
    "varlen": [
        PACKED,
        PACKED.but(causal=True),
        PACKED.but(causal=True, align="top_left", dtype="f16"),
        PACKED.but(window=(60, 20), h=(4, 1)),
        PLAIN.but(packed_q=(0, 0), packed_k=(0, 0)),
        PLAIN.but(packed_q=(70, 3), packed_k=(0, 0)),
        PLAIN.but(packed_q=(), packed_k=()),
        PLAIN.but(packed_q=(1, 1, 0, 1), packed_k=(400, 2, 5, 129), causal=True),
        PLAIN.but(packed_q=(400, 2), packed_k=(130, 300), causal=True),  # rows that see nothing
        PACKED.but(strides="sliced", causal=True),
        PACKED.but(alibi="bh", sinks=True, q_offset=(3, 9, 0, 80, -20, 0), causal=True),
        PACKED.but(dropout=0.25),
    ],
    "padded": [
        PLAIN.but(lengths_k=(300, 7)),
        PLAIN.but(lengths_q=(200, 129)),
        PLAIN.but(lengths_q=(113, 199), lengths_k=(60, 300), causal=True),
        PLAIN.but(lengths_q=(0, 113), lengths_k=(10, 0), dtype="f16"),
        PLAIN.but(lengths_q=(1, 200), lengths_k=(128, 129), window=(40, None), layout="bhsd"),
    ],
    "strides": [
        PLAIN.but(layout="bhsd", causal=True),
        PLAIN.but(strides="permuted"),
        PLAIN.but(strides="sliced", causal=True),
        PLAIN.but(strides="sliced", layout="bhsd", dtype="f16"),
    ],
    "scale": [PLAIN.but(scale=0.02), PLAIN.but(scale=4.0, causal=True)],
    "together": [
        PLAIN.but(causal=True, window=(90, None), softcap=2.0, alibi="bh", sinks=True, dropout=0.1),
        PLAIN.but(
            window=(90, 30), softcap=20.0, alibi="h", lengths_q=(113, 200), lengths_k=(60, 300)
        ),
        PACKED.but(causal=True, window=(50, None), sinks=True, dropout=0.3, h=(3, 1)),
    ],
}  # fmt: skip
EVERY_OPTION = [
    pytest.param(case.but(d=d, dv=dv), id=f"{theme}-{case.but(d=d, dv=dv)}")
    for theme, list_of_cases in VARIANTS.items()
    for n, case in enumerate(list_of_cases)
    for d, dv in ((64, None), (128, None), ((32, 96, 192, 256)[n % 4], None), (192, 128))
]


@pytest.mark.parametrize("case", EVERY_OPTION)
def test_option(case):
    check(case)


@pytest.mark.parametrize("case", cases.SM90, ids=str)
def test_shape(case):
    check(case)


@pytest.mark.parametrize("d", range(8, 257, 8))
def test_every_head_dim(d):
    """The other half of what cases.SM90 has of this."""
    check(Case("head dims", dtype="f16", b=1, q=130, k=150, d=d, causal=d % 16 != 0))


@pytest.mark.parametrize(
    "d,dv",
    [
        (192, 128),
        (64, 128),
        (128, 64),
        (64, 256),
        (256, 64),
        (72, 16),
        (8, 248),
        (96, 40),
        (192, 8),
    ],
)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 4.0, "strides": "sliced"}])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_values_of_another_head_dim(d, dv, options, dtype):
    check(PLAIN.but(d=d, dv=dv, dtype=dtype, **options))


def random_case(n: int) -> Case:
    """Any options at once. Small sizes: what matters is how the rules meet."""
    r = random.Random(n)
    maybe = lambda p, value: {} if r.random() >= p else value
    hk = r.choice((1, 1, 2))
    edge = lambda most: r.choice(
        (r.randint(1, most), r.choice((1, 63, 64, 65, 127, 128, 129, 192)))
    )
    o = {
        "dtype": r.choice(("bf16", "bf16", "f16")),
        "b": r.choice((1, 2)),
        "q": edge(300),
        "k": edge(400),
        "h": (hk * r.choice((1, 1, 2, 3)), hk),
        "d": r.choice((64, 96, 128, 192, 256, 8 * r.randint(1, 32))),
        "causal": r.random() < 0.4,
        "window": (r.choice((None, None, 0, 10, 150)), r.choice((None, None, 0, 3, 100))),
        "align": r.choice(("bottom_right", "bottom_right", "top_left")),
        "strides": r.choice(("packed", "packed", "sliced")),
        "sinks": r.random() < 0.3,
    }
    if r.random() < 0.25:  # else one of the kernels that leave these out
        o |= {
            "softcap": r.choice((0.0, 0.0, 1.0, 20.0)),
            "alibi": r.choice(("", "", "h", "bh")),
            "dropout": r.choice((0.0, 0.0, 0.2, 0.7)),
        }
    o |= maybe(0.2, {"dv": 8 * r.randint(1, 32)})
    o |= maybe(0.2, {"scale": r.choice((0.05, 0.5))})
    sequences = o["b"]
    kind = r.choice(("plain", "packed", "padded"))
    if kind == "packed":
        sequences = r.randint(1, 4)
        o["packed_q"] = tuple(r.choice((0, 1, r.randint(0, 200))) for _ in range(sequences))
        o["packed_k"] = tuple(r.choice((0, 1, r.randint(0, 300))) for _ in range(sequences))
    else:
        o |= maybe(0.3, {"layout": "bhsd"})
        o |= maybe(0.1, {"strides": "permuted"})
    if kind == "padded":
        for name, most in (("lengths_q", o["q"]), ("lengths_k", o["k"])):
            o |= maybe(0.7, {name: tuple(r.randint(0, most) for _ in range(sequences))})
    offsets = tuple(r.randint(-100, 400) for _ in range(sequences))
    o |= maybe(0.2, {"q_offset": r.choice((offsets[0], offsets))})
    return Case("any options at once", **o)


@pytest.mark.parametrize("n", range(200))
def test_random_combination(n):
    check(random_case(n))


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (300, 50), "softcap": 9.0, "dropout": 0.1}],
    ids=str,
)
def test_more_tiles_than_multiprocessors(d, options):
    """Blocks that take several tiles, against the CPU backend: the reference would take minutes."""
    done = run(Case("many tiles", dtype="bf16", b=2, q=1100, k=1300, h=(12, 4), d=d, **options))
    assert_near_the_cpu(done.result, done.on_the_cpu())
    assert_same_bits(done.result, done.again())


@pytest.mark.parametrize("d,more", every_kernel(64, 128, 256))
def test_a_tight_bound_of_packed_lengths_changes_nothing(d, more):
    loose = run(PACKED.but(d=d, causal=True), **(more or {"num_splits": 1}))
    assert_same_bits(loose.result, loose.again(max_seqlen_q=193, max_seqlen_k=200))


FARTHEST = 2**31 - 1


@pytest.mark.parametrize("d,more", every_kernel(64, 128, 256))
@pytest.mark.parametrize("offset", [FARTHEST, -FARTHEST, (FARTHEST, -FARTHEST)], ids=str)
@pytest.mark.parametrize("rule", [{"causal": True}, {"window": (None, 0), "sinks": True}], ids=str)
def test_the_farthest_q_offsets(offset, rule, d, more):
    """Every key is visible or none is."""
    done = check(PLAIN.but(d=d, q_offset=offset, **rule), **more)
    sinks = done.options.get("sinks")
    for b in range(2):
        out, lse = done.result.out[b], done.result.lse[b]
        if (offset if isinstance(offset, int) else offset[b]) > 0:
            assert (out != 0).any(dim=-1).all() and torch.isfinite(lse).all()
        else:
            assert (out == 0).all()
            want = -INF if sinks is None else sinks[:, None].expand_as(lse)
            assert (lse == want).all()


@pytest.mark.parametrize("offset", [FARTHEST, -FARTHEST, (FARTHEST, -FARTHEST)], ids=str)
def test_the_farthest_q_offsets_leave_a_window_without_keys(offset):
    done = check(PLAIN.but(d=128, q_offset=offset, window=(100, 100)))
    assert (done.result.out == 0).all() and (done.result.lse == -INF).all()


@pytest.mark.parametrize("d,more", every_kernel(64, 128, 256))
@pytest.mark.parametrize("over", ["batch", "heads", "rows"])
@pytest.mark.parametrize("names", ["q", "kv", "qkv"])
def test_expanded_inputs(names, over, d, more):
    """Stride 0: one entry read over and over, as if it had been copied."""
    case = PLAIN.but(d=d, causal=True, h=(4, 2))
    arrays, dim = case.arrays(), {"batch": 0, "rows": 1, "heads": 2}[over]
    inputs = {}
    for name in "qkv":
        x = arrays[name]
        if name in names:
            arrays[name] = np.repeat(x.take([0], axis=dim), x.shape[dim], axis=dim)
            inputs[name] = on_gpu(x.take([0], axis=dim)).expand(x.shape)
            assert inputs[name].stride(dim) == 0
        else:
            inputs[name] = on_gpu(x)
    if why := why_refused(*inputs.values(), causal=True, **more):
        pytest.skip(f"refused: {why}")
    copied = run(case, arrays, **more)
    result = fc.attention(*inputs.values(), causal=True, return_lse=True, **more)
    assert_same_bits(result, copied.result)
    assert_close_to_reference(result, arrays["q"], arrays["k"], arrays["v"], causal=True)


def test_more_tiles_than_an_int_counts_are_refused():
    """By explain too: nothing of that size is ever there."""
    q = torch.zeros(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    few = q.expand(2**20, 1, 2**10, 64)
    assert fc.explain(few, few, few).kernel
    many = q.expand(2**20, 1, 2**11, 64)
    assert "tiles" in why_refused(many, many, many)
    with pytest.raises(fc.UnsupportedError, match="tiles"):
        fc.attention(many, many, many)


# ---- scores of any size -------------------------------------------------------------------------


def with_scores(case: Case, of_keys: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays whose score of key j is of_keys[j], plus N(0, D), when scale is 1."""
    arrays = case.arrays()
    arrays["q"][..., 0] = 1
    arrays["k"][..., 0] = of_keys[:, None].astype(arrays["k"].dtype)
    return arrays


@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("jump", [-80, 6, 40, 70, 95, 300])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_scores_that_change_from_block_to_block(d, jump, causal):
    """Blocks are visited from the last key to the first: with a positive jump every one of them has
    larger scores than all before, at most by what a reference may lag, or past float's range."""
    case = Case("stairs", dtype="bf16", b=1, q=200, k=900, h=(2, 1), d=d, causal=causal)
    stairs = jump * ((900 - np.arange(900)) // 128)
    check(case, arrays=with_scores(case, stairs), scale=1.0)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("large", [30, 150, 1000])
def test_one_key_far_above_the_others(d, large, dtype):
    """In the middle of a block that nothing cuts, and with values that are not zero elsewhere."""
    case = Case("outlier", dtype=dtype, b=1, q=200, k=900, h=(2, 1), d=d)
    scores = np.zeros(900)
    scores[333] = large
    check(case, arrays=with_scores(case, scores), scale=1.0)
    check(case, arrays=with_scores(case, scores), scale=1.0, num_splits=3)


@pytest.mark.parametrize("d", [96, 128])
@pytest.mark.parametrize("score,value", [(82.5, 1e3), (60, 1e13), (40, 1e20)])
def test_large_values_of_a_key_far_above_the_others(d, score, value):
    """P and the sum stay within float's range, P times V does not."""
    case = Case("large values", dtype="bf16", b=1, q=64, k=256, h=(1, 1), d=d)
    arrays = case.arrays()
    arrays["q"][...] = arrays["k"][...] = 0
    arrays["q"][..., 0] = 1
    arrays["k"][:, 77, :, 0] = score
    arrays["v"][:, 77] = value
    check(case, arrays=arrays, scale=1.0)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("poisoned", [False, True], ids=["", "repaired"])
def test_scores_of_millions(d, dtype, poisoned):
    """References there are rounded to halves of a power of two: what was summed up relative to one
    is carried over to the next from what the one really was. Third after third of the keys the
    scores rise by 1 and fall again, whichever way a kernel or its repair goes; every 16th row's by
    21, so that references are raised."""
    case = Case("millions", dtype=dtype, b=1, q=64, k=384, h=(1, 1), d=d)
    arrays = case.arrays()
    q, k, v = (arrays[name] for name in "qkv")
    middle = slice(128, 256)
    q[...] = k[...] = 0
    q[..., 0] = k[..., 0] = 2000
    q[..., 1] = 1
    q[:, ::16, :, 2] = 1
    k[..., 1] = 5
    k[:, middle, :, 1] = 6
    k[:, middle, :, 2] = 20
    v[:, middle] -= 4
    if poisoned:
        arrays["v"] = np.concatenate([v, np.full_like(v, NAN)], axis=1)
        arrays["k"] = np.concatenate([k, k], axis=1)
        check(case.but(k=768, lengths_k=(384,)), arrays=arrays, scale=1.0)
    else:
        check(case, arrays=arrays, scale=1.0)


# ---- kernels that large calls alone get: head dims 32 and 64 -------------------------------------

# Copies of one sequence, in memory once, one of which is checked: so many that tiles of 256 rows
# take no more rounds on 132 multiprocessors than two of 128; and more tiles than two a
# multiprocessor.
COPIES = {"-none-256x64": 88, "-window-2x128x64": 140}
WIDE = Case("wide", dtype="bf16", b=1, q=200, k=300, h=(1, 1), d=64)  # a tile of 256, two of 128
DEEP = WIDE.but(k=2300, causal=True)  # 2048 keys and more by the rule in dispatch.cpp
LARGE = {
    "-none-256x64": [
        WIDE,
        WIDE.but(dtype="f16"),
        WIDE.but(d=40),
        WIDE.but(q=129),
        WIDE.but(q=256, k=64),
        WIDE.but(q=250, k=1),
        WIDE.but(k=0),
        WIDE.but(sinks=True),
        WIDE.but(scale=4.0),
        WIDE.but(strides="sliced", layout="bhsd"),
        WIDE.but(dv=16),
        WIDE.but(q=700, k=131),  # three tiles, the last of them short
    ],
    "-window-2x128x64": [
        DEEP,
        DEEP.but(dtype="f16"),
        DEEP.but(d=40),
        DEEP.but(q=257),
        DEEP.but(q=255, k=2304),
        DEEP.but(align="top_left", k=2500),
        DEEP.but(q_offset=2050, sinks=True),
        DEEP.but(q_offset=-150),  # rows that see nothing
        DEEP.but(causal=False, window=(2100, 3)),
        DEEP.but(causal=False, window=(2040, 20), dtype="f16"),
        DEEP.but(layout="bhsd", strides="sliced", dv=24),
        DEEP.but(d=32, k=700),
        DEEP.but(d=32, k=620, dtype="f16", causal=False, window=(600, 0)),
        DEEP.but(d=8, k=700, sinks=True),
    ],
}


def run_large(kernel: str, case: Case, arrays: dict[str, np.ndarray] | None = None) -> Run:
    """All copies are to have the same bits; the result is the first one."""
    done = run(case, arrays, COPIES[kernel])
    assert kernel in fc.explain(*done.inputs, **done.options).kernel
    out, lse = done.result[:2]
    first = fc.Result(out[:1], lse[:1], None)
    assert_same_bits(done.result, fc.Result(out[:1].expand_as(out), lse[:1].expand_as(lse), None))
    return done._replace(result=first)


@pytest.mark.parametrize(
    "kernel,case",
    [pytest.param(k, c, id=f"{k[1:]}-{c}") for k, of_it in LARGE.items() for c in of_it],
)
def test_large_calls(kernel, case):
    done = run_large(kernel, case)
    a = done.arrays
    assert_close_to_reference(done.result, a["q"], a["k"], a["v"], **done.values)
    assert_near_the_cpu(done.result, done.on_the_cpu())


@pytest.mark.parametrize("kernel,case", [(k, of_it[0]) for k, of_it in LARGE.items()])
@pytest.mark.parametrize("jump", [-80, 6, 40, 70, 95, 300])
def test_large_calls_with_scores_that_change_from_block_to_block(kernel, case, jump):
    stairs = jump * ((case.k - np.arange(case.k)) // 128)
    done = run_large(kernel, case.but(scale=1.0), with_scores(case, stairs))
    a = done.arrays
    assert_close_to_reference(done.result, a["q"], a["k"], a["v"], **done.values)


@pytest.mark.parametrize("kernel,case", [(k, of_it[0]) for k, of_it in LARGE.items()])
@pytest.mark.parametrize("name", "kv")
@pytest.mark.parametrize("poison", [NAN, INF])
def test_large_calls_with_poison(kernel, case, name, poison):
    arrays = case.arrays()
    arrays[name][:, case.k - 70, :, 5] = poison  # with causal, some rows do not see it
    done = run_large(kernel, case, arrays)
    assert_close_to_reference(done.result, *(arrays[x] for x in "qkv"), **done.values)


@pytest.mark.parametrize("pair", [(2300, 2300), (2400, 2200), (2300, 1)], ids=str)
def test_large_calls_of_sequences_of_unlike_lengths(pair):
    """Padded, and packed: of 70 sequences and 2 heads, at least 280 tiles of 128 rows."""
    lengths = pair * 35
    b, most = len(lengths), max(lengths)
    case = Case("unlike", dtype="bf16", b=1, q=260, k=most, h=(2, 1), d=64, causal=True)
    arrays = case.arrays()
    inputs = tuple(on_gpu(arrays[x]).expand(b, -1, -1, -1) for x in "qkv")
    seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    options = {"causal": True, "seqlens_k": seqlens}
    plan = fc.explain(*inputs, **options)
    if not plan.kernel:
        pytest.skip(f"refused: {why_refused(*inputs, **options)}")
    assert "-window-2x128x64" in plan.kernel
    padded = fc.attention(*inputs, **options, return_lse=True)
    for i in (0, 1, b - 2, b - 1):
        k, v = (arrays[x][:, : lengths[i]] for x in "kv")
        one = fc.Result(padded.out[i : i + 1], padded.lse[i : i + 1], None)
        assert_close_to_reference(one, arrays["q"], k, v, causal=True)

    starts = torch.nn.functional.pad(seqlens.cumsum(0), (1, 0)).to(torch.int32)
    rows = torch.arange(0, 260 * b + 1, 260, dtype=torch.int32, device="cuda")
    q = inputs[0].reshape(-1, 2, 64)
    k, v = (torch.cat([x[i, :n] for i, n in enumerate(lengths)]) for x in inputs[1:])
    options = {
        "causal": True,
        "cu_seqlens_q": rows,
        "cu_seqlens_k": starts,
        "max_seqlen_q": 260,
        "max_seqlen_k": most,
    }
    packed = fc.attention(q, k, v, **options, return_lse=True)
    if sum(lengths) // b >= 2048 + 130:
        assert "-window-2x128x64" in fc.explain(q, k, v, **options).kernel
    out = padded.out.reshape(-1, 2, 64)
    torch.testing.assert_close(packed.out, out, rtol=0, atol=2**-7 * out.abs().max().item())


# ---- which keys, which bits ---------------------------------------------------------------------


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("h,layout,causal", [((2, 2), "bshd", False), ((4, 1), "bhsd", True)])
def test_dropout_drops_what_the_mask_says(h, layout, causal, d):
    """With one-hot values the output is P, 64 columns at a time: its zeros are what is dropped."""
    rows, keys, rng = 150, 333, (2**62 + 5, 3)
    case = Case("one-hot v", dtype="bf16", q=rows, k=keys, h=h, d=d, dv=64, layout=layout)
    arrays = case.arrays()
    visible = np.tri(rows, keys, keys - rows, dtype=bool) | (not causal)
    want = fc.dropout_mask((2, h[0], rows, keys), 0.4, rng) & visible
    for first in range(0, keys, 64):
        eye = np.eye(keys, dtype=arrays["v"].dtype)[:, first : first + 64]
        values = np.zeros((keys, 64), eye.dtype)
        values[:, : eye.shape[1]] = eye
        arrays["v"][...] = values[:, None] if layout == "bshd" else values
        out = run(case, arrays, causal=causal, dropout_p=0.4, rng=rng).result.out
        p = to_numpy(out.float() if layout == "bhsd" else out.float().transpose(1, 2))
        np.testing.assert_array_equal(p[..., : eye.shape[1]] != 0, want[..., first : first + 64])


def test_dropout_seed_on_the_device():
    case = PLAIN.but(dropout=0.3)
    want = run(case)
    seed = torch.tensor(want.values["rng"], dtype=torch.int64, device=want.result.out.device)
    assert_same_bits(
        fc.attention(*want.inputs, dropout_p=0.3, rng=seed, return_lse=True), want.result
    )


def test_lse_is_of_the_undropped_softmax():
    plain = run(PLAIN.but(causal=True)).result.lse
    dropped = run(PLAIN.but(causal=True, dropout=0.5)).result.lse
    torch.testing.assert_close(dropped, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("d,more", every_kernel(32, 64, 96, 128, 192, 256))
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (50, 10)}, {"alibi": "h"}])
def test_poison_in_the_padding_reaches_nothing(d, more, poison, options):
    """Rows past a sequence's length: of q, of k and of v. Their own results are zero and -inf."""
    lengths_q, lengths_k = (200, 37), (129, 301)
    case = PLAIN.but(d=d, q=300, k=420, lengths_q=lengths_q, lengths_k=lengths_k, **options)
    arrays = case.arrays()
    for b in range(2):
        arrays["q"][b, lengths_q[b] :] = poison
        arrays["k"][b, lengths_k[b] :] = poison
        arrays["v"][b, lengths_k[b] :] = poison
    done = run(case, arrays, **more)
    result = done.result
    assert_close_to_reference(result, arrays["q"], arrays["k"], arrays["v"], **done.values)
    for b in range(2):
        assert (result.out[b, lengths_q[b] :] == 0).all()
        assert (result.lse[b, :, lengths_q[b] :] == -INF).all()


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("d,more", every_kernel(32, 64, 96, 128, 192, 256))
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (50, 10)}, {"dropout": 0.2}])
def test_poison_in_a_packed_neighbour_reaches_nothing(d, more, poison, options):
    """The second sequence's rows, which the first one's last tile and block run into."""
    case = PLAIN.but(d=d, packed_q=(70, 200, 131), packed_k=(90, 150, 200), **options)
    clean = run(case, **more)
    arrays = case.arrays()
    arrays["q"][70:270] = arrays["k"][90:240] = arrays["v"][90:240] = poison
    result = run(case, arrays, **more).result
    for rows in (slice(0, 70), slice(270, 401)):  # rows that are repaired round elsewhere
        out, want = result.out[rows].float(), clean.result.out[rows].float()
        torch.testing.assert_close(out, want, rtol=0, atol=2**-7 * want.abs().max().item())
        # Rows of both sequences share a warp, and with it the vote on their references: the last
        # rounding may differ.
        lse, want = result.lse[:, rows], clean.result.lse[:, rows]
        torch.testing.assert_close(lse, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("d,more", every_kernel(32, 40, 64, 96, 128, 256))
def test_poison_around_the_inputs_reaches_nothing(poison, d, more):
    """Rows before and after, and the columns beyond head_dim that a wider tile would load."""
    case = Case("poison", dtype="bf16", q=130, k=150, d=d, causal=True)
    arrays = case.arrays()
    inputs = {}
    for name in "qkv":
        x = on_gpu(arrays[name])
        b, s, h, _ = x.shape
        room = torch.full((b, s + 64, h, d + 24), poison, device=x.device, dtype=x.dtype)
        inputs[name] = room[:, 32 : 32 + s, :, :d]
        inputs[name].copy_(x)
    result = fc.attention(*inputs.values(), causal=True, return_lse=True, **more)
    assert_close_to_reference(result, arrays["q"], arrays["k"], arrays["v"], causal=True)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("name", "kv")
@pytest.mark.parametrize("d,more", every_kernel(32, 64, 96, 128, 192, 256))
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (50, 10)}, {"softcap": 3.0}, {"sinks": True}],
    ids=str,
)
def test_poison_that_is_seen_stays(options, d, more, name, poison):
    """In the rows that see it and, of V, in its column: nowhere else. With values behind the mask
    and past a sequence's end that are not finite either."""
    case = PLAIN.but(d=d, q=300, k=300, lengths_k=(300, 280), **options)
    arrays = case.arrays()
    arrays[name][:, 130, :, 5] = poison
    arrays["v"][1, 280:] = INF
    done = run(case, arrays, **more)
    assert_close_to_reference(done.result, *(arrays[x] for x in "qkv"), **done.values)
    assert_same_bits(done.result, done.again())


@pytest.mark.parametrize("d,more", every_kernel(32, 64, 96, 128, 192, 256))
def test_poison_behind_the_mask_reaches_nothing(d, more):
    """Keys that causal and window hide inside blocks that are visited."""
    case = PLAIN.but(q=200, k=200, window=(20, 0), d=d)
    clean = run(case, **more)
    arrays = case.arrays()
    arrays["k"][:, 150:] = arrays["v"][:, 150:] = NAN
    result = run(case, arrays, **more).result
    out, want = result.out[:, :150].float(), clean.result.out[:, :150].float()
    torch.testing.assert_close(out, want, rtol=0, atol=2**-7 * want.abs().max().item())
    assert torch.isnan(result.out[:, 150:].float()).all()


POISONED_SPLITS = {
    "padding": {"lengths_q": (60, 37), "lengths_k": (1100, 500)},
    "causal": {"causal": True, "lengths_k": (700, 1000)},
    "sinks": {"causal": True, "lengths_k": (700, 90), "sinks": True},
    "packed": {"packed_q": (40, 7, 30), "packed_k": (700, 300, 500)},
    "packed, sinks, causal": {
        "packed_q": (40, 7, 30), "packed_k": (700, 300, 500), "causal": True, "sinks": True
    },
}  # fmt: skip


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize(
    "d,splits", [(32, 3), (64, 1), (64, 4), (96, 3), (128, 1), (128, 4), (256, 3)]
)
@pytest.mark.parametrize("options", POISONED_SPLITS.values(), ids=[*POISONED_SPLITS])
def test_poison_where_keys_are_split(options, d, splits, poison):
    """Excluded keys that a part multiplies: its rows are repaired in the workspace. Not finite is
    what lies past a padded sequence's keys, or all of the second packed sequence."""
    case = PLAIN.but(q=60, k=1100, d=d, **options)
    arrays = case.arrays()
    if case.packed_q:
        arrays["q"][40:47] = arrays["k"][700:1000] = arrays["v"][700:1000] = poison
    else:
        for b, length in enumerate(case.lengths_k):
            arrays["k"][b, length:] = arrays["v"][b, length:] = poison
    done = run(case, arrays, num_splits=splits)
    cpu = done.on_the_cpu()
    assert_near_the_cpu(done.result, cpu)
    if case.packed_q:
        second, others = slice(40, 47), [*range(40), *range(47, 77)]
        assert torch.isnan(done.result.out[second].float()).all()
        assert torch.isfinite(done.result.out[others].float()).all()
    else:
        assert_close_to_reference(done.result, arrays["q"], arrays["k"], arrays["v"], **done.values)


@pytest.mark.parametrize("d,more", every_kernel(32, 64, 96, 128, 192, 256))
@pytest.mark.parametrize("hidden", ["window", "causal", "padding"])
def test_poison_beside_sinks(hidden, d, more):
    """A repaired row has its sink in the sum and in lse."""
    options = {"window": {"window": (20, 0)}, "causal": {"causal": True}}
    case = PLAIN.but(
        q=200, k=200, d=d, sinks=True, **options.get(hidden, {"lengths_k": (150, 150)})
    )
    arrays = case.arrays()
    arrays["k"][:, 150:] = arrays["v"][:, 150:] = NAN
    done = run(case, arrays, **more)
    assert_near_the_cpu(done.result, done.on_the_cpu())
    clean = run(case, **more).result
    torch.testing.assert_close(
        done.result.lse[..., :150], clean.lse[..., :150], rtol=1e-5, atol=1e-5
    )


# ---- splitting the keys -------------------------------------------------------------------------


@pytest.mark.parametrize("d,splits", [(128, 0), (128, 1), (128, 3), (128, 8), (64, 8), (256, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (200, None), "q_offset": 900},  # most parts are empty
        {"lengths_k": (1100, 100)},
        {"softcap": 5.0, "sinks": True, "dropout": 0.1},
        {"packed_q": (40, 0, 3), "packed_k": (1000, 50, 600)},
    ],
    ids=str,
)
def test_splits(options, d, splits):
    times = 1 if splits else 8  # unasked only many keys are split, and no window
    for name in ("lengths_k", "packed_k"):
        if name in options:
            options = options | {name: tuple(n * times for n in options[name])}
    done = check(PLAIN.but(q=60, k=1100 * times, d=d, **options), num_splits=splits)
    plan = fc.explain(*done.inputs, **done.options)
    if splits:
        assert min(splits, 2) <= plan.splits <= splits  # whole blocks of keys
    else:
        assert (plan.splits > 1) == ("window" not in options)


def test_few_rows_and_many_keys_are_split_unasked():
    q = torch.randn(1, 128, 32, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 32768, 8, 128, device="cuda", dtype=torch.bfloat16)
    if why := why_refused(q, k, v, num_splits=2):
        pytest.skip(f"refused: {why}")
    assert fc.explain(q, k, v).splits > 1
    got = fc.attention(q, k, v, return_lse=True)
    want = fc.attention(q, k, v, return_lse=True, num_splits=1)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.out, want.out, rtol=2e-2, atol=1e-4)
    heads = slice(28, 32)  # of the last key head
    scores = torch.einsum("qhd,kd->hqk", q[0, :, heads].double(), k[0, :, 7].double()) / 128**0.5
    out = torch.einsum("hqk,kd->qhd", scores.softmax(-1), v[0, :, 7].double())
    torch.testing.assert_close(got.lse[0, heads].double(), scores.logsumexp(-1), rtol=0, atol=1e-4)
    torch.testing.assert_close(got.out[0, :, heads].double(), out, rtol=2e-2, atol=2e-4)


# ---- values -------------------------------------------------------------------------------------


def test_scores_about_minus_120():
    case = Case("negative", dtype="bf16", q=130, k=191, d=64)
    arrays = case.arrays()
    arrays["q"] = (arrays["q"].astype(np.float32) * 0.02 + 1).astype(case.np_dtype)
    arrays["k"] = (arrays["k"].astype(np.float32) * 0.02 - 120 / 64).astype(case.np_dtype)
    result = run(case, arrays, scale=1.0).result
    assert (to_numpy(result.lse) < -100).all()
    assert_close_to_reference(result.out, arrays["q"], arrays["k"], arrays["v"], scale=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d,more", every_kernel(32, 64, 96, 128, 192, 256))
def test_values_of_one_give_one(dtype, d, more):
    q = torch.randn(1, 300, 2, d, device="cuda", dtype=dtype)
    out = fc.attention(q, q, torch.ones_like(q), causal=True, **more).float()
    eps = torch.finfo(dtype).eps
    assert out.min() >= 1 - eps / 2 and out.max() <= 1 + eps


def on_device(q, k, v, precision):
    """(out, lse) of one head of torch tensors, in this precision."""
    s = (q.to(precision) @ k.to(precision).T).double() * q.shape[-1] ** -0.5
    out = (torch.softmax(s, -1).to(precision) @ v.to(precision)).double()
    return out, s.logsumexp(-1)


def check_on_device(result, q, k, v):
    """The error rule for (S, D) tensors too large for the reference."""
    exact, lse = on_device(q, k, v, torch.float64)
    same, _ = on_device(q, k, v, q.dtype)
    got = to_numpy(result.out[-1, -q.shape[0] :, -1])
    assert_within_rule("out", got, to_numpy(exact), to_numpy(same.to(q.dtype)))
    got = result.lse[-1, -1, -q.shape[0] :].double()
    torch.testing.assert_close(got, lse, rtol=1e-5, atol=1e-4)


def test_more_keys_than_2_to_the_31_elements():
    q = torch.randn(1, 200, 16, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 1_100_000, 16, 128, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    result = fc.attention(q, k, v, return_lse=True)
    check_on_device(result, q[0, :, -1], k[0, :, -1], v[0, :, -1])


def test_more_rows_than_2_to_the_31_elements():
    q = torch.randn(1, 1_100_000, 16, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 150, 16, 128, device="cuda", dtype=torch.bfloat16)
    result = fc.attention(q, k, v, return_lse=True)
    assert result.out.numel() > 2**31
    check_on_device(result, q[0, -999:, -1], k[0, :, -1], v[0, :, -1])


@pytest.mark.parametrize("varlen", [False, True])
def test_strides_beyond_2_to_the_31_elements(varlen):
    """Batches (packed: heads) that lie 4.5 GB apart, of inputs and of the output."""
    room = torch.empty(4, 2, 2**31 + 2**16, device="cuda", dtype=torch.bfloat16)
    parts = [x[:, : 200 * 2 * 64].normal_() for x in room]
    if varlen:
        q, k, v, out = (x[:, : 200 * 64].view(2, 200, 64).transpose(0, 1) for x in parts)
        cu = torch.tensor([0, 200], dtype=torch.int32, device="cuda")
        options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 200, "max_seqlen_k": 200}
    else:
        q, k, v, out = (x.view(2, 200, 2, 64) for x in parts)
        options = {}
    if why := why_refused(q, k, v, **options):
        pytest.skip(f"refused: {why}")
    result = fc.attention(q, k, v, **options, out=out, return_lse=True)
    assert_close_to_reference(result, q, k, v, **options)


# ---- memory, streams, graphs --------------------------------------------------------------------


@pytest.mark.parametrize("d,more", every_kernel(32, 64, 72, 96, 128, 192, 256))
@pytest.mark.parametrize("options", [{}, {"lengths_q": (60, 131)}, {"packed_q": (60, 71, 131)}])
def test_nothing_is_written_outside_the_output(d, more, options):
    """Canaries before, after and between the rows of out."""
    if "packed_q" in options:
        options = options | {"packed_k": (80, 20, 300)}
    case = Case("canaries", dtype="bf16", q=131, k=200, h=(2, 1), d=d, causal=True, **options)
    done = run(case, **more)
    want = done.result.out
    rows, heads = want.shape[-3:-1]
    shape = (*want.shape[:-3], rows + 2, heads + 2, d + 8)
    room = torch.full(shape, 7.0, device=want.device, dtype=want.dtype)
    out = room[..., 1:-1, 1:-1, :d]
    assert fc.attention(*done.inputs, **done.options, out=out) is out
    assert torch.equal(out, want)
    out.fill_(7.0)
    assert (room == 7).all()


def test_side_stream():
    """Work goes to torch's current stream: it sees what was made there, in order."""
    done = run(Case("stream", dtype="bf16", q=512, k=512, d=128, h=(8, 8)))
    q, k, v = done.inputs
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = q.clone()
        got = fc.attention(late, k, v)
        copy = got.clone()
    stream.synchronize()
    assert torch.equal(copy, done.result.out)
    explicit = fc.attention(q, k, v, stream=stream)
    stream.synchronize()
    assert torch.equal(explicit, done.result.out)


@pytest.mark.parametrize("more", [{}, {"num_splits": 4}], ids=str)
def test_cuda_graph_capture_and_replay(more):
    done = run(Case("graph", dtype="bf16", q=256, k=256, d=64, h=(4, 4)), **more)
    q, k, v = done.inputs
    out = torch.empty_like(done.result.out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fc.attention(q, k, v, out=out, **more)
    q.mul_(0.5)
    expected = fc.attention(q, k, v, **more)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


# ---- choosing and refusing ----------------------------------------------------------------------


def test_a_gpu_kernel_is_chosen():
    q = torch.zeros(1, 128, 2, 128, device="cuda", dtype=torch.bfloat16)
    plan = fc.explain(q, q, q, causal=True)
    assert plan.backend == "sm90" and plan.deterministic


SPECIAL = {
    "bias": {"bias": np.ones((1, 1, 1, 64), np.float32)},
    "mask": {"mask": np.arange(64).reshape(1, 1, 1, 64) % 3 > 0},
    "block mask": {"block_mask": fc.BlockMask.from_dense(np.ones((64, 64), bool), block=(32, 32))},
    "zero scale": {"scale": 0.0},
    "negative scale": {"scale": -0.1},
    "wide result": {"out_dtype": "float32"},
    "max_logits": {"return_max_logits": True},
}


@pytest.mark.parametrize("values", SPECIAL.values(), ids=[*SPECIAL])
def test_refused_or_right(values):
    """Never silently something else: an error that says so, or the reference's result."""
    case = Case("special", dtype="bf16", b=1, q=64, k=64, d=64)
    arrays = case.arrays()
    options = {
        name: x.map(on_gpu) if isinstance(x, fc.BlockMask) else on_gpu(x)
        for name, x in values.items()
    }
    try:
        result = fc.attention(*(on_gpu(arrays[name]) for name in "qkv"), **options, return_lse=True)
    except fc.UnsupportedError as e:
        assert "sm90" in str(e) and len(str(e)) > 40
        return
    assert_close_to_reference(result, arrays["q"], arrays["k"], arrays["v"], **values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_refused(dtype):
    q = torch.zeros(1, 8, 1, 64, device="cuda", dtype=dtype)
    with pytest.raises(fc.UnsupportedError, match="float32|float64"):
        fc.attention(q, q, q)


@pytest.mark.parametrize("d", [12, 260, 264])
def test_other_head_dims_are_refused(d):
    q = torch.zeros(1, 8, 1, d, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(fc.UnsupportedError, match="head_dim"):
        fc.attention(q, q, q)


def test_strides_that_tma_cannot_take_are_refused():
    room = torch.zeros(1, 64, 2, 65, device="cuda", dtype=torch.bfloat16)
    q = room[..., :64]  # rows 130 bytes apart
    with pytest.raises(fc.Error, match="stride|16"):
        fc.attention(q, q, q)


def test_misaligned_data_is_refused():
    flat = torch.zeros(64 * 64 + 8, device="cuda", dtype=torch.bfloat16)
    q = flat[1 : 1 + 64 * 64].view(1, 64, 1, 64)
    with pytest.raises(fc.Error, match="align|16"):
        fc.attention(q, q, q)


def test_tensors_on_two_devices_are_refused():
    q = torch.zeros(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(fc.ArgumentError, match="k is on cpu but q is on cuda:0"):
        fc.attention(q, q.cpu(), q)


def test_requires_grad_is_refused():
    q = torch.zeros(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(fc.Error, match="grad"):
        fc.attention(q, q, q)
