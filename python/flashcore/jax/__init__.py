"""flashcore for JAX: jit, grad, vmap, scan, checkpoint, shard_map, sharded arrays, on CPU and GPU.

    import flashcore.jax
    out = flashcore.jax.attention(q, k, v, causal=True)

Importing this module registers two XLA custom calls, flashcore_attention and
flashcore_attention_backward, and BlockMask as a pytree. Nothing else in JAX changes.
"""

from __future__ import annotations

import jax

if jax.__version_info__ < (0, 10):
    raise ImportError(
        f"flashcore.jax needs JAX 0.10 or newer, got {jax.__version__}: flashcore.attention takes "
        "the arrays of older ones on the CPU, outside of jit"
    )

from flashcore.jax import ffi, pytree
from flashcore.jax.api import attention, explain
from flashcore.jax.nn import dot_product_attention

__all__ = ["attention", "dot_product_attention", "explain"]

ffi.register()
pytree.register()
