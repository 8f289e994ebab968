"""Bad input: one clear error that names the argument, what it got and what is allowed.

Nothing may change: every refused call is checked to have left its output arrays as they were.
"""

import gc
import re
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

import flashcore as fc

B, SQ, SK, HQ, HK, D, DV = 2, 3, 5, 4, 2, 8, 6


def good():
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((B, SQ, HQ, D)).astype(np.float32),
        "k": rng.standard_normal((B, SK, HK, D)).astype(np.float32),
        "v": rng.standard_normal((B, SK, HK, DV)).astype(np.float32),
    }


def packed():
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((9, HQ, D)).astype(np.float32),
        "k": rng.standard_normal((11, HK, D)).astype(np.float32),
        "v": rng.standard_normal((11, HK, DV)).astype(np.float32),
        "cu_seqlens_q": np.array([0, 2, 9], np.int32),
        "cu_seqlens_k": np.array([0, 5, 11], np.int32),
    }


def refuses(call, error, *parts, out_shape=(B, SQ, HQ, DV)):
    """call, with an output array, raises error with every part in one text, and writes nothing."""
    call = dict(call)
    if "out" not in call:
        call["out"] = np.full(out_shape, 7, np.float32)
    before = {name: np.array(x, copy=True) for name, x in call.items() if isinstance(x, np.ndarray)}
    q, k, v = call.pop("q"), call.pop("k"), call.pop("v")
    with pytest.raises(error) as raised:
        fc.attention(q, k, v, **call)
    text = str(raised.value)
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"
    assert isinstance(raised.value, fc.Error)
    call.update(q=q, k=k, v=v)
    for name, x in before.items():
        np.testing.assert_array_equal(call[name], x)
    return text


f32 = np.float32
zeros = np.zeros

SHAPES = {
    "q of rank 3": ({"q": zeros((3, 4, 8), f32)}, "q must have 4 dimensions", "float32[3,4,8]"),
    "k of rank 5": ({"k": zeros((1, 2, 5, 2, 8), f32)}, "k must have 4 dimensions"),
    "a scalar": ({"v": np.array(1, f32)}, "v must have 4 dimensions", "float32[]"),
    "batches differ": ({"k": zeros((3, 5, 2, 8), f32)}, "one batch size", "[3,5,2,8]"),
    "v of another length": ({"v": zeros((2, 6, 2, 6), f32)}, "v must have k's seqlen"),
    "v of other heads": ({"v": zeros((2, 5, 1, 6), f32)}, "v must have k's seqlen and heads"),
    "k of another head_dim": ({"k": zeros((2, 5, 2, 7), f32)}, "k must have q's head_dim 8"),
    "heads do not divide": (
        {"k": zeros((2, 5, 3, 8), f32), "v": zeros((2, 5, 3, 6), f32)},
        "multiple of k's",
        "4 and 3",
    ),
    "no heads": ({"q": zeros((2, 3, 0, 8), f32)}, "at least one head"),
    "no head_dim": (
        {"q": zeros((2, 3, 4, 0), f32), "k": zeros((2, 5, 2, 0), f32)},
        "head_dim must be positive",
    ),
    "out of another shape": ({"out": zeros((2, 3, 4, 8), f32)}, "out must have shape [2,3,4,6]"),
}

DTYPES = {
    "mixed dtypes": (
        {"k": zeros((2, 5, 2, 8), np.float64)},
        "k must have q's dtype float32",
        "float64",
    ),
    "mixed 16-bit dtypes": (
        {"q": zeros((2, 3, 4, 8), np.float16)},
        "k must have q's dtype float16",
    ),
    "out of another dtype": (
        {"out": zeros((2, 3, 4, 6), np.float64)},
        "out must be float32",
        "float64",
    ),
    "unknown out_dtype": ({"out": None, "out_dtype": "int8"}, "out_dtype"),
    "out_dtype float16 of float32": ({"out": None, "out_dtype": "float16"}, "float16"),
}

