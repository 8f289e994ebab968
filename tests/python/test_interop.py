"""Arrays in, arrays out: every producer flashcore knows, every object it must refuse."""

from __future__ import annotations

import ast
import ctypes
import gc
import pathlib
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import flashcore as fc
from flashcore import _core

SHAPE = (2, 33, 4, 40)  # q
SHAPE_KV = (2, 47, 2, 40)


def inputs(dtype: Any = np.float32, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (SHAPE, SHAPE_KV, SHAPE_KV)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


def expected(dtype: Any = np.float32) -> np.ndarray:
    """What NumPy arrays give: every other producer must give the same bits."""
    return fc.attention(*inputs(dtype))


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax")


# ---- importing flashcore -------------------------------------------------------------------------


def test_import_loads_no_framework() -> None:
    names = "numpy", "torch", "jax", "cupy", "ml_dtypes"
    code = f"import sys, flashcore; print(*[n for n in {names} if n in sys.modules])"
    assert run_python(code) == ""


def test_import_takes_under_60_ms() -> None:
    code = "import time; t = time.process_time(); import flashcore; print(time.process_time() - t)"
    assert min(float(run_python(code)) for _ in range(5)) <= 0.060


def test_version_is_that_of_the_header() -> None:
    major, minor, *_ = fc.__version__.split(".")
    assert (int(major), int(minor)) >= (0, 1)


def test_stub_lists_what_the_extension_has() -> None:
    """mypy's stubtest does not know nanobind's functions: names and arguments, compared here."""
    stub = pathlib.Path(_core.__file__).with_name("_core.pyi").read_text(encoding="utf-8")
    functions = {x.name: x for x in ast.parse(stub).body if isinstance(x, ast.FunctionDef)}
    compiled = {name for name in dir(_core) if callable(getattr(_core, name))}
    assert set(functions) == compiled
    for name, function in functions.items():
        signature = getattr(_core, name).__doc__.partition("\n")[0]
        arguments = ast.parse(f"def {signature}: ...").body[0].args  # type: ignore[attr-defined]
        assert len(arguments.posonlyargs + arguments.args) == len(function.args.posonlyargs), name


# ---- NumPy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_numpy_dtypes(dtype: Any) -> None:
    q, k, v = inputs(dtype)
    r = fc.attention(q, k, v, return_lse=True, return_max_logits=True)
    wide = np.float64 if dtype == np.float64 else np.float32
    assert isinstance(r, fc.Result)
    assert type(r.out) is np.ndarray and r.out.dtype == dtype and r.out.shape == q.shape
    assert r.lse.dtype == wide and r.lse.shape == (2, 4, 33)
    assert r.max_logits.dtype == wide and r.max_logits.shape == (2, 4, 33)
    grads = fc.attention_backward(np.ones_like(r.out), q, k, v, r.out, r.lse)
    assert [g.dtype for g in grads[:3]] == [dtype] * 3
    assert [g.shape for g in grads[:3]] == [SHAPE, SHAPE_KV, SHAPE_KV]
    assert grads.dbias is None and grads.dsinks is None


def test_result_has_none_for_what_was_not_asked() -> None:
    q, k, v = inputs()
    assert fc.attention(q, k, v, return_lse=True).max_logits is None
    assert fc.attention(q, k, v, return_max_logits=True).lse is None


@pytest.mark.parametrize("kind", [np.float32, "float32", np.dtype("float32")])
def test_out_dtype(kind: Any) -> None:
    q, k, v = inputs(ml_dtypes.bfloat16)
    assert fc.attention(q, k, v, out_dtype=kind).dtype == np.float32
    assert fc.attention(q, k, v, out_dtype=ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16


def test_out_dtype_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(fc.ArgumentError, match="out must be float32"):
        fc.attention(q, k, v, out_dtype="float16")
    with pytest.raises(fc.ArgumentError, match="out_dtype must be None"):
        fc.attention(q, k, v, out_dtype="int8")
    with pytest.raises(fc.ArgumentError, match="out is float32 but out_dtype asks for float16"):
        fc.attention(q, k, v, out=np.empty(SHAPE, np.float32), out_dtype="float16")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_numpy_out_is_used(dtype: Any) -> None:
    q, k, v = inputs(dtype)
    out = np.full(SHAPE, 7, dtype)
    assert fc.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, expected(dtype))


def test_numpy_views() -> None:
    q, k, v = inputs()
    moved = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v)]
    np.testing.assert_array_equal(fc.attention(*moved), expected())
    bhsd = [x.swapaxes(1, 2) for x in (q, k, v)]
    out = fc.attention(*bhsd, layout="bhsd")
    np.testing.assert_array_equal(out.swapaxes(1, 2), expected())
    np.testing.assert_array_equal(fc.attention(q[:, ::-1], k, v), expected()[:, ::-1])


def test_numpy_read_only_inputs_work_and_outputs_do_not() -> None:
    q, k, v = inputs()
    for x in (q, k, v):
        x.flags.writeable = False
    np.testing.assert_array_equal(fc.attention(q, k, v), expected())
    out = np.empty(SHAPE, np.float32)
    out.flags.writeable = False
    with pytest.raises(fc.ArgumentError, match="out is an output, but the array is read-only"):
        fc.attention(q, k, v, out=out)
    out = np.empty(SHAPE, ml_dtypes.bfloat16)
    out.flags.writeable = False
    with pytest.raises(fc.ArgumentError, match="read-only"):
        fc.attention(*inputs(ml_dtypes.bfloat16), out=out)


def test_numpy_subclass_gives_plain_array() -> None:
    class Mine(np.ndarray):
        pass

    q, k, v = (x.view(Mine) for x in inputs())
    assert type(fc.attention(q, k, v)) is np.ndarray


