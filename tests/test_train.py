"""train.py: what a run writes, what a step computes, and that nothing changes the result: neither the number
of processes nor kills, signals and full disks.
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers

import rows
from conftest import (Process, call, ends_well, make_tiny, read_rows, refused, start_ranks,
                      start_until_finished, write_rows)

FLAGS = ("--beta=0.1", "--learning_rate=1e-3", "--batch_size=16", "--micro_batch_tokens=160",
         "--dtype=float32")
STEPS = 8  # of 16 completions: 30 rows of 4


def flags(model, data, out, *more):
    return [f"--model={model}", f"--data={data}", f"--out={out}", *FLAGS, *more]


def logged(out, name="loss"):
    return [row[name] for row in read_rows(out / "metrics.jsonl") if name in row]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def undisturbed(tiny, rewarded, tmp_path_factory):
    """A run with evaluation data and checkpoints, to compare others with."""
    out = tmp_path_factory.mktemp("train") / "run"
    call("train.py", *flags(tiny, rewarded, out, f"--eval_data={rewarded}", "--save_every=2"))
    return out


# ---- what a run writes ----

def test_the_trained_model_loads_in_plain_transformers_and_generates(tiny, undisturbed):
    model = transformers.AutoModelForCausalLM.from_pretrained(undisturbed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(undisturbed)
    prompt = tokenizer("row", return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=5, pad_token_id=0)[0, prompt["input_ids"].shape[1]:]
    assert 1 <= len(new) <= 5
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    assert model.config.to_dict() == before.config.to_dict() | {"_name_or_path": model.config._name_or_path}
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters()))


def test_run_json_says_how_the_model_was_made(undisturbed):
    record = json.loads((undisturbed / "run.json").read_text())
    assert record["finished"] and record["config"]["beta"] == 0.1 and record["config"]["steps"] == STEPS
    assert record["versions"]["torch"] == torch.__version__ and "--save_every=2" in record["command"]


def test_checkpoints_are_whole_models_and_the_resume_state_goes_when_the_run_ends(tiny, undisturbed):
    assert names(undisturbed / "checkpoints") == ["step_000002", "step_000004", "step_000006"]
    for step in (undisturbed / "checkpoints").iterdir():
        assert set(names(tiny)) <= set(names(step)) and weights(step) != weights(undisturbed)
    assert set(names(undisturbed)) == set(names(tiny)) | {
        "cache", "checkpoints", "metrics.jsonl", "run.json"}


def test_the_log_has_every_step_and_evaluations_before_and_after(undisturbed):
    log = read_rows(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in log] == [0, *range(1, STEPS + 1), STEPS]
    assert {"loss", "log_ratio", "log_ratio_better", "log_ratio_worse", "drift", "grad_norm",
            "learning_rate", "epoch", "seconds", "tokens_per_second"} == set(log[1]) - {"step"}
    assert {"eval_loss", "eval_log_ratio"} < set(log[0]) and {"eval_loss", "eval_log_ratio"} < set(log[-1])


def test_training_starts_at_the_reference_model_and_moves_towards_the_targets(undisturbed):
    first = read_rows(undisturbed / "metrics.jsonl")[0]
    assert abs(first["eval_log_ratio"]) < 1e-5 and first["eval_drift"] < 1e-5
    losses = logged(undisturbed, "eval_loss")
    assert losses[-1] < losses[0]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine_to_zero(undisturbed):
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1))) for step in range(1, STEPS)]
    np.testing.assert_allclose(logged(undisturbed, "learning_rate"), [1e-3, *expected])


def test_a_dry_run_shows_a_batch_and_writes_nothing(tiny, rewarded, tmp_path, capsys):
    ends_well("train.py", *flags(tiny, rewarded, tmp_path / "run", "--dry_run"))
    out = capsys.readouterr().out
    assert out.count("<<<\n") == 4 and "target log-ratio" in out
    assert names(tmp_path) == []


def test_metrics_go_to_a_tracker_that_is_asked_for(tiny, rewarded, tmp_path, capsys, monkeypatch):
    (tmp_path / "trackio.py").write_text(
        "import json, pathlib\nfile = pathlib.Path(__file__).with_name('sent.jsonl').open('a')\n"
        "def init(**settings): assert settings['project'] == 'qrpo' and settings['config']['beta'] == 0.1\n"
        "def log(row, step): print(json.dumps(row | {'step': step}), file=file, flush=True)\n")
    monkeypatch.syspath_prepend(tmp_path)
    call("train.py", *flags(tiny, rewarded, tmp_path / "run", "--track=trackio"))
    assert read_rows(tmp_path / "sent.jsonl") == read_rows(tmp_path / "run" / "metrics.jsonl")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    refused(capsys, ["install it"], "train.py", *flags(tiny, rewarded, tmp_path / "other", "--track=wandb"))
    assert not (tmp_path / "other").exists()


# ---- what a step computes ----

LOSSES = {  # each loss and the data it is tried on
    "qrpo": "refs", "forward_kl": "refs", "sft": "refs",
    "dpo": "best_worst", "dpo_norm": "best_worst", "rebel": "random_pairs", "simpo": "best_worst"}


LOG_Z = math.log(0.1 * (math.exp(10) - 1))  # at beta 0.1


def paper_target(c, ref_rewards):
    return np.mean([reward <= c["reward"] for reward in ref_rewards]) / 0.1 - LOG_Z


def exact_target(c, ref_rewards):
    """From the completion's cell among its 3 other references."""
    lo = sum(reward < c["reward"] for reward in ref_rewards) / 4
    hi = sum(reward <= c["reward"] for reward in ref_rewards) / 4
    return math.log(0.1 * (math.exp(10 * hi) - math.exp(10 * lo)) / (hi - lo)) - LOG_Z


