"""fc.merge and fc.dropout_mask on a GPU: the CPU's numbers, and its bits."""

import numpy as np
import pytest
from cases import DTYPES
from gpu import on_gpu

import flashcore as fc
from flashcore.testing import to_numpy

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

TOLERANCE = {"f32": 5e-6, "f16": 1e-3, "bf16": 8e-3}  # one rounding of the result
INF = float("inf")


def parts(count, dtype="f32", shape=(2, 37, 3), d=64, layout="bshd", empty=0.2, seed=0):
    """Random partial results; the rows of parts that saw no key hold NaN."""
    rng = np.random.default_rng(seed)
    outs, lses = [], []
    for _ in range(count):
        out = rng.standard_normal((*shape, d))
        lse = 5 * rng.standard_normal(shape)
        unseen = rng.random(shape) < empty
        unseen[..., :3, :] = True  # nobody saw anything in these
        out[unseen], lse[unseen] = np.nan, -np.inf
        if len(shape) == 3 and layout == "bhsd":
            out = np.ascontiguousarray(out.swapaxes(1, 2))
        outs.append(out.astype(DTYPES[dtype]))
        lses.append(np.ascontiguousarray(lse.swapaxes(-1, -2)).astype(np.float32))
    return outs, lses


def check(outs, lses, tolerance, **options):
    out, lse = fc.merge([on_gpu(x) for x in outs], [on_gpu(x) for x in lses], **options)
    want_out, want_lse = fc.merge(outs, lses, **options)
    got = to_numpy(out).astype(np.float64)
    np.testing.assert_allclose(got, want_out.astype(np.float64), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(to_numpy(lse), want_lse, rtol=1e-6, atol=2e-6)
    return out, lse


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("out_dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_equals_the_cpu(count, dtype, out_dtype):
    outs, lses = parts(count, dtype)
    out, _ = check(outs, lses, TOLERANCE[out_dtype], out_dtype=np.dtype(DTYPES[out_dtype]).name)
    assert (out[:, :3] == 0).all()


@pytest.mark.parametrize("d", [1, 7, 8, 24, 40, 72, 128, 136, 192, 256, 520])
@pytest.mark.parametrize("shape,layout", [((2, 37, 3), "bhsd"), ((90, 5), "bshd")])
def test_shapes(shape, layout, d):
    check(*parts(5, shape=shape, d=d, layout=layout), TOLERANCE["f32"], layout=layout)


def test_any_strides():
    """Rows that begin anywhere: in 16-byte steps, at an odd element, heads outermost."""
    outs, lses = (list(map(on_gpu, x)) for x in parts(3, "bf16", d=40))
    room = torch.full((2, 2, 37, 5, 48), float("nan"), device=outs[0].device, dtype=outs[0].dtype)
    views = [room[0, :, :, 1:4, :40], room[1, :, :, 1:4, 1:41]]
    views.append(outs[2].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3))
    for view, x in zip(views, outs):
        view.copy_(x)
    for got, want in zip(fc.merge(views, lses), fc.merge(outs, lses)):
        torch.testing.assert_close(got, want, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), INF])
def test_poison_in_a_part_that_was_seen_shows(value):
    outs, lses = parts(3, empty=0.0)
    lses[1][0, 0, 5] = value
    out, lse = check(outs, lses, TOLERANCE["f32"])
    assert torch.isnan(out[0, 5, 0]).all() and torch.isnan(lse[0, 0, 5])
    assert int(torch.isnan(lse).sum()) == 1


def test_parts_of_the_keys_give_the_whole():
    q, k, v = torch.randn(3, 2, 300, 4, 128, device="cuda", dtype=torch.bfloat16)
    whole = fc.attention(q, k, v, return_lse=True)
    edges = [0, 10, 128, 200, 300]
    pieces = [
        fc.attention(q, k[:, i:j], v[:, i:j], return_lse=True) for i, j in zip(edges, edges[1:])
    ]
    out, lse = fc.merge([p.out for p in pieces], [p.lse for p in pieces])
    torch.testing.assert_close(out, whole.out, rtol=2e-2, atol=4e-3)
    torch.testing.assert_close(lse, whole.lse, rtol=1e-5, atol=1e-5)


def test_repeatable_and_capturable():
    outs, lses = ([on_gpu(x) for x in list_of] for list_of in parts(6, shape=(2, 500, 8)))
    want = fc.merge(outs, lses)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fc.merge(outs, lses)
    for _ in range(3):
        got[0].zero_()
        graph.replay()
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_no_rows():
    outs = [torch.empty(0, 5, 2, 64, device="cuda")] * 2
    out, lse = fc.merge(outs, [torch.empty(0, 2, 5, device="cuda")] * 2)
    assert out.shape == (0, 5, 2, 64) and lse.shape == (0, 2, 5)


def test_what_is_not_built_is_refused():
    outs = [torch.zeros(1, 4, 1, 8, device="cuda", dtype=torch.float64)]
    with pytest.raises(fc.UnsupportedError, match="float64"):
        fc.merge(outs, [torch.zeros(1, 1, 4, device="cuda", dtype=torch.float64)])
    outs, lses = torch.zeros(1, 4, 1, 8, device="cuda"), torch.zeros(1, 1, 4, device="cuda")
    with pytest.raises(fc.UnsupportedError, match="up to 384 .* got 400"):
        fc.merge([outs] * 400, [lses] * 400)


# ---- dropout_mask -------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 2**-17, 0.1, 0.5, 1 - 2**-16])
@pytest.mark.parametrize("rng", [(0, 0), (-1, -1), (2**62 + 5, 2**40)])
@pytest.mark.parametrize("shape", [(2, 3, 21, 37), (1, 2, 64, 128), (3, 1, 1, 1), (2, 2, 0, 5)])
def test_mask_has_the_bits_of_the_cpu(shape, p, rng):
    out = torch.full(shape, 7, dtype=torch.uint8, device="cuda")
    assert fc.dropout_mask(shape, p, rng, out=out) is out
    np.testing.assert_array_equal(to_numpy(out), fc.dropout_mask(shape, p, rng))


@pytest.mark.parametrize("step,extra", [(1, 3), (2, 0), (1, 16)])
def test_mask_into_a_view(step, extra):
    """Only the view is written to."""
    room = torch.full((2, 2, 40, 48 * step + extra), 7, dtype=torch.uint8, device="cuda")
    view = room[..., : 48 * step : step]
    fc.dropout_mask(view.shape, 0.3, (1, 2), out=view)
    np.testing.assert_array_equal(to_numpy(view), fc.dropout_mask(tuple(view.shape), 0.3, (1, 2)))
    view.fill_(7)
    assert (room == 7).all()


def test_mask_as_bool():
    out = torch.zeros(1, 1, 33, 65, dtype=torch.bool, device="cuda")
    fc.dropout_mask(out.shape, 0.4, (5, 6), out=out)
    np.testing.assert_array_equal(to_numpy(out), fc.dropout_mask((1, 1, 33, 65), 0.4, (5, 6)))
