"""`python -m benchmarks approximate`: block masks beside approximate methods, over length.

Everyone gets the same q, k and v, 16 sequences of 8 heads of head dim 64, and is timed from them to
the gradients. flashcore computes exactly the 256 keys of a local block mask. The methods are those
of transformers and of packages of their own, as they ship, about as wide: their projections of the
hidden state hand out q, k and v, and cost nothing. A peer is left out from where its calls take
longer than half a second.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu import (
    CALLS_PER_TURN,
    FLUSH_BYTES,
    PAUSE,
    Cell,
    check,
    commit,
    nvidia_smi,
    take_turns,
    warm_up,
)
from benchmarks.peers_cpu import Unavailable, need
from benchmarks.peers_gpu import Call, Inputs
from benchmarks.problems import Problem
from benchmarks.sparse import Sparse, block_mask, pairs

BATCH, NUM_HEADS, HEAD_DIM = 16, 8, 64
KEYS = 256  # that a query sees; landmarks and hashes are the methods' own defaults
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
LONGEST_CHECKED = 4096
LONGEST_CALL = 5e5  # us

Function = Callable[[Any, Any, Any], Any]  # of q, k, v (B, N, H, D)


# ---- peers --------------------------------------------------------------------------------------


def given(x: Any) -> Any:
    """In place of a projection: what it would have made of the hidden state."""
    torch = need("torch")
    return type("Given", (torch.nn.Module,), {"forward": lambda self, _: x})()


def hidden(x: Any) -> Any:
    """(B, N, H, D) as (B, N, H D)."""
    return x.flatten(2)


def frozen(module: Any) -> Any:
    """On the device, in the inputs' dtype, without gradients of its own."""
    return module.to("cuda", need("torch").bfloat16).eval().requires_grad_(False)


def model(name: str) -> tuple[Any, Callable[..., Any]]:
    """transformers' module of a model, and its configuration with our sizes."""
    need("transformers")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    configs = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    kind = next(x for x in vars(configs).values() if getattr(x, "model_type", "") == name)

    def config(**options: Any) -> Any:
        sizes = {"hidden_size": NUM_HEADS * HEAD_DIM, "num_attention_heads": NUM_HEADS}
        return kind(**sizes | {"attention_probs_dropout_prob": 0.0} | options)

    return module, config


