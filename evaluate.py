"""Compare a trained policy with its reference model on held-out prompts, and with the best that its
beta allows.

Reads rewarded rows that hold completions of the reference model (`ref_completions`, `ref_rewards`) and
of the policy (`samples`, `sample_rewards`), and both models. Prints a table, and writes to OUT
results.json, samples.npz (log-ratio, quantile, reward and length of every sample) and pictures:
results.png, optimum.png, calibration.png, and the training curves of the run, curves.png. report.html
holds all of it, with the completions. Rewards that `score.py --name` added are shown, too.

    python evaluate.py --model=out/qrpo --ref_model=MODEL --data=out/qrpo/test/rewarded --out=out/qrpo

Standard errors are over prompts. The KL is the mean log-ratio of the policy's own samples; it and the
objective are left out if these were not sampled at temperature 1 and top_p 1, as they would be biased.
QRPO maximises the objective E[R] - beta KL, where R is the transformed quantile of the reward (its
`exact` cell among the reference rewards). No policy can exceed beta log Z.
"""
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

import dataset
import qrpo
import report
import rows
from model import Policy, get_device, get_dtype, load_model, load_tokenizer
from report import MODELS, label

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FORWARD_TOKENS = 8192  # padded tokens in a forward pass
DIGITS = {"length, tokens": 1}  # to print; 4 of all others


