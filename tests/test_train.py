"""train.py: one gradient however it is split, bit-identical resume, a checkpoint that loads, and the gate."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers

import dataset
import models
import train
from conftest import ROOT, read_rows, run, write_rows

FLAGS = ("--beta=0.1", "--learning_rate=1e-3", "--batch_size=16", "--micro_batch_tokens=160", "--dtype=float32")


def flags(tiny, rewarded, out, *more):
    return [f"--model={tiny}", f"--data={rewarded}", f"--out={out}", *FLAGS, *more]


def steps(out, name="loss"):
    return [row[name] for row in read_rows(out / "metrics.jsonl") if name in row]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tiny, rewarded, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "run"
    run("train.py", *flags(tiny, rewarded, out, f"--eval_data={rewarded}", "--save_every=2"))
    return out


def load(monkeypatch, tiny, rewarded, *more):
    """What train.py's main sets up before its loop."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(tiny, rewarded, "unused", *more)])
    args = train.arguments()
    model, tokenizer = models.load_model(tiny, torch.float32, "cpu"), models.load_tokenizer(tiny)
    data = dataset.build(rewarded, tokenizer, model, args.train_on, args.loss, args.side)
    policy = models.Policy(model)
    data["ref_logps"] = dataset.logps(policy, data, 500, "cpu").numpy()
    data["targets"] = train.targets(args, data)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the start, where DPO's gradients are all alike
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    return args, policy, data


@pytest.mark.parametrize("loss", (("--loss=qrpo",), ("--loss=dpo", "--train_on=best_worst"), ("--loss=rebel",
                                  "--train_on=random_pairs"), ("--loss=simpo", "--train_on=best_worst"), ("--loss=sft",)))
