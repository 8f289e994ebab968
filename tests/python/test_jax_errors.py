"""What flashcore.jax refuses: each argument with one clear error, while JAX traces."""

from __future__ import annotations

import pytest

jax = pytest.importorskip("jax", minversion="0.10")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from helpers import run_python  # noqa: E402
from jax_arrays import assert_equal, randoms  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.jax as fj  # noqa: E402

(X,) = randoms((1, 4, 2, 8), dtype=jnp.float32)

BAD = {
    "a list": ({"q": [1.0]}, fc.ArgumentTypeError, "q must be a JAX or NumPy array, got builtins"),
    "None": ({"k": None}, fc.ArgumentTypeError, "k must be a JAX or NumPy array, got .*NoneType"),
    "complex": ({"q": X + 1j}, fc.UnsupportedError, "q has dtype complex64"),
    "integers": ({"q": X.astype(jnp.int32)}, fc.UnsupportedError, "q has dtype int32"),
    "fp8": ({"q": X.astype(jnp.float8_e4m3fn)}, fc.UnsupportedError, "q has dtype float8_e4m3fn"),
    "dtypes that differ": (
        {"k": X.astype(jnp.bfloat16)},
        fc.ArgumentError,
        r"k must have q's dtype float32, got bfloat16\[1,4,2,8\]",
    ),
    "three dimensions": ({"q": X[0]}, fc.ArgumentError, "q must have 4 dimensions"),
    "nine dimensions": ({"q": X[(None,) * 5]}, fc.ArgumentError, "q has 9 dimensions"),
    "batches that differ": (
        {"k": jnp.ones((2, 4, 2, 8)), "v": jnp.ones((2, 4, 2, 8))},
        fc.ArgumentError,
        "one batch size",
    ),
    "heads that do not divide": (
        {"q": jnp.ones((1, 4, 3, 8))},
        fc.ArgumentError,
        "multiple of k's",
    ),
    "a mask of numbers": ({"mask": jnp.ones((1, 1, 4, 4))}, fc.ArgumentError, "mask must be bool"),
    "a bias of 16 bits": (
        {"bias": jnp.ones((1, 1, 4, 4), jnp.bfloat16)},
        fc.ArgumentError,
        "bias must be float32",
    ),
    "lengths of 16 bits": (
        {"seqlens_k": jnp.ones(1, jnp.int16)},
        fc.ArgumentError,
        "seqlens_k must be int32",
    ),
    "NumPy's doubles": (
        {"bias": np.ones((1, 1, 4, 4))},
        fc.ArgumentError,
        r"bias is a NumPy array of float64, which JAX would make float32.*jax_enable_x64",
    ),
    "half a packing": ({"cu_seqlens_q": jnp.zeros(2, jnp.int32)}, fc.ArgumentError, "go together"),
    "causal as a number": ({"causal": 1}, fc.ArgumentTypeError, "causal must be True or False"),
    "causal as an array": (
        {"causal": jnp.array(True)},
        fc.ArgumentTypeError,
        "causal must be True or False.*static_argnames='causal'",
    ),
    "scale as an array": (
        {"scale": jnp.float32(1)},
        fc.ArgumentTypeError,
        "scale must be a number.*static_argnames='scale'",
    ),
    "scale as text": ({"scale": "1"}, fc.ArgumentTypeError, "scale must be a number, got '1'"),
    "no causal": ({"causal": None}, fc.ArgumentTypeError, "causal must be True or False, got None"),
    "window of one": ({"window_size": 3}, fc.ArgumentTypeError, "window_size must be a pair"),
    "window of fractions": (
        {"window_size": (1.5, None)},
        fc.ArgumentTypeError,
        r"window_size\[0\] must be an integer",
    ),
    "layout": ({"layout": "sbhd"}, fc.ArgumentError, "layout must be 'bshd' or 'bhsd', got 'sbhd'"),
    "align": ({"align": "left"}, fc.ArgumentError, "align must be 'bottom_right' or 'top_left'"),
    "softcap": ({"softcap": -1.0}, fc.ArgumentError, "softcap must be finite and >= 0"),
    "dropout": ({"dropout_p": 1.5, "rng": (0, 0)}, fc.ArgumentError, r"dropout_p must be in \[0"),
    "dropout without seeds": (
        {"dropout_p": 0.5},
        fc.ArgumentError,
        r"rng is required.*random\.key",
    ),
    "half a seed": ({"dropout_p": 0.5, "rng": 3}, fc.ArgumentTypeError, "rng must be a key of jax"),
    "a wide seed": ({"dropout_p": 0.5, "rng": (2**64, 0)}, fc.ArgumentError, r"rng\[0\].*64 bits"),
    "many keys": (
        {"dropout_p": 0.5, "rng": jax.random.split(jax.random.key(0), 3)},
        fc.ArgumentError,
        "rng must be one key",
    ),
    "a block mask for other lengths": (
        {"block_mask": fc.BlockMask.from_dense(np.ones((3, 4), bool), block=(4, 4))},
        fc.ArgumentError,
        "block_mask is for seqlen_q 3",
    ),
    "a block mask of another kind": (
        {"block_mask": jnp.ones((4, 4), bool)},
        fc.ArgumentTypeError,
        "block_mask must be a flashcore.BlockMask.*from_dense",
    ),
    "pages": (
        {"page_table": jnp.zeros((1, 1), jnp.int32)},
        fc.UnsupportedError,
        "page_table is not",
    ),
    "out_dtype": ({"out_dtype": "int8"}, fc.ArgumentError, "out_dtype must be None"),
    "return_lse": ({"return_lse": 1}, fc.ArgumentTypeError, "return_lse must be True or False"),
    "out": ({"out": X}, fc.UnsupportedError, "out= is not an option of flashcore.jax"),
    "stream": ({"stream": 0}, fc.UnsupportedError, "stream= is not an option of flashcore.jax"),
    "a word that is no option": ({"colour": 1}, TypeError, "unexpected keyword argument 'colour'"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments(name):
    change, error, message = BAD[name]
    arguments = {"q": X, "k": X, "v": X, **change}
    with pytest.raises(error, match=message):
        fj.attention(**arguments)
    static = {n: x for n, x in arguments.items() if not isinstance(x, jax.Array)}
    traced = {n: x for n, x in arguments.items() if isinstance(x, jax.Array)}
    with pytest.raises(error, match=message.partition(".*static")[0]):
        jax.jit(lambda traced: fj.attention(**traced, **static))(traced)


@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_arrays_of_others(framework):
    other = pytest.importorskip(framework)
    if framework == "cupy" and not other.cuda.is_available():
        pytest.skip("CuPy sees no CUDA device")
    with pytest.raises(
        fc.ArgumentTypeError, match=r"q must be a JAX or NumPy.*flashcore\.attention"
    ):
        fj.attention(other.zeros((1, 4, 2, 8)), X, X)


def test_the_neutral_functions_name_this_one():
    for transform in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(fc.ArgumentError, match=r"traced JAX value.*flashcore\.jax\.attention"):
            transform(lambda q: fc.attention(q, X, X).sum())(X)
    with pytest.raises(
        fc.ArgumentError, match="out is an output, but a JAX array may not be written"
    ):
        fc.attention(X, X, X, out=jnp.zeros_like(X))


def test_a_gradient_of_a_gradient():
    inner = lambda x: jax.grad(lambda x: fj.attention(x, X, X).sum())(x).sum()
    for twice in (jax.grad(inner), jax.jit(jax.grad(inner)), jax.hessian(lambda x: inner(x))):
        with pytest.raises(fc.UnsupportedError, match=r"gradient of a gradient.*jax\.nn"):
            twice(X)


def test_forward_mode():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: fj.attention(x, X, X), (X,), (X,))


def test_alibi_slopes_have_no_gradient():
    slopes = jnp.ones(2)
    loss = lambda slopes: fj.attention(X, X, X, alibi_slopes=slopes).sum()
    with pytest.raises(fc.UnsupportedError, match=r"alibi_slopes is differentiated.*stop_gradient"):
        jax.grad(loss)(slopes)
    stopped = jax.grad(lambda s: loss(jax.lax.stop_gradient(s)) + s.sum())(slopes)
    assert_equal(stopped, jnp.ones(2))


def test_packed_scores_need_the_longest_length():
    q, lengths = X.reshape(4, 2, 8), jnp.array([0, 3, 4], jnp.int32)
    options = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "bias": jnp.zeros((1, 1, 3, 3))}
    with pytest.raises(
        fc.ArgumentError, match=r"bias must broadcast.*max_seqlen_q and max_seqlen_k"
    ):
        fj.attention(q, q, q, **options)
    fj.attention(q, q, q, **options, max_seqlen_q=3, max_seqlen_k=3)


