"""What of a call is known when JAX traces it: which arrays there are, and every other option.

A Spec is hashable, so it can be a static argument of jit and a parameter of a primitive.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

Attributes = tuple[tuple[str, int | float], ...]

FORWARD = ("q", "k", "v")
BACKWARD = ("q", "k", "v", "out", "lse", "dout")


class Spec(NamedTuple):
    """One call of the forward or the backward pass."""

    operands: tuple[str, ...]  # FORWARD or BACKWARD, then what else there is
    results: tuple[str, ...]  # "out", or "dq", "dk", "dv"; then what else is wanted
    attributes: Attributes  # options that are no arrays; left out where they say the default
    out_dtype: str | None = None

    @property
    def backward(self) -> bool:
        return "dout" in self.operands

    @property
    def call(self) -> str:
        """For messages."""
        return "attention_backward" if self.backward else "attention"

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.operands

    @property
    def bhsd(self) -> bool:
        return ("layout", 1) in self.attributes

    @property
    def drops(self) -> bool:
        return any(name == "dropout_p" for name, _ in self.attributes)

    def named(self, operands: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(self.operands, operands, strict=True))


# ---- shapes of results -------------------------------------------------------------------------


def result_like(spec: Spec, name: str) -> tuple[str, tuple[int, ...]]:
    """The operand that a result is shaped like, and which of its dimensions it has, in order."""
    if name in ("lse", "max_logits"):
        return "q", (1, 0) if spec.packed else (0, 1, 2) if spec.bhsd else (0, 2, 1)
    source = "q" if name == "out" else name.removeprefix("d")
    rank = 1 if name == "dsinks" else 4 if name == "dbias" or not spec.packed else 3
    return source, tuple(range(rank))


def result_shape(spec: Spec, name: str, shapes: dict[str, Any]) -> tuple[int, ...]:
    source, dims = result_like(spec, name)
    shape = tuple(shapes[source][d] for d in dims)
    return (*shape[:-1], shapes["v"][-1]) if name == "out" else shape


def result_dtype(spec: Spec, name: str, dtype: str) -> str:
    """dtype: of q, k and v."""
    if name in ("lse", "max_logits", "dbias"):
        return "float64" if dtype == "float64" else "float32"
    if name == "dsinks":
        return "float32"
    return spec.out_dtype or dtype if name == "out" else dtype
