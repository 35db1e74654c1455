"""Model families: every one that transformers loads as a causal LM is sampled, trained and saved right,
or refused in one line. docs/models.md is the table of all, which SLOW=1 makes again.

    python -m pytest -q tests/test_families.py             # a few families of every kind
    SLOW=1 python -m pytest -q tests/test_families.py      # all; writes docs/models.md
"""
import contextlib
import io
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import model as model_py
import tokens
from conftest import ROOT, Process, call, make_tokenizer, read_rows, start_ranks, write_rows

SIZES = dict(
    vocab_size=259, hidden_size=32, d_model=32, n_embd=32, emb_dim=32, embedding_size=32, dim_model=32,
    intermediate_size=64, ffn_dim=64, decoder_ffn_dim=64, encoder_ffn_dim=64, dim_ff=64, ffn_hidden_size=64,
    num_hidden_layers=2, num_layers=2, n_layer=2, n_layers=2, decoder_layers=2, encoder_layers=2,
    num_attention_heads=2, decoder_attention_heads=2, encoder_attention_heads=2, n_head=2, n_heads=2,
    num_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64, n_positions=64, n_ctx=64, max_seq_len=64,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, n_routed_experts=4,
    num_local_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, sliding_window=8,
    initializer_range=0.3,
    bos_token_id=256, eos_token_id=257, pad_token_id=258, is_decoder=True)


def tiny_config(kind, more):
    """The config of a model type with these sizes, as far as it has them; more: what else it needs."""
    default = CONFIG_MAPPING[kind]()
    part = next((name for name, value in vars(default).items() if value is default.get_text_config()), None)
    holder = getattr(default, part) if part else default
    settings = {}
    for name, value in SIZES.items():
        is_property = isinstance(getattr(type(holder), name, None), property)
        with contextlib.suppress(Exception):  # some attributes of some configs cannot be read
            if name not in holder.attribute_map and not is_property and getattr(holder, name) is not None:
                settings[name] = value
    settings |= more.get("text", more)
    if part:
        settings = {part: settings} | {name: value for name, value in more.items() if name != "text"}
    return CONFIG_MAPPING[kind](**settings)


ROPE = {"num_key_value_heads": 2, "head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
MORE = {
    "axk1": ROPE, "axk2": ROPE, "deepseek_v2": ROPE | {"num_experts_per_tok": 2}, "deepseek_v3": ROPE,
    "deepseek_v32": ROPE, "glm_moe_dsa": ROPE,
    "glm4_moe_lite": ROPE, "minicpm3": ROPE, "youtu": ROPE, "diffllama": {"num_key_value_heads": 2},
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA, "codegen": {"n_head": 4, "rotary_dim": 4}, "gptj": {"rotary_dim": 8},
    "roberta": {"pad_token_id": 1}, "roberta-prelayernorm": {"pad_token_id": 1},
    "camembert": {"pad_token_id": 1},
    "data2vec-text": {"pad_token_id": 1}, "xlm-roberta": {"pad_token_id": 1},
    "xlm-roberta-xl": {"pad_token_id": 1},
    "xmod": {"pad_token_id": 1, "languages": ["en_XX"], "default_language": "en_XX"},
    "prophetnet": {"pad_token_id": 1}, "xglm": {"pad_token_id": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16}, "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16},
    "reformer": {"axial_pos_embds_dim": [16, 16]},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {"pronunciation_vocab_size": 30, "shape_vocab_size": 30},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1}, "hyperclovax": {"logits_scaling": 0.125},
    "granite": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64} | MAMBA, "cohere": {"logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 3.0},
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "falcon": {"alibi": True}, "mpt": {"max_seq_len": 64},
    "phi3": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                                 "long_factor": [4.0] * 8, "original_max_position_embeddings": 64},
             "max_position_embeddings": 256, "original_max_position_embeddings": 64},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3": {"vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                                 "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
               "mm_tokens_per_image": 4, "image_token_index": 255, "boi_token_index": 254,
               "eoi_token_index": 253},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 259,
                     "hidden_size_per_layer_input": 8,
                     "layer_types": ["sliding_attention", "full_attention"],
                     "activation_sparsity_pattern": [0.0, 0.0],
                     "laurel_rank": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 8,
                    "num_kv_shared_layers": 0,
                    "layer_types": ["sliding_attention", "full_attention"]},
}

