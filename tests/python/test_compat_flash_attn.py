"""flashcore.compat.flash_attn: flash-attn 2.8's signatures, shapes and corner cases."""

from __future__ import annotations

import inspect

import pytest

torch = pytest.importorskip("torch")

from torch_tensors import doubles, plain  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.torch as ft  # noqa: E402
from flashcore.compat import flash_attn as fa  # noqa: E402

COMMON = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
NONE = inspect.Parameter.empty
# What flash-attn 2.8.3 declares, in its order.
SIGNATURES = {
    "flash_attn_func": dict.fromkeys(("q", "k", "v"), NONE) | COMMON,
    "flash_attn_kvpacked_func": dict.fromkeys(("q", "kv"), NONE) | COMMON,
    "flash_attn_qkvpacked_func": {"qkv": NONE} | COMMON,
    "flash_attn_varlen_func": (
        dict.fromkeys(("q", "k", "v", *LENGTHS), NONE) | COMMON | {"block_table": None}
    ),
    "flash_attn_varlen_kvpacked_func": dict.fromkeys(("q", "kv", *LENGTHS), NONE) | COMMON,
    "flash_attn_varlen_qkvpacked_func": (
        dict.fromkeys(("qkv", "cu_seqlens", "max_seqlen"), NONE) | COMMON
    ),
    "flash_attn_with_kvcache": (
        dict.fromkeys(("q", "k_cache", "v_cache"), NONE)
        | dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens"))
        | dict.fromkeys(("cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale"))
        | {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True}
        | {"alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False}
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(fa, name)).parameters
    assert list(parameters) == list(SIGNATURES[name])
    assert {n: p.default for n, p in parameters.items()} == SIGNATURES[name]
    assert set(fa.__all__) == {*SIGNATURES, "explain"}


def test_values_and_gradients():
    q, k, v = doubles((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    got = fa.flash_attn_func(q, k, v, 0.0, None, True)
    want, _ = plain(q, k, v, causal=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sin().sum(), (q, k, v)),
        torch.autograd.grad(want.sin().sum(), (q, k, v)),
    )


def test_causal_corner_is_bottom_right():
    """The example of flash-attn's own documentation: 5 queries, 2 keys."""
    q, k = doubles((1, 5, 1, 8), (1, 2, 1, 8), grad=False)
    v = torch.eye(2, 8, dtype=torch.float64).reshape(1, 2, 1, 8)
    out, lse, probs = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    seen = out[0, :, 0, :2] > 0
    assert seen.tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert not out[0, :3].any(), "a row without keys is 0"
    assert torch.isposinf(lse[0, 0, :3]).all() and lse[0, 0, 3:].isfinite().all()
    assert lse.shape == (1, 1, 5) and probs.shape == (0,)


@pytest.mark.parametrize("window", [(-1, -1), (2, 0), (1, 1), (-1, 0), (3, -1)])
def test_window(window):
    q, k, v = doubles((1, 5, 2, 8), (1, 7, 2, 8), (1, 7, 2, 8), grad=False)
    i, j = torch.arange(5)[:, None] + 2, torch.arange(7)
    left, right = (w if w >= 0 else 99 for w in window)
    visible = (j >= i - left) & (j <= i + right)
    want = ft.attention(q, k, v, mask=visible[None, None])
    assert torch.equal(fa.flash_attn_func(q, k, v, window_size=window), want)


def test_packed_forms_are_the_same_call():
    (qkv,) = doubles((2, 5, 3, 4, 8))
    options = {"softmax_scale": 0.3, "causal": True, "softcap": 2.0}
    options["alibi_slopes"] = torch.rand(2, 4)
    want = fa.flash_attn_func(*qkv.unbind(2), **options)
    (gradient,) = torch.autograd.grad(want.sin().sum(), qkv, retain_graph=True)
    for got in (
        fa.flash_attn_qkvpacked_func(qkv, **options),
        fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options),
    ):
        assert torch.equal(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sin().sum(), qkv)[0], gradient)


def test_varlen_forms():
    lengths = (3, 0, 5)
    cu = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    (qkv,) = doubles((8, 3, 4, 8))
    out, lse, _ = fa.flash_attn_varlen_qkvpacked_func(
        qkv, cu, 5, causal=True, return_attn_probs=True
    )
    pieces = [fa.flash_attn_qkvpacked_func(x[None], causal=True)[0] for x in qkv.split(lengths)]
    torch.testing.assert_close(out, torch.cat(pieces))
    assert lse.shape == (4, 8)
    q, k, v = qkv.unbind(1)
    for same in (
        fa.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, causal=True),
        fa.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 5, 5, causal=True),
    ):
        assert torch.equal(same, out)
    (gradient,) = torch.autograd.grad(out.sin().sum(), qkv)
    (want,) = torch.autograd.grad(torch.cat(pieces).sin().sum(), qkv)
    torch.testing.assert_close(gradient, want)


def test_inputs_may_have_any_strides():
    q, k, v = (x.detach().mT.contiguous().mT for x in doubles(*[(1, 5, 2, 8)] * 3))
    assert q.stride(-1) != 1
    assert torch.equal(
        fa.flash_attn_func(q, k, v),
        ft.attention(q.contiguous(), k.contiguous(), v.contiguous()),
    )


def test_dropout_follows_the_generator():
    (q,) = doubles((1, 16, 2, 8))
    torch.manual_seed(0)
    first = fa.flash_attn_func(q, q, q, 0.5)
    torch.manual_seed(0)
    assert torch.equal(first, fa.flash_attn_func(q, q, q, dropout_p=0.5))
    assert not torch.equal(first, fa.flash_attn_func(q, q, q, dropout_p=0.5))


