"""What is to hold of arrays that are divided over devices. test_jax_sharding.py runs this file with
four virtual CPU devices, in a process of its own: how many there are is decided when JAX starts.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python tests/python/jax_on_four_devices.py
"""

from __future__ import annotations

import functools
import json
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax_arrays import assert_close, assert_equal, plain, randoms

import flashcore as fc
import flashcore.jax as fj

COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\b")
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def mesh(batch=2, heads=2, explicit=False):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    return jax.make_mesh((batch, heads), ("batch", "heads"), axis_types=(kind, kind))


def put(m, specs, arrays):
    return [jax.device_put(x, NamedSharding(m, spec)) for x, spec in zip(arrays, specs)]


def compiled(function, *args):
    """What it gives, and the collectives in its HLO, by name."""
    program = jax.jit(function).lower(*args).compile()
    return program(*args), sorted(set(COLLECTIVE.findall(program.as_text())))


def inputs(heads=4, groups=4, batch=4, dtype=jnp.float32):
    return randoms(
        (batch, 16, heads, 8), (batch, 24, groups, 8), (batch, 24, groups, 8), dtype=dtype
    )


def gradients(*args, **options):
    """out, lse and the gradients of a function of them."""

    def loss(*args):
        out, lse, _ = fj.attention(*args, return_lse=True, **options)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    return fj.attention(*args, **options), jax.grad(loss, (0, 1, 2))(*args)


BSHD = P("batch", None, "heads")


def same_when_divided(m, specs, arrays, function, collectives=(), tolerance=2e-6):
    """Divided it gives what it gives undivided, where its results are, without talking."""
    want = jax.jit(function)(*arrays)
    got, talk = compiled(function, *put(m, specs, arrays))
    assert set(talk) <= set(collectives), talk
    assert_close(jax.device_get(got), jax.device_get(want), tolerance)
    return got


# ---- jit: custom_partitioning --------------------------------------------------------------------


@check
def batch_and_heads():
    got = same_when_divided(mesh(), [BSHD] * 3, inputs(), functools.partial(gradients, causal=True))
    for x in jax.tree.leaves(got):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh(), BSHD), 4), x.sharding


@check
def the_bits_are_those_of_one_device():
    arrays = inputs()
    want = jax.jit(fj.attention)(*arrays)
    got, talk = compiled(fj.attention, *put(mesh(), [BSHD] * 3, arrays))
    assert not talk
    assert_equal(jax.device_get(got), jax.device_get(want))


@check
def batch_alone():
    same_when_divided(mesh(4, 1), [P("batch")] * 3, inputs(), gradients)


@check
def both_axes_on_the_batch():
    same_when_divided(mesh(), [P(("batch", "heads"))] * 3, inputs(), gradients)


@check
def heads_alone():
    same_when_divided(mesh(1, 4), [P(None, None, "heads")] * 3, inputs(), gradients)


@check
def heads_first():
    arrays = [x.swapaxes(1, 2) for x in inputs(8, 4)]
    same_when_divided(
        mesh(), [P("batch", "heads")] * 3, arrays, functools.partial(gradients, layout="bhsd")
    )


@check
def grouped_heads():
    same_when_divided(mesh(), [BSHD] * 3, inputs(8, 2), functools.partial(gradients, causal=True))


@check
def one_key_head_on_every_device():
    """Query heads divided, the key head repeated: its gradient is a sum over devices."""
    specs = [BSHD, P("batch"), P("batch")]
    arrays = inputs(4, 1)
    same_when_divided(mesh(), specs, arrays, fj.attention)
    same_when_divided(mesh(), specs, arrays, gradients, ["all-reduce"])


@check
def more_devices_than_key_heads():
    specs = [P(None, None, "heads"), P(), P()]
    same_when_divided(mesh(1, 4), specs, inputs(8, 2), gradients, ["all-reduce", "all-gather"])


@check
def lengths_cannot_be_divided():
    """Correct, with communication."""
    same_when_divided(
        mesh(), [P("batch", "heads")] * 3, inputs(), gradients, ["all-gather", "all-reduce"]
    )


@check
def inputs_that_disagree():
    specs = [BSHD, P(None, "batch"), P()]
    every = ["all-gather", "all-reduce", "all-to-all", "collective-permute"]
    same_when_divided(mesh(), specs, inputs(), gradients, every)


