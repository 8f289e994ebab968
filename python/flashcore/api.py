"""The functions of flashcore. Documentation; the work is in the compiled core."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flashcore import _core
from flashcore._arguments import integer
from flashcore.errors import ArgumentError, ArgumentTypeError
from flashcore.options import Array, Options
from flashcore.results import Device, Grads, Kernel, Plan, Result

if TYPE_CHECKING:
    if sys.version_info >= (3, 11):
        from typing import Unpack
    else:
        from typing_extensions import Unpack

__all__ = [
    "attention",
    "attention_backward",
    "devices",
    "dropout_mask",
    "explain",
    "get_num_threads",
    "kernels",
    "merge",
    "set_num_threads",
]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    out: Array | None = None,
    out_dtype: Any | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    stream: Any | None = None,
    **options: Unpack[Options],
) -> Any:
    """Exact attention: softmax(scale * q @ k^T + ..., over the visible keys) @ v.

    Computed tile by tile: memory beyond inputs and outputs does not grow with seqlen_q * seqlen_k.

    The score of a query and a key is scale * (q . k), then softcap, then + alibi, then + bias. Keys
    are excluded by causal, window_size, mask, lengths and block_mask; excluded entries are never
    read. Softmax runs in float32 (float64 for float64 inputs) over the visible keys and the sink.

    Parameters
    ----------
    q : array (B, Sq, Hq, D)
        float16, bfloat16, float32 or float64 (CPU), unit stride along the last dimension, any other
        strides. With cu_seqlens_q and cu_seqlens_k: (total_q, Hq, D). NumPy arrays of bfloat16 are
        those of ml_dtypes.
    k : array (B, Sk, Hkv, D)
        Hkv divides Hq: query head h reads key head h // (Hq / Hkv). Packed: (total_k, Hkv, D).
    v : array (B, Sk, Hkv, Dv)
        Packed: (total_k, Hkv, Dv).
    layout : "bshd" or "bhsd"
        Order of the dimensions of 4-D arrays: as above, or (B, H, S, D).
    scale : float, optional
        Default 1/sqrt(D).
    causal : bool
        Row i sees the keys j <= i + q_offset.
    window_size : (int or None, int or None)
        Row i sees i + q_offset - left <= j <= i + q_offset + right. None or -1 is open.
    align : "bottom_right" or "top_left"
        q_offset is Sk - Sq of each sequence, or 0.
    q_offset : int or int32 array (B,), optional
        Overrides align.
    softcap : float
        > 0: score = softcap * tanh(score / softcap).
    alibi_slopes : float32 array (Hq,) or (B, Hq), optional
        score -= slope * abs(i + q_offset - j).
    bias : array (B|1, Hq|1, Sq|1, Sk|1), optional
        Added to the score. q's dtype or float32.
    mask : bool array (B|1, Hq|1, Sq|1, Sk|1), optional
        True = visible.
    sinks : float32 array (Hq,), optional
        One more logit per head in the softmax, without a value.
    block_mask : BlockMask, optional
        Which blocks of queries and keys are kept.
    dropout_p : float
        Probability in [0, 1) of dropping an entry of softmax; the others grow by 1 / (1 - p).
        Rounded to a multiple of 2^-16.
    rng : (int, int) or int64 array (2,) on q's device
        Seed and offset; required when dropout_p > 0. The same bits on every device.
    cu_seqlens_q, cu_seqlens_k : int32 array (B + 1,), optional
        Packed sequences: sequence b is the rows cu_seqlens[b] to cu_seqlens[b + 1].
    max_seqlen_q, max_seqlen_k : int, optional
        Upper bounds of the packed lengths, known on the host.
    seqlens_q, seqlens_k : int32 array (B,), optional
        Valid lengths of padded batches.
    page_table, q_descale, k_descale, v_descale : optional
        Not built yet; refused.
    num_splits : int
        Parts that the keys are split into; 0 = automatic.
    split_size : int, optional
        Keys per part. Makes a row's result independent of the batch it is computed in.
    deterministic : bool
        Refuse a call whose backward pass could not be bitwise repeatable. Forward always is.
    out : array, optional
        Where to write the result: (B, Sq, Hq, Dv), packed (total_q, Hq, Dv).
    out_dtype : dtype or str, optional
        None is q's dtype; "float32" is the alternative.
    return_lse : bool
        Also return the natural logarithm of the softmax denominator: float32, (B, Hq, Sq), packed
        (Hq, total_q). float64 for float64 inputs.
    return_max_logits : bool
        Also return the largest visible score of each row, shaped like lse.
    stream : int or stream object, optional
        CUDA stream to run on; default: the current stream of q's framework. An array of another
        framework than q's is ordered before it through DLPack. Not for arrays on the CPU.

    Returns
    -------
    array or Result
        out, of q's framework and dtype; `Result` (out, lse, max_logits) if a return_* is set. A row
        that sees no key has out 0 and lse -inf (the sink's value with sinks).

    Raises
    ------
    ArgumentError
        Arguments that contradict each other or the above, an output that may not be written.
    UnsupportedError
        No compiled kernel can honour the call, or an array that cannot be read as one: torch
        tensors that require grad (outside of torch.no_grad()), sparse, nested, quantized or meta
        tensors, any torch tensor inside torch.jit.trace, make_fx or another torch dispatch mode,
        JAX arrays on a GPU or inside jit (flashcore.jax takes those).
    DeviceError
        The device or its driver failed.

    Notes
    -----
    Nothing is copied, cast or moved. CPU calls finish before they return and release the GIL; CUDA
    calls are enqueued. A JAX array is computed into memory that JAX then takes over.

    References
    ----------
    .. [1] Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with
       IO-Awareness", NeurIPS 2022, https://arxiv.org/abs/2205.14135

    Examples
    --------
    >>> import flashcore as fc, numpy as np
    >>> q = np.random.randn(1, 1024, 8, 64).astype(np.float32)
    >>> fc.attention(q, q, q, causal=True).shape
    (1, 1024, 8, 64)
    """
    result = _core.attention(
        q, k, v, options, out, out_dtype, return_lse, return_max_logits, stream
    )
    return Result(*result) if return_lse or return_max_logits else result


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    accumulate: bool = False,
    stream: Any | None = None,
    **options: Unpack[Options],
) -> Grads:
    """Gradients of `attention`, recomputing the softmax from lse instead of storing it.

    Parameters
    ----------
    dout : array, shape of out
        Gradient of the loss with respect to out; q's dtype, or float32. Expanded arrays are read in
        place, except that one whose last stride is 0 (the gradient of out.sum()) is packed first.
    q, k, v : array
        As given to `attention`.
    out, lse : array
        As returned by `attention` with return_lse=True.
    dlse : array, shape and dtype of lse, optional
        Gradient with respect to lse.
    dq, dk, dv : array, optional
        Where to write the gradients: shapes of q, k, v; q's dtype, or float32.
    accumulate : bool
        Add to dq, dk and dv instead of overwriting them. A gradient that was not given starts at 0.
    deterministic : bool
        Refuse unless the gradients are bitwise repeatable from run to run.
    layout, scale, causal, window_size, align, q_offset, softcap, alibi_slopes, bias, mask, sinks,\
 block_mask, dropout_p, rng, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlens_q,\
 seqlens_k, page_table, q_descale, k_descale, v_descale, num_splits, split_size, stream
        The options that `attention` was called with.

    Returns
    -------
    Grads
        (dq, dk, dv, dbias, dsinks). dbias has bias's shape and is float32 (float64 for float64
        inputs); dsinks is float32 (Hq,). Either is None without bias or sinks.

    Raises
    ------
    ArgumentError, UnsupportedError, DeviceError
        As `attention`.

    References
    ----------
    .. [1] Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with
       IO-Awareness", NeurIPS 2022, appendix B, https://arxiv.org/abs/2205.14135
    """
    return Grads(
        *_core.attention_backward(
            dout, q, k, v, out, lse, options, dlse, dq, dk, dv, accumulate, stream
        )
    )


def merge(
    outs: Sequence[Array],
    lses: Sequence[Array],
    *,
    layout: str = "bshd",
    out_dtype: Any | None = None,
    stream: Any | None = None,
) -> tuple[Array, Array]:
    """Combines attention over disjoint sets of keys into attention over all of them.

    Parameters
    ----------
    outs : sequence of arrays (B, Sq, Hq, Dv), or packed (total_q, Hq, Dv)
        Partial results. float32 (out_dtype="float32" of `attention`) keeps the most precision.
    lses : sequence of float32 arrays (B, Hq, Sq), or packed (Hq, total_q)
        Their logarithms, in the same order. -inf marks a part in which the row saw no key.
    layout : "bshd" or "bhsd"
        Order of the dimensions of outs.
    out_dtype : dtype or str, optional
        Default: that of outs.
    stream : int or stream object, optional
        As for `attention`.

    Returns
    -------
    out, lse : array
        As `attention` would have returned for all keys.

    Raises
    ------
    ArgumentError
        Different lengths, shapes, dtypes or devices.
    """
    return _core.merge(outs, lses, layout, out_dtype, stream)


def dropout_mask(
    shape: tuple[int, int, int, int],
    p: float,
    rng: tuple[int, int],
    *,
    out: Array | None = None,
    stream: Any | None = None,
) -> Array:
    """The entries of softmax that dropout keeps: the bits that every kernel uses.

    Parameters
    ----------
    shape : (B, Hq, Sq, Sk)
    p : float
        dropout_p, in [0, 1).
    rng : (int, int)
        Seed and offset.
    out : bool or uint8 array of that shape, optional
        Where to write; decides framework and device. Default: a new NumPy array.
    stream : int or stream object, optional
        As for `attention`.

    Returns
    -------
    bool array
        True = kept. Philox4x32-10 keyed by rng and counted by (b, h, i, j) [1]_.

    Raises
    ------
    ArgumentError
        Wrong shape, dtype or p.

    References
    ----------
    .. [1] Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
       https://doi.org/10.1145/2063384.2063405
    """
    allowed = f"[dropout_mask] shape must be four integers >= 0, (B, Hq, Sq, Sk), got {shape!r}"
    try:
        sizes = tuple(integer("dropout_mask", "shape", n) for n in shape)
    except (TypeError, ArgumentError) as error:
        kind = ArgumentTypeError if isinstance(error, TypeError) else ArgumentError
        raise kind(allowed) from None
    if len(sizes) != 4:
        raise ArgumentError(allowed)
    if out is None:
        import numpy as np

        try:
            out = np.empty(sizes, np.bool_)
        except ValueError as error:  # more bytes than an address has bits for
            raise ArgumentError(f"[dropout_mask] shape {sizes} is too large: {error}") from None
    elif not hasattr(out, "shape"):
        raise ArgumentTypeError(
            f"[dropout_mask] out must be a bool or uint8 array, got {type(out).__name__}"
        )
    elif tuple(out.shape) != sizes:
        raise ArgumentError(f"[dropout_mask] out must have shape {sizes}, got {tuple(out.shape)}")
    _core.dropout_mask(out, p, rng, stream)
    return out


def explain(q: Array, k: Array, v: Array, *, direction: str = "forward", **options: Any) -> Plan:
    """What `attention` (or `attention_backward`) would do with these arguments, without doing it.

    Parameters
    ----------
    q, k, v : array
        As for `attention`.
    direction : "forward" or "backward"
    **options
        The options of `attention`. Those that only say where results go change nothing.

    Returns
    -------
    Plan
        The kernel that would run, its tile, workspace and guarantees, and why each kernel that
        would not was refused.

    Raises
    ------
    ArgumentError
        As `attention`. A call that no kernel can run is not an error here: kernel is None.
    TypeError
        An option that `attention` does not have.

    Examples
    --------
    >>> print(fc.explain(q, k, v, causal=True).kernel)  # doctest: +SKIP
    cpu-avx512-fwd-f32
    """
    if direction not in ("forward", "backward"):
        raise ArgumentError(
            f"[explain] direction must be 'forward' or 'backward', got {direction!r}"
        )
    shared: dict[str, Any] = {}
    for name, value in options.items():
        if name in _core.OPTION_NAMES:
            shared[name] = value
        elif name not in (attention.__kwdefaults__ or {}):
            raise TypeError(f"explain() got an option that attention() does not have: {name!r}")
    return plan_of(_core.explain(q, k, v, shared, direction == "backward"))


def plan_of(
    explained: tuple[tuple[Any, ...] | None, int, int, bool, list[tuple[str, str]]],
) -> Plan:
    """What the extension says of a plan, with names."""
    chosen, splits, workspace_bytes, deterministic, refusals = explained
    if chosen is None:
        return Plan(None, "", "", (0, 0), 0, 0, False, refusals)
    kernel = Kernel(*chosen)
    return Plan(
        kernel.name,
        kernel.backend,
        kernel.isa,
        (kernel.block_m, kernel.block_n),
        splits,
        workspace_bytes,
        deterministic,
        refusals,
    )


def kernels() -> list[Kernel]:
    """Every compiled kernel, in order of preference."""
    return [Kernel(*row) for row in _core.kernels()]


def devices() -> list[Device]:
    """The CPU, then every CUDA device."""
    return [Device(*row) for row in _core.devices()]


def set_num_threads(n: int) -> None:
    """Sets how many threads a CPU call may use; n <= 0 restores the default.

    The default is FLASHCORE_NUM_THREADS, else OMP_NUM_THREADS, else the cores that this process may
    run on. For torch tensors torch.get_num_threads() is a further limit, and threadpoolctl's limits
    apply. Results do not depend on it.
    """
    _core.set_num_threads(n)


def get_num_threads() -> int:
    """How many threads a CPU call may use. See `set_num_threads`."""
    return _core.get_num_threads()
