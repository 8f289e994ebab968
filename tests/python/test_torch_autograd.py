"""flashcore.torch.attention in eager mode: values, gradients and what autograd does with them."""

from __future__ import annotations

import functools
import math

import cases
import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import (  # noqa: E402
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch_tensors import case_tensors, doubles, plain  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.torch as ft  # noqa: E402
from flashcore.testing import assert_grads_close_to_reference  # noqa: E402

SHAPES = (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)


def run(arrays, options):
    """Result and Grads by autograd, of the loss sum(out * dout) + sum(lse * dlse)."""
    q, k, v = (arrays[name] for name in "qkv")
    result = ft.attention(q, k, v, return_lse=True, return_max_logits=True, **options)
    leaves = [q, k, v, options.get("bias"), options.get("sinks")]
    given = [x for x in leaves if x is not None]
    outputs, seeds = (result.out, result.lse), (arrays["dout"].to(result.out), arrays["dlse"])
    grads = iter(torch.autograd.grad(outputs, given, seeds))
    return result, fc.Grads(*(None if x is None else next(grads) for x in leaves))


@pytest.mark.parametrize("case", cases.BACKWARD, ids=str)
def test_has_the_bits_of_the_core(case):
    arrays, options = case_tensors(case)
    result, grads = run(arrays, options)
    with torch.no_grad():
        q, k, v = (arrays[name] for name in "qkv")
        want = fc.attention(q, k, v, return_lse=True, return_max_logits=True, **options)
        options.pop("out_dtype", None)
        want_grads = fc.attention_backward(
            arrays["dout"], q, k, v, want.out, want.lse, dlse=arrays["dlse"], **options
        )
    for got, expected in zip(result, want):
        assert torch.equal(got, expected)
    for got, expected in zip(grads, want_grads):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected.to(got.dtype))


@pytest.mark.parametrize("case", cases.COMBINATIONS, ids=str)
def test_gradients_match_float64(case):
    arrays, options = case_tensors(case)
    _, grads = run(arrays, options)
    q, k, v, dout, dlse = (arrays[name] for name in ("q", "k", "v", "dout", "dlse"))
    assert_grads_close_to_reference(grads, dout, q, k, v, dlse=dlse, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window_size": (3, None)},
        {"softcap": 2.0, "scale": 0.7},
        {"dropout_p": 0.3, "rng": (2**64 - 1, 5)},
        {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_gradcheck(options):
    q, k, v, bias = doubles(*SHAPES, (1, 4, 1, 7))

    def function(q, k, v, bias):
        return ft.attention(q, k, v, bias=bias, return_lse=True, **options)[:2]

    assert torch.autograd.gradcheck(function, (q, k, v, bias))


def test_only_lse_is_used():
    q, k, v = doubles(*SHAPES)
    got = torch.autograd.grad(ft.attention(q, k, v, return_lse=True).lse.sin().sum(), (q, k))
    want = torch.autograd.grad(plain(q, k, v)[1].sin().sum(), (q, k))
    torch.testing.assert_close(got, want)


def test_max_logits_has_no_gradient():
    q, k, v = doubles(*SHAPES)
    result = ft.attention(q, k, v, return_max_logits=True)
    assert result.lse is None and result.out.requires_grad and not result.max_logits.requires_grad


def test_without_gradients_it_is_the_core():
    q, k, v = doubles(*SHAPES)
    with torch.no_grad():
        out = ft.attention(q, k, v, causal=True)
        assert not out.requires_grad and torch.equal(out, fc.attention(q, k, v, causal=True))
    assert not ft.attention(*(x.detach() for x in (q, k, v))).requires_grad


@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "sinks"])
def test_one_input_requires_grad(which):
    q, k, v, bias = doubles(*SHAPES, (1, 4, 5, 7), grad=False)
    inputs = {"q": q, "k": k, "v": v, "bias": bias, "sinks": torch.zeros(4, dtype=torch.float32)}
    if which != "sinks":
        del inputs["sinks"]
    inputs[which].requires_grad_()
    ft.attention(**inputs).sum().backward()
    assert inputs[which].grad.abs().max() > 1e-4


