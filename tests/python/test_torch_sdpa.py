"""torch.nn.functional.scaled_dot_product_attention on flashcore, against torch's own."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch_tensors import doubles  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.torch as ft  # noqa: E402

theirs = F.scaled_dot_product_attention
SHAPES = (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)


def generator():
    return torch.Generator().manual_seed(0)


def mask(*shape):
    return torch.rand(shape, generator=generator()) > 0.3


CALLS = {
    "plain": {},
    "is_causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool mask": {"attn_mask": mask(5, 7)},
    "bool mask per head": {"attn_mask": mask(2, 4, 5, 7)},
    "padding": {"attn_mask": mask(2, 1, 1, 7)},
    "expanded padding": {"attn_mask": mask(2, 1, 1, 7).expand(2, 4, 5, 7)},
    "rows without keys": {"attn_mask": torch.zeros(5, 1, dtype=torch.bool).expand(5, 7)},
    "float mask": {"attn_mask": torch.randn(4, 1, 7, dtype=torch.float64, generator=generator())},
    "1-D float mask": {"attn_mask": torch.randn(7, dtype=torch.float64).expand(5, 7)},
}


@pytest.mark.parametrize("name", CALLS)
def test_same_values_and_gradients(name):
    q, k, v = doubles(*SHAPES)
    want = theirs(q, k, v, **CALLS[name])
    with ft.register_sdpa(strict=True):
        got = F.scaled_dot_product_attention(q, k, v, **CALLS[name])
    assert got.grad_fn.name() == "AttentionBackward", "flashcore ran"
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sin().sum(), (q, k, v)),
        torch.autograd.grad(want.sin().sum(), (q, k, v)),
    )


def test_grouped_heads():
    q, k, v = doubles((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    with ft.register_sdpa(strict=True):
        got = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        with pytest.raises(fc.UnsupportedError, match="key is of 2 heads.*enable_gqa"):
            F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(got, theirs(q, k, v, enable_gqa=True))


def test_dropout_follows_the_generator():
    q, k, v = doubles(*SHAPES)
    with ft.register_sdpa(strict=True):
        torch.manual_seed(0)
        first = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        torch.manual_seed(0)
        assert torch.equal(first, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))


NOT_OURS = {
    "3-D": (((5, 8), (7, 8), (7, 8)), {}),
    "batch broadcast": (((2, 4, 5, 8), (1, 4, 7, 8), (2, 4, 7, 8)), {}),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_flashcore_cannot_run_is_left_to_torch(name):
    shapes, options = NOT_OURS[name]
    tensors = doubles(*shapes)
    want = theirs(*tensors, **options)
    with ft.register_sdpa():
        assert torch.equal(F.scaled_dot_product_attention(*tensors, **options), want)
    with ft.register_sdpa(strict=True), pytest.raises(fc.UnsupportedError, match="strict=False"):
        F.scaled_dot_product_attention(*tensors, **options)


def test_errors_are_those_of_torch():
    q, k, v = doubles(*SHAPES)
    with ft.register_sdpa():
        with pytest.raises(RuntimeError, match="same dtype"):
            F.scaled_dot_product_attention(q, k.float(), v)
        with pytest.raises(RuntimeError, match="attn_mask"):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask(5, 7), is_causal=True)


def test_the_way_back():
    handle = ft.register_sdpa()
    assert F.scaled_dot_product_attention is not theirs
    handle.close()
    assert F.scaled_dot_product_attention is theirs
    with ft.register_sdpa(), ft.register_sdpa():
        pass
    assert F.scaled_dot_product_attention is theirs
    with pytest.raises(ZeroDivisionError), ft.register_sdpa():
        1 / 0  # noqa: B018
    assert F.scaled_dot_product_attention is theirs


def test_multihead_attention_module_follows():
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    (x,) = doubles((2, 6, 16))
    want, _ = module(x, x, x, need_weights=False)
    with ft.register_sdpa(strict=True):
        got, _ = module(x, x, x, need_weights=False)
    torch.testing.assert_close(got, want)
    names, nodes = set(), [got.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent]
    assert "AttentionBackward" in names


def test_compiled():
    q, k, v = doubles(*SHAPES)
    with ft.register_sdpa(strict=True):
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        function = torch.compile(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            fullgraph=True,
            backend=backend,
        )
        got = function(q, k, v)
    torch.testing.assert_close(got, theirs(q, k, v, is_causal=True))
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert any("flashcore" in str(target) for target in targets)
    torch._dynamo.reset()


def test_compiled_what_flashcore_cannot_run_is_left_to_torch():
    (q,) = doubles((4, 5, 8))
    with ft.register_sdpa():
        function = torch.compile(
            lambda q: F.scaled_dot_product_attention(q, q, q), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(function(q), theirs(q, q, q))
    torch._dynamo.reset()


def test_the_way_back_leads_to_what_was_before():
    with ft.register_sdpa():
        outer = F.scaled_dot_product_attention
        with ft.register_sdpa(strict=True):
            assert F.scaled_dot_product_attention is not outer
        assert F.scaled_dot_product_attention is outer
    assert F.scaled_dot_product_attention is theirs
