"""online.py: fresh samples raise the objective, and kills or processes do not change the result."""
import json
import math
import shutil

import numpy as np
import pytest
import torch

import qrpo
import rows
from conftest import Process, call, read_rows, refused, start_ranks, start_until_finished, write_rows

STEPS = 4


def flags(model, rewarded, out, *more):
    reward = rewarded.parent / "reward.py"
    return [f"--model={model}", f"--ref_model={model}", f"--data={rewarded}", f"--out={out}",
            f"--reward={reward}:letters", "--beta=0.1", "--learning_rate=1e-3", f"--steps={STEPS}",
            "--prompts=6", "--samples=2", "--max_new_tokens=12", "--dtype=float32", "--save_every=2",
            "--resume", *more]


def logged(out, name):
    return [row[name] for row in read_rows(out / "metrics.jsonl")]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tiny, rewarded, tmp_path_factory):
    out = tmp_path_factory.mktemp("online") / "run"
    call("examples/online.py", *flags(tiny, rewarded, out))
    return out


def test_the_first_step_is_at_the_reference_model_and_has_the_loss_of_its_samples(undisturbed, rewarded):
    first = read_rows(undisturbed / "metrics.jsonl")[0]
    assert abs(first["kl"]) < 1e-5
    pool = {row["id"]: row["ref_rewards"] for row in read_rows(rewarded)}
    samples = [row for row in read_rows(undisturbed / "samples") if row["step"] == 1]
    assert len(samples) == 12
    rewards = torch.tensor([row["reward"] for row in samples])
    refs = torch.tensor([pool[row["id"]] for row in samples])
    targets = qrpo.target_log_ratios(torch.full((12,), 0.1), rewards, refs, quantile="exact")
    assert first["loss"] == pytest.approx((0.1 * targets).square().mean().item(), rel=1e-4)
    best = 0.1 * math.log(0.1 * math.expm1(10))
    assert first["objective"] == pytest.approx((0.1 * targets).mean().item() + best, rel=1e-4)


def test_on_the_policys_own_samples_the_gradient_is_that_of_the_objective():
    """d/dtheta E_pi[qrpo_loss], samples held fixed, is -2 beta dJ/dtheta: on a categorical policy."""
    generator = torch.Generator().manual_seed(0)
    beta = torch.tensor([0.2], dtype=torch.float64)
    logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    ref_logps = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(0)
    rewards, ref_rewards = (torch.rand(shape, generator=generator).double() for shape in (9, (9, 5)))
    logps = logits.log_softmax(0)
    losses = qrpo.qrpo_loss(beta, logps, ref_logps, rewards, ref_rewards)
    gradient, = torch.autograd.grad((logps.exp().detach() * losses).sum(), logits, retain_graph=True)
    R = (ref_rewards <= rewards[:, None]).double().mean(1)
    objective = (logps.exp() * (R - beta * (logps - ref_logps))).sum()
    ascent, = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(gradient, -2 * beta * ascent)


def test_evaluation_takes_beta_from_the_run(tiny, rewarded, undisturbed, tmp_path):
    table = read_rows(rewarded)[:6]
    for row in table:
        row["samples"], row["sample_rewards"] = row["ref_completions"], row["ref_rewards"]
    call("evaluate.py", f"--model={undisturbed}", f"--ref_model={tiny}", f"--out={tmp_path / 'evaluation'}",
         f"--data={write_rows(tmp_path / 'rows.jsonl', table)}")
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["beta"] == 0.1 and "objective" in results


@pytest.mark.slow
def test_training_raises_the_objective(tiny, rewarded, tmp_path):
    """Guards the sum of what the other tests see in single steps: sixty steps. By 0.09 here."""
    call("examples/online.py", *flags(tiny, rewarded, tmp_path / "run", "--steps=60", "--prompts=15",
                                      "--samples=8", "--max_new_tokens=4", "--beta=0.3", "--save_every=60"))
    objective = logged(tmp_path / "run", "objective")
    assert np.mean(objective[-10:]) > np.mean(objective[:2]) + 0.04


def test_two_processes_have_the_losses_of_one(tiny, rewarded, undisturbed, tmp_path):
    for rank in start_ranks(2, "examples/online.py", *flags(tiny, rewarded, tmp_path / "two")):
        assert rank.wait() == 0
    for name in ("loss", "kl", "reward", "grad_norm"):
        two, one = logged(tmp_path / "two", name), logged(undisturbed, name)
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_killed_before_any_of_its_writes_ends_in_the_same_bits(tiny, rewarded, undisturbed, tmp_path):
    """Guards that nothing is lost: dozens of kills, each a start of the script."""
    assert start_until_finished("examples/online.py", *flags(tiny, rewarded, tmp_path / "run")) > 10
    assert weights(tmp_path / "run") == weights(undisturbed)
    assert read_rows(tmp_path / "run" / "samples") == read_rows(undisturbed / "samples")