def test_the_gradient_does_not_depend_on_the_micro_batches(monkeypatch, tiny, rewarded, loss):
    args, policy, data = load(monkeypatch, tiny, rewarded, *loss)
    unit = 2 if args.loss in dataset.PAIRWISE else 1
    units = train.step_units(args, len(data["lens"]) // unit, 0)
    found = []
    for tokens in (1, 200, 5000):
        args.micro_batch_tokens = tokens
        policy.zero_grad()
        total = train.totals(args, policy, data, units, 0, 1, torch.device("cpu"), torch.autocast("cpu", enabled=False), True)
        found.append((total["loss"], torch.cat([p.grad.flatten() for p in policy.parameters()])))
    for loss, gradient in found[1:]:
        assert abs(loss - found[0][0]) < 1e-5 * abs(found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-5 * found[0][1].abs().max().item())
    # and it is that of the plain mean: one example at a time, through the model's own logits
    if args.loss == "qrpo":
        policy.zero_grad()
        for u in units:
            b = dataset.batch(data, np.array([u]), "cpu")
            logps = torch.log_softmax(policy.model(b["tokens"]).logits[0, :-1], -1)
            start = int(b["prompt_lens"])
            logp = logps.gather(1, b["tokens"][0, 1:, None])[start - 1:, 0].sum()
            q = (b["ref_rewards"] <= b["rewards"]).double().mean()
            beta_log_Z = 0.1 * np.log(0.1 * (np.exp(10.0) - 1))
            ((q - beta_log_Z - 0.1 * (logp - b["ref_logps"][0])) ** 2 / len(units)).backward()
        plain = torch.cat([p.grad.flatten() for p in policy.parameters()])
        torch.testing.assert_close(found[0][1], plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


def test_two_processes_have_the_losses_of_one(tiny, rewarded, undisturbed, tmp_path):
    run("train.py", *flags(tiny, rewarded, tmp_path / "two", f"--eval_data={rewarded}", "--save_every=2"), ranks=2)
    for name in ("loss", "eval_loss", "grad_norm", "log_ratio"):
        np.testing.assert_allclose(steps(tmp_path / "two", name), steps(undisturbed, name), rtol=1e-5, atol=2e-5 if "ratio" in name else 2e-6)


def test_a_killed_run_ends_in_the_same_bits(tiny, rewarded, undisturbed, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *flags(
        tiny, rewarded, out, f"--eval_data={rewarded}", "--save_every=2", "--resume")]
    for kill_after in (0, 3, 5):  # lines of metrics.jsonl; each attempt is killed after one more
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (out / "metrics.jsonl").exists() or process.poll() is None and len(
                read_rows(out / "metrics.jsonl")) <= kill_after:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(*["train.py", *command[2:]])
    assert weights(out) == weights(undisturbed)
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [0, *range(1, 9), 8]
    assert steps(out) == steps(undisturbed)
    again = run(*["train.py", *command[2:]])
    assert "finished" in again.stdout


def test_the_checkpoint_loads_in_plain_transformers_and_generates(tiny, undisturbed):
    model = transformers.AutoModelForCausalLM.from_pretrained(undisturbed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(undisturbed)
    assert model.generate(**tokenizer("row", return_tensors="pt"), max_new_tokens=5, pad_token_id=0).shape[1] > 2
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    assert model.config.to_dict() == before.config.to_dict() | {"_name_or_path": model.config._name_or_path}
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters()))
    record = json.loads((undisturbed / "run.json").read_text())
    assert record["finished"] and record["config"]["beta"] == 0.1 and record["versions"]["torch"] == torch.__version__
    assert (undisturbed / "curves.png").stat().st_size > 10_000
    assert [p.parent.name for p in undisturbed.glob("checkpoints/*/resume.pt")] == ["step_000008"]


def test_step_0_is_at_the_reference_and_training_moves_towards_the_targets(undisturbed):
    first = read_rows(undisturbed / "metrics.jsonl")[0]
    assert abs(first["eval_log_ratio"]) < 1e-5 and first["step"] == 0
    losses = steps(undisturbed, "eval_loss")
    assert losses[-1] < losses[0]


def test_the_gate_refuses_reference_log_probabilities_of_another_model(tiny, rewarded, tmp_path):
    out = tmp_path / "run"
    command = flags(tiny, rewarded, out, "--resume")
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command], stderr=subprocess.DEVNULL)
    while not list(out.glob("cache/ref_logps-*.npy")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    cache, = out.glob("cache/ref_logps-*.npy")
    np.save(cache, np.load(cache) + 0.5)
    done = run("train.py", *command, check=False)
    assert done.returncode == 2 and "cache" in done.stderr and "step 0" in done.stderr


def test_bfloat16_checkpoints_stay_bfloat16_and_masters_are_float32(tiny, rewarded, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "half")
    run("train.py", *flags(tmp_path / "half", rewarded, tmp_path / "run", "--learning_rate=1e-7", "--gradient_checkpointing"))
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert trained.dtype == torch.bfloat16
    state = torch.load(tmp_path / "run" / "checkpoints" / "step_000008" / "resume.pt", weights_only=True)
    moved = [(state["model"][name] != p.float()).float().mean().item() for name, p in model.named_parameters()]
    assert np.mean(moved) > 0.3  # float32 weights move at a learning rate that bfloat16 ones would not see


@pytest.mark.parametrize("regime, expected", (
    ("refs", [0.1, 0.9, 0.5, 0.5]), ("best_worst", [0.9, 0.1]), ("random_pairs", [0.9, 0.1, 0.5, 0.5]),
    ("chosen_rejected", [3.0, 4.0]), ("completion", [2.0])))
def test_regimes(tiny, tmp_path, regime, expected):
    row = {"prompt": "p", "completion": "c", "reward": 2, "chosen": "yes", "rejected": "no", "chosen_reward": 3,
           "rejected_reward": 4, "ref_rewards": [0.1, 0.9, 0.5, 0.5, None],
           "ref_completions": [{"text": "abcde"[k], "token_ids": [66 + k - 1], "finish_reason": "length"} for k in range(5)]}
    model, tokenizer = models.load_model(tiny, torch.float32, "cpu"), models.load_tokenizer(tiny)
    for k, completion in enumerate(row["ref_completions"]):
        completion["token_ids"] = tokenizer(completion["text"], add_special_tokens=False).input_ids
    data = dataset.build(write_rows(tmp_path / "d.jsonl", [row]), tokenizer, model, regime, "sft", num_ref_rewards=3)
    np.testing.assert_allclose(data["rewards"], expected)
    assert data["ref_rewards"].shape == (1, 3)
    if regime == "refs":
        assert data["side"].tolist() == [-1, 1, 0, 0] and data["among_refs"].tolist() == [True, True, True, False]
    if regime == "chosen_rejected":
        assert data["side"].tolist() == [1, -1] and not data["among_refs"].any()
        start, n = data["starts"][0] + data["prompt_lens"][0], data["lens"][0] - data["prompt_lens"][0]
        assert tokenizer.decode(data["tokens"][start:start + n]) == "yes<eos>"
    if regime == "random_pairs":
        data = dataset.build(tmp_path / "d.jsonl", tokenizer, model, regime, "dpo")
        np.testing.assert_allclose(data["rewards"], [0.9, 0.1])


def test_a_side_of_the_pairs_and_a_least_reward(tiny, rewarded):
    model, tokenizer = models.load_model(tiny, torch.float32, "cpu"), models.load_tokenizer(tiny)
    both = dataset.build(rewarded, tokenizer, model, "best_worst")
    for side, sign in (("chosen", 1), ("rejected", -1)):
        one = dataset.build(rewarded, tokenizer, model, "best_worst", side=side)
        assert set(one["side"]) == {sign}
        np.testing.assert_array_equal(one["rewards"], both["rewards"][both["side"] == sign])
    good = dataset.build(rewarded, tokenizer, model, "refs", "sft", min_reward=0.5)
    every = dataset.build(rewarded, tokenizer, model, "refs")["rewards"]
    assert 0 < len(good["rewards"]) == (every >= 0.5).sum() < len(every)


def test_length_normalized_qrpo_is_the_loss_with_beta_over_tokens(monkeypatch, tiny, rewarded):
    args, policy, data = load(monkeypatch, tiny, rewarded, "--length_normalize", "--beta=1", "--max_beta=0.12")
    data["lens"] = data["lens"] - 15 * (np.arange(len(data["lens"])) % 2)  # every second completion: 5 tokens, not 20
    data["targets"] = train.targets(args, data)
    batch = dataset.batch(data, np.arange(12), "cpu")
    logps = policy(batch["tokens"], batch["prompt_lens"], batch["lens"]).detach()
    lens = batch["lens"] - batch["prompt_lens"]
    assert lens.min() < 1 / 0.12 < lens.max()  # the clamp takes some and leaves some
    expected = []
    for i in range(len(lens)):
        beta = min(1 / int(lens[i]), 0.12)
        q = (batch["ref_rewards"][i] <= batch["rewards"][i]).double().mean().item()
        log_Z = np.log(beta * np.expm1(1 / beta))
        expected.append((q - beta * log_Z - beta * (logps[i] - batch["ref_logps"][i]).item()) ** 2)
    np.testing.assert_allclose(train.losses(args, batch, logps), expected, rtol=1e-4)
    # at its target a completion's loss is 0
    at_target = batch["ref_logps"] + batch["targets"]
    np.testing.assert_allclose(train.losses(args, batch, at_target), np.zeros(len(lens)), atol=1e-9)


def test_told_to_stop_it_saves_exits_with_75_and_continues_to_the_same_bits(tiny, rewarded, undisturbed, tmp_path):
    out = tmp_path / "run"
    command = ["train.py", *flags(tiny, rewarded, out, f"--eval_data={rewarded}", "--save_every=2", "--resume")]
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        done = len(read_rows(out / "metrics.jsonl")) if out.exists() else 0
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL)
        while not (out / "metrics.jsonl").exists() or len(read_rows(out / "metrics.jsonl")) < done + 2:
            time.sleep(0.005)
        process.send_signal(signum)
        assert process.wait() == 75
    run(*command)
    assert weights(out) == weights(undisturbed) and steps(out) == steps(undisturbed)
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [0, *range(1, 9), 8]


