"""Attention in JAX on a GPU: compiled, in bfloat16, with gradients, checked by the error rule."""

import jax
import jax.numpy as jnp
from text_model import last_layer

import flashcore as fc
import flashcore.jax
import flashcore.testing

gpu = jax.devices("gpu")[0]
q, k, v = (jax.device_put(jnp.asarray(x, jnp.bfloat16), gpu) for x in last_layer())
print("JAX:", fc.jax.explain(q, k, v, causal=True).kernel)
out = jax.jit(lambda q, k, v: fc.jax.attention(q, k, v, causal=True))(q, k, v)
host = jax.device_get((out, q, k, v))
fc.testing.assert_close_to_reference(*host, causal=True)

loss = lambda q, k, v: fc.jax.attention(q, k, v, causal=True).astype(jnp.float32).sum()
grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
dout = jax.device_get(jnp.ones_like(out))
fc.testing.assert_grads_close_to_reference(
    fc.Grads(*jax.device_get(grads), None, None), dout, *host[1:], causal=True
)
print("forward and backward agree with the definition in float64")
