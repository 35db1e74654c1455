"""generate_refs.py: the distribution, the ids, the sharing and the resuming."""
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
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


def test_greedy_sampling_is_the_models_own(tiny):
    model, tokenizer = load(tiny)
    prompts = [models.prompt_ids(tokenizer, text) for text in ("a", "hello there", "row")]
    ends = models.end_ids(model, tokenizer)
    ours = generate_refs.sample(model, prompts, torch.zeros(3, 12), [12] * 3, ends, 0, 1.0)
    for ids, prompt in zip(ours, prompts):
        theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                                max_new_tokens=12, pad_token_id=0)
        assert ids == theirs[0, len(prompt):].tolist()


def test_a_completion_does_not_depend_on_its_batch(tiny):
    model, tokenizer = load(tiny)
    prompts = [models.prompt_ids(tokenizer, text) for text in ("a", "a", "hello there", "row xxxxxxx", "b")]
    u, limits = torch.rand(5, 30), [30, 30, 5, 30, 30]
    together = generate_refs.sample(model, prompts, u, limits, models.end_ids(model, tokenizer), 1.0, 1.0)
    alone = [generate_refs.sample(model, prompts[i:i + 1], u[i:i + 1], limits[i:i + 1], models.end_ids(model, tokenizer),
                                  1.0, 1.0)[0] for i in range(5)]
    assert together == alone and len(together[2]) <= 5


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
    answer = models.completion_ids(tokenizer, chat, "yes", [eos])  # the newline after the turn's end is not learned
    assert tokenizer.decode(answer) == "yes<eos>"
    assert models.completion_ids(tokenizer, chat, [{"role": "assistant", "content": "yes"}], [eos]) == answer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # a tokenizer that puts BOS before, EOS behind a text
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)])
    for text in ("hi", "<bos>hi"):
        assert tokenizer.decode(models.prompt_ids(tokenizer, text)) == "<bos>hi"
    assert tokenizer.decode(models.completion_ids(tokenizer, "hi", " there", [eos])) == " there<eos>"


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
    for other in ("shared", "array", "killed"):
        assert sorted(read_rows(tmp_path / other), key=lambda row: row["tag"]) == whole, other
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["num_refs"] == "3"
