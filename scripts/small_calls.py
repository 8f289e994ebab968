"""Small calls of every Hopper kernel's kind, forward and backward, for compute-sanitizer.

    compute-sanitizer --tool memcheck python scripts/small_calls.py
    compute-sanitizer --tool synccheck python scripts/small_calls.py

Prints each call before it is made, so that the tool's report follows the call it is about. Values
are the tests' subject; here results must only be finite. Needs torch and a Hopper GPU.
"""

import itertools
from typing import Any

import torch

import flashcore as fc


def arrays(*shape: int, heads: int, heads_kv: int, keys: int, dtype: torch.dtype) -> list[Any]:
    """q, dout, k, v with `shape` = (..., rows, head_dim)."""
    *batch, rows, head_dim = shape

    def random(length: int, count: int) -> torch.Tensor:
        return torch.randn(*batch, length, count, head_dim, device="cuda", dtype=dtype)

    return [
        random(rows, heads),
        random(rows, heads),
        random(keys, heads_kv),
        random(keys, heads_kv),
    ]


def call(name: str, inputs: list[Any], fixed: bool, options: dict[str, Any]) -> None:
    q, dout, k, v = inputs
    plan = fc.explain(q, k, v, direction="backward", **options)
    print(f"{name} fixed={fixed}: {plan.kernel}", flush=True)
    out, lse = fc.attention(q, k, v, return_lse=True, **options)[:2]
    grads = fc.attention_backward(dout, q, k, v, out, lse, deterministic=fixed, **options)
    torch.cuda.synchronize()
    assert all(torch.isfinite(g).all() for g in grads[:3]), name


def padded(
    b: int, rows: int, keys: int, h: int, hk: int, d: int, *,
    dtype: torch.dtype = torch.bfloat16, fixed: bool = False, **options: Any,
) -> None:  # fmt: skip
    name = f"{b}x{rows}x{keys} h{h}/{hk} d{d} {' '.join(map(str, options))}"
    inputs = arrays(b, rows, d, heads=h, heads_kv=hk, keys=keys, dtype=dtype)
    call(name, inputs, fixed, options)


def packed(
    lengths: list[int], h: int, hk: int, d: int, *, fixed: bool = False, **options: Any
) -> None:
    total = sum(lengths)
    inputs = arrays(total, d, heads=h, heads_kv=hk, keys=total, dtype=torch.bfloat16)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    options |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    call(f"packed {lengths} h{h}/{hk} d{d} {' '.join(options)}", inputs, fixed, options)


def sliding(length: int, block: int) -> fc.BlockMask:
    mask = fc.BlockMask.sliding(length, block=(block, block), window_size=(100, 0))
    return mask.map(lambda x: torch.as_tensor(x).cuda())


def main() -> None:
    torch.manual_seed(0)
    for d in (32, 64, 96, 128, 192, 256):
        padded(1, 200, 300, 2, 1, d)
        padded(1, 200, 300, 2, 2, d, causal=True)
        padded(2, 130, 140, 4, 4, d, causal=True, fixed=True)
        padded(1, 300, 300, 2, 2, d, window_size=(70, 0))
        padded(1, 256, 256, 2, 2, d, block_mask=sliding(256, 128))
    # More tiles than multiprocessors: 80 queries a step, or with a mask blocks passed over.
    padded(3, 150, 300, 50, 50, 128)
    padded(3, 150, 300, 100, 50, 128, fixed=True)
    padded(3, 150, 300, 50, 50, 104)
    padded(3, 160, 129, 100, 100, 128, dtype=torch.float16)
    lengths = torch.tensor([60, 150, 0], dtype=torch.int32, device="cuda")
    padded(3, 150, 300, 50, 50, 128, seqlens_q=lengths)
    padded(1, 6200, 300, 50, 50, 128, causal=True, align="top_left")
    padded(1, 6200, 300, 50, 50, 128, window_size=(6200, 10), align="top_left", fixed=True)
    for d in (64, 96, 128):
        padded(3, 260, 300, 50, 50, d, causal=True)
        padded(3, 260, 300, 50, 50, d, window_size=(64, 0), fixed=True)
    for d in (64, 128):
        packed([80, 0, 81, 1, 479], 50, 50, d)
        packed([80, 0, 81, 1, 479], 50, 50, d, causal=True)
        packed([80, 0, 81, 1, 479], 50, 25, d, causal=True, fixed=True)


if __name__ == "__main__":
    main()
