"""From what the caller passed to a Spec and arrays, or to one clear error.

Arrays are operands. Everything else is static: it is part of the compiled program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashcore._arguments import pair
from flashcore.block_mask import BlockMask
from flashcore.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from flashcore.jax.pytree import LISTS
from flashcore.jax.spec import FORWARD, Spec

Static = dict[str, int | float]


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def array(call: str, name: str, x: Any) -> Any:
    """x as JAX has it: never of another dtype in silence."""
    if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)):
        return x
    if not isinstance(x, np.ndarray):
        elsewhere = (
            ": flashcore.attention takes the arrays of other frameworks"
            if hasattr(x, "__dlpack__")
            else ""
        )
        raise ArgumentTypeError(
            f"[{call}] {name} must be a JAX or NumPy array, got {type(x).__module__}."
            f"{type(x).__qualname__}{elsewhere}"
        )
    y = jnp.asarray(x)
    if y.dtype != x.dtype:
        raise ArgumentError(
            f"[{call}] {name} is a NumPy array of {x.dtype}, which JAX would make {y.dtype}: pass "
            f"{name}.astype({y.dtype.name!r}), or set jax_enable_x64"
        )
    return y


# ---- static values -------------------------------------------------------------------------------


def _refuse(call: str, name: str, want: str, x: Any) -> ArgumentTypeError:
    why = ""
    if is_array(x):
        why = (
            ": it is part of the compiled program, so under jit it must be static "
            f"(static_argnames={name.partition('[')[0]!r}) or come from outside"
        )
    shown = repr(x) if isinstance(x, (str, int, float, tuple, list)) else type(x).__name__
    return ArgumentTypeError(f"[{call}] {name} must be {want}, got {shown}{why}")


def flag(call: str, name: str, x: Any) -> bool:
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    raise _refuse(call, name, "True or False", x)


def integer(call: str, name: str, x: Any) -> int:
    if isinstance(x, (bool, np.bool_)) or is_array(x):
        raise _refuse(call, name, "an integer", x)
    try:
        number = operator.index(x)
    except TypeError:
        raise _refuse(call, name, "an integer", x) from None
    if not -(2**63) <= number < 2**63:
        raise ArgumentError(f"[{call}] {name} does not fit 64 bits: {number}")
    return number


def number(call: str, name: str, x: Any) -> float:
    if isinstance(x, (bool, np.bool_, str)) or is_array(x):
        raise _refuse(call, name, "a number", x)
    try:
        return float(x)
    except (TypeError, ValueError):
        raise _refuse(call, name, "a number", x) from None


def _word(call: str, name: str, x: Any, words: tuple[str, ...]) -> int:
    if isinstance(x, str) and x in words:
        return words.index(x)
    raise ArgumentError(f"[{call}] {name} must be {' or '.join(map(repr, words))}, got {x!r}")


def _seed(call: str, name: str, x: Any) -> np.uint64:
    """The bits of an unsigned or signed 64-bit integer."""
    if not isinstance(x, (bool, np.bool_)) and not is_array(x) and hasattr(x, "__index__"):
        bits = operator.index(x)
        if -(2**63) <= bits < 2**64:
            return np.uint64(bits % 2**64)
        raise ArgumentError(f"[{call}] {name} does not fit 64 bits: {bits}")
    raise _refuse(call, name, "an integer", x)


def _window(call: str, x: Any) -> Static:
    if is_array(x):
        raise _refuse(call, "window_size", "a pair (left, right)", x)
    sides = zip(("window_left", "window_right"), pair(call, "window_size", x))
    return {
        name: integer(call, f"window_size[{i}]", side)
        for i, (name, side) in enumerate(sides)
        if side is not None
    }


# ---- options that may be either ------------------------------------------------------------------


def _rng(call: str, x: Any) -> tuple[Static, dict[str, Any]]:
    """A pair of integers, a key of jax.random, or seed and offset in an array."""
    if not is_array(x):
        if not isinstance(x, (tuple, list)) or len(x) != 2:
            raise ArgumentTypeError(
                f"[{call}] rng must be a key of jax.random, two integers (seed, offset), or an "
                f"array of their bits, int64 (2) or uint32 (4), got {type(x).__name__}"
            )
        # An operand too: a new seed does not make a new program.
        halves = np.array([_seed(call, f"rng[{i}]", n) for i, n in enumerate(x)]).view(np.uint32)
        return {}, {"rng_tensor": jnp.asarray(halves)}
    if isinstance(x, np.ndarray):
        x = array(call, "rng", x)
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    if (is_key and x.shape == ()) or (x.dtype == jnp.uint32 and x.shape == (2,)):
        if isinstance(x, jax.ShapeDtypeStruct):
            return {}, {"rng_tensor": jax.ShapeDtypeStruct((4,), jnp.uint32)}
        return {}, {"rng_tensor": jax.random.bits(x, (4,), jnp.uint32)}
    if (x.dtype, x.shape) in ((jnp.uint32, (4,)), (jnp.int64, (2,))):
        return {}, {"rng_tensor": x}
    raise ArgumentError(
        f"[{call}] rng must be one key of jax.random, or the bits of (seed, offset) as int64 (2) "
        f"or uint32 (4), got {x.dtype} {x.shape}"
    )


def _q_offset(call: str, x: Any) -> tuple[Static, dict[str, Any]]:
    if is_array(x):
        return {}, {"q_offset_tensor": array(call, "q_offset", x)}
    return {"q_offset": integer(call, "q_offset", x)}, {}


def _block_mask(call: str, x: Any) -> tuple[Static, dict[str, Any]]:
    if not isinstance(x, BlockMask):
        raise ArgumentTypeError(
            f"[{call}] block_mask must be a flashcore.BlockMask, got {type(x).__name__}: "
            "flashcore.BlockMask.from_dense makes one of a boolean array"
        )
    lists = {name: array(call, f"block_mask.{name}", getattr(x, name)) for name in LISTS}
    sizes: Static = {"block_q": x.block[0], "block_k": x.block[1]}
    if x.lengths is not None:
        sizes |= {"block_seqlen_q": x.lengths[0], "block_seqlen_k": x.lengths[1]}
    return sizes, lists


_Read = Callable[[str, Any], tuple[Static, dict[str, Any]]]


def _static(name: str, read: Callable[[str, str, Any], int | float]) -> _Read:
    return lambda call, x: ({name: read(call, name, x)}, {})


def _operand(name: str) -> _Read:
    return lambda call, x: ({}, {name: array(call, name, x)})


_ARRAYS = (
    "alibi_slopes",
    "bias",
    "mask",
    "sinks",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqlens_q",
    "seqlens_k",
    "page_table",
    "q_descale",
    "k_descale",
    "v_descale",
)
_READ: dict[str, _Read] = {
    "layout": _static("layout", lambda c, n, x: _word(c, n, x, ("bshd", "bhsd"))),
    "scale": _static("scale", number),
    "causal": _static("causal", flag),
    "window_size": lambda call, x: (_window(call, x), {}),
    "align": _static("align", lambda c, n, x: _word(c, n, x, ("bottom_right", "top_left"))),
    "q_offset": _q_offset,
    "softcap": _static("softcap", number),
    "block_mask": _block_mask,
    "dropout_p": _static("dropout_p", number),
    "rng": _rng,
    "max_seqlen_q": _static("max_seqlen_q", integer),
    "max_seqlen_k": _static("max_seqlen_k", integer),
    "num_splits": _static("num_splits", integer),
    "split_size": _static("split_size", integer),
    "deterministic": _static("deterministic", flag),
    **{name: _operand(name) for name in _ARRAYS},
}
_NEVER_NONE = ("layout", "causal", "window_size", "align", "softcap", "dropout_p", "deterministic")
_ZERO_IS_NO_DEFAULT = ("scale", "q_offset", "window_left", "window_right")


def read(
    call: str,
    q: Any,
    k: Any,
    v: Any,
    options: dict[str, Any],
    results: tuple[str, ...] = ("out",),
    out_dtype: Any = None,
) -> tuple[Spec, list[Any]]:
    """The forward call, and its operands in the order of spec.operands."""
    static: Static = {}
    operands: dict[str, Any] = {}
    for name, x in zip(FORWARD, (q, k, v)):
        operands[name] = array(call, name, x)
    for name, x in options.items():
        if name in ("out", "stream"):
            if x is not None:
                raise UnsupportedError(
                    f"[{call}] {name}= is not an option of flashcore.jax.attention: a JAX array "
                    "may not be written, and XLA chooses the stream. The result is a new array"
                )
        elif name not in _READ:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
        elif x is not None or name in _NEVER_NONE:
            more, arrays = _READ[name](call, x)
            static |= more
            operands |= arrays
    if static.get("dropout_p") and "rng_tensor" not in operands:
        raise ArgumentError(
            f"[{call}] rng is required when dropout_p > 0: pass rng=jax.random.key(seed), a new "
            "key for each call"
        )
    if not static.get("dropout_p"):
        operands.pop("rng_tensor", None)
    attributes = tuple(
        (name, x if isinstance(x, float) else int(x))
        for name, x in sorted(static.items())
        if x or name in _ZERO_IS_NO_DEFAULT
    )
    spec = Spec(tuple(operands), results, attributes, _dtype(call, out_dtype))
    return spec, list(operands.values())


def _dtype(call: str, x: Any) -> str | None:
    if x is None:
        return None
    try:
        name = jnp.dtype(x).name
    except TypeError:
        name = ""
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise ArgumentError(
            f"[{call}] out_dtype must be None (the dtype of the inputs), float16, bfloat16, "
            f"float32 or float64, got {x!r}"
        )
    return name
