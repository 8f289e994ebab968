"""flashcore.jax.attention: values, gradients, and what JAX's transformations do with them."""

from __future__ import annotations

import functools

import cases
import pytest

jax = pytest.importorskip("jax", minversion="0.10")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.test_util import check_grads  # noqa: E402
from jax_arrays import assert_close, assert_equal, case_arrays, plain, randoms  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.jax as fj  # noqa: E402
from flashcore.testing import (  # noqa: E402
    assert_close_to_reference,
    assert_grads_close_to_reference,
)

SHAPES = (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)


@pytest.fixture(autouse=True)
def doubles_exist():
    with jax.enable_x64(True):
        yield


def run(arrays, options):
    """Result and Grads of the loss sum(out * dout) + sum(lse * dlse), compiled."""
    leaves = {name: arrays[name] for name in "qkv"}
    leaves |= {name: options[name] for name in ("bias", "sinks") if name in options}
    rest = {name: x for name, x in options.items() if name not in leaves}

    @jax.jit
    def call(leaves):
        return fj.attention(**leaves, **rest, return_lse=True, return_max_logits=True)

    result, pull = jax.vjp(call, leaves)
    (grads,) = pull(
        fc.Result(
            arrays["dout"].astype(result.out.dtype),
            arrays["dlse"],
            jnp.zeros_like(result.max_logits),
        )
    )
    return result, fc.Grads(*(grads.get(name) for name in ("q", "k", "v", "bias", "sinks")))


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.BACKWARD + cases.VARLEN, ids=str)
def test_has_the_bits_of_the_core(case):
    arrays, options = case_arrays(case)
    if case.packed_q is not None and (case.bias or case.mask):
        options |= {"max_seqlen_q": max(case.packed_q), "max_seqlen_k": max(case.packed_k)}
    result, grads = run(arrays, options)
    q, k, v = (arrays[name] for name in "qkv")
    want = fc.attention(q, k, v, return_lse=True, return_max_logits=True, **options)
    options.pop("out_dtype", None)
    want_grads = fc.attention_backward(
        arrays["dout"], q, k, v, want.out, want.lse, dlse=arrays["dlse"], **options
    )
    assert_equal(result, want)
    for got, expected in zip(grads, want_grads, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or (got == expected.astype(got.dtype)).all()


@pytest.mark.parametrize("case", cases.COMBINATIONS, ids=str)
def test_matches_float64(case):
    arrays, options = case_arrays(case)
    result, grads = run(arrays, options)
    q, k, v, dout, dlse = (arrays[name] for name in ("q", "k", "v", "dout", "dlse"))
    assert_close_to_reference(result, q, k, v, **options)
    assert_grads_close_to_reference(grads, dout, q, k, v, dlse=dlse, **options)


@pytest.mark.parametrize("out_dtype", ["float32", jnp.float32, np.float32])
def test_out_dtype(out_dtype):
    q, k, v = randoms(*SHAPES, dtype=jnp.bfloat16)
    out = fj.attention(q, k, v, out_dtype=out_dtype)
    assert out.dtype == jnp.float32
    assert_equal(out, fc.attention(q, k, v, out_dtype="float32"))


def test_what_is_returned():
    q, k, v = randoms(*SHAPES)
    assert isinstance(fj.attention(q, k, v), jax.Array)
    result = fj.attention(q, k, v, return_max_logits=True)
    assert isinstance(result, fc.Result) and result.lse is None and result.max_logits is not None


def test_numpy_arrays_of_dtypes_that_jax_has():
    q, k, v = (np.asarray(x) for x in randoms(*SHAPES))
    assert_equal(fj.attention(q, k, v), fc.attention(q, k, v))


def test_lengths_may_be_traced():
    q, k, v = randoms((3, 4, 2, 8), (3, 9, 2, 8), (3, 9, 2, 8))
    call = jax.jit(lambda n: fj.attention(q, k, v, seqlens_k=n, causal=True))
    for lengths in ([9, 3, 0], [1, 9, 4]):
        n = jnp.array(lengths, jnp.int32)
        assert_equal(call(n), fc.attention(q, k, v, seqlens_k=n, causal=True))


def test_the_number_of_threads_may_change_after_compilation():
    q, k, v = randoms((4, 200, 4, 64), (4, 200, 4, 64), (4, 200, 4, 64))
    before = fc.get_num_threads()
    try:
        fc.set_num_threads(1)
        call = jax.jit(jax.grad(lambda q: fj.attention(q, k, v).sum()))
        want = call(q)
        for n in (3, 2):
            fc.set_num_threads(n)
            assert_equal(call(q), want)
    finally:
        fc.set_num_threads(before)


def test_the_smallest_numbers_are_kept():
    """XLA's threads flush them to zero, ours do not: whoever computes a row, it is the same."""
    v = jnp.full((8, 64, 4, 16), 1e-41, jnp.float32)
    q = jnp.zeros_like(v)
    for _ in range(20):
        out = fj.attention(q, q, v)
        assert (np.asarray(out).view(np.int32) != 0).all()
        assert_equal(
            np.asarray(out).view(np.int32), np.asarray(fc.attention(q, q, v)).view(np.int32)
        )


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window_size": (3, None)},
        {"softcap": 2.0, "scale": 0.7},
        {"dropout_p": 0.3, "rng": (2**64 - 1, 5)},
        {"alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4], np.float32)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_gradients_by_differences(options):
    inputs = randoms(*SHAPES, (1, 4, 1, 7))

    def function(q, k, v, bias):
        return fj.attention(q, k, v, bias=bias, return_lse=True, **options)[:2]

    check_grads(function, inputs, order=1, modes=["rev"], rtol=1e-5, atol=1e-5)


def test_only_lse_is_used():
    q, k, v = randoms(*SHAPES)
    got = jax.grad(lambda q, k: jnp.sin(fj.attention(q, k, v, return_lse=True).lse).sum(), (0, 1))
    want = jax.grad(lambda q, k: jnp.sin(plain(q, k, v)[1]).sum(), (0, 1))
    assert_close(got(q, k), want(q, k))


def test_max_logits_has_no_gradient():
    q, k, v = randoms(*SHAPES)
    grad = jax.grad(lambda q: fj.attention(q, k, v, return_max_logits=True).max_logits.sum())(q)
    assert not grad.any()


def backward_spec(function, *arguments):
    """The backward call that a function's gradient makes."""
    specs = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "flashcore_attention_backward":
                specs.append(equation.params["spec"])
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
            ):
                if hasattr(inner, "jaxpr"):
                    visit(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    (spec,) = set(specs)
    return spec


def test_gradients_that_nobody_wants_are_not_computed():
    """That of a bias has the size of the scores."""
    q, k, v, bias = randoms(*SHAPES, (1, 4, 5, 7))
    loss = lambda q, bias: fj.attention(q, k, v, bias=bias).sum()
    assert "dbias" not in backward_spec(jax.grad(loss), q, bias).results
    spec = backward_spec(jax.grad(loss, 1), q, bias)
    assert "dbias" in spec.results and "dlse" not in spec.operands


def test_which_gradients_are_wanted_may_change():
    """The traces that JAX keeps of one loss do not mix."""
    q, k, v, bias = randoms(*SHAPES, (1, 4, 5, 7))
    ours = lambda q, bias: jnp.sin(fj.attention(q, k, v, bias=bias)).sum()
    theirs = lambda q, bias: jnp.sin(plain(q, k, v, bias)[0]).sum()
    for argument in (0, 1, 0, (0, 1), 1):
        want = jax.grad(theirs, argument)(q, bias)
        assert_close(jax.grad(ours, argument)(q, bias), want)
        assert_close(jax.jit(jax.grad(ours, argument))(q, bias), want)


def test_which_results_are_used_may_change():
    q, k, v = randoms(*SHAPES)
    ours = lambda q: fj.attention(q, k, v, return_lse=True)[:2]
    theirs = lambda q: plain(q, k, v)
    out_alone, lse_alone = lambda out, lse: out.sum(), lambda out, lse: lse.sum()
    both = lambda out, lse: jnp.sin(out).sum() + jnp.sin(lse).sum()
    for loss in (out_alone, lse_alone, both, lse_alone, out_alone):
        got, want = (jax.grad(lambda q, f=f, loss=loss: loss(*f(q)))(q) for f in (ours, theirs))
        assert_close(got, want)


@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "sinks"])
def test_one_input_is_differentiated(which):
    q, k, v, bias = randoms(*SHAPES, (1, 4, 5, 7))
    inputs = {"q": q, "k": k, "v": v, "bias": bias, "sinks": jnp.zeros(4, jnp.float32)}
    if which != "sinks":
        del inputs["sinks"]
    grad = jax.grad(lambda x: fj.attention(**{**inputs, which: x}).sum())(inputs[which])
    assert abs(grad).max() > 1e-4 and grad.dtype == inputs[which].dtype


