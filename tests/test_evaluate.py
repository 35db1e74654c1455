"""evaluate.py: gain, objective and optimum against numbers worked out by hand, what it says of odd data, and
every picture of a run.
"""
import inspect
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import call, read_rows, refused, write_rows


def evaluate(tiny, folder, table, *flags):
    """The results of rows in which the same model is policy and reference model."""
    data = write_rows(folder / "data.jsonl", table)
    call("evaluate.py", f"--model={tiny}", f"--ref_model={tiny}", f"--data={data}", f"--out={folder}", *flags)
    return json.loads((folder / "results.json").read_text())


def as_policy(table):
    """The same rows with the references as samples, too."""
    for row in table:
        row["samples"] = [dict(completion) for completion in row["ref_completions"]]
        row["sample_rewards"] = list(row["ref_rewards"])
        row["made_by"] |= {"samples": row["made_by"]["ref_completions"]}
    return table


def soft_quantile(reward, others, beta):
    """beta log of the mean of e^{u/beta} over the reward's cell among the others."""
    lo = sum(r < reward for r in others) / (len(others) + 1)
    hi = (sum(r <= reward for r in others) + 1) / (len(others) + 1)
    return beta * math.log(beta * (math.exp(hi / beta) - math.exp(lo / beta)) / (hi - lo))


def test_the_objective_of_the_reference_model_itself_and_its_bound(tiny, rewarded, tmp_path):
    table = read_rows(rewarded)
    for row in table:  # as if the policy were the reference model; one reward is unknown
        row["samples"], row["sample_rewards"] = row["ref_completions"][:3], [*row["ref_rewards"][:2], None]
    results = evaluate(tiny, tmp_path, table, "--beta=0.2")
    assert results["KL to reference, nats"]["policy"] == [0.0, 0.0]
    assert "30 of the policy's rewards are unknown and left out" in results["odd"]
    assert results["mean reward"]["policy"][0] == pytest.approx(
        np.mean([row["sample_rewards"][:2] for row in table]))
    best = 0.2 * math.log(0.2 * math.expm1(5))
    assert results["objective"]["optimum"] == pytest.approx([best, 0], abs=1e-9)

    policy, reference = [], []
    for row in table:
        refs = row["ref_rewards"]
        policy.append(np.mean([soft_quantile(r, refs, 0.2) for r in row["sample_rewards"][:2]]))
        others = [refs[:k] + refs[k + 1:] for k in range(4)]
        reference.append(np.mean([soft_quantile(r, other, 0.2) for r, other in zip(refs, others)]))
    mean, error = results["objective"]["policy"]
    assert abs(mean - np.mean(policy)) < 1e-5 and abs(error - np.std(policy, ddof=1) / 30 ** 0.5) < 1e-5
    assert abs(results["quantile reward"]["reference"][0] - np.mean(reference)) < 1e-5
    saved = np.load(tmp_path / "samples.npz")
    assert len(saved["log_ratio"]) == 60 and (saved["lo"] < saved["hi"]).all()


# all references of a prompt tie, many, or hardly any
@pytest.mark.parametrize("spread, transform", [(1, "identity"), (2, "identity"), (3, "log"), (100, "log")])
def test_the_optimum_is_the_reference_pool_tilted_exactly(tiny, rewarded, tmp_path, spread, transform):
    beta = 0.3
    table = as_policy(read_rows(rewarded)[:9])
    draw = np.random.default_rng(0)
    rewards, kls, lengths = [], [], []
    for row in table:
        refs = draw.integers(spread, size=4).astype(float)
        row["ref_rewards"] = refs.tolist()
        weights = []
        for k, reward in enumerate(refs):  # e^{f(u)/beta}, on average over the cell, by a plain sum
            others = np.delete(refs, k)
            lo, hi = (others < reward).sum() / 4, ((others <= reward).sum() + 1) / 4
            u = lo + (hi - lo) * (np.arange(10_000) + 0.5) / 10_000
            weights.append(np.exp((u if transform == "identity" else np.log(u)) / beta).mean())
        weights = np.array(weights) / np.sum(weights)
        rewards.append(weights @ refs)
        kls.append(weights @ np.log(4 * weights))
        lengths.append(weights @ [len(completion["token_ids"]) for completion in row["ref_completions"]])
    results = evaluate(tiny, tmp_path, table, f"--beta={beta}", f"--transform={transform}")
    assert results["mean reward"]["optimum"][0] == pytest.approx(np.mean(rewards), rel=1e-4)
    assert results["KL to reference, nats"]["optimum"][0] == pytest.approx(np.mean(kls), rel=1e-3, abs=1e-9)
    assert results["length, tokens"]["optimum"][0] == pytest.approx(np.mean(lengths), rel=1e-4)


