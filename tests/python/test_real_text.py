"""Real data: the last layer of a small attention model over the bytes of this repository's text.

Random numbers are kind: their scores are all alike. Text repeats itself, so a trained-like model on
it has rows that look at one place and rows that look everywhere. The model is a byte embedding with
positions and three residual layers; its weights are fixed.
"""

import pathlib

import numpy as np
import pytest

import flashcore as fc
from flashcore.testing import (
    assert_close_to_reference,
    assert_grads_close_to_reference,
    to_numpy,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEQLEN, HEADS, HEAD_DIM, LAYERS = 384, 4, 32, 3


def text() -> bytes:
    files = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("include/**/*.h")])
    return b"\n".join(path.read_bytes() for path in files)


@pytest.fixture(scope="module")
def last_layer():
    """q, k, v of the last layer, float32 (2, SEQLEN, HEADS, HEAD_DIM), through fc.attention."""
    data = text()
    assert len(data) > 4 * SEQLEN
    middle = len(data) // 2
    tokens = np.stack([np.frombuffer(data[at : at + SEQLEN], np.uint8) for at in (0, middle)])
    rng = np.random.default_rng(0)
    width = HEADS * HEAD_DIM
    weight = lambda *shape: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
    position = np.arange(SEQLEN)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    x = 2 * rng.standard_normal((256, width)).astype(np.float32)[tokens]
    x = x + np.concatenate([np.sin(position), np.cos(position)], axis=1).astype(np.float32)
    sharpness = np.array([1, 1, 2, 4], np.float32).reshape(HEADS, 1)  # a factor on each head's q
    for layer in range(LAYERS):
        normal = x / np.sqrt((x * x).mean(-1, keepdims=True))
        q, k, v = (
            np.ascontiguousarray(
                (normal @ weight(width, width)).reshape(2, SEQLEN, HEADS, HEAD_DIM)
            )
            for _ in range(3)
        )
        q *= sharpness
        if layer < LAYERS - 1:
            out = fc.attention(q, k, v, causal=True)
            x = x + out.reshape(x.shape) @ weight(width, width)
    return q, k, v


def check(last_layer, convert):
    """Forward and backward of one framework's arrays against the float64 reference."""
    q, k, v = (convert(x) for x in last_layer)
    result = fc.attention(q, k, v, causal=True, return_lse=True)
    assert type(result.out) is type(q)
    arrays = [to_numpy(x) for x in (q, k, v)]
    assert_close_to_reference(result, *arrays, causal=True)
    return q, k, v, result


def check_backward(q, k, v, result):
    dout = result.out
    grads = fc.attention_backward(dout, q, k, v, result.out, result.lse, causal=True)
    arrays = [to_numpy(x) for x in (dout, q, k, v)]
    assert_grads_close_to_reference(grads, *arrays, causal=True)


def test_text_makes_some_rows_sharp(last_layer):
    """The point of real data: softmax weights from nearly one to nearly uniform."""
    q, k, v = last_layer
    _, lse, top = fc.attention(q, k, v, causal=True, return_lse=True, return_max_logits=True)
    largest = np.exp(top - lse)[..., SEQLEN // 2 :]
    assert largest.max() > 0.5 and largest.min() < 0.05


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_numpy(last_layer, dtype):
    import ml_dtypes

    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    check_backward(*check(last_layer, lambda x: x.astype(dtype)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_cpu(last_layer, dtype):
    torch = pytest.importorskip("torch")
    check_backward(*check(last_layer, lambda x: torch.from_numpy(x).to(getattr(torch, dtype))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_cpu_eager(last_layer, dtype):
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        check_backward(*check(last_layer, lambda x: jax.numpy.asarray(x, dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_cuda(last_layer, dtype):
    torch = pytest.importorskip("torch")
    check(last_layer, lambda x: torch.from_numpy(x).to("cuda", getattr(torch, dtype)))


@pytest.mark.gpu
def test_cupy(last_layer):
    cupy = pytest.importorskip("cupy")
    check(last_layer, lambda x: cupy.asarray(x.astype(np.float16)))