# ---- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_torch_equals_numpy(torch: Any, dtype: str) -> None:
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in inputs())
    r = fc.attention(q, k, v, causal=True, return_lse=True)
    assert type(r.out) is torch.Tensor and r.out.dtype == q.dtype and r.out.shape == q.shape
    wide = torch.float64 if dtype == "float64" else torch.float32
    assert r.lse.dtype == wide
    same = fc.attention(
        *inputs(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), causal=True, return_lse=True
    )
    np.testing.assert_array_equal(r.out.double().numpy(), same.out.astype(np.float64))
    np.testing.assert_array_equal(r.lse.numpy(), same.lse)
    grads = fc.attention_backward(torch.ones_like(r.out), q, k, v, r.out, r.lse, causal=True)
    assert [g.shape for g in grads[:3]] == [q.shape, k.shape, v.shape]
    assert all(g.dtype == q.dtype for g in grads[:3])


def test_torch_output_keeps_the_order_of_dimensions(torch: Any) -> None:
    q, k, v = (torch.from_numpy(x).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs())
    out = fc.attention(q, k, v)
    assert out.stride() == q.stride()
    np.testing.assert_array_equal(out.numpy(), expected())


def test_torch_out_and_grads_are_used(torch: Any) -> None:
    q, k, v = map(torch.from_numpy, inputs())
    out = torch.empty(SHAPE)
    assert fc.attention(q, k, v, out=out) is out
    lse = fc.attention(q, k, v, return_lse=True).lse
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    grads = fc.attention_backward(torch.ones_like(out), q, k, v, out, lse, dq=dq, dk=dk, dv=dv)
    assert grads.dq is dq and grads.dk is dk and grads.dv is dv
    once = dv.clone()
    fc.attention_backward(
        torch.ones_like(out), q, k, v, out, lse, dq=dq, dk=dk, dv=dv, accumulate=True
    )
    torch.testing.assert_close(dv, 2 * once)


def test_accumulate_starts_new_gradients_at_zero() -> None:
    q, k, v = inputs()
    r = fc.attention(q, k, v, return_lse=True)
    dout = np.ones_like(q)
    plain = fc.attention_backward(dout, q, k, v, *r[:2])
    summed = fc.attention_backward(dout, q, k, v, *r[:2], accumulate=True)
    for a, b in zip(plain[:3], summed[:3], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("expand", ["scalar", "rows", "heads"])
def test_torch_expanded_dout(torch: Any, expand: str) -> None:
    q, k, v = map(torch.from_numpy, inputs())
    r = fc.attention(q, k, v, return_lse=True)
    small = {"scalar": (1, 1, 1, 1), "rows": (2, 1, 4, 40), "heads": (2, 33, 1, 40)}[expand]
    dout = torch.randn(small).expand(SHAPE)
    got = fc.attention_backward(dout, q, k, v, *r[:2])
    want = fc.attention_backward(dout.contiguous(), q, k, v, *r[:2])
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a, b)


def test_numpy_expanded_dout() -> None:
    q, k, v = inputs()
    r = fc.attention(q, k, v, return_lse=True)
    got = fc.attention_backward(np.broadcast_to(np.float32(1), SHAPE), q, k, v, *r[:2])
    want = fc.attention_backward(np.ones(SHAPE, np.float32), q, k, v, *r[:2])
    np.testing.assert_array_equal(got.dq, want.dq)


def test_bias_and_sinks_gradients() -> None:
    q, k, v = inputs(ml_dtypes.bfloat16)
    bias = np.zeros((1, 4, 33, 47), ml_dtypes.bfloat16)
    sinks = np.zeros(4, np.float32)
    r = fc.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True)
    grads = fc.attention_backward(np.ones_like(q), q, k, v, *r[:2], bias=bias, sinks=sinks)
    assert grads.dbias.dtype == np.float32 and grads.dbias.shape == bias.shape
    assert grads.dsinks.dtype == np.float32 and grads.dsinks.shape == (4,)


def test_torch_requires_grad(torch: Any) -> None:
    q, k, v = map(torch.from_numpy, inputs())
    for name, args in {
        "q": (q.clone().requires_grad_(), k, v),
        "v": (q, k, v * v.requires_grad_()),
    }.items():
        with pytest.raises(fc.UnsupportedError, match=rf"{name} requires grad.*{name}\.detach\(\)"):
            fc.attention(*args)
    bias = torch.zeros(1, 1, 1, 47, requires_grad=True)
    with pytest.raises(fc.UnsupportedError, match=r"bias requires grad.*flashcore\.torch"):
        fc.attention(q, k, v.detach(), bias=bias)
    with torch.no_grad():
        np.testing.assert_array_equal(fc.attention(q, k, v).numpy(), expected())
    parameter = torch.nn.Parameter(q)
    np.testing.assert_array_equal(
        fc.attention(parameter.detach(), k, v.detach()).numpy(), expected()
    )


