"""Code written for flash-attn, with one import changed: paragraphs of real text, packed.

The gradients of the packed batch are those of each paragraph by itself.
"""

from pathlib import Path

import torch

from flashcore.compat.flash_attn import flash_attn_func, flash_attn_varlen_qkvpacked_func

ROOT = Path(__file__).resolve().parent.parent
HEADS, HEAD_DIM = 4, 16

torch.manual_seed(0)
text = (ROOT / "docs" / "algorithm.md").read_bytes()
paragraphs = [torch.tensor(list(p)) for p in text.split(b"\n\n")[:12] if p]
lengths = torch.tensor([len(p) for p in paragraphs])
cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
embedding = torch.nn.Embedding(256, 3 * HEADS * HEAD_DIM)


def vectors(tokens):
    return embedding(tokens).unflatten(-1, (3, HEADS, HEAD_DIM))


def gradient(out):
    return torch.autograd.grad(out.square().sum(), embedding.weight)[0]


packed = flash_attn_varlen_qkvpacked_func(
    vectors(torch.cat(paragraphs)), cu_seqlens, int(lengths.max()), causal=True
)
alone = [flash_attn_func(*vectors(p)[None].unbind(2), causal=True)[0] for p in paragraphs]
torch.testing.assert_close(packed, torch.cat(alone))
torch.testing.assert_close(gradient(packed), gradient(torch.cat(alone)), rtol=1e-4, atol=1e-4)
print(f"{len(paragraphs)} paragraphs, {lengths.min()} to {lengths.max()} bytes, packed: the same")
