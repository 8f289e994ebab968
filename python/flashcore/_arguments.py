"""Arguments that Python reads itself, and what to say when they are wrong."""

from __future__ import annotations

import operator
from typing import Any

from flashcore.errors import ArgumentError, ArgumentTypeError


def integer(call: str, name: str, value: Any, least: int = 0) -> int:
    allowed = f"[{call}] {name} must be an integer >= {least}, got {value!r}"
    if isinstance(value, bool):
        raise ArgumentTypeError(allowed)
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(allowed) from None
    if number < least:
        raise ArgumentError(allowed)
    return number


def pair(call: str, name: str, value: Any) -> tuple[Any, Any]:
    try:
        first, second = value
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"[{call}] {name} must be a pair, got {value!r}") from None
    return first, second


def block_size(call: str, block: Any) -> tuple[int, int]:
    try:
        rows, keys = (integer(call, "block", n, 1) for n in pair(call, "block", block))
    except ArgumentError as error:
        raise type(error)(
            f"[{call}] block must be two positive integers (rows, keys), got {block!r}"
        ) from None
    return rows, keys


def seqlens(call: str, shape: Any) -> tuple[int, int]:
    try:
        seqlen_q, seqlen_k = (integer(call, "shape", n) for n in pair(call, "shape", shape))
    except ArgumentError as error:
        raise type(error)(
            f"[{call}] shape must be (seqlen_q, seqlen_k), both integers >= 0, got {shape!r}"
        ) from None
    return seqlen_q, seqlen_k


def lengths(call: str, seqlen_q: Any, seqlen_k: Any) -> tuple[int, int]:
    seqlen_q = integer(call, "seqlen_q", seqlen_q)
    return seqlen_q, seqlen_q if seqlen_k is None else integer(call, "seqlen_k", seqlen_k)


def numpy_array(call: str, name: str, value: Any) -> Any:
    import numpy as np

    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"[{call}] {name} must be an array that NumPy can read, got {type(value).__name__}"
        ) from error


def check_integers(call: str, name: str, array: Any) -> None:
    """An array of any framework. Which integers, each call checks."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise ArgumentTypeError(
            f"[{call}] {name} must be an int32 array, got {type(array).__name__}"
        )
    if "int" not in str(array.dtype):  # "int32", "torch.int32"
        raise ArgumentError(f"[{call}] {name} must be an int32 array, got {array.dtype}")
