"""Small randomly initialised Hugging Face models, attention "fcore" beside "eager", float32.

Weights are large enough for attention to matter: a test below checks that it does.
"""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")

import flashcore as fc  # noqa: E402
import flashcore.torch as ft  # noqa: E402
from flashcore.torch.transformers import fcore_attention, fcore_mask  # noqa: E402

VOCABULARY, LENGTH, BATCH = 61, 12, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
LOCAL = GROUPED | {"sliding_window": 5}
MODELS = {
    "GPT2": ("GPT2LMHeadModel", SIZES | {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}),
    "Bert": (
        "BertForMaskedLM",
        SIZES | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    ),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", LOCAL),  # a sliding window in every layer
    "Phimoe": ("PhimoeForCausalLM", LOCAL | {"num_local_experts": 2}),  # said by its mask alone
    "Gemma2": (  # windows in every other layer, softcap
        "Gemma2ForCausalLM",
        LOCAL | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "Gemma3Text": (
        "Gemma3ForCausalLM",
        LOCAL
        | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "GptOss": (  # sinks
        "GptOssForCausalLM",
        LOCAL | {"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "Llama4Text": (  # chunks
        "Llama4ForCausalLM",
        GROUPED
        | {"attention_chunk_size": 5, "intermediate_size_mlp": 48, "num_local_experts": 2}
        | {"layer_types": ["chunked_attention", "full_attention"]},
    ),
    "T5": (  # position bias, cross attention
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
        | {"num_heads": 4, "dropout_rate": 0, "initializer_factor": 1.0}
        | {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0},
    ),
}
GENERATORS = [name for name in MODELS if name != "Bert"]


@pytest.fixture(scope="module", autouse=True)
def registered():
    assert ft.register_transformers() == "fcore"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(threads)


@functools.cache
def built(name):
    cls, settings = MODELS[name]
    config = getattr(transformers, name + "Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, cls)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, x in model.named_parameters():
            if "sinks" in parameter_name:
                x.normal_()
    return model.eval()


def model_of(name, implementation):
    model = built(name)
    model.set_attn_implementation(implementation)
    model.zero_grad()
    return model


def tokens(seed=0, batch=BATCH, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def padding(side):
    if side == "none":
        return None
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :4] = mask[2, :1] = 0
    return mask if side == "left" else mask.flip(1)


def labels_for(ids, mask):
    """Nothing is asked of padding, nor of the token that padding would predict."""
    labels = ids.clone()
    if mask is not None:
        labels[mask == 0] = -100
        labels[:, 1:][mask[:, :-1] == 0] = -100
    return labels


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_agree_with_eager(name, side):
    ids, mask = tokens(), padding(side)
    results = {}
    for implementation in ("eager", "fcore"):
        model = model_of(name, implementation)
        out = model(input_ids=ids, attention_mask=mask, labels=labels_for(ids, mask))
        out.loss.backward()
        logits = out.logits.detach()
        real = logits if mask is None or name == "T5" else logits[mask.bool()]
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results[implementation] = real, out.loss.detach(), grads
    (logits, loss, grads), (want, want_loss, want_grads) = results["fcore"], results["eager"]
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    assert grads.keys() == want_grads.keys()
    # Biases of keys have gradient 0 but for rounding: the largest gradient says what rounding is.
    largest = max(float(x.abs().max()) for x in want_grads.values())
    for got, expected in ((logits, want), *((grads[n], want_grads[n]) for n in grads)):
        tolerance = 2e-5 * float(expected.abs().max()) + 1e-6 * largest
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_attention_matters(name):
    """The comparison above would see a wrong key, window or sink."""
    model = model_of(name, "fcore")
    ids = tokens()
    want = model(input_ids=ids).logits
    early, window = ids.clone(), ids.clone()
    early[:, 2] = 3
    assert (model(input_ids=early).logits - want)[:, 3:].abs().max() > 1e-2
    if name == "GptOss":
        sinks = model.model.layers[0].self_attn.sinks
        with torch.no_grad():
            sinks += 1
            changed = model(input_ids=ids).logits
            sinks -= 1
        assert (changed - want).abs().max() > 1e-2
    if name == "Gemma2":  # two windows of 5: token 0 reaches at most token 8 through layer 1
        window[:, 0] = 3
        first = model.model.layers[0]
        hidden = []
        hook = first.register_forward_hook(lambda m, i, out: hidden.append(out))
        model(input_ids=ids), model(input_ids=window)
        hook.remove()
        change = (hidden[0] - hidden[1]).abs().amax((0, 2))
        assert change[:5].min() > 1e-4 and change[5:].max() == 0


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generate_agrees_with_eager(name, cache):
    """Left padding, a cache, and past the sliding window."""
    if name == "T5" and cache == "static":
        cache = "dynamic"
    ids, mask = tokens(), padding("left")
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "cache_implementation": cache}
    options |= {"attention_mask": mask, "pad_token_id": 0, "disable_compile": True}
    want = model_of(name, "eager").generate(ids, **options)
    got = model_of(name, "fcore").generate(ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_cache_continues_in_steps(name):
    """Prefill in two parts equals one."""
    model, ids = model_of(name, "fcore"), tokens()
    with torch.no_grad():
        want = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :7], use_cache=True)
        second = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), want)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3Text"])