def test_a_killed_run_ends_in_the_same_bits(tiny, rewarded, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = Process("examples/online.py", *flags(tiny, rewarded, out))
    while process.running() and not list(out.glob("resume/*/.metadata")):
        pass
    process.kill()
    of_a_second_process = write_rows(out / "samples" / "part-00001.jsonl", [{"step": 1}, {"step": 9}])
    call("examples/online.py", *flags(tiny, rewarded, out))
    assert read_rows(of_a_second_process) == [{"step": 1}]
    assert weights(out) == weights(undisturbed)
    assert logged(out, "loss") == logged(undisturbed, "loss")


def test_other_rewards_and_settings_are_refused(tiny, rewarded, undisturbed, tmp_path, capsys):
    refused(capsys, ["learning_rate=0.001", "now 0.002"], "examples/online.py",
            *flags(tiny, rewarded, undisturbed, "--learning_rate=2e-3"))
    other = tmp_path / "other.py"
    other.write_text("def letters(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    refused(capsys, ["another reward"], "examples/online.py",
            *flags(tiny, rewarded, tmp_path / "run", f"--reward={other}:letters"))


def test_no_prompt_is_twice_in_a_step_and_rows_that_cannot_be_used_are_seen_before_it(
        tiny, rewarded, tmp_path, capsys):
    """A pass over 8 rows has one step of 6."""
    table = read_rows(rewarded)[:9]
    table[3]["ref_rewards"] = [None] * 4  # no quantiles
    data = write_rows(tmp_path / "data.jsonl", table)
    call("examples/online.py", *flags(tiny, rewarded, tmp_path / "run", f"--data={data}"))
    assert "1 rows dropped, without a known reference reward" in capsys.readouterr().out
    samples = read_rows(tmp_path / "run" / "samples")
    for step in range(1, STEPS + 1):
        ids = [row["id"] for row in samples if row["step"] == step]
        assert len(ids) == 12 and len(set(ids)) == 6 and 3 not in ids
    refused(capsys, ["--prompts=9", "has only 8 rows"], "examples/online.py",
            *flags(tiny, rewarded, tmp_path / "many", f"--data={data}", "--prompts=9"))
    table[5] = {"prompt": "x" * 64, "id": 5, "ref_rewards": [0, 1]}
    refused(capsys, [":6: the prompt has", "context holds 64"], "examples/online.py",
            *flags(tiny, rewarded, tmp_path / "long", f"--data={write_rows(data, table)}"))


def test_rewards_see_the_texts_of_samples_as_those_of_the_references(tiny, rewarded, tmp_path, capsys):
    """Without the end token, here a letter, and with special tokens where the references kept them. These are
    of a model that ends elsewhere.
    """
    model, table = shutil.copytree(tiny, tmp_path / "model"), read_rows(rewarded)[:2]
    (model / "generation_config.json").write_text('{"eos_token_id": [257, 98]}')
    table[1]["made_by"]["ref_completions"]["keep_special_tokens"] = True
    data = write_rows(tmp_path / "data.jsonl", table)
    script = call("examples/online.py", *flags(
        model, rewarded, tmp_path / "run", f"--data={data}", "--prompts=2", "--steps=1"))
    assert capsys.readouterr().out.count("sampled by another model") == 1
    letter = script["tokenizer"].decode([97])
    assert [script["text_of"](n, [256, 97, 98]) for n in (0, 1)] == [letter, "<bos>" + letter]


def test_a_run_is_not_resumed_with_another_version_of_the_reward(tiny, rewarded, tmp_path, capsys):
    """Not even where the rows do not say what made their ref_rewards."""
    data = write_rows(tmp_path / "data.jsonl", [row | {"made_by": {}} for row in read_rows(rewarded)])
    file, out = shutil.copy(rewarded.parent / "reward.py", tmp_path), tmp_path / "run"
    run = flags(tiny, rewarded, out, f"--data={data}", f"--reward={file}:letters", "--steps=1")
    assert Process("examples/online.py", *run).wait() == 0
    rows.write_json(out / "run.json", json.loads((out / "run.json").read_text()) | {"finished": False})
    (tmp_path / "reward.py").write_text((tmp_path / "reward.py").read_text().replace("+ 1", "+ 2"))
    refused(capsys, ["was started with reward_fingerprint="], "examples/online.py", *run)


def test_every_column_reaches_the_reward_as_it_is(tiny, rewarded, tmp_path):
    table = [row | {"made_by": {}, "place": f"town {row['id']}"} for row in read_rows(rewarded)]
    (tmp_path / "towns.py").write_text("def number(place, **columns): return [int(p[5:]) for p in place]")
    call("examples/online.py", *flags(
        tiny, rewarded, tmp_path / "run", f"--data={write_rows(tmp_path / 'data.jsonl', table)}",
        f"--reward={tmp_path / 'towns.py'}:number", "--steps=1"))
    samples = read_rows(tmp_path / "run" / "samples")
    assert len(samples) == 12 and all(row["reward"] == row["id"] for row in samples)


@pytest.mark.parametrize("concurrency", (0, 1))
def test_an_async_reward_has_one_event_loop_in_all_steps(tiny, rewarded, tmp_path, concurrency):
    (tmp_path / "loops.py").write_text("""
import asyncio
loops = set()
async def count(prompts, completions, **columns):
    loops.add(asyncio.get_running_loop())
    return [None if k else len(loops) for k in range(len(prompts))]
""")
    table = [row | {"made_by": {}} for row in read_rows(rewarded)]
    data = write_rows(tmp_path / "data.jsonl", table)
    call("examples/online.py", *flags(
        tiny, rewarded, tmp_path / "run", f"--data={data}", f"--reward={tmp_path / 'loops.py'}:count",
        f"--score=--concurrency={concurrency}", "--steps=2"))
    assert {row["reward"] for row in read_rows(tmp_path / "run" / "samples")} == {1}
    assert logged(tmp_path / "run", "completions") == [6 * (1 + concurrency)] * 2  # of 12
