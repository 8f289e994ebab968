"""Memory beyond inputs and outputs: O(N) per head, never N x N."""

import json

import numpy as np
import pytest
from helpers import run_python

import flashcore as fc

MEBIBYTE = 2**20

PEAK = """
import json, os, threading, time
import numpy as np, flashcore as fc

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

class Peak(threading.Thread):
    # The calls release the GIL, so this thread sees them from outside.
    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stop = 0, False
    def run(self):
        while not self.stop:
            self.peak = max(self.peak, resident())
            time.sleep(0.0005)

fc.set_num_threads(1)
rows = []
for n in SIZES:
    q, k, v, dout = (np.ones((1, n, 1, 64), np.float32) for _ in range(4))
    dq, dk, dv = (np.ones_like(q) for _ in range(3))
    out, lse, _ = fc.attention(q, k, v, causal=True, return_lse=True)
    before = resident()
    watch = Peak()
    watch.start()
    if BACKWARD:
        fc.attention_backward(dout, q, k, v, out, lse, causal=True, dq=dq, dk=dk, dv=dv)
    else:
        fc.attention(q, k, v, causal=True, out=out)
    watch.peak = max(watch.peak, resident())
    watch.stop = True
    watch.join()
    rows.append(watch.peak - before)
print(json.dumps(rows))
"""


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_peak_grows_linearly(backward):
    sizes = [2048, 8192, 16384]
    code = PEAK.replace("SIZES", repr(sizes)).replace("BACKWARD", repr(backward))
    peaks = json.loads(run_python(code, timeout=300))
    for n, peak in zip(sizes, peaks):
        matrix = n * n * 4
        linear = n * 64 * 4 * 8
        assert peak < 4 * MEBIBYTE + linear, (n, peak)
        assert n < 4000 or peak < matrix / 16, (n, peak)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_workspace_is_linear_and_scratch_is_small(dtype, d):
    def workspace(n, threads, **options):
        fc.set_num_threads(threads)
        try:
            x = np.empty((1, n, 2, d), dtype)
            return fc.explain(x, x, x, causal=True, **options).workspace_bytes
        finally:
            fc.set_num_threads(0)

    one, two = workspace(4096, 1), workspace(4096, 2)
    assert 0 <= two - one <= 1.5 * MEBIBYTE
    assert one <= 1.5 * MEBIBYTE + 4096 * 2 * 16
    small, large = workspace(16384, 1), workspace(65536, 1)
    assert large <= 4 * max(small, MEBIBYTE)


def test_scratch_of_backward():
    fc.set_num_threads(1)
    try:
        x = np.empty((1, 8192, 2, 128), np.float32)
        plan = fc.explain(x, x, x, causal=True, direction="backward")
    finally:
        fc.set_num_threads(0)
    # delta and lse of every row, and one block of scratch.
    assert plan.workspace_bytes <= 1.5 * MEBIBYTE + 8192 * 2 * 16
