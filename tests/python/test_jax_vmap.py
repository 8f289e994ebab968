"""jax.vmap of flashcore.jax.attention: what it means, call by call."""

from __future__ import annotations

import pytest

jax = pytest.importorskip("jax", minversion="0.10")

import jax.numpy as jnp  # noqa: E402
from jax_arrays import assert_close, assert_equal, plain, randoms  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.jax as fj  # noqa: E402

SHAPES = (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6), (1, 4, 1, 7)
ARGUMENTS = (0, 1, 2, 3)


@pytest.fixture(autouse=True)
def doubles_exist():
    with jax.enable_x64(True):
        yield


def ours(q, k, v, bias):
    return fj.attention(q, k, v, bias=bias, causal=True, return_lse=True)[:2]


def theirs(q, k, v, bias):
    return plain(q, k, v, bias, causal=True)


def loss_of(function):
    return lambda *args: sum(jnp.sin(x).sum() for x in function(*args))


def each(function, x, *rest):
    """What vmap means."""
    results = [
        function(x[i], *(jax.tree.map(lambda a, i=i: a[i], y) for y in rest)) for i in range(len(x))
    ]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *results)


def custom_calls(function, *args):
    return jax.jit(function).lower(*args).as_text().count("@flashcore_attention")


# Every argument mapped; some shared; a mapped dimension that is not the first; a bias per call.
MAPPED = [(0, 0, 0, 0), (0, None, 0, None), (None, 0, None, 0), (1, None, 2, None), (0, 0, 0, 2)]
MAPPED += [(-1, 3, 0, 1), (None, None, None, 0)]


@pytest.mark.parametrize("dims", MAPPED, ids=str)
@pytest.mark.parametrize("batch_of_bias", [1, 2])
def test_vmap(dims, batch_of_bias):
    inputs = randoms(*SHAPES)
    inputs[3] = jnp.broadcast_to(inputs[3], (batch_of_bias, 4, 1, 7))
    scale = jnp.array([1.0, -0.5, 2.0])
    args = [
        x if dim is None else jnp.moveaxis(scale.reshape(3, 1, 1, 1, 1) * x, 0, dim)
        for x, dim in zip(inputs, dims)
    ]
    mapped = jax.vmap(ours, dims)
    assert custom_calls(mapped, *args) == 1
    assert_close(mapped(*args), jax.vmap(theirs, dims)(*args))
    for transform in (
        lambda f: jax.vmap(jax.grad(loss_of(f), ARGUMENTS), dims),
        lambda f: jax.grad(loss_of(jax.vmap(f, dims)), ARGUMENTS),
        lambda f: jax.jit(jax.grad(loss_of(jax.vmap(f, dims)), ARGUMENTS)),
    ):
        assert_close(transform(ours)(*args), transform(theirs)(*args))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(
    "kept", [(), ("mask",), ("alibi_slopes",), ("seqlens_k", "q_offset"), ("block_mask",)]
)
def test_vmap_of_every_option_with_a_batch(layout, kept):
    q, k, v = randoms(*[(3, 2, 4, 4, 8)] * 3)
    keys = jax.random.split(jax.random.key(1), 5)
    blocks = jax.random.bernoulli(keys[4], 0.6, (3, 2, 1, 4, 4))
    masks = [fc.BlockMask.from_dense(x, (1, 1)) for x in jax.device_get(blocks)]
    capacity = 4
    padded = [
        jax.tree.map(
            lambda x: (
                jnp.pad(jnp.asarray(x), [(0, 0)] * 3 + [(0, capacity - x.shape[3])])
                if x.ndim == 4
                else jnp.asarray(x)
            ),
            mask,
        )
        for mask in masks
    ]
    options = {
        "mask": jax.random.bernoulli(keys[0], 0.7, (3, 2, 1, 4, 4)),
        "alibi_slopes": jax.random.uniform(keys[1], (3, 4), jnp.float32),
        "seqlens_k": jax.random.randint(keys[2], (3, 2), 1, 5, jnp.int32),
        "q_offset": jax.random.randint(keys[3], (3, 2), 0, 3, jnp.int32),
        "block_mask": jax.tree.map(lambda *x: jnp.stack(x), *padded),
    }
    first = lambda x: jax.tree.map(lambda a: a[0], x)
    shared = {name: first(options.pop(name)) for name in kept}
    shared |= {"seqlens_q": jnp.array([4, 2], jnp.int32), "layout": layout}

    def call(q, k, v, options):
        return tuple(
            fj.attention(
                q, k, v, causal=True, return_lse=True, return_max_logits=True, **shared, **options
            )
        )

    assert custom_calls(jax.vmap(call), q, k, v, options) == 1
    assert_equal(jax.vmap(call)(q, k, v, options), each(call, q, k, v, options))
    gradient = jax.grad(lambda *args: jnp.sin(call(*args)[0]).sum(), (0, 1, 2))
    assert_close(jax.vmap(gradient)(q, k, v, options), each(gradient, q, k, v, options))


