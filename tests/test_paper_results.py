"""paper/protocol.py and results.py: the protocol's numbers by hand, and tables and figures of runs on disk.
"""
import contextlib
import csv
import io
import itertools
import math
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, call, read_rows, write_rows

import evaluate
import rows

sys.path.insert(0, str(ROOT / "paper"))
import diagnose  # noqa: E402
import protocol  # noqa: E402
import results  # noqa: E402


# ---- the protocol ----

def length_controlled(*arrays):
    return protocol.length_controlled(*map(pd.DataFrame, arrays)).to_numpy()


def test_length_controlled_reward_by_hand():
    # references of each prompt: rewards 0, 2 (mean 1, std sqrt 2) and lengths 10, 30 (mean 20, std 10 sqrt 2)
    ref_reward, ref_length = np.tile([0.0, 2], (4, 1)), np.tile([10.0, 30], (4, 1))
    ref_reward[3] = 0.1  # no spread: this prompt is not in the regression, and its reward stays
    length, reward = np.array([[10.0], [20], [30], [90]]), np.array([[0.5], [1.5], [1.0], [9]])
    # x = (-1, 0, 1)/sqrt 2, y = (-.5, .5, 0)/sqrt 2: the slope is (.5 + 0)/2 = 1/4; std_r/std_L = 1/10
    expected = [0.5 + 0.25 * 10 / 10, 1.5, 1.0 - 0.25 * 10 / 10, 9]
    got = length_controlled(reward, length, ref_reward, ref_length)
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-12)
    six = np.repeat(ref_reward, 3, 1)  # the standard deviation of six times 0.1 is 1e-17, not 0
    assert length_controlled(reward, length, six, np.repeat(ref_length, 3, 1))[3, 0] == 9


def test_length_controlled_reward_with_an_unknown_reward():
    ref_reward, ref_length = np.tile([0.0, 2], (4, 1)), np.tile([10.0, 30], (4, 1))
    length, reward = np.array([[10.0], [20], [30], [90]]), np.array([[0.5], [1.5], [1.0], [np.nan]])
    got = length_controlled(reward, length, ref_reward, ref_length)
    # the slope is that of the others
    np.testing.assert_allclose(got[:, 0], [0.75, 1.5, 0.75, np.nan], rtol=1e-12)


def test_length_controlled_reward_removes_what_only_length_earned():
    rng = np.random.default_rng(0)
    ref_length = rng.normal(100, 20, (50, 16))
    length = rng.normal(130, 20, (50, 3))  # longer than the references; the reward is length / 100
    got = length_controlled(length / 100, length, ref_length / 100, ref_length)
    np.testing.assert_allclose(got, np.tile(ref_length.mean(1)[:, None] / 100, 3), rtol=1e-9)


def test_win_rate_counts_ties_half_and_leaves_unknown_rewards_out():
    got = protocol.win_rate(pd.DataFrame([[1.0, np.nan, 3]]), pd.DataFrame([[0, 1, 2, np.nan]]))
    np.testing.assert_equal(got.to_numpy(), [[0.5, np.nan, 1]])


def test_measure_by_hand():
    def evaluation(reward):
        reward = pd.DataFrame(reward, dtype=float)
        references = pd.DataFrame(np.zeros((len(reward), 2)))
        return protocol.Evaluation(None, "samples", None, reward, reward * 0 + 7, references, references + 1,
                                   reward * 0 + 2)
    two = [evaluation([[0, 1], [1, 1], [5, 5]]), evaluation([[0, 0], [1, 0], [5, 5]])]
    m = protocol.measure(two, np.array([0, 1]))  # the first two prompts
    # seed 0: generations (.5, 1), seed 1: (.5, 0); prompts over everything: (.25, .75)
    assert m["reward"] == m["gain"] == m["lc_reward"] == 0.5 and m["length"] == 7 and m["seeds"] == 2
    assert m["reward_std"] == pytest.approx(math.sqrt((0.125 + 0.125) / 2))
    assert m["reward_se_prompts"] == pytest.approx(0.25) and m["reward_se_seeds"] == pytest.approx(0.25)
    assert m["win_rate"] == pytest.approx(0.75)  # of eight samples four win, four tie
    assert (m["full_marks"], m["kl"]) == (0.5, 2)
    # two references of reward 0: a sample of 1 has the cell (2/3, 1], and one of 0 the whole (0, 1]
    win, tie = 1 / 5 * math.log(math.exp(5) * -math.expm1(-5 / 3) * 3 / 5), math.log(math.expm1(5) / 5) / 5
    assert protocol.measure(two, np.array([0, 1]), 0.2)["objective"] == pytest.approx((win + tie) / 2 - 0.4)
    single = protocol.measure([evaluation([[0, 1], [1, 1]])], np.array([0, 1]))
    assert single["reward_std"] == pytest.approx(math.sqrt(0.125)) and math.isnan(single["reward_se_seeds"])


