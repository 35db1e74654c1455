"""evaluate.py: the optimality gap, against numbers worked out by hand."""
import json
import math

import numpy as np

from conftest import read_rows, run, write_rows


def test_the_objective_of_the_reference_model_itself_and_its_bound(tiny, rewarded, tmp_path):
    table = read_rows(rewarded)
    for row in table:  # as if the policy were the reference model: samples of equal reward are of equal quantile
        row["samples"], row["sample_rewards"] = row["ref_completions"][:3], [*row["ref_rewards"][:2], None]
    data = write_rows(tmp_path / "data.jsonl", table)
    run("evaluate.py", f"--model={tiny}", f"--ref_model={tiny}", f"--data={data}", f"--out={tmp_path}", "--beta=0.2")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["KL to reference, nats"]["policy"] == [0.0, 0.0] and results["unknown_rewards"] == [0, 30]
    assert results["mean reward"]["policy"][0] == np.mean([row["sample_rewards"][:2] for row in table])
    best = 0.2 * math.log(0.2 * math.expm1(5))
    assert abs(results["optimality"]["best_possible"] - best) < 1e-6

    def soft_quantile(reward, others):  # beta log of the mean of e^{u/beta} over the cell
        lo = sum(r < reward for r in others) / (len(others) + 1)
        hi = (sum(r <= reward for r in others) + 1) / (len(others) + 1)
        return 0.2 * math.log(0.2 * (math.exp(hi / 0.2) - math.exp(lo / 0.2)) / (hi - lo))

    by_hand = [np.mean([soft_quantile(r, row["ref_rewards"]) for r in row["sample_rewards"][:2]]) for row in table]
    mean, error = results["optimality"]["objective"]
    assert abs(mean - np.mean(by_hand)) < 1e-5 and abs(error - np.std(by_hand, ddof=1) / 30 ** 0.5) < 1e-5
    before = [np.mean([soft_quantile(r, row["ref_rewards"][:k] + row["ref_rewards"][k + 1:])
                       for k, r in enumerate(row["ref_rewards"])]) for row in table]
    assert abs(results["quantile reward"]["reference"][0] - np.mean(before)) < 1e-5
    saved = np.load(tmp_path / "samples.npz")
    assert len(saved["log_ratio"]) == 60 and (saved["lo"] < saved["hi"]).all()


def test_one_prompt_has_no_standard_error(tiny, rewarded, tmp_path):
    row = read_rows(rewarded)[0]
    row |= {"samples": row["ref_completions"], "sample_rewards": row["ref_rewards"]}
    run("evaluate.py", f"--model={tiny}", f"--ref_model={tiny}", f"--data={write_rows(tmp_path / 'one.jsonl', [row])}",
        f"--out={tmp_path}", "--beta=0.2")
    assert json.loads((tmp_path / "results.json").read_text())["mean reward"]["policy"] == [np.mean(row["ref_rewards"]), None]