SCALARS = {
    "NaN scale": ({"scale": float("nan")}, "scale must be finite", "nan"),
    "infinite scale": ({"scale": float("inf")}, "scale must be finite"),
    "scale of another type": ({"scale": "big"}, "scale"),
    "negative softcap": ({"softcap": -1.0}, "softcap must be finite and >= 0", "-1"),
    "softcap too large for float32": ({"softcap": 1e39}, "softcap must be between"),
    "softcap too small for float32": ({"softcap": 1e-39}, "softcap must be between"),
    "NaN softcap": ({"softcap": float("nan")}, "softcap must be finite"),
    "dropout_p of 1": ({"dropout_p": 1.0, "rng": (1, 2)}, "dropout_p must be in [0, 1)", "got 1"),
    "negative dropout_p": ({"dropout_p": -0.1, "rng": (1, 2)}, "dropout_p must be in [0, 1)"),
    "NaN dropout_p": ({"dropout_p": float("nan"), "rng": (1, 2)}, "dropout_p must be in [0, 1)"),
    "dropout_p that rounds to 1": ({"dropout_p": 1 - 1e-9, "rng": (1, 2)}, "1 - 2^-16"),
    "dropout without rng": ({"dropout_p": 0.5}, "rng is required", "(seed, offset)"),
    "rng of one number": ({"dropout_p": 0.5, "rng": (1,)}, "rng"),
    "rng as a number": ({"dropout_p": 0.5, "rng": 3}, "rng"),
    "rng of int32": ({"dropout_p": 0.5, "rng": zeros(2, np.int32)}, "rng must be int64", "int32"),
    "unknown layout": ({"layout": "sbhd"}, "layout", "bshd", "bhsd", "sbhd"),
    "unknown align": ({"align": "middle"}, "align", "bottom_right", "top_left", "middle"),
    "negative window": ({"window_size": (-2, None)}, "window_size[0]", "-2"),
    "window of one number": ({"window_size": 5}, "window_size"),
    "window of three": ({"window_size": (1, 2, 3)}, "window_size"),
    "q_offset too far": ({"q_offset": 2**40}, "q_offset"),
    "q_offset beyond 64 bits": ({"q_offset": 2**70}, "q_offset"),
    "q_offset as a float": ({"q_offset": 1.5}, "q_offset"),
    "negative num_splits": ({"num_splits": -1}, "num_splits must be >= 0"),
    "negative split_size": ({"split_size": -5}, "split_size"),
    "both kinds of split": ({"num_splits": 2, "split_size": 64}, "exclude each other"),
}

TENSORS = {
    "slopes of another size": (
        {"alibi_slopes": zeros(3, f32)},
        "alibi_slopes must have shape [4]",
        "float32[3]",
    ),
    "slopes of float64": ({"alibi_slopes": zeros(4)}, "alibi_slopes must be float32", "float64"),
    "bias that does not broadcast": (
        {"bias": zeros((2, 4, 3, 4), f32)},
        "bias must broadcast to [2,4,3,5]",
        "[2,4,3,4]",
    ),
    "bias of rank 2": ({"bias": zeros((3, 5), f32)}, "bias must have 4 dimensions"),
    "bias of float64": ({"bias": zeros((1, 1, 3, 5))}, "bias must be float32", "float64"),
    "mask of floats": ({"mask": zeros((1, 1, 3, 5), f32)}, "mask must be bool", "float32", "bias"),
    "mask of int32": ({"mask": zeros((1, 1, 3, 5), np.int32)}, "mask must be bool"),
    "mask that does not broadcast": ({"mask": zeros((2, 4, 3, 4), bool)}, "mask must broadcast"),
    "sinks of another size": ({"sinks": zeros(2, f32)}, "sinks must have shape [4]"),
    "sinks of float64": ({"sinks": zeros(4)}, "sinks must be float32"),
    "q_offset of another size": ({"q_offset": zeros(3, np.int32)}, "q_offset must have shape [2]"),
    "q_offset of int64": ({"q_offset": zeros(2, np.int64)}, "q_offset must be int32", "int64"),
    "seqlens of int64": ({"seqlens_k": zeros(2, np.int64)}, "seqlens_k must be int32", "int64"),
    "seqlens of another size": ({"seqlens_q": zeros(3, np.int32)}, "seqlens_q must have shape [2]"),
    "seqlens too long": (
        {"seqlens_k": np.array([5, 6], np.int32)},
        "seqlens_k[1] must be in 0..5, got 6",
    ),
    "seqlens negative": (
        {"seqlens_q": np.array([-1, 2], np.int32)},
        "seqlens_q[0] must be in 0..3, got -1",
    ),
    "max_seqlen without cu_seqlens": ({"max_seqlen_q": 3}, "max_seqlen_q", "cu_seqlens_q"),
    "a block mask of another shape": (
        {"block_mask": fc.BlockMask.from_dense(np.ones((64, 64), bool), block=(16, 16))},
        "block_mask is for seqlen_q 64 and seqlen_k 64",
        "make one for these lengths",
    ),
    "a block mask of other heads": (
        {"block_mask": fc.BlockMask.from_dense(np.ones((1, 3, SQ, SK), bool), block=(16, 16))},
        "block_mask.kv_num_blocks must have shape",
    ),
    "a block mask for a query less": (
        {"block_mask": fc.BlockMask.from_dense(np.ones((SQ - 1, SK), bool), block=(64, 64))},
        "block_mask is for seqlen_q",
    ),
    "a block mask that is none": ({"block_mask": np.ones((1, 1), bool)}, "block_mask"),
}