@pytest.mark.parametrize("field", ("samples", "ref_completions"))
def test_the_objective_is_that_of_evaluate_py(field):
    """With ties and unknown rewards, of all references of a prompt, too: it has no quantile there."""
    rng = np.random.default_rng(0)
    ref_reward = rng.choice([np.nan, 0, 0.5, 1], (12, 4), p=[0.4, 0.2, 0.2, 0.2])
    ref_reward[3] = np.nan
    reward = ref_reward if field == "ref_completions" else rng.choice([np.nan, 0, 0.5, 1], (12, 3))
    evaluation = protocol.Evaluation(None, field, *(pd.DataFrame(x) for x in (
        reward, reward, reward, ref_reward, ref_reward, reward * 0)))
    found = protocol.metrics(evaluation, np.arange(12), 0.2)["objective"].to_numpy()
    row, k = np.nonzero(~np.isnan(reward))
    data = SimpleNamespace(rewards=reward[row, k], ref_rewards=ref_reward, row=row,
                           among_refs=np.full(len(row), field == "ref_completions"))
    evaluate.quantile_rewards(SimpleNamespace(beta=0.2, transform="identity"), data)
    expected = np.full(reward.shape, np.nan)
    expected[row, k] = data.R
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_best_tradeoff_by_hand():
    """One of four references passes: at beta b, odds of e^{1/b} to 3."""
    b = 1 / math.log(3)  # odds of 3 to 3, so half of the mass on one reference in four
    kl, mean = protocol.best_tradeoff(np.array([[1.0, 0, 0, 0], [0, 0, 0, 0]]), [1e-3, b, 1e9])
    assert mean == pytest.approx([0.5, 0.25, 0.125])  # nothing can be gained where no reference passes
    assert kl == pytest.approx([math.log(4) / 2, (math.log(2) + math.log(2 / 3)) / 4, 0], abs=1e-8)
    unknown = protocol.best_tradeoff(np.array([[1.0, 0, 0, 0, np.nan], [np.nan] * 5]), [b])
    assert (unknown[1].item(), unknown[0].item()) == pytest.approx((0.5, (math.log(2) + math.log(2 / 3)) / 2))


def test_halves_split_each_difficulty():
    difficulty = ["hard"] * 7 + ["easy"] * 20 + ["medium"] * 10
    a, b = protocol.halves(difficulty)
    assert sorted([*a, *b]) == list(range(37))
    for kind in set(difficulty):
        assert abs(sum(difficulty[i] == kind for i in a) - sum(difficulty[i] == kind for i in b)) <= 1
    assert sum(i < 3 for i in a) < 3 and list(a) == list(protocol.halves(difficulty)[0])


def test_selection_rule_step_by_step():
    def m(reward, lc, length=10, std=0.1):
        return {"reward": reward, "lc_reward": lc, "length": length, "reward_std": std, "lc_reward_std": std}
    # The first is too long; the second has the best reward. The third is 2.9 sqrt(.02) below that, too far,
    # though its length-controlled reward is the best.
    pool = [m(9, 9, 1001), m(1.0, 0.1), m(0.59, 0.9), m(0.8, 0.5), m(0.75, 0.6), m(0.72, 0.3)]
    # Of the rest, the best length-controlled reward is 0.6; 0.5 is within .8 sqrt(.02) = .113 of that, and
    # has the higher reward.
    assert protocol.select(pool) == 3
    assert protocol.select(pool, "reward") == 0
    assert protocol.select([*pool[:3], m(0.8, 0.48), *pool[4:]]) == 4  # .12 below is too far
    # without spread only the best itself is left
    assert protocol.select([m(1, 0, std=0), m(0.99, 1, std=0)]) == 0


@pytest.mark.parametrize("beta, rises", [(0.1, 0.2303), (0.01, 0.0461), (0.001, 0.0069)])
def test_optimum_under_a_normal_reward(beta, rises):
    reward = np.linspace(-9, 9, 180_001)
    density, share = results.optimum(beta, reward)
    dx = reward[1] - reward[0]
    assert share == pytest.approx(rises, abs=1e-4)
    assert density.sum() * dx == pytest.approx(1, abs=1e-4)
    pi_ref = np.exp(-reward ** 2 / 2) / math.sqrt(2 * math.pi)
    rising = pi_ref[density > pi_ref].sum() * dx
    assert rising == pytest.approx(share, abs=1e-3)


def completions(counts, log_ratio, rewards, beta=0.2):
    """Of one prompt, each of some completions drawn so often; R is the reward."""
    each = np.repeat(np.arange(len(counts)), counts)
    log_ratio, rewards = np.array(log_ratio)[each], np.array(rewards)[each]
    return SimpleNamespace(row=each * 0, log_ratio=log_ratio, rewards=rewards, R=rewards,
                           target=rewards / beta)


def test_the_decomposition_of_the_objective_by_hand():
    """Under ref four completions are equally likely. One passes; pi is .5 on it, .3, .1 and .1 on the others.
    """
    rewards, pi = [1.0, 0, 0, 0], np.array([0.5, 0.3, 0.1, 0.1])
    samples, refs = (completions(counts, np.log(4 * pi), rewards) for counts in ([5, 3, 1, 1], [3] * 4))
    parts = diagnose.decompose(samples, refs, 0.2)
    kl = (pi * np.log(4 * pi)).sum()
    classes = (math.log(2) + math.log(2 / 3)) / 2
    assert parts["kl"] == pytest.approx(kl) and parts["classes"] == pytest.approx(classes)
    waste = parts["waste_passing"], parts["waste_failing"]
    assert waste == pytest.approx((0, kl - classes))
    assert (parts["passing"], parts["passing_ref"]) == pytest.approx((0.5, 0.25))
    assert parts["objective"] == pytest.approx(0.5 - 0.2 * kl)
    passing, failing = diagnose.calibration(refs)
    assert (passing["mass"], failing["mass"]) == pytest.approx((0.5, 0.5))
    assert passing["mass_at_optimum"] == pytest.approx(math.exp(5) / 4)