LARGEST = 3_000_000  # parameters: what is larger with these sizes would need a config made by hand
SUBSET = ("gemma3", "hyperclovax", "phi3", "mixtral", "ernie4_5_moe", "bloom", "mamba", "bert",
          "modernbert-decoder", "minimax", "llama4",
          *(pytest.param(kind, marks=pytest.mark.slow) for kind in (  # test_model.py has them quickly
              "llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "cohere", "granite")))
TABLE = ROOT / "docs" / "models.md"
PROMPTS = ("one", "another prompt", "x", "a b c")


class Refused(Exception):
    """One line of error and exit code 2."""


def must(script, *flags):
    """Run a script; Refused with its message if it refuses. Returns its global names."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            return call(script, *flags)
    except SystemExit as end:
        errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        assert end.code == 2 and len(errors) == 1, err.getvalue()
        raise Refused(errors[0].removeprefix("error: ")) from None


def make(kind, folder, **more):
    """A tiny random model of this type in a folder; more: of its config."""
    config = tiny_config(kind, MORE.get(kind, {}) | more)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
        parameters = sum(p.numel() for p in empty.parameters())
    if parameters > LARGEST:
        pytest.skip(f"{parameters:,} parameters with these sizes")
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():  # zero biases and unit norms would hide a mistake
        parameter.data += 0.05 * torch.randn(parameter.shape)
    made.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def random_rows(tokenizer):
    """Rows with three rewarded completions each, of random tokens."""
    rng, rows = np.random.default_rng(0), []
    for i, prompt in enumerate(PROMPTS):
        sequences = [rng.integers(0, 128, n).tolist() for n in (3, 5, 12)]
        completions = [{"text": tokens.decode(tokenizer, [], ids), "token_ids": ids,
                        "finish_reason": "length"} for ids in sequences]
        rows.append({"id": i, "prompt": prompt, "ref_completions": completions,
                     "ref_rewards": [0.1, 0.5, 0.9]})
    return rows


@torch.no_grad()
def without_cache(own, ids, n):
    """The n likeliest next tokens by the model's own logits, each from a whole forward pass."""
    ids, start = list(ids), len(ids)
    for _ in range(n):
        ids.append(own(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[start:]


def walk(kind, folder):
    """Sample, train and save a tiny model of this type; returns what must be said of it in the table."""
    if not (folder / "model").exists():
        make(kind, folder / "model")
    write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    tokenizer, notes = model_py.load_tokenizer(folder / "model"), []
    with contextlib.suppress(ValueError):  # a part of a multimodal model that has no auto class of its own
        own = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()

    # the sampler, greedily, against the model's own generate
    flags = (f"--model={folder / 'model'}", f"--data={folder / 'prompts.jsonl'}", "--max_new_tokens=12",
             "--dtype=float32")
    try:
        must("generate_refs.py", *flags, f"--out={folder / 'greedy'}", "--num_refs=1", "--temperature=0")
        ends = tokens.end_ids(own, tokenizer)
        for row in read_rows(folder / "greedy"):
            ids = tokens.prompt_ids(tokenizer, row["prompt"])
            plain = own.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=ends,
                                 pad_token_id=257)[0, len(ids):]
            sampled = row["ref_completions"][0]["token_ids"]
            if sampled != plain.tolist()[:len(sampled)]:
                assert sampled == without_cache(own, ids, len(sampled)), kind
                notes = ["its own generate differs from its own logits"]
        must("generate_refs.py", *flags, f"--out={folder / 'refs'}", "--num_refs=3")
        refs = read_rows(folder / "refs")
    except Refused as refusal:
        if "sampler" not in str(refusal):
            raise
        notes.append("not sampled here (--engine=vllm)")
        refs = random_rows(tokenizer)

    # log-probabilities against the model's own logits
    for row in refs:
        row["ref_rewards"] = [0.1, 0.5, 0.9]
    write_rows(folder / "rewarded.jsonl", refs)
    trained = must("train.py", f"--model={folder / 'model'}", f"--data={folder / 'rewarded.jsonl'}",
                   "--batch_size=6",
                   f"--out={folder / 'run'}", "--learning_rate=1e-2", "--epochs=2", "--dtype=float32")
    data = trained["train_data"]
    for i in range(len(data.lens)):
        ids = torch.tensor(data.tokens[data.starts[i]:data.starts[i] + data.lens[i]].astype(np.int64))
        with torch.no_grad():
            each = own(ids[None], use_cache=False).logits[0].float().log_softmax(-1)[:-1].gather(1,
                                                                                                 ids[1:,
                                                                                                     None])
        expected = each[data.prompt_lens[i] - 1:].sum().item()
        assert abs(data.ref_logps[i] - expected) < 1e-4 * max(10, abs(expected)), kind

    # what was trained is what was saved, and it moved
    policy = trained["model"]
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "run").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before, after, saved = (m(ids, use_cache=False).logits for m in (own, policy, again))
    torch.testing.assert_close(saved, after, rtol=0, atol=1e-5 * after.abs().max().item())
    assert (after - before).abs().max() > 1e-3
    frozen = sum(not p.requires_grad for p in policy.parameters())
    if frozen:
        notes.append(f"{frozen} of {len(list(policy.parameters()))} tensors are not reached by text and "
                     "stay as they are")
    return "; ".join(["yes", *notes])


FORTY = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "gpt_oss", "mixtral",
    "qwen2_moe", "qwen3_moe", "olmo2", "olmo3", "olmoe", "phi", "phi3", "phimoe", "glm", "glm4", "glm4_moe",
    "deepseek_v2", "deepseek_v3", "cohere2", "granite", "granitemoe", "smollm3", "apertus", "falcon", "gpt2",
    "gpt_neox", "opt", "bloom", "mpt", "starcoder2", "stablelm", "exaone4", "llama4", "ernie4_5_moe",
    "qwen3_next", "mamba")
MODES = "--shard", "--lora=4", "--gradient_checkpointing"


def train(folder, name, *flags, ranks=1):
    """Train in processes of their own; the losses and gradient norms of the steps. May raise Refused."""
    log = folder / f"{name}.log"

    def before():
        sys.stderr = open(log, "a", buffering=1)
    flags = (f"--model={folder / 'model'}", f"--data={folder / 'rewarded.jsonl'}", f"--out={folder / name}",
             "--batch_size=6", "--epochs=2", "--learning_rate=1e-3", "--dtype=float32", *flags)
    processes = (start_ranks(ranks, "train.py", *flags, before=before) if ranks > 1 else
                 [Process("train.py", *flags, before=before)])
    codes = [process.wait() for process in processes]
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    if 2 in codes:
        raise Refused(errors[0].removeprefix("error: "))
    assert codes == [0] * ranks, log.read_text()[-2000:]
    return [(row["loss"], row["grad_norm"]) for row in read_rows(folder / name / "metrics.jsonl")]


@torch.no_grad()
def logits(folder, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, adapter)
    return model.eval()(input_ids=torch.arange(3, 40)[None], use_cache=False).logits


def in_mode(kind, folder, mode):
    """"yes" if a model trains with this flag as without it, and its OUT is what was trained; or "refused"."""
    plain = read_rows(folder / "plain" / "metrics.jsonl")
    plain = [(row["loss"], row["grad_norm"]) for row in plain]
    try:
        found = train(folder, mode, mode, ranks=2 if mode == "--shard" else 1)
    except Refused:
        return "refused"
    out, before = logits(folder / mode), logits(folder / "model")
    assert (out - before).abs().max() > 1e-4, (kind, mode)
    if "lora" in mode:
        expected = logits(folder / "model", folder / mode / "adapter")
    else:
        np.testing.assert_allclose(found, plain, rtol=2e-3, atol=1e-4, err_msg=f"{kind} {mode}")
        expected = logits(folder / "plain")
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-3 * expected.abs().max().item())
    return "yes"


def in_all_modes(kind, folder):
    make(kind, folder / "model")
    write_rows(folder / "rewarded.jsonl", random_rows(model_py.load_tokenizer(folder / "model")))
    train(folder, "plain")
    return [in_mode(kind, folder, mode) for mode in MODES]


def outcome(kind, folder):
    """What the table says of a model type."""
    try:
        return walk(kind, folder)
    except Refused as refusal:
        reason = str(refusal).split(" model ", 1)[-1].split(": ", 1)[-1]
        return "refused: " + reason.split("(")[0].strip()
    except AssertionError as error:
        if "make sure to use `model.train()`" not in str(error):
            raise
        return "fails in the backward pass: its own code trains only with dropout"


@pytest.mark.parametrize("kind", SUBSET)
def test_a_family_is_sampled_trained_and_saved_right_or_refused(kind, tmp_path):
    """And its line in docs/models.md says which."""
    assert f"| {kind} | {outcome(kind, tmp_path)} |" in TABLE.read_text()


@pytest.mark.parametrize("kind", ("gemma3", "gpt_oss", pytest.param("opt", marks=pytest.mark.slow)))
def test_a_family_trains_the_same_in_all_modes(kind, tmp_path):
    """A tower that text does not reach; experts; dropout, whose recomputation test_model.py has, too. As the
    table of docs/models.md says.
    """
    found = in_all_modes(kind, tmp_path)
    assert f"| {kind} | {' | '.join(found)} |" in TABLE.read_text()


@pytest.mark.slow  # minutes: writes the second table of docs/models.md
def test_forty_families_in_all_modes_and_their_table(tmp_path):
    lines, wrong = [], []
    for kind in FORTY:
        try:
            lines.append(f"| {kind} | {' | '.join(in_all_modes(kind, tmp_path / kind))} |")
        except AssertionError as error:
            wrong.append((kind, str(error)))
    head, rest = TABLE.read_text().split("| --- | --- | --- | --- |\n")
    rest = rest[rest.index("\n\n"):]
    TABLE.write_text(head + "| --- | --- | --- | --- |\n" + "\n".join(lines) + rest)
    assert not wrong, wrong


@pytest.mark.slow  # minutes: writes docs/models.md
def test_all_families_and_their_table(tmp_path):
    lines, not_tried, wrong = [], [], []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            make(kind, tmp_path / kind / "model")
        except (Exception,
                pytest.skip.Exception):  # no tiny config without work by hand, or a library is missing
            not_tried.append(kind)
            continue
        try:
            lines.append(f"| {kind} | {outcome(kind, tmp_path / kind)} |")
        except AssertionError as error:
            wrong.append((kind, str(error)))
        shutil.rmtree(tmp_path / kind)
    text = TABLE.read_text()
    head, tail = text.split("| --- | --- |\n")[0], f"Not tried: {', '.join(not_tried)}.\n"
    TABLE.write_text(head + "| --- | --- |\n" + "\n".join(lines) + "\n\n" + tail)
    assert not wrong and len(lines) > 150, wrong
