"""Between the arrays of cases.py and JAX, and attention in JAX's own operations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flashcore as fc


def array(x: Any) -> Any:
    """The values as a JAX array; what is no array stays."""
    if isinstance(x, fc.BlockMask):
        return x.map(jnp.asarray)
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def case_arrays(case: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays = {name: array(x) for name, x in case.arrays().items()}
    return arrays, {name: array(x) for name, x in case.options().items()}


def plain(q, k, v, bias=None, causal=False):
    """(out, lse) of (B, S, H, D) arrays, differentiable any number of times."""
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
    s = jnp.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        s = s + bias
    if causal:
        visible = jnp.tril(jnp.ones(s.shape[-2:], bool), s.shape[-1] - s.shape[-2])
        s = jnp.where(visible, s, -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    return jnp.einsum("bhst,bthd->bshd", jnp.exp(s - lse[..., None]), v), lse


def randoms(*shapes: tuple[int, ...], dtype: Any = None) -> list[jax.Array]:
    dtype = dtype or (jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def assert_close(got: Any, want: Any, tolerance: float = 1e-7) -> None:
    """Trees of arrays, element by element."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
    )


def assert_equal(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), got, want)