def test_the_decomposition_where_a_share_rounds_to_nothing():
    """A policy that moved all mass from failures, by 800 nats: its KL is that of the shares."""
    samples = completions([4, 0], [math.log(2), -800.0], [1.0, 0])
    refs = completions([2, 2], [math.log(2), -800.0], [1.0, 0])
    parts = diagnose.decompose(samples, refs, 0.1)
    assert parts["classes"] == pytest.approx(math.log(2)) == parts["kl"]
    assert parts["without_waste"] == pytest.approx(1 - 0.1 * math.log(2))


def test_diagnose_takes_no_samples_at_another_temperature(tmp_path, capsys):
    write_run(tmp_path / "a", 0, lambda i, k: 0.6)
    made_with(tmp_path / "a", samples={"temperature": 0.6, "top_p": 1.0})
    with mock.patch.object(sys, "argv", ["diagnose.py", f"--data={tmp_path}", "--runs", "a"]):
        with pytest.raises(SystemExit, match="2"):
            diagnose.main()
    assert "a/test/rewarded: its samples were sampled at temperature 0.6" in capsys.readouterr().err


def test_what_few_references_cost_is_nothing_where_they_are_the_whole_distribution():
    fresh = completions([1] * 4, [0.0] * 4, np.arange(4.0))
    R = (np.arange(4) + np.log(-np.expm1(-2.5) / 2.5) / 2.5 + 1) / 4  # of cells of width 1/4 at beta 0.1
    fresh.R = R
    knowing, unknowing = diagnose.cost_of_few_references(fresh, 0.1)
    assert knowing == pytest.approx(unknowing, abs=1e-6)
    assert knowing == pytest.approx(diagnose.best_possible(0.1), abs=1e-6)
    fresh.R = R[::-1]  # the references that were drawn say the opposite
    assert diagnose.cost_of_few_references(fresh, 0.1)[1] < knowing - 0.5


# ---- runs on disk ----

def write_run(folder, seed, reward, steps=10, finished=True, evaluated=True, metrics=None, **config):
    """A run's folder; reward(i, k) of sample k of prompt i. Its references have rewards 0 and 1 and lengths 4
    and 6.
    """
    config = {"loss": "qrpo", "quantile": "paper", "train_on": "refs", "beta": 0.1, "learning_rate": 1e-4,
              "seed": seed, "num_ref_rewards": 0, "model": f"seed{seed}/base", "steps": steps + seed,
              "data_fingerprint": f"f{seed}", **config}
    rows.write_json(folder / "run.json", {"config": config, "finished": finished})
    (folder / "test/rewarded").mkdir(parents=True)

    def text(n):
        return {"text": "x" * n, "token_ids": [1] * n, "finish_reason": "stop"}

    with open(folder / "test/rewarded/part-00000.jsonl", "wb") as f:
        for i in range(8):
            rows.append(f, {"id": f"p{i}", "prompt": f"do {i}", "difficulty": ["easy", "hard"][i % 2],
                            "ref_completions": [text(4), text(6)], "ref_rewards": [0.0, 1.0],
                            "samples": [text(5), text(5 + i)],
                            "sample_rewards": [reward(i, k) for k in range(2)]})
    with open(folder / "metrics.jsonl", "wb") as f:
        for line in metrics or []:
            rows.append(f, line)
    n = np.array([2 * i + k for i in range(8) for k in range(2) if reward(i, k) is not None])
    np.savez(folder / "samples.npz", log_ratio=2.0 * (n % 5) + 3, length=5 + n % 5, row=n // 2,
             reward=n * 0.0, lo=n * 0.0, hi=n * 0.0, row_ids=np.array([f"p{i}" for i in range(8)]))
    if evaluated:
        rows.write_json(folder / "results.json", {})


def command(tmp_path, what, *flags):
    """Run results.py in this process; returns what it prints."""
    printed = io.StringIO()
    argv = ["results.py", what, f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}", *flags]
    quick = mock.patch.object(results, "RESAMPLES", 20)  # 200 take seconds
    with quick, mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(printed):
        results.main()
    return printed.getvalue()


