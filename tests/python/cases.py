"""The problems that every kernel is tested on: named data, each with the reason it is here."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}


@dataclasses.dataclass(frozen=True)
class Case:
    reason: str
    dtype: str = "f32"
    b: int = 2
    q: int = 113  # query rows
    k: int = 203  # keys
    h: tuple[int, int] = (2, 2)  # query heads, key/value heads
    d: int = 64
    dv: int | None = None
    layout: str = "bshd"
    strides: str = "packed"  # or "permuted" (heads outside rows), "sliced" (a part of a larger one)
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    align: str = "bottom_right"
    q_offset: int | tuple[int, ...] | None = None
    softcap: float = 0.0
    alibi: str = ""  # "h": slopes per head, "bh": per batch and head
    bias: str = ""  # which of b, h, q, k are full; the others have size 1. "bhqk", "k", ...
    mask: str = ""  # the same
    sinks: bool = False
    blocks: tuple[int, int] | None = None  # a random block mask of this block size
    dropout: float = 0.0
    lengths_q: tuple[int, ...] | None = None  # valid rows of a padded batch
    lengths_k: tuple[int, ...] | None = None
    packed_q: tuple[int, ...] | None = None  # varlen: the sequences' lengths
    packed_k: tuple[int, ...] | None = None
    scale: float | None = None
    out_dtype: str = ""
    fixed: bool = False  # the order of sums; a backward test that heeds it says deterministic=True

    def __str__(self) -> str:
        parts = [self.dtype, f"b{self.b}", f"q{self.q}k{self.k}", f"h{self.h[0]}x{self.h[1]}"]
        if self.packed_q is not None:
            parts[1:3] = ["varlen" + "_".join(map(str, self.packed_q))]
        parts.append(f"d{self.d}" + (f"v{self.dv}" if self.dv else ""))
        if self.causal:
            parts.append("causal")
        if self.window != (None, None):
            parts.append("window{}_{}".format(*("inf" if w is None else w for w in self.window)))
        if self.align == "top_left":
            parts.append("topleft")
        if self.q_offset is not None:
            parts.append("offset" + str(self.q_offset).replace(" ", "").strip("()"))
        if self.lengths_q or self.lengths_k:
            lengths = (self.lengths_q or ()) + (self.lengths_k or ())
            parts.append("padded" + "_".join(map(str, lengths)))
        for name in ("softcap", "alibi", "bias", "mask", "sinks", "dropout", "scale"):
            value = getattr(self, name)
            if value or name == "scale" and value is not None:
                parts.append(name if value is True else f"{name}{value}")
        if self.blocks:
            parts.append("blocks{}x{}".format(*self.blocks))
        if self.layout != "bshd":
            parts.append(self.layout)
        if self.strides != "packed":
            parts.append(self.strides)
        if self.out_dtype:
            parts.append("out" + self.out_dtype)
        return "-".join(parts)

    @property
    def np_dtype(self) -> Any:
        return DTYPES[self.dtype]

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """q, k, v, dout, dlse."""
        rng = np.random.default_rng(seed)
        dv = self.dv or self.d
        make = lambda rows, heads, dim: self._tensor(rng, rows, heads, dim)
        q = make("q", self.h[0], self.d)
        k = make("k", self.h[1], self.d)
        v = make("k", self.h[1], dv)
        dout = make("q", self.h[0], dv)
        stats = (
            (self.h[0], sum(self.packed_q))
            if self.packed_q is not None
            else (self.b, self.h[0], self.q)
        )
        lse_dtype = np.float64 if self.dtype == "f64" else np.float32
        dlse = rng.standard_normal(stats).astype(lse_dtype)
        return {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse}

    def _tensor(self, rng: np.random.Generator, which: str, heads: int, dim: int) -> np.ndarray:
        lengths = self.packed_q if which == "q" else self.packed_k
        if lengths is not None:
            shape: tuple[int, ...] = (sum(lengths), heads, dim)
        else:
            rows = self.q if which == "q" else self.k
            shape = (
                (self.b, rows, heads, dim) if self.layout == "bshd" else (self.b, heads, rows, dim)
            )
        x = rng.standard_normal(shape).astype(self.np_dtype)
        if self.strides == "permuted" and len(shape) == 4:
            return np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3)
        if self.strides == "sliced":
            room = np.full(shape[:-2] + (shape[-2] + 3, dim + 8), np.nan, self.np_dtype)
            room[..., 1 : 1 + shape[-2], :dim] = x
            return room[..., 1 : 1 + shape[-2], :dim]
        return x

    def options(self, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of flashcore.attention, in NumPy."""
        rng = np.random.default_rng(seed + 1)
        o: dict[str, Any] = {}
        for name in ("layout", "causal", "align", "softcap", "scale"):
            if getattr(self, name) != getattr(type(self), name):
                o[name] = getattr(self, name)
        if self.window != (None, None):
            o["window_size"] = self.window
        if self.q_offset is not None:
            o["q_offset"] = (
                self.q_offset
                if isinstance(self.q_offset, int)
                else np.array(self.q_offset, np.int32)
            )
        if self.alibi:
            shape = (self.batch,) * (self.alibi == "bh") + (self.h[0],)
            o["alibi_slopes"] = rng.uniform(0.01, 0.5, shape).astype(np.float32)
        if self.bias:
            dtype = np.float64 if self.dtype == "f64" else np.float32
            o["bias"] = rng.standard_normal(self._score_shape(self.bias)).astype(dtype)
        if self.mask:
            o["mask"] = rng.random(self._score_shape(self.mask)) < 0.7
        if self.sinks:
            o["sinks"] = rng.standard_normal(self.h[0]).astype(np.float32)
        if self.dropout:
            o["dropout_p"], o["rng"] = self.dropout, (seed + 1234567890123, 42)
        for name in ("q", "k"):
            lengths = getattr(self, "lengths_" + name)
            if lengths is not None:
                o["seqlens_" + name] = np.array(lengths, np.int32)
            lengths = getattr(self, "packed_" + name)
            if lengths is not None:
                o["cu_seqlens_" + name] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        if self.out_dtype:
            o["out_dtype"] = np.dtype(DTYPES[self.out_dtype]).name
        if self.blocks:
            o["block_mask"] = self._block_mask(rng)
            if self.packed_q is not None:  # the lengths that it is for; on a GPU nobody reads them
                o["max_seqlen_q"] = max(self.packed_q, default=0)
                o["max_seqlen_k"] = max(self.packed_k, default=0)
        return o

    @property
    def batch(self) -> int:
        return self.b if self.packed_q is None else len(self.packed_q)

    def _score_shape(self, full: str) -> tuple[int, ...]:
        rows = self.q if self.packed_q is None else max(self.packed_q)
        keys = self.k if self.packed_k is None else max(self.packed_k)
        sizes = {"b": self.batch, "h": self.h[0], "q": rows, "k": keys}
        return tuple(n if name in full else 1 for name, n in sizes.items())

    def _block_mask(self, rng: np.random.Generator) -> Any:
        import flashcore as fc

        bq, bk = self.blocks
        rows = self.q if self.packed_q is None else max(self.packed_q, default=0)
        keys = self.k if self.packed_k is None else max(self.packed_k, default=0)
        kept = rng.random((self.batch, self.h[0], -(-rows // bq), -(-keys // bk))) < 0.6
        dense = kept.repeat(bq, 2).repeat(bk, 3)[:, :, :rows, :keys]
        return fc.BlockMask.from_dense(dense, block=self.blocks)

    def but(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


def _each(base: Case, **axis: Any) -> list[Case]:
    """base with one field running over values."""
    ((name, values),) = axis.items()
    return [base.but(**{name: value}) for value in values]


_ALL_DTYPES = tuple(DTYPES)
_PLAIN = Case("plain attention in every dtype")
_CAUSAL = Case("the diagonal crosses tiles; seqlens differ", causal=True, h=(6, 2))

# Every option once, alone, on shapes that straddle tiles of any size.
OPTIONS = [
    Case("keys left of the window are skipped", window=(37, None)),
    Case("keys right of the window are skipped", window=(None, 12)),
    Case("a band narrower than a tile", window=(5, 3)),
    Case("one row whose window lies past every key", q=1, k=9, window=(2, None), q_offset=20),
    Case("the diagonal alone", window=(0, 0), q=70, k=70),
    Case("causal and window share one diagonal", causal=True, window=(40, None)),
    Case("top-left diagonal, more keys than rows", causal=True, align="top_left"),
    Case("top-left diagonal, more rows than keys", causal=True, align="top_left", q=203, k=113),
    Case("rows above the diagonal see nothing", causal=True, q=203, k=113),
    Case("q_offset as an int overrides align", causal=True, q_offset=17),
    Case("a negative q_offset hides the first rows", causal=True, q_offset=-30),
    Case("q_offset per sequence", causal=True, q_offset=(64, -7)),
    Case("softcap bends every score", softcap=1.5),
    Case("ALiBi slopes per head", alibi="h"),
    Case("ALiBi per batch and head, on the causal diagonal", alibi="bh", causal=True),
    Case("full bias", bias="bhqk"),
    Case("bias shared by batch and heads", bias="qk"),
    Case("bias per key, as a padding bias is", bias="bk"),
    Case("bias per head and row, broadcast over keys", bias="hq"),
    Case("full mask", mask="bhqk"),
    Case("mask shared by batch and heads", mask="qk"),
    Case("key padding mask", mask="bk"),
    Case("a sink takes probability and gives nothing", sinks=True),
    Case("sink and rows that see nothing: lse is the sink", sinks=True, causal=True, q=90, k=50),
    Case("block mask, blocks of a tile", blocks=(64, 64), q=300, k=260),
    Case("block mask, blocks smaller than a tile", blocks=(16, 32)),
    Case("block mask with odd blocks and causal", blocks=(24, 40), causal=True),
    Case("dropout", dropout=0.2),
    Case("padded keys", lengths_k=(203, 7)),
    Case(
        "padded rows and keys, bottom-right of the valid part",
        causal=True,
        lengths_q=(113, 5),
        lengths_k=(60, 203),
    ),
    Case("a sequence of the batch is empty", lengths_q=(0, 113), lengths_k=(10, 0)),
    Case("a scale of one's own", scale=0.02),
    Case("negative scale: the smallest score wins", scale=-0.125),
    Case("zero scale: plain averages", scale=0.0),
    Case("v wider than q and k", dv=96),
    Case("v narrower than q and k", d=72, dv=16),
    Case("heads before rows", layout="bhsd"),
    Case("heads before rows, grouped", layout="bhsd", h=(6, 2), causal=True),
    Case("rows strided by nothing a layout says", strides="permuted"),
    Case("a view into a larger tensor whose rest is NaN", strides="sliced", h=(4, 2)),
]

COMBINATIONS = [
    Case(
        "all rules that exclude, at once",
        causal=True,
        window=(90, None),
        mask="bhqk",
        lengths_k=(150, 203),
        blocks=(32, 32),
        h=(4, 2),
    ),
    Case("all rules that move the score", softcap=3.0, alibi="h", bias="hqk", scale=0.3),
    Case(
        "everything",
        causal=True,
        window=(90, None),
        softcap=2.0,
        alibi="bh",
        bias="bhqk",
        mask="qk",
        sinks=True,
        dropout=0.1,
        lengths_q=(100, 113),
        lengths_k=(203, 120),
        h=(4, 2),
        dv=40,
        layout="bhsd",
    ),
    Case("dropout on causal with groups", dropout=0.5, causal=True, h=(4, 1)),
    Case(
        "softcap with sinks and rows that see nothing",
        softcap=2.0,
        sinks=True,
        causal=True,
        q=100,
        k=40,
    ),
    Case("mask that hides whole rows, with bias", mask="hq", bias="k"),
    Case(
        "bf16 with bias, mask and softcap",
        dtype="bf16",
        bias="bhqk",
        mask="bk",
        softcap=5.0,
        causal=True,
    ),
    Case(
        "bf16 with everything that excludes",
        dtype="bf16",
        causal=True,
        window=(64, None),
        lengths_k=(203, 90),
        sinks=True,
        h=(4, 2),
    ),
    Case("f16 with alibi and dropout", dtype="f16", alibi="h", dropout=0.3, causal=True),
    Case(
        "f64 with everything that moves the score",
        dtype="f64",
        softcap=3.0,
        alibi="h",
        bias="bqk",
        sinks=True,
        causal=True,
    ),
    Case(
        "bf16 padded and strided",
        dtype="bf16",
        strides="sliced",
        lengths_q=(20, 113),
        lengths_k=(203, 64),
    ),
]

# Lengths around every tile edge anyone would use, and both ways round.
LENGTHS = [
    Case("tile edges", dtype=dtype, q=q, k=k, d=32, causal=causal, b=1)
    for dtype in ("f32", "bf16")
    for q, k in (
        (1, 1),
        (1, 64),
        (1, 1025),
        (2, 3),
        (15, 17),
        (16, 16),
        (63, 65),
        (64, 64),
        (65, 63),
        (127, 129),
        (128, 128),
        (129, 127),
        (257, 255),
    )
    for causal in (False, True)
]

HEAD_DIMS = [
    Case("head dims of every remainder", dtype=dtype, b=1, q=37, k=53, d=d, causal=True)
    for dtype in ("f32", "bf16")
    for d in (
        1,
        2,
        3,
        5,
        8,
        15,
        16,
        17,
        24,
        31,
        33,
        40,
        48,
        64,
        80,
        96,
        100,
        112,
        127,
        128,
        129,
        160,
        192,
        255,
        256,
        257,
        300,
    )
] + [
    Case("odd head dims in the other dtypes", dtype=dtype, b=1, q=37, k=53, d=d, dv=dv)
    for dtype in ("f16", "f64")
    for d, dv in ((7, 9), (64, 128), (128, 64), (192, 128))
]

GROUPS = [
    Case("query heads per key head", b=1, h=h, causal=True, dtype=dtype, q=50, k=70)
    for dtype in ("f32", "bf16")
    for h in ((2, 2), (4, 2), (8, 2), (8, 1), (7, 1), (14, 2), (16, 2))
]

EMPTY = [
    Case("no batch", b=0, q=5, k=7),
    Case("no batch, and a bias that all share: its gradient is zero", b=0, q=5, k=7, bias="qk"),
    Case("no rows", q=0, k=7),
    Case("no keys: zeros and -inf", q=5, k=0),
    Case("no keys, causal", q=5, k=0, causal=True),
    Case("no keys but a sink", q=5, k=0, sinks=True),
    Case("nothing at all", b=0, q=0, k=0),
    Case("no keys in bf16", dtype="bf16", q=5, k=0),
]

VARLEN = [
    Case(
        "sequences of unlike lengths", packed_q=(5, 64, 130, 1), packed_k=(7, 64, 100, 90), h=(4, 2)
    ),
    Case(
        "causal, each sequence on its own diagonal",
        packed_q=(5, 64, 130, 1),
        packed_k=(7, 64, 100, 90),
        h=(4, 2),
        causal=True,
    ),
    Case("top-left", packed_q=(5, 64, 130), packed_k=(7, 64, 100), causal=True, align="top_left"),
    Case("bf16", dtype="bf16", packed_q=(5, 64, 130, 1), packed_k=(7, 64, 100, 90), causal=True),
    Case("f16, grouped by 7", dtype="f16", packed_q=(33, 20), packed_k=(33, 20), h=(7, 1)),
    Case("empty sequences between others", packed_q=(0, 9, 0, 3, 5), packed_k=(4, 9, 0, 0, 8)),
    Case("every sequence is empty", packed_q=(0, 0, 0), packed_k=(0, 0, 0)),
    Case("rows but no keys anywhere", packed_q=(3, 4), packed_k=(0, 0)),
    Case(
        "fewer rows than sequences, one row at most, grouped",
        packed_q=(1, 0, 0, 1, 0),
        packed_k=(4, 2, 0, 6, 1),
        h=(8, 2),
    ),
    Case("one long and one short", packed_q=(500, 2), packed_k=(500, 300), causal=True),
    Case("no sequence", packed_q=(), packed_k=()),
    Case(
        "options per sequence",
        packed_q=(30, 41),
        packed_k=(50, 44),
        alibi="bh",
        sinks=True,
        q_offset=(3, 9),
        causal=True,
        window=(20, None),
    ),
    Case(
        "bias and mask indexed inside the sequence",
        packed_q=(30, 41),
        packed_k=(50, 44),
        bias="bhqk",
        mask="qk",
    ),
    Case(
        "dropout counts from the start of each sequence",
        packed_q=(30, 41),
        packed_k=(50, 44),
        dropout=0.25,
    ),
]

FORWARD = (
    _each(_PLAIN, dtype=_ALL_DTYPES)
    + _each(_CAUSAL, dtype=_ALL_DTYPES)
    + OPTIONS
    + COMBINATIONS
    + LENGTHS
    + HEAD_DIMS
    + GROUPS
    + EMPTY
    + [Case("16-bit inputs, float32 result", dtype=t, out_dtype="f32") for t in ("bf16", "f16")]
    + [case.but(dtype="bf16") for case in OPTIONS[::3]]
)

BACKWARD = (
    _each(_PLAIN, dtype=_ALL_DTYPES)
    + _each(_CAUSAL, dtype=_ALL_DTYPES)
    + OPTIONS
    + COMBINATIONS
    + LENGTHS[::2]
    + LENGTHS[1::4]
    + HEAD_DIMS[::3]
    + GROUPS[::2]
    + EMPTY
    + [case.but(dtype="bf16") for case in OPTIONS[1::3]]
)

# For every Hopper kernel: 16 bits, full or causal. The options are in test_sm90_forward.py and
# test_sm90_backward.py.
SM90_HEAD_DIMS = tuple(range(8, 257, 8))
SM90 = (
    [
        Case("every head dim", dtype="bf16", b=1, q=200, k=200, d=d, causal=d % 16 == 0)
        for d in SM90_HEAD_DIMS
    ]
    + [
        Case("two query tiles and a tail", dtype=t, q=300, k=300, d=d, causal=c)
        for t in ("bf16", "f16")
        for d in (64, 128, 256)
        for c in (False, True)
    ]
    + [
        Case("tile edges", dtype="bf16", b=1, q=q, k=k, d=128, causal=c)
        for q, k in (
            (1, 1),
            (1, 1000),
            (127, 129),
            (128, 128),
            (129, 127),
            (191, 177),
            (600, 64),
            (64, 600),
        )
        for c in (False, True)
    ]
    + [
        Case("query heads per key head", dtype="bf16", h=h, causal=True, d=64)
        for h in ((4, 4), (4, 2), (8, 2), (8, 1), (7, 1))
    ]
    + [
        Case("top-left diagonal", dtype="bf16", q=q, k=k, d=128, causal=True, align="top_left")
        for q, k in ((300, 170), (170, 300))
    ]
    + [
        Case("rows above the diagonal see nothing", dtype=t, q=400, k=130, d=d, causal=True)
        for t in ("bf16", "f16")
        for d in (64, 128, 256)
    ]
    + [
        Case("heads before rows", dtype="bf16", layout="bhsd", h=(4, 2), d=128),
        Case("strided by nothing a layout says", dtype="bf16", strides="permuted", h=(4, 2), d=128),
        Case("a view into a larger tensor whose rest is NaN", dtype="bf16", strides="sliced", d=64),
        Case("a scale of one's own", dtype="bf16", scale=0.02, d=128),
        Case("no batch", dtype="bf16", b=0, d=128),
        Case("no rows", dtype="bf16", q=0, d=128),
        Case("no keys", dtype="bf16", k=0, d=128),
    ]
)
