"""generate_refs.py: the distribution, the ids, the sharing and the resuming."""
import argparse
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import generate_refs
import models
from conftest import ROOT, read_rows, run, write_rows


def load(tiny):
    return models.load_model(tiny, torch.float32, "cpu"), models.load_tokenizer(tiny)


@pytest.mark.parametrize("temperature, top_p", ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9)))
def test_tokens_follow_the_exact_probabilities(temperature, top_p):
    torch.manual_seed(0)
    logits, n = torch.randn(20) * 2, 200_000
    probs = torch.softmax(logits.double() / temperature, -1)
    order = probs.argsort(descending=True)
    kept = order[: int((probs[order].cumsum(0) < top_p).sum()) + 1]  # likeliest tokens up to the one that crosses top_p
    exact = torch.zeros(20, dtype=torch.float64).index_copy(0, kept, probs[kept])
    exact /= exact.sum()
    tokens = generate_refs.sample_tokens(logits.expand(n, 20), torch.rand(n), temperature, top_p)
    counts = tokens.bincount(minlength=20).double()
    assert (counts[exact == 0] == 0).all()
    expected = exact[exact > 0] * n
    chi_square, freedom = ((counts[exact > 0] - expected) ** 2 / expected).sum().item(), len(kept) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_extreme_random_numbers_never_pick_an_impossible_token():
    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]]).expand(2, 4)
    tokens = generate_refs.sample_tokens(logits, torch.tensor([0.0, 1 - 2 ** -24]), 1.0, 1.0)
    assert tokens.tolist() == [1, 2]


def sample(model, prompts, limits, ends, **settings):
    """generate_refs.sample on prompts of token ids -> {position of the prompt: its completions}."""
    args = argparse.Namespace(**{"num_refs": 1, "batch_size": 8, "seed": 0, "temperature": 1.0, "top_p": 1.0,
                                 "field": "samples"} | settings)
    requests = [{"row": {"id": i}, "prompt": p, "limit": n} for i, (p, n) in enumerate(zip(prompts, limits))]
    return {row["id"]: completions for row, completions in generate_refs.sample(model, requests, args, ends)}


FAMILIES = {"Llama": {}, "Mistral": {"sliding_window": 8}, "Gemma2": {"sliding_window": 8}, "GPT2": {}}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_sampling_is_the_models_own(family):
    """Through rows that are taken over, columns that run out, and windows that slide."""
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, initializer_range=0.3, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    prompts = [torch.randint(99, (n,)).tolist() for n in (3, 12, 7, 30, 1, 9, 9, 21)]
    limits = [200, 40, 12, 5, 60, 1, 33, 20]
    ours = sample(model, prompts, limits, {7, 8}, temperature=0, batch_size=3, num_refs=2)
    for i, (prompt, limit) in enumerate(zip(prompts, limits)):
        theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                                max_new_tokens=limit, eos_token_id=[7, 8], pad_token_id=0)[0, len(prompt):].tolist()
        assert ours[i] == [theirs, theirs]


def test_a_completion_does_not_depend_on_its_batch(tiny):
    model, tokenizer = load(tiny)
    prompts = [models.prompt_ids(tokenizer, text) for text in ("a", "a", "hello there", "row xxxxxxx", "b")]
    limits, ends = [30, 30, 5, 30, 30], models.end_ids(model, tokenizer)
    together, few, alone = (sample(model, prompts, limits, ends, num_refs=3, batch_size=size) for size in (64, 4, 1))
    assert together == few == alone and max(map(len, together[2])) <= 5
    completions = [tuple(ids) for five in together.values() for ids in five]
    assert len(set(completions)) == len(completions)  # equal prompts, too, have random numbers of their own


