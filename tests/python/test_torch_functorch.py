"""torch.func over flashcore.torch.attention, against the same transforms over plain attention."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch.func import grad, jacrev, jvp, vjp, vmap  # noqa: E402
from torch_tensors import doubles, plain  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.torch as ft  # noqa: E402

SHAPES = (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6), (1, 4, 1, 7)
ARGUMENTS = (0, 1, 2, 3)


def ours(q, k, v, bias):
    return ft.attention(q, k, v, bias=bias, causal=True, return_lse=True)[:2]


def theirs(q, k, v, bias):
    return plain(q, k, v, bias, causal=True)


def loss_of(function):
    return lambda *args: sum(x.sin().sum() for x in function(*args))


@pytest.fixture
def inputs():
    return doubles(*SHAPES, grad=False)


def test_grad_and_vjp(inputs):
    torch.testing.assert_close(
        grad(loss_of(ours), ARGUMENTS)(*inputs), grad(loss_of(theirs), ARGUMENTS)(*inputs)
    )
    seeds = torch.ones(2, 5, 4, 6).double(), torch.ones(2, 4, 5).double()
    torch.testing.assert_close(vjp(ours, *inputs)[1](seeds), vjp(theirs, *inputs)[1](seeds))


def test_jacrev(inputs):
    torch.testing.assert_close(jacrev(ours)(*inputs), jacrev(theirs)(*inputs))


# Every argument mapped; some shared; a mapped dimension that is not the first; a bias per call.
MAPPED = [(0, 0, 0, 0), (0, None, 0, None), (None, 0, None, 0), (1, None, 2, None), (0, 0, 0, 2)]


@pytest.mark.parametrize("dims", MAPPED, ids=str)
@pytest.mark.parametrize("batch_of_bias", [1, 2])
def test_vmap(inputs, dims, batch_of_bias):
    inputs[3] = inputs[3].expand(batch_of_bias, -1, -1, -1)
    scale = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    args = [
        x if dim is None else (scale.reshape(3, 1, 1, 1, 1) * x).movedim(0, dim)
        for x, dim in zip(inputs, dims)
    ]
    torch.testing.assert_close(vmap(ours, dims)(*args), vmap(theirs, dims)(*args))
    for transform in (
        lambda f: vmap(grad(loss_of(f), ARGUMENTS), dims),
        lambda f: grad(loss_of(vmap(f, dims)), ARGUMENTS),
    ):
        torch.testing.assert_close(transform(ours)(*args), transform(theirs)(*args))


def each(function, x, *rest):
    """What vmap means."""
    results = [function(x[i], *(y[i] for y in rest)) for i in range(len(x))]
    return tuple(torch.stack(parts) for parts in zip(*results))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_vmap_of_every_option_with_a_batch(layout):
    q, k, v = (torch.randn(3, 2, 4, 4, 8) for _ in range(3))
    mapped = {
        "mask": torch.rand(3, 2, 1, 4, 4) > 0.3,
        "alibi_slopes": torch.rand(3, 4),
        "seqlens_k": torch.randint(1, 5, (3, 2), dtype=torch.int32),
        "q_offset": torch.randint(0, 3, (3, 2), dtype=torch.int32),
    }
    shared = {"seqlens_q": torch.tensor([4, 2], dtype=torch.int32), "layout": layout}
    if layout == "bshd":
        shared["block_mask"] = fc.BlockMask.from_dense(~torch.eye(4).bool().numpy(), (1, 1))
    for unmapped in ((), ("mask",), ("alibi_slopes",), ("seqlens_k", "q_offset")):
        for name in unmapped:
            mapped[name], shared[name] = None, mapped[name][0]
        names = [name for name, x in mapped.items() if x is not None]
        call = lambda q, k, v, *xs, names=names: tuple(
            ft.attention(
                q, k, v, causal=True, return_lse=True, return_max_logits=True,
                **shared, **dict(zip(names, xs)),
            )
        )  # fmt: skip
        args = (q, k, v, *(mapped[name] for name in names))
        torch.testing.assert_close(vmap(call)(*args), each(call, *args))


def test_vmap_that_goes_one_by_one():
    """Dropout bits depend on the batch index, sinks are one per call, packing has no batch."""
    q, k, v = (torch.randn(3, 2, 4, 4, 8) for _ in range(3))
    sinks = torch.randn(3, 4)
    lengths = torch.tensor([0, 3, 4], dtype=torch.int32)
    dropped = lambda q, k, v: (ft.attention(q, k, v, dropout_p=0.5, rng=(1, 2)),)
    sunk = lambda q, k, v, s: (ft.attention(q, k, v, sinks=s),)
    packed = lambda q, k, v: (ft.attention(q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths),)
    for function, args in (
        (dropped, (q, k, v)),
        (sunk, (q, k, v, sinks)),
        (packed, (q[:, 0], k[:, 0], v[:, 0])),
    ):
        torch.testing.assert_close(vmap(function)(*args), each(function, *args))
        loss = lambda *args, f=function: f(*args)[0].sin().sum()
        of_all = tuple(range(len(args)))
        torch.testing.assert_close(vmap(grad(loss, of_all))(*args), each(grad(loss, of_all), *args))


def test_vmap_of_dropout_asks_for_its_randomness():
    x = torch.randn(3, 1, 8, 2, 8)
    drop = lambda x: ft.attention(x, x, x, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(drop)(x)
    same = x[:1].expand(3, -1, -1, -1, -1)
    equal = vmap(drop, randomness="same")(same)
    assert torch.equal(equal[0], equal[1])
    different = vmap(drop, randomness="different")(same)
    assert not torch.equal(different[0], different[1])


def test_vmap_twice(inputs):
    q, k, v, bias = inputs
    q = torch.stack([torch.stack([q, q * 2]), torch.stack([q * 3, -q])])
    twice = lambda f: vmap(vmap(f, (0, None, None, None)), (0, None, None, None))
    torch.testing.assert_close(twice(ours)(q, k, v, bias), twice(theirs)(q, k, v, bias))


def test_forward_mode_is_refused(inputs):
    q, k, v, _ = inputs
    with pytest.raises(fc.UnsupportedError, match=r"jvp.*torch\.func\.vjp"):
        jvp(lambda q: ft.attention(q, k, v), (q,), (q,))


def test_gradient_of_a_gradient_is_refused(inputs):
    q, k, v, bias = inputs
    inner = grad(lambda q: loss_of(ours)(q, k, v, bias))
    with pytest.raises(fc.UnsupportedError, match="gradient of a gradient"):
        grad(lambda q: inner(q).sum())(q)
