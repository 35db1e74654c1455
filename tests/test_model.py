"""model.py with models of many families, made on the spot: what trains is what the model itself computes, and
what was sampled.
"""
import argparse
import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import generate_refs
import model as model_py
import qrpo
from conftest import call, make_tokenizer, one_line_of_error, refused, write_rows
from model import Policy, load_model, load_tokenizer
from test_families import make
from tokens import end_ids, pad, prompt_ids

CPU = torch.device("cpu")
SMALL = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
         "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
FAMILIES = {  # the start of its class names: what is special about it
    "Llama": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "Mistral": {"num_key_value_heads": 1, "sliding_window": 8},
    "Qwen2": {"num_key_value_heads": 1},  # biases in attention
    "Qwen3": {"num_key_value_heads": 1, "head_dim": 16},  # norms of queries and keys
    "Gemma2": {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 3.0},
    "Gemma3": {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},  # learned positions, dropout
    "GPTNeoX": {"attention_dropout": 0.1, "hidden_dropout": 0.1},  # parallel residual, biases
    "Cohere": {"num_key_value_heads": 1, "logit_scale": 0.3},
    "Granite": {"num_key_value_heads": 1, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "Phi": {}, "Olmo2": {"num_key_value_heads": 1}}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The folder of a random model of this family."""
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


ARGS = argparse.Namespace(num_refs=1, batch_size=8, seed=0, temperature=1.0, top_p=1.0, field="samples")


def sampled(model, tokenizer):
    """Three prompts and a sampled completion of each, as lists of token ids."""
    prompts = [prompt_ids(tokenizer, text) for text in ("one", "another prompt", "x")]
    requests = [{"row": {"id": i}, "prompt": p, "limit": 20 - i} for i, p in enumerate(prompts)]
    found = generate_refs.sample(model, requests, ARGS, set(end_ids(model, tokenizer)))
    completions = [completion for _, (completion,) in sorted((row["id"], c) for row, c in found)]
    return prompts, completions


def as_batch(prompts, completions):
    tokens = pad([p + c for p, c in zip(prompts, completions)], "cpu")
    prompt_lens = torch.tensor([len(p) for p in prompts])
    lens = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions)])
    return tokens, prompt_lens, lens


def test_log_probabilities_are_the_models_own_and_the_samplers(family):
    model, tokenizer = load_model(family, torch.float32, CPU), load_tokenizer(family)
    prompts, completions = sampled(model, tokenizer)
    logps = Policy(model)(*as_batch(prompts, completions))
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1].float()
        own = torch.log_softmax(logits, -1)[torch.arange(len(completion)), completion].sum().item()
        assert abs(logps[i].item() - own) < 2e-4 * max(1, abs(own))
        generator = np.random.Generator(np.random.Philox(generate_refs.random_key(ARGS, i, 0)))
        u = generator.random(len(completion), np.float32)
        for t, token in enumerate(completion):  # drawn from these probabilities: u lies in its token's part
            cdf = torch.softmax(logits[t], 0).cumsum(0)
            below = cdf[token - 1].item() if token else 0.0
            assert below - 1e-4 < u[t] < cdf[token].item() + 1e-4


def test_every_parameter_gets_a_gradient_and_groups_change_nothing(family):
    model, tokenizer = load_model(family, torch.float32, CPU), load_tokenizer(family)
    policy, batch = Policy(model), as_batch(*sampled(model, tokenizer))
    logps = policy(*batch)
    torch.testing.assert_close(Policy(model, length_groups=2)(*batch), logps, rtol=1e-5, atol=1e-4)
    logps.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_logps_in_chunks_are_those_of_qrpo_with_their_gradients(family, monkeypatch):
    """And so is the model's own forward when it is called a chunk at a time (`logits_of`)."""
    model = load_model(family, torch.float32, CPU)
    tokens = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    prompt_lens, lens = torch.tensor([3, 1, 5]), torch.tensor([7, 12, 6])
    plain = qrpo.completion_logps(model(tokens, use_cache=False).logits, tokens, prompt_lens, lens)
    weights = list(model.parameters())
    gradients = torch.autograd.grad(plain.sum(), weights)
    for chunk in (1, 4, 1000):
        monkeypatch.setattr(model_py, "CHUNK", chunk)
        ours = Policy(model)(tokens, prompt_lens, lens)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
        for a, b in zip(torch.autograd.grad(ours.sum(), weights), gradients):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for its GPU: tensors read as numbers, and masks used as indices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func == torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        self.count += masks or func == torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("groups", (1, 2))
def test_how_often_a_micro_batch_waits_for_its_device(tiny, groups):
    """Once and, in transformers, once more for every group, and twice for the completion positions."""
    policy = Policy(load_model(tiny, torch.float32, CPU), groups)
    tokens, lens = torch.randint(1, 50, (4, 12)), torch.tensor([12, 9, 7, 5])
    with Waits() as waits:
        policy(tokens, torch.full((4,), 3), lens).sum().backward()
    assert waits.count <= 2 * groups + 2


def test_what_training_saves_is_the_trained_policy(family, tmp_path):
    """The log-probabilities of the model in memory and of the one on disk, to the bit, after one step."""
    tokenizer = load_tokenizer(family)
    completions = []
    for text in "abcd":
        ids = tokenizer(text, add_special_tokens=False).input_ids
        completions.append({"text": text, "token_ids": ids, "finish_reason": "length"})
    data = write_rows(tmp_path / "d.jsonl", [
        {"prompt": "p", "ref_completions": completions, "ref_rewards": [0, 1, 2, 3]}])
    script = call("train.py", f"--model={family}", f"--data={data}", f"--out={tmp_path / 'run'}",
                  "--learning_rate=1e-2")
    again = load_model(tmp_path / "run", torch.float32, CPU)
    batch = as_batch([tokenizer("p").input_ids], [completions[0]["token_ids"]])
    with torch.no_grad():
        trained, before = script["policy"](*batch), Policy(load_model(family, torch.float32, CPU))(*batch)
        assert torch.equal(Policy(again)(*batch), trained) and not torch.equal(before, trained)
    in_memory, on_disk = script["model"].config.to_dict(), again.config.to_dict()
    assert on_disk | {"_name_or_path": 0} == in_memory | {"_name_or_path": 0}


def test_models_that_differ_in_the_midst_of_a_file_have_other_fingerprints(tmp_path):
    """As after LoRA those of a multimodal model, whose file begins with embeddings and ends with images."""
    weights = torch.zeros(1 << 21)  # 8 MiB
    found = set()
    for value in (0, 1):
        weights[1 << 20:][:1 << 18] = value
        save_file({"weights": weights}, tmp_path / "model.safetensors")
        found.add(model_py.model_fingerprint(tmp_path))
    assert len(found) == 2


def test_bfloat16_autocast_is_near_float32(family):
    """Within 0.05 nats per token on these random models, whose logits are far larger than usual."""
    policy = Policy(load_model(family, torch.float32, CPU))
    tokens = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(0))
    prompt_lens, lens = torch.full((4,), 10), torch.full((4,), 40)
    with torch.no_grad():
        exact = policy(tokens, prompt_lens, lens)
        with torch.autocast("cpu", torch.bfloat16):
            half = policy(tokens, prompt_lens, lens)
    assert half.dtype == torch.float32 and ((half - exact).abs() / 30).max() < 0.05