def read_csv(path):
    with open(path) as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two seeds; the second learning rate is better on the selection half, the first on the half that is
    reported.
    """
    tmp_path = tmp_path_factory.mktemp("sweep")
    selection, report = protocol.halves(["easy", "hard"] * 4)
    for seed in (0, 1):
        def one(name, good, value, **config):
            metrics = [{"step": 0, "eval_log_ratio_better": 0.0, "eval_log_ratio_worse": 0.0},
                       {"step": 5, "loss": 1},
                       {"step": 9, "eval_log_ratio_better": 1.0 + seed, "eval_log_ratio_worse": -2.0}]
            write_run(tmp_path / f"runs/seed{seed}/{name}-seed{seed}", seed,
                      lambda i, k: float(value if i in good else 0), metrics=metrics, **config)
        one("qrpo-a", report, 0.9)
        one("qrpo-b", selection, 0.8 + seed / 10, learning_rate=3e-4)
        one("qrpo-n1", {0, 1, 2, 3}, 0.5, num_ref_rewards=1, beta=0.3)
        one("qrpo-all", {0, 1, 2, 3}, 0.7, beta=0.3)  # all are two
        one("dpo", range(8), 0.25, loss="dpo", train_on="best_worst", quantile="exact")
    write_run(tmp_path / "runs/late", 0, lambda i, k: 1.0, finished=False, loss="dpo")
    write_run(tmp_path / "runs/later", 0, lambda i, k: 1.0, evaluated=False, loss="dpo")
    return tmp_path


def test_table_selects_on_one_half_and_reports_the_other(sweep):
    printed = command(sweep, "table", "--select=reward")
    assert all(text in printed for text in ("2 left out", "late: not finished", "later: not evaluated"))
    methods = {m["method"]: m for m in read_csv(sweep / "out/table.csv")}
    assert list(methods) == ["reference model", "dpo best_worst", "qrpo paper refs"]
    qrpo, dpo, base = methods["qrpo paper refs"], methods["dpo best_worst"], methods["reference model"]
    assert "learning_rate 0.0003" in qrpo["selected"]  # the better one on the selection half
    assert float(qrpo["reward"]) == 0
    assert (float(dpo["reward"]), int(dpo["seeds"]), float(dpo["reward_se_seeds"])) == (0.25, 2, 0)
    assert (float(dpo["gain"]), float(dpo["gain_se_prompts"])) == (-0.25, 0)
    assert (float(base["reward"]), float(base["win_rate"]), float(base["length"])) == (0.5, 0.5, 5)
    markdown = (sweep / "out/table.md").read_text()
    assert "| **qrpo paper refs** |" in markdown  # picked by the rule
    assert "32.7 / 1.0" in markdown  # the paper's
    assert "**0.5000** ± 0.0000 | **0.0000**" in markdown  # references that seeds share count once


def test_a_table_by_other_flags_has_a_line_for_each_cell(sweep):
    command(sweep, "table", "--by=loss,beta", "--select=reward")
    cells = {m["method"]: m for m in read_csv(sweep / "out/table.csv")}
    assert list(cells) == ["reference model", "dpo beta 0.1", "qrpo beta 0.1", "qrpo beta 0.3"]
    assert cells["qrpo beta 0.3"]["selected"] == "num_ref_rewards 0"


def test_figures_and_the_numbers_behind_them(sweep):
    for what in ("figure1", "figure3", "figure4", "figure5", "figure6"):
        printed = command(sweep, what)
        assert (sweep / f"out/{what}.png").stat().st_size > 5000
        if what == "figure5":
            assert "beta 0.1: 77% of the reference's mass falls, 23% rises" in printed
    assert [m["method"] for m in read_csv(sweep / "out/figure1.csv")] == ["reference model", "dpo", "qrpo"]
    report = protocol.halves(["easy", "hard"] * 4)[1]
    share = sum(i < 4 for i in report) / 4
    points = read_csv(sweep / "out/figure3.csv")
    assert [(p["beta"], p["num_ref_rewards"]) for p in points] == [("0.3", "1"), ("0.3", "2")]  # 0.1 has one
    assert [float(p["reward"]) for p in points] == pytest.approx([0.5 * share, 0.7 * share])
    for fit in read_csv(sweep / "out/figure4_fits.csv"):  # 2 nats a token; sigma is sqrt 2 tokens
        assert int(fit["samples"]) == 32
        assert float(fit["slope"]) == pytest.approx(2 * math.sqrt(2))
        assert float(fit["intercept"]) == pytest.approx(3)  # at the mean length, 5
        assert float(fit["spearman"]) == pytest.approx(1)
    last = [p for p in read_csv(sweep / "out/figure6.csv") if p["method"] == "dpo" and p["step"] == "9"]
    assert [(p["side"], float(p["log_ratio"]), float(p["se_seeds"])) for p in last] == [
        ("better", 1.5, 0.5), ("worse", -2.0, 0.0)]


def test_training_on_fresh_samples_is_a_method_of_its_own():
    config = {"loss": "qrpo", "seed": 1, "model": "out/seed1/qrpo", "beta": 0.1}
    assert protocol.setting_of(config)["loss"] == "qrpo"
    online = config | {"reward": "tests", "samples": 4, "steps": 200}
    assert protocol.setting_of(online)["loss"] == "online"
    assert protocol.setting_of(online) == protocol.setting_of(online | {"seed": 2, "model": "out/seed2/qrpo"})
    assert protocol.setting_of(online) != protocol.setting_of(online | {"steps": 400})
    # train.py's steps follow from its data
    assert protocol.setting_of(config | {"steps": 160}) == protocol.setting_of(config | {"steps": 161})


def test_where_rewards_tie_only_exact_converges_to_the_optimum(sweep):
    printed = command(sweep, "ties").splitlines()
    paper, exact = [float(line.split()[2]) for line in printed[:2]]
    assert paper == pytest.approx(0.752, abs=0.004) and exact == pytest.approx(0.7697, abs=0.0005)
    curves = read_csv(sweep / "out/ties.csv")
    assert len(curves) == 500
    assert float(curves[-1]["paper"]) == pytest.approx(paper, abs=1e-4)
    assert float(curves[-1]["exact"]) == pytest.approx(exact, abs=1e-4)


def test_the_frontier_has_the_kl_of_the_samples_and_the_bound_of_the_references(sweep):
    """log_ratio is 3 to 11 in turn, so of a prompt's two samples: a mean of 4, 8, 7, 6, 5 or 9 in turn."""
    command(sweep, "frontier")
    points = read_csv(sweep / "out/frontier.csv")
    assert [p["method"] for p in points] == ["dpo", "qrpo", "qrpo", "qrpo", "qrpo"]
    report = protocol.halves(["easy", "hard"] * 4)[1]
    kl = np.mean([(2.0 * (n % 5) + 3) for i in report for n in (2 * i, 2 * i + 1)])
    assert float(points[0]["kl"]) == pytest.approx(kl) and float(points[0]["kl_se_seeds"]) == 0
    assert (float(points[0]["reward"]), float(points[0]["full_marks"])) == (0.25, 0)
    for point in read_csv(sweep / "out/frontier_bound.csv"):  # half of the references have reward 1
        p = float(point["mean"])
        kl = p * math.log(2 * p) + (p < 1) * (1 - p) * math.log(max(2 - 2 * p, 1e-99))
        assert float(point["kl"]) == pytest.approx(kl, abs=1e-6)
        assert float(point["low"]) <= p <= float(point["high"])


