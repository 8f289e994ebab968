"""flashcore's operators as torch.compile, torch.export, opcheck and dispatch modes see them."""

from __future__ import annotations

import io
import shutil

import cases
import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch_tensors import case_tensors, largest_difference  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.torch as ft  # noqa: E402
from flashcore import _core  # noqa: E402
from flashcore.torch import operators  # noqa: E402

INT32 = torch.int32


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def normal(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def qkv(layout="bshd", dtype=torch.float32, dv=8):
    shapes = (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, dv)
    tensors = [normal(*shape, dtype=dtype) for shape in shapes]
    return tensors if layout == "bshd" else [x.transpose(1, 2) for x in tensors]


def packed():
    lengths = torch.tensor([0, 4, 9], dtype=INT32), torch.tensor([0, 5, 11], dtype=INT32)
    return {"cu_seqlens_q": lengths[0], "cu_seqlens_k": lengths[1], "max_seqlen_q": 5}


CALLS = {
    "causal": (qkv, {"causal": True}),
    "f64 dv": (lambda: qkv(dtype=torch.float64, dv=6), {"window_size": (None, 1)}),
    "out_dtype": (lambda: qkv(dtype=torch.bfloat16), {"out_dtype": torch.float32}),
    "bias sinks softcap": (
        qkv,
        lambda: {"bias": normal(1, 4, 1, 7), "sinks": normal(4), "softcap": 5.0},
    ),
    "mask": (qkv, {"mask": torch.rand(1, 1, 5, 7) > 0.3}),
    "dropout": (qkv, {"dropout_p": 0.3, "rng": (2**64 - 1, 7)}),
    "dropout by tensor": (qkv, {"dropout_p": 0.3, "rng": torch.tensor([5, 7])}),
    "q_offset": (
        lambda: qkv("bhsd"),
        {"layout": "bhsd", "causal": True, "q_offset": torch.tensor([1, 2], dtype=INT32)},
    ),
    "blocks lengths": (
        qkv,
        {
            "block_mask": fc.BlockMask.sliding(5, 7, (2, 2), window_size=(2, 2)),
            "seqlens_k": torch.tensor([7, 3], dtype=INT32),
        },
    ),
    "alibi max_logits": (qkv, {"alibi_slopes": torch.rand(4), "return_max_logits": True}),
    "packed": (lambda: [normal(9, 4, 8), normal(11, 2, 8), normal(11, 2, 8)], packed()),
    "16-bit bias": (
        lambda: qkv(dtype=torch.bfloat16),
        lambda: {"bias": normal(1, 4, 5, 7, dtype=torch.bfloat16)},
    ),
    "expanded": (
        lambda: [normal(1, 5, 1, 8).expand(2, 5, 4, 8), *qkv()[1:]],
        {"causal": True, "align": "top_left", "deterministic": True, "num_splits": 1},
    ),
}


def call(name):
    """(q, k, v), options"""
    inputs, options = CALLS[name]
    torch.manual_seed(0)
    return inputs(), dict(options() if callable(options) else options)


def positional(tensors, options):
    options = dict(options)
    bias, sinks = options.pop("bias", None), options.pop("sinks", None)
    rest = options.pop("return_max_logits", False), options.pop("out_dtype", None)
    return (*tensors, bias, sinks, *rest, *operators.spread(options))


def test_the_schema_holds_every_option():
    gathered = {"window_size": [1, -1], "bias": None, "sinks": None}
    for name in _core.OPTION_NAMES:
        if name not in ("bias", "sinks", "block_mask"):
            gathered.setdefault(name, None)
    gathered = {name: x for name, x in gathered.items() if name not in ("bias", "sinks")}
    operators.spread(gathered)  # raises for an option without a field
    with pytest.raises(TypeError, match="colour"):
        operators.spread({"colour": 1})


@pytest.mark.parametrize("name", CALLS)
def test_spread_and_gathered_are_inverse(name):
    tensors, options = call(name)
    for extra in ("return_max_logits", "out_dtype"):
        options.pop(extra, None)
    back = operators.gathered(tuple(positional(tensors, options)[7:]))
    bias, sinks = options.pop("bias", None), options.pop("sinks", None)
    assert back.keys() == options.keys()
    with torch.no_grad():
        assert torch.equal(
            fc.attention(*tensors, bias=bias, sinks=sinks, **options),
            fc.attention(*tensors, bias=bias, sinks=sinks, **back),
        )


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    tensors, options = call(name)
    args = positional(tensors, options)
    torch.library.opcheck(torch.ops.flashcore.attention, args)

    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    out, lse, _ = torch.ops.flashcore.attention(*detached)
    backward = (torch.randn_like(out), *detached[:5], out, lse, torch.randn_like(lse))
    torch.library.opcheck(torch.ops.flashcore.attention_backward, (*backward, *detached[7:]))


class Layer(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.options = {
            name: torch.nn.Parameter(x.detach()) if name in ("bias", "sinks") else x
            for name, x in options.items()
        }
        self.parts = torch.nn.ParameterList(
            [x for x in self.options.values() if isinstance(x, torch.nn.Parameter)]
        )

    def forward(self, q, k, v):
        q = self.linear(q.float()).to(q.dtype)
        result = ft.attention(q, k, v, **{"return_lse": True, **self.options})
        return result.out.sin(), result.lse


def outputs_and_gradients(layer, compiled, tensors):
    out, lse = compiled(*tensors)
    wanted = [*(x for x in tensors if x.requires_grad), *layer.parameters()]
    loss = out.double().sum() + lse.double().sin().sum()
    return [out, lse, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("name", CALLS)
def test_compile(name):
    tensors, options = call(name)
    options["return_lse"] = True
    if options.get("block_mask"):
        options["block_mask"] = options["block_mask"].map(torch.as_tensor)
    layer = Layer(options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want = outputs_and_gradients(layer, layer, tensors)
    got = outputs_and_gradients(layer, compiled, tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
def test_compile_to_machine_code():
    tensors, options = call("bias sinks softcap")
    layer = Layer(options)
    compiled = torch.compile(layer, fullgraph=True)
    want = outputs_and_gradients(layer, layer, tensors)
    torch.testing.assert_close(outputs_and_gradients(layer, compiled, tensors), want)


def test_compile_with_changing_lengths():
    layer = Layer({"causal": True})
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 6, 9):
        tensors = [normal(2, n, 4, 8), normal(2, n + 2, 2, 8), normal(2, n + 2, 2, 8)]
        want = outputs_and_gradients(layer, layer, tensors)
        got = outputs_and_gradients(layer, compiled, tensors)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiled_dropout_draws_anew():
    x = normal(1, 16, 2, 8)
    compiled = torch.compile(
        lambda x: ft.attention(x, x, x, dropout_p=0.4), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(0)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(0)
    assert torch.equal(first, compiled(x)) and not torch.equal(first, second)
    first.sum().backward()


def test_compiled_vmap():
    x = normal(3, 2, 5, 2, 8, grad=False)
    function = lambda x: torch.vmap(lambda x: ft.attention(x, x, x))(x)
    assert torch.equal(torch.compile(function, backend="aot_eager")(x), function(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export_save_load(strict):
    layer = Layer({"causal": True, "bias": normal(1, 4, 1, 7)})
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        layer, tuple(qkv()), dynamic_shapes=({0: batch},) * 3, strict=strict
    )
    operator = torch.ops.flashcore.attention.default
    assert operator in [node.target for node in program.graph.nodes]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    tensors = [x[:1].expand(3, -1, -1, -1) for x in qkv()]
    loaded = torch.export.load(file).module()
    assert largest_difference(loaded(*tensors), layer(*tensors)) == 0


def test_fake_result_of_overlapping_rows():
    """Windows of one signal: rows and columns of q step alike, and the result cannot."""
    q = normal(64, grad=False).as_strided((2, 5, 4, 8), (16, 1, 8, 1))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        fakes = [*ft.attention(fake, fake, fake, return_lse=True)[:2]]
        dout = torch.empty_like(fakes[0])
        fakes += operators.attention_backward(dout, fake, fake, fake, None, None, *fakes, None, {})[
            :3
        ]
    real = [*ft.attention(q, q, q, return_lse=True)[:2]]
    real += fc.attention_backward(torch.ones_like(real[0]), q, q, q, *real)[:3]
    assert forms(fakes) == forms(real)


def forms(tensors):
    return [None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors]


@pytest.mark.parametrize("name", CALLS)
def test_fake_results_have_the_form_of_real_ones(name):
    tensors, options = call(name)
    options["return_lse"] = True
    with torch.no_grad():
        real = ft.attention(*tensors, **options)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = ft.attention(*(mode.from_tensor(x) for x in tensors), **options)
    assert forms(fake) == forms(real)


@pytest.mark.parametrize("case", cases.BACKWARD, ids=str)
def test_every_case_through_the_operators(case):
    """The bits of eager mode, and fake results and gradients of the same form."""
    arrays, options = case_tensors(case)
    inputs = [arrays["q"], arrays["k"], arrays["v"]]
    leaves = inputs + [options[name] for name in ("bias", "sinks") if name in options]
    seeds = arrays["dout"], arrays["dlse"]

    def run(q, k, v, dout, dlse, attention):
        out, lse = attention(q, k, v)[:2]
        grads = torch.autograd.grad((out, lse), leaves, (dout.to(out.dtype), dlse))
        return [out, lse, *grads]

    eager = lambda *qkv: ft.attention(*qkv, return_lse=True, **options)
    split = {name: options.get(name) for name in ("bias", "sinks", "out_dtype")}
    rest = {name: x for name, x in options.items() if name not in split}
    dtype = split["out_dtype"] and getattr(torch, split["out_dtype"])
    operator = lambda *qkv: torch.ops.flashcore.attention(
        *qkv, split["bias"], split["sinks"], False, dtype, *operators.spread(rest)
    )
    want = run(*inputs, *seeds, eager)
    got = run(*inputs, *seeds, operator)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(x) for x in inputs]
        leaves = inputs + leaves[3:]
        fake = run(*inputs, *(mode.from_tensor(x) for x in seeds), eager)
    assert forms(fake) == forms(want)


def test_recorders_see_the_operators():
    q, k, v = qkv()
    graph = make_fx(lambda q: ft.attention(q, k, v))(q.detach())
    assert torch.ops.flashcore.attention.default in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(q.detach()), ft.attention(q, k, v))

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        seen: list = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

    with Count() as count:
        ft.attention(q, k, v).sum().backward()
    assert torch.ops.flashcore.attention.default in count.seen
    assert torch.ops.flashcore.attention_backward.default in count.seen
    assert q.grad.abs().max() > 0


def test_double_backward_of_the_operator_is_refused():
    q, k, v = qkv()
    out, _, _ = torch.ops.flashcore.attention(q, k, v)
    (once,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(fc.UnsupportedError, match="gradient of a gradient"):
        once.sum().backward()