@pytest.mark.parametrize("temperature, top_p", ((1.0, 1.0), (2.0, 0.8)))
def test_completions_follow_the_exact_probabilities(temperature, top_p):
    """Chi-square of 8,000 completions of two tokens against their exact probabilities."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2)).eval()
    prompt, n = [1, 2, 3], 8000

    def next_token(ids):
        probs = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double() / temperature, -1)
        order = probs.argsort(descending=True)
        probs[order[int((probs[order].cumsum(0) < top_p).sum()) + 1:]] = 0  # after the token that crosses top_p
        return probs / probs.sum()

    with torch.no_grad():
        exact = next_token(prompt)[:, None] * torch.stack([next_token([*prompt, first]) for first in range(5)])
    pairs = sample(model, [prompt, [4]], [2, 2], set(), num_refs=n, batch_size=256, temperature=temperature,
                   top_p=top_p)[0]
    counts = torch.tensor([5 * first + second for first, second in pairs]).bincount(minlength=25).view(5, 5)
    assert (counts[exact == 0] == 0).all()
    expected, freedom = exact[exact > 0] * n, int((exact > 0).sum()) - 1
    assert freedom >= 8
    assert ((counts[exact > 0] - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_an_end_token_is_kept_only_where_it_was_sampled(tiny, rewarded):
    eos = models.load_tokenizer(tiny).eos_token_id
    reasons = set()
    for row in read_rows(rewarded):
        for c in row["ref_completions"]:
            reasons.add(c["finish_reason"])
            assert eos not in c["token_ids"][:-1]
            assert (c["token_ids"][-1] == eos) == (c["finish_reason"] == "stop")
            assert c["finish_reason"] == "stop" or len(c["token_ids"]) == 20
    assert "length" in reasons


def test_prompts_never_begin_with_two_bos_and_chat_goes_through_the_template(tiny):
    tokenizer = models.load_tokenizer(tiny)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}" \
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    chat = [{"role": "user", "content": "hi"}]
    prompt = models.prompt_ids(tokenizer, chat)
    assert prompt[0] == bos and prompt.count(bos) == 1
    assert tokenizer.decode(prompt) == "<bos>[user]hi<eos>\n[assistant]"
    answer = models.completion_ids(tokenizer, chat, prompt, "yes", [eos])  # not the newline after the turn's end
    assert tokenizer.decode(answer) == "yes<eos>"
    assert models.completion_ids(tokenizer, chat, prompt, [{"role": "assistant", "content": "yes"}], [eos]) == answer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # a tokenizer that puts BOS before, EOS behind a text
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)])
    for text in ("hi", "<bos>hi"):
        start = models.prompt_ids(tokenizer, text)
        assert tokenizer.decode(start) == "<bos>hi"
    assert tokenizer.decode(models.completion_ids(tokenizer, text, start, " there", [eos])) == " there<eos>"


def test_processes_share_the_rows_and_a_killed_run_continues(tiny, tmp_path):
    data = write_rows(tmp_path / "p.jsonl", [{"id": f"r{i}", "prompt": "row " + "x" * (i % 5), "tag": i} for i in range(40)])
    flags = [f"--model={tiny}", f"--data={data}", "--num_refs=3", "--max_new_tokens=30", "--batch_size=6"]
    run("generate_refs.py", *flags, f"--out={tmp_path / 'whole'}")
    run("generate_refs.py", *flags, f"--out={tmp_path / 'shared'}", ranks=2)
    assert len(list((tmp_path / "shared").glob("part-*.jsonl"))) == 2
    for task in (0, 1, 2):
        run("generate_refs.py", *flags, f"--out={tmp_path / 'array'}", env={
            "SLURM_ARRAY_TASK_ID": str(task + 4), "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_MAX": "6",
            "SLURM_ARRAY_TASK_COUNT": "3"})
    run("generate_refs.py", *flags, f"--out={tmp_path / 'fewer'}", env={"RANK": "1", "WORLD_SIZE": "2"})
    assert len(read_rows(tmp_path / "fewer")) == 20
    run("generate_refs.py", *flags, f"--out={tmp_path / 'fewer'}")  # one of two processes began, one alone goes on
    process = subprocess.Popen([sys.executable, str(ROOT / "generate_refs.py"), *flags, f"--out={tmp_path / 'killed'}"],
                               stderr=subprocess.DEVNULL)
    part = tmp_path / "killed" / "part-00000.jsonl"
    while not part.exists() or part.stat().st_size == 0:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with part.open("ab") as file:  # and in the middle of a line
        file.write(b'{"id": "r39", "pro')
    run("generate_refs.py", *flags, f"--out={tmp_path / 'killed'}")
    whole = sorted(read_rows(tmp_path / "whole"), key=lambda row: row["tag"])
    assert [row["tag"] for row in whole] == list(range(40)) and all(len(row["ref_completions"]) == 3 for row in whole)
    for other in ("shared", "array", "fewer", "killed"):
        assert sorted(read_rows(tmp_path / other), key=lambda row: row["tag"]) == whole, other
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["num_refs"] == "3"


VLLM = """
import types, torch, transformers, generate_refs