def test_the_samples_of_another_evaluation_are_refused(tmp_path, capsys):
    write_run(tmp_path / "runs/a", 0, lambda i, k: 0.6)
    write_run(tmp_path / "other", 0, lambda i, k: 0.6 if i else None)
    shutil.copy(tmp_path / "other/samples.npz", tmp_path / "runs/a/samples.npz")
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path, "table")
    assert "run evaluate.py again" in capsys.readouterr().err


def test_figure_4_omits_prompts_whose_references_all_have_one_length(tmp_path):
    write_run(tmp_path / "a", 0, lambda i, k: 0.5)
    evaluation = protocol.read_evaluation(tmp_path / "a/test/rewarded")
    assert len(results.normalised_samples(evaluation)) == 16
    evaluation.ref_length.iloc[2] = 6.0
    samples = results.normalised_samples(evaluation)
    assert len(samples) == 14 and np.isfinite(samples.normalised_length).all()


def test_checkpoints_are_selected_too(tmp_path):
    write_run(tmp_path / "runs/a", 0, lambda i, k: 0.1, steps=30)
    for step, reward in ((10, 0.6), (20, 0.9)):  # step 20 was not evaluated to its end
        write_run(tmp_path / f"runs/a/checkpoints/step_{step:06d}", 0, lambda i, k: reward,
                  evaluated=step == 10)
        (tmp_path / f"runs/a/checkpoints/step_{step:06d}/run.json").unlink()
    assert "1 left out:\n" in (printed := command(tmp_path, "table"))
    assert "checkpoints/step_000020: not evaluated" in printed
    qrpo = read_csv(tmp_path / "out/table.csv")[1]
    assert (qrpo["selected"], float(qrpo["reward"])) == ("step 10", pytest.approx(0.6))


def test_settings_are_compared_on_the_seeds_that_all_of_them_have(tmp_path):
    for seed, reward in enumerate((0.9, 0.6, 0.6)):
        write_run(tmp_path / f"runs/a{seed}", seed, lambda i, k: reward)
    write_run(tmp_path / "runs/b", 0, lambda i, k: 0.8, beta=0.3)
    command(tmp_path, "table")
    qrpo = read_csv(tmp_path / "out/table.csv")[1]
    assert (qrpo["selected"], qrpo["seeds"], float(qrpo["reward"])) == ("beta 0.1", "3", pytest.approx(0.7))


def test_the_reference_model_is_what_was_sampled_as_its_policies_were(tmp_path):
    """Two reference models: of one there are samples of its own, for the other its references stand."""
    for name, model in ("x", "nosft"), ("y", "sft"):
        write_run(tmp_path / f"runs/{name}/run", 0, lambda i, k: 0.6, model=model)
    write_run(tmp_path / "runs/x/base", 0, lambda i, k: 0.25)
    shutil.move(tmp_path / "runs/x/base/test/rewarded", tmp_path / "runs/x/base/rewarded")
    (tmp_path / "runs/x/base/run.json").unlink()
    command(tmp_path, "table")
    table = [(m["method"], float(m["reward"]), float(m["kl"])) for m in read_csv(tmp_path / "out/table.csv")]
    assert table[:2] == [("reference model nosft", 0.25, 0), ("reference model sft", 0.5, 0)]
    part = tmp_path / "runs/x/base/rewarded/part-00000.jsonl"
    part.write_text("".join(itertools.islice(open(part), 7)))
    with pytest.raises(SystemExit, match="2"):  # it was not scored to its end
        command(tmp_path, "table")


def test_a_run_without_known_rewards_is_left_out(tmp_path):
    write_run(tmp_path / "runs/a", 0, lambda i, k: 0.6)
    write_run(tmp_path / "runs/b", 0, lambda i, k: None, loss="dpo")
    write_run(tmp_path / "runs/c", 0, lambda i, k: 0.5 if k else None, loss="rebel")  # one generation of two
    assert "dpo refs: left out" in command(tmp_path, "table")
    methods = [m["method"] for m in read_csv(tmp_path / "out/table.csv")]
    assert methods == ["reference model", "rebel refs", "qrpo paper refs"]