def arguments():
    parser = rows.Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the policy: a Hugging Face folder")
    add("--ref_model", required=True, help="the reference model")
    add("--data", required=True, help="rewarded rows with completions of both")
    add("--out", required=True, type=Path, help="folder for results and pictures")
    add("--beta", type=float, help="of the objective (default: that of the QRPO run in --model, or none)")
    add("--transform", choices=qrpo.TRANSFORMS, help="of the quantile (default: the run's, or identity)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    return parser.parse_args()


def load_run(args):
    """The settings of the run that made --model, a run's folder or a checkpoint in one; {} if it is
    neither. Fills in --beta and --transform.
    """
    model = Path(args.model)
    config = {}
    for path in (model.parent.parent / "run.json", model / "run.json"):
        if path.exists():
            config = rows.load_json(path)["config"]
    if model.parent.name == "checkpoints":
        config["steps"] = int(model.name.removeprefix("step_"))
    # with a beta of its own for every completion there is no one objective
    one_beta = not config.get("length_normalize") and config.get("transform") in qrpo.TRANSFORMS
    if config.get("has_targets") and one_beta:
        args.beta = args.beta or config["beta"]
        args.transform = args.transform or config["transform"]
    args.transform = args.transform or "identity"
    args.template_args = config.get("template_args", {})
    return config


# ---- rewards and log-ratios ----

def prompt_means(completions, rewards):
    """[mean reward, share of rewards of 1 or more, mean length in tokens] of one prompt; unknown
    rewards left out.
    """
    known = np.array([reward for reward in rewards if reward is not None], float)
    length = np.mean([len(c["token_ids"]) if "token_ids" in c else math.nan for c in completions])
    if len(known) == 0:
        return [math.nan, math.nan, length]
    return [known.mean(), (known >= 1).mean(), length]


def read_means(path):
    """What the rows say, as a namespace: first, a row; opinions, its rewards ("" is the one trained on, and
    "_judge" what `score.py --name=judge` added); means {(model, opinion): (prompts, 3)}, see `prompt_means`;
    unknown {model: how many rewards are}; sampling {field: how, if not at temperature 1 and top_p 1}.
    """
    found = SimpleNamespace(means={}, unknown={model: 0 for model in MODELS}, sampling={}, first=None)
    for row in rows.stream(path, require=("ref_completions", "ref_rewards", "samples", "sample_rewards")):
        if found.first is None:
            found.first = row
            columns = [name for name in row if name.startswith("sample_rewards")]
            found.opinions = sorted(name.removeprefix("sample_rewards") for name in columns)
        for model, (field, column) in MODELS.items():
            made = row.get("made_by", {}).get(field)
            if made and (made["temperature"], made["top_p"]) != (1, 1):
                found.sampling[field] = f"temperature {made['temperature']} and top_p {made['top_p']}"
            for opinion in found.opinions:
                rewards = row.get(column + opinion)
                if not isinstance(rewards, list) or len(rewards) != len(row[field]):
                    rows.fail(f"{row['__at__']}: needs as many {column}{opinion} as {field}; run score.py")
                found.means.setdefault((model, opinion), []).append(prompt_means(row[field], rewards))
                found.unknown[model] += rewards.count(None)
    found.means = {key: np.array(means) for key, means in found.means.items()}
    return found


def log_ratios(args, device):
    """The samples and the references as arrays (see dataset.build), each with log_ratio (n,), log pi -
    log pi_ref.
    """
    tokenizer = load_tokenizer(args.model, args.trust_remote_code, args.template_args)
    dtype = get_dtype(args.dtype, device)
    found, logps = {}, {"samples": [], "refs": []}
    with tempfile.TemporaryDirectory() as cache:
        for path in (args.model, args.ref_model):
            model = load_model(path, dtype, device, args.trust_remote_code)
            for name in logps:
                if name not in found:
                    choices = dataset.Choices(train_on=name, needs_reward=True)
                    found[name] = dataset.load(args.data, cache, args.model, tokenizer, model, choices)
                values = dataset.all_logps(Policy(model), found[name], FORWARD_TOKENS, device)
                logps[name].append(values.astype(float))
            del model
    for name, (policy, reference) in logps.items():
        found[name].log_ratio = policy - reference
    return found["samples"], found["refs"]


def quantile_rewards(args, data):
    """Adds to data the cells lo, hi of its completions' quantiles and R, their transformed rewards; all
    numpy (n,).
    """
    rewards = torch.tensor(data.rewards)
    ref_rewards = torch.tensor(data.ref_rewards[data.row])
    lo, hi = qrpo.quantile_cells(rewards, ref_rewards, torch.tensor(data.among_refs))
    data.lo, data.hi = lo.numpy(), hi.numpy()
    data.R = (data.lo + data.hi) / 2
    if args.beta is not None:
        beta = torch.full_like(lo, args.beta)
        data.R = (beta * qrpo.log_mean_exp(beta, args.transform, lo, hi)).numpy()


def by_prompt(values, row):
    """The means of values (n,) over the completions of every prompt that has any; row (n,)."""
    prompts, place = np.unique(row, return_inverse=True)
    return np.bincount(place, values) / np.bincount(place)


BIASED = {  # what is said of rows that were not sampled at temperature 1 and top_p 1
    "samples": "no KL and no objective, which are expectations over what the policy itself samples",
    "ref_completions": "the quantiles are not those among the reference model's own completions",
}


def mean_and_se(values):
    """The mean and its standard error; NaN (prompts without a known reward) left out."""
    values = values[~np.isnan(values)]
    se = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(se)


def compare(held_out, column, opinion=""):
    """Means and standard errors of a column of `prompt_means`, and of its difference."""
    before, after = (held_out.means[model, opinion][:, column] for model in MODELS)
    return {"reference": mean_and_se(before), "policy": mean_and_se(after),
            "difference": mean_and_se(after - before)}


def measure(args, held_out, samples, refs):
    """The table {name: {column: (mean, standard error)}}, and what is known of the optimum ({} without a
    beta).
    """
    table = {f"mean reward{label(opinion)}": compare(held_out, 0, opinion) for opinion in held_out.opinions}
    if max(np.nanmax(refs.rewards), np.nanmax(samples.rewards)) <= 1:  # otherwise there are no full marks
        table["full marks (reward 1)"] = compare(held_out, 1)
    table["length, tokens"] = compare(held_out, 2)
    ref_R, R = by_prompt(refs.R, refs.row), by_prompt(samples.R, samples.row)
    kl = by_prompt(samples.log_ratio, samples.row)
    table["quantile reward"] = {"reference": mean_and_se(ref_R), "policy": mean_and_se(R)}
    if "samples" not in held_out.sampling:
        table["KL to reference, nats"] = {"reference": (0.0, 0.0), "policy": mean_and_se(kl)}
    if args.beta is None:
        return table, {}
    objective = mean_and_se(R - args.beta * kl)
    table[f"- {args.beta:g} KL: objective"] = {"reference": mean_and_se(ref_R), "policy": objective}
    best = args.beta * qrpo.log_partition(torch.tensor([args.beta]), args.transform).item()
    return table, {"beta": args.beta, "transform": args.transform, "objective": objective,
                   "quantile_reward": mean_and_se(R), "best_possible": best}


def cells(name, columns):
    """A line of the table as text, one cell for each of reference, policy and difference."""
    digits = DIGITS.get(name, 4)
    return [f"{mean:.{digits}f} +- {se:.{digits}f}" for mean, se in columns.values()]


def show(table, optimality, held_out):
    """Print the table, and what a reader of it should know."""
    print(f"\n{len(held_out.means['policy', ''])} held-out prompts; mean +- standard error over prompts\n")
    print(f"{'':24}{'reference':>18}{'policy':>18}{'difference':>18}")
    for name, columns in table.items():
        print(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells(name, columns)))
    if optimality:
        print(f"objective {optimality['objective'][0]:.4f} of a possible {optimality['best_possible']:.4f} "
              "(beta log Z)")
    for field, how in held_out.sampling.items():
        print(f"{field} were sampled at {how}, not at 1 and 1: {BIASED[field]}")
    if any(held_out.unknown.values()):
        reference, policy = held_out.unknown.values()
        print(f"omitted: unknown rewards of {reference} reference and {policy} policy samples")
    first = held_out.first
    for model, (field, _) in MODELS.items():
        print(f"{model}'s first sample for row {first['id']}: {first[field][0]['text'][:200]!r}")


