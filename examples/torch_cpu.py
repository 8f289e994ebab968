"""Attention on PyTorch CPU tensors, in the dtypes torch has, checked by the error rule."""

import torch
from text_model import last_layer

import flashcore as fc
import flashcore.testing

arrays = last_layer()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    q, k, v = (torch.from_numpy(x).to(dtype) for x in arrays)
    out = fc.attention(q, k, v, causal=True)
    assert isinstance(out, torch.Tensor) and out.dtype == dtype
    fc.testing.assert_close_to_reference(out, q, k, v, causal=True)
    print("PyTorch, CPU:", dtype, fc.explain(q, k, v, causal=True).kernel)
