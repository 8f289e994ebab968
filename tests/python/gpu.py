"""The cases of cases.py on a CUDA device, through torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import Case

import flashcore as fc
from flashcore.testing import assert_close_to_reference, to_numpy

torch = pytest.importorskip("torch")

DEVICE = "cuda"


def on_gpu(x: Any) -> Any:
    """The same values in the same strides; what is no array stays."""
    if isinstance(x, fc.BlockMask):
        return x.map(on_gpu)
    if not isinstance(x, np.ndarray):
        return x
    raw = x.view(np.int16) if x.dtype.itemsize == 2 else x
    strides = [s // x.itemsize for s in x.strides]
    t = torch.empty_strided(x.shape, strides, dtype=getattr(torch, raw.dtype.name), device=DEVICE)
    t.copy_(torch.from_numpy(np.ascontiguousarray(raw)))
    if x.dtype.itemsize != 2:
        return t
    return t.view(torch.bfloat16 if x.dtype.name == "bfloat16" else torch.float16)


def why_refused(q, k, v, **options) -> str:
    """Empty if a kernel takes the call."""
    plan = fc.explain(q, k, v, **options)
    dtype = str(q.dtype).removeprefix("torch.")
    reasons = dict.fromkeys(reason for _, reason in plan.refusals)
    others = [r for r in reasons if not r.startswith("takes ") or dtype in r]
    return "" if plan.kernel else "; ".join(others or reasons)


class Run(NamedTuple):
    """One call: its arrays and options in NumPy and on the device, and what it returned."""

    arrays: dict[str, np.ndarray]
    values: dict[str, Any]
    inputs: tuple[Any, Any, Any]
    options: dict[str, Any]
    result: fc.Result

    def again(self, **more: Any) -> fc.Result:
        return fc.attention(*self.inputs, **self.options, return_lse=True, **more)

    def on_the_cpu(self) -> fc.Result:
        a = self.arrays
        return fc.attention(a["q"], a["k"], a["v"], **self.values, return_lse=True)


def run(
    case: Case, arrays: dict[str, np.ndarray] | None = None, copies: int = 0, **more: Any
) -> Run:
    """Skips the test, with the reason, if no kernel of the installed build takes the call.

    copies: of the one sequence, in memory once.
    """
    arrays = arrays or case.arrays()
    values = case.options() | more
    inputs = tuple(on_gpu(arrays[name]) for name in "qkv")
    if copies:
        inputs = tuple(x.expand(copies, -1, -1, -1) for x in inputs)
    options = {name: on_gpu(x) for name, x in values.items()}
    if why := why_refused(*inputs, **options):
        pytest.skip(f"refused: {why}")
    result = fc.attention(*inputs, **options, return_lse=True)
    return Run(arrays, values, inputs, options, result)


def assert_same_bits(a: fc.Result, b: fc.Result) -> None:
    for x, y in zip(a[:2], b[:2]):
        whole = torch.int32 if x.element_size() == 4 else torch.int16
        assert torch.equal(x.view(whole), y.view(whole))


def assert_near_the_cpu(result: fc.Result, cpu: fc.Result) -> None:
    """Both round P and the result to 16 bits, in another order: a few roundings of the largest."""
    import ml_dtypes

    out, lse = to_numpy(result.out), to_numpy(result.lse)
    eps = float(ml_dtypes.finfo(out.dtype).eps)
    got, want = out.astype(np.float64), cpu.out.astype(np.float64)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    largest = np.abs(want[finite]).max(initial=0)
    np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=4 * eps * largest)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(cpu.lse))
    seen = np.isfinite(cpu.lse)
    np.testing.assert_allclose(lse[seen], cpu.lse[seen], rtol=1e-5, atol=1e-4)


ONE_PART = {"split_size": 2**20}  # of the keys: asks for a kernel that is chosen for large batches


def check(case: Case, **more: Any) -> Run:
    """Against the definition in float64 and the CPU backend; twice the same bits. The kernel that a
    larger batch would get must agree, and twice too."""
    done = run(case, **more)
    result, a = done.result, done.arrays
    assert result.lse.dtype == torch.float32 and result.out.device.type == DEVICE
    assert_close_to_reference(result, a["q"], a["k"], a["v"], **done.values)
    cpu = done.on_the_cpu()
    assert_near_the_cpu(result, cpu)
    assert_same_bits(result, done.again())
    if not {"num_splits", "split_size"} & done.options.keys():
        one = done.again(**ONE_PART)
        assert_near_the_cpu(one, cpu)
        assert_same_bits(one, done.again(**ONE_PART))
    return done
