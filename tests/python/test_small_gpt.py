"""A small byte-level GPT, trained on this project's documentation with flashcore and with standard
attention: the losses stay together step by step."""

from __future__ import annotations

import math

import pytest
from conftest import ROOT

torch = pytest.importorskip("torch")

import flashcore.torch as ft  # noqa: E402

F = torch.nn.functional
nn = torch.nn


def standard(q, k, v):
    """With the matrix of scores, in float32."""
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * q.shape[-1] ** -0.5
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        return torch.einsum("bhst,bthd->bshd", weights, v.float()).to(q.dtype)


def ours(q, k, v):
    return ft.attention(q, k, v, causal=True)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, attention):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.project(attention(q, k, v).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self, length, width, heads, layers):
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens, attention):
        x = self.token(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x, attention)
        return self.head(self.norm(x))


def text():
    data = b"".join(path.read_bytes() for path in sorted(ROOT.glob("docs/**/*.md")))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def losses(attention, device, steps, length, width, heads, layers, batch, autocast=None):
    torch.manual_seed(0)
    data = text().to(device)
    model = Gpt(length, width, heads, layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        starts = torch.randint(len(data) - length - 1, (batch, 1), generator=generator)
        chunk = data[(starts + torch.arange(length + 1)).to(device)]
        with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=bool(autocast)):
            logits = model(chunk[:, :-1], attention)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), chunk[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).cpu()


def check(device, tolerance, **settings):
    got, want = (losses(attention, device, **settings) for attention in (ours, standard))
    apart = (got - want).abs()
    print(f"loss {want[0]:.4f} to {want[-1]:.4f}, {got[-1]:.4f} with flashcore; ", end="")
    print(f"largest difference {apart.max():.5f} at step {int(apart.argmax())}")
    assert want[-1] < 0.65 * want[0], "it learns"
    assert apart.max() < tolerance


def test_losses_on_the_cpu():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small for more
    try:
        check("cpu", 1e-3, steps=40, length=48, width=64, heads=4, layers=2, batch=8)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_losses_on_a_gpu():
    q = torch.zeros(1, 256, 4, 64, device="cuda", dtype=torch.bfloat16)
    if ft.explain(q, q, q, causal=True, direction="backward").kernel is None:
        pytest.skip("no kernel of this GPU runs backward")
    settings = {"length": 256, "width": 256, "heads": 4, "layers": 4, "batch": 16}
    check("cuda", 1e-2, steps=200, autocast=torch.bfloat16, **settings)