def test_sinks_by_definition():
    """A sink is one more key with that score and no value."""
    q, k, v = randoms(*SHAPES)
    sinks = jnp.array([0.5, -1.0, 0.0, 2.0], jnp.float32)

    def definition(q, k, v, sinks):
        s = jnp.einsum("bshd,bthd->bhst", q, jnp.repeat(k, 2, 2)) * 8**-0.5
        column = jnp.broadcast_to(sinks.astype(s.dtype)[None, :, None, None], (2, 4, 5, 1))
        p = jax.nn.softmax(jnp.concatenate([s, column], -1), -1)[..., :-1]
        return jnp.sin(jnp.einsum("bhst,bthd->bshd", p, jnp.repeat(v, 2, 2))).sum()

    ours = lambda q, k, v, sinks: jnp.sin(fj.attention(q, k, v, sinks=sinks)).sum()
    every = (0, 1, 2, 3)
    assert_close(
        jax.grad(ours, every)(q, k, v, sinks), jax.grad(definition, every)(q, k, v, sinks), 1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_gradient_of_a_16_bit_bias_has_its_dtype(dtype):
    q, k, v, bias = randoms(*SHAPES, (1, 4, 5, 7), dtype=dtype)
    grad = jax.grad(lambda bias: fj.attention(q, k, v, bias=bias).astype(jnp.float32).sum())(bias)
    assert grad.dtype == dtype


def test_shared_input_sums_its_gradients():
    (x,) = randoms((1, 6, 2, 8))
    ours = jax.grad(lambda x: jnp.sin(fj.attention(x, x, x, causal=True)).sum())
    theirs = jax.grad(lambda x: jnp.sin(plain(x, x, x, causal=True)[0]).sum())
    assert_close(ours(x), theirs(x))


# ---- transformations -----------------------------------------------------------------------------


def layer(x, w, call=fj.attention):
    q, k, v = (jnp.einsum("bsi,ihd->bshd", x, w[i]) for i in range(3))
    out = call(q, k, v, causal=True)
    return x + jnp.sin(jnp.einsum("bshd,ihd->bsi", out, w[3]))


def reference_layer(x, w):
    return layer(x, w, lambda q, k, v, causal: plain(q, k, v, causal=causal)[0])


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_scan_over_layers(remat):
    x, weights = randoms((2, 6, 8), (3, 4, 8, 2, 4))

    def model(layer, x, weights):
        step = lambda x, w: (layer(x, w), None)
        step = jax.checkpoint(step) if remat else step
        return jnp.sin(jax.lax.scan(step, x, weights)[0]).sum()

    gradient = lambda layer: jax.jit(jax.grad(functools.partial(model, layer), (0, 1)))
    assert_close(gradient(layer)(x, weights), gradient(reference_layer)(x, weights))


@pytest.mark.parametrize("learned", [True, False])
def test_scan_with_a_bias_for_each_layer(learned):
    x, bias = randoms((2, 6, 2, 4), (3, 1, 2, 6, 6))

    def model(call, x, bias):
        step = jax.checkpoint(lambda x, b: (jnp.sin(call(x, x, x, bias=b)), None))
        return jax.lax.scan(step, x, bias)[0].sum()

    arguments = (0, 1) if learned else 0
    ours, theirs = (
        jax.jit(jax.grad(functools.partial(model, call), arguments))(x, bias)
        for call in (fj.attention, lambda *args, bias: plain(*args, bias)[0])
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    "policy", [None, "nothing_saveable", "everything_saveable", "dots_saveable"]
)
def test_checkpoint(policy):
    x, w = randoms((2, 6, 8), (4, 8, 2, 4))
    policy = getattr(jax.checkpoint_policies, policy) if policy else None
    ours = jax.checkpoint(lambda x, w: jnp.sin(layer(x, w)).sum(), policy=policy)
    theirs = lambda x, w: jnp.sin(reference_layer(x, w)).sum()
    assert_close(jax.jit(jax.grad(ours, (0, 1)))(x, w), jax.grad(theirs, (0, 1))(x, w))


def test_while_loop_and_cond():
    (x,) = randoms((1, 6, 2, 8))
    step = lambda x: fj.attention(x, x, x, causal=True)
    looped = jax.lax.fori_loop(0, 3, lambda _, x: step(x), x)
    assert_equal(looped, step(step(step(x))))
    assert_equal(jax.jit(lambda p: jax.lax.cond(p, step, lambda x: x, x))(True), step(x))


def test_linearize_and_jacrev():
    q, k, v = randoms((1, 3, 2, 4), (1, 3, 2, 4), (1, 3, 2, 4))
    ours = lambda q: fj.attention(q, k, v)
    theirs = lambda q: plain(q, k, v)[0]
    assert_close(jax.jacrev(ours)(q), jax.jacrev(theirs)(q))


def test_ahead_of_time_and_shapes_alone():
    q, k, v = randoms(*SHAPES)
    call = jax.jit(lambda q, k, v: fj.attention(q, k, v, causal=True))
    compiled = call.lower(q, k, v).compile()
    assert_equal(compiled(q, k, v), call(q, k, v))
    shape = jax.eval_shape(call, q, k, v)
    assert shape.shape == (2, 5, 4, 6) and shape.dtype == q.dtype


def test_export():
    q, k, v = randoms(*SHAPES)
    call = jax.jit(lambda q, k, v: fj.attention(q, k, v, causal=True))
    allowed = [jax.export.DisabledSafetyCheck.custom_call("flashcore_attention")]
    exported = jax.export.export(call, disabled_checks=allowed)(q, k, v)
    assert_equal(exported.call(q, k, v), call(q, k, v))


def test_block_mask_is_an_argument():
    q, k, v = randoms((1, 64, 2, 8), (1, 64, 2, 8), (1, 64, 2, 8))
    mask = fc.BlockMask.sliding(64, window_size=(16, 0), block=(16, 16))
    call = jax.jit(jax.value_and_grad(lambda q, mask: fj.attention(q, k, v, block_mask=mask).sum()))
    want = fc.attention(q, k, v, block_mask=mask)
    assert_close(call(q, mask)[0], want.sum())
    assert_close(call(q, mask.map(jnp.asarray))[0], want.sum())


def test_an_error_while_running_leaves_jax_usable():
    q, k, v = randoms((2, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8))
    call = jax.jit(lambda n: fj.attention(q, k, v, seqlens_k=n))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"seqlens_k\[1\] must be in 0\.\.4, got 5"
    ):
        call(jnp.array([1, 5], jnp.int32)).block_until_ready()
    assert_equal(call(jnp.array([4, 4], jnp.int32)), fj.attention(q, k, v))


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", [(3, 4), (2**64 - 1, 0), (-1, 0)])
def test_dropout_with_given_seeds(rng):
    (x,) = randoms((1, 16, 2, 8))
    want = fc.attention(x, x, x, dropout_p=0.5, rng=rng)
    assert_equal(fj.attention(x, x, x, dropout_p=0.5, rng=rng), want)
    bits = np.array([n % 2**64 for n in rng], np.uint64)
    for array in (bits.view(np.int64), bits.view(np.uint32)):
        call = jax.jit(lambda rng: fj.attention(x, x, x, dropout_p=0.5, rng=rng))
        assert_equal(call(jnp.asarray(array)), want)