def test_a_new_loss_needs_no_line_here(tmp_path):
    """It comes last, and no flag of it is ignored."""
    for quantile, reward in (("paper", 0.6), ("exact", 0.8)):
        write_run(tmp_path / f"runs/ipo-{quantile}", 0, lambda i, k: reward, loss="ipo", quantile=quantile)
    write_run(tmp_path / "runs/simpo", 0, lambda i, k: 0.7, loss="simpo")
    for what in ("table", "figure1", "figure4"):
        command(tmp_path, what)
    methods = [(m["method"], float(m["reward"])) for m in read_csv(tmp_path / "out/table.csv")]
    expected = [("reference model", 0.5), ("simpo refs", 0.7), ("ipo exact refs", 0.8),
                ("ipo paper refs", 0.6)]
    assert methods == [(name, pytest.approx(reward)) for name, reward in expected]


@pytest.mark.parametrize("flags, says", (
    (["table", "--by=loss,learning_rates"], "no run has a flag 'learning_rates'"),
    (["figure4", "--tokenizer=x"], "--tokenizer"), (["table", "--runs=/no/runs"], "/no/runs: no such folder"),
    (["table", "--out=/dev/null"], "/dev/null: cannot be written")))
def test_flags_that_make_no_sense_are_refused(sweep, capsys, flags, says):
    with pytest.raises(SystemExit, match="2"):
        command(sweep, *flags)
    assert says in capsys.readouterr().err


def test_alpaca_eval_takes_the_first_samples(sweep):
    command(sweep, "alpaca")
    got = rows.load_json(sweep / "out/alpaca-dpo.json")
    assert got[0] == {"instruction": "do 0", "output": "xxxxx", "generator": "dpo"} and len(got) == 8


@pytest.mark.parametrize("change, message", [
    ({}, "has the settings and the seed"), ({"beta": 1.0}, "test prompts are not")])
def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys, change, message):
    write_run(tmp_path / "runs/a", 0, lambda i, k: 0.5)
    write_run(tmp_path / "runs/b", 0, lambda i, k: 0.5, **change)
    if change:
        part = tmp_path / "runs/b/test/rewarded/part-00000.jsonl"
        part.write_text(part.read_text().replace("do 7", "do it"))
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path, "table")
    assert message in capsys.readouterr().err


def test_the_table_of_a_real_run_has_its_mean_reward(tiny, rewarded, tmp_path):
    """Trained, sampled, rewarded and evaluated by the project's own scripts; its table's reward by another
    way.
    """
    out = tmp_path / "runs" / "qrpo"
    call("train.py", f"--model={tiny}", f"--data={rewarded}", f"--eval_data={rewarded}", f"--out={out}",
        "--batch_size=40", "--learning_rate=1e-3")
    call("generate_refs.py", f"--model={out}", f"--data={rewarded}", f"--out={out / 'test/sampled'}",
        "--num_refs=3", "--field=samples", "--max_new_tokens=20", "--seed=1")
    call("score.py", f"--data={out / 'test/sampled'}", f"--out={out / 'test/rewarded'}",
        f"--reward={rewarded.parent / 'reward.py'}:letters")
    call("evaluate.py", f"--model={out}", f"--ref_model={tiny}", f"--data={out / 'test/rewarded'}",
        f"--out={out}")
    for what in ("table", "figure6"):
        command(tmp_path, what)
    with pytest.raises(SystemExit, match="2"):  # this model never stops: all its references have one length
        command(tmp_path, "figure4")
    table = sorted(read_rows(out / "test/rewarded"), key=lambda row: row["id"])
    report = protocol.halves(["None"] * len(table))[1]
    reward = np.array([row["sample_rewards"] for row in table])[report]
    base, qrpo = read_csv(tmp_path / "out/table.csv")
    assert float(qrpo["reward"]) == pytest.approx(reward.mean())
    assert float(qrpo["reward_std"]) == pytest.approx(reward.mean(0).std(ddof=1))
    assert float(qrpo["reward_se_prompts"]) == pytest.approx(reward.mean(1).std(ddof=1) / math.sqrt(15))
    assert float(base["reward"]) == pytest.approx(np.mean([table[i]["ref_rewards"] for i in report]))
    assert [p["step"] for p in read_csv(tmp_path / "out/figure6.csv")] == ["0", "3", "0", "3"]


def test_two_methods_are_compared_prompt_by_prompt_on_the_seeds_that_both_have(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rewards = {}  # (loss, seed): (prompts, samples)
    for loss, seeds in {"qrpo": (0, 1, 2), "dpo": (1, 2), "simpo": (3,)}.items():
        for seed in seeds:
            rewards[loss, seed] = rng.choice([0.0, 0.5, 1.0], (8, 2))
            write_run(tmp_path / f"runs/{loss}{seed}", seed, lambda i, k: rewards[loss, seed][i, k],
                      loss=loss, model="base")
    printed = command(tmp_path, "compare", "--method=qrpo", "--by=loss")
    assert "simpo: left out, it has no training seed in common with qrpo" in printed
    base, dpo = read_csv(tmp_path / "out/compare.csv")
    assert (base["minus"], base["seeds"]) == ("reference model", "1")  # its one evaluation has seed 0
    assert (dpo["minus"], dpo["seeds"]) == ("dpo", "2")
    report = protocol.halves(["easy", "hard"] * 4)[1]
    change = np.array([(rewards["qrpo", s] - rewards["dpo", s])[report].mean(1) for s in (1, 2)])  # (2, 4)
    assert float(dpo["reward"]) == pytest.approx(change.mean())
    assert float(dpo["reward_se_prompts"]) == pytest.approx(change.mean(0).std(ddof=1) / 2)
    assert float(dpo["reward_se_seeds"]) == pytest.approx(change.mean(1).std(ddof=1) / math.sqrt(2))
    assert eval(dpo["reward_of_seeds"]) == pytest.approx(change.mean(1).tolist())
    assert "| qrpo minus | seeds | reward |" in printed and f"| dpo | 2 | {change.mean():.4f} ± " in printed
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path, "compare", "--method=ppo", "--by=loss")
    assert "--method=ppo: must be one of reference model, dpo, simpo, qrpo" in capsys.readouterr().err


