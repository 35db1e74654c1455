"""Compare a trained policy with its reference model on held-out prompts, and with the best that its beta
allows.

Reads rewarded rows that hold completions of the reference model (`ref_completions`, `ref_rewards`) and of
the policy (`samples`, `sample_rewards`), and both models. Prints a table, and writes to OUT results.json,
samples.npz (log-ratio, quantile, reward and length of every sample), pictures, and report.html: one page
with all of this and the completions. Its template is evaluate.html.

    python evaluate.py --model=out/qrpo --ref_model=MODEL --data=out/qrpo/test/rewarded --out=out/qrpo

Standard errors are over prompts. The KL is the mean log-ratio of the policy's own samples. QRPO maximises the
objective E[R] - beta KL, where R is the transformed quantile of the reward (by the `exact` cells among the
reference rewards). No policy can exceed beta log Z. The column "optimum" is what the best policy would have:
the reference completions, each with its exact weight pi*/pi_ref.
"""
import base64
import collections
import itertools
import json
import math
import re
import secrets
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jinja2
import matplotlib
import numpy as np
import torch

import dataset
import qrpo
import rows
from model import Policy, get_device, get_dtype, load_model, load_tokenizer, model_fingerprint
from scoring.function import text_of
from tokens import check_same_ids

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MODELS = {"reference": ("ref_completions", "ref_rewards"), "policy": ("samples", "sample_rewards")}
FIELDS = [field for pair in MODELS.values() for field in pair]  # that every row must have
FORWARD_TOKENS = 8192  # padded tokens in a forward pass
PROMPTS, COMPLETIONS = 500, 4  # the most on the page: prompts, and completions of a model for each


# ---- settings ----

