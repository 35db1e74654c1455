"""The paper's evaluation protocol (arXiv 2507.08068): reads evaluated runs, measures and selects settings.

A run is train.py's folder, with run.json, the rewarded samples of the trained model in test/rewarded, and
evaluate.py's results.json. Its checkpoints have the same, if they were evaluated. The samples of the
reference model are in base/rewarded beside the run if `pipeline.sh refs` made them; if not, its reference
completions are used instead. Runs that differ only in their seed are one setting. results.py prints tables:

    python paper/results.py table --runs=out/mini
"""
import dataclasses
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import qrpo  # noqa: E402
import rows  # noqa: E402
from dataset import other_distribution  # noqa: E402

try:
    import pandas as pd
    from scipy import stats
    from scipy.special import xlogy
except ImportError as error:
    rows.fail(f"{error.name} is missing; pip install -r requirements-dev.txt")

SAMPLING = "temperature", "top_p", "max_new_tokens"  # in which compared models should not differ
METRICS = "reward", "gain", "full_marks", "kl", "objective", "lc_reward", "length", "win_rate"
NOT_A_SETTING = "seed", "steps", "data_fingerprint"  # in run.json; train.py has them from seed and data
UNUSED = {"dpo": ["quantile"], "dpo_norm": ["quantile"], "rebel": ["quantile"], "simpo": ["quantile"],
          "sft": ["quantile", "beta"]}


# ---- runs on disk ----

@dataclasses.dataclass(eq=False)
class Evaluation:
    """Rewarded completions of one model. NaN: unknown. Sample k of all prompts is generation seed k."""
    folder: Path              # of the rows
    field: str                # that holds the completions
    prompts: pd.DataFrame     # id, difficulty, and a fingerprint of the prompt
    reward: pd.DataFrame      # (prompts, samples)
    length: pd.DataFrame      # (prompts, samples), in tokens
    ref_reward: pd.DataFrame  # (prompts, references)
    ref_length: pd.DataFrame  # (prompts, references)
    log_ratio: pd.DataFrame   # (prompts, samples), log pi - log pi_ref; NaN if not sampled at temperature 1
    sampled: str = ""         # a fingerprint of the completions
    made: dict = dataclasses.field(default_factory=dict)  # what rewarded and sampled them, where rows say so

    def filled(self, reward):
        """With this reward where it is unknown, and there with the mean log-ratio, which is unknown, too."""
        log_ratio = self.log_ratio.where(self.reward.notna(), self.log_ratio.stack().mean())
        return dataclasses.replace(self, reward=self.reward.fillna(reward), log_ratio=log_ratio)


def read_evaluation(folder, tokenizer=None, field="samples", rewards="sample_rewards"):
    """field, rewards: the names of the model's completions and their rewards in the rows.

    tokenizer: lengths are in its tokens; without one, in sampled tokens.
    """
    table = rows.read(folder, require=(field, rewards, "ref_completions", "ref_rewards"))

    def length(completion):
        if tokenizer:
            return len(tokenizer(completion["text"]).input_ids)
        return len(completion["token_ids"])

    def numbers(name):
        return frame(name, [row[name] for row in table])

    def lengths(name):
        return frame(name, [[length(completion) for completion in row[name]] for row in table])

    def frame(name, lists):
        try:
            return pd.DataFrame(np.array(lists, dtype=float))  # null becomes NaN
        except ValueError:
            rows.fail(f"{folder}: its rows differ in their number of {name}; sample as many for every prompt")

    prompts = pd.DataFrame({
        "id": [str(row["id"]) for row in table],
        "difficulty": [str(row.get("difficulty")) for row in table],
        "prompt": [rows.fingerprint(row["prompt"]) for row in table],
    })
    reward = numbers(rewards)
    log_ratio = reward * math.nan
    if not any(other_distribution(row, field) for row in table):
        log_ratio = read_log_ratios(Path(folder), field, prompts, reward)
    sampled = rows.fingerprint([row[field] for row in table])
    made_by = table[0].get("made_by", {})
    made = {"reward": made_by.get(rewards, {}).get("fingerprint")}
    made |= {name: made_by.get(field, {}).get(name) for name in SAMPLING}
    return Evaluation(Path(folder), field, prompts, reward, lengths(field),
                      numbers("ref_rewards"), lengths("ref_completions"), log_ratio, sampled, made)