def test_a_second_process_on_the_same_run_is_refused(tiny, rewarded, tmp_path):
    command = flags(tiny, rewarded, tmp_path / "run", "--resume", "--epochs=50")
    first = subprocess.Popen([sys.executable, ROOT / "train.py", *command], stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    second = run("train.py", *command, check=False)
    first.kill()
    first.wait()
    assert second.returncode == 2 and "another process is writing it" in second.stderr


def test_sharded_training_has_the_same_losses_checkpoints_and_resume(tiny, rewarded, undisturbed, tmp_path):
    out = tmp_path / "run"
    shared = flags(tiny, rewarded, out, f"--eval_data={rewarded}", "--save_every=2", "--resume")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *shared]
    process = subprocess.Popen([*command, "--shard"], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(out.glob("checkpoints/step_000004")):
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run("train.py", *shared)  # what two sharded ranks saved continues in one process
    for name in ("loss", "eval_loss", "grad_norm"):
        np.testing.assert_allclose(steps(out, name), steps(undisturbed, name), rtol=2e-5, atol=2e-6)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in undisturbed.iterdir())


def test_a_dry_run_shows_a_batch_and_writes_nothing(tiny, rewarded, tmp_path):
    done = run("train.py", *flags(tiny, rewarded, tmp_path / "run", "--dry_run"))
    assert done.stdout.count("<<<\n") == 4 and "target log-ratio" in done.stdout and "minutes" in done.stdout
    assert not (tmp_path / "run").exists()


