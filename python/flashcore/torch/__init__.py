"""flashcore for PyTorch: autograd, torch.compile, torch.export, functorch, Hugging Face.

    import flashcore.torch
    out = flashcore.torch.attention(q, k, v, causal=True)
    out.sum().backward()

Importing this module registers the operators torch.ops.flashcore.attention and
torch.ops.flashcore.attention_backward and changes nothing else in torch: `register_sdpa` and
`register_transformers` do, when they are called.
"""

from __future__ import annotations

import torch

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"flashcore.torch needs torch 2.11 or newer, got {torch.__version__}: flashcore.attention "
        "takes the tensors of older ones, without gradients"
    )

from flashcore.torch import operators  # noqa: F401  (registers them)
from flashcore.torch.api import attention, explain
from flashcore.torch.sdpa import register_sdpa
from flashcore.torch.transformers import register_transformers

__all__ = ["attention", "explain", "register_sdpa", "register_transformers"]
