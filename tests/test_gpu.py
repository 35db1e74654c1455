"""All scripts on a pretend GPU (pretend_gpu.py): they do nothing that CUDA refuses, give what a CPU gives,
and wait no more often than is written here. The counts are those of the pinned torch and transformers.
"""
import os
import signal

import numpy as np
import pytest
import torch
import transformers

import kv_cache
import model
import rows
from conftest import call, make_tokenizer, read_rows
from pretend_gpu import GPU, on_gpu, pretend_gpu

STEPS = 8  # of 16 completions
FLAGS = "--learning_rate=1e-3", "--batch_size=16", "--micro_batch_tokens=160", "--dtype=float32"


def train(tiny, rewarded, out, *more):
    call("train.py", f"--model={tiny}", f"--data={rewarded}", f"--out={out}", *FLAGS, *more)
    return (out / "model.safetensors").read_bytes()


def logged(out):
    """metrics.jsonl without times."""
    log = read_rows(out / "metrics.jsonl")
    for row in log:
        for name in ("seconds", "tokens_per_second", "mfu"):
            row.pop(name, None)
    return log


def often(gpu, least):
    """The places where the host waited at least so many times."""
    return {place: n for place, n in gpu.waits.items() if n >= least}


def count(monkeypatch, owner, name):
    """A list that grows by one with each call of owner.name."""
    calls, function = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)
    monkeypatch.setattr(owner, name, counted)
    return calls


# ---- the pretend GPU itself ----

def adamw(step_on):
    """A step of AdamW whose count of steps lies on a device."""
    weight = torch.nn.Parameter(torch.zeros(3, device=GPU))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.state[weight] = {"step": torch.zeros((), device=step_on), "exp_avg": torch.zeros_like(weight),
                               "exp_avg_sq": torch.zeros_like(weight)}
    optimizer.step()
    return weight


class TimesTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, twos):
        ctx.twos = twos
        return values * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.twos, None


@pytest.mark.parametrize("operation", [
    lambda here, there: there + here,
    lambda here, there: torch.cat([here, there]),
    lambda here, there: torch.stack([here.sum(), there.sum()]),
    lambda here, there: here[there.long()],
    lambda here, there: here.sum().add_(there.sum()),
    lambda here, there: torch.embedding(there[:, None], here.long()),
    lambda here, there: there.numpy(),
    lambda here, there: np.asarray(there),
    lambda here, there: adamw("cpu"),
    lambda here, there: TimesTwo.apply(there.requires_grad_(), here).sum().backward()],
    ids="add cat stack index in_place embedding numpy asarray adamw backward".split())
def test_what_cuda_refuses_is_an_error(operation):
    with pretend_gpu(), pytest.raises((RuntimeError, TypeError), match="same device|to numpy|to the CPU"):
        operation(torch.arange(3.0), torch.arange(3.0, device=GPU))


@pytest.mark.parametrize("operation", [
    lambda here, there: there + here.sum(),
    lambda here, there: there.where(there > 0, here.sum()),
    lambda here, there: there[here.long()],
    lambda here, there: there.copy_(here),
    lambda here, there: here.to(there) + there,
    lambda here, there: adamw(GPU)], ids="scalar where index copy to adamw".split())
def test_what_cuda_allows_works(operation):
    with pretend_gpu():
        result = operation(torch.arange(3.0), torch.arange(3.0, device=GPU))
        assert result.is_cuda and result.device == GPU and on_gpu(result)
        assert result.cpu().device.type == "cpu"


def test_waits_with_nothing_launched_between_them_are_one():
    with pretend_gpu() as gpu:
        there = torch.ones(3, device=GPU)
        assert there.tolist() == there.cpu().tolist()  # two, but the second finds nothing to wait for
        torch.zeros(3).to(GPU)                         # nor does this
        there.view(3, 1)                               # launches nothing
        assert there[0].item() == 1 and gpu.waits.total() == 1
        assert there[0] == 1 and gpu.waits.total() == 2
        there[there > 0]
        assert gpu.waits.total() == 3


# ---- the scripts ----

def test_sampling_gives_the_tokens_of_a_cpu(tiny, rewarded, tmp_path, monkeypatch):
    """The tokens of a CPU. For each, the host waits three times: to copy the random numbers, with the model
    still in the queue; to read the tokens, as some end a completion; and when transformers looks at the mask.
    """
    steps = count(monkeypatch, kv_cache.Cache, "step")
    with pretend_gpu() as gpu:
        call("generate_refs.py", f"--model={tiny}", f"--data={rewarded.parent / 'prompts.jsonl'}",
             f"--out={tmp_path}", "--num_refs=4", "--max_new_tokens=20", "--dtype=float32")
    cpu, there = ([[c["token_ids"] for c in row["ref_completions"]] for row in read_rows(folder)]
                  for folder in (rewarded.parent / "refs", tmp_path))
    assert there == cpu
    assert often(gpu, 20) == {"sample": 2 * 20, "decode_step": len(steps)}


def test_a_stopped_and_resumed_run_has_the_weights_of_a_cpu(tiny, rewarded, tmp_path, monkeypatch):
    """In a micro-batch the host waits four times: to copy it, for the micro-batch before; for the longest
    completion; when transformers looks for several texts in a row; and for the positions of completions. In a
    step it waits once more, for the metrics, and then has nothing to wait for when it copies the next batch.
    """
    append = rows.append

    def stop_after_step_3(file, row):
        append(file, row)
        if row.get("step") == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    forward_passes = count(monkeypatch, model.Policy, "forward")
    with pretend_gpu() as gpu:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(rows, "append", stop_after_step_3)
            train(tiny, rewarded, tmp_path / "gpu")
        assert end.value.code == 75
        weights = train(tiny, rewarded, tmp_path / "gpu", "--resume")
    n = len(forward_passes)
    assert often(gpu, STEPS) == {
        "pad": n - STEPS + 1,  # one for the state that was loaded
        "forward": 2 * n, "chunked_logps": n, "means": STEPS,
        "prepare": 2 * 4}      # two starts
    assert weights == train(tiny, rewarded, tmp_path / "cpu")
    assert logged(tmp_path / "gpu") == logged(tmp_path / "cpu")


