"""Random calls of the CPU path, valid and spoiled, and a check of each. See test_fuzz.py."""

from __future__ import annotations

import collections
import json
import math
import random
import sys
import warnings
from typing import Any

import ml_dtypes
import numpy as np

import flashcore as fc
from flashcore import reference

# dtype -> (absolute tolerance relative to the largest value, its reference's float type)
TOLERANCE = {np.float64: 1e-12, np.float32: 3e-6, np.float16: 4e-3, ml_dtypes.bfloat16: 3e-2}
POOL = np.random.default_rng(0).standard_normal(1 << 14)
POOLS = {dtype: POOL.astype(dtype) for dtype in (*TOLERANCE, np.int32, np.int64, np.bool_)}


class Wrong(AssertionError):
    """A result that is neither right nor refused."""


def array(r: random.Random, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape)
    start = r.randrange(len(POOL) - size)
    return POOLS[dtype][start : start + size].reshape(shape).copy()


def scores_shape(r: random.Random, s: dict[str, int]) -> tuple[int, ...]:
    return tuple(n if r.random() < 0.6 else 1 for n in (s["b"], s["hq"], s["sq"], s["sk"]))


def valid_call(r: random.Random) -> dict[str, Any]:
    """Arguments that must be accepted."""
    dtype = r.choice((np.float32, np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
    hk = r.choice((1, 1, 2))
    s = {
        "b": r.choice((0, 1, 1, 1, 2)),
        "sq": r.randint(0, 9),
        "sk": r.randint(0, 12),
        "hk": hk,
        "hq": hk * r.choice((1, 1, 2, 3)),
        "d": r.randint(1, 9),
        "dv": r.randint(1, 9),
    }
    call: dict[str, Any] = {}
    varlen = r.random() < 0.2
    if varlen:
        batch = r.randint(0, 3)
        for name in "qk":
            lengths = [r.randint(0, 5) for _ in range(batch)]
            cu = np.zeros(batch + 1, np.int32)
            cu[1:] = np.cumsum(lengths)
            call["cu_seqlens_" + name] = cu
            s["s" + name] = max(lengths, default=0)
            s["t" + name] = sum(lengths)
            if r.random() < 0.3:
                bound = call["max_seqlen_" + name] = s["s" + name] + r.randint(0, 3)
                s["s" + name] = min(bound, s["t" + name]) if bound else s["s" + name]
        s["b"] = batch
        shapes = (
            (s["tq"], s["hq"], s["d"]),
            (s["tk"], s["hk"], s["d"]),
            (s["tk"], s["hk"], s["dv"]),
        )
    else:
        shapes = (
            (s["b"], s["sq"], s["hq"], s["d"]),
            (s["b"], s["sk"], s["hk"], s["d"]),
            (s["b"], s["sk"], s["hk"], s["dv"]),
        )
        if r.random() < 0.3:
            call["layout"] = "bhsd"
            shapes = tuple((a, c, b, d) for a, b, c, d in shapes)
        if r.random() < 0.15:
            call["seqlens_q"] = np.array([r.randint(0, s["sq"]) for _ in range(s["b"])], np.int32)
        if r.random() < 0.15:
            call["seqlens_k"] = np.array([r.randint(0, s["sk"]) for _ in range(s["b"])], np.int32)
    for name, shape in zip("qkv", shapes):
        call[name] = array(r, shape, dtype)
    if r.random() < 0.4:
        call["causal"] = True
    if r.random() < 0.2:
        call["window_size"] = (r.choice((None, -1, 0, 3)), r.choice((None, -1, 0, 2)))
    if r.random() < 0.2:
        call["align"] = r.choice(("top_left", "bottom_right"))
    if r.random() < 0.15:
        call["q_offset"] = r.choice((r.randint(-15, 15), array(r, (s["b"],), np.int32)))
    if r.random() < 0.2:
        call["scale"] = r.choice((0.0, 1.0, -0.5, r.random()))
    if r.random() < 0.15:
        call["softcap"] = r.choice((0.0, 0.5, 30.0))
    if r.random() < 0.15:
        shape = (s["hq"],) if r.random() < 0.5 else (s["b"], s["hq"])
        call["alibi_slopes"] = np.abs(array(r, shape, np.float32))
    if r.random() < 0.2:
        wide = np.float64 if dtype is np.float64 else np.float32
        call["bias"] = array(r, scores_shape(r, s), r.choice((wide, dtype)))
    if r.random() < 0.15:
        call["mask"] = array(r, scores_shape(r, s), np.float32) > -0.5
    if r.random() < 0.15:
        call["sinks"] = array(r, (s["hq"],), np.float32)
    if r.random() < 0.15:
        call["dropout_p"] = r.choice((0.0, 0.25, 0.5, 0.999))
        call["rng"] = (r.randint(-(2**63), 2**63 - 1), r.randint(0, 2**40))
    if not varlen and r.random() < 0.1:
        block = (r.randint(1, 5), r.randint(1, 5))
        kept = np.array(
            [
                [r.random() < 0.6 for _ in range(-(-s["sk"] // block[1]))]
                for _ in range(-(-s["sq"] // block[0]))
            ],
            bool,
        )
        kept = kept.reshape(-(-s["sq"] // block[0]), -(-s["sk"] // block[1]))
        dense = kept.repeat(block[0], 0).repeat(block[1], 1)[: s["sq"], : s["sk"]]
        call["block_mask"] = fc.BlockMask.from_dense(dense, block=block)
    if r.random() < 0.1:
        call["num_splits"] = r.randint(0, 4)
    elif r.random() < 0.1:
        call["split_size"] = r.randint(1, 9)
    if r.random() < 0.1:
        call["deterministic"] = True
    if dtype in (np.float16, ml_dtypes.bfloat16) and r.random() < 0.2:
        call["out_dtype"] = "float32"
    return call


NOT_VALUES = (
    None,
    "x",
    -1,
    2**70,
    float("nan"),
    float("inf"),
    1.5,
    [],
    {},
    (1, 2),
    object(),
    True,
    np.float32(3),
    np.array(2),
    np.zeros((2, 2), np.float32),
    np.zeros(0, np.int32),
)


def spoil(r: random.Random, call: dict[str, Any]) -> None:
    """Changes one thing. The call may stay valid; then its result is checked as any other."""
    kind = r.randrange(9)
    tensors = [n for n, x in call.items() if isinstance(x, np.ndarray) and x.ndim]
    name = r.choice(tensors)
    x = call[name]
    if kind == 0:  # another dtype
        call[name] = x.astype(
            r.choice(
                (np.float32, np.float64, np.float16, np.int32, np.int64, np.uint8, np.complex64)
            )
        )
    elif kind == 1:  # another extent
        axis = r.randrange(x.ndim)
        call[name] = np.repeat(x, r.choice((0, 2, 3)), axis=axis)
    elif kind == 2:  # another rank
        call[name] = r.choice((x[None], x.reshape(-1), x.reshape(x.shape + (1,))))
    elif kind == 3:  # strides
        call[name] = r.choice(
            (
                x[..., ::-1],
                np.repeat(x, 2, axis=-1)[..., ::2],
                x.T,
                np.broadcast_to(x, (2, *x.shape)),
            )
        )
    elif kind == 4:  # something else in its place
        call[name] = r.choice(NOT_VALUES)
    elif kind == 5:  # an option of another type
        option = r.choice(
            (
                "layout",
                "scale",
                "window_size",
                "align",
                "q_offset",
                "softcap",
                "alibi_slopes",
                "bias",
                "mask",
                "sinks",
                "block_mask",
                "dropout_p",
                "rng",
                "cu_seqlens_q",
                "cu_seqlens_k",
                "max_seqlen_q",
                "max_seqlen_k",
                "seqlens_q",
                "seqlens_k",
                "page_table",
                "q_descale",
                "num_splits",
                "split_size",
                "out",
                "out_dtype",
                "stream",
            )
        )
        call[option] = r.choice(NOT_VALUES)
    elif kind == 6:  # values of an integer tensor
        for option in ("cu_seqlens_q", "cu_seqlens_k", "seqlens_q", "seqlens_k"):
            x = call.get(option)
            if isinstance(x, np.ndarray) and x.dtype == np.int32 and x.size:
                x = call[option] = x.copy()
                x.reshape(-1)[r.randrange(x.size)] ^= r.choice((1, 2, 64, -(2**31)))
    elif kind == 7:  # a block mask whose lists are nonsense
        if isinstance(call.get("block_mask"), fc.BlockMask):
            mask = call["block_mask"].map(np.array)
            part = r.choice((mask.kv_num_blocks, mask.kv_indices)).reshape(-1)
            if len(part):
                part[r.randrange(len(part))] ^= r.choice((1, 2, 1024, -(2**31)))
            call["block_mask"] = mask
    else:  # scalars at their limits
        call.update(
            r.choice(
                (
                    {"dropout_p": 1.0, "rng": (1, 2)},
                    {"dropout_p": 0.5},
                    {"softcap": float("nan")},
                    {"scale": float("inf")},
                    {"q_offset": 2**40},
                    {"q_offset": -(2**63)},
                    {"window_size": (-2, 0)},
                    {"window_size": (2**62, 2**62)},
                    {"num_splits": 2**31 - 1},
                    {"split_size": 2**62},
                    {"max_seqlen_q": 2**40},
                    {"layout": "sbhd"},
                )
            )
        )


def one(n: int) -> str:
    """Makes and checks call n: "right" or "refused"; raises Wrong."""
    r = random.Random(n)
    call = valid_call(r)
    spoiled = r.random() < 0.5
    if spoiled:
        for _ in range(r.choice((1, 1, 1, 2))):
            spoil(r, call)
    q, k, v = (call.pop(name) for name in "qkv")
    options = dict(call)
    try:
        result = fc.attention(q, k, v, **call, return_lse=True, return_max_logits=True)
    except fc.Error as e:
        if not spoiled:
            raise Wrong(f"call {n}: a valid call was refused: {e}") from e
        if len(str(e)) < 10:
            raise Wrong(f"call {n}: refused without a reason: {e!r}") from e
        return "refused"
    except Exception as e:
        raise Wrong(f"call {n}: {type(e).__name__} is none of flashcore's errors: {e}") from e
    try:
        check(n, q, k, v, options, result, gradients=n % 4 == 0)
    except Wrong:
        raise
    except Exception as e:
        raise Wrong(f"call {n}: accepted, but it has no meaning: {type(e).__name__}: {e}") from e
    return "right"


def check(n, q, k, v, options, result, *, gradients):
    left, right = options.get("window_size") or (None, None)
    values = {
        name: x
        for name, x in options.items()
        if name
        not in (
            "out",
            "out_dtype",
            "stream",
            "num_splits",
            "split_size",
            "deterministic",
            "max_seqlen_q",
            "max_seqlen_k",
        )
    }
    values["window_size"] = tuple(None if w == -1 else w for w in (left, right))
    if values.get("block_mask") is not None:
        values["block_mask"] = values["block_mask"].to_dense()
    tolerance = TOLERANCE[q.dtype.type]
    exact = reference.attention(q, k, v, **values)
    near(n, "out", result.out, exact.out, tolerance)
    stats = 1e-12 if q.dtype == np.float64 else 1e-5
    near(n, "max_logits", result.max_logits, exact.max_logits, stats)
    near(n, "lse", result.lse, exact.lse, stats)
    # P is recomputed as exp(S - lse), so the rounding of a large lse is a relative error of P.
    lse = np.abs(exact.lse[np.isfinite(exact.lse)]).max(initial=0)
    if gradients and lse < 1e4:
        # Dropout multiplies dP, whose parts cancel in dS, by 1 / (1 - p).
        grown = 1 / (1 - (options.get("dropout_p") or 0.0))
        from_lse = 4 * np.finfo(result.lse.dtype).eps * lse
        rng = np.random.default_rng(n)
        dout = rng.standard_normal(result.out.shape).astype(result.out.dtype)
        kept = {name: x for name, x in options.items() if name not in ("out", "out_dtype")}
        got = fc.attention_backward(dout, q, k, v, result.out, result.lse, **kept)
        want = reference.attention_backward(dout, q, k, v, **values)
        for name in want._fields:
            if getattr(want, name) is not None:
                narrow = 1e-5 if name == "dsinks" else 0  # float32 even for float64 inputs
                near(
                    n,
                    name,
                    getattr(got, name),
                    getattr(want, name),
                    max(4 * tolerance * grown, narrow) + from_lse,
                )


def near(n, name, got, want, tolerance):
    if got.shape != want.shape:
        raise Wrong(f"call {n}: {name} has shape {got.shape}, not {want.shape}")
    if not got.size:
        return
    got = got.astype(np.float64)
    finite = np.isfinite(want)
    scale = 1 + np.abs(want[finite]).max(initial=0)
    with np.errstate(invalid="ignore"):
        wrong = np.where(
            finite,
            ~(np.abs(got - want) <= tolerance * scale),
            ~((got == want) | (np.isnan(got) & np.isnan(want))),
        )
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise Wrong(f"call {n}: {name}{list(at)} is {got[at]}, not {want[at]}")


def main(count: int, first: int = 0) -> None:
    fc.set_num_threads(1)
    warnings.simplefilter("ignore")  # complex values cast to real, on purpose
    counts: collections.Counter[str] = collections.Counter()
    for n in range(first, first + count):
        counts[one(n)] += 1
    json.dump(counts, sys.stdout)
    print()