def test_the_optimum_is_known_where_its_weights_underflow(tiny, rewarded, tmp_path):
    """At the lowest beta of the paper."""
    beta = 3e-4
    table = as_policy(read_rows(rewarded)[:3])
    for row in table:
        row["ref_rewards"] = row["sample_rewards"] = [0.0, 1.0, 2.0, 3.0]
    results = evaluate(tiny, tmp_path, table, f"--beta={beta}")
    assert results["KL to reference, nats"]["optimum"] == pytest.approx([math.log(4), 0])  # always the best
    assert results["objective"]["optimum"] == pytest.approx([1 + beta * math.log(beta), 0])


def test_it_prints_the_prompts_with_the_largest_and_the_smallest_gain(tiny, rewarded, tmp_path, capsys):
    table = as_policy(read_rows(rewarded)[:5])
    for i, gain in enumerate([0.125, 0.5, None, -0.25, 0]):
        table[i]["ref_rewards"] = [0.5] * 4
        table[i]["sample_rewards"] = [None if gain is None else 0.5 + gain] * 4
    table[1]["samples"] *= 2  # more than the page shows
    table[1]["sample_rewards"] = [None, 0.75, 1.25, 1, None, None, 1, 1]
    evaluate(tiny, tmp_path, table)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(f"row {table[1]['id']}: mean reward 0.5 -> 1")
    assert lines[start + 1] == f"prompt     {table[1]['prompt']!r}"
    assert lines[start + 4] == f"policy     reward 1.25: {table[1]['samples'][2]['text']!r}"
    assert lines[start + 5] == f"policy     reward 0.75: {table[1]['samples'][1]['text']!r}"
    assert lines[start + 7] == f"row {table[3]['id']}: mean reward 0.5 -> 0.25"
    assert lines[start + 9] == f"reference  reward 0.5: {table[3]['ref_completions'][0]['text']!r}"


def test_a_dropped_completion_gives_its_log_ratio_to_no_other(tiny, rewarded, tmp_path):
    table = as_policy(read_rows(rewarded)[:2])
    end = json.loads((tiny / "config.json").read_text())["eos_token_id"]
    table[0]["samples"][0]["token_ids"].insert(3, end)  # its text leaves out special tokens
    table[1]["sample_rewards"][0] = None
    odd = evaluate(tiny, tmp_path, table)["odd"]
    page = (tmp_path / "report.html").read_text()
    assert page.count(", log-ratio 0") == len(table[1]["samples"]) - 1
    assert "1 of the policy's rewards are unknown and left out" in odd
    assert "1 of the policy's completions have an end token before their end and are left out" in odd


def test_a_model_in_a_folder_named_checkpoints_is_a_checkpoint_only_by_its_own_name(tiny, tmp_path):
    """Its run is the one that wrote it, and not one that stands two folders above it."""
    import evaluate
    run, elsewhere = tmp_path / "checkpoints" / "first", tmp_path / "models" / "other"
    config = {"has_targets": True, "beta": 0.5, "transform": "log", "steps": 9}
    for folder, beta in ((run, 0.5), (run / "checkpoints" / "step_000004", None), (tmp_path, 0.7)):
        folder.mkdir(parents=True, exist_ok=True)
        if beta:
            (folder / "run.json").write_text(json.dumps({"config": config | {"beta": beta}}))
    for model, beta, steps in ((run, 0.5, 9), (run / "checkpoints" / "step_000004", 0.5, 4),
                               (elsewhere, None, None)):
        args = SimpleNamespace(model=str(model), beta=None, transform=None)
        assert evaluate.load_run(args)["config"].get("steps") == steps and args.beta == beta