LOSSES = {
    "forward_kl": ["--quantile=exact"], "sft": ["--min_reward=0.2"], "dpo": ["--train_on=best_worst"],
    "dpo_norm": ["--train_on=random_pairs"], "rebel": ["--train_on=best_worst"],
    "simpo": ["--train_on=best_worst"]}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    *([f"--loss={loss}", *more] for loss, more in LOSSES.items()),
    ["--transform=normal-icdf", "--quantile=exact", "--max_grad_norm=1"],
    ["--transform=square", "--quantile=exact", "--length_normalize"],
    ["--gradient_checkpointing"],
    ["--lora=4"],
    ["--lora=4", "--gradient_checkpointing", "--dtype=bfloat16"]], ids=" ".join)
def test_other_ways_to_train_give_the_weights_of_a_cpu(tiny, rewarded, tmp_path, flags):
    """All losses, quadrature, checkpointing and LoRA, with evaluation data and checkpoints."""
    if "--lora=4" in flags:
        pytest.importorskip("peft")
    more = [f"--eval_data={rewarded}", "--save_every=3", *flags]
    with pretend_gpu():
        there = train(tiny, rewarded, tmp_path / "gpu", *more)
    assert there == train(tiny, rewarded, tmp_path / "cpu", *more)
    assert logged(tmp_path / "gpu") == logged(tmp_path / "cpu")


@pytest.mark.slow
def test_training_in_bfloat16_with_another_reference_model_and_a_dry_run(tiny, rewarded, tmp_path):
    """What a GPU does by default, and what only --ref_model and --dry_run do."""
    flags = ["--dtype=auto", f"--ref_model={tiny}", "--micro_batch_tokens=0"]
    with pretend_gpu():
        with pytest.raises(SystemExit) as end:
            train(tiny, rewarded, tmp_path / "dry", *flags, "--dry_run")
        assert not end.value.code
        train(tiny, rewarded, tmp_path / "run", *flags)
    assert all("mfu" in row for row in read_rows(tmp_path / "run/metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--temperature=0", "--dtype=float32"], ["--top_p=0.8", "--temperature=0.7", "--dtype=float32"],
    ["--dtype=auto"]], ids=" ".join)
def test_other_ways_to_sample_give_the_tokens_of_a_cpu(tiny, rewarded, tmp_path, flags):
    def sampled(name):
        call("generate_refs.py", f"--model={tiny}", f"--data={rewarded.parent / 'prompts.jsonl'}",
             f"--out={tmp_path / name}", "--num_refs=2", "--max_new_tokens=20", "--batch_size=16", *flags)
        return [[c["token_ids"] for c in row["ref_completions"]] for row in read_rows(tmp_path / name)]
    with pretend_gpu():
        there = sampled("gpu")
    if "--dtype=auto" not in flags:  # bfloat16
        assert there == sampled("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_reward_model_gives_the_scores_of_a_cpu(rewarded, tmp_path, kind):
    """A causal one, and one whose padding is masked."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_labels": 1, "initializer_range": 0.3, "pad_token_id": 0}
    if kind == "llama":
        judge = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**settings))
    else:
        judge = transformers.BertForSequenceClassification(transformers.BertConfig(**settings))
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")

    def scored(name):
        call("score.py", f"--data={rewarded.parent / 'refs'}", f"--out={tmp_path / name}", "--dtype=float32",
             f"--reward=model:{tmp_path / 'judge'}", "--batch_tokens=500")
        return [row["ref_rewards"] for row in read_rows(tmp_path / name)]
    with pretend_gpu():
        there = scored("gpu")
    assert there == scored("cpu")


@pytest.mark.slow
def test_evaluation_gives_the_results_of_a_cpu(tiny, rewarded, tmp_path):
    run, sampled, scored = tmp_path / "run", tmp_path / "sampled", tmp_path / "scored"
    with pretend_gpu():
        train(tiny, rewarded, run)
        call("generate_refs.py", f"--model={run}", f"--data={rewarded}", f"--out={sampled}",
             "--field=samples", "--num_refs=3", "--max_new_tokens=20")
        call("score.py", f"--data={sampled}", f"--out={scored}",
             f"--reward={rewarded.parent / 'reward.py'}:letters")

        def results(out):
            call("evaluate.py", f"--model={run}", f"--ref_model={tiny}", f"--data={scored}", f"--out={out}",
                 "--dtype=float32", "--beta=0.1")
            return (out / "results.json").read_text()
        there = results(tmp_path / "gpu")
    assert there == results(tmp_path / "cpu")


@pytest.mark.slow
def test_training_on_fresh_samples_logs_what_a_cpu_does(tiny, rewarded, tmp_path):
    """examples/online.py, in float32 and in bfloat16."""
    def online(out, *more):
        call("examples/online.py", f"--model={tiny}", f"--ref_model={tiny}", f"--data={rewarded}",
             f"--out={out}", f"--reward={rewarded.parent / 'reward.py'}:letters", "--learning_rate=1e-3",
             "--steps=4", "--prompts=6", "--samples=2", "--max_new_tokens=12", "--save_every=2", *more)
        return logged(out)
    with pretend_gpu():
        there = online(tmp_path / "gpu", "--dtype=float32")
        online(tmp_path / "half")
    assert there == online(tmp_path / "cpu", "--dtype=float32")
