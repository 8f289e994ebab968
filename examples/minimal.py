"""Attention on NumPy arrays: forward and backward, checked by the error rule."""

import numpy as np
from text_model import last_layer

import flashcore as fc
import flashcore.testing

q, k, v = last_layer()
result = fc.attention(q, k, v, causal=True, return_lse=True)
fc.testing.assert_close_to_reference(result, q, k, v, causal=True)

dout = np.ones_like(result.out)
grads = fc.attention_backward(dout, q, k, v, result.out, result.lse, causal=True)
fc.testing.assert_grads_close_to_reference(grads, dout, q, k, v, causal=True)

print("NumPy:", fc.explain(q, k, v, causal=True).kernel)