def test_completions_of_4000_tokens_and_log_probabilities_of_minus_1e4(tmp_path):
    config = transformers.LlamaConfig(**SMALL | {"max_position_embeddings": 4200, "initializer_range": 0.05})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32, CPU)
    tokens = torch.randint(0, 256, (1, 4100))
    with torch.no_grad():
        logps = Policy(model)(tokens, torch.tensor([100]), torch.tensor([4100]))
        each = torch.log_softmax(model(tokens).logits[0, 99:-1].double(), -1).gather(1, tokens[0, 100:, None])
    assert logps.item() < -1e4 and abs(logps.item() / each.sum().item() - 1) < 1e-6


# ---- what is loaded, and what is refused ----

def test_experts_that_are_modules_of_their_own_are_refused(tiny, capsys):
    """As in models that bring their code: a batch need not reach each of them, and ranks would wait."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            return self.experts[0](x)

    model.model.layers[1].mlp = Mixture()
    one_line_of_error(capsys, ["model.layers.1.mlp.experts", "modules of their own"],
                      lambda: model_py.prepare(model))


def test_dropout_is_off_while_activations_are_recomputed(tmp_path):
    """Of layers that read their own training mode (OPT), and in every part of the configuration."""
    config = transformers.OPTConfig(vocab_size=259, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                                    num_attention_heads=2, max_position_embeddings=64, dropout=0.3,
                                    attention_dropout=0.3, layerdrop=0.3, word_embed_proj_dim=32)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32, CPU)
    tokens, lens = torch.arange(20)[None] + 5, torch.tensor([20])
    plain = Policy(model)(tokens, lens - 10, lens)
    model_py.checkpoint_activations(model)
    assert any(module.training for module in model.modules())
    torch.testing.assert_close(Policy(model)(tokens, lens - 10, lens), plain)


def test_the_context_of_llama4_ends_where_its_attention_counts_the_columns_of_the_cache(tmp_path):
    config = transformers.Llama4TextConfig(attn_temperature_tuning=True, floor_scale=8, **SMALL)
    for tuned, expected in ((True, 8), (False, 64)):
        config.attn_temperature_tuning = tuned
        assert model_py.context_length(argparse.Namespace(config=config)) == expected


def test_a_gpu_that_torch_cannot_use_is_an_error_and_no_slow_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exists = model_py.Path.exists
    monkeypatch.setattr(model_py.Path, "exists", lambda path: str(path) == "/dev/nvidia0" or exists(path))
    one_line_of_error(capsys, ["CUDA 13.0", "Update the driver"], model_py.get_device)
    monkeypatch.setattr(model_py.Path, "exists", exists)
    assert model_py.get_device() == CPU


def change_config(**more):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | more))
    return change


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4877660776\n"
BROKEN = {  # what is done to the folder of a model: what the line of error says
    "weights of git-lfs": (lambda f: (f / "model.safetensors").write_text(POINTER), "git lfs pull"),
    "tokenizer of git-lfs": (lambda f: (f / "tokenizer.json").write_text(POINTER), "git lfs pull"),
    "torn weights": (lambda f: os.truncate(f / "model.safetensors", 9000), "no CausalLM can be loaded"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "no CausalLM can be loaded"),
    "torn config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "GPTQ": (change_config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised (gptq)"),
    "bitsandbytes": (change_config(quantization_config={"quant_method": "bitsandbytes"}),
                     "is quantised (bitsandbytes)"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge_and_unload"),
    "code without permission": (
        change_config(model_type="own", auto_map={"AutoConfig": "own.Own"}), "can be loaded from it"),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("script", ("generate_refs.py", "train.py"))
def test_what_is_no_whole_model_is_refused_in_one_line(tiny, rewarded, tmp_path, capsys, how, script):
    change, says = BROKEN[how]
    shutil.copytree(tiny, tmp_path / "model")
    change(tmp_path / "model")
    flags = ["--field=samples"] if script == "generate_refs.py" else []
    refused(capsys, [says, str(tmp_path / "model")], script, f"--model={tmp_path / 'model'}",
            f"--data={rewarded}", f"--out={tmp_path / 'out'}", *flags)


def test_the_operations_of_a_mixture_are_those_of_the_experts_that_a_token_passes():
    config = transformers.MixtralConfig(**SMALL | {"num_local_experts": 8, "num_experts_per_tok": 2})
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    passed = sum(n * (0.25 if ".experts." in name else 1) for name, n in sizes.items() if "embed" not in name)
    assert model_py.flops_per_token(model, 0) == 6 * passed


@pytest.mark.parametrize("kind, settings", (
    ("phimoe", {"router_jitter_noise": 0.01, "input_jitter_noise": 0.1}),
    ("mixtral", {"router_jitter_noise": 0.1}), ("opt", {"dropout": 0.1}), ("gpt2", {"resid_pdrop": 0.1})))
def test_a_model_has_the_logits_of_plain_transformers_also_while_it_recomputes(tmp_path, kind, settings):
    """PhiMoE's routers use their jitter as a threshold in evaluation mode, too, and add noise in training."""
    make(kind, tmp_path / "model", **settings)
    model = load_model(tmp_path / "model", torch.float32, torch.device("cpu"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    model_py.checkpoint_activations(model)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
