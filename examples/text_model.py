"""A small byte-level attention model on real text: what reaches its last layer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

import flashcore as fc

ROOT = Path(__file__).resolve().parent.parent


def last_layer(
    attention: Callable[..., np.ndarray] = fc.attention,
    *,
    seqlen: int = 512,
    num_layers: int = 3,
    num_heads: int = 4,
    head_dim: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k and v of the last layer, float32 (1, seqlen, num_heads, head_dim).

    The text is this project's documentation; the weights are random but fixed. The earlier layers
    run through `attention`.
    """
    text = b"".join(path.read_bytes() for path in sorted(ROOT.glob("docs/*.md")))
    tokens = np.frombuffer(text[:seqlen].ljust(seqlen), np.uint8)
    width = num_heads * head_dim
    rng = np.random.default_rng(0)

    def weight(rows: int) -> np.ndarray:
        return (rng.standard_normal((rows, width)) / np.sqrt(width)).astype(np.float32)

    phase = np.arange(seqlen)[:, None] / 1e4 ** (np.arange(width) / width)
    x = 8 * weight(256)[tokens] + np.sin(phase + np.arange(width) % 2 * np.pi / 2)
    x = x.astype(np.float32)
    for layer in range(num_layers):
        normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
        q, k, v = (
            2 * (normed @ weight(width)).reshape(1, seqlen, num_heads, head_dim) for _ in range(3)
        )
        if layer < num_layers - 1:
            x = x + attention(q, k, v, causal=True).reshape(seqlen, width) @ weight(width)
    return q, k, v