@pytest.mark.parametrize(
    "spoiled,parts",
    [(x[0], x[1:]) for group in (SHAPES, DTYPES, SCALARS, TENSORS) for x in group.values()],
    ids=[*SHAPES, *DTYPES, *SCALARS, *TENSORS],
)
def test_attention_refuses(spoiled, parts):
    refuses({**good(), **spoiled}, fc.ArgumentError, *parts)


PACKED = {
    "one of the two": ({"cu_seqlens_k": None}, "cu_seqlens_k is missing"),
    "of int64": ({"cu_seqlens_q": np.array([0, 2, 9])}, "cu_seqlens_q must be int32", "int64[3]"),
    "of floats": ({"cu_seqlens_q": zeros(3, f32)}, "cu_seqlens_q must be int32", "float32"),
    "decreasing": (
        {"cu_seqlens_q": np.array([0, 10, 9], np.int32)},
        "cu_seqlens_q must not decrease",
        "9 after 10",
    ),
    "past the end": (
        {"cu_seqlens_k": np.array([0, 5, 12], np.int32)},
        "cu_seqlens_k must end at the packed total 11, got 12",
    ),
    "not from 0": (
        {"cu_seqlens_k": np.array([1, 5, 11], np.int32)},
        "cu_seqlens_k[0] must be 0, got 1",
    ),
    "of different batches": (
        {"cu_seqlens_k": np.array([0, 11], np.int32)},
        "cu_seqlens_k must have shape [3]",
    ),
    "of rank 2": ({"cu_seqlens_q": zeros((1, 3), np.int32)}, "cu_seqlens_q must have 1 dimension"),
    "without an entry": (
        {"cu_seqlens_q": zeros(0, np.int32), "cu_seqlens_k": zeros(0, np.int32)},
        "cu_seqlens_q",
    ),
    "max_seqlen too small": ({"max_seqlen_q": 6}, "max_seqlen_q is 6", "length 7"),
    "max_seqlen negative": ({"max_seqlen_k": -1}, "max_seqlen_k must be in 0.."),
    "max_seqlen as a 0-d array": ({"max_seqlen_q": np.array(9)}, "max_seqlen_q"),
    "with a layout": ({"layout": "bhsd"}, "layout does not apply to packed"),
    "with padded lengths": ({"seqlens_q": zeros(2, np.int32)}, "seqlens_q"),
    "and 4-D tensors": (good(), "q must have 3 dimensions"),
}


@pytest.mark.parametrize("spoiled,parts", [(x[0], x[1:]) for x in PACKED.values()], ids=[*PACKED])
def test_packed_attention_refuses(spoiled, parts):
    refuses({**packed(), **spoiled}, fc.ArgumentError, *parts, out_shape=(9, HQ, DV))


UNSUPPORTED = {
    "page_table": ({"page_table": zeros((2, 1), np.int32)}, "page_table is not built yet"),
    "fp8": ({"q_descale": zeros(1, f32)}, "fp8"),
    "integers": (
        {n: x.astype(np.int32) for n, x in good().items()},
        "q has dtype int32",
        "float16, bfloat16, float32",
    ),
    "complex": ({n: x.astype(np.complex64) for n, x in good().items()}, "q is complex"),
    "booleans": ({n: x.astype(bool) for n, x in good().items()}, "bool"),
}


@pytest.mark.parametrize(
    "spoiled,parts", [(x[0], x[1:]) for x in UNSUPPORTED.values()], ids=[*UNSUPPORTED]
)
def test_attention_does_not_support(spoiled, parts):
    refuses({**good(), **spoiled}, fc.UnsupportedError, *parts)


