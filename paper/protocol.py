"""Evaluation by the paper's protocol (arXiv 2507.08068): runs on disk, the two halves of the test prompts, metrics with
their errors, and the rule that selects a setting.

A run is train.py's folder with run.json, and evaluate.py's results.json once it is evaluated; rows with `samples` and
`sample_rewards` beside `ref_completions` and `ref_rewards` lie in its test/rewarded. Its checkpoints, where they were
evaluated, have the same. The reference model's own samples lie in base/rewarded beside the run, where it was sampled as
its policies are; else its reference completions stand for it. Runs that differ only in their seed are one setting.
results.py makes tables of this:

    python paper/results.py table --runs=out/mini
"""
import math
import sys
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rows  # noqa: E402
import runs  # noqa: E402

# where nothing is known the mean is NaN, and that is said in words
warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN|Degrees of freedom", RuntimeWarning)
METRICS = "reward", "gain", "lc_reward", "length", "win_rate"


# ---- runs on disk ----

def evaluation(folder, tokenizer=None):
    """Rewarded samples as arrays: ids, difficulty (prompts,); reward, length (prompts, samples); and, of the reference
    pool, ref_reward, ref_length (prompts, references). Sample k is generation seed k; unknown rewards are NaN.
    """
    table = rows.read(folder, require=("samples", "sample_rewards", "ref_completions", "ref_rewards"))

    def length(completion):
        return len(tokenizer(completion["text"]).input_ids if tokenizer else completion["token_ids"])

    def matrix(field, of):
        lists = [[of(value) for value in row[field]] for row in table]
        if len({len(values) for values in lists}) > 1:
            rows.fail(f"{folder}: its rows have different numbers of {field}; sample the same number for every prompt")
        return np.array(lists, float)

    def number(value):
        return math.nan if value is None else value

    return {"folder": Path(folder), "ids": [str(row["id"]) for row in table],
            "prompts": rows.fingerprint([row["prompt"] for row in table]), "field": "samples",
            "difficulty": [str(row.get("difficulty")) for row in table],
            "reward": matrix("sample_rewards", number), "length": matrix("samples", length),
            "ref_reward": matrix("ref_rewards", number), "ref_length": matrix("ref_completions", length)}


def load(folders, tokenizer=None):
    """Every setting and checkpoint, as {config, step, evaluations: {seed: evaluation}}; first the reference models."""
    for top in folders:
        if not Path(top).is_dir():
            rows.fail(f"{top}: no such folder; --runs names folders of runs")
    records = [(path.parent, rows.load_json(path)) for top in folders for path in sorted(Path(top).rglob("run.json"))]
    records = [(folder, record) for folder, record in records if "config" in record]  # sampling leaves a run.json, too
    found, base, left_out, first = {}, {}, [], None
    for folder, record in tqdm(records, desc="runs", unit="run"):
        config = record["config"]
        checkpoints = {int(path.name.removeprefix("step_")): path for path in folder.glob("checkpoints/step_*")}
        evaluated = {step: path for step, path in ({"final": folder} | checkpoints).items()
                     if step != config["steps"] and (path / "results.json").exists()}  # evaluate.py's, the last to come
        if not record["finished"] or "final" not in evaluated:
            left_out.append(f"{folder}: not " + ("evaluated" if record["finished"] else "finished"))
            continue
        setting = {key: Path(value).name if isinstance(value, str) else value  # seeds have folders of their own
                   for key, value in config.items() if key not in (*runs.FREE, "seed", "steps", "data_fingerprint")}
        for key in {"qrpo": (), "sft": ("beta", "quantile")}.get(config["loss"], ("quantile",)):
            setting.pop(key, None)  # this loss does not look at it
        for step, path in evaluated.items():
            e = evaluation(path / "test" / "rewarded", tokenizer)
            first = first or e
            if e["prompts"] != first["prompts"]:
                rows.fail(f"{path}: its test prompts are not those of {first['folder']}; give --runs of one data set")
            seeds = found.setdefault(rows.fingerprint([setting, step]), {
                "config": setting, "step": step, "evaluations": {}})["evaluations"]
            if config["seed"] in seeds:
                rows.fail(f"{path}: has the settings and the seed of {seeds[config['seed']]['folder']}; move one away")
            seeds[config["seed"]] = e
            own = folder.parent / "base" / "rewarded"
            of_base = base.setdefault(setting.get("ref_model") or setting["model"], {})
            if config["seed"] not in of_base:
                of_base[config["seed"]] = evaluation(own, tokenizer) if own.exists() else e | {
                    "reward": e["ref_reward"], "length": e["ref_length"], "field": "ref_completions"}
                if of_base[config["seed"]]["prompts"] != e["prompts"]:
                    rows.fail(f"{own}: its prompts are not those of {path}; run `run.sh refs` to its end")
    if left_out:
        print(f"{len(left_out)} runs left out:", *left_out, sep="\n  ")
    if not found:
        rows.fail(f"{', '.join(folders)}: no evaluated run")
    counts = sorted({len(c["evaluations"]) for c in found.values()})
    print(f"{len(found)} settings, of {' or '.join(map(str, counts))} training seeds")
    return [{"config": {"loss": "base", "model": model}, "step": "final", "evaluations": seeds}
            for model, seeds in base.items()] + list(found.values())