def dropped(q, k, v):
    return fj.attention(q, k, v, dropout_p=0.5, rng=(1, 2))


def dropped_by_key(q, k, v, seed):
    return fj.attention(q, k, v, dropout_p=0.5, rng=jax.random.key(seed))


def sunk(q, k, v, sinks):
    return fj.attention(q, k, v, sinks=sinks)


def packed(q, k, v):
    lengths = jnp.array([0, 3, 4], jnp.int32)
    return fj.attention(q[0], k[0], v[0], cu_seqlens_q=lengths, cu_seqlens_k=lengths)


@pytest.mark.parametrize("function", [dropped, dropped_by_key, sunk, packed])
def test_vmap_that_goes_one_by_one(function):
    """Dropout bits depend on the batch index, sinks are one per call, packing has no batch."""
    args = randoms(*[(3, 2, 4, 4, 8)] * 3)
    if function is sunk:
        args.append(jax.random.normal(jax.random.key(2), (3, 4), jnp.float32))
    if function is dropped_by_key:
        args.append(jnp.arange(3))
    assert_equal(jax.vmap(function)(*args), each(function, *args))
    of_all = tuple(range(4 if function is sunk else 3))
    gradient = jax.grad(lambda *args: jnp.sin(function(*args)).sum(), of_all)
    assert_close(jax.vmap(gradient)(*args), each(gradient, *args))


def test_gradient_of_shared_sinks():
    q, k, v = randoms(*[(3, 2, 4, 4, 8)] * 3)
    sinks = jnp.arange(4, dtype=jnp.float32)
    loss = lambda q, k, v: jax.grad(lambda s: jnp.sin(sunk(q, k, v, s)).sum())(sinks)
    assert_close(jax.vmap(loss)(q, k, v), each(loss, q, k, v), 1e-6)
    total = jax.grad(lambda s: jnp.sin(jax.vmap(sunk, (0, 0, 0, None))(q, k, v, s)).sum())(sinks)
    assert_close(total, each(loss, q, k, v).sum(0), 1e-6)


def test_vmap_twice():
    q, k, v, bias = randoms(*SHAPES)
    q = jnp.stack([jnp.stack([q, q * 2]), jnp.stack([q * 3, -q])])
    twice = lambda f: jax.vmap(jax.vmap(f, (0, None, None, None)), (0, None, None, None))
    assert custom_calls(twice(ours), q, k, v, bias) == 1
    assert_close(twice(ours)(q, k, v, bias), twice(theirs)(q, k, v, bias))


def test_vmap_inside_of_scan_and_of_scan():
    (x,) = randoms((3, 2, 4, 2, 8))
    step = lambda x: fj.attention(x, x, x, causal=True)
    repeat = lambda f: lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=2)[0]
    want = each(lambda x: step(step(x)), x)
    assert_equal(repeat(jax.vmap(step))(x), want)
    assert_equal(jax.vmap(repeat(step))(x), want)


def test_vmap_over_nothing():
    q, k, v = randoms((0, 2, 5, 4, 8), (0, 2, 7, 2, 8), (0, 2, 7, 2, 6))
    assert jax.vmap(fj.attention)(q, k, v).shape == (0, 2, 5, 4, 6)