# ---- what is unknown, shared or missing ----

def test_unknown_rewards_flatter_no_method(tmp_path, capsys):
    """All failures are unknown, so the mean of the known rewards is 1: the table says what it may be."""
    write_run(tmp_path / "runs/a", 0, lambda i, k: 0.75)
    write_run(tmp_path / "runs/b", 0, lambda i, k: None if i % 2 else 1.0, loss="dpo")
    write_run(tmp_path / "runs/c", 0, lambda i, k: None if i % 2 else 1.0, loss="simpo")
    write_run(tmp_path / "runs/d", 0, lambda i, k: 0.75, loss="simpo", beta=0.3)
    printed = command(tmp_path, "table", "--select=reward")
    assert "simpo refs: left out, unknown rewards decide which of its settings is best" in printed
    table = {m["method"]: m for m in read_csv(tmp_path / "out/table.csv")}
    dpo = table["dpo refs"]
    report = protocol.halves(["easy", "hard"] * 4)[1]
    unknown = 2 * sum(i % 2 for i in report)
    assert (dpo["reward"], dpo["unknown"], dpo["rewards"]) == ("1.0", str(unknown), "8")
    assert (float(dpo["reward_low"]), float(dpo["reward_high"])) == (1 - unknown / 8, 1)
    markdown = (tmp_path / "out/table.md").read_text()
    assert f"| {unknown} of 8: {1 - unknown / 8:.4f} to 1.0000 |" in markdown
    assert "**1.0000**" not in markdown and "**dpo" not in markdown and "**qrpo" not in markdown
    assert f"dpo, {tmp_path}/runs/b: unknown rewards {unknown} of 8" in command(tmp_path, "frontier")


def test_a_few_unknown_rewards_that_change_nothing_change_nothing(tmp_path):
    write_run(tmp_path / "runs/a", 0, lambda i, k: None if (i, k) == (0, 0) else 0.9)
    write_run(tmp_path / "runs/b", 0, lambda i, k: 0.2, beta=0.3)
    command(tmp_path, "table")
    assert read_csv(tmp_path / "out/table.csv")[1]["selected"] == "beta 0.1"


def made_with(folder, **made_by):
    """Rows of a run that say how they were made."""
    part = folder / "test/rewarded/part-00000.jsonl"
    write_rows(part, [row | {"made_by": made_by} for row in read_rows(part)])


def test_runs_with_different_rewards_are_refused(tmp_path, capsys):
    """Of two seeds, they would be averaged. The same reward may be in a file elsewhere."""
    for seed in range(3):
        write_run(tmp_path / f"runs/{seed}", seed, lambda i, k: 0.6)
        reward = {"reward": f"{seed}/rewards.py:f", "fingerprint": "a" if seed < 2 else "b"}
        made_with(tmp_path / f"runs/{seed}", sample_rewards=reward)
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path, "table")
    assert f"{tmp_path}/runs/2/test/rewarded: its rewards were made by another" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "runs/2")
    command(tmp_path, "table")
    assert read_csv(tmp_path / "out/table.csv")[1]["seeds"] == "2"


def test_that_models_were_sampled_in_different_ways_is_said(tmp_path):
    for name, temperature in (("a", 0.6), ("b", 1)):
        write_run(tmp_path / f"runs/{name}", 0, lambda i, k: 0.6, loss=name)
        made_with(tmp_path / f"runs/{name}", samples={"temperature": temperature, "max_new_tokens": 64})
    printed = command(tmp_path, "table")
    assert f"  0.6 in {tmp_path}/runs/a/test/rewarded\n  1 in {tmp_path}/runs/b/test/rewarded\n" in printed
    assert "max_new_tokens" not in printed


def test_samples_at_another_temperature_have_no_objective_and_the_rest_is_drawn(tmp_path, capsys):
    write_run(tmp_path / "runs/a", 0, lambda i, k: 0.6)
    write_run(tmp_path / "runs/b", 0, lambda i, k: 0.7, loss="dpo")
    made_with(tmp_path / "runs/a", samples={"temperature": 0.6, "top_p": 0.9})
    for what in (["frontier"], ["table", "--select=objective"]):
        assert "samples were not drawn at temperature 1" in command(tmp_path, *what)
    assert [point["method"] for point in read_csv(tmp_path / "out/frontier.csv")] == ["dpo"]
    assert [m["method"] for m in read_csv(tmp_path / "out/table.csv")] == ["reference model", "dpo refs"]
    made_with(tmp_path / "runs/b", samples={"temperature": 0.6, "top_p": 0.9})
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path, "frontier")
    assert "no setting has a KL" in capsys.readouterr().err


