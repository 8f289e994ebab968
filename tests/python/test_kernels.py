"""Every compiled kernel that this machine can run: no row goes untested.

conftest.py refuses to start if a usable row would get no case.
"""

import pytest
from forced import cases_of, run
from helpers import run_python

import flashcore as fc

USABLE = [k for k in fc.kernels() if k.usable]


@pytest.mark.parametrize("kernel", [k for k in USABLE if k.backend == "cpu"], ids=lambda k: k.name)
def test_forced_kernel_is_right(kernel):
    said = run_python(
        f"import forced; forced.main({kernel.name!r})", timeout=300, FLASHCORE_FORCE=kernel.name
    )
    assert int(said) == len(cases_of(kernel)) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [k for k in USABLE if k.backend != "cpu"], ids=lambda k: k.name)
def test_chosen_kernel_is_right(kernel):
    """A row that the library chooses for no call is of no use. Forcing needs a process for each."""
    from gpu import on_gpu

    right = 0
    for case in cases_of(kernel):
        right += run(kernel, case, on_gpu)
        if right == 2:
            return
    assert right, "the library chose it for none of forced.GPU: add a case"


def test_names_are_unique_and_rows_complete():
    kernels = fc.kernels()
    assert len({k.name for k in kernels}) == len(kernels)
    for k in kernels:
        assert k.direction in ("forward", "backward")
        assert k.mask in ("any", "window", "causal", "none", "blocks")
        assert k.block_m > 0 and k.block_n > 0 and k.head_dim >= 0
        assert k.name.startswith(k.backend)


def test_the_cpu_has_every_dtype_in_both_directions():
    have = {(k.direction, k.dtype) for k in fc.kernels() if k.backend == "cpu" and k.usable}
    assert have == {
        (direction, dtype)
        for direction in ("forward", "backward")
        for dtype in ("float16", "bfloat16", "float32", "float64")
    }


def test_forcing_a_backend_or_nothing_that_exists():
    code = """
import numpy as np, flashcore as fc
x = np.ones((1, 4, 1, 8), np.float32)
print(fc.explain(x, x, x).kernel)
try:
    fc.attention(x, x, x)
    print("ran")
except fc.UnsupportedError as e:
    print("FLASHCORE_FORCE" in str(e))
"""
    assert run_python(code, FLASHCORE_FORCE="cpu").split()[1] == "ran"
    assert run_python(code, FLASHCORE_FORCE="no-such-kernel").split() == ["None", "True"]


def test_explain_names_each_refusal():
    import numpy as np

    x = np.ones((1, 4, 1, 8), np.float32)
    plan = fc.explain(x, x, x, causal=True)
    assert plan.kernel in {k.name for k in fc.kernels()}
    assert plan.deterministic and plan.splits >= 1 and plan.tile[0] > 0
    refused = dict(plan.refusals)
    assert plan.kernel not in refused
    assert any("float64" in reason or "float16" in reason for reason in refused.values())


def test_lower_instruction_sets_can_be_chosen():
    code = """
import numpy as np, flashcore as fc
x = np.ones((1, 4, 1, 8), np.float32)
print(fc.explain(x, x, x).arch)
"""
    names = [
        k.isa
        for k in fc.kernels()
        if k.backend == "cpu" and k.usable and k.dtype == "float32" and k.direction == "forward"
    ]
    for isa in names:
        assert run_python(code, FLASHCORE_CPU_ISA=isa).strip() == isa