def test_packed_sequences_stay_apart(name):
    """position_ids that start again mark a new sequence."""
    model, ids = model_of(name, "fcore"), tokens(batch=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        apart = [model(input_ids=part).logits for part in ids.split([5, 7], 1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_the_callers_own(kind):
    ids = tokens()
    visible = (torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.3) | torch.eye(LENGTH, dtype=torch.bool)
    added = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    want = model_of("Llama", "eager")(input_ids=ids, attention_mask=added).logits
    mask = visible if kind == "bool" else added
    got = model_of("Llama", "fcore")(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["GPT2", "Bert", "Llama", "Gemma2"])
def test_training_ends_at_the_same_loss(name):
    """50 steps of AdamW, with padding."""
    state = {n: x.clone() for n, x in built(name).state_dict().items()}
    losses = {}
    for implementation in ("eager", "fcore"):
        model = model_of(name, implementation)
        model.load_state_dict(state)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(50):
            ids, mask = tokens(step % 4), padding(("left", "right")[step % 2])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels_for(ids, mask)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[implementation] = loss.item()
        model.load_state_dict(state)
    assert losses["fcore"] < 2, "it learns"
    assert losses["fcore"] == pytest.approx(losses["eager"], abs=1e-3)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["GPT2", "Bert", "Llama", "Mistral"])
def test_sdpa_of_transformers_follows_register_sdpa(name, side):
    ids, mask = tokens(), padding(side)
    want = model_of(name, "eager")(input_ids=ids, attention_mask=mask).logits
    with ft.register_sdpa(strict=True):
        got = model_of(name, "sdpa")(input_ids=ids, attention_mask=mask).logits
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)


def bfloat16_loss(name, implementation, device):
    """The loss after 50 steps under autocast, in the head dim that GPU kernels have."""
    cls, settings = MODELS[name]
    settings = settings | {"hidden_size": 128, "num_attention_heads": 2}
    # Other sizes, and rounding alone takes two runs apart: Gemma's norms enlarge what is small.
    settings["initializer_range"] = 0.1 if name.startswith("Gemma") else 0.02
    if "head_dim" in settings:
        settings["head_dim"] = 64
    config = getattr(transformers, name + "Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, cls)._from_config(config, attn_implementation=implementation)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(50):
        ids = tokens(step % 4).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["GPT2", "Bert", "Llama", "Gemma2", "Gemma3Text"])
def test_bfloat16_training_ends_at_the_same_loss(name, device):
    q = torch.zeros(1, LENGTH, 2, 64, device=device, dtype=torch.bfloat16)
    options = {"softcap": 2.0} if name == "Gemma2" else {}
    plan = ft.explain(q, q, q, causal=name != "Bert", direction="backward", **options)
    if plan.kernel is None:
        pytest.skip(f"no kernel runs backward: {plan.refusals}")
    eager, fcore = (bfloat16_loss(name, x, device) for x in ("eager", "fcore"))
    print(f"{name}, {device}, 50 steps: loss {fcore:.4f} with fcore, {eager:.4f} with eager")
    assert fcore < 3, "it learns"
    assert fcore == pytest.approx(eager, abs=1e-2)


def test_compiled_model():
    model, ids = model_of("Mistral", "fcore"), tokens()
    want = model(input_ids=ids, labels=ids).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(input_ids=ids, labels=ids, use_cache=False).loss
    got.backward()
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_dropout_while_training():
    settings = {**MODELS["Llama"][1], "attention_dropout": 0.5}
    config = transformers.LlamaConfig(**settings)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="fcore")
    ids, losses = tokens(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model.train()(input_ids=ids, labels=ids).loss)
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    model.eval()
    assert model(input_ids=ids, labels=ids).loss == model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_is_causal_if_the_module_is(is_causal):
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    keys = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
    module = torch.nn.Module()
    module.is_causal = is_causal
    got, _ = fcore_attention(module, q, k, v, keys)
    mask = keys[:, None, None] & (torch.ones(5, 5).tril().bool() | (not is_causal))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_what_eager_alone_has_is_refused():
    model = model_of("Llama", "fcore")
    with pytest.raises(fc.UnsupportedError, match="output_attentions.*attn_implementation='eager'"):
        model(input_ids=tokens(), output_attentions=True)


# ---- the mask function: no mask of length x length where a rule says it --------------------------


def masks(model_name, mask=None, **more):
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = model_of(model_name, "fcore").config
    embeds = torch.zeros(BATCH, LENGTH, 32)
    arguments = {"config": config, "inputs_embeds": embeds, "attention_mask": mask}
    arguments |= {"past_key_values": None, **more}
    windowed = create_sliding_window_causal_mask if config.sliding_window else create_causal_mask
    return create_causal_mask(**arguments), windowed(**arguments)


def test_masks_say_rules_by_their_shape():
    full = torch.ones(BATCH, LENGTH, dtype=torch.long)
    assert masks("Mistral")[0] is None and masks("Mistral", full)[0] is None
    causal, sliding = masks("Mistral", padding("left"))
    assert causal.shape == (BATCH, LENGTH) and sliding.shape == (BATCH, 5, LENGTH)
    assert sliding.stride(1) == 0, "no memory for the window"
    assert masks("Mistral", full)[1].untyped_storage().nbytes() == 1


def test_masks_that_no_rule_says_are_whole():
    added = {"or_mask_function": lambda b, h, q, k: k < 2}
    for mask in masks("Mistral", **added):
        assert mask.shape == (BATCH, 1, LENGTH, LENGTH)
    assert fcore_mask(1, 4, 8, q_offset=torch.tensor(2)).shape == (1, 1, 4, 8)
