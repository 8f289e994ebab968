"""Attention on JAX arrays, outside jit, on the CPU, checked by the error rule.

A JAX array cannot be written to, so flashcore computes into memory of its own and hands that to JAX
without a copy.
"""

import jax
import jax.numpy as jnp
import numpy as np
from text_model import last_layer

import flashcore as fc
import flashcore.testing

arrays = last_layer()
cpu = jax.devices("cpu")[0]
for dtype in (jnp.float32, jnp.bfloat16):
    q, k, v = (jax.device_put(jnp.asarray(x, dtype), cpu) for x in arrays)
    out = fc.attention(q, k, v, causal=True)
    assert isinstance(out, jax.Array) and out.dtype == dtype
    host = [np.asarray(x) for x in (out, q, k, v)]
    fc.testing.assert_close_to_reference(*host, causal=True)
    print("JAX:", jnp.dtype(dtype).name, fc.explain(q, k, v, causal=True).kernel)
