"""flashcore.jax on CUDA devices: values, gradients, compilation, sharing of the device's time.

Calls are asked of `explain` first: what no kernel runs must be an error, what one runs must be
right.
"""

from __future__ import annotations

import functools

import pytest

jax = pytest.importorskip("jax", minversion="0.10")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.jax as fj  # noqa: E402
from flashcore.testing import (  # noqa: E402
    assert_close_to_reference,
    assert_grads_close_to_reference,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """torch, which other tests of the process use, needs memory of the device too."""
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX sees no GPU: {error}")


def arrays(*shape, dtype=jnp.bfloat16, count=3):
    keys = jax.random.split(jax.random.key(0), count)
    shape = shape or (2, 300, 4, 64)
    gpu = jax.devices("gpu")[0]
    return [jax.device_put(jax.random.normal(key, shape, dtype), gpu) for key in keys]


def runs(q, k, v, direction="forward", **options):
    return fj.explain(q, k, v, direction=direction, **options).kernel is not None


def host(xs):
    return jax.device_get(xs)


def assert_close(got, want):
    """Sums in another order differ by rounding; a race differs by more."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * np.abs(b).max())


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, host(got), host(want))


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_forward(dtype, causal, head_dim):
    q, k, v = arrays(2, 300, 4, head_dim, dtype=dtype)
    call = jax.jit(lambda q, k, v: fj.attention(q, k, v, causal=causal, return_lse=True))
    result = call(q, k, v)
    assert result.out.devices() == q.devices()
    assert_close_to_reference(fc.Result(*host(result)), *host((q, k, v)), causal=causal)


def test_the_bits_are_those_of_torch_tensors():
    torch = pytest.importorskip("torch")
    q, k, v = arrays()
    out = fj.attention(q, k, v, causal=True)
    bits = [np.asarray(x).view(np.int16) for x in (q, k, v)]
    tensors = [torch.from_numpy(x.copy()).cuda().view(torch.bfloat16) for x in bits]
    want = fc.attention(*tensors, causal=True).view(torch.int16).cpu().numpy()
    np.testing.assert_array_equal(np.asarray(out).view(np.int16), want)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (64, None)},
    "softcap": {"softcap": 10.0},
    "alibi": {"alibi_slopes": np.full(4, 0.1, np.float32)},
    "sinks": {"sinks": np.linspace(-1, 1, 4, dtype=np.float32)},
    "dropout": {"dropout_p": 0.2, "rng": (3, 4)},
    "dropout by array": {"dropout_p": 0.2, "rng": np.array([3, 0, 4, 0], np.uint32)},
    "padded": {"seqlens_k": np.array([300, 17], np.int32), "causal": True},
    "padded queries": {
        "seqlens_q": np.array([40, 300], np.int32),
        "seqlens_k": np.array([300, 17], np.int32),
    },
    "offset": {"causal": True, "q_offset": np.array([0, 9], np.int32)},
    "deterministic": {"causal": True, "deterministic": True},
    "splits": {"num_splits": 3},
    "bias": {"bias": np.ones((1, 1, 300, 300), np.float32)},
    "mask": {"mask": np.ones((1, 1, 1, 300), bool)},
}


def in_numbers(options):
    """As the reference takes them."""
    options = dict(options)
    if isinstance(options.get("rng"), np.ndarray):
        options["rng"] = tuple(int(x) for x in options["rng"].view(np.int64))
    return options


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_options_and_gradients_or_a_clear_error(name, head_dim):
    q, k, v = arrays(2, 300, 4, head_dim)
    (dout,) = arrays(2, 300, 4, head_dim, count=1)
    options = OPTIONS[name]
    call = jax.jit(lambda q, k, v: fj.attention(q, k, v, **options))
    if not runs(q, k, v, **options):
        with pytest.raises(fc.UnsupportedError):
            call(q, k, v)
        return
    out = call(q, k, v)
    assert_close_to_reference(*host((out, q, k, v)), **in_numbers(options))
    gradient = jax.jit(lambda *args: jax.vjp(call, *args[:3])[1](args[3]))
    if not runs(q, k, v, "backward", **options):
        with pytest.raises(fc.UnsupportedError):
            gradient(q, k, v, dout)
        return
    grads = gradient(q, k, v, dout)
    assert_grads_close_to_reference(
        fc.Grads(*host(grads), None, None), *host((dout, q, k, v)), **in_numbers(options)
    )


def test_packed_sequences_with_new_lengths():
    q, k, v = arrays(300, 4, 64)
    options = {"max_seqlen_q": 300, "max_seqlen_k": 300, "causal": True}

    @jax.jit
    def call(q, k, v, lengths):
        return fj.attention(q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths, **options)

    for lengths in ([0, 100, 300], [0, 250, 300]):
        lengths = np.array(lengths, np.int32)
        out = call(q, k, v, jax.device_put(lengths, q.device))
        assert_close_to_reference(
            *host((out, q, k, v)), cu_seqlens_q=lengths, cu_seqlens_k=lengths, causal=True
        )


def test_float32_has_no_kernel():
    q, k, v = arrays(dtype=jnp.float32)
    if runs(q, k, v):
        pytest.skip("a kernel of this GPU takes float32")
    with pytest.raises(fc.UnsupportedError, match="float32"):
        fj.attention(q, k, v)


def test_an_empty_batch():
    q, k, v = arrays(0, 300, 4, 64)
    assert fj.attention(q, k, v).shape == q.shape


# ---- compiled programs ---------------------------------------------------------------------------


def layer(x, w, attention):
    q, k, v = (jnp.einsum("bsi,ihd->bshd", x, w[i]) for i in range(3))
    return x + jnp.einsum("bshd,ihd->bsi", attention(q, k, v), w[3])


def model(x, weights, attention):
    step = jax.checkpoint(lambda x, w: (layer(x, w, attention), None))
    y = jax.lax.scan(step, x, weights)[0]
    return jnp.sin(y.astype(jnp.float32)).mean()


def test_scan_of_layers_against_jax_nn():
    """Many calls beside XLA's own kernels, on the stream that XLA chose."""
    (x,) = arrays(2, 512, 256, count=1)
    (weights,) = arrays(4, 4, 256, 4, 64, count=1)
    weights = weights * 0.06
    ours = functools.partial(fj.attention, causal=True)
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    q = jnp.zeros((2, 512, 4, 64), jnp.bfloat16)
    if not runs(q, q, q, "backward", causal=True):
        pytest.skip("no kernel of this GPU runs backward")
    run = lambda f: jax.jit(jax.value_and_grad(functools.partial(model, attention=f), (0, 1)))
    step = run(ours)
    got = step(x, weights)
    assert_close(got, run(theirs)(x, weights))
    for _ in range(20):  # a race would show sooner or later
        assert_close(step(x, weights), got)


def test_forward_is_repeatable_among_other_work():
    q, k, v = arrays(4, 2048, 8, 128)

    @jax.jit
    def busy(q, k, v):
        noise = jnp.tanh(jnp.einsum("bshd,bthd->bhst", q, k)).sum()
        return fj.attention(q * 2, k * 2, v * 2, causal=True), noise

    want = busy(q, k, v)[0]
    for _ in range(20):
        assert_equal(busy(q, k, v)[0], want)


def test_cuda_graphs():
    """The custom call may be recorded: XLA makes graphs of five commands in a row and more."""
    q, k, v = arrays(2, 512, 8, 64)

    def chain(q, k, v):
        for _ in range(8):
            q = fj.attention(q, k, v, causal=True)
        return q

    call = jax.jit(chain)
    want = chain(q, k, v)
    assert_equal(call(q, k, v), want)
    for scale in (1, 2, 0.5, 1):  # new buffers, new values
        assert_equal(call(q * scale, k, v), chain(q * scale, k, v))
    assert_equal(call(q, k, v), want)


def test_cuda_graph_of_dropout_with_new_keys():
    q, k, v = arrays()
    if not runs(q, k, v, dropout_p=0.5, rng=(0, 0)):
        pytest.skip("no kernel takes dropout")
    call = jax.jit(lambda q, k, v, key: fj.attention(q, k, v, dropout_p=0.5, rng=key))
    first, again, other = (call(q, k, v, jax.random.key(n)) for n in (1, 1, 2))
    assert_equal(first, again)
    assert (host(first) != host(other)).any()


def test_vmap():
    q, k, v = (jnp.stack([x, -x, x * 2]) for x in arrays())
    call = functools.partial(fj.attention, causal=True)
    want = jnp.stack([call(q[i], k[i], v[i]) for i in range(3)])
    assert_close(jax.jit(jax.vmap(call))(q, k, v), want)


def test_dot_product_attention():
    q, k, v = arrays()
    for options in ({}, {"is_causal": True}, {"local_window_size": (40, 0)}):
        got, want = (
            jax.jit(functools.partial(f, **options))(q, k, v)
            for f in (fj.dot_product_attention, jax.nn.dot_product_attention)
        )
        assert_close(got, want)


def test_the_cpu_of_the_same_process():
    """One program for each platform, chosen by where the arrays are."""
    q, k, v = arrays()
    call = jax.jit(functools.partial(fj.attention, causal=True))
    cpu = [jax.device_put(x, jax.devices("cpu")[0]) for x in (q, k, v)]
    assert_close(host(call(*cpu)), host(call(q, k, v)))
    assert fj.explain(*cpu).backend == "cpu" and fj.explain(q, k, v).backend != "cpu"


# ---- errors --------------------------------------------------------------------------------------


def test_the_neutral_function_names_this_one():
    q, k, v = arrays()
    with pytest.raises(fc.UnsupportedError, match=r"on a GPU.*flashcore\.jax\.attention"):
        fc.attention(q, k, v)


def test_explain():
    q, k, v = arrays()
    plan = fj.explain(q, k, v, causal=True)
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    assert fj.explain(shape, shape, shape, causal=True, platform="gpu") == plan
    assert plan.kernel


# ---- several devices -----------------------------------------------------------------------------


@pytest.fixture
def two():
    found = jax.devices("gpu")
    if len(found) < 2:
        pytest.skip("one CUDA device")
    return found[:2]


def test_the_device_of_the_arrays(two):
    q, k, v = arrays()
    want = fj.attention(q, k, v, causal=True)
    got = fj.attention(*(jax.device_put(x, two[1]) for x in (q, k, v)), causal=True)
    assert got.devices() == {two[1]}
    assert_equal(got, want)


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")], ids=["batch", "heads"])
def test_divided_over_two_devices(two, spec):
    q, k, v = arrays()
    mesh = jax.make_mesh((2,), ("x",), devices=two, axis_types=(jax.sharding.AxisType.Auto,))
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
    program = jax.jit(functools.partial(fj.attention, causal=True)).lower(*placed).compile()
    assert "all-gather" not in program.as_text()
    assert_close(host(program(*placed)), host(fj.attention(q, k, v, causal=True)))