SINGLE_LOSSES = {  # of a completion c
    "qrpo": lambda c, ref_rewards: (0.1 * (paper_target(c, ref_rewards) - c["log_ratio"])) ** 2,
    "forward_kl": lambda c, ref_rewards: -math.exp(exact_target(c, ref_rewards)) * c["logp"],
    "sft": lambda c, ref_rewards: -c["logp"]}
PAIR_LOSSES = {  # of a better completion c and a worse one r
    "dpo": lambda c, r: -F.logsigmoid(0.1 * (c["log_ratio"] - r["log_ratio"])),
    "dpo_norm": lambda c, r: -F.logsigmoid(0.1 * (c["log_ratio"] / c["n"] - r["log_ratio"] / r["n"])),
    "simpo": lambda c, r: -F.logsigmoid(0.1 * (c["logp"] / c["n"] - r["logp"] / r["n"] - 0.5)),
    "rebel": lambda c, r: ((c["reward"] - r["reward"]) / 0.1 - (c["log_ratio"] - r["log_ratio"])) ** 2}


def read_by_hand(policy, reference, tokenizer, row):
    """The completions of a row with their log-probabilities, one at a time, from the models' own logits."""
    prompt, pool = tokenizer(row["prompt"]).input_ids, []
    for completion, reward in zip(row["ref_completions"], row["ref_rewards"]):
        ids, logps = completion["token_ids"], []
        for model in (policy, reference):
            each = torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0], -1)
            logps.append(sum(each[len(prompt) + t - 1, token] for t, token in enumerate(ids)))
        log_ratio = logps[0] - logps[1].detach()
        pool.append({"reward": reward, "logp": logps[0], "n": len(ids), "log_ratio": log_ratio})
    return pool


def pairs_by_hand(regime, pool):
    if regime == "best_worst":
        ordered = sorted(pool, key=lambda c: -c["reward"])
        return [(ordered[0], ordered[-1])]
    return [sorted(pool[i:i + 2], key=lambda c: -c["reward"]) for i in (0, 2)]