def test_a_new_seed_is_no_new_program():
    (x,) = randoms((1, 16, 2, 8))
    outs = [fj.attention(x, x, x, dropout_p=0.5, rng=(seed, 0)) for seed in (5, 6)]
    before = fj.api._run._cache_size()
    fj.attention(x, x, x, dropout_p=0.5, rng=(7, 9))
    assert fj.api._run._cache_size() == before and (outs[0] != outs[1]).any()


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_dropout_with_keys(make):
    (x,) = randoms((1, 16, 2, 8))
    call = jax.jit(lambda key: fj.attention(x, x, x, dropout_p=0.5, rng=key))
    first, again, other = (call(make(seed)) for seed in (1, 1, 2))
    assert_equal(first, again)
    assert (first != other).any()


def test_checkpoint_drops_the_same():
    (x,) = randoms((1, 16, 2, 8))
    key = jax.random.key(0)
    loss = lambda x, key: jnp.sin(fj.attention(x, x, x, dropout_p=0.4, rng=key)).sum()
    assert_equal(jax.grad(jax.checkpoint(loss))(x, key), jax.grad(loss)(x, key))


def test_seeds_without_dropout_change_nothing():
    (x,) = randoms((1, 16, 2, 8))
    assert_equal(fj.attention(x, x, x, rng=jax.random.key(3)), fj.attention(x, x, x))