def test_sinks_by_definition():
    """A sink is one more key with that score and no value."""
    q, k, v = doubles(*SHAPES)
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0], requires_grad=True)
    got = torch.autograd.grad(ft.attention(q, k, v, sinks=sinks).sin().sum(), (q, k, v, sinks))
    s = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(2, 2)) * 8**-0.5
    column = sinks.double()[None, :, None, None].expand(2, 4, 5, 1)
    p = torch.cat([s, column], -1).softmax(-1)[..., :-1]
    out = torch.einsum("bhst,bthd->bshd", p, v.repeat_interleave(2, 2))
    want = torch.autograd.grad(out.sin().sum(), (q, k, v, sinks))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_a_16_bit_bias_has_its_dtype(dtype):
    q, k, v, bias = (x.detach().to(dtype) for x in doubles(*SHAPES, (1, 4, 5, 7)))
    bias.requires_grad_()
    ft.attention(q, k, v, bias=bias).sum().backward()
    assert bias.grad.dtype == dtype


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
def test_any_strides_of_the_incoming_gradient(kind):
    q, k, v = doubles(*SHAPES)
    change = {
        "expanded": lambda out, lse: (out.sum(), lse.sum()),
        "transposed": lambda out, lse: (
            out.transpose(1, 3).contiguous().sin().sum(),
            lse.mT.contiguous().sin().sum(),
        ),
        "sliced": lambda out, lse: (out[..., ::2].sin().sum(), lse[..., 1:].sin().sum()),
    }[kind]
    got = torch.autograd.grad(change(*ft.attention(q, k, v, return_lse=True)[:2]), (q, k, v))
    want = torch.autograd.grad(change(*plain(q, k, v)), (q, k, v))
    torch.testing.assert_close(got, want)


def test_shared_input_sums_its_gradients():
    (x,) = doubles((1, 6, 2, 8))
    (got,) = torch.autograd.grad(ft.attention(x, x, x, causal=True).sin().sum(), x)
    (want,) = torch.autograd.grad(plain(x, x, x, causal=True)[0].sin().sum(), x)
    torch.testing.assert_close(got, want)


def test_empty_inputs():
    q = torch.zeros(0, 5, 2, 8, requires_grad=True)
    ft.attention(q, q, q).sum().backward()
    assert q.grad.shape == q.shape
    q, k = torch.randn(1, 3, 2, 8, requires_grad=True), torch.zeros(1, 0, 2, 8)
    out = ft.attention(q, k, k)
    out.sum().backward()
    assert not out.any() and not q.grad.any()


# ---- saved tensors, checkpointing ----------------------------------------------------------------


