"""The error rule, for flashcore's own tests and for yours.

    import flashcore as fc, flashcore.testing
    out = fc.attention(q, k, v, causal=True)
    fc.testing.assert_close_to_reference(out, q, k, v, causal=True)

A result x passes when

    max|x - exact| <= 2 max|same - exact| + floor

exact: the definition in float64 (long double for float64 inputs). same: the definition in the
inputs' own precision, as a framework would compute it. floor: two roundings of the largest value to
the result's dtype (of P and of the result) and sixteen of the sums it came from, because `same` can
be exact by luck (one key, say, whose P is 1); for dsinks, also what rounding `out` costs it. So a
kernel may be twice as inexact as plain attention in the same dtype, and no more, at any size and
for any input. A tensor of fewer than 64 numbers (dsinks) may be 8 times, one of fewer than 8 may be
64: the largest error of so few is a matter of luck.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcore import reference

__all__ = [
    "assert_close_to_reference",
    "assert_grads_close_to_reference",
    "assert_within_rule",
    "to_numpy",
]

# Options of flashcore.attention that do not change the mathematical result.
_VALUE_FREE = (
    "max_seqlen_q",
    "max_seqlen_k",
    "num_splits",
    "split_size",
    "deterministic",
    "out",
    "out_dtype",
    "return_lse",
    "return_max_logits",
    "stream",
    "accumulate",
    "dq",
    "dk",
    "dv",
    "dbias",
    "dsinks",
)
_ARRAYS = (
    "q_offset",
    "alibi_slopes",
    "bias",
    "mask",
    "sinks",
    "rng",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqlens_q",
    "seqlens_k",
)


def to_numpy(x: Any) -> np.ndarray:
    """Any array as NumPy's, bfloat16 as ml_dtypes.bfloat16. Copies from a GPU."""
    if x is None or isinstance(x, np.ndarray):
        return x
    if type(x).__module__.partition(".")[0] == "torch":
        import torch

        x = x.detach().cpu()
        if x.dtype == torch.bfloat16:
            import ml_dtypes

            return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    if hasattr(x, "get") and hasattr(x, "device"):  # CuPy
        return x.get()
    return np.asarray(x)


def assert_close_to_reference(result: Any, q: Any, k: Any, v: Any, **options: Any) -> None:
    """Checks what flashcore.attention(q, k, v, **options) returned: out alone, or the named tuple.

    Raises AssertionError naming the tensor, the two errors and the worst element.
    """
    q, k, v = (to_numpy(x) for x in (q, k, v))
    options = _for_reference(options)
    exact = reference.attention(q, k, v, precision=_exact(q.dtype), **options)
    same = reference.attention(q, k, v, precision=q.dtype, **options)
    out, lse, max_logits = result if isinstance(result, tuple) else (result, None, None)
    out = to_numpy(out)
    assert_within_rule("out", out, exact.out, _rounded(same.out, out.dtype))
    for name, got in (("lse", lse), ("max_logits", max_logits)):
        if got is not None:
            assert_within_rule(name, to_numpy(got), getattr(exact, name), getattr(same, name))


def assert_grads_close_to_reference(
    grads: Any, dout: Any, q: Any, k: Any, v: Any, *, dlse: Any = None, **options: Any
) -> None:
    """Checks what flashcore.attention_backward(dout, q, k, v, out, lse, **options) returned."""
    dout, q, k, v, dlse = (to_numpy(x) for x in (dout, q, k, v, dlse))
    options = _for_reference(options)
    exact = reference.attention_backward(
        dout, q, k, v, dlse=dlse, precision=_exact(q.dtype), **options
    )
    same = reference.attention_backward(dout, q, k, v, dlse=dlse, precision=q.dtype, **options)
    terms = float(np.max(np.abs(np.nan_to_num(dout.astype(np.float64))), initial=0))
    for name, got in zip(reference.Grads._fields, grads):
        if got is not None:
            got = to_numpy(got)
            expected, plain = getattr(exact, name), getattr(same, name)
            luck = _rounding_of_dsinks(dout, q, k, v, options) if name == "dsinks" else 0.0
            assert_within_rule(name, got, expected, _rounded(plain, got.dtype), terms, luck)