def test_fp8_is_refused():
    refuses({n: x.astype(ml_dtypes.float8_e4m3fn) for n, x in good().items()}, fc.Error, "q")


# ---- arrays that are none, or not what they seem -------------------------------------------------


@pytest.mark.parametrize("bad", [None, 3, "q", [[1.0]], object()], ids=repr)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_not_an_array(name, bad):
    text = refuses({**good(), name: bad}, fc.ArgumentError, name)
    assert re.search(rf"\b{name}\b", text)


@pytest.mark.parametrize("name", ["alibi_slopes", "bias", "mask", "sinks", "seqlens_q", "out"])
def test_an_option_that_is_not_an_array(name):
    with pytest.raises(fc.ArgumentError, match=name):
        fc.attention(**good(), **{name: "text"})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_last_stride_must_be_one(name):
    call = good()
    call[name] = np.repeat(call[name], 2, axis=-1)[..., ::2]
    refuses(call, fc.ArgumentError, f"{name} must have stride 1", "got 2")
    call[name] = call[name].copy().swapaxes(1, 3).copy().swapaxes(1, 3)
    refuses(call, fc.ArgumentError, f"{name} must have stride 1")


def test_read_only_output():
    out = zeros((B, SQ, HQ, DV), f32)
    out.flags.writeable = False
    refuses({**good(), "out": out}, fc.ArgumentError, "out", "read-only")


def test_read_only_inputs_are_fine():
    call = good()
    for x in call.values():
        x.flags.writeable = False
    assert np.isfinite(fc.attention(**call)).all()


def test_output_that_is_an_input():
    call = good()
    call["v"] = np.repeat(call["v"], 2, -1)[..., :D].copy()
    refuses({**call, "out": call["q"]}, fc.ArgumentError, "out", "in place")


def test_output_with_overlapping_rows():
    out = np.lib.stride_tricks.as_strided(zeros(DV, f32), (B, SQ, HQ, DV), (0, 0, 0, 4))
    refuses({**good(), "out": out}, fc.ArgumentError, "out", "stride 0")


def test_unknown_keyword():
    with pytest.raises(TypeError, match="is_causal"):
        fc.attention(**good(), is_causal=True)


def test_options_are_keyword_only():
    call = good()
    with pytest.raises(TypeError, match="positional"):
        fc.attention(call["q"], call["k"], call["v"], "bshd")


class Producer:
    """A DLPack producer that misbehaves as told."""

    def __init__(self, array, capsule=None):
        self.array, self.capsule = array, capsule

    def __dlpack__(self, **_):
        if isinstance(self.capsule, Exception):
            raise self.capsule
        return self.capsule if self.capsule is not None else self.array.__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)


def test_any_dlpack_producer_is_an_array():
    call = good()
    want = fc.attention(**call)
    got = fc.attention(
        Producer(call["q"]), Producer(call["k"]), Producer(call["v"]), out=np.empty_like(want)
    )
    np.testing.assert_array_equal(got, want)


def test_a_freed_capsule():
    call = good()
    capsule = call["k"].__dlpack__()
    np.from_dlpack(Producer(None, capsule))  # consumes it
    refuses({**call, "k": Producer(None, capsule)}, fc.Error, "k")


def test_a_capsule_that_is_none():
    refuses({**good(), "v": Producer(None, 3)}, fc.Error, "v")


def test_a_producer_that_fails():
    with pytest.raises(Exception, match="not today") as raised:
        fc.attention(**{**good(), "v": Producer(None, BufferError("not today"))})
    assert isinstance(raised.value, (fc.Error, BufferError))


def test_refusals_leak_nothing():
    call = good()
    before = {name: sys.getrefcount(x) for name, x in call.items()}
    bad = {**call, "k": zeros((2, 5, 2, 7), f32)}
    for _ in range(200):
        with pytest.raises(fc.ArgumentError):
            fc.attention(**bad)
        with pytest.raises(fc.ArgumentError):
            fc.attention(**call, dropout_p=2.0)
        with pytest.raises(fc.Error):
            fc.attention(**{**call, "v": Producer(None, 3)})
    gc.collect()
    del bad
    assert {name: sys.getrefcount(x) for name, x in call.items()} == before


# ---- backward, merge, dropout_mask, block masks --------------------------------------------------


