"""evaluate.py: gain, objective and bound against numbers worked out by hand, and every picture of a run."""
import json
import math

import numpy as np
import pytest

from conftest import call, read_rows, refused, write_rows


def soft_quantile(reward, others, beta):
    """beta log of the mean of e^{u/beta} over the reward's cell among the others."""
    lo = sum(r < reward for r in others) / (len(others) + 1)
    hi = (sum(r <= reward for r in others) + 1) / (len(others) + 1)
    return beta * math.log(beta * (math.exp(hi / beta) - math.exp(lo / beta)) / (hi - lo))


def test_the_objective_of_the_reference_model_itself_and_its_bound(tiny, rewarded, tmp_path):
    table = read_rows(rewarded)
    for row in table:  # as if the policy were the reference model; one reward is unknown
        row["samples"], row["sample_rewards"] = row["ref_completions"][:3], [*row["ref_rewards"][:2], None]
    data = write_rows(tmp_path / "data.jsonl", table)
    call("evaluate.py", f"--model={tiny}", f"--ref_model={tiny}", f"--data={data}", f"--out={tmp_path}",
         "--beta=0.2")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["KL to reference, nats"]["policy"] == [0.0, 0.0] and results["unknown_rewards"] == [0, 30]
    assert results["mean reward"]["policy"][0] == np.mean([row["sample_rewards"][:2] for row in table])
    best = 0.2 * math.log(0.2 * math.expm1(5))
    assert abs(results["optimality"]["best_possible"] - best) < 1e-6

    policy, reference = [], []
    for row in table:
        refs = row["ref_rewards"]
        policy.append(np.mean([soft_quantile(r, refs, 0.2) for r in row["sample_rewards"][:2]]))
        others = [refs[:k] + refs[k + 1:] for k in range(4)]
        reference.append(np.mean([soft_quantile(r, other, 0.2) for r, other in zip(refs, others)]))
    mean, error = results["optimality"]["objective"]
    assert abs(mean - np.mean(policy)) < 1e-5 and abs(error - np.std(policy, ddof=1) / 30 ** 0.5) < 1e-5
    assert abs(results["quantile reward"]["reference"][0] - np.mean(reference)) < 1e-5
    saved = np.load(tmp_path / "samples.npz")
    assert len(saved["log_ratio"]) == 60 and (saved["lo"] < saved["hi"]).all()


def test_one_prompt_has_no_standard_error(tiny, rewarded, tmp_path):
    row = read_rows(rewarded)[0]
    row |= {"samples": row["ref_completions"], "sample_rewards": row["ref_rewards"]}
    data = write_rows(tmp_path / "one.jsonl", [row])
    call("evaluate.py", f"--model={tiny}", f"--ref_model={tiny}", f"--data={data}", f"--out={tmp_path}",
         "--beta=0.2")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["mean reward"]["policy"] == [np.mean(row["ref_rewards"]), None]


@pytest.fixture(scope="module")
def trained(tiny, rewarded, tmp_path_factory):
    """A short pipeline: references, their rewards, a run with a checkpoint, samples of it, their rewards."""
    folder = tmp_path_factory.mktemp("trained")
    reward = f"--reward={rewarded.parent / 'reward.py'}:letters"
    call("generate_refs.py", f"--model={tiny}", f"--data={rewarded.parent / 'prompts.jsonl'}",
         f"--out={folder / 'refs'}", "--num_refs=16", "--max_new_tokens=20")
    call("score.py", f"--data={folder / 'refs'}", f"--out={folder / 'rewarded'}", reward)
    call("train.py", f"--model={tiny}", f"--data={folder / 'rewarded'}", f"--out={folder / 'run'}",
         f"--eval_data={folder / 'rewarded'}", "--learning_rate=3e-3", "--batch_size=16", "--epochs=2",
         "--save_every=40", "--beta=0.1", "--quantile=exact")
    call("generate_refs.py", f"--model={folder / 'run'}", f"--data={folder / 'rewarded'}",
         f"--out={folder / 'samples'}", "--field=samples", "--num_refs=4", "--max_new_tokens=20", "--seed=1")
    call("score.py", f"--data={folder / 'samples'}", f"--out={folder / 'scored'}", reward)
    return folder