def read_log_ratios(folder, field, prompts, reward):
    """The log-ratios of a model's samples, (prompts, samples), from evaluate.py; those of the reference model
    are 0.
    """
    if field == "ref_completions" or folder.parent.name == "base":
        return reward * 0
    path = folder.parents[1] / "samples.npz"
    if not path.exists():
        return reward * math.nan
    samples = np.load(path)
    place = pd.Series(range(len(prompts)), prompts.id).reindex(samples["row_ids"].astype(str))
    place = place.iloc[samples["row"]]  # (samples,) the positions of their prompts
    known = reward.notna().to_numpy()   # evaluate.py leaves the others out
    if place.isna().any() or len(place) != known.sum():
        rows.fail(f"{path}: is not of the samples in {folder}; run evaluate.py again")
    table = np.full(reward.shape, math.nan)
    table[known] = samples["log_ratio"][np.argsort(place, kind="stable")]
    return pd.DataFrame(table)


def load(folders, tokenizer=None):
    """A table of all evaluated models: train.py's flags, `seed`, `step` ("final", or a checkpoint's), `run`
    (its folder), `setting` (the same for all seeds) and `evaluation`. Reference models have the loss "base".
    """
    models, bases, read, skipped = [], {}, set(), []
    for run in rows.progress(run_folders(folders), desc="runs", unit="run"):
        record = rows.load_json(run / "run.json")
        if not record["finished"]:
            skipped.append(f"{run}: not finished")
            continue
        if not (run / "results.json").exists():
            skipped.append(f"{run}: not evaluated")
            continue
        seed = record["config"]["seed"]
        flags = setting_of(record["config"])
        models_of_run = {"final": run}
        for checkpoint in sorted(run.glob("checkpoints/step_*")):
            if (checkpoint / "results.json").exists():
                models_of_run[int(checkpoint.name.removeprefix("step_"))] = checkpoint
            else:
                skipped.append(f"{checkpoint}: not evaluated")
        for step, folder in models_of_run.items():
            models.append(flags | {
                "seed": seed, "step": step, "run": run, "setting": rows.fingerprint([flags, step]),
                "evaluation": read_evaluation(folder / "test/rewarded", tokenizer)})
        name = flags.get("ref_model") or flags["model"]
        if (name, seed) not in read:
            read.add((name, seed))
            base = base_evaluation(run, tokenizer)
            bases.setdefault((name, base.sampled), {  # training seeds may share it, and then it counts once
                "loss": "base", "model": name, "seed": seed, "step": "final", "run": run, "setting": name,
                "evaluation": base})
    if skipped:
        print(f"{len(skipped)} left out:", *skipped, sep="\n  ")
    if not models:
        rows.fail(f"{', '.join(folders)}: no evaluated run")
    table = pd.DataFrame([*bases.values(), *models], dtype=object)
    table = table.where(table.notna(), None)
    check_comparable(table)
    seeds = table[table.loss != "base"].groupby("setting").size()
    print(f"{len(seeds)} settings, each with {seeds.min()} to {seeds.max()} seeds")
    return table


def run_folders(folders):
    for top in folders:
        if not Path(top).is_dir():
            rows.fail(f"{top}: no such folder; --runs names folders of runs")
    return sorted(path.parent for top in folders for path in Path(top).rglob("run.json"))


def setting_of(config):
    """The flags that tell settings apart. Every seed may have folders of its own: out/seed1 is out/seed*."""
    ignored = [*NOT_A_SETTING, *UNUSED.get(config["loss"], [])]
    if "reward" in config:  # of examples/online.py: QRPO, but on fresh samples, for --steps
        config = config | {"loss": "online"}
        ignored.remove("steps")
    flags = {name: value for name, value in config.items() if name not in ignored}
    for name in "model", "ref_model":
        path = flags.get(name)
        if path:
            path = str((ROOT / path).resolve()) if (ROOT / path).is_dir() else str(path)
            flags[name] = re.sub(rf"(seed[-_]?){config['seed']}(?!\d)", r"\1*", path.removeprefix(f"{ROOT}/"))
    return flags


def base_evaluation(run, tokenizer):
    """The evaluation of a run's reference model."""
    sampled = run.parent / "base/rewarded"
    if sampled.exists():
        return read_evaluation(sampled, tokenizer)
    return read_evaluation(run / "test/rewarded", tokenizer, "ref_completions", "ref_rewards")


def check_comparable(table):
    """Refuse models with different test prompts or rewards, and two with the same setting and seed. Say where
    they were sampled in different ways.
    """
    first = table.evaluation.iloc[-1]
    for evaluation in table.evaluation:
        if not evaluation.prompts.equals(first.prompts):
            rows.fail(f"{evaluation.folder}: its test prompts are not those of {first.folder}; give --runs of"
                      " one dataset, all scored completely")
    for name in ("reward", *SAMPLING):
        found = {}  # value: a folder made with it
        for evaluation in table.evaluation:
            if evaluation.made.get(name) is not None:
                found.setdefault(evaluation.made[name], evaluation.folder)
        if len(found) > 1 and name == "reward":
            first, second = list(found.values())[:2]
            rows.fail(f"{second}: its rewards were made by another reward, or version of it, than those of "
                      f"{first}; give --runs of one reward")
        if len(found) > 1:
            print(f"sampled with different {name}, so rewards do not compare:",
                  *(f"{value} in {folder}" for value, folder in found.items()), sep="\n  ")
    for _, same in table.groupby(["setting", "seed"]):
        if len(same) > 1:
            first, second = same.run.iloc[:2]
            rows.fail(f"{second}: has the settings and the seed of {first}; move one away")