def assert_within_rule(
    name: str,
    got: np.ndarray,
    exact: np.ndarray,
    same: np.ndarray,
    terms: float = 0.0,
    rounding: float = 0.0,
) -> None:
    """max|got - exact| <= 2 max|same - exact| + floor; infinities must be equal.

    terms: the size of the terms that were summed, if they may be larger than the result.
    rounding: what `same` may owe to luck beyond that; the floor grows by it.
    """
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    if not got.size:
        return
    wide = exact.dtype
    got_wide, same_wide = got.astype(wide), same.astype(wide)
    finite = np.isfinite(exact)
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(got_wide - exact), 0)
        unequal = ~finite & ~((got_wide == exact) | (np.isnan(got_wide) & np.isnan(exact)))
        allowed = np.max(np.abs(same_wide - exact), initial=0, where=finite)
    error = np.where(unequal | np.isnan(error), np.inf, error)
    largest = np.max(np.abs(exact), initial=0, where=finite)
    floor = _floor(got.dtype, float(largest), terms) + rounding
    floor += float(np.finfo(np.float32).tiny)
    few = got.size < 64  # the largest error of a few numbers says little about the next few
    factor = 64 if got.size < 8 else 8 if few else 2
    limit = factor * float(allowed) + floor
    worst = np.unravel_index(np.argmax(error), error.shape)
    if not error[worst] <= limit:
        raise AssertionError(
            f"{name} {got.dtype}: error {float(error[worst]):.3e} > {limit:.3e} "
            f"= {factor} x {float(allowed):.3e} (same precision) + {floor:.3e} (floor). Worst at "
            f"{tuple(int(n) for n in worst)}: got {got[worst]}, exact {exact[worst]:.8g}; "
            f"{int((error > limit).sum())} of {error.size} elements are outside"
        )


def _rounding_of_dsinks(dout: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> float:
    """What rounding `out` to q's dtype may cost the worst head's dsinks, the sum of -P_sink O dO:
    four units in the last place of the root of the sum of squares of its terms. `same` rounds O as
    well, but of so few numbers may come out as if it had not."""
    exact = reference.attention(q, k, v, precision=_exact(q.dtype), **options)
    out, do = exact.out.astype(np.float64), dout.astype(np.float64)
    if options.get("cu_seqlens_q") is not None:
        out, do = (np.moveaxis(x, 1, 0) for x in (out, do))  # (H, rows, Dv)
    elif options.get("layout", "bshd") == "bshd":
        out, do = (np.swapaxes(x, 1, 2) for x in (out, do))  # (B, H, Sq, Dv)
    with np.errstate(invalid="ignore"):
        p_sink = np.exp(np.asarray(options["sinks"], np.float64)[:, None] - exact.lse)
        terms = np.nan_to_num(p_sink[..., None] * out * do, posinf=0.0, neginf=0.0)
    squares = (terms**2).sum(axis=-1)
    squares = squares.sum(axis=tuple(n for n in range(squares.ndim) if n != squares.ndim - 2))
    return 4 * _eps(q.dtype) * float(np.sqrt(np.max(squares, initial=0)))


def _for_reference(options: dict[str, Any]) -> dict[str, Any]:
    options = {name: x for name, x in options.items() if name not in _VALUE_FREE}
    for name in _ARRAYS:
        if options.get(name) is not None and not isinstance(options[name], (int, tuple)):
            options[name] = to_numpy(options[name])
    if options.get("block_mask") is not None:
        options["block_mask"] = options["block_mask"].map(to_numpy).to_dense()
    return options


def _exact(dtype: Any) -> Any:
    return np.longdouble if dtype == np.float64 else np.float64


def _rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    return x.astype(dtype)


def _floor(dtype: Any, largest: float, terms: float) -> float:
    """Two roundings of the largest value, and sixteen of the terms whose sum it is: the sums of the
    gradients cancel (dP - delta), so their terms can be far larger than they are."""
    eps_sum = _eps(np.float64 if np.dtype(dtype).itemsize == 8 else np.float32)
    return _eps(dtype) * largest + 16 * eps_sum * max(largest, terms)


def _eps(dtype: Any) -> float:
    if np.dtype(dtype).kind == "f":
        return float(np.finfo(dtype).eps)
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).eps)