def test_it_says_which_completions_another_model_sampled(tiny, rewarded, tmp_path):
    table = as_policy(read_rows(rewarded)[:2])
    for row in table:
        row["made_by"]["samples"] = row["made_by"]["samples"] | {"files": "of another"}
    odd = evaluate(tiny, tmp_path, table)["odd"]
    assert [line.partition(",")[0] for line in odd if "another model" in line] == [
        f"the policy's completions were sampled by another model than {tiny}"]


def test_where_all_rewards_tie_it_says_that_there_is_nothing_to_gain(tiny, rewarded, tmp_path, capsys):
    table = as_policy(read_rows(rewarded))
    for row in table:
        row["ref_rewards"] = row["sample_rewards"] = [0.0] * 4
    results = evaluate(tiny, tmp_path, table, "--beta=0.1")
    assert results["objective"]["reference"][0] == pytest.approx(results["objective"]["optimum"][0])
    assert results["mean reward"]["optimum"] == [0, 0]
    printed = capsys.readouterr().out
    assert "reference model 0.7697, policy 0.7697, best possible" in printed and "of the way" not in printed
    assert "100% of the reference's rewards equal all others" in printed.splitlines()[-1]


def test_the_last_line_says_what_was_made_and_what_is_odd(tiny, rewarded, tmp_path, capsys):
    table = as_policy(read_rows(rewarded))
    for row in table:
        row["made_by"]["ref_completions"] = row["made_by"]["ref_completions"] | {"dtype": "bfloat16"}
        row["made_by"]["samples"] = row["made_by"]["samples"] | {"dtype": "float32"}
        for completion in row["samples"]:
            completion["finish_reason"] = "length"
        for completion in row["ref_completions"]:
            completion["finish_reason"] = "stop"
    table[0]["sample_rewards"][:2] = [None, None]
    table[1]["ref_rewards"][0] = None
    results = evaluate(tiny, tmp_path, table, "--beta=0.1")
    assert results["ran out of tokens"]["policy"][0] == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{tmp_path}: report.html") and last.split("; ")[1:] == results["odd"]
    for odd in ("sampled with another dtype: reference bfloat16, policy float32",
                "1 of the reference's rewards", "2 of the policy's rewards",
                "100% of the policy's completions ran out of tokens"):
        assert odd in last
    assert "reference's completions ran out" not in last


def test_a_prompt_without_a_known_reference_reward_has_no_quantile(tiny, rewarded, tmp_path):
    table = as_policy(read_rows(rewarded)[:6])
    whole = evaluate(tiny, tmp_path, table[1:], "--beta=0.1")
    table[0]["ref_rewards"] = [None] * 4
    results = evaluate(tiny, tmp_path, table, "--beta=0.1")
    for name in ("quantile reward", "objective"):
        assert results[name]["policy"] == pytest.approx(whole[name]["policy"])
    assert results["mean reward"]["policy"] != whole["mean reward"]["policy"]


def test_curves_have_a_panel_for_what_belongs_together(tmp_path, monkeypatch):
    import evaluate
    figures = []
    monkeypatch.setattr(evaluate, "save", lambda figure, path: figures.append(figure))
    metrics = ["loss", "log_ratio", "log_ratio_better", "log_ratio_worse", "grad_norm"]
    log = [{"step": step} | {name: step / 7 for name in metrics} for step in (1, 2)]
    log += [{"step": step} | {f"eval_{name}": step / 5 for name in metrics[:-1]} for step in (0, 2)]
    write_rows(tmp_path / "metrics.jsonl", log)
    evaluate.draw_curves(tmp_path)
    panels = [[line.get_label() for line in axis.lines] for axis in figures[0].axes]
    assert panels == [["loss", "eval_loss"], ["log_ratio", "eval_log_ratio"],
                      ["log_ratio_better", "eval_log_ratio_better",
                       "log_ratio_worse", "eval_log_ratio_worse"],
                      ["grad_norm"]]
    for row in log:  # a run in which no completion is better than the mean of its prompt
        for name in ("log_ratio_better", "eval_log_ratio_better"):
            row.pop(name, None)
    write_rows(tmp_path / "metrics.jsonl", log)
    evaluate.draw_curves(tmp_path)
    labels = [line.get_label() for line in figures[1].axes[2].lines]
    assert labels == ["log_ratio_worse", "eval_log_ratio_worse"]