def gradient_call(**spoiled):
    call = good()
    result = fc.attention(**call, return_lse=True)
    call.update(dout=np.ones_like(result.out), out=result.out, lse=result.lse)
    call.update(spoiled)
    return call


BACKWARD = {
    "dout of another shape": ({"dout": zeros((B, SQ, HQ, D), f32)}, "dout must have shape"),
    "dout of another dtype": ({"dout": zeros((B, SQ, HQ, DV))}, "dout must be float32", "float64"),
    "out of another shape": ({"out": zeros((B, SQ, HQ, D), f32)}, "out must have shape"),
    "lse of another shape": ({"lse": zeros((B, SQ, HQ), f32)}, "lse must have shape [2,4,3]"),
    "lse of float64": ({"lse": zeros((B, HQ, SQ))}, "lse must be float32", "float64"),
    "no lse": ({"lse": None}, "lse"),
    "no out": ({"out": None}, "out"),
    "dlse of another shape": ({"dlse": zeros((B, HQ), f32)}, "dlse"),
    "dq of another shape": ({"dq": zeros((B, SK, HQ, D), f32)}, "dq must have shape"),
    "dk of another dtype": ({"dk": zeros((B, SK, HK, D), np.float64)}, "dk must be float32"),
    "dv that overlaps": ({"dv": np.broadcast_to(zeros(DV, f32), (B, SK, HK, DV))}, "dv"),
    "dropout without rng": ({"dropout_p": 0.5}, "rng is required"),
    "heads that do not divide": (
        {"k": zeros((B, SK, 3, D), f32), "v": zeros((B, SK, 3, DV), f32)},
        "multiple of k's",
    ),
}


@pytest.mark.parametrize(
    "spoiled,parts", [(x[0], x[1:]) for x in BACKWARD.values()], ids=[*BACKWARD]
)
def test_backward_refuses(spoiled, parts):
    call = gradient_call(**spoiled)
    before = {n: x.copy() for n, x in call.items() if isinstance(x, np.ndarray)}
    with pytest.raises(fc.ArgumentError) as raised:
        fc.attention_backward(**call)
    for part in parts:
        assert part in str(raised.value)
    for name, x in before.items():
        np.testing.assert_array_equal(call[name], x)


def test_merge_refuses():
    out, lse = zeros((1, 3, 2, 4), f32), zeros((1, 2, 3), f32)
    for outs, lses, part in (
        ([], [], "at least 1"),
        ([out], [lse, lse], "lses"),
        ([out, zeros((1, 4, 2, 4), f32)], [lse, lse], "outs[1] must have shape [1,3,2,4]"),
        ([out, out], [lse, zeros((1, 3, 2), f32)], "lses[1] must have shape [1,2,3]"),
        ([out, out.astype(np.float64)], [lse, lse], "outs[1] must be float32"),
        ([out, "x"], [lse, lse], "outs[1]"),
    ):
        with pytest.raises(fc.ArgumentError) as raised:
            fc.merge(outs, lses)
        assert part in str(raised.value)


def test_dropout_mask_refuses():
    for shape, p, rng, part in (
        ((1, 1, 2, 2), 1.0, (1, 2), "[0, 1)"),
        ((1, 1, 2, 2), 0.5, None, "rng"),
        ((1, 2, 2), 0.5, (1, 2), "four integers"),
        ((1, 1, 2, -2), 0.5, (1, 2), ""),
    ):
        with pytest.raises((fc.ArgumentError, ValueError)) as raised:
            fc.dropout_mask(shape, p, rng)
        assert part in str(raised.value)


def test_a_block_mask_spoiled_by_hand():
    mask = fc.BlockMask.from_dense(np.ones((SQ, SK), bool), block=(2, 2))
    for name, value, part in (
        ("kv_num_blocks", 4, "must be in 0..3"),
        ("kv_num_blocks", -1, "must be in 0..3"),
        ("kv_indices", 3, "must ascend within 0..2"),
        ("kv_indices", -1, "must ascend"),
        ("kv_indices", 2, "must ascend"),
    ):
        bad = mask.map(np.array)
        getattr(bad, name).reshape(-1)[0] = value
        refuses({**good(), "block_mask": bad}, fc.ArgumentError, f"block_mask.{name}", part)
    bad = mask.map(lambda x: x.astype(np.int64))
    refuses({**good(), "block_mask": bad}, fc.ArgumentError, "kv_num_blocks must be int32")


