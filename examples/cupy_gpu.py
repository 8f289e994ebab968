"""Attention on CuPy arrays, on a stream of our own, checked by the error rule."""

import sys

import cupy
from text_model import last_layer

import flashcore as fc
import flashcore.testing

if not cupy.is_available():
    sys.exit("cupy_gpu.py: CuPy finds no CUDA device")

q, k, v = (cupy.asarray(x, dtype=cupy.float16) for x in last_layer())
cupy.cuda.get_current_stream().synchronize()
stream = cupy.cuda.Stream(non_blocking=True)
with stream:  # flashcore follows the current stream
    out = fc.attention(q, k, v, causal=True)
stream.synchronize()
assert isinstance(out, cupy.ndarray)
fc.testing.assert_close_to_reference(out, q, k, v, causal=True)
print("CuPy:", fc.explain(q, k, v, causal=True).kernel)