@pytest.mark.parametrize("field, made_by", [
    ("samples", {"temperature": 0.7, "own_distribution": False}), ("ref_completions", {"top_p": 0.9}),
    ("samples", {"own_distribution": False})])
def test_what_was_not_sampled_from_the_model_itself_is_said(tiny, rewarded, tmp_path, capsys, field, made_by):
    table = as_policy(read_rows(rewarded)[:5])
    for row in table:
        row["made_by"][field] = {"temperature": 1.0, "top_p": 1.0} | made_by
    results = evaluate(tiny, tmp_path, table, "--beta=0.1")
    model = {"samples": "policy", "ref_completions": "reference"}[field]
    odd = [text for text in results["odd"] if text.startswith(f"the {model} was sampled at temperature ")]
    assert len(odd) == 1 and odd[0] in capsys.readouterr().out
    for value in made_by.values():
        assert str(value) in odd[0] or value is False
    assert ("by another rule" in odd[0]) == (made_by == {"own_distribution": False})
    assert ("objective" in results) == ("KL to reference, nats" in results) == (model == "reference")


@pytest.mark.parametrize("own, flags", [
    (True, ()), (False, ("--top_p=0.999",)), (False, ("--temperature=0",)), (False, ("--temperature=1.1",)),
])
def test_generate_refs_says_whether_it_sampled_from_the_model_itself(tiny, tmp_path, own, flags):
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    call("generate_refs.py", f"--model={tiny}", f"--data={data}", f"--out={tmp_path / 'out'}", "--num_refs=1",
         "--max_new_tokens=4", *flags)
    made_by = read_rows(tmp_path / "out")[0]["made_by"]["ref_completions"]
    assert made_by["own_distribution"] == own and made_by["dtype"] == "float32"


@pytest.mark.parametrize("dtype", ("bfloat16", "float32", None))
def test_a_policy_is_sampled_in_the_dtype_of_its_references(tiny, rewarded, tmp_path, dtype):
    row = read_rows(rewarded)[0]
    row["made_by"]["ref_completions"]["dtype"] = dtype
    data = write_rows(tmp_path / "data.jsonl", [row])
    call("generate_refs.py", f"--model={tiny}", f"--data={data}", f"--out={tmp_path / 'out'}", "--num_refs=1",
         "--max_new_tokens=2", "--field=samples")
    assert read_rows(tmp_path / "out")[0]["made_by"]["samples"]["dtype"] == (dtype or "float32")


def test_a_sampling_rule_that_somebody_adds_is_seen():
    import generate_refs
    code = inspect.getsource(generate_refs)
    rule = "    return probs.where(probs >= 0.05 * probs.max(-1, keepdim=True).values, 0)\n"
    changed = code.replace("    return probs\n", rule, 1)  # min-p, without a word elsewhere
    for text, own in ((code, True), (changed, False)):
        names = {"__name__": "generate_refs"}
        exec(compile(text, "generate_refs.py", "exec"), names)
        assert names["own_distribution"](SimpleNamespace(temperature=1, top_p=1)) == own


def test_columns_of_large_numbers_stay_apart(tiny, rewarded, tmp_path, capsys):
    table = as_policy(read_rows(rewarded)[:9])
    for i, row in enumerate(table):
        row["ref_rewards"] = [1e12 * i, 2e12, -3e12, 4e12]
    evaluate(tiny, tmp_path, table, "--beta=0.1")
    lines = capsys.readouterr().out.splitlines()
    names = ["reference", "policy", "difference", "optimum"]
    start = next(i for i, line in enumerate(lines) if line.split() == names)
    for line in lines[start + 1:start + 6]:
        assert len(re.findall(r"(?<= )-?[\d.]+ ± [\d.]+(?= |$)", line)) == 4, line


