"""Attention written straight from its definition, in NumPy: what every kernel is tested against.

One (batch, head) at a time, whole N x N matrices, no tiling, no tricks. Symbols as in the paper:

    S = scale Q K^T -> softcap -> + alibi -> + bias,  restricted to the visible keys
    P = softmax(S)                                    with a sink: one more logit, no value
    O = (keep * P / (1 - p)) V

    dV = (keep * P / (1 - p))^T dO                    dP = keep / (1 - p) * (dO V^T)
    dS = P * (dP - delta + dlse)                      delta = rowsum(O * dO) = rowsum(P * dP)
    dQ = scale dS K,  dK = scale dS^T Q               (dS passed back through softcap)

An excluded key is removed, not multiplied by zero, so a NaN there cannot matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class Result(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    max_logits: np.ndarray


class Grads(NamedTuple):
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None
    dsinks: np.ndarray | None


def attention(q, k, v, *, precision: Any = np.float64, **options) -> Result:
    """Forward. Shapes and options as in flashcore.attention; block_mask is a dense boolean array.

    precision: the dtype everything is computed in. A 16-bit precision means what a framework does
    with it: operands of a matrix product are rounded to it, sums and the softmax are float32.
    """
    problem = _Problem(q, k, v, precision, options)
    out = problem.empty_like_q(v.shape[-1])
    lse = np.full(problem.rows_shape, -np.inf, problem.dtype)
    max_logits = lse.copy()
    for h in problem.heads():
        _, p, row_lse, row_max = _softmax(h)
        out[h.at_q] = _dot(problem.round(p * h.keep), h.v, h.visible)
        lse[h.at_row], max_logits[h.at_row] = row_lse, row_max
    return Result(problem.from_bshd(out), lse, max_logits)


def attention_backward(
    dout, q, k, v, *, dlse=None, precision: Any = np.float64, **options
) -> Grads:
    """Gradients of sum(dout * out) + sum(dlse * lse)."""
    problem = _Problem(q, k, v, precision, options)
    dout = problem.to_bshd(dout)
    dq, dk, dv = (np.zeros(x.shape, problem.dtype) for x in (problem.q, problem.k, problem.v))
    dbias, dsinks = (
        None if x is None else np.zeros(np.shape(x), problem.dtype)
        for x in (options.get("bias"), options.get("sinks"))
    )
    for h in problem.heads():
        s_slope, p, row_lse, _ = _softmax(h)
        do = dout[h.at_q]
        seen = h.visible.any(axis=1)
        dp = h.keep * _outer(do, h.v, h.visible)
        o = problem.round(_dot(problem.round(p * h.keep), h.v, h.visible))
        delta = np.where(seen, (o * do).sum(axis=1), 0)
        slope = (
            np.zeros(len(delta))
            if dlse is None
            else np.where(np.isfinite(row_lse), dlse[h.at_row].astype(problem.dtype), 0)
        )
        ds = p * (dp + (slope - delta)[:, None])
        dv[h.at_k] += _dot(problem.round(p * h.keep).T, do, h.visible.T)
        if dbias is not None:
            _add_broadcast(dbias, h, ds)
        if dsinks is not None and h.sink > -np.inf:
            p_sink = np.exp(h.sink - row_lse)
            dsinks[h.head] += (p_sink * (slope - delta)).sum()
        ds = problem.round(ds * s_slope)
        dq[h.at_q] += h.scale * _dot(ds, h.k, h.visible)
        dk[h.at_k] += h.scale * _dot(ds.T, h.q, h.visible.T)
    dq, dk, dv = (problem.from_bshd(x) for x in (dq, dk, dv))
    return Grads(dq, dk, dv, dbias, dsinks)


def _softmax(h):
    """dS/d(scaled QK^T) of the softcap, P, lse and the largest visible score of every row."""
    s = h.scale * _outer(h.q, h.k, h.visible)
    s_slope = np.ones_like(s)
    if h.softcap:
        t = np.tanh(s / h.softcap)
        s, s_slope = h.softcap * t, 1 - t * t
    s = np.where(h.visible, s - h.slope * np.abs(h.distance) + h.bias, -np.inf)
    row_max = s.max(axis=1, initial=-np.inf)
    top = np.maximum(row_max, h.sink)
    top = np.where(np.isneginf(top), 0, top)
    with np.errstate(divide="ignore"):
        row_lse = top + np.log(np.exp(s - top[:, None]).sum(axis=1) + np.exp(h.sink - top))
    p = np.exp(s - np.where(np.isneginf(row_lse), 0, row_lse)[:, None])
    return s_slope, p, row_lse, row_max


def _dot(weights, rows, used):
    """weights @ rows over the used entries alone: 0 * NaN must not appear."""
    if not len(weights) or np.isfinite(rows).all():
        return weights @ rows
    return np.stack([w[u] @ rows[u] for w, u in zip(weights, used)])


def _outer(a, b, used):
    """a @ b.T where used, 0 elsewhere."""
    with np.errstate(invalid="ignore"):
        return np.where(used, a @ b.T, 0)


def _add_broadcast(dbias, h, ds):
    """dbias += ds, summed over the dimensions in which bias was broadcast."""
    part = dbias[min(h.batch, dbias.shape[0] - 1), min(h.head, dbias.shape[1] - 1)]
    for axis in (0, 1):
        if part.shape[axis] == 1:
            ds = ds.sum(axis=axis, keepdims=True)
    part[: ds.shape[0], : ds.shape[1]] += ds


class _Head(NamedTuple):
    batch: int
    head: int
    at_q: tuple  # where this head's rows are in a (B, S, H, D) or (total, H, D) tensor
    at_k: tuple
    at_row: tuple  # where they are in lse
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float
    softcap: float
    slope: float
    distance: np.ndarray  # i + q_offset - j
    bias: Any
    sink: float
    visible: np.ndarray
    keep: Any  # 1 / (1 - p) where dropout keeps, 0 where it drops


class _Problem:
    """The options of one call, resolved."""

    def __init__(self, q, k, v, precision, options):
        self.options = options
        self.packed = options.get("cu_seqlens_q") is not None
        self.bhsd = options.get("layout", "bshd") == "bhsd" and not self.packed
        half = np.dtype(precision).itemsize == 2
        self.dtype = np.dtype(np.float32 if half else precision)
        self.round = (lambda x: x.astype(precision).astype(np.float32)) if half else (lambda x: x)
        self.q, self.k, self.v = (self.to_bshd(x) for x in (q, k, v))
        self.num_heads, self.head_dim = self.q.shape[-2:]
        self.group = max(1, self.num_heads // max(1, self.k.shape[-2]))
        if self.packed:
            self.batch = len(options["cu_seqlens_q"]) - 1
            self.rows_shape = (self.num_heads, len(self.q))
        else:
            self.batch = len(self.q)
            self.rows_shape = (self.batch, self.num_heads, self.q.shape[1])

    def to_bshd(self, x):
        x = np.swapaxes(np.asarray(x), 1, 2) if self.bhsd else np.asarray(x)
        return x.astype(self.dtype)

    def from_bshd(self, x):
        return np.swapaxes(x, 1, 2) if self.bhsd else x

    def empty_like_q(self, head_dim):
        return np.zeros(self.q.shape[:-1] + (head_dim,), self.dtype)

    def span(self, b, which):
        """Rows of sequence b in its tensor."""
        cu, lengths = (self.options.get(name + which) for name in ("cu_seqlens_", "seqlens_"))
        if cu is not None:
            return slice(int(cu[b]), int(cu[b + 1]))
        padded = (self.q if which == "q" else self.k).shape[1]
        return slice(0, padded if lengths is None else int(lengths[b]))

    def visible(self, b, h, i, j, diagonal):
        """The rules that exclude, one line each."""
        o = self.options
        left, right = o.get("window_size") or (None, None)
        seen = np.ones((i.size, j.size), bool)
        if o.get("causal"):
            seen &= j <= diagonal
        if left is not None:
            seen &= j >= diagonal - left
        if right is not None:
            seen &= j <= diagonal + right
        for dense in (o.get("mask"), o.get("block_mask")):
            if dense is not None:
                seen &= _pick(np.asarray(dense), b, h, i.size, j.size).astype(bool)
        return seen

    def heads(self) -> Iterator[_Head]:
        o = self.options
        scale = o.get("scale")
        scale = 1 / np.sqrt(self.dtype.type(max(1, self.head_dim))) if scale is None else scale
        p_drop = dropout_threshold(o.get("dropout_p", 0.0)) / 2**16
        for b in range(self.batch):
            rows, keys = self.span(b, "q"), self.span(b, "k")
            sq, sk = rows.stop - rows.start, keys.stop - keys.start
            offset = o.get("q_offset")
            if offset is None:
                offset = 0 if o.get("align") == "top_left" else sk - sq
            else:
                offset = int(np.broadcast_to(offset, (self.batch,))[b])
            i, j = np.arange(sq)[:, None], np.arange(sk)[None, :]
            keep = 1.0
            if p_drop:
                keep = dropout_mask((1, self.num_heads, sq, sk), o["dropout_p"], o["rng"], batch=b)
            for h in range(self.num_heads):
                lead = () if self.packed else (b,)
                at_q, at_k = lead + (rows, h), lead + (keys, h // self.group)
                slope, bias, sink = 0.0, 0.0, -np.inf
                if o.get("alibi_slopes") is not None:
                    slope = np.broadcast_to(o["alibi_slopes"], (self.batch, self.num_heads))[b, h]
                if o.get("bias") is not None:
                    bias = _pick(np.asarray(o["bias"]), b, h, sq, sk).astype(self.dtype)
                if o.get("sinks") is not None:
                    sink = self.dtype.type(o["sinks"][h])
                yield _Head(
                    b,
                    h,
                    at_q,
                    at_k,
                    (h, rows) if self.packed else (b, h, rows),
                    self.q[at_q],
                    self.k[at_k],
                    self.v[at_k],
                    self.dtype.type(scale),
                    self.dtype.type(o.get("softcap", 0.0)),
                    self.dtype.type(slope),
                    (i + offset - j).astype(self.dtype),
                    bias,
                    sink,
                    self.visible(b, h, i, j, i + offset),
                    self.dtype.type(1)
                    if not p_drop
                    else keep[0, h].astype(self.dtype) / self.dtype.type(1 - p_drop),
                )


def _pick(x, b, h, rows, keys):
    """The (rows, keys) matrix of one head from a tensor whose leading dims may be 1."""
    x = x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]
    return np.broadcast_to(x[:rows, :keys], (rows, keys))


# ------------------------------------------------------------------------------------------------
# Dropout: the bits are a pure function of (seed, offset, batch, head, i, j).


def philox4x32_10(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC'11). counter: (..., 4) uint32; returns (..., 4) uint32."""
    c = [counter[..., n].astype(np.uint64) for n in range(4)]
    low, k0, k1 = np.uint64(0xFFFFFFFF), *(np.uint64(x) for x in key)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & low, (a >> np.uint64(32)) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, axis=-1).astype(np.uint32)