def main():
    args = arguments()
    config = load_run(args)
    held_out = read_means(args.data)
    samples, refs = log_ratios(args, get_device())
    for data in (samples, refs):
        quantile_rewards(args, data)
    if "samples" in held_out.sampling:
        args.beta = None  # no objective: its KL is an expectation over what the policy itself samples

    table, optimality = measure(args, held_out, samples, refs)
    show(table, optimality, held_out)
    results = {"step": config.get("steps"), "prompts": len(held_out.means["policy", ""]),
               "unknown_rewards": list(held_out.unknown.values()), "sampled_at": held_out.sampling} | table
    if optimality:
        results["optimality"] = optimality

    args.out.mkdir(parents=True, exist_ok=True)
    write(args, results, samples)
    pictures = [draw_results(args.out, held_out, table)]
    pictures += draw_run(args, config, results, samples, refs)
    numbers = [[name, *cells(name, columns)] for name, columns in table.items()]
    page = report.write(args, numbers, pictures, held_out.means, {"reference": refs, "policy": samples})
    print(f"\n{page}, results.json, {', '.join(pictures)} in {args.out}")


def write(args, results, samples):
    """OUT/samples.npz and OUT/results.json."""
    np.savez(args.out / "samples.npz", log_ratio=samples.log_ratio, length=samples.lens - samples.prompt_lens,
             row=samples.row, reward=samples.rewards, lo=samples.lo, hi=samples.hi, row_ids=samples.ids)
    without_nan = json.loads(json.dumps(results), parse_constant=rows.constant)
    rows.write_json(args.out / "results.json", without_nan)


# ---- pictures; each function writes one PNG and returns its name ----

def panels(n):
    figure, axes = plt.subplots(1, n, figsize=(4 * n, 3.4), layout="constrained", squeeze=False)
    return figure, axes[0]