def longformer(n: int) -> Function:
    module, config = model("longformer")
    torch = need("torch")
    layer = frozen(module.LongformerSelfAttention(config(attention_window=[KEYS]), 0))
    zeros = torch.zeros(BATCH, n, device="cuda", dtype=torch.bfloat16)

    def function(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (hidden(t).transpose(0, 1) for t in (q, k, v))  # it has the length first
        layer.query = given(q * 1.0)  # it divides its own q in place
        layer.key, layer.value = given(k), given(v)
        return layer(hidden_like(n), zeros, zeros != 0, zeros != 0, is_global_attn=False)[0]

    return function


def hidden_like(n: int) -> Any:
    """A hidden state that nobody reads but for its shape."""
    torch = need("torch")
    x = torch.empty(1, device="cuda", dtype=torch.bfloat16)
    return x.expand(BATCH, n, NUM_HEADS * HEAD_DIM)


def bigbird(n: int) -> Function:
    module, config = model("big_bird")
    torch = need("torch")
    if n < 1024:
        raise Unavailable("full attention below 704 tokens")
    options = config(max_position_embeddings=n, block_size=64, num_random_blocks=3)
    layer = frozen(module.BigBirdBlockSparseAttention(options))
    mask = torch.ones(BATCH, n, device="cuda", dtype=torch.bfloat16)
    blocked, band, rows, columns = module.BigBirdModel.create_masks_for_block_sparse_attn(mask, 64)

    def function(q: Any, k: Any, v: Any) -> Any:
        layer.query, layer.key, layer.value = (given(hidden(t)) for t in (q, k, v))
        return layer(hidden_like(n), band, rows, columns, blocked, blocked)[0]

    return function


def reformer(n: int) -> Function:
    module, config = model("reformer")
    options = config(
        attention_head_size=HEAD_DIM,
        lsh_attention_probs_dropout_prob=0.0,
        lsh_attn_chunk_length=64,
        num_hashes=1,
        max_position_embeddings=n,
        is_decoder=False,
    )
    layer = frozen(module.LSHSelfAttention(options))

    def function(q: Any, k: Any, v: Any) -> Any:
        layer.query_key, layer.value = given(hidden(q)), given(hidden(v))
        return layer(hidden_like(n)).hidden_states

    return function


def nystromformer(n: int) -> Function:
    module, config = model("nystromformer")
    torch = need("torch")
    options = config(num_landmarks=64, segment_means_seq_len=n)
    layer = frozen(module.NystromformerSelfAttention(options))
    layer.conv_kernel_size = None  # the attention alone

    def function(q: Any, k: Any, v: Any) -> Any:
        layer.query, layer.key, layer.value = (given(hidden(t)) for t in (q, k, v))
        with torch.autocast("cuda", torch.bfloat16):  # it multiplies by a float32 identity
            return layer(hidden_like(n))[0]

    return function


def longt5(n: int) -> Function:
    module, config = model("longt5")
    options = config(
        d_model=NUM_HEADS * HEAD_DIM,
        d_kv=HEAD_DIM,
        num_heads=NUM_HEADS,
        local_radius=KEYS // 2 - 1,
        dropout_rate=0.0,
    )
    layer = frozen(module.LongT5LocalAttention(options))
    layer.o = need("torch").nn.Identity()

    def function(q: Any, k: Any, v: Any) -> Any:
        layer.q, layer.k, layer.v = (given(hidden(t)) for t in (q, k, v))
        return layer(hidden_like(n))[0]

    return function


def linformer(n: int) -> Function:
    module = need("linformer")
    layer = frozen(module.LinformerSelfAttention(NUM_HEADS * HEAD_DIM, n, k=KEYS, heads=NUM_HEADS))
    layer.to_out = need("torch").nn.Identity()

    def function(q: Any, k: Any, v: Any) -> Any:
        layer.to_q, layer.to_k, layer.to_v = (given(hidden(t)) for t in (q, k, v))
        return layer(hidden_like(n))

    return function


def performer(n: int) -> Function:
    importlib.import_module("setuptools")  # has the distutils that it looks for
    layer = frozen(need("performer_pytorch").FastAttention(HEAD_DIM, nb_features=KEYS))
    return lambda q, k, v: layer(*(t.transpose(1, 2) for t in (q, k, v)))


def local_attention(n: int) -> Function:
    layer = frozen(
        need("local_attention").LocalAttention(
            KEYS // 2, look_backward=1, look_forward=0, use_rotary_pos_emb=False
        )
    )
    return lambda q, k, v: layer(*(t.transpose(1, 2) for t in (q, k, v)))


def flashcore(n: int) -> Function:
    s = cell(n)
    mask = block_mask(s, s.kept(need("torch")))
    ours = need("flashcore.torch")
    return lambda q, k, v: ours.attention(q, k, v, block_mask=mask)


def dense(n: int) -> Function:
    if n > 16384:
        raise Unavailable("takes too long")
    ours = need("flashcore.torch")
    return lambda q, k, v: ours.attention(q, k, v)


OURS = "flashcore"
PEERS: dict[str, Callable[[int], Function]] = {
    OURS: flashcore,
    "dense": dense,
    "longformer": longformer,
    "bigbird": bigbird,
    "reformer": reformer,
    "nystromformer": nystromformer,
    "longt5": longt5,
    "linformer": linformer,
    "performer": performer,
    "local-attention": local_attention,
}
EXACT = (OURS, "dense")


def cell(n: int) -> Sparse:
    return Sparse(Problem(BATCH, NUM_HEADS, n, n, HEAD_DIM), 128, keys=KEYS)


# ---- measuring ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--seqlens", nargs="+", type=int, default=list(SEQLENS))
    parser.add_argument("--out", type=Path, default=None, help="a folder of results/")


def run(options: argparse.Namespace) -> None:
    torch = need("torch")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks approximate: torch finds no CUDA device")
    device = torch.cuda.get_device_name()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    warm_up(torch)
    cells: list[Cell] = []
    slow: dict[str, str] = {}
    for n in options.seqlens:
        rows = measure(torch, n, options, flush, slow)
        cells += rows
        shown = (f"{c['peer']} {c['us']:.0f}" if "us" in c else f"{c['peer']} –" for c in rows)
        print(f"{n:>6} us: {', '.join(shown)}", flush=True)
        slow |= {c["peer"]: f"{c['us'] / 1e3:.0f} ms at {n}" for c in rows if too_slow(c)}
    result = {
        "device": device,
        "driver": nvidia_smi("driver_version"),
        "torch": torch.__version__,
        "commit": commit(),
        "rounds": options.rounds,
        "cells": cells,
    }
    folder = options.out or Path("benchmarks/results") / device.split()[-1].lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "approximate"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report = markdown(result)
    path.with_suffix(".md").write_text(report, encoding="utf-8")
    print(report)


def too_slow(c: Cell) -> bool:
    return bool(c.get("us", 0) > LONGEST_CALL)


def measure(
    torch: Any, n: int, options: argparse.Namespace, flush: Any, slow: dict[str, str]
) -> list[Cell]:
    s = cell(n)
    x = Inputs(torch, s.problem)
    calls: dict[str, Call] = {}
    refusals = dict(slow)
    for name in options.peers:
        if name in slow:
            continue
        try:
            calls[name] = step(torch, PEERS[name](n), x)
            gradients = calls[name]()
            torch.cuda.synchronize()
            if name in EXACT and n <= LONGEST_CHECKED:
                shown = pairs(s, s.kept(torch)) if name == OURS else None
                check(torch, s.problem, x, gradients, "bwd", shown)
            del gradients
        except Unavailable as reason:
            calls.pop(name, None)
            refusals[name] = str(reason)
        except Exception as error:  # a peer that fails has no number, the others have
            calls.pop(name, None)
            refusals[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        torch.cuda.empty_cache()
    microseconds = take_turns(torch, calls, options.rounds, flush, PAUSE)
    cells = []
    for name in options.peers:
        c: Cell = {"seqlen": n, "peer": name}
        if name in refusals:
            c["refusal"] = refusals[name]
        else:
            c["us"] = round(median(microseconds[name]), 1)
        cells.append(c)
    return cells


def step(torch: Any, function: Function, x: Inputs) -> Call:
    """From q, k, v to their gradients; LSH attention has no k."""
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]

    def call() -> Any:
        out = function(*leaves)
        dout = x.dout.transpose(1, 2) if out.shape[1] == NUM_HEADS else x.dout
        return torch.autograd.grad(out, leaves, dout.reshape(out.shape), allow_unused=True)

    return call


# ---- the report ---------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    cells = result["cells"]
    peers = list(dict.fromkeys(c["peer"] for c in cells))
    lines = [
        f"# Block-sparse attention beside approximate methods on {result['device']}",
        "",
        f"Forward and backward, ms; {BATCH} x {NUM_HEADS} heads of head dim {HEAD_DIM}, bfloat16, "
        f"{KEYS} keys per query. Driver {result['driver']}, torch {result['torch']}, commit "
        f"{result['commit']}. Median of {CALLS_PER_TURN * result['rounds']} calls that take turns "
        "in one process, L2 flushed before each.",
        "",
        f"| N | {' | '.join(peers)} | best of the methods / flashcore |",
        "|---" * (len(peers) + 2) + "|",
    ]
    ratios = []
    for n in dict.fromkeys(c["seqlen"] for c in cells):
        us = {c["peer"]: c["us"] for c in cells if c["seqlen"] == n and "us" in c}
        methods = [t for name, t in us.items() if name not in EXACT]
        ratio = min(methods) / us[OURS] if methods and OURS in us else None
        if ratio:
            ratios.append(ratio)
        shown = [f"{us[p] / 1e3:.2f}" if p in us else "–" for p in peers]
        lines.append(f"| {n} | {' | '.join(shown)} | {f'{ratio:.2f}' if ratio else '–'} |")
    if ratios:
        mean = exp(sum(map(log, ratios)) / len(ratios))
        lines += ["", f"Geometric mean {mean:.2f}, lowest {min(ratios):.2f}."]
    reasons = dict.fromkeys((c["peer"], c["refusal"]) for c in cells if "refusal" in c)
    if reasons:
        lines += ["", "– means no number:", ""] + [f"* {peer}: {why}" for peer, why in reasons]
    return "\n".join(lines) + "\n"
