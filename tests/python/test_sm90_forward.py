"""The Hopper forward kernels, with torch tensors, against the float64 reference.

Each test has a time limit of its own (conftest.py), so that a kernel that hangs ends the run.
"""

import cases
import numpy as np
import pytest
from cases import Case

import flashcore as fc
from flashcore.testing import assert_close_to_reference, to_numpy

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


def on_gpu(x: np.ndarray) -> "torch.Tensor":
    """The same values in the same strides."""
    raw = x.view(np.int16)
    t = torch.empty_strided(x.shape, [s // 2 for s in x.strides], dtype=torch.int16, device="cuda")
    t.copy_(torch.from_numpy(np.ascontiguousarray(raw)))
    return t.view(torch.bfloat16 if x.dtype.name == "bfloat16" else torch.float16)


def run(case: Case, **more):
    arrays = case.arrays()
    q, k, v = (on_gpu(arrays[name]) for name in "qkv")
    result = fc.attention(q, k, v, **case.options(), return_lse=True, **more)
    torch.cuda.synchronize()
    return arrays, (q, k, v), result


def check(case: Case) -> None:
    arrays, _, result = run(case)
    assert result.out.is_cuda and result.lse.dtype == torch.float32
    assert_close_to_reference(result, arrays["q"], arrays["k"], arrays["v"], **case.options())


@pytest.mark.parametrize("case", cases.SM90, ids=str)
def test_matches_reference(case):
    check(case)


def test_a_gpu_kernel_is_chosen():
    q = torch.zeros(1, 128, 2, 128, device="cuda", dtype=torch.bfloat16)
    plan = fc.explain(q, q, q, causal=True)
    assert plan.backend == "sm90" and plan.deterministic


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_two_runs_give_the_same_bits(d, causal):
    case = Case("twice", dtype="bf16", q=700, k=900, h=(4, 2), d=d, causal=causal)
    arrays, (q, k, v), first = run(case)
    for _ in range(10):
        again = fc.attention(q, k, v, **case.options(), return_lse=True)
        assert torch.equal(first.out, again.out) and torch.equal(first.lse, again.lse)


@pytest.mark.parametrize("d", [64, 72, 128, 256])
def test_nothing_is_written_outside_the_output(d):
    """Canaries before, after and between the rows of out."""
    case = Case("canaries", dtype="bf16", q=131, k=200, h=(2, 1), d=d, causal=True)
    arrays = case.arrays()
    q, k, v = (on_gpu(arrays[name]) for name in "qkv")
    room = torch.full((2, 131 + 2, 2 + 2, d + 8), 7.0, device="cuda", dtype=torch.bfloat16)
    out = room[:, 1:-1, 1:-1, :d]
    assert fc.attention(q, k, v, causal=True, out=out) is out
    assert torch.equal(out, fc.attention(q, k, v, causal=True))
    out.fill_(7.0)
    assert (room == 7).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_around_the_inputs_reaches_nothing(poison):
    """Rows before and after, and the columns beyond head_dim that a tile of 64 would load."""
    case = Case("poison", dtype="bf16", q=130, k=150, d=40, causal=True)
    arrays = case.arrays()
    inputs = {}
    for name in "qkv":
        x = on_gpu(arrays[name])
        b, s, h, d = x.shape
        room = torch.full((b, s + 64, h, 64), poison, device="cuda", dtype=x.dtype)
        inputs[name] = room[:, 32 : 32 + s, :, :d]
        inputs[name].copy_(x)
    result = fc.attention(*inputs.values(), causal=True, return_lse=True)
    assert_close_to_reference(result, arrays["q"], arrays["k"], arrays["v"], causal=True)


def test_side_stream():
    """Work goes to torch's current stream: it sees what was made there, in order."""
    case = Case("stream", dtype="bf16", q=512, k=512, d=128, h=(8, 8))
    arrays, (q, k, v), want = run(case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = q.clone()
        got = fc.attention(late, k, v)
        copy = got.clone()
    stream.synchronize()
    assert torch.equal(copy, want.out)
    explicit = fc.attention(q, k, v, stream=stream)
    stream.synchronize()
    assert torch.equal(explicit, want.out)


def test_cuda_graph_capture_and_replay():
    case = Case("graph", dtype="bf16", q=256, k=256, d=64, h=(4, 4))
    arrays, (q, k, v), want = run(case)
    out = torch.empty_like(want.out)
    fc.attention(q, k, v, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fc.attention(q, k, v, out=out)
    q.mul_(0.5)
    expected = fc.attention(q, k, v)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_offsets_beyond_2_to_the_31_elements():
    heads, d, rows = 16, 128, 1_200_000  # 2.46e9 elements
    base = torch.empty(1, rows, heads, d, device="cuda", dtype=torch.bfloat16)
    case = Case("far", dtype="bf16", b=1, q=200, k=200, h=(heads, heads), d=d, causal=True)
    arrays = case.arrays()
    last = base[:, -200:]
    last.copy_(on_gpu(arrays["k"]))
    out = fc.attention(on_gpu(arrays["q"]), last, on_gpu(arrays["v"]), causal=True)
    assert_close_to_reference(out, arrays["q"], arrays["k"], arrays["v"], causal=True)


def test_scores_about_minus_120():
    case = Case("negative", dtype="bf16", q=130, k=191, d=64)
    arrays = case.arrays()
    arrays["q"] = (arrays["q"].astype(np.float32) * 0.02 + 1).astype(case.np_dtype)
    arrays["k"] = (arrays["k"].astype(np.float32) * 0.02 - 120 / 64).astype(case.np_dtype)
    q, k, v = (on_gpu(arrays[name]) for name in "qkv")
    result = fc.attention(q, k, v, scale=1.0, return_lse=True)
    assert (to_numpy(result.lse) < -100).all()
    assert_close_to_reference(result.out, arrays["q"], arrays["k"], arrays["v"], scale=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_values_of_one_give_one(dtype, d):
    q = torch.randn(1, 300, 2, d, device="cuda", dtype=dtype)
    out = fc.attention(q, q, torch.ones_like(q), causal=True).float()
    eps = torch.finfo(dtype).eps
    assert out.min() >= 1 - eps / 2 and out.max() <= 1 + eps


UNBUILT = {
    "window": {"window_size": (5, 5)},
    "softcap": {"softcap": 1.0},
    "dropout": {"dropout_p": 0.5, "rng": (1, 2)},
    "bias": {"bias": (1, 1, 1, 64)},
    "mask": {"mask": (1, 1, 1, 64)},
    "sinks": {"sinks": (2,)},
    "alibi": {"alibi_slopes": (2,)},
    "seqlens": {"seqlens_k": (1,)},
}


@pytest.mark.parametrize("options", UNBUILT.values(), ids=[*UNBUILT])
def test_what_is_not_built_is_refused_or_right(options):
    """Never silently something else: an error that says so, or the reference's result."""
    case = Case("unbuilt", dtype="bf16", b=1, q=64, k=64, d=64)
    arrays = case.arrays()
    q, k, v = (on_gpu(arrays[name]) for name in "qkv")
    make = {
        "mask": lambda s: np.arange(64).reshape(s) % 3 > 0,
        "seqlens_k": lambda s: np.array([40], np.int32),
    }
    host = {
        name: make.get(name, lambda s: np.ones(s, np.float32))(x)
        if name in ("bias", "mask", "sinks", "alibi_slopes", "seqlens_k")
        else x
        for name, x in options.items()
    }
    device = {
        name: torch.from_numpy(x).cuda() if isinstance(x, np.ndarray) else x
        for name, x in host.items()
    }
    try:
        result = fc.attention(q, k, v, **device, return_lse=True)
    except fc.UnsupportedError as e:
        assert "sm90" in str(e) and len(str(e)) > 40
        return
    assert_close_to_reference(result, arrays["q"], arrays["k"], arrays["v"], **host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_refused(dtype):
    q = torch.zeros(1, 8, 1, 64, device="cuda", dtype=dtype)
    with pytest.raises(fc.UnsupportedError, match="float32|float64"):
        fc.attention(q, q, q)


@pytest.mark.parametrize("d", [12, 260, 264])
def test_other_head_dims_are_refused(d):
    q = torch.zeros(1, 8, 1, d, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(fc.UnsupportedError, match="head_dim"):
        fc.attention(q, q, q)


def test_strides_that_tma_cannot_take_are_refused():
    room = torch.zeros(1, 64, 2, 65, device="cuda", dtype=torch.bfloat16)
    q = room[..., :64]  # rows 130 bytes apart
    with pytest.raises(fc.Error, match="stride|16"):
        fc.attention(q, q, q)


def test_misaligned_data_is_refused():
    flat = torch.zeros(64 * 64 + 8, device="cuda", dtype=torch.bfloat16)
    q = flat[1 : 1 + 64 * 64].view(1, 64, 1, 64)
    with pytest.raises(fc.Error, match="align|16"):
        fc.attention(q, q, q)


def test_backward_is_refused_by_name():
    q = torch.zeros(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16)
    out, lse, _ = fc.attention(q, q, q, return_lse=True)
    with pytest.raises(fc.UnsupportedError, match="backward"):
        fc.attention_backward(out, q, q, q, out, lse)


def test_tensors_on_two_devices_are_refused():
    q = torch.zeros(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(fc.ArgumentError, match="k is on cpu but q is on cuda:0"):
        fc.attention(q, q.cpu(), q)


def test_requires_grad_is_refused():
    q = torch.zeros(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(fc.Error, match="grad"):
        fc.attention(q, q, q)
