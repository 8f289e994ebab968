"""Trains a small byte-level language model on real text in JAX, on the CPU.

Once with flashcore.jax.attention and once with jax.nn.dot_product_attention: the losses are the
same. One step is one compiled program: layers by scan, each recomputed in the backward pass.
"""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import flashcore.jax

ROOT = Path(__file__).resolve().parent.parent
LAYERS, LENGTH, WIDTH, HEADS, STEPS, RATE = 2, 64, 64, 4, 80, 3e-3

ours = partial(flashcore.jax.attention, causal=True)
theirs = partial(jax.nn.dot_product_attention, is_causal=True)


def initial(key):
    def weight(*shape):
        nonlocal key
        key, own = jax.random.split(key)
        return jax.random.normal(own, shape) / math.sqrt(shape[-2])

    layers = {
        "qkv": weight(LAYERS, WIDTH, 3 * WIDTH),
        "project": weight(LAYERS, WIDTH, WIDTH),
        "up": weight(LAYERS, WIDTH, 4 * WIDTH),
        "down": weight(LAYERS, 4 * WIDTH, WIDTH),
    }
    return {
        "token": weight(256, WIDTH),
        "position": weight(LENGTH, WIDTH),
        "layers": layers,
        "head": weight(WIDTH, 256),
    }


def normed(x):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def logits(attention, weights, tokens):
    x = weights["token"][tokens] + weights["position"]

    @jax.checkpoint
    def layer(x, w):
        qkv = (normed(x) @ w["qkv"]).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        out = attention(*(qkv[:, :, i] for i in range(3)))
        x = x + out.reshape(x.shape) @ w["project"]
        return x + jax.nn.gelu(normed(x) @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(layer, x, weights["layers"])
    return normed(x) @ weights["head"]


def loss(attention, weights, batch):
    log_p = jax.nn.log_softmax(logits(attention, weights, batch[:, :-1]))
    return -jnp.take_along_axis(log_p, batch[:, 1:, None], -1).mean()


@partial(jax.jit, static_argnums=0)
def step(attention, weights, moments, batch):
    """One step of Adam."""
    value, gradients = jax.value_and_grad(loss, 1)(attention, weights, batch)
    first, second, count = moments
    count = count + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, second, gradients)
    update = lambda w, m, s: (
        w - RATE * (m / (1 - 0.9**count)) / (jnp.sqrt(s / (1 - 0.99**count)) + 1e-8)
    )
    return jax.tree.map(update, weights, first, second), (first, second, count), value


def train(attention):
    text = b"".join(path.read_bytes() for path in sorted(ROOT.glob("docs/*.md")))
    data = np.frombuffer(text, np.uint8).astype(np.int32)
    rng = np.random.default_rng(0)
    weights = initial(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, weights)
    moments = (zeros, zeros, 0)
    for _ in range(STEPS):
        starts = rng.integers(len(data) - LENGTH - 1, size=(16, 1))
        batch = data[starts + np.arange(LENGTH + 1)]
        weights, moments, value = step(attention, weights, moments, batch)
    return weights, float(value)


_, expected = train(theirs)
weights, reached = train(ours)
print(f"loss after {STEPS} steps: {reached:.4f} with flashcore, {expected:.4f} with jax.nn")
assert reached < 0.6 * math.log(256) and abs(reached - expected) < 1e-2

text = np.frombuffer(b"flashcore computes softmax attention exactly".ljust(LENGTH), np.uint8)
tokens = jnp.asarray(text, jnp.int32)
one = logits(ours, weights, tokens[None])
many = jax.vmap(lambda x: logits(ours, weights, x[None]))(jnp.stack([tokens, tokens]))
assert jnp.allclose(many, one, atol=1e-4)
print("mapped over a batch: the same logits")
