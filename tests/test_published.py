"""Configuration files with every field that well-known models publish, at tiny sizes, through all five
scripts: lists and nulls, the names of transformers 4, nested parts, quantised weights.

    python -m pytest -q tests/test_published.py
"""
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model as model_py
from conftest import LETTERS, call, make_tokenizer, read_rows, write_rows

CPU = torch.device("cpu")
ATTENTION = {"attention_bias": False, "attention_dropout": 0.0}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
         "num_key_value_heads": 2, "initializer_range": 0.2, "vocab_size": 300, "use_cache": True}
COMMON = ATTENTION | SIZES | {"torch_dtype": "bfloat16", "transformers_version": "4.51.0",
                              "hidden_act": "silu", "rms_norm_eps": 1e-5}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.51.0"}
CONFIGS = {  # name: config.json, and eos_token_id of generation_config.json
    "Llama 3.1 8B Instruct": (COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 256,
        "eos_token_id": [257, 258, 259], "max_position_embeddings": 131072, "mlp_bias": False,
        "pretraining_tp": 1, "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": False}, [257, 258, 259]),
    "Qwen3 0.6B": (COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "bos_token_id": 258,
        "eos_token_id": 257, "head_dim": 16, "max_position_embeddings": 40960, "max_window_layers": 28,
        "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False}, [257, 258]),
    "Gemma 3 4B it": ({
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 290,
        "eoi_token_index": 291, "eos_token_id": [257, 258], "image_token_index": 292,
        "initializer_range": 0.2, "mm_tokens_per_image": 4, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "text_config": SIZES | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 1024,
                                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "vision_config": {"hidden_size": 32, "image_size": 28, "intermediate_size": 64, "patch_size": 14,
                          "model_type": "siglip_vision_model", "num_attention_heads": 2,
                          "num_hidden_layers": 1, "vision_use_head": False}}, [257, 258]),
    "Gemma 3 1B it": (COMMON | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": None,
        "bos_token_id": 256, "cache_implementation": "hybrid", "eos_token_id": [257, 258], "pad_token_id": 0,
        "final_logit_softcapping": None, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768, "query_pre_attn_scalar": 16, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6},
        [257, 258]),
    "Mistral 7B Instruct v0.3": (COMMON | {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 256,
        "eos_token_id": 257, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False}, 257),
    "Phi 4": (COMMON | {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "auto_map": {}, "bos_token_id": 256,
        "eos_token_id": 257, "pad_token_id": 258, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_scaling": None,
        "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False}, [257, 258]),
    "Phi 4 mini": (COMMON | {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "bos_token_id": 257, "eos_token_id": 257,
        "embd_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False,
        "max_position_embeddings": 131072, "mlp_bias": False, "original_max_position_embeddings": 4096,
        "pad_token_id": 257, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "rope_theta": 10000.0,
        "rope_scaling": {"long_factor": [1.5, 2.0], "short_factor": [1.0, 1.0], "type": "longrope"},
        "sliding_window": 262144, "tie_word_embeddings": True}, [258, 257]),
    "GLM 4 9B 0414": (COMMON | {
        "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "eos_token_id": [257, 258, 259],
        "head_dim": 16, "max_position_embeddings": 32768, "pad_token_id": 257, "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0, "tie_word_embeddings": False}, [257, 258, 259]),
    "gpt-oss 20B": (COMMON | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
        "eos_token_id": 257, "experts_per_token": 2, "num_experts_per_tok": 2, "num_local_experts": 4,
        "head_dim": 16, "initial_context_length": 4096, "intermediate_size": 32,
        "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 131072,
        "output_router_logits": False, "pad_token_id": 258, "router_aux_loss_coef": 0.9,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
                         "original_max_position_embeddings": 4096, "truncate": False},
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}},
        [257, 258]),
}


def make(folder, config, ends):
    """A model with this config.json, in bfloat16; its experts in MXFP4, if it says so."""
    folder.mkdir()
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain))
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    made.to(torch.bfloat16).save_pretrained(folder)
    if "quantization_config" in config:
        quantise_experts(folder / "model.safetensors")
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING | {"eos_token_id": ends}))
    return folder