def torch_refusals(torch: Any) -> dict[str, tuple[Any, type[Exception], str]]:
    x = torch.randn(SHAPE)
    return {
        "conjugate": (torch.randn(SHAPE, dtype=torch.complex64).conj(), fc.Error, "q.*complex"),
        "complex": (torch.randn(SHAPE, dtype=torch.complex64), fc.UnsupportedError, "complex"),
        "negative": (torch._neg_view(x), fc.UnsupportedError, r"negative bit.*q\.resolve_neg"),
        "meta": (x.to("meta"), fc.UnsupportedError, "meta device"),
        "sparse": (x.to_sparse(), fc.UnsupportedError, r"torch\.sparse_coo.*to_dense"),
        "quantized": (
            torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            fc.UnsupportedError,
            "quantized.*dequantize",
        ),
        "nested": (
            torch.nested.nested_tensor([x[0], x[1, :5]]),
            fc.UnsupportedError,
            "nested.*cu_seqlens",
        ),
        "mkldnn": (x.to_mkldnn(), fc.UnsupportedError, r"_mkldnn.*to_dense"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    ["conjugate", "complex", "negative", "meta", "sparse", "quantized", "nested", "mkldnn"],
)
def test_torch_refusals(torch: Any, kind: str) -> None:
    q, error, message = torch_refusals(torch)[kind]
    k = v = torch.randn(SHAPE_KV)
    with pytest.raises(error, match=message):
        fc.attention(q, k, v)


def test_torch_tensors_without_data(torch: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = map(torch.from_numpy, inputs())
    with FakeTensorMode():
        fake = torch.empty(SHAPE)
    freed = torch.empty(SHAPE)
    freed.untyped_storage().resize_(0)
    for x in (fake, freed):
        with pytest.raises(fc.ArgumentError, match="q has no data"):
            fc.attention(x, k, v)


@pytest.mark.filterwarnings("ignore")
def test_torch_tracers_are_refused(torch: Any) -> None:
    """They record torch's own operations: the allocation of the result, not what fills it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(1, 16, 2, 8)
    plain = np.ones((1, 16, 2, 8), np.float32)

    def forward(x: Any) -> Any:
        return fc.attention(x, x, x)

    def backward(x: Any) -> Any:
        return fc.attention_backward(x, x, x, x, x, x[..., 0]).dq

    def merge(x: Any) -> Any:
        return fc.merge([x], [x[..., 0]])[0]

    def written(x: Any) -> Any:
        return fc.attention(plain, plain, plain, out=x)

    for function in (forward, backward, merge, written):
        with pytest.raises(fc.UnsupportedError, match="torch dispatch mode"):
            make_fx(function)(x)
        with pytest.raises(fc.UnsupportedError, match=r"torch\.jit\.trace"):
            torch.jit.trace(function, x, check_trace=False)
    assert torch.equal(torch.compile(forward, backend="eager")(x), forward(x))


def test_torch_vmap_is_loud(torch: Any) -> None:
    q, k, v = map(torch.from_numpy, inputs())
    with pytest.raises(fc.Error, match="q .*gives no data"):
        torch.func.vmap(lambda x: fc.attention(x[None], k[:1], v[:1]))(q)


def test_torch_limits_threads(torch: Any) -> None:
    """A DataLoader worker, for which torch set one thread, must stay on one."""
    q = torch.randn(1, 2048, 8, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert fc.explain(q, q, q).workspace_bytes <= fc.explain(*[q.numpy()] * 3).workspace_bytes
        if fc.get_num_threads() > 1:
            one = fc.explain(q, q, q).workspace_bytes
            torch.set_num_threads(fc.get_num_threads())
            assert fc.explain(q, q, q).workspace_bytes > one
    finally:
        torch.set_num_threads(before)


def test_mixed_cpu_frameworks(torch: Any) -> None:
    q, k, v = inputs()
    out = fc.attention(torch.from_numpy(q), k, torch.from_numpy(v))
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), expected())
    out = fc.attention(q, torch.from_numpy(k), v)
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, expected())


# ---- JAX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax_on_the_cpu(jax: Any, dtype: str) -> None:
    cpu = jax.devices("cpu")[0]
    q, k, v = (jax.device_put(jax.numpy.asarray(x, dtype), cpu) for x in inputs())
    r = fc.attention(q, k, v, return_lse=True)
    assert isinstance(r.out, jax.Array) and r.out.dtype == q.dtype and r.out.device == q.device
    same = expected(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    np.testing.assert_array_equal(np.asarray(r.out), same)
    grads = fc.attention_backward(jax.numpy.ones_like(r.out), q, k, v, r.out, r.lse)
    assert all(isinstance(g, jax.Array) for g in grads[:3])


def test_jax_takes_the_buffer_over(jax: Any) -> None:
    from flashcore import _allocate

    like = jax.device_put(jax.numpy.zeros((3, 5)), jax.devices("cpu")[0])
    buffer = _allocate.jax_allocator().make(like, (7, 9), "float32", True, None)
    address = buffer.ctypes.data
    assert _allocate.jax_array(buffer, like).unsafe_buffer_pointer() == address


def test_jax_arrays_are_never_written(jax: Any) -> None:
    q, k, v = map(jax.numpy.asarray, inputs())
    with pytest.raises(fc.ArgumentError, match="out is an output, but a JAX array"):
        fc.attention(q, k, v, out=jax.numpy.zeros(SHAPE))


def test_out_is_returned_as_given(jax: Any) -> None:
    q, k, v = map(jax.numpy.asarray, inputs())
    out = np.empty(SHAPE, np.float32)
    assert fc.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, expected())


def test_jax_traced(jax: Any) -> None:
    q, k, v = map(jax.numpy.asarray, inputs())
    with pytest.raises(fc.ArgumentError, match=r"traced JAX value.*flashcore\.jax"):
        jax.jit(fc.attention)(q, k, v)


# ---- the C exchange API, with a table of our own -------------------------------------------------


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class Managed(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", DLTensor),
    ]  # fmt: skip


class Table(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p), ("from_object", ctypes.c_void_p),
        ("to_object", ctypes.c_void_p), ("view_object", ctypes.c_void_p),
        ("current_stream", ctypes.c_void_p),
    ]  # fmt: skip


def new_capsule(address: int, name: bytes) -> Any:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(address, name, None)


def describe(array: np.ndarray, tensor: DLTensor) -> Any:
    """Fills tensor; returns what must live as long as it."""
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    tensor.data, tensor.device_type, tensor.device_id = array.ctypes.data, 1, 0
    tensor.ndim, tensor.shape, tensor.strides, tensor.byte_offset = array.ndim, shape, None, 0
    code = {"f": 2, "u": 1}[array.dtype.kind]
    tensor.code, tensor.bits, tensor.lanes = code, array.itemsize * 8, 1
    return shape


def exchange_type(view: bool, allocator: bool = True) -> Any:
    """A new array type known by its table alone, around NumPy arrays, and a log of its calls."""
    log: list[str] = []
    alive: dict[int, Any] = {}
    tensor_p, managed_p = ctypes.POINTER(DLTensor), ctypes.POINTER(ManagedVersioned)

    class Foreign:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

    @ctypes.CFUNCTYPE(None, managed_p)
    def delete(managed: Any) -> None:
        log.append("delete")
        del alive[ctypes.addressof(managed.contents)]

    def manage(array: np.ndarray) -> ManagedVersioned:
        managed = ManagedVersioned(1, 3, None, ctypes.cast(delete, ctypes.c_void_p), 0)
        alive[ctypes.addressof(managed)] = (managed, array, describe(array, managed.tensor))
        return managed

    set_error_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)

    @ctypes.CFUNCTYPE(
        ctypes.c_int, tensor_p, ctypes.POINTER(managed_p), ctypes.c_void_p, set_error_type
    )
    def allocate(prototype: Any, out: Any, context: Any, set_error: Any) -> int:
        log.append("allocate")
        if not allocator:
            set_error(context, b"MemoryError", b"no more")
            return -1
        t = prototype.contents
        array = np.empty(t.shape[: t.ndim], {16: np.float16, 32: np.float32}[t.bits])
        out[0] = ctypes.pointer(manage(array))
        return 0

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(managed_p))
    def from_object(x: Any, out: Any) -> int:
        log.append("own")
        out[0] = ctypes.pointer(manage(x.array))
        return 0

    @ctypes.CFUNCTYPE(ctypes.c_int, managed_p, ctypes.POINTER(ctypes.c_void_p))
    def to_object(managed: Any, out: Any) -> int:
        log.append("wrap")
        x = Foreign(alive.pop(ctypes.addressof(managed.contents))[1])
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(x))
        out[0] = id(x)
        return 0

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, tensor_p)
    def view_object(x: Any, tensor: Any) -> int:
        log.append("view")
        x.shape_memory = describe(x.array, tensor.contents)
        return 0

    functions = [allocate, from_object, to_object, view_object if view else None, None]
    addresses = [f and ctypes.cast(f, ctypes.c_void_p).value for f in functions]
    table = Table(1, 3, None, *addresses)
    newer = Table(2, 0, ctypes.addressof(table))  # of a future version, with ours behind it
    Foreign.keep = (functions, delete, table, newer)  # type: ignore[attr-defined]
    Foreign.__dlpack_c_exchange_api__ = new_capsule(  # type: ignore[attr-defined]
        ctypes.addressof(newer), b"dlpack_exchange_api"
    )
    return Foreign, log, alive


@pytest.mark.parametrize("view", [True, False], ids=["borrowed", "owned"])
def test_exchange_table(view: bool) -> None:
    foreign, log, alive = exchange_type(view)
    out = fc.attention(*map(foreign, inputs()))
    assert type(out) is foreign
    np.testing.assert_array_equal(out.array, expected())
    read = "view" if view else "own"
    assert [x for x in log if x != "delete"] == [read] * 3 + ["allocate", "wrap", read]
    assert log.count("delete") == log.count("own") and not alive
    with pytest.raises(fc.ArgumentError):
        fc.attention(foreign(inputs()[0]), *inputs()[1:], layout="sbhd")
    assert not alive


def test_exchange_table_gradients_start_at_zero() -> None:
    foreign, _, _ = exchange_type(view=True)
    q, k, v = inputs()
    r = fc.attention(q, k, v, return_lse=True)
    want = fc.attention_backward(np.ones_like(q), q, k, v, *r[:2])
    got = fc.attention_backward(np.ones_like(q), foreign(q), k, v, *r[:2], accumulate=True)
    np.testing.assert_array_equal(got.dq.array, want.dq)
    np.testing.assert_array_equal(got.dv.array, want.dv)


def test_exchange_table_that_cannot_allocate() -> None:
    foreign, _, _ = exchange_type(view=True, allocator=False)
    with pytest.raises(fc.DeviceError, match="out could not be allocated.*MemoryError: no more"):
        fc.attention(*map(foreign, inputs()))


# ---- other producers -----------------------------------------------------------------------------


class Producer:
    """A DLPack producer that records how it is asked, with NumPy's data."""

    def __init__(self, array: np.ndarray, modern: bool = True, capsule: Any = None) -> None:
        self.array, self.modern, self.capsule = array, modern, capsule
        self.calls: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> Any:
        self.calls.append(options)
        if not self.modern and "max_version" in options:
            raise TypeError("unexpected keyword argument 'max_version'")
        if self.capsule is not None:
            return self.capsule
        return self.array.__dlpack__(max_version=options.get("max_version"))


class OldProducer(Producer):
    pass


def test_protocol_producer() -> None:
    q, k, v = (Producer(x) for x in inputs())
    out = fc.attention(q, k, v)
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, expected())
    assert q.calls == [{"stream": None, "max_version": (1, 3)}]


def test_producer_from_before_dlpack_1() -> None:
    q, k, v = (OldProducer(x, modern=False) for x in inputs())
    np.testing.assert_array_equal(fc.attention(q, k, v), expected())
    assert [sorted(call) for call in q.calls] == [["max_version", "stream"], []]
    assert all(call == {} for call in k.calls)  # asked once per type


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_capsules(version: Any) -> None:
    capsules = [x.__dlpack__(max_version=version) for x in inputs()]
    np.testing.assert_array_equal(fc.attention(*capsules), expected())
    with pytest.raises(fc.ArgumentError, match="q is a DLPack capsule that was consumed before"):
        fc.attention(*capsules)


def test_producer_of_a_consumed_capsule() -> None:
    q, k, v = inputs()
    capsule = q.__dlpack__()
    np.from_dlpack(Producer(q, capsule=capsule))
    with pytest.raises(fc.ArgumentError, match="consumed before"):
        fc.attention(Producer(q, capsule=capsule), k, v)


def test_producer_of_nonsense() -> None:
    q, k, v = inputs()
    with pytest.raises(TypeError, match="gave no DLPack capsule but int"):
        fc.attention(Producer(q, capsule=3), k, v)


class FailingProducer(Producer):
    def __dlpack__(self, **options: Any) -> Any:
        raise self.capsule


def test_producer_errors_are_kept_as_cause() -> None:
    q, k, v = inputs()
    with pytest.raises(fc.ArgumentError, match="k .*FailingProducer.* gives no data: no") as info:
        fc.attention(q, FailingProducer(k, capsule=BufferError("no")), v)
    assert isinstance(info.value.__cause__, BufferError)
    with pytest.raises(KeyboardInterrupt):
        fc.attention(q, FailingProducer(k, capsule=KeyboardInterrupt()), v)
    with pytest.raises(MemoryError):
        fc.attention(q, FailingProducer(k, capsule=MemoryError()), v)


class RecursiveProducer(Producer):
    def __dlpack__(self, **options: Any) -> Any:
        return fc.attention(self, self, self)


def test_a_producer_that_calls_itself() -> None:
    q = RecursiveProducer(inputs()[0])
    with pytest.raises(RecursionError) as info:
        fc.attention(q, q, q)
    assert len(str(info.value)) < 200


def test_lone_surrogates_are_shown_as_escapes() -> None:
    q, k, v = inputs()
    with pytest.raises(fc.ArgumentError, match=r"out_dtype must be .* got '\\ud800'"):
        fc.attention(q, k, v, out_dtype="\ud800")
    with pytest.raises(fc.ArgumentError, match=r"gives no data: \\ud800"):
        fc.attention(FailingProducer(q, capsule=ValueError("\ud800")), k, v)


@pytest.mark.parametrize("device", [(2**40, 0), (1, 2**40), (1, 2**70), ("cpu", 0), (1,), 1])
def test_producer_on_no_device(device: Any) -> None:
    class Nowhere(Producer):
        def __dlpack_device__(self) -> Any:
            return device

    q, k, v = inputs()
    with pytest.raises(fc.ArgumentError, match="k .*Nowhere.* does not say where its data is"):
        fc.attention(q, Nowhere(k), v)


class CopyingProducer(Producer):
    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(max_version=(1, 0), copy=True)


def test_copies_are_refused_as_outputs() -> None:
    q, k, v = inputs()
    np.testing.assert_array_equal(fc.attention(CopyingProducer(q), k, v), expected())
    with pytest.raises(fc.ArgumentError, match="handed out a copy"):
        fc.attention(q, k, v, out=CopyingProducer(np.empty_like(q)))


@pytest.mark.parametrize(
    "bad",
    [None, 3, "q", [[1.0]], object(), np.float32(1), {"q": 1}, range(3), b"abc", Producer],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("name", ["q", "k", "bias", "out"])
def test_what_is_not_an_array(bad: Any, name: str) -> None:
    args = dict(zip("qkv", inputs(), strict=True))
    if bad is None and name in ("bias", "out"):
        return  # not given
    args[name] = bad
    with pytest.raises(fc.ArgumentError, match=rf"\[attention\] {name} ") as info:
        fc.attention(args.pop("q"), args.pop("k"), args.pop("v"), **args)
    assert isinstance(info.value, TypeError)


def test_refused_types_are_not_kept_alive() -> None:
    def refuse() -> weakref.ref[type]:
        bad = type("Bad", (), {})
        with pytest.raises(fc.ArgumentError):
            fc.attention(bad(), *inputs()[1:])
        return weakref.ref(bad)

    gone = refuse()
    gc.collect()
    assert gone() is None


def test_array_types_are_not_kept_alive() -> None:
    """A new class may come to live where a dead one was: it must not be taken for it."""
    x = inputs()[0]
    want = fc.attention(x, x, x)
    array = {
        "__dlpack__": lambda self, **options: x.__dlpack__(max_version=options["max_version"]),
        "__dlpack_device__": lambda self: (1, 0),
    }

    def use(methods: dict[str, Any]) -> tuple[int, weakref.ref[type]]:
        made = type("Made", (), methods)
        if methods:
            np.testing.assert_array_equal(fc.attention(x, made(), x), want)
        else:
            with pytest.raises(fc.ArgumentTypeError, match="Made, not an array"):
                fc.attention(x, made(), x)
        return id(made), weakref.ref(made)

    arrays, others = set(), set()
    gc.disable()  # what dies young is then found by a look at the youngest
    try:
        for turn in range(100):
            address, gone = use(array if turn % 2 else {})
            gc.collect(0)
            assert gone() is None
            (arrays if turn % 2 else others).add(address)
    finally:
        gc.enable()
    assert arrays & others  # one did come to live where another was


def test_masked_array() -> None:
    q, k, v = inputs()
    with pytest.raises(fc.ArgumentError, match="q is numpy.ma.MaskedArray, a masked array.*mask="):
        fc.attention(np.ma.masked_array(q, q > 0), k, v)


@pytest.mark.parametrize(
    "dtype", [np.int32, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn, ">f4", object]
)
def test_dtypes_without_a_kernel(dtype: Any) -> None:
    q, k, v = (x.astype(dtype) for x in inputs())
    with pytest.raises(fc.Error, match="q"):
        fc.attention(q, k, v)


# ---- single values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "sbhd"}, "layout must be 'bshd' or 'bhsd', got 'sbhd'"),
        ({"layout": None}, "layout must be"),
        ({"align": "left"}, "align must be 'bottom_right' or 'top_left', got 'left'"),
        ({"scale": "1"}, "scale must be a number, got str"),
        ({"scale": np.ones(1)}, "scale must be a number, got numpy.ndarray: a value inside"),
        ({"causal": "yes"}, "causal must be True or False, got str"),
        ({"causal": None}, "causal must be True or False, got NoneType"),
        ({"causal": np.ones(1, bool)}, "causal must be True or False, got numpy.ndarray"),
        ({"window_size": 3}, "window_size must be a pair"),
        ({"window_size": (1, 2, 3)}, "window_size must be a pair"),
        ({"window_size": (1.5, None)}, r"window_size\[0\] must be an integer, got float"),
        ({"window_size": (None, -2)}, r"window_size\[1\] must be >= 0"),
        ({"q_offset": 1.5}, "q_offset must be an integer, got float"),
        ({"q_offset": 2**70}, "q_offset does not fit 64 bits"),
        ({"softcap": None}, "softcap must be a number, got NoneType"),
        ({"dropout_p": "0.1"}, "dropout_p must be a number"),
        ({"dropout_p": 0.1, "rng": 5}, "rng must be two integers"),
        ({"dropout_p": 0.1, "rng": (1, 2, 3)}, "rng must be two integers"),
        ({"dropout_p": 0.1, "rng": (1, 2.5)}, r"rng\[1\] \(offset\) must be an integer"),
        ({"dropout_p": 0.1, "rng": (2**64, 0)}, r"rng\[0\] \(seed\) does not fit 64 bits"),
        ({"dropout_p": 0.1}, "rng is required"),
        ({"block_mask": np.ones((2, 2))}, "block_mask must be a flashcore.BlockMask"),
        ({"block_mask": fc.BlockMask}, "block_mask must be a flashcore.BlockMask, got a class"),
        ({"num_splits": 1.0}, "num_splits must be an integer"),
        ({"num_splits": 2**40}, "num_splits does not fit 32 bits"),
        ({"scale": True}, "scale must be a number, got bool"),
        ({"scale": np.True_}, "scale must be a number, got numpy.bool"),
        ({"softcap": False}, "softcap must be a number, got bool"),
        ({"dropout_p": False}, "dropout_p must be a number, got bool"),
        ({"dropout_p": 0.1, "rng": (True, 0)}, r"rng\[0\] \(seed\) must be an integer, got bool"),
        ({"window_size": (True, None)}, r"window_size\[0\] must be an integer, got bool"),
        ({"q_offset": True}, "q_offset must be an integer, got bool"),
        ({"num_splits": True}, "num_splits must be an integer, got bool"),
        ({"split_size": False}, "split_size must be an integer, got bool"),
        ({"max_seqlen_q": np.True_}, "max_seqlen_q must be an integer, got numpy.bool"),
        ({"stream": True}, "stream must be an integer"),
        ({"deterministic": 2}, "deterministic must be True or False"),
        ({"return_lse": 2}, "return_lse must be True or False"),
        ({"stream": "main"}, "stream must be an integer"),
        ({"page_table": np.zeros((2, 2), np.int32)}, "page_table is not built yet"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fc.Error, match=message):
        fc.attention(*inputs(), **options)


@pytest.mark.parametrize(
    "stream",
    [
        0,
        1,
        12345,
        SimpleNamespace(cuda_stream=12345),  # torch.cuda.Stream
        SimpleNamespace(__cuda_stream__=lambda: (0, 12345)),  # cuda.core, CuPy
    ],
    ids=["default", "legacy", "raw", "torch", "cuda.core"],
)
def test_a_stream_for_arrays_on_the_cpu(stream: Any) -> None:
    q, k, v = inputs()
    message = r"stream was given but q is on the CPU.*leave stream out"
    with pytest.raises(fc.ArgumentError, match=r"\[attention\] " + message):
        fc.attention(q, k, v, stream=stream)
    out, lse, _ = fc.attention(q, k, v, return_lse=True)
    with pytest.raises(fc.ArgumentError, match=r"\[attention_backward\] " + message):
        fc.attention_backward(out, q, k, v, out, lse, stream=stream)
    with pytest.raises(fc.ArgumentError, match=r"\[merge\] .*is on the CPU"):
        fc.merge([out], [lse], stream=stream)


def test_options_are_what_the_core_reads() -> None:
    assert tuple(fc.Options.__annotations__) == _core.OPTION_NAMES


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="is_causal"):
        fc.attention(*inputs(), is_causal=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="is_causal"):
        fc.explain(*inputs(), is_causal=True)


def test_numpy_scalars_are_values() -> None:
    q, k, v = inputs()
    got = fc.attention(
        q, k, v, scale=np.float32(0.25), causal=np.True_, window_size=(np.int64(5), None),
        q_offset=np.int32(14), dropout_p=np.float64(0.5), rng=(np.uint64(2**64 - 1), np.int8(3)),
    )  # fmt: skip
    want = fc.attention(
        q, k, v, scale=0.25, causal=True, window_size=(5, -1), q_offset=14, dropout_p=0.5,
        rng=(-1, 3),
    )  # fmt: skip
    np.testing.assert_array_equal(got, want)


def test_every_option_reaches_the_core() -> None:
    """An option that is read as another would show: each changes the result in its own way."""
    q, k, v = inputs()
    base = fc.attention(q, k, v)
    h, sk = 4, SHAPE_KV[1]
    ones = np.ones((1, 1, 1, sk), bool)
    alternatives: dict[str, Any] = {
        "scale": 0.5, "causal": True, "window_size": (3, 3), "softcap": 1.0,
        "alibi_slopes": np.ones(h, np.float32),
        "bias": np.arange(sk, dtype=np.float32).reshape(1, 1, 1, sk),
        "mask": ones & (np.arange(sk) % 2 == 0), "sinks": np.full(h, 3, np.float32),
        "seqlens_q": np.array([5, 33], np.int32), "seqlens_k": np.array([5, 47], np.int32),
        "block_mask": fc.BlockMask.sliding(33, 47, (16, 16), window_size=(4, 4)),
    }  # fmt: skip
    outs = {name: fc.attention(q, k, v, **{name: x}) for name, x in alternatives.items()}
    outs["dropout"] = fc.attention(q, k, v, dropout_p=0.3, rng=(1, 2))
    names = list(outs)
    for i, name in enumerate(names):
        assert not np.array_equal(outs[name], base), name
        for other in names[:i]:
            assert not np.array_equal(outs[name], outs[other]), (name, other)
    causal = fc.attention(q, k, v, causal=True)
    for options in (
        {"align": "top_left"},
        {"q_offset": 3},
        {"q_offset": np.array([0, 5], np.int32)},
    ):
        assert not np.array_equal(fc.attention(q, k, v, causal=True, **options), causal)
    for options in ({"num_splits": 2}, {"split_size": 16}, {"deterministic": True}):
        np.testing.assert_allclose(fc.attention(q, k, v, **options), base, atol=1e-5)


# ---- owning, leaking, threads --------------------------------------------------------------------


def test_nothing_is_leaked(torch: Any) -> None:
    arrays = inputs()
    bf16 = inputs(ml_dtypes.bfloat16)
    tensors = [torch.from_numpy(x) for x in inputs()]
    producers = [Producer(x) for x in inputs()]
    every = [*arrays, *bf16, *tensors, *producers]

    def calls() -> None:
        for group in (arrays, bf16, tensors, producers):
            r = fc.attention(*group, return_lse=True)
            dout = r.out
            fc.attention_backward(dout, *group, r.out, r.lse)
            fc.explain(*group)
            with pytest.raises(fc.Error):
                fc.attention(*group, layout="sbhd")
            with pytest.raises(fc.Error):
                fc.attention(group[0], group[1], None)
            with pytest.raises(fc.Error):
                fc.attention(*group, out=np.empty(3, np.float32))
        for producer in producers:
            producer.calls.clear()

    calls()
    gc.collect()
    before = [sys.getrefcount(x) for x in every]
    for _ in range(20):
        calls()
    gc.collect()
    assert [sys.getrefcount(x) for x in every] == before


def test_results_are_freed() -> None:
    out = fc.attention(*inputs())
    gone = weakref.ref(out)
    del out
    assert gone() is None


def test_deleters_are_called_once() -> None:
    """A capsule's deleter runs when the call ends, and also when the call is refused."""
    deleted: list[int] = []
    delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda p: deleted.append(p))
    q, k, v = inputs()
    shape = (ctypes.c_int64 * 4)(*SHAPE)
    for bits, offset, runs in ((32, 0, True), (32, 4 * 40, True), (24, 0, False)):
        data = np.concatenate([np.zeros(offset // 4, np.float32), q.ravel()])
        tensor = DLTensor(data.ctypes.data, 1, 0, 4, 2, bits, 1, shape, None, offset)
        managed = Managed(tensor, None, ctypes.cast(delete, ctypes.c_void_p))
        deleted.clear()
        capsule = new_capsule(ctypes.addressof(managed), b"dltensor")
        if runs:
            np.testing.assert_array_equal(fc.attention(capsule, k, v), expected())
        else:
            with pytest.raises(fc.UnsupportedError):
                fc.attention(capsule, k, v)
        assert deleted == [ctypes.addressof(managed)]


def test_two_threads() -> None:
    q, k, v = inputs()
    want = expected()
    failures: list[str] = []

    def work() -> None:
        for _ in range(50):
            if not np.array_equal(fc.attention(q, k, v), want):
                failures.append("different bits")
            try:
                fc.attention(q, k, v, layout="no")
            except fc.ArgumentError as error:
                if "'no'" not in str(error):
                    failures.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_the_gil_is_released() -> None:
    q = np.ones((1, 4096, 4, 64), np.float32)
    ticks = 0
    done = threading.Event()

    def work() -> None:
        fc.attention(q, q, q)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks > 1


@pytest.mark.parametrize(("length", "threads"), [(3000, 1), (3000, 2), (8, 2)])
def test_exit_during_a_call(length: int, threads: int) -> None:
    """Python ends daemon threads when it shuts down, wherever they are: no abort, no hang."""
    code = f"""
import flashcore, numpy, threading, time
x = numpy.ones((1, {length}, 8, 64), numpy.float32)
def work():
    while True:
        flashcore.attention(x, x, x)
for _ in range({threads}):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
"""
    for _ in range(4):
        run_python(code)
    for _ in range(4):  # in their first call
        run_python(code.replace("time.sleep(0.1)", ""))


# ---- the rest of the API -------------------------------------------------------------------------


def test_merge_equals_whole() -> None:
    q, k, v = inputs()
    parts = [fc.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 17), (17, 47))]
    out, lse = fc.merge([p.out for p in parts], [p.lse for p in parts])
    whole = fc.attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(out, whole.out, atol=1e-6)
    np.testing.assert_allclose(lse, whole.lse, atol=1e-6)
    with pytest.raises(fc.ArgumentError, match="one length"):
        fc.merge([parts[0].out], [])


@pytest.mark.parametrize(
    "make",
    [lambda x: None, lambda x: (y for y in [x]), lambda x: {0: x}, lambda x: np.array(1.0)],
    ids=["None", "generator", "dict", "scalar"],
)
def test_merge_takes_sequences(make: Any) -> None:
    out, lse, _ = fc.attention(*inputs(), return_lse=True)
    with pytest.raises(fc.ArgumentTypeError, match=r"\[merge\] outs must be a sequence of arrays"):
        fc.merge(make(out), [lse])
    with pytest.raises(fc.ArgumentTypeError, match=r"\[merge\] lses must be a sequence of arrays"):
        fc.merge([out], make(lse))


def test_merge_out_dtype_refused() -> None:
    out, lse, _ = fc.attention(*inputs(), return_lse=True)
    with pytest.raises(fc.ArgumentError, match="out_dtype must be None .*float16.*, got 'x'"):
        fc.merge([out], [lse], out_dtype="x")


@pytest.mark.parametrize(
    "shape",
    [None, "abc", 4, (1, 1, 4), (1, 1, -4, 4), (1, 1, 4.0, 4), (1, True, 4, 4), (2**40,) * 4],
)
def test_dropout_mask_shapes(shape: Any) -> None:
    with pytest.raises(fc.ArgumentError, match=r"\[dropout_mask\] shape .*"):
        fc.dropout_mask(shape, 0.5, (1, 2))


def test_dropout_mask_refuses() -> None:
    shape = (1, 1, 2, 2)
    with pytest.raises(fc.ArgumentTypeError, match="out must be a bool or uint8 array, got list"):
        fc.dropout_mask(shape, 0.5, (1, 2), out=[1])
    with pytest.raises(fc.ArgumentError, match="out must be bool or uint8, got float64"):
        fc.dropout_mask(shape, 0.5, (1, 2), out=np.ones(shape))
    with pytest.raises(
        fc.ArgumentTypeError, match=r"\[dropout_mask\] p must be a number, got bool"
    ):
        fc.dropout_mask(shape, False, (1, 2))
    for p in (1.0, -0.5, float("nan")):
        with pytest.raises(fc.ArgumentError, match=r"\[dropout_mask\] p must be in \[0, 1\)"):
            fc.dropout_mask(shape, p, (1, 2))


@pytest.mark.parametrize("n", ["a", None, 1.5, 2**31, 2**70, True])
def test_numbers_of_threads_that_are_none(n: Any) -> None:
    before = fc.get_num_threads()
    with pytest.raises(fc.ArgumentError, match=r"\[set_num_threads\] n "):
        fc.set_num_threads(n)
    assert fc.get_num_threads() == before


def test_dropout_mask() -> None:
    keep = fc.dropout_mask((2, 3, 50, 70), 0.25, (7, 9))
    assert keep.dtype == np.bool_ and keep.shape == (2, 3, 50, 70)
    assert abs(keep.mean() - 0.75) < 0.02
    out = np.empty((2, 3, 50, 70), np.uint8)
    assert fc.dropout_mask(out.shape, 0.25, (7, 9), out=out) is out
    with pytest.raises(fc.ArgumentError, match="p must be a number"):
        fc.dropout_mask(out.shape, "0.25", (7, 9), out=out)  # type: ignore[arg-type]
    np.testing.assert_array_equal(out, keep)
    with pytest.raises(fc.ArgumentError, match="out must have shape"):
        fc.dropout_mask((1, 1, 2, 2), 0.25, (7, 9), out=out)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_explain_names_what_runs(direction: str) -> None:
    q, k, v = inputs()
    plan = fc.explain(q, k, v, direction=direction, causal=True, return_lse=True)
    kernel = next(x for x in fc.kernels() if x.name == plan.kernel)
    assert kernel.usable and kernel.direction == direction and kernel.backend == plan.backend
    assert plan.tile == (kernel.block_m, kernel.block_n) and plan.arch == kernel.isa
    assert plan.workspace_bytes >= 0 and plan.splits >= 1 and plan.deterministic
    assert all(isinstance(name, str) and reason for name, reason in plan.refusals)
    with pytest.raises(fc.ArgumentError, match="direction must be"):
        fc.explain(q, k, v, direction="sideways")


def test_devices_and_threads() -> None:
    cpu = fc.devices()[0]
    assert (cpu.kind, cpu.id) == ("cpu", 0) and cpu.multiprocessors >= 1
    before = fc.get_num_threads()
    try:
        fc.set_num_threads(1)
        assert fc.get_num_threads() == 1
        np.testing.assert_array_equal(fc.attention(*inputs()), expected())
    finally:
        fc.set_num_threads(before)


def test_threadpoolctl() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    before = fc.get_num_threads()
    with threadpoolctl.threadpool_limits(1):
        assert fc.get_num_threads() == 1
    assert fc.get_num_threads() == before
    (pool,) = (x for x in threadpoolctl.threadpool_info() if x["user_api"] == "flashcore")
    assert pool["num_threads"] == before and pool["version"] == fc.__version__


def test_command_line() -> None:
    run = [sys.executable, "-m", "flashcore"]
    for flag, name in (
        ("--cmake-dir", "flashcoreConfig.cmake"),
        ("--include-dir", "flashcore/flashcore.h"),
    ):
        folder = subprocess.run(
            [*run, flag], check=True, capture_output=True, text=True
        ).stdout.strip()
        with open(f"{folder}/{name}", encoding="utf-8") as file:
            assert "flashcore" in file.read()
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert fc.__version__ in text and fc.kernels()[0].name in text


# ---- CUDA ----------------------------------------------------------------------------------------

GPU_SHAPE = (2, 256, 4, 64)


@pytest.mark.gpu
def test_torch_on_a_side_stream(torch: Any) -> None:
    q, k, v = (torch.randn(GPU_SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    want = fc.attention(q, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = q * 1
        out = fc.attention(late, k, v)  # must wait for the sleep
    stream.synchronize()
    assert torch.equal(out, want)
    torch.cuda.synchronize()
    for given in (stream, stream.cuda_stream):
        named = fc.attention(q, k, v, stream=given)
        stream.synchronize()
        assert torch.equal(named, want)


@pytest.mark.gpu
def test_torch_tensors_on_different_devices(torch: Any) -> None:
    q, k, v = (torch.randn(GPU_SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with pytest.raises(fc.ArgumentError, match="k is on cpu but q is on cuda:0"):
        fc.attention(q, k.cpu(), v)


@pytest.mark.gpu
def test_torch_cuda_graph(torch: Any) -> None:
    q, k, v = (torch.randn(GPU_SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = torch.empty_like(q)
    fc.attention(q, k, v, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fc.attention(q, k, v, out=out)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, fc.attention(q, k, v))


@pytest.mark.gpu
def test_cupy_on_a_side_stream() -> None:
    cupy = pytest.importorskip("cupy")
    q, k, v = (cupy.random.standard_normal(GPU_SHAPE).astype(cupy.float16) for _ in range(3))
    want = fc.attention(q, k, v)
    assert isinstance(want, cupy.ndarray) and want.dtype == cupy.float16
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        out = fc.attention(q * 1, k, v)
    stream.synchronize()
    assert bool((out == want).all())
    named = fc.attention(q, k, v, stream=stream)
    stream.synchronize()
    assert bool((named == want).all())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["null", "ptds"])
def test_cupy_on_default_streams(name: str) -> None:
    """The legacy one, and that of the thread."""
    cupy = pytest.importorskip("cupy")
    q, k, v = (cupy.random.standard_normal(GPU_SHAPE).astype(cupy.float16) for _ in range(3))
    want = fc.attention(q, k, v)
    cupy.cuda.Device().synchronize()
    stream = getattr(cupy.cuda.Stream, name)
    with stream:
        out = fc.attention(q * 1, k, v)
    stream.synchronize()
    assert bool((out == want).all())


@pytest.mark.gpu
def test_cupy_memory_is_of_its_pool() -> None:
    cupy = pytest.importorskip("cupy")
    q = cupy.random.standard_normal((1, 4096, 8, 64)).astype(cupy.float16)
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    out = fc.attention(q, q, q)
    assert pool.used_bytes() - before >= out.nbytes
    del out
    assert pool.used_bytes() == before


@pytest.mark.gpu
def test_cupy_and_torch_in_one_call(torch: Any) -> None:
    cupy = pytest.importorskip("cupy")
    q, k, v = (torch.randn(GPU_SHAPE, device="cuda", dtype=torch.float16) for _ in range(3))
    want = fc.attention(q, k, v)
    torch.cuda.synchronize()
    got = fc.attention(cupy.from_dlpack(q), k, v)
    cupy.cuda.Device().synchronize()
    assert isinstance(got, cupy.ndarray) and bool((got == cupy.from_dlpack(want)).all())


@pytest.mark.gpu
def test_cupy_read_as_bfloat16() -> None:
    cupy = pytest.importorskip("cupy")
    q = cupy.random.standard_normal(GPU_SHAPE).astype(ml_dtypes.bfloat16)
    assert fc.attention(q, q, q).dtype == ml_dtypes.bfloat16