def dropout_threshold(p: float) -> int:
    """p as a multiple of 2^-16, the nearest."""
    return int(np.floor(p * 2**16 + 0.5))


def dropout_mask(shape, p: float, rng, *, batch: int = 0) -> np.ndarray:
    """Which scores dropout keeps: bool (B, H, Sq, Sk). batch: the index of the first sequence."""
    seed, offset = (int(x) % 2**64 for x in rng)
    word = np.array([offset % 2**32, offset >> 32, 0, 0], np.uint32)
    key = tuple(int(x) for x in philox4x32_10(word, (seed % 2**32, seed >> 32))[:2])
    b, h, i, j = np.ogrid[tuple(slice(0, n) for n in shape)]
    # Eight numbers of one counter fall on rows i, i + 8 and columns j, j + 1, j + 8, j + 9.
    patch = np.stack(np.broadcast_arrays(i // 16 * 8 + i % 8, j // 16 * 4 + j // 2 % 4), axis=-1)
    counter = np.empty(tuple(shape) + (4,), np.uint32)
    counter[..., 0], counter[..., 1] = patch[..., 1], patch[..., 0]
    counter[..., 2], counter[..., 3] = h, b + batch
    words = philox4x32_10(counter, key)
    number = np.broadcast_to(i // 8 % 2 * 2 + j // 8 % 2, shape)[..., None]
    word = np.take_along_axis(words, number, axis=-1)[..., 0]
    bits = np.where(j % 2 == 1, word >> np.uint32(16), word & np.uint32(0xFFFF))
    return bits >= dropout_threshold(p)