def halves(difficulty, seed=0):
    """Indices of the prompts to select on and of those to report: half of every difficulty, to one prompt."""
    order = np.random.default_rng(seed).permutation(len(difficulty))
    order = np.array(sorted(order, key=lambda i: difficulty[i]))  # a stable sort: shuffled within each
    return np.sort(order[0::2]), np.sort(order[1::2])


# ---- the protocol ----

def length_controlled(reward, length, ref_reward, ref_length):
    """Rewards without what length explains, (prompts, samples): r - k (L - mu_L) sigma_r / sigma_L.

    mu, sigma: of the prompt's own references. k: for each generation seed, the slope of (r - mu_r) / sigma_r on
    (L - mu_L) / sigma_L over prompts. Prompts whose references do not differ in reward or in length stay as they are.
    """
    out = reward.copy()
    # asked of the values, as the sigma of equal numbers may round to more than 0
    differ = (np.nanmax(ref_reward, 1) > np.nanmin(ref_reward, 1)) & (np.ptp(ref_length, 1) > 0)
    for k in range(reward.shape[1]):
        on = differ & ~np.isnan(reward[:, k])
        r, L, sigma_r = ref_reward[on], ref_length[on], np.nanstd(ref_reward[on], 1, ddof=1)
        x = (length[on, k] - L.mean(1)) / L.std(1, ddof=1)
        y = (reward[on, k] - np.nanmean(r, 1)) / sigma_r
        if on.sum() > 1 and np.ptp(x) > 0:
            slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
            out[on, k] = reward[on, k] - slope * x * sigma_r
    return out


def win_rate(reward, ref_reward):
    """Share of the prompt's references that a sample's reward beats, ties counting half; (prompts, samples)."""
    r, ref = reward[:, :, None], ref_reward[:, None, :]
    wins = ((ref < r).sum(2) + 0.5 * (ref == r).sum(2)) / (~np.isnan(ref)).sum(2)
    return np.where(np.isnan(reward), np.nan, wins)


def measure(candidate, half, only=()):
    """The metrics of a setting on half of the prompts (and on `only` these training seeds, if any): NAME, its mean over
    prompts, generation and training seeds; NAME_std, its standard deviation over generation seeds (the paper's; with
    several training seeds, their root mean square); NAME_se_prompts and NAME_se_seeds, standard errors over prompts and
    over training seeds.
    """
    values = {name: [] for name in METRICS}
    evaluations = [e for seed, e in candidate["evaluations"].items() if not only or seed in only]
    for e in evaluations:
        reward, length, ref_reward, ref_length = (e[k][half] for k in ("reward", "length", "ref_reward", "ref_length"))
        values["reward"].append(reward)
        values["gain"].append(reward - np.nanmean(ref_reward, 1, keepdims=True))  # paired: its errors are smaller
        values["lc_reward"].append(length_controlled(reward, length, ref_reward, ref_length))
        values["length"].append(length)
        values["win_rate"].append(win_rate(reward, ref_reward))
    out = {"seeds": len(evaluations)}
    for name, arrays in values.items():
        generations = [np.nanmean(a, 0) for a in arrays]  # for each training seed: (samples,)
        seeds = np.array([np.nanmean(g) for g in generations])
        prompts = np.nanmean([np.nanmean(a, 1) for a in arrays], 0)
        prompts = prompts[~np.isnan(prompts)]
        out |= {name: seeds.mean(), f"{name}_std": math.sqrt(np.mean([variance(g) for g in generations])),
                f"{name}_se_prompts": math.sqrt(variance(prompts) / max(len(prompts), 1)),
                f"{name}_se_seeds": math.sqrt(variance(seeds) / len(seeds))}
    return out


def variance(values):
    """With ddof 1; NaN for a single value."""
    return np.var(values, ddof=1) if len(values) > 1 else math.nan


def select(measures, rule="paper", longest=1000):
    """Index of the best setting. The paper's rule: drop what is longer than 1000 tokens on average; of those whose
    reward is within 2 sqrt(s^2 + s_best^2) of the best, find the best length-controlled reward; of those within
    0.8 sqrt(s^2 + s_best^2) of that, take the highest reward. s: standard deviations over generation seeds.
    """
    def near(pool, name, factor):
        best = max(pool, key=lambda m: m[name])
        s = lambda m: np.nan_to_num(m[f"{name}_std"])  # with one generation seed there is none
        return [m for m in pool if best[name] - m[name] <= factor * math.hypot(s(m), s(best))]

    pool = measures
    if rule == "paper":
        pool = [m for m in measures if m["length"] <= longest] or measures
        pool = near(near(pool, "reward", 2), "lc_reward", 0.8)
    best = max(pool, key=lambda m: m["reward"])
    return next(i for i, m in enumerate(measures) if m is best)