# ---- the protocol ----

def halves(difficulty, seed=0):
    """Positions of the prompts to select on, and of those to report: half of each difficulty."""
    shuffled = np.random.default_rng(seed).permutation(len(difficulty))
    by_difficulty = pd.Series(difficulty)[shuffled].sort_values(kind="stable").index
    return np.sort(by_difficulty[0::2]), np.sort(by_difficulty[1::2])


def length_controlled(reward, length, ref_reward, ref_length):
    """Rewards without what length explains, r - slope (L - mean_L) std_r / std_L; (prompts, samples).

    Means and standard deviations are over the prompt's references. slope: of (r - mean_r) / std_r on
    (L - mean_L) / std_L over prompts, for each generation seed. Where the references of a prompt all have the
    same reward or the same length, its rewards stay as they are.
    """
    # compare values: the standard deviation of equal numbers can round to more than 0
    spread = (ref_reward.nunique(axis=1) > 1) & (ref_length.nunique(axis=1) > 1)
    std_r = ref_reward.std(axis=1)
    x = length.sub(ref_length.mean(axis=1), axis=0).div(ref_length.std(axis=1), axis=0)[spread]
    y = reward.sub(ref_reward.mean(axis=1), axis=0).div(std_r, axis=0)[spread]
    out = reward.copy()
    for k in reward:
        known = y[k].notna()
        if x.loc[known, k].nunique() > 1:
            slope = stats.linregress(x.loc[known, k], y.loc[known, k]).slope
            out[k] -= (slope * x[k] * std_r).fillna(0)
    return out


def win_rate(reward, ref_reward):
    """The share of the prompt's references that a sample beats, a tie counting half; (prompts, samples)."""
    wins = {}
    for k in reward:
        below = ref_reward.lt(reward[k], axis=0).sum(axis=1)
        equal = ref_reward.eq(reward[k], axis=0).sum(axis=1)
        wins[k] = (below + equal / 2) / ref_reward.count(axis=1)
    return pd.DataFrame(wins).where(reward.notna())


def quantile_rewards(evaluation, beta):
    """QRPO's R of every sample, for the identity and exact quantiles; (prompts, samples). NaN where no
    reference reward is known, so that there is no quantile.
    """
    among_refs = torch.tensor(evaluation.field == "ref_completions")
    ref_rewards = torch.tensor(evaluation.ref_reward.to_numpy())
    out = {}
    for k in evaluation.reward:
        rewards = torch.tensor(evaluation.reward[k].to_numpy())
        cells = qrpo.quantile_cells(rewards, ref_rewards, among_refs.expand(rewards.shape))
        b = torch.full_like(rewards, beta)
        out[k] = (b * qrpo.log_mean_exp(b, "identity", *cells)).numpy()
    known = evaluation.reward.notna().mul(evaluation.ref_reward.notna().any(axis=1), axis=0)
    return pd.DataFrame(out).where(known)


def metrics(evaluation, half, beta):
    """Every metric of every sample to the prompts at positions `half`: name -> (prompts, samples).

    full_marks: a reward of 1 or more. objective: QRPO's, quantile reward - beta KL.
    """
    reward = evaluation.reward.iloc[half]
    length = evaluation.length.iloc[half]
    ref_reward = evaluation.ref_reward.iloc[half]
    ref_length = evaluation.ref_length.iloc[half]
    log_ratio = evaluation.log_ratio.iloc[half]
    return {
        "reward": reward,
        "gain": reward.sub(ref_reward.mean(axis=1), axis=0),  # paired by prompt, so its errors are smaller
        "full_marks": (reward >= 1).where(reward.notna()).astype(float),
        "kl": log_ratio,
        "objective": quantile_rewards(evaluation, beta).iloc[half] - beta * log_ratio,
        "lc_reward": length_controlled(reward, length, ref_reward, ref_length),
        "length": length,
        "win_rate": win_rate(reward, ref_reward),
    }