@pytest.mark.parametrize("which", ["q", "mask", "seqlens_k"])
def test_a_write_before_backward_is_noticed(which):
    q, k, v = doubles(*SHAPES)
    options = {
        "mask": torch.ones(1, 1, 5, 7, dtype=torch.bool),
        "seqlens_k": torch.tensor([7, 3], dtype=torch.int32),
    }
    x = q * 1
    out = ft.attention(x, k, v, **options)
    (x if which == "q" else options[which]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_tensors_hooks_see_what_is_saved():
    q, k, v = doubles(*SHAPES)
    want = torch.autograd.grad(ft.attention(q, k, v).sin().sum(), q)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: packed.append(x) or x.clone(), lambda x: x
    ):
        out = ft.attention(q, k, v)
    assert len(packed) >= 5 and torch.equal(torch.autograd.grad(out.sin().sum(), q)[0], want[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_draws_the_same_dropout(use_reentrant):
    (x,) = doubles((1, 16, 2, 8))

    def layer(x):
        return ft.attention(x, x, x, dropout_p=0.4).sin()

    torch.manual_seed(3)
    (want,) = torch.autograd.grad(layer(x).sum(), x)
    torch.manual_seed(3)
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, want)


def test_selective_checkpoint_sees_the_operator():
    (x,) = doubles((1, 16, 2, 8))
    seen = []

    def policy(context, op, *args, **kwargs):
        seen.append(op)
        save = op is torch.ops.flashcore.attention.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(x):
        return ft.attention(x * 2, x, x, causal=True).sin()

    (want,) = torch.autograd.grad(layer(x).sum(), x)
    context = functools.partial(create_selective_checkpoint_contexts, policy)
    checkpoint(layer, x, use_reentrant=False, context_fn=context).sum().backward()
    assert torch.ops.flashcore.attention.default in seen
    assert torch.equal(x.grad, want)


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_follows_the_generator():
    x = torch.randn(1, 16, 2, 8)
    torch.manual_seed(1)
    first, second = (ft.attention(x, x, x, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    again = ft.attention(x, x, x, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    state = torch.get_rng_state()
    ft.attention(x, x, x)
    assert torch.equal(state, torch.get_rng_state()), "no dropout, no draw"


@pytest.mark.parametrize("rng", [(3, 4), (2**64 - 1, 0), (-1, 0)])
def test_dropout_with_given_seeds(rng):
    x = torch.randn(1, 16, 2, 8, requires_grad=True)
    want = fc.attention(*[x.detach()] * 3, dropout_p=0.5, rng=rng)
    assert torch.equal(ft.attention(x, x, x, dropout_p=0.5, rng=rng), want)
    as_operator = torch.ops.flashcore.attention
    signed = [(n + 2**63) % 2**64 - 2**63 for n in rng]
    assert torch.equal(as_operator(x, x, x, dropout_p=0.5, rng=signed)[0], want)
    tensor = torch.tensor(signed)
    assert torch.equal(ft.attention(x, x, x, dropout_p=0.5, rng=tensor), want)


def test_dropout_keeps_the_mean():
    """E[out] over seeds is out without dropout."""
    q, k, v = (torch.randn(1, 4, 1, 8, dtype=torch.float64) for _ in range(3))
    torch.manual_seed(0)
    samples = torch.stack([ft.attention(q, k, v, dropout_p=0.25) for _ in range(4000)])
    error = samples.mean(0) - ft.attention(q, k, v)
    assert (error.abs() < 5 * samples.std(0) / math.sqrt(4000) + 1e-12).all()


# ---- autocast ------------------------------------------------------------------------------------


def test_autocast_casts_as_torch_does():
    q, k, v = (torch.randn(2, 5, 4, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ft.attention(q, k, v, bias=bias)
        mixed = ft.attention(q.bfloat16(), k, v.half(), bias=bias.half())
        compiled = torch.compile(ft.attention, backend="aot_eager", fullgraph=True)(q, k, v)
        with torch.autocast("cpu", enabled=False):
            assert ft.attention(q, k, v).dtype == torch.float32
        assert ft.attention(*(x.detach().double() for x in (q, k, v))).dtype == torch.float64
    assert out.dtype == mixed.dtype == compiled.dtype == torch.bfloat16
    low = [x.detach().bfloat16() for x in (q, k, v)]
    assert torch.equal(out, fc.attention(*low, bias=bias))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.abs().max() > 0


# ---- what is not differentiable ------------------------------------------------------------------


def test_double_backward_is_refused():
    q, k, v = doubles(*SHAPES)
    (once,) = torch.autograd.grad(ft.attention(q, k, v).sin().sum(), q, create_graph=True)
    (want,) = torch.autograd.grad(plain(q, k, v)[0].sin().sum(), q)
    torch.testing.assert_close(once, want)
    with pytest.raises(fc.UnsupportedError, match=r"gradient of a gradient.*SDPBackend\.MATH"):
        once.sum().backward()


def test_alibi_slopes_have_no_gradient():
    q, k, v = doubles(*SHAPES)
    slopes = torch.ones(4, requires_grad=True)
    message = r"alibi_slopes requires grad.*alibi_slopes\.detach\(\)"
    for inputs in ((q, k, v), [x.detach() for x in (q, k, v)]):
        with pytest.raises(fc.UnsupportedError, match=message):
            ft.attention(*inputs, alibi_slopes=slopes)
    with torch.no_grad():
        ft.attention(q, k, v, alibi_slopes=slopes)