def test_error_bars_stay_within_the_rewards(tmp_path, monkeypatch):
    import evaluate
    figures = []
    monkeypatch.setattr(evaluate, "save", lambda figure, path: figures.append(figure))
    rewards = {"reference": np.array([0.0] * 9 + [1.0]), "policy": np.array([1.0] * 9 + [0.0])}
    evaluate.draw_results(SimpleNamespace(out=tmp_path), rewards)
    ends = [bar.get_segments()[0][:, 1] for bar in figures[0].axes[0].collections]
    assert len(ends) == 2 and np.min(ends) == pytest.approx(0) and np.max(ends) == pytest.approx(1)


def test_the_density_of_quantiles_leaves_out_completions_without_one(tmp_path, monkeypatch):
    import evaluate
    figures = []
    monkeypatch.setattr(evaluate, "save", lambda figure, path: figures.append(figure))
    results = {"beta": 0.1, "transform": "identity", "objective": {"reference": [0, 0], "optimum": [1, 0]}}
    (tmp_path / "results.json").write_text(json.dumps(results | {"beta": None}))
    reference = SimpleNamespace(lo=np.array([0]), hi=np.array([1]), weight=np.ones(1))
    policy = SimpleNamespace(lo=np.array([0.5, 0]), hi=np.array([1, 1]), R=np.array([0.75, math.nan]))
    data = {"reference": reference, "policy": policy}
    evaluate.draw_optimum(SimpleNamespace(out=tmp_path, beta=0.1), results, data)
    stairs, _ = figures[0].axes[0].patches
    np.testing.assert_allclose(stairs.get_data().values, [0] * 10 + [2] * 10, atol=1e-9)


def test_the_picture_of_the_objective_has_only_checkpoints_of_this_beta_and_transform(tmp_path, monkeypatch):
    import evaluate
    figures = []
    monkeypatch.setattr(evaluate, "save", lambda figure, path: figures.append(figure))
    settings = {"beta": 0.1, "transform": "identity"}
    others = [{"beta": 0.2}, {"transform": "log"}, {}, {"beta": None}]
    for step, other in enumerate(others, 1):
        point = settings | other | {"step": step, "objective": {"policy": [step / 10, None]}}
        if point["beta"] is None:
            del point["objective"]
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(point))
    objective = {"policy": [0.9, 0.1], "reference": [0, 0], "optimum": [1, 0]}
    results = settings | {"step": 9, "objective": objective}
    (tmp_path / "results.json").write_text(json.dumps(results))
    half = SimpleNamespace(lo=np.array([0, 0.5]), hi=np.array([0.5, 1]), weight=np.ones(2), R=np.ones(2))
    data = {"reference": half, "policy": half}
    evaluate.draw_optimum(SimpleNamespace(out=tmp_path, beta=0.1), results, data)
    line = figures[0].axes[1].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [(0, 0), (3, 0.3), (9, 0.9)])


def test_one_prompt_has_no_standard_error(tiny, rewarded, tmp_path, capsys):
    row = as_policy(read_rows(rewarded)[:1])[0]
    results = evaluate(tiny, tmp_path, [row], "--beta=0.2")
    assert results["mean reward"]["policy"] == [pytest.approx(np.mean(row["ref_rewards"])), None]
    assert "nan" not in capsys.readouterr().out


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
    assert results["beta"] == 0.1  # the run's own
    assert results["objective"]["policy"][0] < results["objective"]["optimum"][0]
    assert results["quantile reward"]["reference"][0] < results["quantile reward"]["policy"][0]
    assert results["KL to reference, nats"]["policy"][0] > 0
    printed = capsys.readouterr().out
    assert "report.html for a browser, results.json, samples.npz, 3 pictures" in printed
    for picture in ("curves", "results", "optimum"):
        assert (run / f"{picture}.png").stat().st_size > 10_000
    assert json.loads((checkpoint / "results.json").read_text())["step"] == 40