@check
def a_batch_that_does_not_divide():
    arrays = [x[:3] for x in inputs()]
    m = mesh()

    def function(*args):
        args = [jax.lax.with_sharding_constraint(x, NamedSharding(m, BSHD)) for x in args]
        return gradients(*args)

    want = jax.jit(gradients)(*arrays)
    assert_close(jax.device_get(jax.jit(function)(*arrays)), jax.device_get(want), 2e-6)


@check
def options_with_a_batch_or_heads():
    q, k, v = inputs(4, 2)
    options = {
        "bias": randoms((4, 4, 16, 24), dtype=jnp.float32)[0],
        "mask": jax.random.bernoulli(jax.random.key(1), 0.8, (4, 1, 1, 24)),
        "sinks": jnp.linspace(-1, 1, 4, dtype=jnp.float32),
        "alibi_slopes": jnp.full((4, 4), 0.1, jnp.float32),
        "seqlens_q": jnp.array([16, 9, 16, 3], jnp.int32),
        "seqlens_k": jnp.array([24, 5, 20, 24], jnp.int32),
        "q_offset": jnp.array([8, -2, 8, 0], jnp.int32),
    }
    names = list(options)
    specs = [P("batch", "heads"), P("batch"), P("heads"), P("batch", "heads")]
    specs += [P("batch")] * 3

    def function(q, k, v, *values):
        return gradients(q, k, v, causal=True, **dict(zip(names, values)))

    arrays = [q, k, v, *options.values()]
    same_when_divided(mesh(), [BSHD] * 3 + specs, arrays, function)


@check
def gradients_of_what_devices_share():
    """A bias that all batches share, and sinks: sums over the devices that have the batches."""
    q, k, v = inputs(4, 2)
    bias = randoms((1, 4, 16, 24), dtype=jnp.float32)[0]
    sinks = jnp.linspace(-1, 1, 4, dtype=jnp.float32)

    def function(q, k, v, bias, sinks):
        loss = lambda *args: jnp.sin(fj.attention(*args[:3], bias=args[3], sinks=args[4])).sum()
        return jax.grad(loss, (0, 1, 2, 3, 4))(q, k, v, bias, sinks)

    specs = [BSHD] * 3 + [P(None, "heads"), P("heads")]
    same_when_divided(
        mesh(), specs, [q, k, v, bias, sinks], function, ["all-reduce"], tolerance=2e-5
    )


@check
def block_masks():
    q, k, v = inputs()
    kept = np.random.default_rng(0).random((4, 4, 2, 3)) < 0.6
    mask = fc.BlockMask.from_dense(kept.repeat(8, 2).repeat(8, 3), (8, 8)).map(jnp.asarray)
    m = mesh()
    spread = jax.device_put(mask, NamedSharding(m, P("batch", "heads")))
    function = lambda q, k, v, mask: gradients(q, k, v, block_mask=mask)
    want = jax.jit(function)(q, k, v, mask)
    got, talk = compiled(function, *put(m, [BSHD] * 3, [q, k, v]), spread)
    assert not talk, talk
    assert_close(jax.device_get(got), jax.device_get(want), 2e-6)


@check
def packed_sequences_divide_by_heads():
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in inputs(4, 2))
    cu_q, cu_k = (jnp.array([0, n, 3 * n, 4 * n], jnp.int32) for n in (16, 24))
    slopes, offsets = jnp.full((3, 4), 0.1, jnp.float32), jnp.array([3, 0, 8], jnp.int32)

    def function(q, k, v, a, b, slopes, offsets):
        rows = {"alibi_slopes": slopes, "q_offset": offsets, "causal": True}
        return gradients(q, k, v, cu_seqlens_q=a, cu_seqlens_k=b, **rows)

    specs = [P(None, "heads")] * 3 + [P()] * 2 + [P(None, "heads"), P()]
    same_when_divided(mesh(), specs, [q, k, v, cu_q, cu_k, slopes, offsets], function)


@check
def dropout_is_not_divided():
    """Its bits depend on the index in the whole batch, so every device computes all of it."""
    function = functools.partial(gradients, dropout_p=0.5, rng=(1, 2))
    same_when_divided(mesh(), [BSHD] * 3, inputs(), function, ["all-gather"])


@check
def vmap_of_divided_arrays():
    arrays = [jnp.stack([x, -x]) for x in inputs()]
    specs = [P(None, "batch", None, "heads")] * 3
    want = jax.jit(jax.vmap(fj.attention))(*arrays)
    got, _ = compiled(jax.vmap(fj.attention), *put(mesh(), specs, arrays))
    assert_equal(jax.device_get(got), jax.device_get(want))