def test_another_platform():
    call = jax.jit(lambda q: fj.attention(q, q, q))
    with pytest.raises(fc.UnsupportedError, match="lowered for tpu.*cpu and cuda"):
        call.trace(X).lower(lowering_platforms=("tpu",))


# ---- explain -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_explain_is_that_of_the_core(direction):
    options = {"causal": True, "softcap": 2.0, "bias": jnp.zeros((1, 2, 4, 4)), "out_dtype": None}
    got = fj.explain(X, X, X, direction=direction, return_lse=True, **options)
    assert got == fc.explain(X, X, X, direction=direction, **options)


def test_explain_of_shapes_and_traced_values():
    want = fj.explain(X, X, X, causal=True)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    assert fj.explain(shape, shape, shape, causal=True, platform="cpu") == want
    assert fj.explain(shape, shape, shape, platform="cpu", seqlens_k=lengths).kernel == want.kernel
    dropped = fj.explain(
        shape, shape, shape, platform="cpu", dropout_p=0.5, rng=jax.eval_shape(jax.random.key, 0)
    )
    assert dropped.kernel == want.kernel
    seen = []
    jax.jit(lambda x: seen.append(fj.explain(x, x, x, causal=True, platform="cpu")) or x)(X)
    assert seen == [want]


def test_explain_refuses():
    with pytest.raises(fc.ArgumentError, match="direction must be"):
        fj.explain(X, X, X, direction="sideways")
    with pytest.raises(fc.ArgumentError, match="platform must be"):
        fj.explain(X, X, X, platform="tpu")
    with pytest.raises(TypeError, match="colour"):
        fj.explain(X, X, X, colour=1)


# ---- imports -------------------------------------------------------------------------------------


def test_flashcore_does_not_import_jax():
    code = "import sys, flashcore; print('jax' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_flashcore_registers_nothing():
    code = """
import flashcore as fc, jax
mask = fc.BlockMask.sliding(64, window_size=(16, 0), block=(16, 16))
assert jax.tree.leaves(mask) == [mask]
import flashcore.jax
assert len(jax.tree.leaves(mask)) == 4
print("registered", "torch" in sys.modules)
"""
    assert run_python(code).strip() == "registered False"


def test_importing_starts_no_backend():
    code = """
import flashcore.jax
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert run_python(code).strip() == "False"