def save(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path.name


CURVES = {"loss": "loss", "log_ratio": "log-ratio to the reference, nats", "kl": "KL to the reference, nats",
          "objective": "objective on fresh samples", "grad_norm": "gradient norm"}  # how metrics begin: title


def draw_run(args, config, results, samples, refs):
    """The pictures of a run that has a beta, and of its training."""
    pictures = []
    if args.beta is not None:
        pictures.append(draw_optimum(args, samples, refs, results))
        pictures.append(draw_calibration(args, config.get("quantile", "exact"), refs))
    if (args.out / "metrics.jsonl").exists():
        pictures.append(draw_curves(args.out))
    return pictures


def draw_curves(out):
    """The metrics over the steps: lines from training, points from held-out rows."""
    log = list(rows.complete_lines(out / "metrics.jsonl"))
    curves = {}  # metric: [(step, value)]
    for row in log:
        for name, value in row.items():
            curves.setdefault(name, []).append((row["step"], value))
    shown = [start for start in CURVES if any(name.startswith(start) for name in curves)]
    figure, axes = panels(len(shown))
    for axis, start in zip(axes, shown):
        for name in sorted(curves):
            if name.removeprefix("eval_").startswith(start):
                style = "o--" if name.startswith("eval_") else "-"
                axis.plot(*zip(*curves[name]), style, label=name, markersize=4, linewidth=1.2)
        axis.set(xlabel="step", title=CURVES[start])
        axis.legend(fontsize=8)
    return save(figure, out / "curves.png")


def draw_results(out, held_out, table):
    """For each reward, left: means with three standard errors. Right: each prompt's, before and after."""
    figure, axes = panels(2 * len(held_out.opinions))
    for opinion, bars, points in zip(held_out.opinions, axes[0::2], axes[1::2]):
        reference, policy = (held_out.means[model, opinion][:, 0] for model in MODELS)
        name = f"mean reward{label(opinion)}"
        for model in MODELS:
            mean, se = table[name][model]
            bars.bar(model, mean, yerr=3 * se, capsize=6)
        bars.set(ylabel=name, title="held-out prompts (bars: 3 standard errors)")
        points.scatter(reference, policy, s=12, alpha=0.6)
        ends = [np.nanmin([reference, policy]), np.nanmax([reference, policy])]
        points.plot(ends, ends, "k:", linewidth=1)
        points.set(xlabel=f"reference model's {name}", ylabel="policy's", title="one point per prompt")
    return save(figure, out / "results.png")


def histogram(lo, hi, weights=None, bins=20):
    """Density of quantiles, (bins,), with the mass of every completion spread evenly over its cell (lo,
    hi]; (n,).
    """
    edges = np.linspace(0, 1, bins + 1)
    inside = np.minimum(hi[:, None], edges[1:]) - np.maximum(lo[:, None], edges[:-1])  # (n, bins)
    return np.average(inside.clip(0) / (hi - lo)[:, None], axis=0, weights=weights) * bins


def draw_optimum(args, samples, refs, results):
    """Left: density of the quantiles of the policy's samples, at the optimum in closed form, and at the
    optimum that these ties allow. Right: the objective and its bound over the checkpoints, with
    standard errors.
    """
    best = results["optimality"]["best_possible"]
    figure, (density, gap) = panels(2)
    edges = np.linspace(0, 1, 21)
    density.stairs(histogram(samples.lo, samples.hi), edges, fill=True, alpha=0.5, label="policy")
    weights = np.exp((refs.R - best) / args.beta)  # pi*/pi_ref
    density.stairs(histogram(refs.lo, refs.hi, weights), edges, color="C3", label="optimum, with these ties")
    t = torch.linspace(0, 1, 201)
    curve = ((qrpo.TRANSFORMS[args.transform].f(t) - best) / args.beta).exp()
    density.plot(t, curve, "k--", linewidth=1.2, label="optimum, continuous reward")
    density.axhline(1, color="k", linestyle=":", linewidth=1, label="reference model")
    density.set(xlabel="quantile among the reference rewards", ylabel="density", title="held-out samples")
    density.legend(fontsize=8)

    checkpoints = [rows.load_json(path) for path in sorted(args.out.glob("checkpoints/*/results.json"))]
    points = [*checkpoints, results]
    steps = [0] + [point["step"] or 0 for point in points]
    for name in ("quantile_reward", "objective"):
        start = results["quantile reward"]["reference"]
        means, errors = zip(start, *(point["optimality"][name] for point in points))
        gap.errorbar(steps, means, yerr=errors, fmt="o-", capsize=3, label=name.replace("_", " "))
    gap.axhline(best, color="k", linestyle=":", label="best possible")
    gap.set(xlabel="step", title="objective: quantile reward - beta KL")
    gap.legend(fontsize=8)
    return save(figure, args.out / "optimum.png")


def draw_calibration(args, quantile, refs):
    """Held-out references: the log-ratio that the loss asks for against the policy's, and the means
    over tenths.
    """
    beta = torch.full((len(refs.rewards),), args.beta)
    targets = qrpo.target_log_ratios(
        beta, torch.tensor(refs.rewards), torch.tensor(refs.ref_rewards[refs.row]), args.transform, quantile,
        torch.tensor(refs.among_refs)).numpy()
    figure, (asked, reached) = panels(2)
    asked.hist(targets, 50, alpha=0.6)
    asked.axvline(0, color="k", linestyle=":")
    asked.set(xlabel="target log-ratio, nats", ylabel="completions", title="what the loss asks for")
    reached.scatter(targets, refs.log_ratio, s=4, alpha=0.2)
    tenths = np.array_split(np.argsort(targets, kind="stable"), 10)
    reached.plot([targets[t].mean() for t in tenths], [refs.log_ratio[t].mean() for t in tenths], "ko-",
                 label="means over tenths")
    ends = np.array([targets.min(), targets.max()])
    reached.plot(ends, ends, "k:", label="target = reached")
    reached.set(xlabel="target log-ratio, nats", ylabel="policy's log-ratio", title="held-out references")
    reached.legend(fontsize=8)
    return save(figure, args.out / "calibration.png")


if __name__ == "__main__":
    main()