def step_by_hand(loss, policy, reference, table):
    """The mean loss over all rows, its gradient, and the mean log-ratios of the better completions and of
    the worse.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    policy = transformers.AutoModelForCausalLM.from_pretrained(policy)
    reference = transformers.AutoModelForCausalLM.from_pretrained(reference)
    terms, tokens, better, worse = [], 0, [], []
    for row in table:
        pool = read_by_hand(policy, reference, tokenizer, row)
        if loss in PAIR_LOSSES:
            pairs = pairs_by_hand(LOSSES[loss], pool)
            terms += [PAIR_LOSSES[loss](c, r) for c, r in pairs]
            better += [c["log_ratio"].item() for c, _ in pairs]
            worse += [r["log_ratio"].item() for _, r in pairs]
            continue
        for c in pool:
            tokens += c["n"]
            terms.append(SINGLE_LOSSES[loss](c, row["ref_rewards"]))
            side = better if c["reward"] > np.mean(row["ref_rewards"]) else worse
            side.append(c["log_ratio"].item())
    value = sum(terms) / (tokens if loss == "sft" else len(terms))  # SFT: the mean over all tokens
    value.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    return value.item(), gradient, np.mean(better), np.mean(worse)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_the_gradient_of_the_mean_loss_however_it_is_split(
        loss, tiny, rewarded, undisturbed, tmp_path, monkeypatch):
    """A second round: the policy is a trained model, so that it is away from its reference."""
    table = read_rows(rewarded)[:6]
    data, gradients = write_rows(tmp_path / "data.jsonl", table), []
    clip = torch.nn.utils.clip_grad_norm_

    def recorded(parameters, limit):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    expected, gradient, better, worse = step_by_hand(loss, undisturbed, tiny, table)
    for i, more in enumerate((["--micro_batch_tokens=1"], ["--micro_batch_tokens=200"],
                              ["--micro_batch_tokens=5000", "--gradient_checkpointing"])):
        out = tmp_path / str(i)
        script = call("train.py", *flags(
            undisturbed, data, out, f"--ref_model={tiny}", f"--loss={loss}", f"--train_on={LOSSES[loss]}",
            f"--cache={tmp_path}/cache", "--batch_size=24",
            f"--quantile={'exact' if loss == 'forward_kl' else 'paper'}", *more))
        assert set(script["LOSSES"]) == set(LOSSES)  # a new loss is tried here, too
        assert logged(out) == [pytest.approx(expected, rel=1e-4)]
        assert logged(out, "grad_norm") == [pytest.approx(gradient.norm().item(), rel=1e-3)]
        torch.testing.assert_close(gradients[i], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
        assert logged(out, "log_ratio_better") == [pytest.approx(better, rel=1e-3, abs=1e-4)]
        assert logged(out, "log_ratio_worse") == [pytest.approx(worse, rel=1e-3, abs=1e-4)]


def test_length_normalize_divides_beta_by_the_tokens_of_the_completion(tiny, rewarded, tmp_path, loaded):
    table, tokenizer = read_rows(rewarded)[:8], loaded[0]
    for row in table:
        for completion in row["ref_completions"][::2]:  # every second one: 5 tokens
            completion["token_ids"] = completion["token_ids"][:5]
            completion["text"] = tokenizer.decode(completion["token_ids"], skip_special_tokens=True)
    script = call("train.py", *flags(tiny, write_rows(tmp_path / "data.jsonl", table), tmp_path / "run",
                                     "--length_normalize", "--beta=0.8"))
    b = script["get_batch"](script["train_data"], np.arange(12), torch.device("cpu"))
    logps = script["policy"](b.tokens, b.prompt_lens, b.lens).detach()
    lens = b.lens - b.prompt_lens
    assert lens.min() < 0.8 / 0.1 < lens.max()  # the limit of 0.1 applies to some of them
    expected = []
    for i in range(12):
        beta = min(0.8 / int(lens[i]), 0.1)
        q = np.mean(b.ref_rewards[i].numpy() <= b.rewards[i].item())
        log_Z = np.log(beta * np.expm1(1 / beta))
        expected.append((q - beta * log_Z - beta * (logps[i] - b.ref_logps[i]).item()) ** 2)
    np.testing.assert_allclose(script["LOSSES"]["qrpo"].terms(b, logps), expected, rtol=1e-4)


@pytest.mark.parametrize("beta", (3e-4, 10.0))
@pytest.mark.parametrize("more", (
    ["--quantile=exact"], ["--transform=log", "--max_grad_norm=1"]))
def test_betas_from_tiny_to_large_train_without_overflow(tiny, rewarded, tmp_path, beta, more):
    call("train.py", *flags(tiny, rewarded, tmp_path / "run", f"--beta={beta}", *more))
    for name in ("loss", "grad_norm"):
        assert np.isfinite(logged(tmp_path / "run", name)).all()


def test_every_epoch_is_another_order_of_all_the_data(tiny, rewarded, tmp_path):
    script = call("train.py", *flags(tiny, rewarded, tmp_path / "run", "--epochs=2"))
    order = [np.concatenate([script["examples_of"](epoch * STEPS + i).reshape(-1) for i in range(STEPS)])
             for epoch in range(2)]
    assert sorted(order[0]) == sorted(order[1]) == list(range(120)) and (order[0] != order[1]).any()
    assert len(logged(tmp_path / "run")) == 2 * STEPS


# ---- step 0 ----

def test_reference_log_probabilities_of_another_model_are_refused(
        tiny, rewarded, undisturbed, tmp_path, capsys):
    cache = shutil.copytree(undisturbed / "cache", tmp_path / "cache")
    path, = cache.glob("ref_logps-*.npy")
    np.save(path, np.load(path) + 0.5)
    refused(capsys, ["step 1", str(cache), "made with another model"], "train.py",
            *flags(tiny, rewarded, tmp_path / "run", f"--cache={cache}"))


def test_it_warns_of_references_that_another_model_sampled(tiny, rewarded, tmp_path, capsys):
    for seed, warned in ((0, False), (1, True)):
        model = make_tiny(tmp_path / f"model{seed}", seed)  # seed 0: a copy of the one that sampled them
        call("train.py", *flags(model, rewarded, tmp_path / f"run{seed}"))
        assert ("sampled by another model" in capsys.readouterr().out) == warned


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(tiny, rewarded, tmp_path, capsys):
    refused(capsys, ["gradient norm", "look at this step's rows"], "train.py", *flags(
        tiny, rewarded, tmp_path / "run", "--save_every=1", "--learning_rate=1e30", "--max_grad_norm=1"))
    assert names(tmp_path / "run" / "resume")[0].startswith("step_")  # the last good one


# ---- several processes ----

def test_two_processes_have_the_losses_of_one(tiny, rewarded, undisturbed, tmp_path):
    out = tmp_path / "two"
    command = flags(tiny, rewarded, out, f"--eval_data={rewarded}", "--save_every=2")
    assert [rank.wait() for rank in start_ranks(2, "train.py", *command)] == [0, 0]
    for name, tolerance in (("loss", 2e-6), ("eval_loss", 2e-6), ("grad_norm", 2e-6), ("log_ratio", 2e-5)):
        np.testing.assert_allclose(logged(out, name), logged(undisturbed, name), rtol=1e-5, atol=tolerance)
    assert names(out) == names(undisturbed)


def test_what_two_sharded_processes_saved_continues_in_one(tiny, rewarded, undisturbed, tmp_path):
    out = tmp_path / "run"
    command = flags(tiny, rewarded, out, f"--eval_data={rewarded}", "--save_every=2", "--resume")
    ranks = start_ranks(2, "train.py", *command, "--shard", before=lambda: die_after_saving(4))
    assert ranks[0].wait() == -signal.SIGKILL
    ranks[1].kill()
    assert names(out / "resume")[-1] == "step_000004"
    call("train.py", *command)
    for name in ("loss", "eval_loss", "grad_norm"):
        np.testing.assert_allclose(logged(out, name), logged(undisturbed, name), rtol=2e-5, atol=2e-6)
    assert names(out) == names(undisturbed)


def test_a_second_process_on_the_same_run_is_refused_before_its_reference_pass(
        tiny, rewarded, tmp_path, capsys):
    command = flags(tiny, rewarded, tmp_path / "run", "--resume", "--epochs=500")
    first = Process("train.py", *command)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert first.running()
        time.sleep(0.01)
    cache = tmp_path / "cache"
    refused(capsys, ["another process is writing it"], "train.py", *command, f"--cache={cache}")
    assert first.running() and not list(cache.glob("ref_logps-*"))
    first.kill()


def test_runs_that_start_at_the_same_time_share_a_cache(tiny, rewarded, undisturbed, tmp_path):
    runs = [Process("train.py", *flags(tiny, rewarded, tmp_path / str(i), f"--eval_data={rewarded}",
                                       f"--cache={tmp_path / 'cache'}")) for i in range(4)]
    assert [run.wait() for run in runs] == [0] * 4
    assert {weights(tmp_path / str(i)) for i in range(4)} == {weights(undisturbed)}


# ---- kills, signals and full disks ----

def die_after_saving(step):
    """Kill this process when OUT/resume/step_N is complete."""
    save = dcp.save

    def save_and_die(state, checkpoint_id, **more):
        save(state, checkpoint_id=checkpoint_id, **more)
        if checkpoint_id.name == f"step_{step:06d}":
            os.kill(os.getpid(), signal.SIGKILL)
    dcp.save = save_and_die


def test_a_run_killed_before_any_of_its_writes_ends_in_the_same_bits(tiny, rewarded, undisturbed, tmp_path):
    out = tmp_path / "run"
    kills = start_until_finished("train.py", *flags(
        tiny, rewarded, out, f"--eval_data={rewarded}", "--save_every=2", "--resume"))
    assert kills > 8
    assert weights(out) == weights(undisturbed) and names(out) == names(undisturbed)
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [0, *range(1, STEPS + 1), STEPS]
    for name in ("loss", "grad_norm", "eval_loss"):
        assert logged(out, name) == logged(undisturbed, name)
    for step in names(undisturbed / "checkpoints"):
        assert weights(out / "checkpoints" / step) == weights(undisturbed / "checkpoints" / step)


def test_a_finished_run_has_nothing_to_do(tiny, rewarded, undisturbed, capsys):
    before = weights(undisturbed)
    ends_well("train.py", *flags(tiny, rewarded, undisturbed, f"--eval_data={rewarded}", "--resume"))
    assert "finished" in capsys.readouterr().out and weights(undisturbed) == before


@pytest.mark.parametrize("signum", (signal.SIGTERM, signal.SIGUSR1))
def test_told_to_stop_it_saves_exits_with_75_and_continues_to_the_same_bits(
        tiny, rewarded, undisturbed, tmp_path, monkeypatch, signum):
    out, append = tmp_path / "run", rows.append
    command = flags(tiny, rewarded, out, f"--eval_data={rewarded}", "--save_every=2", "--resume")

    def append_and_signal(file, row):
        append(file, row)
        if row["step"] == 3:
            signal.raise_signal(signum)
    monkeypatch.setattr(rows, "append", append_and_signal)
    with pytest.raises(SystemExit) as end:
        call("train.py", *command)
    assert end.value.code == 75 and names(out / "resume") == ["step_000003"]
    monkeypatch.setattr(rows, "append", append)
    call("train.py", *command)
    assert weights(out) == weights(undisturbed) and logged(out) == logged(undisturbed)
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [0, *range(1, STEPS + 1), STEPS]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("kilobytes", (1100, 1500))  # full as the model or the resume state is saved
def test_a_full_disk_leaves_the_last_checkpoint_and_room_lets_it_continue(
        tiny, rewarded, undisturbed, tmp_path, capsys, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        command = flags(tiny, rewarded, disk / "run", f"--eval_data={rewarded}", "--save_every=1", "--resume")
        refused(capsys, ["cannot be written", "Make room"], "train.py", *command)
        last = max((disk / "run" / "resume").glob("step_*/.metadata")).parent
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        call("train.py", *command)
        assert f"from step {int(last.name[5:])} to" in capsys.readouterr().out
        assert weights(disk / "run") == weights(undisturbed) and logged(disk / "run") == logged(undisturbed)
        assert names(disk / "run") == names(undisturbed)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
