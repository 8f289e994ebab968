"""The CUDA libraries that are measured, on torch tensors (B, S, H, D) that are already there.

prepare(problem, inputs, direction) returns a function of no arguments that enqueues the work and
returns out, or dq, dk and dv, as (B, S, H, D), or packed. A peer that is missing or does not offer
a case raises Unavailable with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.peers_cpu import Unavailable, need
from benchmarks.problems import Problem

Call = Callable[[], Any]
Prepare = Callable[..., Call]  # (problem, inputs, direction)


class Inputs:
    """q, k, v, dout of one problem, N(0, 1), and the cumulative lengths of packed documents."""

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
        self.dout = normal(p.seqlen_q, p.num_heads)
        self.cu_seqlens = None
        if p.lengths:
            starts = [sum(p.lengths[:i]) for i in range(len(p.lengths) + 1)]
            self.cu_seqlens = torch.tensor(starts, dtype=torch.int32, device="cuda")


def flashcore(
    p: Problem,
    x: Inputs,
    direction: str = "fwd",
    *,
    block_mask: Any = None,
    deterministic: bool = False,  # the backward pass
) -> Call:
    fc = need("flashcore")
    options: dict[str, Any] = {"causal": p.causal, "block_mask": block_mask}
    if p.window:
        options["window_size"] = (p.window, 0)
    if p.lengths:
        options |= {"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens}
        options |= {"max_seqlen_q": p.seqlen_q, "max_seqlen_k": p.seqlen_k}

    def forward() -> Any:
        return fc.attention(x.q, x.k, x.v, **options, return_lse=True)

    def backward() -> Any:
        out, lse, _ = saved
        return fc.attention_backward(
            x.dout, x.q, x.k, x.v, out, lse, deterministic=deterministic, **options
        )[:3]

    try:
        saved = forward()
        if direction == "bwd":
            backward()
    except fc.UnsupportedError as error:
        raise Unavailable(f"refused: {last_line(error)}") from error
    return (lambda: forward()[0]) if direction == "fwd" else backward


def last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2].strip()


def torch_function(function: Callable[..., Any], x: Inputs, direction: str) -> Call:
    """function(q, k, v) -> out: itself, or what autograd makes of it.

    Its inputs require grad in both directions: then it stores lse, as flashcore is asked to.
    """
    torch = need("torch")
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    try:
        out = function(*leaves)
        if direction == "fwd":
            return lambda: function(*leaves)
        backward: Call = lambda: torch.autograd.grad(out, leaves, x.dout, retain_graph=True)
        backward()
    except RuntimeError as error:
        raise Unavailable(f"no kernel: {last_line(error)[:80]}") from error
    return backward


def sdpa(backend: str) -> Prepare:
    """torch's scaled_dot_product_attention, pinned to one backend."""

    def prepare(p: Problem, x: Inputs, direction: str = "fwd") -> Call:
        torch = need("torch")
        attention = importlib.import_module("torch.nn.attention")
        if p.lengths or p.window:
            raise Unavailable("torch's public function has neither packed sequences nor a window")
        if p.causal and p.seqlen_q != p.seqlen_k:
            raise Unavailable("its causal mask has another alignment")
        chosen = getattr(attention.SDPBackend, backend)
        gqa = p.heads_kv != p.num_heads

        def function(q: Any, k: Any, v: Any) -> Any:
            with attention.sdpa_kernel(chosen):
                return torch.nn.functional.scaled_dot_product_attention(
                    *(t.transpose(1, 2) for t in (q, k, v)), is_causal=p.causal, enable_gqa=gqa
                ).transpose(1, 2)

        return torch_function(function, x, direction)

    return prepare


def fa2(p: Problem, x: Inputs, direction: str = "fwd") -> Call:
    """FlashAttention-2 as torch holds it; packed sequences and windows by the operator itself."""
    if not (p.lengths or p.window):
        return sdpa("FLASH_ATTENTION")(p, x, direction)
    operator = need("torch").ops.aten._flash_attention_forward
    cu, window = x.cu_seqlens, {}
    if p.window:
        window = {"window_size_left": p.window, "window_size_right": 0}

    def function(q: Any, k: Any, v: Any) -> Any:
        longest = p.seqlen_q, p.seqlen_k
        return operator(q, k, v, cu, cu, *longest, 0.0, p.causal, False, **window)[0]

    return torch_function(function, x, direction)


def fa3(p: Problem, x: Inputs, direction: str = "fwd") -> Call:
    """The forward kernels of FlashAttention-3, from the fa3-fwd wheel."""
    need("fa3_fwd")
    interface = need("fa3_fwd_interface")
    if direction == "bwd":
        raise Unavailable("the wheel holds forward kernels only")
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


def fa4(p: Problem, x: Inputs, direction: str = "fwd") -> Call:
    """FlashAttention-4 from the flash-attn-4 wheel; it compiles a kernel at the first call."""
    interface = need("flash_attn.cute")
    options: dict[str, Any] = {"causal": p.causal}
    if p.window:
        options |= {"window_size": (p.window, 0), "causal": False}
    if p.lengths:
        options |= {"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens}
        options |= {"max_seqlen_q": p.seqlen_q, "max_seqlen_k": p.seqlen_k}
    attention = interface.flash_attn_varlen_func if p.lengths else interface.flash_attn_func
    return torch_function(lambda q, k, v: first(attention(q, k, v, **options)), x, direction)


def flex(p: Problem, x: Inputs, direction: str = "fwd") -> Call:
    """torch's flex_attention, compiled; the mask is a block mask of its own."""
    torch = need("torch")
    module = need("torch.nn.attention.flex_attention")
    if p.lengths:
        raise Unavailable("packed documents are not set up here")
    torch._dynamo.reset()  # else the cells share one kernel, with shapes it does not know
    compiled = torch.compile(module.flex_attention)
    mask = None
    if p.causal or p.window:
        diagonal, left = p.seqlen_k - p.seqlen_q, p.window or p.seqlen_k
        mask = module.create_block_mask(
            lambda b, h, i, j: (j <= i + diagonal) & (j >= i + diagonal - left),
            None, None, p.seqlen_q, p.seqlen_k, device="cuda",
        )  # fmt: skip
    gqa = p.heads_kv != p.num_heads

    def function(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=gqa).transpose(1, 2)

    return torch_function(function, x, direction)


def first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def eager(p: Problem, x: Inputs, direction: str = "fwd") -> Call:
    """Standard attention: the whole matrix of scores, in the inputs' dtype."""
    return sdpa("MATH")(p, x, direction)


PEERS: dict[str, Prepare] = {
    "flashcore": flashcore,
    "deterministic": partial(flashcore, deterministic=True),
    "cudnn": sdpa("CUDNN_ATTENTION"),
    "fa2": fa2,
    "fa3": fa3,
    "fa4": fa4,
    "flex": flex,
    "eager": eager,
}
DEFAULT_PEERS = ("flashcore", "cudnn", "fa2", "fa3", "fa4")
