"""Other families than Llama, made on the spot: what trains is what the model itself computes, and what was sampled."""
import argparse

import numpy as np
import pytest
import torch
import transformers

import generate_refs
import models
import runs
from conftest import make_tokenizer

SMALL = dict(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=64, initializer_range=0.3, bos_token_id=256, eos_token_id=257, pad_token_id=257)
FAMILIES = {  # class prefix: what is peculiar to it
    "Llama": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "Mistral": {"num_key_value_heads": 1, "sliding_window": 8},
    "Qwen2": {"num_key_value_heads": 1},  # biases in attention
    "Qwen3": {"num_key_value_heads": 1, "head_dim": 16},  # norms of queries and keys
    "Gemma2": {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 3.0},
    "Gemma3": {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},  # learned positions, dropout in its config
    "GPTNeoX": {"attention_dropout": 0.1, "hidden_dropout": 0.1},  # parallel residual, biases
    "Cohere": {"num_key_value_heads": 1, "logit_scale": 0.3},
    "Granite": {"num_key_value_heads": 1, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "Phi": {}, "Olmo2": {"num_key_value_heads": 1}}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    settings = SMALL | FAMILIES[request.param]
    name = request.param + ("Text" if request.param == "Gemma3" else "")
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # zero biases and unit norms would hide a mistake
        parameter.data += 0.05 * torch.randn(parameter.shape)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_log_probabilities_are_the_models_own_and_the_samplers(family, tmp_path):
    model, tokenizer = models.load_model(family, torch.float32, torch.device("cpu")), models.load_tokenizer(family)
    prompts = [models.prompt_ids(tokenizer, text) for text in ("one", "another prompt", "x")]
    args = argparse.Namespace(num_refs=1, batch_size=8, seed=0, temperature=1.0, top_p=1.0, field="samples")
    requests = [{"row": {"id": i}, "prompt": p, "limit": 20 - i} for i, p in enumerate(prompts)]
    sampled = generate_refs.sample(model, requests, args, set(models.end_ids(model, tokenizer)))
    completions = [found for _, (found,) in sorted((row["id"], found) for row, found in sampled)]
    lens, prompt_lens = (torch.tensor(x) for x in (
        [len(p) + len(c) for p, c in zip(prompts, completions)], [len(p) for p in prompts]))
    tokens = models.pad([p + c for p, c in zip(prompts, completions)], "cpu")
    policy = models.Policy(model)
    logps = policy(tokens, prompt_lens, lens)
    torch.testing.assert_close(policy(tokens, prompt_lens, lens, parts=2), logps, rtol=1e-5, atol=1e-4)
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        with torch.no_grad():
            each = torch.log_softmax(model(torch.tensor([prompt + completion])).logits[0].float(), -1)
        own = each[torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1), completion].sum()
        assert abs(logps[i].item() - own.item()) < 2e-4 * max(1, abs(own.item()))
        generator = np.random.Generator(np.random.Philox(generate_refs.random_key(args, i, 0)))
        u = generator.random(len(completion), np.float32)
        for j, token in enumerate(completion):  # drawn from these probabilities: u lies in its token's part
            cdf = torch.softmax(each[len(prompt) - 1 + j], 0).cumsum(0)
            below = cdf[token - 1].item() if token else 0.0
            assert below - 1e-4 < u[j] < cdf[token].item() + 1e-4
    logps.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    runs.save_model(tmp_path / "saved", model, model.state_dict(), tokenizer)  # the checkpoint round-trips
    again = models.load_model(tmp_path / "saved", torch.float32, torch.device("cpu"))
    assert torch.equal(models.Policy(again)(tokens, prompt_lens, lens), logps)
    assert again.config.to_dict() | {"_name_or_path": 0} == model.config.to_dict() | {"_name_or_path": 0}


def test_bfloat16_autocast_is_near_float32(family):
    """Stated: within 0.03 nats a token on these random models, whose logits are far larger than a trained model's."""
    model = models.load_model(family, torch.float32, torch.device("cpu"))
    tokens = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(0))
    lens = torch.full((4,), 40), torch.full((4,), 10)
    with torch.no_grad():
        exact = models.Policy(model)(tokens, lens[1], lens[0])
        with torch.autocast("cpu", torch.bfloat16):
            half = models.Policy(model)(tokens, lens[1], lens[0])
    assert half.dtype == torch.float32 and ((half - exact).abs() / 30).max() < 0.05, ((half - exact).abs() / 30).max()


def test_completions_of_4000_tokens_and_log_probabilities_of_minus_1e4(tmp_path):
    config = transformers.LlamaConfig(**SMALL | {"max_position_embeddings": 4200, "initializer_range": 0.05})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 256, (1, 4100))
    with torch.no_grad():
        logps = models.Policy(model)(tokens, torch.tensor([100]), torch.tensor([4100]))
        each = torch.log_softmax(model(tokens).logits[0, 99:-1].double(), -1).gather(1, tokens[0, 100:, None])
    assert logps.item() < -1e4 and abs(logps.item() / each.sum().item() - 1) < 1e-6
    assert np.isfinite(logps.item())