class SamplingParams:
    def __init__(self, *, temperature, top_p, max_tokens, seed, stop_token_ids, detokenize):
        assert 0 <= seed < 2 ** 63
        self.__dict__.update(locals())

class LLM:
    def __init__(self, model, *, dtype, seed, trust_remote_code, max_num_seqs, max_model_len):
        assert dtype in ("float32", "bfloat16")
        self.model, self.most = transformers.AutoModelForCausalLM.from_pretrained(model), max_model_len

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert len(prompts) == len(sampling_params) and self.most
        return [self.one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params)]

    @torch.no_grad()
    def one(self, prompt, s):
        ids, random = [], torch.Generator().manual_seed(s.seed)
        while len(ids) < s.max_tokens and not (ids and ids[-1] in s.stop_token_ids):
            assert len(prompt) + len(ids) < self.most
            logits = self.model(torch.tensor([prompt + ids])).logits[:, -1]
            ids.append(generate_refs.sample_tokens(logits, torch.rand(1, generator=random), s.temperature, s.top_p).item())
        reason = "stop" if ids[-1] in s.stop_token_ids else "length"
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(ids), finish_reason=reason)])
"""


def test_vllm_writes_the_same_rows(tiny, tmp_path):
    """vLLM itself is not here: this is a stand-in with the part of its interface that is used."""
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": "row " + "x" * (i % 3), "tag": i} for i in range(6)])
    flags = [f"--model={tiny}", f"--data={data}", "--num_refs=8", "--max_new_tokens=9", "--batch_size=1", "--engine=vllm"]
    missing = run("generate_refs.py", *flags, f"--out={tmp_path / 'out'}", check=False)
    assert missing.returncode == 2 and "vLLM is not installed" in missing.stderr and not (tmp_path / "out").exists()
    (tmp_path / "vllm.py").write_text(VLLM)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run("generate_refs.py", *flags, f"--out={tmp_path / 'out'}", env=env)
    run("generate_refs.py", *flags, f"--out={tmp_path / 'two'}", env=env, ranks=2)
    part = tmp_path / "out" / "part-00000.jsonl"
    whole = read_rows(part)
    part.write_bytes(b"\n".join(part.read_bytes().split(b"\n")[:3])[:-9])  # as a kill leaves it
    run("generate_refs.py", *flags, f"--out={tmp_path / 'out'}", env=env)
    for other in (read_rows(part), read_rows(tmp_path / "two")):
        assert sorted(other, key=lambda row: row["id"]) == sorted(whole, key=lambda row: row["id"])
    tokenizer = models.load_tokenizer(tiny)
    for row in whole:
        assert len({tuple(c["token_ids"]) for c in row["ref_completions"]}) == 8 and row["tag"] == row["id"]
        for c in row["ref_completions"]:
            assert (c["finish_reason"] == "stop") == (c["token_ids"][-1] == tokenizer.eos_token_id)
            assert c["text"] == tokenizer.decode(c["token_ids"], skip_special_tokens=True)
