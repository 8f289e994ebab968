"""flashcore.torch on CUDA tensors: streams, devices, graphs, compilation, gradients.

Calls are asked of `explain` first: what no kernel runs must be an error, what one runs must be
right.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import flashcore as fc  # noqa: E402
import flashcore.torch as ft  # noqa: E402
from flashcore.compat.flash_attn import flash_attn_func  # noqa: E402
from flashcore.testing import (  # noqa: E402
    assert_close_to_reference,
    assert_grads_close_to_reference,
)

pytestmark = pytest.mark.gpu
F = torch.nn.functional


def tensors(*shape, device="cuda", grad=False, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shape = shape or (2, 300, 4, 64)
    return [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad)
        for _ in range(3)
    ]


def runs(q, k, v, direction="forward", **options):
    return ft.explain(q, k, v, direction=direction, **options).kernel is not None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_forward(causal, head_dim):
    q, k, v = tensors(2, 300, 4, head_dim)
    result = ft.attention(q, k, v, causal=causal, return_lse=True)
    assert_close_to_reference(result, q, k, v, causal=causal)


# Gradients of whatever backward kernels take.
BACKWARD = [
    {},
    {"causal": True},
    {"causal": True, "window_size": (64, None)},
    {"softcap": 10.0},
    {"dropout_p": 0.2, "rng": (3, 4)},
    {"causal": True, "deterministic": True},
]


@pytest.mark.parametrize("options", BACKWARD, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_or_a_clear_error(head_dim, options):
    q, k, v = tensors(2, 300, 4, head_dim, grad=True)
    dout = torch.randn_like(q)
    if not runs(q, k, v, **options):
        with pytest.raises(fc.UnsupportedError):
            ft.attention(q, k, v, **options)
        return
    out = ft.attention(q, k, v, **options)
    if not runs(q, k, v, "backward", **options):
        with pytest.raises(fc.UnsupportedError):
            out.backward(dout)
        return
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert_grads_close_to_reference(fc.Grads(*grads, None, None), dout, q, k, v, **options)


def test_side_stream():
    """Inputs made on a stream of our own, used there at once."""
    base = tensors(4, 2048, 8, 128)
    want = ft.attention(*(x * 2 for x in base), causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000)
            got = ft.attention(*(x * 2 for x in base), causal=True)
    stream.synchronize()
    assert torch.equal(got, want)


def gradients(q, k, v, dout):
    return torch.autograd.grad(ft.attention(q, k, v, causal=True), (q, k, v), dout)


@pytest.fixture
def trained():
    """q, k, v, dout of a call that has gradients."""
    q, k, v = tensors(2, 1024, 8, 64, grad=True)
    if not runs(q, k, v, "backward", causal=True):
        pytest.skip("no kernel of this GPU runs backward")
    return q, k, v, torch.randn_like(q)


def assert_equal_gradients(got, want):
    """Sums in another order differ by rounding; a race differs by more."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_backward_on_a_side_stream(trained):
    """Autograd runs backward on the stream of forward, in a thread of its own."""
    q, k, v, dout = trained
    want = gradients(q, k, v, dout * 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000)
            got = gradients(q, k, v, dout * 2)
    stream.synchronize()
    assert_equal_gradients(got, want)


def test_cuda_graph_of_a_training_step(trained):
    q, k, v, dout = trained
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(q, k, v, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(q, k, v, dout)
    dout.mul_(-2)
    graph.replay()
    assert_equal_gradients(got, gradients(q, k, v, dout))


def test_cuda_graph_replays_with_new_values():
    q, k, v = tensors()
    graph = torch.cuda.CUDAGraph()
    ft.attention(q, k, v, causal=True)
    with torch.cuda.graph(graph):
        out = ft.attention(q, k, v, causal=True)
    for x in (q, k, v):
        x.mul_(1.5)
    graph.replay()
    assert torch.equal(out, ft.attention(q, k, v, causal=True))


def test_cuda_graph_of_packed_sequences():
    (q, k, v), lengths = tensors(300, 4, 64), torch.tensor([0, 100, 300], dtype=torch.int32).cuda()
    options = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "max_seqlen_q": 300}
    options |= {"max_seqlen_k": 300, "causal": True}
    if not runs(q, k, v, **options):
        pytest.skip("no kernel takes packed sequences yet")
    graph = torch.cuda.CUDAGraph()
    ft.attention(q, k, v, **options)
    with torch.cuda.graph(graph):
        out = ft.attention(q, k, v, **options)
    lengths.copy_(torch.tensor([0, 250, 300]))
    graph.replay()
    assert torch.equal(out, ft.attention(q, k, v, **options))


def test_cuda_graph_of_dropout_draws_anew():
    q, k, v = tensors()
    if not runs(q, k, v, dropout_p=0.5, rng=(0, 0)):
        pytest.skip("no kernel takes dropout yet")
    graph = torch.cuda.CUDAGraph()
    ft.attention(q, k, v, dropout_p=0.5)
    with torch.cuda.graph(graph):
        out = ft.attention(q, k, v, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_no_host_synchronisation():
    q, k, v = tensors()
    ft.attention(q, k, v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ft.attention(q, k, v, causal=True, return_lse=True)
        flash_attn_func(q, k, v, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile():
    q, k, v = tensors()
    function = torch.compile(lambda q, k, v: ft.attention(q, k, v, causal=True), fullgraph=True)
    assert torch.equal(function(q, k, v), ft.attention(q, k, v, causal=True))
    torch._dynamo.reset()


def test_opcheck():
    q, k, v = tensors(1, 64, 2, 64)
    torch.library.opcheck(
        torch.ops.flashcore.attention, (q, k, v), test_utils=("test_schema", "test_faketensor")
    )


def test_sdpa():
    q, k, v = (x.transpose(1, 2) for x in tensors())
    want = ft.attention(q, k, v, layout="bhsd", causal=True)
    with ft.register_sdpa(strict=True):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), want)
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in tensors())
    with ft.register_sdpa():  # torch's own backward where flashcore has none
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.sum().backward()
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_sdpa_leaves_a_refused_call_to_torch(dropout_p, grad):
    """float32 on a GPU: torch's result, and of dropout torch's own random numbers."""
    q, k, v = (
        x.transpose(1, 2).detach().requires_grad_(grad) for x in tensors(dtype=torch.float32)
    )
    torch.manual_seed(0)
    want = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    torch.manual_seed(0)
    with ft.register_sdpa():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p), want)
    with ft.register_sdpa(strict=True), pytest.raises(fc.UnsupportedError):
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


def test_autocast():
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = ft.attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ft.attention(*(x.bfloat16() for x in (q, k, v))))


def test_compat_flash_attn():
    q, k, v = tensors()
    out, lse, probs = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    want = ft.attention(q, k, v, causal=True, return_lse=True)
    assert torch.equal(out, want.out) and torch.equal(lse, want.lse) and not probs.numel()


def test_tensors_on_different_devices():
    q, k, v = tensors()
    for grad in (False, True):
        with pytest.raises(fc.ArgumentError, match="k .*cpu|device"):
            ft.attention(q.detach().requires_grad_(grad), k.cpu(), v)