def test_a_trained_run_gains_and_all_its_pictures_are_drawn(tiny, trained, capsys):
    run, data = trained / "run", f"--data={trained / 'scored'}"
    checkpoint = run / "checkpoints" / "step_000040"
    for model in (checkpoint, run):
        call("evaluate.py", f"--model={model}", f"--ref_model={tiny}", data, f"--out={model}")
    results = json.loads((run / "results.json").read_text())
    gain, error = results["mean reward"]["difference"]
    assert gain > 3 * error
    assert results["optimality"]["beta"] == 0.1  # the run's own
    assert results["optimality"]["objective"][0] < results["optimality"]["best_possible"]
    assert results["quantile reward"]["reference"][0] < results["quantile reward"]["policy"][0]
    assert results["KL to reference, nats"]["policy"][0] > 0
    printed = capsys.readouterr().out
    for picture in ("curves", "calibration", "results", "optimum"):
        assert (run / f"{picture}.png").stat().st_size > 10_000 and f"{picture}.png" in printed
    assert json.loads((checkpoint / "results.json").read_text())["step"] == 40


def test_a_second_opinion_is_shown_beside_the_reward(tiny, trained, rewarded, tmp_path, capsys):
    """The reward liked letters; a judge that dislikes them sees the policy lose what it gained."""
    judge = tmp_path / "judge.py"
    judge.write_text((rewarded.parent / "reward.py").read_text().replace("[sum(", "[5 - sum("))
    call("score.py", f"--data={trained / 'scored'}", f"--out={tmp_path / 'judged'}",
         f"--reward={judge}:letters", "--name=judge")
    evaluation = [f"--model={trained / 'run'}", f"--ref_model={tiny}", f"--out={tmp_path / 'out'}"]
    call("evaluate.py", *evaluation, f"--data={tmp_path / 'judged'}")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    first, second = results["mean reward"], results["mean reward by judge"]
    assert first["difference"][0] > 0
    assert second["difference"] == pytest.approx([-first["difference"][0], first["difference"][1]])
    assert second["policy"][0] == pytest.approx(5 - first["policy"][0])
    assert "mean reward by judge" in capsys.readouterr().out
    from matplotlib import image
    assert image.imread(tmp_path / "out" / "results.png").shape[1] == 4 * 4 * 120  # two panels a reward

    table = read_rows(tmp_path / "judged")
    assert [row["sample_rewards"] for row in table] == [
        row["sample_rewards"] for row in read_rows(trained / "scored")]
    table[0]["ref_rewards_judge"][0] = None
    del table[3]["sample_rewards_judge"]
    data = write_rows(tmp_path / "gap.jsonl", table)
    refused(capsys, ["gap.jsonl:4", "sample_rewards_judge"], "evaluate.py", *evaluation, f"--data={data}")
    call("evaluate.py", *evaluation, f"--data={write_rows(data, [table[0], *table[4:]])}")
    assert "unknown rewards of 1 reference and 0 policy samples" in capsys.readouterr().out


def test_references_that_are_texts_have_no_length_and_all_else_is_there(tiny, rewarded, tmp_path, capsys):
    table = read_rows(rewarded)
    for row in table:
        row["samples"], row["sample_rewards"] = row["ref_completions"], row["ref_rewards"]
        row["made_by"] |= {"samples": row["made_by"]["ref_completions"]}
        row["made_by"]["ref_completions"] = row["made_by"]["ref_completions"] | {"from_text": True}
        row["ref_completions"] = [{"text": completion["text"]} for completion in row["ref_completions"]]
    data = write_rows(tmp_path / "data.jsonl", table)
    call("evaluate.py", f"--model={tiny}", f"--ref_model={tiny}", f"--data={data}", f"--out={tmp_path}",
         "--beta=0.1")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["length, tokens"]["policy"][0] > 0 and results["mean reward"]["difference"] == [0, 0]
    assert results["length, tokens"]["reference"][0] is None and "nan" in capsys.readouterr().out
