"""Arrays on the second CUDA device while the first is the current one.

A call must run where its arrays are, allocate there, and leave the current device alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flashcore as fc  # noqa: E402
import flashcore.torch as ft  # noqa: E402
from flashcore.testing import (  # noqa: E402
    assert_close_to_reference,
    assert_grads_close_to_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

FIRST, SECOND = "cuda:0", "cuda:1"
SHAPE = (2, 300, 4, 64)
PACKED = (300, 4, 64)
LENGTHS = np.array([0, 100, 300], np.int32)
CALLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": (SHAPE, {}),
    "causal": (SHAPE, {"causal": True}),
    "many keys": ((1, 2000, 2, 64), {"num_splits": 4}),  # has a workspace
    "packed": (
        PACKED,
        {
            "causal": True,
            "cu_seqlens_q": LENGTHS,
            "cu_seqlens_k": LENGTHS,
            "max_seqlen_q": 200,
            "max_seqlen_k": 200,
        },
    ),
}


@pytest.fixture(autouse=True)
def the_first_device_stays_current():
    torch.cuda.set_device(0)
    left_by = [0]  # which devices may be current afterwards
    yield left_by
    assert torch.cuda.current_device() in left_by


def tensors(shape, device=SECOND, count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(count)
    ]


def on(device, options):
    return {
        name: torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x
        for name, x in options.items()
    }


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [fc.attention, ft.attention], ids=["neutral", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_torch_forward(name, call):
    shape, options = CALLS[name]
    q, k, v = tensors(shape)
    result = call(q, k, v, return_lse=True, **on(SECOND, options))
    assert result.out.device == result.lse.device == q.device
    first = call(*(x.to(FIRST) for x in (q, k, v)), return_lse=True, **on(FIRST, options))
    assert torch.equal(result.out.cpu(), first.out.cpu())
    assert torch.equal(result.lse.cpu(), first.lse.cpu())
    assert_close_to_reference(result, q, k, v, **options)


@pytest.mark.parametrize("name", ["plain", "causal", "packed"])
def test_torch_backward(name):
    shape, options = CALLS[name]
    q, k, v, dout = tensors(shape, count=4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if ft.explain(q, k, v, direction="backward", **on(SECOND, options)).kernel is None:
        pytest.skip("no kernel runs backward")
    out = ft.attention(q, k, v, **on(SECOND, options))
    grads = torch.autograd.grad(out, leaves, dout)
    assert {x.device for x in grads} == {q.device}
    grads = fc.Grads(*grads, None, None)
    assert_grads_close_to_reference(grads, dout, *(x.detach() for x in leaves), **options)


def test_torch_streams_of_both_devices():
    """Each device's work waits for its own stream, not the other's."""
    base = {device: tensors((4, 1024, 8, 64), device) for device in (FIRST, SECOND)}
    want = {d: ft.attention(*(x * 2 for x in xs), causal=True) for d, xs in base.items()}
    streams = {device: torch.cuda.Stream(device) for device in base}
    for device, stream in streams.items():
        stream.wait_stream(torch.cuda.current_stream(device))
    for _ in range(10):
        got = {}
        for device, stream in streams.items():
            with torch.cuda.stream(stream):
                torch.cuda._sleep(200_000)
                late = [x * 2 for x in base[device]]
                torch.cuda.set_device(0)  # the stream stays the current one of its device
                got[device] = ft.attention(*late, causal=True)
        for device, stream in streams.items():
            stream.synchronize()
            assert torch.equal(got[device], want[device])


def test_torch_named_stream():
    q, k, v = tensors(SHAPE)
    want = fc.attention(q, k, v)
    stream = torch.cuda.Stream(SECOND)
    stream.wait_stream(torch.cuda.current_stream(SECOND))
    got = fc.attention(q, k, v, stream=stream)
    stream.synchronize()
    assert got.device == q.device and torch.equal(got, want)


def test_torch_tensors_on_different_devices():
    (q, k, v), other = tensors(SHAPE), tensors(SHAPE, FIRST)[0]
    with pytest.raises(fc.ArgumentError, match="k is on cuda:0 but q is on cuda:1"):
        fc.attention(q, other, v)
    with pytest.raises(fc.ArgumentError, match="k is on cuda:0 but q is on cuda:1"):
        ft.attention(q.requires_grad_(), other, v)
    with pytest.raises(fc.ArgumentError, match="out is on cuda:0 but q is on cuda:1"):
        fc.attention(q.detach(), k, v, out=torch.empty_like(other))
    with pytest.raises(fc.ArgumentError, match="cu_seqlens_q is on cuda:0 but q is on cuda:1"):
        packed = tensors(PACKED)
        options = on(FIRST, CALLS["packed"][1])
        fc.attention(*packed, **options)


# ---- CuPy ----------------------------------------------------------------------------------------


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def cupy_arrays(cupy, shape, device=1, count=3):
    rng = np.random.default_rng(0)
    with cupy.cuda.Device(device):
        made = [cupy.asarray(rng.standard_normal(shape), cupy.float16) for _ in range(count)]
        cupy.cuda.get_current_stream().synchronize()
    return made


def cupy_options(cupy, options):
    with cupy.cuda.Device(1):
        return {
            name: cupy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()
        }


@pytest.mark.parametrize("name", CALLS)
def test_cupy_forward_and_backward(cupy, name):
    shape, options = CALLS[name]
    q, k, v, dout = cupy_arrays(cupy, shape, count=4)
    given = cupy_options(cupy, options)
    result = fc.attention(q, k, v, return_lse=True, **given)
    assert cupy.cuda.runtime.getDevice() == 0
    assert result.out.device.id == result.lse.device.id == 1
    host = [cupy.asnumpy(x) for x in (q, k, v)]
    assert_close_to_reference(
        fc.Result(cupy.asnumpy(result.out), cupy.asnumpy(result.lse), None), *host, **options
    )
    if fc.explain(q, k, v, direction="backward", **given).kernel is None:
        return
    grads = fc.attention_backward(dout, q, k, v, result.out, result.lse, **given)
    assert {x.device.id for x in grads[:3]} == {1} and cupy.cuda.runtime.getDevice() == 0
    grads = fc.Grads(*(cupy.asnumpy(x) for x in grads[:3]), None, None)
    assert_grads_close_to_reference(grads, cupy.asnumpy(dout), *host, **options)


def test_cupy_stream_of_the_second_device(cupy):
    q, k, v = cupy_arrays(cupy, SHAPE)
    want = cupy.asnumpy(fc.attention(q, k, v))
    with cupy.cuda.Device(1):
        stream = cupy.cuda.Stream(non_blocking=True)
    named = fc.attention(q, k, v, stream=stream)
    with cupy.cuda.Device(1), stream:
        current = fc.attention(q * 1, k, v)
    stream.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(named), want)
    np.testing.assert_array_equal(cupy.asnumpy(current), want)


def test_cupy_arrays_on_different_devices(cupy):
    (q, _, v), (k, *_) = cupy_arrays(cupy, SHAPE), cupy_arrays(cupy, SHAPE, 0)
    with pytest.raises(fc.ArgumentError, match="k is on cuda:0 but q is on cuda:1"):
        fc.attention(q, k, v)


# ---- JAX -----------------------------------------------------------------------------------------


@pytest.fixture
def jax(the_first_device_stays_current):
    jax = pytest.importorskip("jax", minversion="0.10")
    try:
        devices = jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"JAX sees no GPU: {error}")
    if len(devices) < 2:
        pytest.skip("JAX sees one GPU")
    # JAX may leave the device of its own computations current; ours leave no other one.
    x = jax.device_put(np.ones(4, np.float32), devices[1])
    jax.jit(lambda x: x + 1)(x).block_until_ready()
    the_first_device_stays_current.append(torch.cuda.current_device())
    torch.cuda.set_device(0)
    return jax


@pytest.mark.parametrize("name", CALLS)
def test_jax_forward_and_backward(jax, name):
    import flashcore.jax as fj

    shape, options = CALLS[name]
    first, second = jax.devices("gpu")[:2]
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.device_put(jax.random.normal(x, shape, "bfloat16"), second) for x in keys]
    given = {
        n: jax.device_put(x, second) if isinstance(x, np.ndarray) else x for n, x in options.items()
    }

    def call(q, k, v):
        return fj.attention(q, k, v, **given)

    *inputs, dout = arrays
    out = jax.jit(call)(*inputs)
    assert out.devices() == {second}
    host = [np.asarray(x) for x in inputs]
    assert_close_to_reference(np.asarray(out), *host, **options)
    if fj.explain(*inputs, direction="backward", **given).kernel is None:
        return
    grads = jax.jit(lambda q, k, v, dout: jax.vjp(call, q, k, v)[1](dout))(*inputs, dout)
    assert all(x.devices() == {second} for x in grads)
    grads = fc.Grads(*(np.asarray(x) for x in grads), None, None)
    assert_grads_close_to_reference(grads, np.asarray(dout), *host, **options)


def test_jax_arrays_on_different_devices(jax):
    import flashcore.jax as fj

    first, second = jax.devices("gpu")[:2]
    x = jax.random.normal(jax.random.key(0), SHAPE, "bfloat16")
    q, k = jax.device_put(x, second), jax.device_put(x, first)
    with pytest.raises(ValueError, match="incompatible devices"):  # JAX's own
        jax.jit(fj.attention)(q, k, q)
