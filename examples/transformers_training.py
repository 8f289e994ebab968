"""A small Hugging Face Llama with attention "fcore", on the CPU: trained on text, generating."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flashcore.torch

ROOT = Path(__file__).resolve().parent.parent
LENGTH, STEPS = 64, 80

torch.set_num_threads(1)  # the model is too small for more
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
name = flashcore.torch.register_transformers()
model = LlamaForCausalLM._from_config(config, attn_implementation=name)

data = torch.frombuffer(bytearray((ROOT / "docs" / "api.md").read_bytes()), dtype=torch.uint8)
data = data.long()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(STEPS):
    starts = torch.randint(len(data) - LENGTH, (16, 1))
    batch = data[starts + torch.arange(LENGTH)]
    loss = model(input_ids=batch, labels=batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}")
assert loss < 3.2

# Two prompts of different lengths in one batch: the shorter one is padded on the left.
prompts = [b"The result is of q's ", b"dropout "]
width = max(map(len, prompts))
tokens = torch.tensor([list(p.rjust(width, b"\0")) for p in prompts])
written = {}
for attention in (name, "eager"):
    model.set_attn_implementation(attention)
    written[attention] = model.eval().generate(
        tokens, attention_mask=(tokens != 0).long(), max_new_tokens=24, do_sample=False
    )
assert torch.equal(written[name], written["eager"]), "what eager attention writes"
for line in written[name]:
    print(bytes(line.tolist()).lstrip(b"\0").decode(errors="replace"))