def quantise_experts(path):
    """Random experts as gpt-oss has them: (experts, out, in / 32) groups of 16 bytes, and a scale each."""
    weights = load_file(path)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, out = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, inside // 32, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(121, 125, (experts, out, inside // 32), dtype=torch.uint8)
    save_file(weights, path, {"format": "pt"})


def without_dtype(value):
    """A configuration without what save_model may change: the dtypes, and that it was quantised."""
    if not isinstance(value, dict):
        return value
    changed = "dtype", "torch_dtype", "quantization_config"
    return {name: without_dtype(part) for name, part in value.items() if name not in changed}


@pytest.fixture(params=CONFIGS)
def trained(request, tmp_path):
    """The folders of such a model and of a run that trained it on its own samples."""
    model, run = make(tmp_path / "model", *CONFIGS[request.param]), tmp_path / "run"
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("one", "another", "x")])
    call("generate_refs.py", f"--model={model}", f"--data={data}", f"--out={tmp_path / 'refs'}",
         "--num_refs=3", "--max_new_tokens=6")
    (tmp_path / "reward.py").write_text(LETTERS)
    call("score.py", f"--data={tmp_path / 'refs'}", f"--out={tmp_path / 'scored'}",
         f"--reward={tmp_path / 'reward.py'}:letters")
    call("train.py", f"--model={model}", f"--data={tmp_path / 'scored'}", f"--out={run}", "--batch_size=9",
         "--learning_rate=1e-2", "--dtype=float32")
    return model, run


def test_a_published_configuration_is_trained_and_kept(trained):
    """Its own files are those of the trained model, but for the dtype; and its weights have their names."""
    model, run = trained
    assert read_rows(run / "metrics.jsonl")[0]["drift"] < 1e-5
    before, after = (json.loads((folder / "config.json").read_text()) for folder in trained)
    assert without_dtype(after) == without_dtype(before) and after["torch_dtype"] == "float32"
    for file in model.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (run / file.name).read_bytes() == file.read_bytes()
    names = set(load_file(model / "model.safetensors"))
    names -= {name for name in names if name.endswith("_scales")}
    assert set(load_file(run / "model.safetensors")) == {name.removesuffix("_blocks") for name in names}
    model_py.load_model(run, torch.float32, CPU)


@pytest.mark.slow
def test_a_trained_model_is_sampled_scored_and_evaluated(trained):
    model, run = trained
    folder = run.parent
    call("generate_refs.py", f"--model={run}", f"--data={folder / 'scored'}", f"--out={folder / 'samples'}",
         "--field=samples", "--num_refs=3", "--max_new_tokens=6")
    call("score.py", f"--data={folder / 'samples'}", f"--out={folder / 'rewarded'}",
         f"--reward={folder / 'reward.py'}:letters")
    call("evaluate.py", f"--model={run}", f"--ref_model={model}", f"--data={folder / 'rewarded'}",
         f"--out={folder / 'evaluation'}")
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert "mean reward" in results and results["KL to reference, nats"]["policy"][0] != 0


def test_weights_in_mxfp4_are_dequantised(tmp_path):
    """Against the format's own numbers: two values of 4 bits in a byte, the lower first."""
    folder = make(tmp_path / "model", *CONFIGS["gpt-oss 20B"])
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    stored, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.experts.gate_up_proj"
    blocks, scales = stored[f"{name}_blocks"].long(), stored[f"{name}_scales"].float()
    pairs = torch.stack([values[blocks % 16], values[blocks // 16]], -1).flatten(-2)
    expected = (pairs * (scales - 127).exp2()[..., None]).flatten(2).transpose(1, 2)  # (experts, in, out)
    model = model_py.load_model(folder, torch.float32, CPU)
    assert torch.equal(model.get_parameter(name), expected) and model.get_parameter(name).requires_grad