# ---- other frameworks ----------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def torch_call(torch, **spoiled):
    return {**{name: torch.from_numpy(x) for name, x in good().items()}, **spoiled}


def test_torch_tensor_that_requires_grad(torch):
    call = torch_call(torch)
    call["k"].requires_grad_()
    with pytest.raises(fc.Error, match=r"\bk\b.*grad"):
        fc.attention(**call)
    with torch.no_grad():
        assert torch.isfinite(fc.attention(**call)).all()


@pytest.mark.parametrize(
    "kind", ["sparse", "meta", "quantized", "nested", "fake", "conj", "neg", "freed"]
)
def test_torch_tensors_without_plain_memory(torch, kind):
    call = torch_call(torch)
    q = call["q"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "sparse":
            q = q.to_sparse()
        elif kind == "meta":
            q = q.to("meta")
        elif kind == "quantized":
            q = torch.quantize_per_tensor(q, 0.1, 0, torch.qint8)
        elif kind == "nested":
            q = torch.nested.nested_tensor([q[0], q[1]])
        elif kind == "fake":
            from torch._subclasses.fake_tensor import FakeTensorMode

            q = FakeTensorMode().from_tensor(q)
        elif kind == "conj":
            q = torch.complex(q, q).conj()
        elif kind == "neg":
            q = torch.complex(q, q).conj().imag  # float32 with the lazy negation bit
            assert q.is_neg()
            call = {**call, "q": q}
        elif kind == "freed":
            q = q.clone()
            q.untyped_storage().resize_(0)
    with pytest.raises(fc.Error, match=r"\bq\b"):
        fc.attention(**{**call, "q": q})


def test_jax_tracers_are_refused():
    jax = pytest.importorskip("jax")
    call = {name: jax.numpy.asarray(x) for name, x in good().items()}
    with pytest.raises(fc.Error, match=r"\bq\b"):
        jax.jit(lambda q: fc.attention(q, call["k"], call["v"]))(call["q"])


def overlapping() -> dict[str, dict]:
    """Backward calls whose tensors share elements."""
    rng = np.random.default_rng(0)
    call = {name: rng.standard_normal((1, 9, 2, 8)).astype(np.float32) for name in "qkv"}
    out, lse, _ = fc.attention(**call, return_lse=True)
    grad = np.empty_like(call["q"])
    whole = {"dout": np.ones_like(out), **call, "out": out, "lse": lse}
    near_k = shifted(whole, "k")
    return {
        "dq and dk are one array": {**whole, "dq": grad, "dk": grad},
        "dq is dout": {**whole, "dq": whole["dout"]},
        "dv is v": {**whole, "dv": whole["v"]},
        "dk is a shifted view of k's memory": {**whole, "dk": near_k},
    }


def shifted(call: dict, name: str) -> np.ndarray:
    x = call[name]
    memory = np.empty(x.size + 8, x.dtype)
    memory[: x.size] = x.reshape(-1)
    call[name] = memory[: x.size].reshape(x.shape)
    return memory[8:].reshape(x.shape)


def test_outputs_that_share_memory_are_refused():
    for what, call in overlapping().items():
        dout, q, k, v, out, lse = (call.pop(n) for n in ("dout", "q", "k", "v", "out", "lse"))
        with pytest.raises(fc.ArgumentError, match="shares memory with"):
            fc.attention_backward(dout, q, k, v, out, lse, **call)
            pytest.fail(what)


def test_slices_of_one_buffer_share_no_element():
    packed = np.random.default_rng(0).standard_normal((2, 9, 3, 2, 8))
    q, k, v = (packed[:, :, i] for i in range(3))
    out, lse, _ = fc.attention(q, k, v, return_lse=True)
    grads = np.full_like(packed, np.nan)
    dq, dk, dv = (grads[:, :, i] for i in range(3))
    fc.attention_backward(out, q, k, v, out, lse, dq=dq, dk=dk, dv=dv)
    want = fc.attention_backward(out, q, k, v, out, lse)
    np.testing.assert_array_equal(grads, np.stack([want.dq, want.dk, want.dv], axis=2))


@pytest.mark.parametrize("scale", [5e-324, 1e-45, 1e308])
def test_a_scale_that_float32_cannot_hold_is_refused(scale):
    with pytest.raises(fc.ArgumentError, match="scale must be"):
        fc.attention(**good(), scale=scale)