def measure(evaluations, half, beta=0.1):
    """The metrics of a setting, evaluated once for each training seed, on half of the prompts:

    rewards, unknown: how many rewards there are, and how many of them are unknown and left out
    NAME: mean over prompts, generation seeds and training seeds
    NAME_std: standard deviation over generation seeds, as in the paper (root mean square over training seeds)
    NAME_se_prompts, NAME_se_seeds: standard errors over prompts, and over training seeds
    """
    values = [metrics(evaluation, half, beta) for evaluation in evaluations]
    rewards = [of_seed["reward"] for of_seed in values]
    out = {"seeds": len(values), "rewards": sum(frame.size for frame in rewards),
           "unknown": int(sum(frame.isna().to_numpy().sum() for frame in rewards))}
    for name in METRICS:
        frames = [of_seed[name] for of_seed in values]
        by_generation = [frame.mean() for frame in frames]
        by_seed = pd.Series([generations.mean() for generations in by_generation])
        by_prompt = pd.DataFrame([frame.mean(axis=1) for frame in frames]).mean()
        variance = np.mean([generations.var() for generations in by_generation])
        out[name] = by_seed.mean(skipna=False)
        out[f"{name}_std"] = math.sqrt(variance)
        out[f"{name}_se_prompts"] = by_prompt.sem()
        out[f"{name}_se_seeds"] = by_seed.sem()
    return out


def difference(ours, theirs, half, beta=0.1):
    """One setting minus another, prompt by prompt, on half of the prompts. ours, theirs: evaluations, for the
    same training seeds. What `measure` returns of every metric, without NAME_std, and NAME_of_seeds, a list.
    """
    pairs = [(metrics(a, half, beta), metrics(b, half, beta)) for a, b in zip(ours, theirs)]
    out = {"seeds": len(pairs)}
    for name in METRICS:
        # (seeds, prompts)
        table = pd.DataFrame([a[name].mean(axis=1) - b[name].mean(axis=1) for a, b in pairs])
        by_seed = table.mean(axis=1)
        out[name] = by_seed.mean(skipna=False)
        out[f"{name}_se_prompts"] = table.mean().sem()
        out[f"{name}_se_seeds"] = by_seed.sem()
        out[f"{name}_of_seeds"] = by_seed.tolist()
    return out


def scale(evaluations):
    """The lowest and the highest reward that there can be, as far as it is known: 0 and 1, or those seen."""
    frames = [frame for e in evaluations for frame in (e.reward, e.ref_reward)]
    low, high = min(frame.min().min() for frame in frames), max(frame.max().max() for frame in frames)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def measure_thrice(evaluations, half, beta, ends):
    """What `measure` returns without the unknown rewards, and if all of them were the lowest, or the highest.
    ends: of the scale.
    """
    known = measure(evaluations, half, beta)
    if not known["unknown"]:
        return [known] * 3
    return [known, *[measure([e.filled(end) for e in evaluations], half, beta) for end in ends]]


def select_surely(measures, rule="paper"):
    """The position of the best, or None if unknown rewards decide it. measures: of `measure_thrice`."""
    found = {select(list(of_all), rule) for of_all in zip(*measures)}
    return found.pop() if len(found) == 1 else None


def select(measures, rule="paper", longest=1000):
    """The position of the best of `measures`, a list of what `measure` returns, whose rewards are all known.

    rule: a metric, of which to take the highest, or the paper's: drop settings longer than 1000 tokens on
    average. Of those near the best reward (2 standard deviations), find the best length-controlled reward.
    Of those near that (0.8), take the highest reward.
    """
    pool = pd.DataFrame(measures)
    if rule != "paper":
        return pool[rule].idxmax()
    short = pool[pool.length <= longest]
    pool = pool if short.empty else short
    pool = near_best(pool, "reward", 2)
    pool = near_best(pool, "lc_reward", 0.8)
    return pool.reward.idxmax()


def near_best(pool, name, factor):
    """The settings within factor sqrt(s^2 + s_best^2) of the best in `name`; s: NAME_std."""
    best = pool[name].idxmax()
    std = pool[f"{name}_std"].fillna(0)  # one generation seed has none
    return pool[pool.loc[best, name] - pool[name] <= factor * np.hypot(std, std[best])]


# ---- the best possible ----

def best_tradeoff(scores, betas):
    """The most that any policy gains for its KL: pi_ref e^{score / beta} / Z maximises E[score] - beta KL for
    every prompt.

    scores: (prompts, references), of samples of the reference model; NaN: unknown. Returns the means over
    prompts of KL, in nats, and of the score, (betas,) each; prompts without a known score are left out.
    """
    scores = scores[~np.isnan(scores).all(1)]
    kl, mean = [], []
    for beta in betas:
        weight = np.exp((scores - np.nanmax(scores, 1, keepdims=True)) / beta)
        weight /= np.nanmean(weight, 1, keepdims=True)  # pi / pi_ref
        kl.append(np.nanmean(xlogy(weight, weight), 1).mean())
        mean.append(np.nanmean(weight * scores, 1).mean())
    return np.array(kl), np.array(mean)