def test_deterministic_gradients_repeat():
    (qkv,) = doubles((1, 33, 3, 2, 8))
    out = fa.flash_attn_qkvpacked_func(qkv, causal=True, deterministic=True)
    grads = [torch.autograd.grad(out.sum(), qkv, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("filled", [None, 4, (4, 0)])
def test_cache(filled):
    q, k, v = doubles((2, 3, 4, 8), (2, 16, 2, 8), (2, 16, 2, 8), grad=False)
    new_k, new_v = doubles((2, 3, 2, 8), (2, 3, 2, 8), grad=False)
    lengths = torch.tensor(filled, dtype=torch.int32) if isinstance(filled, tuple) else filled
    before = k.clone()
    if filled is None:
        got = fa.flash_attn_with_kvcache(q, k, v, causal=True)
        assert torch.equal(got, fa.flash_attn_func(q, k, v, causal=True))
        return
    got, lse = fa.flash_attn_with_kvcache(
        q, k, v, new_k, new_v, cache_seqlens=lengths, causal=True, return_softmax_lse=True
    )
    for b, n in enumerate(filled if isinstance(filled, tuple) else (filled,) * 2):
        assert torch.equal(k[b, :n], before[b, :n]) and torch.equal(k[b, n : n + 3], new_k[b])
        assert torch.equal(k[b, n + 3 :], before[b, n + 3 :])
        keys, values = k[b : b + 1, : n + 3], v[b : b + 1, : n + 3]
        want = fa.flash_attn_func(q[b : b + 1], keys, values, causal=True, return_attn_probs=True)
        torch.testing.assert_close(got[b], want[0][0])
        torch.testing.assert_close(lse[b], want[1][0])


def test_refusals():
    q, k, v = doubles((2, 5, 2, 8), (2, 7, 2, 8), (2, 7, 2, 8), grad=False)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(fc.UnsupportedError, match=r"return_attn_probs.*flashcore\.dropout_mask"):
        fa.flash_attn_func(q, k, v, 0.1, return_attn_probs=True)
    with pytest.raises(fc.UnsupportedError, match="block_table is not built: pass k and v packed"):
        fa.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 5, 7, block_table=table)
    for name in ("rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad", "block_table"):
        with pytest.raises(fc.UnsupportedError, match=f"{name} is not built: pass "):
            fa.flash_attn_with_kvcache(q, k, v, **{name: table})
    with pytest.raises(fc.ArgumentError, match="k and v must be given together"):
        fa.flash_attn_with_kvcache(q, k, v, k=q, cache_seqlens=1)
    with pytest.raises(fc.ArgumentError, match=r"qkv must be \(B, S, 3, H, D\)"):
        fa.flash_attn_qkvpacked_func(q)
    with pytest.raises(fc.ArgumentError, match=r"kv must be \(total_k, 2, Hkv, D\)"):
        fa.flash_attn_varlen_kvpacked_func(q[0], k, cu, cu, 5, 7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"softcap": -1.0},
        {"window_size": (-5, 0)},
        {"cache_seqlens": torch.tensor([-2, 3], dtype=torch.int32)},
        {"cache_seqlens": torch.tensor([7, 8], dtype=torch.int32)},
        {"cache_seqlens": None},
    ],
)
def test_a_refused_call_leaves_the_cache_alone(wrong):
    cache = torch.zeros(2, 8, 1, 16)
    new = torch.ones(2, 1, 1, 16)
    with pytest.raises(fc.Error):
        fa.flash_attn_with_kvcache(new, cache, cache, k=new, v=new, **{"cache_seqlens": 1, **wrong})
    assert not cache.any()


def test_explain():
    q, k, v = doubles((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    for direction, short in (("forward", "fwd"), ("backward", "bwd")):
        options = {"causal": True, "window_size": (3, 0), "softcap": 2.0}
        plan = fa.explain(fa.flash_attn_func, q, k, v, 0.1, direction=direction, **options)
        want = ft.explain(q, k, v, dropout_p=0.1, direction=direction, **options)
        assert plan.kernel == want.kernel and f"-{short}-" in plan.kernel
        assert plan.workspace_bytes == want.workspace_bytes
    assert fa.explain(fa.flash_attn_qkvpacked_func, q.new_zeros(1, 4, 3, 2, 8)).kernel
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = q.new_zeros(5, 3, 2, 8)
    assert fa.explain(fa.flash_attn_varlen_qkvpacked_func, packed, cu, 3).kernel
    assert fa.flash_attn_func(q, k, v).shape == q.shape  # calls run again

    with pytest.raises(fc.UnsupportedError, match="return_attn_probs"):
        fa.explain(fa.flash_attn_func, q, k, v, 0.1, return_attn_probs=True)
    assert fa.flash_attn_func(q, k, v).shape == q.shape


def test_explain_leaves_a_cache_as_it_was():
    q, k, cache = doubles((2, 1, 4, 8), (2, 1, 2, 8), (2, 9, 2, 8))
    q, k, cache = (x.detach() for x in (q, k, cache))
    before = cache.clone()
    options = {"k": k, "v": k, "cache_seqlens": torch.tensor([3, 8], dtype=torch.int32)}
    plan = fa.explain(fa.flash_attn_with_kvcache, q, cache, cache, **options)
    assert plan.kernel and torch.equal(cache, before)
    assert fa.explain(fa.flash_attn_with_kvcache, q, cache, cache).kernel == plan.kernel
    plan = fa.explain(fa.flash_attn_with_kvcache, q, cache, cache, direction="backward", **options)
    assert "-bwd-" in plan.kernel and torch.equal(cache, before)
