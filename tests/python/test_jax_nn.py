"""flashcore.jax.dot_product_attention beside jax.nn's, whose signature and meaning it has."""

from __future__ import annotations

import inspect

import pytest

jax = pytest.importorskip("jax", minversion="0.10")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax_arrays import assert_close, randoms  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.jax as fj  # noqa: E402

theirs = jax.nn.dot_product_attention
ours = fj.dot_product_attention
B, T, S, N, K, H = 2, 6, 9, 4, 2, 8


def arrays(t=T, s=S, dtype=jnp.float32):
    return randoms((B, t, N, H), (B, s, K, H), (B, s, K, H), dtype=dtype)


def test_signature():
    got, want = (inspect.signature(f).parameters for f in (ours, theirs))
    assert list(got) == list(want)
    for name, parameter in want.items():
        assert got[name].default == parameter.default and got[name].kind == parameter.kind, name


BIAS = randoms((B, N, T, S), dtype=jnp.float32)[0]
MASK = jax.random.bernoulli(jax.random.key(3), 0.7, (B, N, T, S)).at[..., 0].set(True)
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bias": {"bias": BIAS},
    "bias of a head": {"bias": BIAS[:1, :, :1]},
    "bias with fewer dimensions": {"bias": BIAS[0, 0]},
    "bias in float16": {"bias": BIAS.astype(jnp.float16)},
    "mask": {"mask": MASK},
    "mask of keys": {"mask": MASK[:, :1, :1]},
    "mask with fewer dimensions": {"mask": MASK[0]},
    "window": {"local_window_size": 3},
    "left and right window": {"local_window_size": (2, 4)},
    "causal window": {"local_window_size": (2, 0), "is_causal": True},
    "lengths of keys": {"key_value_seq_lengths": jnp.array([9, 4], jnp.int32)},
    "lengths of queries": {"query_seq_lengths": jnp.array([6, 2], jnp.int32)},
    "lengths of both, causal": {
        "query_seq_lengths": jnp.array([3, 6], jnp.int32),
        "key_value_seq_lengths": jnp.array([9, 5], jnp.int32),
        "is_causal": True,
    },
    "everything": {
        "bias": BIAS,
        "mask": MASK,
        "is_causal": True,
        "scale": 0.5,
        "key_value_seq_lengths": jnp.array([7, 9], jnp.int32),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients(name):
    q, k, v = arrays()
    options = OPTIONS[name]
    static = {n: x for n, x in options.items() if not isinstance(x, jax.Array)}
    leaves = {n: x for n, x in options.items() if isinstance(x, jax.Array)}

    def run(f):
        def call(q, k, v, leaves):
            return f(q, k, v, **leaves, **static)

        loss = lambda *args: jnp.sin(call(*args).astype(jnp.float32)).sum()
        argnums = (0, 1, 2)
        return jax.jit(call)(q, k, v, leaves), jax.jit(jax.grad(loss, argnums))(q, k, v, leaves)

    assert_close(run(ours), run(theirs), 1e-5)


def test_gradient_of_the_bias():
    q, k, v = arrays()
    grad = lambda f: jax.grad(lambda bias: jnp.sin(f(q, k, v, bias=bias)).sum())
    for bias in (BIAS, BIAS[:1, :, :1], BIAS[0, 0]):
        assert_close(grad(ours)(bias), grad(theirs)(bias), 1e-5)


def test_three_dimensions():
    q, k, v = (x[0] for x in arrays())
    assert_close(ours(q, k, v, is_causal=True), theirs(q, k, v, is_causal=True), 1e-5)
    got, want = (f(q, k, v, return_residual=True) for f in (ours, theirs))
    assert got[0].shape == want[0].shape and got[1].shape == want[1].shape


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_and_residual(dtype):
    q, k, v = arrays(dtype=dtype)
    out, residual = ours(q, k, v, return_residual=True)
    want, want_residual = theirs(q, k, v, return_residual=True)
    assert out.dtype == want.dtype and residual.dtype == want_residual.dtype
    eps = float(jnp.finfo(dtype).eps)
    as_float = lambda *xs: [np.asarray(x, np.float32) for x in xs]
    assert_close(as_float(out, residual), as_float(want, want_residual), max(1e-5, 4 * eps))


def test_residual_has_no_gradient():
    q, k, v = arrays()
    assert not jax.grad(lambda q: ours(q, k, v, return_residual=True)[1].sum())(q).any()


def test_under_vmap():
    q, k, v = (jnp.stack([x, -x, 2 * x]) for x in arrays())
    assert_close(jax.vmap(ours)(q, k, v), jax.vmap(theirs)(q, k, v), 1e-5)


def test_a_row_that_sees_nothing_is_zero():
    q, k, v = arrays()
    mask = jnp.ones((B, N, T, S), bool).at[:, :, 2].set(False)
    out, residual = ours(q, k, v, mask=mask, return_residual=True)
    assert not out[:, 2].any() and (residual[:, 2] == -jnp.inf).all()
    seen = jnp.arange(T) != 2
    assert_close(out[:, seen], theirs(q, k, v, mask=mask)[:, seen], 1e-5)


@pytest.mark.parametrize("implementation", ["xla", "cudnn", "other"])
def test_implementations_of_others(implementation):
    with pytest.raises(fc.UnsupportedError, match=r"implementation must be None.*jax\.nn"):
        ours(*arrays(), implementation=implementation)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"query": jnp.ones((T, H))}, r"query must have 3 or 4 dimensions"),
        ({"mask": jnp.ones((1, 1, T, S))}, "mask must be bool"),
        ({"mask": jnp.ones((1, 1, 1, T, S), bool)}, r"mask must be broadcastable"),
        ({"bias": jnp.ones((1, 1, T, S), bool)}, r"bias must be a floating array.*mask="),
        ({"bias": jnp.ones((3, 1, T, S))}, "bias must broadcast"),
        ({"scale": jnp.float32(0.5)}, "scale must be a number"),
        ({"is_causal": 1}, "is_causal must be True or False"),
        ({"query_seq_lengths": jnp.array([6, 2], jnp.uint32)}, "seqlens_q must be"),
        ({"key_value_seq_lengths": jnp.array([6], jnp.int32)}, "seqlens_k must"),
        ({"local_window_size": (1, 2, 3)}, "window_size must be a pair"),
        ({"key": jnp.ones((B, S, 3, H))}, "heads"),
        ({"value": jnp.ones((B, S, K, H), jnp.bfloat16)}, "v must have q's dtype"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(change, message):
    arguments = dict(zip(("query", "key", "value"), arrays()))
    with pytest.raises(fc.ArgumentError, match=message):
        ours(**{**arguments, **change})
