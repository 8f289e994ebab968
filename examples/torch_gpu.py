"""Attention on PyTorch CUDA tensors, on a stream of our own, checked by the error rule."""

import sys

import torch
from text_model import last_layer

import flashcore as fc
import flashcore.testing

if not torch.cuda.is_available():
    sys.exit("torch_gpu.py: torch finds no CUDA device")

arrays = last_layer()
for dtype in (torch.bfloat16, torch.float16):
    q, k, v = (torch.from_numpy(x).to("cuda", dtype) for x in arrays)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # flashcore follows the current stream
        out = fc.attention(q, k, v, causal=True)
    stream.synchronize()
    fc.testing.assert_close_to_reference(out, q, k, v, causal=True)
    print("PyTorch, CUDA:", dtype, fc.explain(q, k, v, causal=True).kernel)