def test_metrics_go_to_a_tracker_that_is_asked_for(tiny, rewarded, tmp_path):
    (tmp_path / "trackio.py").write_text(
        "import json, pathlib\nfile = pathlib.Path(__file__).with_name('sent.jsonl').open('a')\n"
        "def init(**settings): assert settings['project'] == 'qrpo' and settings['config']['beta'] == 0.1\n"
        "def log(row, step): file.write(json.dumps(row | {'step': step}) + '\\n')\n")
    run("train.py", *flags(tiny, rewarded, tmp_path / "run", "--track=trackio"), env={"PYTHONPATH": str(tmp_path)})
    assert read_rows(tmp_path / "sent.jsonl") == read_rows(tmp_path / "run" / "metrics.jsonl")
    missing = run("train.py", *flags(tiny, rewarded, tmp_path / "other", "--track=wandb"), check=False)
    assert missing.returncode == 2 and "install it" in missing.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_leaves_the_last_checkpoint_and_room_lets_it_continue(tiny, rewarded, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", disk], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        command = flags(tiny, rewarded, disk / "run", f"--eval_data={rewarded}", "--save_every=1", "--keep=9", "--resume")
        full = run("train.py", *command, check=False)
        assert full.returncode == 2 and "make room" in full.stderr
        last = max(disk.glob("run/checkpoints/step_*"))
        assert torch.load(last / "resume.pt", weights_only=True) and not list(disk.glob("run/checkpoints/.new*"))
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        again = run("train.py", *command)
        assert f"continuing after step {int(last.name[5:])}" in again.stdout
        assert weights(disk / "run") == weights(undisturbed) and steps(disk / "run") == steps(undisturbed)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(tiny, rewarded, tmp_path):
    done = run("train.py", *flags(tiny, rewarded, tmp_path / "run", "--save_every=1", "--learning_rate=1e30",
                                  "--max_grad_norm=1", "--weight_decay=0.1", "--norm=mae"), check=False)
    assert done.returncode == 2 and "gradient norm" in done.stderr and "ids " in done.stderr
    kept = torch.load(max(tmp_path.glob("run/checkpoints/step_*/resume.pt")), weights_only=True)  # the last good one
    assert kept["model"]


@pytest.mark.parametrize("beta", (3e-4, 10.0))
def test_betas_from_tiny_to_large_train_without_overflow(tiny, rewarded, tmp_path, beta):
    for i, more in enumerate((["--quantile=exact"], ["--transform=log", "--norm=mae", "--max_grad_norm=1"])):
        run("train.py", *flags(tiny, rewarded, tmp_path / f"run{i}", f"--beta={beta}", *more))
        assert np.isfinite(steps(tmp_path / f"run{i}")).all() and np.isfinite(steps(tmp_path / f"run{i}", "grad_norm")).all()
