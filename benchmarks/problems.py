"""What is measured: attention problems as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Problem:
    batch: int
    num_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool = False
    dtype: str = "bfloat16"
    num_heads_kv: int = 0  # 0: as many as num_heads
    window: int = 0  # keys to the left that are visible; 0: all
    lengths: tuple[int, ...] = ()  # packed documents; batch and seqlen_* are then their summary

    @property
    def heads_kv(self) -> int:
        return self.num_heads_kv or self.num_heads

    @property
    def cell(self) -> str:
        """The name in result files, e.g. hd128-causal-s4096-b4-h16-bf16."""
        mask = f"window{self.window}" if self.window else "causal" if self.causal else "full"
        seqlen = (
            f"s{self.seqlen_q}"
            if self.seqlen_q == self.seqlen_k
            else f"q{self.seqlen_q}k{self.seqlen_k}"
        )
        heads = f"h{self.num_heads}"
        if self.heads_kv != self.num_heads:
            heads += f"kv{self.heads_kv}"
        if self.lengths:
            seqlen, heads = f"varlen{sum(self.lengths)}", heads + f"-docs{len(self.lengths)}"
        parts = [f"hd{self.head_dim}", mask, seqlen, f"b{self.batch}", heads]
        return "-".join([*parts, SHORT_DTYPE[self.dtype]])

    def visible_pairs(self) -> float:
        """(query, key) pairs per head, over the batch. A causal square counts as half of it."""
        pairs = [(n, n) for n in self.lengths] or [(self.seqlen_q, self.seqlen_k)] * self.batch
        total = 0.0
        for sq, sk in pairs:
            if self.window and self.window < sk:
                w = self.window + 1
                total += sq * w - w * (w - 1) / 2
            elif self.causal and sq > 1:
                total += sq * (sk - sq) + sq * sq / 2
            else:
                total += sq * sk
        return total

    def flops(self, direction: str = "fwd") -> float:
        """Two matrix products forward; backward counts 2.5 times as much (it recomputes S)."""
        forward = 4 * self.visible_pairs() * self.num_heads * self.head_dim
        return {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}[direction] * forward

    def kv_bytes(self) -> float:
        size = {"float32": 4, "float64": 8}.get(self.dtype, 2)
        return 2.0 * self.batch * self.seqlen_k * self.heads_kv * self.head_dim * size


def with_causal(problems: list[Problem]) -> Iterator[Problem]:
    for p in problems:
        yield p
        yield replace(p, causal=True)


# ---- CPU ----------------------------------------------------------------------------------------

CPU_SHAPES = [
    Problem(1, 8, 512, 512, 64, dtype="float32"),
    Problem(1, 8, 2048, 2048, 64, dtype="float32"),
    Problem(1, 16, 1024, 1024, 128, dtype="float32"),
    Problem(1, 8, 4096, 4096, 64, dtype="float32"),
    Problem(1, 32, 1024, 1024, 128, dtype="float32", num_heads_kv=8),
]
CPU_DECODE = Problem(1, 32, 1, 8192, 128, dtype="float32", num_heads_kv=8)


def cpu_forward(dtype: str, quick: bool = False) -> list[Problem]:
    shapes = CPU_SHAPES[1:3] if quick else CPU_SHAPES
    problems = [replace(p, dtype=dtype) for p in with_causal(shapes)]
    return [*problems, replace(CPU_DECODE, dtype=dtype)]


def cpu_backward(dtype: str, quick: bool = False) -> list[Problem]:
    """Few shapes in float16, where peers take seconds a call."""
    return cpu_forward(dtype, quick or dtype == "float16")[:-1]


# ---- GPU ----------------------------------------------------------------------------------------

TOKENS, HIDDEN = 16384, 2048


def gpu_square(head_dim: int, seqlen: int, causal: bool, dtype: str = "bfloat16") -> Problem:
    """16,384 tokens of hidden size 2048, cut into sequences and heads."""
    return Problem(
        TOKENS // seqlen, HIDDEN // head_dim, seqlen, seqlen, head_dim, causal=causal, dtype=dtype
    )


def gpu_grid(quick: bool = False) -> list[Problem]:
    seqlens = (1024, 8192) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    return [
        gpu_square(head_dim, seqlen, causal)
        for head_dim in (64, 128, 256)
        for causal in (False, True)
        for seqlen in seqlens
    ]


def gpu_more() -> list[Problem]:
    """What the grid leaves out: groups, packed documents, a window, few tiles, fp16, chunks."""
    documents = (4096, 2048, 2048, 1536, 1280, 1024, 1024, 896, 768, 640, 512, 256, 128, 128)
    longest = max(documents)
    few_tiles = [
        Problem(1, heads, seqlen, seqlen, 128, causal=causal)
        for seqlen in (512, 1024, 2048, 4096)
        for heads in (8, 16)
        for causal in (False, True)
    ]
    half = [
        gpu_square(head_dim, seqlen, causal, "float16")
        for head_dim in (64, 128)
        for causal in (False, True)
        for seqlen in (4096, 16384)
    ]
    chunks = [Problem(1, 32, n, 32768, 128, num_heads_kv=8) for n in (128, 512)]
    return [
        Problem(4, 32, 4096, 4096, 128, causal=True, num_heads_kv=8),
        Problem(len(documents), 16, longest, longest, 128, causal=True, lengths=documents),
        Problem(1, 16, 16384, 16384, 128, causal=True, window=1024),
        *few_tiles,
        *half,
        *chunks,
    ]
