"""Trains a small byte-level language model on real text in PyTorch, on the CPU.

Once with flashcore.torch.attention and once with torch's own: the losses are the same. Then the
trained model runs compiled and exported.
"""

import math
from pathlib import Path

import torch
from torch import nn

import flashcore.torch

ROOT = Path(__file__).resolve().parent.parent
LENGTH, WIDTH, HEADS, STEPS = 64, 64, 4, 60


def torch_attention(q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2)


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
        x = x + self.project(self.attention(q, k, v, causal=True).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(attention), Block(attention))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.blocks(x))


def train(attention):
    torch.manual_seed(0)
    text = b"".join(path.read_bytes() for path in sorted(ROOT.glob("docs/*.md")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = Model(attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(data) - LENGTH - 1, (16, 1))
        batch = data[starts + torch.arange(LENGTH + 1)]
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, loss.item()


torch.set_num_threads(1)  # the model is too small for more
_, theirs = train(torch_attention)
model, ours = train(flashcore.torch.attention)
print(f"loss after {STEPS} steps: {ours:.4f} with flashcore, {theirs:.4f} with torch")
assert ours < 0.6 * math.log(256) and abs(ours - theirs) < 1e-2

tokens = torch.randint(256, (2, LENGTH))
with torch.no_grad():
    logits = model(tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens), logits)
    exported = torch.export.export(model, (tokens,)).module()
    assert torch.equal(exported(tokens), logits)
print("compiled and exported: the same logits")