def arguments():
    parser = rows.Parser(__doc__)
    flag = parser.add_argument
    flag("--model", required=True, help="the policy: a Hugging Face folder")
    flag("--ref_model", required=True, help="the reference model")
    flag("--data", required=True, help="rewarded rows with completions of both")
    flag("--out", required=True, type=Path, help="folder for results and pictures")
    flag("--beta", type=rows.positive,
         help="of the objective (default: that of the QRPO run in --model, or none)")
    flag("--transform", choices=qrpo.TRANSFORMS, help="of the quantile (default: the run's, or identity)")
    flag("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
         help="of both models; auto: bfloat16 on a GPU")
    flag("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    return parser.parse_args()


def load_run(args):
    """run.json of the run that made --model, which is a run's folder or a checkpoint in one; an empty config
    if it is neither. Fills in --beta and --transform.
    """
    folder = Path(args.model)
    checkpoint = re.search(r"checkpoints/step_(\d+)$", str(folder))
    if checkpoint:
        folder = folder.parent.parent
    run = {"config": {}}
    if (folder / "run.json").exists():
        run = rows.load_json(folder / "run.json")
    config = run["config"]
    if checkpoint:
        config["steps"] = int(checkpoint[1])
    # where every completion has a beta of its own, there is no one objective
    if config.get("has_targets") and not config.get("length_normalize"):
        args.beta = args.beta or config["beta"]
        args.transform = args.transform or config["transform"]
    args.transform = args.transform or "identity"
    args.template_args = config.get("template_args", {})
    return run


# ---- read: what the rows say, and the log-ratios ----

def read(path):
    """What the rows say of themselves, as a namespace: made_by {model: the settings it was sampled with};
    biased {model: how it was sampled, if not from its own distribution}; count, unknown {model: how many
    completions it has, and how many without a known reward}; opinions {NAME: {model: means of the prompts}},
    of the rewards of `score.py --name=NAME`.
    """
    found = SimpleNamespace(made_by={}, biased={}, opinions={})
    found.count, found.unknown = collections.Counter(), collections.Counter()
    for row in rows.stream(path, require=FIELDS):
        if not found.made_by:  # the first row
            columns = [column for column in row if column.startswith("sample_rewards_")]
            names = [column.removeprefix("sample_rewards_") for column in columns]
            found.opinions = {name: {"reference": [], "policy": []} for name in names}
        for model, (field, column) in MODELS.items():
            found.made_by[model] = row.get("made_by", {}).get(field, {})
            how = dataset.other_distribution(row, field)
            if how:
                found.biased[model] = how
            found.count[model] += len(row[field])
            found.unknown[model] += row[column].count(None)
            for name, means in found.opinions.items():
                means[model].append(mean_reward(row, field, f"{column}_{name}"))
    return found


def mean_reward(row, field, column):
    """The mean of the known rewards in a column for the completions in a field."""
    rewards = row.get(column)
    if not isinstance(rewards, list) or len(rewards) != len(row[field]):
        rows.fail(f"{row['__at__']}: needs as many {column} as {field}; run score.py")
    numbers = [dataset.number(reward, row["__at__"], column) for reward in rewards]  # null becomes NaN
    return mean_and_se(np.array(numbers))[0]


def load_completions(args, device):
    """{model: its completions of known reward as arrays (see dataset.build)}, with length in tokens, and full
    (whether the reward is 1); the policy's also with log_ratio, log pi - log pi_ref; each (n,).
    """
    tokenizer = load_tokenizer(args.model, args.trust_remote_code, args.template_args)
    check_same_ids(tokenizer, load_tokenizer(args.ref_model, args.trust_remote_code))
    dtype = get_dtype(args.dtype, device)
    model = load_model(args.model, dtype, device, args.trust_remote_code)
    data = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, train_on in (("reference", "refs"), ("policy", "samples")):
            choices = dataset.Choices(train_on, needs_reward=True)
            data[name] = dataset.load(args.data, cache, args.model, tokenizer, model, choices)
    policy = data["policy"]
    logps = dataset.all_logps(Policy(model), policy, FORWARD_TOKENS, device)
    del model  # one at a time in memory
    ref_model = load_model(args.ref_model, dtype, device, args.trust_remote_code)
    ref_logps = dataset.all_logps(Policy(ref_model), policy, FORWARD_TOKENS, device)
    policy.log_ratio = logps.astype(float) - ref_logps
    for completions in data.values():
        completions.length = completions.lens - completions.prompt_lens
        completions.full = completions.rewards >= 1
    return data


# ---- measure ----

def quantile_rewards(args, data):
    """Adds to data the cells lo, hi of its completions' quantiles, and R, their transformed rewards. With a
    beta, R is the soft average over the cell, and weight is pi*/pi_ref, 1 on average over the references;
    log_weight is known where that underflows. All numpy (n,).
    """
    rewards = torch.tensor(data.rewards).double()
    ref_rewards = torch.tensor(data.ref_rewards[data.row]).double()
    lo, hi = qrpo.quantile_cells(rewards, ref_rewards, torch.tensor(data.among_refs))
    R = (lo + hi) / 2
    if args.beta is not None:
        beta = torch.full_like(lo, args.beta)
        R = beta * qrpo.log_mean_exp(beta, args.transform, lo, hi)
        log_weight = R / beta - qrpo.log_partition(beta, args.transform)
        data.log_weight, data.weight = log_weight.numpy(), log_weight.exp().numpy()
    R[ref_rewards.isnan().all(1)] = math.nan  # without a known reference reward there is no quantile
    data.lo, data.hi, data.R = lo.numpy(), hi.numpy(), R.numpy()


def by_prompt(data, values, weights=1.0):
    """The weighted mean of values (n,) over the completions of every prompt, (R,); NaN for one without."""
    prompts = len(data.ids)
    weights = np.broadcast_to(weights, len(values))
    total = np.bincount(data.row, weights * values, prompts)
    mass = np.bincount(data.row, weights, prompts)
    with np.errstate(invalid="ignore"):
        return total / mass


NUMBERS = {  # name: the array that it is the mean of
    "mean reward": "rewards",
    "full marks (reward 1)": "full",
    "length, tokens": "length",
    "ran out of tokens": "truncated",
    "quantile reward": "R",
}
KL = "KL to reference, nats"


def measure(args, held_out, data):
    """{name: {column: its value for every prompt, (R,)}}. A column is a model, "difference" or "optimum"."""
    reference, policy = data["reference"], data["policy"]
    found = {}
    for name, array in NUMBERS.items():
        found[name] = compare(
            by_prompt(reference, getattr(reference, array)),
            by_prompt(policy, getattr(policy, array)))
    if max(reference.rewards.max(), policy.rewards.max()) > 1:
        del found["full marks (reward 1)"]
    if not reference.truncated.any() and not policy.truncated.any():
        del found["ran out of tokens"]
    for name, means in held_out.opinions.items():
        found[f"mean reward by {name}"] = compare(
            np.array(means["reference"]),
            np.array(means["policy"]))
    if "policy" not in held_out.biased:
        kl = by_prompt(policy, policy.log_ratio)
        found[KL] = compare(0 * kl, kl)
    if args.beta is not None:
        add_optimum(args, found, reference)
    return found


def compare(reference, policy):
    return {"reference": reference, "policy": policy, "difference": policy - reference}


def add_optimum(args, found, reference):
    """Adds the objective to what was measured, and the column of the optimum."""
    for name, columns in found.items():
        columns["optimum"] = columns["reference"] * math.nan  # unknown
        if name in NUMBERS:
            values = getattr(reference, NUMBERS[name])
            columns["optimum"] = by_prompt(reference, values, reference.weight)
    found[KL]["optimum"] = by_prompt(reference, reference.log_weight, reference.weight)
    R = found["quantile reward"]
    found["objective"] = {
        column: R[column] - args.beta * kl
        for column, kl in found[KL].items()}


def mean_and_se(values):
    """The mean and its standard error; NaN (prompts without a known reward) left out."""
    values = values[~np.isnan(values)]
    mean, se = math.nan, math.nan
    if len(values):
        mean = float(values.mean())
    if len(values) > 1:
        se = float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, se


# ---- say ----

def as_text(table):
    """The table as lines of cells, all text; the first line names the columns."""
    lines = [["", *table["mean reward"]]]
    for name, columns in table.items():
        digits = 1 if name == "length, tokens" else 4
        cells = [f"{mean:.{digits}f} ± {se:.{digits}f}" for mean, se in columns.values()]
        # of one prompt there is no standard error
        cells = [cell.removesuffix(" ± nan").replace("nan", "unknown") for cell in cells]
        lines.append([name, *cells])
    return lines


def verdict(args, table):
    """What the objective says, in words."""
    objective = table["objective"]
    reference, policy, optimum = (objective[column][0] for column in ("reference", "policy", "optimum"))
    text = (f"Objective (quantile reward - {args.beta:g} KL): reference model {reference:.4f}, policy "
            f"{policy:.4f}, best possible with these rewards and their ties {optimum:.4f}")
    gain = policy - reference
    possible = optimum - reference
    if gain > 0 and possible > 1e-3:
        text += f": {gain / possible:.0%} of the way"
    return f"{text}."


BIASED = {
    "reference": "the quantiles are not those among its own completions",
    "policy": "no KL and no objective, which are means over what it samples itself",
}
SAME = ("dtype", "max_new_tokens", "engine", "template_args")  # with which both should be sampled


def oddities(args, held_out, data):
    """What a reader should know before believing the numbers, in a few words each."""
    found = []
    for model, how in held_out.biased.items():
        found.append(f"the {model} was sampled at {how}, not from its own distribution: {BIASED[model]}")
    for model, path in (("reference", args.ref_model), ("policy", args.model)):
        if held_out.made_by[model].get("files") not in (None, model_fingerprint(path)):
            found.append(f"the {model}'s completions were sampled by another model than {path}, by its files")
    reference, policy = held_out.made_by.values()
    for name in SAME:
        if name in reference and name in policy and reference[name] != policy[name]:
            found.append(f"sampled with another {name}: reference {reference[name]}, policy {policy[name]}")
    for model, completions in data.items():
        unknown = held_out.unknown[model]
        dropped = held_out.count[model] - unknown - len(completions.rewards)  # by dataset.Reader
        cut = completions.truncated.mean()
        if unknown:
            found.append(f"{unknown} of the {model}'s rewards are unknown and left out")
        if dropped:
            found.append(f"{dropped} of the {model}'s completions have an end token before their end and are "
                         "left out")
        if cut > 0.05:
            found.append(f"{cut:.0%} of the {model}'s completions ran out of tokens")
    tied = (data["reference"].tied == 1).mean()
    if tied > 0.2:
        found.append(f"{tied:.0%} of the reference's rewards equal all others of their prompt, where "
                     "there is nothing to gain")
    return found


def show(content):
    """Print the table, the prompts that gained and lost most, and the verdict."""
    print(f"\n{content['total']} held-out prompts; mean ± standard error over prompts\n")
    lines = content["lines"]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, *numbers in lines:
        numbers = map(str.rjust, numbers, widths[1:])
        print(name.ljust(widths[0]), *numbers, sep="  ")
    print("\nThe largest and the smallest gain, with the best and the worst completion of each model:")
    show_prompt(content["prompts"][0])
    show_prompt(content["prompts"][-1])
    if content["verdict"]:
        print(f"\n{content['verdict']}")


def show_prompt(row):
    """Print a row of `page_rows`, with the best and the worst completion of known reward of each model."""
    means = row["means"]
    print(f"\nrow {row['id']}: mean reward {means['reference']:.4g} -> {means['policy']:.4g}")
    print("prompt    ", shortened(text_of(row["prompt"])))
    for model in MODELS:
        known = [completion for completion in row[model] if completion["reward"] is not None]
        del known[1:-1]
        for completion in known:
            print(f"{model:10} reward {completion['reward']}: {shortened(completion['text'])}")


def shortened(text):
    return repr(text) if len(text) <= 200 else f"{text[:200]!r} ..."


# ---- write ----

def write(args, results, samples):
    """OUT/samples.npz and OUT/results.json."""
    with rows.replacing(args.out / "samples.npz") as new, open(new, "wb") as file:
        np.savez(
            file,
            log_ratio=samples.log_ratio,
            length=samples.length,
            row=samples.row,
            reward=samples.rewards,
            lo=samples.lo,
            hi=samples.hi,
            row_ids=samples.ids)
    without_nan = json.loads(json.dumps(results), parse_constant=rows.constant)
    rows.write_json(args.out / "results.json", without_nan)


def page_rows(args, policy, rewards):
    """The first rows of the data as the page shows them, the largest gain first. rewards: see `measure`."""
    index = {name: i for i, name in enumerate(policy.ids.tolist())}
    means = rewards | {"log_ratio": by_prompt(policy, policy.log_ratio)}  # each (R,)
    page = []
    for row in itertools.islice(rows.stream(args.data), PROMPTS):
        i = index[str(row["id"])]
        page.append({
            "id": str(row["id"]),
            "prompt": row["prompt"],
            "place": i,
            "means": {name: values[i] for name, values in means.items()},
            "reference": best_and_worst(row, "reference"),
            "policy": best_and_worst(row, "policy", policy.log_ratio[policy.row == i])})
    return sorted(page, key=lambda row: np.nan_to_num(row["means"]["difference"]), reverse=True)


def best_and_worst(row, model, log_ratios=()):
    """The completions of a model that the page shows, the best first; of unknown reward only if there are not
    enough others. log_ratios: of those that `dataset.load` found.
    """
    field, column = MODELS[model]
    known, unknown = [], []
    for completion, reward in zip(row[field], row[column]):
        group = unknown if reward is None else known
        group.append({
            "text": completion["text"],
            "reward": reward,
            "log_ratio": None,
            "tokens": len(completion.get("token_ids", [])),
            "cut_off": completion.get("finish_reason") == "length"})
    if len(log_ratios) == len(known):  # else one was dropped, and it is not known which
        for completion, log_ratio in zip(known, log_ratios):
            completion["log_ratio"] = log_ratio
    known.sort(key=lambda completion: completion["reward"], reverse=True)
    del known[COMPLETIONS // 2:-(COMPLETIONS // 2)]
    return [*known, *unknown][:COMPLETIONS]


def write_page(args, pictures, content):
    """OUT/report.html, by the template evaluate.html, which says how it treats completions as untrusted."""
    images = {path.name: base64.b64encode(path.read_bytes()).decode() for path in pictures}
    template = Path(__file__).with_name("evaluate.html").read_text()
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True)
    page = environment.from_string(template).render(
        args=args,
        images=images,
        most=COMPLETIONS,
        nonce=secrets.token_hex(),
        date=time.strftime("%d %B %Y, %H:%M"),
        **content)
    with rows.replacing(args.out / "report.html") as new:
        new.write_text(page, encoding="utf-8", errors="backslashreplace")


# ---- draw: each function writes one PNG and returns its path ----

def panels(n):
    """A figure of n panels, two side by side; returns it and these."""
    lines = math.ceil(n / 2)
    figure, axes = plt.subplots(lines, 2, figsize=(9, 3.6 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[n:]:
        axis.remove()
    return figure, axes.flat[:n]


def save(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_results(args, rewards):
    """Left: mean rewards. Right: each prompt's, before and after. rewards: see `measure`."""
    figure, (bars, points) = panels(2)
    for model in MODELS:
        mean, se = mean_and_se(rewards[model])
        bars.bar(model, mean, yerr=se, capsize=6)  # one standard error never reaches beyond the rewards
    if "optimum" in rewards:
        mean, _ = mean_and_se(rewards["optimum"])
        bars.bar(f"optimum,\nbeta {args.beta:g}", mean, color="lightgrey")
    bars.set(ylabel="mean reward", title="all prompts, ± standard error")
    points.scatter(rewards["reference"], rewards["policy"], s=16, alpha=0.4)
    points.axline((mean, mean), slope=1, color="k", linestyle=":", linewidth=1)
    points.set(
        xlabel="reference model's mean reward",
        ylabel="policy's",
        title="each prompt: above the line, it gained")
    return save(figure, args.out / "results.png")


EDGES = np.linspace(0, 1, 21)  # of 20 bins of quantiles


def density(lo, hi, weights=None):
    """Density of quantiles, (20,), with the mass of every completion spread evenly over its cell (lo, hi]."""
    lo, hi = lo[:, None], hi[:, None]  # (n, 1)
    inside = np.minimum(hi, EDGES[1:]) - np.maximum(lo, EDGES[:-1])  # (n, 20)
    share = inside.clip(0) / (hi - lo)
    return 20 * np.average(share, axis=0, weights=weights)


def draw_optimum(args, results, data):
    """Left: density of the quantiles of the policy's samples, and at the optimum. Right: the objective over
    the checkpoints, between the reference model's and the best possible.
    """
    reference, policy = data["reference"], data["policy"]
    best, _ = results["objective"]["optimum"]
    start, _ = results["objective"]["reference"]
    figure, (quantiles, objective) = panels(2)
    known = ~np.isnan(policy.R)  # without a known reference reward there is no quantile
    reached = density(policy.lo[known], policy.hi[known])
    optimum = density(reference.lo, reference.hi, reference.weight)
    quantiles.stairs(reached, EDGES, fill=True, alpha=0.5, label="policy")
    quantiles.stairs(optimum, EDGES, color="C3", label="optimum, with these rewards' ties")
    quantiles.axhline(1, color="k", linestyle=":", label="reference model")
    quantiles.set(
        xlabel="quantile of the reward among the reference model's",
        ylabel="density",
        title="the policy's completions")
    quantiles.legend(fontsize=8)

    points = [(0, start, 0)]  # step, objective, its standard error
    checkpoints = sorted(args.out.glob("checkpoints/*/results.json"))
    for path in [*checkpoints, args.out / "results.json"]:
        point = rows.load_json(path)
        # with another beta or transform it is another objective
        if (point["beta"], point["transform"]) == (results["beta"], results["transform"]):
            mean, se = point["objective"]["policy"]
            points.append((point["step"] or 0, mean, se or 0))
    objective.errorbar(*zip(*points), fmt="o-", capsize=3, label="policy, ± standard error")
    objective.axhline(best, color="C3", linestyle="--", label="best possible")
    objective.axhline(start, color="k", linestyle=":", label="reference model")
    objective.set(
        xlabel="training step",
        title=f"objective: quantile reward - {args.beta:g} KL")
    objective.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.93))
    return save(figure, args.out / "optimum.png")


CURVES = {  # title: metrics of train.py and examples/online.py; those of held-out rows begin with eval_
    "loss": ["loss"],
    "log-ratio to the reference model, nats": ["log_ratio"],
    "log-ratio of better and worse completions, nats": ["log_ratio_better", "log_ratio_worse"],
    "KL to the reference model, nats": ["kl"],
    "objective, on fresh samples": ["objective"],
    "norm of the gradient": ["grad_norm"],
}


def draw_curves(out):
    """The metrics over the steps: lines from training, points from held-out rows."""
    curves = collections.defaultdict(list)  # metric: [(step, value)]
    for row in rows.complete_lines(out / "metrics.jsonl"):
        for name, value in row.items():
            curves[name].append((row["step"], value))
    shown = {}
    for title, names in CURVES.items():
        logged = [name for name in names if name in curves]
        if logged:
            shown[title] = logged
    figure, axes = panels(len(shown))
    for axis, (title, names) in zip(axes, shown.items()):
        for color, name in zip(("C0", "C1"), names):
            axis.plot(*zip(*curves[name]), color, label=name, linewidth=1.2)
            held_out = f"eval_{name}"
            if held_out in curves:
                axis.plot(*zip(*curves[held_out]), f"{color}o--", label=held_out, markersize=4)
        axis.set(xlabel="training step", title=title)
        axis.legend(fontsize=8)
    return save(figure, out / "curves.png")


def main():
    args = arguments()
    with rows.writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    run = load_run(args)
    held_out = read(args.data)
    if "policy" in held_out.biased:
        args.beta = None  # no objective: its KL is an expectation over what the policy itself samples
    data = load_completions(args, get_device())
    for completions in data.values():
        quantile_rewards(args, completions)

    values = measure(args, held_out, data)
    table = {}
    for name, columns in values.items():
        table[name] = {column: mean_and_se(of_prompts) for column, of_prompts in columns.items()}
    content = {
        "run": run,
        "made_by": held_out.made_by,
        "odd": oddities(args, held_out, data),
        "lines": as_text(table),
        "verdict": "" if args.beta is None else verdict(args, table),
        "total": len(data["policy"].ids),
        "prompts": page_rows(args, data["policy"], values["mean reward"]),
    }
    show(content)
    results = {
        "step": run["config"].get("steps"),
        "beta": args.beta,
        "transform": args.transform,
        "prompts": content["total"],
        "odd": content["odd"],
    } | table
    write(args, results, data["policy"])
    pictures = [draw_results(args, values["mean reward"])]
    if args.beta is not None:
        pictures.append(draw_optimum(args, results, data))
    if (args.out / "metrics.jsonl").exists():
        pictures.append(draw_curves(args.out))
    write_page(args, pictures, content)
    made = f"{args.out}: report.html for a browser, results.json, samples.npz, {len(pictures)} pictures"
    print("; ".join([made, *content["odd"]]))


if __name__ == "__main__":
    main()
