"""The CUDA libraries that are measured, on torch tensors (B, S, H, D) that are already there.

prepare(problem, inputs) returns a function of no arguments that enqueues the work and returns the
output as (B, S, H, D), or packed. A peer that is missing or does not offer a case raises
Unavailable with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from benchmarks.peers_cpu import Unavailable, need
from benchmarks.problems import Problem

Call = Callable[[], Any]


class Inputs:
    """q, k, v of one problem, N(0, 1), and the cumulative lengths of packed documents."""

    def __init__(self, torch: Any, p: Problem) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)
        dtype = getattr(torch, p.dtype)

        def normal(seqlen: int, heads: int) -> Any:
            shape = (p.batch, seqlen, heads, p.head_dim)
            if p.lengths:
                shape = (sum(p.lengths), heads, p.head_dim)  # type: ignore[assignment]
            return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

        self.q = normal(p.seqlen_q, p.num_heads)
        self.k = normal(p.seqlen_k, p.heads_kv)
        self.v = normal(p.seqlen_k, p.heads_kv)
        self.cu_seqlens = None
        if p.lengths:
            starts = [sum(p.lengths[:i]) for i in range(len(p.lengths) + 1)]
            self.cu_seqlens = torch.tensor(starts, dtype=torch.int32, device="cuda")


def flashcore(p: Problem, x: Inputs) -> Call:
    fc = need("flashcore")
    options: dict[str, Any] = {"causal": p.causal}
    if p.window:
        options["window_size"] = (p.window, 0)
    if p.lengths:
        options |= {"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens}
        options |= {"max_seqlen_q": p.seqlen_q, "max_seqlen_k": p.seqlen_k}
    try:
        fc.attention(x.q, x.k, x.v, **options, return_lse=True)
    except fc.UnsupportedError as error:
        raise Unavailable(f"refused: {last_line(error)}") from error
    return lambda: fc.attention(x.q, x.k, x.v, **options, return_lse=True)[0]


def last_line(error: Exception) -> str:
    return str(error).splitlines()[-1].strip()


def sdpa(backend: str) -> Callable[[Problem, Inputs], Call]:
    """torch's scaled_dot_product_attention, pinned to one backend, storing lse as in training."""

    def prepare(p: Problem, x: Inputs) -> Call:
        torch = need("torch")
        attention = importlib.import_module("torch.nn.attention")
        if p.lengths or p.window:
            raise Unavailable("not offered by torch's public function")
        if p.causal and p.seqlen_q != p.seqlen_k:
            raise Unavailable("its causal mask has another alignment")
        chosen = getattr(attention.SDPBackend, backend)
        # requires_grad makes the kernel store lse, which flashcore is asked for too.
        q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in (x.q, x.k, x.v))
        gqa = p.heads_kv != p.num_heads

        def run() -> Any:
            with attention.sdpa_kernel(chosen):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=p.causal, enable_gqa=gqa
                ).transpose(1, 2)

        try:
            run()
        except RuntimeError as error:
            raise Unavailable(f"no kernel: {last_line(error)[:80]}") from error
        return run

    return prepare


def fa3(p: Problem, x: Inputs) -> Call:
    """The forward kernels of FlashAttention-3, from the fa3-fwd wheel."""
    need("fa3_fwd")
    interface = need("fa3_fwd_interface")
    if p.dtype != "bfloat16":
        raise Unavailable("the wheel holds bfloat16 kernels only")
    if p.window:
        raise Unavailable("the wheel holds no window kernels")
    if p.lengths:
        cu, longest = x.cu_seqlens, p.seqlen_q
        return lambda: first(
            interface.flash_attn_varlen_func(
                x.q, x.k, x.v, cu, cu, longest, longest, causal=p.causal
            )
        )
    # Few queries against many keys: let it split the keys, as it would in a decoder.
    splits = 1 if p.seqlen_q == p.seqlen_k else 0
    return lambda: first(
        interface.flash_attn_func(x.q, x.k, x.v, causal=p.causal, num_splits=splits)
    )


def first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def eager(p: Problem, x: Inputs) -> Call:
    """Standard attention: the whole matrix of scores, in the inputs' dtype."""
    return sdpa("MATH")(p, x)


PEERS: dict[str, Callable[[Problem, Inputs], Call]] = {
    "flashcore": flashcore,
    "cudnn": sdpa("CUDNN_ATTENTION"),
    "fa2": sdpa("FLASH_ATTENTION"),
    "fa3": fa3,
    "eager": eager,
}
DEFAULT_PEERS = ("flashcore", "cudnn", "fa2", "fa3")