def test_a_second_opinion_is_shown_beside_the_reward(tiny, trained, rewarded, tmp_path, capsys):
    """The reward liked letters; a judge that dislikes them sees the policy lose what it gained."""
    judge = tmp_path / "judge.py"
    judge.write_text((rewarded.parent / "reward.py").read_text().replace("[sum(", "[5 - sum("))
    few = write_rows(tmp_path / "few.jsonl", read_rows(trained / "scored")[:12])
    call("score.py", f"--data={few}", f"--out={tmp_path / 'judged'}", f"--reward={judge}:letters",
         "--name=judge")
    evaluation = [f"--model={trained / 'run'}", f"--ref_model={tiny}", f"--out={tmp_path / 'out'}"]
    call("evaluate.py", *evaluation, f"--data={tmp_path / 'judged'}")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    first, second = results["mean reward"], results["mean reward by judge"]
    assert first["difference"][0] > 0
    assert second["difference"] == pytest.approx([-first["difference"][0], first["difference"][1]])
    assert second["policy"][0] == pytest.approx(5 - first["policy"][0])
    assert "mean reward by judge" in capsys.readouterr().out

    table = read_rows(tmp_path / "judged")
    assert [row["sample_rewards"] for row in table] == [row["sample_rewards"] for row in read_rows(few)]
    table[0]["ref_rewards_judge"][0] = None
    del table[3]["sample_rewards_judge"]
    data = write_rows(tmp_path / "gap.jsonl", table)
    refused(capsys, ["gap.jsonl:4", "sample_rewards_judge"], "evaluate.py", *evaluation, f"--data={data}")
    for change in ({"sample_rewards_judge": ["high"] * 4}, {"sample_rewards": ["high"] * 4},
                   {"samples": ["text"] * 4}, {"ref_completions": [{"text": "a"}] * 16}):
        write_rows(data, [table[0] | change])
        refused(capsys, ["gap.jsonl:1: "], "evaluate.py", *evaluation, f"--data={data}")
    call("evaluate.py", *evaluation, f"--data={write_rows(data, [table[0], *table[4:]])}")
    rest = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not [odd for odd in rest["odd"] if "unknown" in odd]  # the judge's are not those trained on
    known = [table[0]["ref_rewards_judge"][1:], *(row["ref_rewards_judge"] for row in table[4:])]
    assert rest["mean reward by judge"]["reference"][0] == pytest.approx(np.mean(list(map(np.mean, known))))


def test_references_may_be_texts_without_token_ids(tiny, loaded, rewarded, tmp_path):
    """They are tokenised, and end in an end token."""
    table = as_policy(read_rows(rewarded))
    for row in table:
        row["made_by"]["ref_completions"] = row["made_by"]["ref_completions"] | {"from_text": True}
        row["ref_completions"] = [{"text": completion["text"]} for completion in row["ref_completions"]]
    results = evaluate(tiny, tmp_path, table, "--beta=0.1")
    lengths = [len(loaded[0](c["text"]).input_ids) + 1 for row in table for c in row["ref_completions"]]
    assert results["length, tokens"]["reference"][0] == pytest.approx(np.mean(lengths))


def test_without_a_terminal_progress_is_a_line_a_minute(capsys):
    import rows
    bar = rows.progress(total=630, desc="work")
    now = bar.start_t
    bar._time = lambda: now  # a clock of its own
    for second in range(630):
        now += 1
        bar.set_postfix_str(f"at {second}", refresh=False)
        bar.update()
    bar.close()
    for _ in rows.progress(range(3)):  # too short to say anything, also beside an error
        with pytest.raises(SystemExit):
            rows.fail("wrong")
    lines = capsys.readouterr().err.replace("\r", "").split("\n")
    work = [f"work: {n} of 630" for n in range(60, 601, 60)]
    assert [line.split(",")[0] for line in lines] == [*work, *["error: wrong"] * 3, ""]
