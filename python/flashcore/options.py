"""The options that `attention`, `attention_backward` and `explain` share."""

from __future__ import annotations

from typing import Any, TypedDict

Array = Any
"""Any DLPack array: NumPy, PyTorch, CuPy, JAX outside of jit."""

Window = tuple[int | None, int | None]


class Options(TypedDict, total=False):
    """Keyword arguments, none of them required. `attention` says what each one means.

    The compiled core reads the ones that are given; this list is for people and type checkers.
    """

    layout: str
    scale: float | None
    causal: bool
    window_size: Window
    align: str
    q_offset: int | Array | None
    softcap: float
    alibi_slopes: Array | None
    bias: Array | None
    mask: Array | None
    sinks: Array | None
    block_mask: Any | None
    dropout_p: float
    rng: tuple[int, int] | Array | None
    cu_seqlens_q: Array | None
    cu_seqlens_k: Array | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    seqlens_q: Array | None
    seqlens_k: Array | None
    page_table: Array | None
    q_descale: Array | None
    k_descale: Array | None
    v_descale: Array | None
    num_splits: int
    split_size: int | None
    deterministic: bool
