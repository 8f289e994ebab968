"""Attention over a few blocks of its matrix, forward and backward, checked by the error rule."""

import numpy as np
from text_model import last_layer

import flashcore as fc
import flashcore.testing

q, k, v = last_layer()
rows, keys = q.shape[1], k.shape[1]
block = (32, 32)

# A window of two blocks, and the first block for everyone; above the diagonal nothing.
near = fc.BlockMask.sliding(rows, keys, block, window_size=(32, 0))
mask = near | fc.BlockMask.strips(rows, keys, block, columns=1)
options = {"block_mask": mask, "causal": True}

result = fc.attention(q, k, v, **options, return_lse=True)
fc.testing.assert_close_to_reference(result, q, k, v, **options)

dout = np.ones_like(result.out)
grads = fc.attention_backward(dout, q, k, v, result.out, result.lse, **options)
fc.testing.assert_grads_close_to_reference(grads, dout, q, k, v, **options)

print(mask)
mask.plot("block_mask.png")
