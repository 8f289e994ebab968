"""Hugging Face transformers: the attention implementation "fcore".

A mask function and an attention function. The mask function says with the shape of what it returns
which keys a query sees, so that nothing of size length x length is made where a rule says it:

    None                causal if the module is
    (B, Sk)             the same, and these keys are not padding
    (B, W, Sk or 1)     causal in a sliding window of W keys; expanded, W is a size and no memory
    (B, 1|H, Sq|1, Sk)  everything

The same masks as for transformers' own "sdpa" and "eager", for every model that builds its masks
with transformers.masking_utils.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flashcore as fc
from flashcore.torch.api import attention

# "flash" in it would make transformers look for a package of that name.
NAME = "fcore"


def register_transformers() -> str:
    """Registers the attention implementation "fcore" with transformers, and returns that name.

    Padding (left and right), generation with caches, sliding windows, softcap, sinks, position
    biases, packed sequences, dropout and training work as with "eager". Queries that see no key,
    as those of left padding, give 0.

    Examples
    --------
    >>> flashcore.torch.register_transformers()
    >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fcore")
    """
    from transformers import AttentionInterface, __version__
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError(
            f"register_transformers needs transformers 5.17 or newer, got {__version__}"
        )
    AttentionMaskInterface.register(NAME, fcore_mask)
    AttentionInterface.register(NAME, fcore_attention)
    return NAME


def fcore_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Called by transformers' create_*_mask, once per forward pass and kind of layer."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if attention_mask is not None and attention_mask.ndim == 3:
        return attention_mask  # made here before: generate() makes the masks of static caches
    # transformers allows to skip a mask where nothing was added to its rule: causal in a window of
    # local_size, in chunks of that size, which are no rule here, or bidirectional. A static cache
    # is no rule either: it has room behind the last query, and its fill is known on the device.
    window = local_size if local_size is not None and local_size < kv_length else None
    if not isinstance(q_offset, Tensor) and not isinstance(kv_offset, Tensor):
        last_faces_last = q_offset + q_length == kv_offset + kv_length
        chunked = local_size is not None and (
            local_size == getattr(config, "attention_chunk_size", None)
            or local_size != getattr(config, "sliding_window", None)
        )
        if allow_is_causal_skip and last_faces_last and not chunked:
            keys = _padding(attention_mask, kv_offset, kv_length)
            if window is None:
                return keys
            if keys is None:
                keys = torch.ones((), dtype=torch.bool, device=device)[None, None]
            return keys[:, None].expand(-1, window, -1)
        if allow_is_bidirectional_skip and window is None:
            keys = _padding(attention_mask, kv_offset, kv_length)
            return None if keys is None else keys[:, None, None]
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=causal_mask_function if mask_function is None else mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        device=device,
        **kwargs,
    )


def _padding(attention_mask: Tensor | None, start: int, length: int) -> Tensor | None:
    """Which of the keys that the layer holds are real, (B, length); None: all of them."""
    from transformers.masking_utils import prepare_padding_mask
    from transformers.utils.import_utils import is_tracing

    mask = prepare_padding_mask(attention_mask, length, start)
    if mask is None:
        return None
    mask = mask[:, start : start + length]
    return None if not is_tracing(mask) and mask.all() else mask


def fcore_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Called by the attention modules of transformers: (B, H, S, D) in, (B, S, H, D) out."""
    for name in ("output_attentions", "cache"):
        if kwargs.get(name) not in (None, False):
            raise fc.UnsupportedError(
                f"[{NAME}] {name}= is not built; attn_implementation='eager' has it"
            )
    options: dict[str, Any] = {}
    bias = position_bias
    mask = attention_mask
    if mask is None or mask.ndim == 2:
        options["causal"] = getattr(module, "is_causal", True) if is_causal is None else is_causal
    elif mask.ndim == 3:
        options.update(causal=True, window_size=(mask.shape[1] - 1, None))
        mask = mask[:, 0] if mask.shape[2] == key.shape[2] else None
    if mask is not None:
        if mask.ndim == 2:
            mask = mask[:, None, None].bool()
        if mask.dtype == torch.bool:
            options["mask"] = mask
        else:  # of the caller's own, to be added
            bias = mask if bias is None else bias + mask
    if bias is not None:
        options["bias"] = bias
    if dropout:
        options["dropout_p"] = dropout
    if scaling is not None:
        options["scale"] = scaling
    if softcap is not None:
        options["softcap"] = softcap
    if s_aux is not None:
        options["sinks"] = s_aux.float()
    out = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options)
    return out, None