def test_references_that_training_seeds_share_count_once(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"runs/{seed}", seed, lambda i, k: 0.6, model="base")
    command(tmp_path, "table")
    assert read_csv(tmp_path / "out/table.csv")[0]["seeds"] == "1"
    models = protocol.load([tmp_path / "runs"])
    assert (models.loss == "base").sum() == 1
    part = tmp_path / "runs/2/test/rewarded/part-00000.jsonl"  # seed 2 has samples of its own
    table = read_rows(part)
    table[0]["ref_completions"][0]["text"] = "y"
    write_rows(part, table)
    assert (protocol.load([tmp_path / "runs"]).loss == "base").sum() == 2


def test_settings_without_a_common_seed_are_left_out_for_that_reason(tmp_path):
    write_run(tmp_path / "runs/a", 0, lambda i, k: 0.6)
    write_run(tmp_path / "runs/b", 1, lambda i, k: 0.6, beta=0.3)
    write_run(tmp_path / "runs/c", 0, lambda i, k: 0.6, loss="dpo")
    printed = command(tmp_path, "table")
    assert "qrpo paper refs: left out, its settings have no training seed in common" in printed


def test_models_whose_paths_end_alike_are_two(tmp_path):
    """But folders that differ in the seed are one."""
    for seed in 0, 1:
        write_run(tmp_path / f"runs/x{seed}", seed, lambda i, k: 0.2, model=f"x/seed{seed}/model")
        write_run(tmp_path / f"runs/y{seed}", seed, lambda i, k: 0.8, model=f"y/seed{seed}/model")
    command(tmp_path, "table", "--by=model")
    table = [(m["method"], float(m["reward"]), m["seeds"]) for m in read_csv(tmp_path / "out/table.csv")]
    assert sorted(table)[2:] == [("x/seed*/model", pytest.approx(0.2), "2"),
                                 ("y/seed*/model", pytest.approx(0.8), "2")]


def test_a_frontier_of_constant_rewards_has_width(tmp_path):
    write_run(tmp_path / "runs/a", 0, lambda i, k: 0.5)
    part = tmp_path / "runs/a/test/rewarded/part-00000.jsonl"
    write_rows(part, [row | {"ref_rewards": [0.5, 0.5]} for row in read_rows(part)])
    with mock.patch.object(results, "save", lambda figure, *_: widths.append(figure.axes[0].get_xlim()[1])):
        widths = []
        command(tmp_path, "frontier")
    assert widths[0] > 1


def plain_table(runs, beta_of, report):
    """The mean reward, gain, full marks, length and counts of each method, by loops over plain lists."""
    out = {}
    for name, of_method in itertools.groupby(sorted(runs, key=beta_of), beta_of):
        per_seed, unknown, low = [], 0, []
        for _, rows_of_run in of_method:
            sums = {"reward": [[], []], "gain": [[], []], "full_marks": [[], []], "length": [[], []]}
            for i in report:
                row = rows_of_run[i]
                mean = sum(row["ref_rewards"]) / len(row["ref_rewards"])
                for k, reward in enumerate(row["sample_rewards"]):
                    sums["length"][k].append(len(row["samples"][k]["token_ids"]))
                    low.append(0 if reward is None else reward)
                    if reward is None:
                        unknown += 1
                        continue
                    sums["reward"][k].append(reward)
                    sums["gain"][k].append(reward - mean)
                    sums["full_marks"][k].append(reward >= 1)
            per_seed.append({n: sum(sum(v) / len(v) for v in both) / 2 for n, both in sums.items()})
        means = {n: sum(s[n] for s in per_seed) / len(per_seed) for n in per_seed[0]}
        out[name] = means | {"unknown": unknown, "seeds": len(per_seed), "reward_low": sum(low) / len(low)}
    return out


@pytest.mark.parametrize("seed", range(2))
def test_the_table_is_that_of_a_plain_loop(tmp_path, seed):
    """With seeds that are missing, unknown rewards, ties, and references that seeds share."""
    rng = np.random.default_rng(seed)
    runs = []
    for beta, train_seed in itertools.product((0.1, 0.2, 0.3), range(3)):
        if rng.random() < 0.3 and train_seed:
            continue
        folder = tmp_path / f"runs/{beta}-{train_seed}"
        rewards = rng.choice([None, 0.0, 0.5, 1.0], size=(8, 2), p=[0.15, 0.35, 0.25, 0.25])
        write_run(folder, train_seed, lambda i, k: rewards[i, k], beta=beta, model="base")
        part = folder / "test/rewarded/part-00000.jsonl"
        table = read_rows(part)
        shared = np.random.default_rng(train_seed // 2)  # seeds 0 and 1 have the same references
        for row in table:
            row["ref_rewards"] = shared.choice([0.0, 0.5, 1.0], size=2).tolist()
            row["ref_completions"][0]["text"] = f"{train_seed // 2}"
        write_rows(part, table)
        runs.append((beta, table))
    command(tmp_path, "table", "--by=beta")
    found = {m["method"]: m for m in read_csv(tmp_path / "out/table.csv")}
    report = protocol.halves(["easy", "hard"] * 4)[1]
    expected = plain_table(runs, lambda run: run[0], report)
    for beta, values in expected.items():
        for name, value in values.items():
            assert float(found[f"beta {beta}"][name]) == pytest.approx(value), (beta, name)
    pools = {str(table[0]["ref_completions"][0]["text"]): table for _, table in runs}
    means = [sum(sum(t[i]["ref_rewards"]) / 2 for i in report) / len(report) for t in pools.values()]
    assert float(found["reference model"]["reward"]) == pytest.approx(sum(means) / len(means))