@check
def scan_and_checkpoint():
    q, k, v = inputs()

    def function(q, k, v):
        def step(q, _):
            return fj.attention(q, k, v, causal=True), None

        loss = lambda q: jnp.sin(jax.lax.scan(jax.checkpoint(step), q, length=3)[0]).sum()
        return jax.grad(loss)(q)

    same_when_divided(mesh(), [BSHD] * 3, [q, k, v], function)


@check
def with_a_mesh_in_context():
    with jax.set_mesh(mesh()):
        same_when_divided(mesh(), [BSHD] * 3, inputs(8, 4), gradients)


@check
def in_bfloat16():
    same_when_divided(mesh(), [BSHD] * 3, inputs(dtype=jnp.bfloat16), fj.attention)


# ---- axes that are explicit ----------------------------------------------------------------------


@check
def explicit_axes():
    m = mesh(explicit=True)
    arrays = inputs(8, 4)
    want = jax.jit(gradients)(*arrays)
    with jax.set_mesh(m):
        placed = put(m, [BSHD] * 3, arrays)
        got, talk = compiled(gradients, *placed)
        out = jax.eval_shape(jax.jit(fj.attention), *placed)
        assert out.sharding.spec == P("batch", None, "heads", None), out.sharding
    assert not talk, talk
    assert_close(jax.device_get(got), jax.device_get(want), 2e-6)


# ---- shard_map -----------------------------------------------------------------------------------


def mapped(m, function, specs, out_specs, arrays, **options):
    f = jax.shard_map(function, mesh=m, in_specs=tuple(specs), out_specs=out_specs, **options)
    return compiled(f, *put(m, specs, arrays))


@check
def shard_map():
    for check_vma in (True, False):
        arrays = inputs(8, 4)
        want = jax.jit(functools.partial(gradients, causal=True))(*arrays)
        got, talk = mapped(
            mesh(),
            functools.partial(gradients, causal=True),
            [BSHD] * 3,
            (BSHD, (BSHD,) * 3),
            arrays,
            check_vma=check_vma,
        )
        assert not talk, talk
        assert_close(jax.device_get(got), jax.device_get(want), 2e-6)


@check
def shard_map_with_an_input_that_devices_share():
    """Outside of shard_map its gradient is the sum over devices."""
    q, k, v = inputs()
    bias = randoms((1, 1, 16, 24), dtype=jnp.float32)[0]
    m = mesh()

    def loss(attention, bias):
        return jnp.sin(attention(q, k, v, bias)).sum()

    whole = lambda q, k, v, bias: fj.attention(q, k, v, bias=bias)
    specs = (BSHD, BSHD, BSHD, P())
    split = jax.shard_map(whole, mesh=m, in_specs=specs, out_specs=BSHD)
    want, got = (jax.jit(jax.grad(functools.partial(loss, f)))(bias) for f in (whole, split))
    assert_close(jax.device_get(got), jax.device_get(want), 2e-5)


@check
def shard_map_of_vmap_and_scan():
    q, k, v = inputs()

    def function(q, k, v):
        each = jax.vmap(lambda q, k, v: fj.attention(q[None], k[None], v[None])[0])
        step = lambda q, _: (each(q, k, v), None)
        return jax.lax.scan(step, q, length=2)[0]

    want = jax.jit(function)(q, k, v)
    got, talk = mapped(mesh(), function, [BSHD] * 3, BSHD, [q, k, v])
    assert not talk, talk
    assert_close(jax.device_get(got), jax.device_get(want))


@check
def shard_map_over_some_axes():
    """The others are left to the compiler."""
    arrays = inputs(8, 4)
    want = jax.jit(gradients)(*arrays)
    m = mesh()
    f = jax.shard_map(
        gradients,
        mesh=m,
        in_specs=(P("batch"),) * 3,
        out_specs=(P("batch"), (P("batch"),) * 3),
        axis_names={"batch"},
    )
    got, _ = compiled(f, *put(m, [BSHD] * 3, arrays))
    assert_close(jax.device_get(got), jax.device_get(want), 2e-6)


@check
def the_reference_agrees():
    arrays = inputs(4, 2)
    got, _ = compiled(
        functools.partial(fj.attention, causal=True), *put(mesh(), [BSHD] * 3, arrays)
    )
    assert_close(jax.device_get(got), jax.device_get(plain(*arrays, causal=True)[0]), 2e-6)


def main(names):
    """Prints {check: "" or what went wrong}."""
    assert len(jax.devices()) == 4, jax.devices()
    found = {}
    for name in names or CHECKS:
        try:
            CHECKS[name]()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
