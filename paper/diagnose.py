"""Where a trained policy falls short of the best possible objective, on training and on held-out prompts
(docs/optimum.md explains the numbers).

Reads an OUT folder of run.sh (--data, with train/rewarded and test/rewarded) and runs in it. Samples each
policy on the training prompts, and the reference model afresh on all prompts, and scores these samples with
--reward. Writes diagnosis.csv, calibration.csv and diagnosis.png to --out. Samples are reused.

    python paper/diagnose.py --data=out --runs qrpo qrpo_online
"""
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dataset  # noqa: E402
import evaluate  # noqa: E402
import qrpo  # noqa: E402
import rows  # noqa: E402
from model import Policy, get_device, load_model, load_tokenizer  # noqa: E402
from protocol import pd, xlogy  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def parse_arguments():
    parser = rows.Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("out"), help="folder of train/rewarded, test/rewarded and the runs")
    add("--runs", nargs="+", required=True, help="names of runs in it")
    add("--ref_model", default="data/minicode/model", help="their reference model")
    add("--reward", default="tests", help="their reward, as score.py's")
    add("--beta", type=float, default=0.1, help="of the objective")
    add("--max_new_tokens", type=int, default=64, help="longest completion, in tokens")
    add("--out", type=Path, default=Path("out/diagnosis"), help="folder to write to")
    return parser.parse_args()


SAMPLES = 4                       # of each policy for every training prompt
FRESH = {"train": 8, "test": 32}  # samples of the reference model for every prompt
SEED = 1000                       # so these are not the references


# ---- samples and their log-ratios ----

def check_samples(args):
    """Refuse what was not sampled from the model's own distribution: the estimates weigh completions by the
    probabilities of both models.
    """
    for run in args.runs:
        folder = args.data / run / "test/rewarded"
        row = next(rows.stream(folder))
        for field in ("samples", "ref_completions"):
            how = dataset.other_distribution(row, field)
            rows.refuse(how, f"{folder}: its {field} were sampled at {how}; sample at 1 and 1")


def sample(args, model, split, folder, num):
    """Rewarded samples of a model on the prompts of a split ("train" or "test"); the folder of their rows."""
    generate = [ROOT / "generate_refs.py", f"--model={model}", f"--data={args.data / split / 'rewarded'}",
                f"--out={folder / 'sampled'}", "--field=samples", f"--num_refs={num}", f"--seed={SEED}",
                f"--max_new_tokens={args.max_new_tokens}"]
    score = [ROOT / "score.py", f"--data={folder / 'sampled'}", f"--out={folder / 'rewarded'}",
             f"--reward={args.reward}"]
    for command in (generate, score):
        subprocess.run([sys.executable, *command], check=True)
    return folder / "rewarded"


def log_ratios(args, policy, folder, name):
    """The "samples" or the "refs" in a folder of rows as arrays (see dataset.build), with log_ratio (of this
    policy to the reference model), the quantile reward R, and the target; all (n,).
    """
    device, tokenizer, logps = get_device(), load_tokenizer(policy), []
    choices = dataset.Choices(train_on=name, needs_reward=True)
    with tempfile.TemporaryDirectory() as cache:
        for path in (policy, args.ref_model):
            model = load_model(path, torch.float32, device)
            data = dataset.load(folder, cache, path, tokenizer, model, choices)
            logps.append(dataset.all_logps(Policy(model), data, evaluate.FORWARD_TOKENS, device))
    data.log_ratio = logps[0].astype(float) - logps[1]
    evaluate.quantile_rewards(SimpleNamespace(beta=args.beta, transform="identity"), data)
    data.target = (data.R - best_possible(args.beta)) / args.beta
    return data


def best_possible(beta):
    """beta log Z."""
    return beta * qrpo.log_partition(torch.tensor([beta])).item()


# ---- the decomposition ----

def decompose(samples, refs, beta):
    """Means over prompts of the objective and its parts, and how much of the gap to the best possible lies in
    the tenth of the prompts that are worst.

    KL(pi, ref) = KL of the shares of every reward (classes) + the mean over these of KL(pi, ref) among the
    completions of one reward (waste): KL that buys no reward. Samples and references are put together, each
    weighted to stand for pi, or for ref, as if drawn from the mixture of both.
    """
    table = []
    for prompt in np.intersect1d(samples.row, refs.row):
        ours, theirs = samples.row == prompt, refs.row == prompt
        log_ratio = np.concatenate([samples.log_ratio[ours], refs.log_ratio[theirs]])
        R = np.concatenate([samples.R[ours], refs.R[theirs]])
        reward = np.concatenate([samples.rewards[ours], refs.rewards[theirs]])
        mixture = ours.sum() * np.exp(log_ratio) + theirs.sum()  # relative to ref
        pi, ref = np.exp(log_ratio) / mixture, 1 / mixture
        pi, ref = pi / pi.sum(), ref / ref.sum()
        classes = waste_passing = waste_failing = 0
        for value in np.unique(reward):
            same = reward == value
            share = pi[same].sum()
            between = xlogy(share, share / ref[same].sum())  # a share of a collapsed policy can round to 0
            within = (pi[same] * log_ratio[same]).sum() - between
            classes += between
            if value >= 1:
                waste_passing += within
            else:
                waste_failing += within
        table.append({
            "quantile_reward": (pi * R).sum(), "kl": (pi * log_ratio).sum(), "classes": classes,
            "waste_passing": waste_passing, "waste_failing": waste_failing,
            "passing": pi[reward >= 1].sum(), "passing_ref": ref[reward >= 1].sum()})
    parts = pd.DataFrame(table)
    parts["objective"] = parts.quantile_reward - beta * parts.kl
    parts["without_waste"] = parts.quantile_reward - beta * parts.classes
    gap = best_possible(beta) - parts.objective
    worst = gap.nlargest(math.ceil(len(gap) / 10))
    return parts.mean().to_dict() | {
        "objective_se": parts.objective.sem(), "gap_of_worst_tenth": worst.sum() / gap.sum(),
        "passing_ref_of_worst_tenth": parts.passing_ref[worst.index].mean()}


def cost_of_few_references(fresh, beta):
    """The objective of the optimum that knows which references were drawn, and of the one that knows only
    the reference model's distribution, here as the many fresh samples in `fresh`; means over prompts.
    """
    knowing, unknowing = [], []
    for prompt in np.unique(fresh.row):
        R = fresh.R[fresh.row == prompt]  # among the references that were drawn
        reward = torch.tensor(fresh.rewards[fresh.row == prompt])
        itself = torch.ones(len(reward), dtype=torch.bool)
        cells = qrpo.quantile_cells(reward, reward.expand(len(reward), -1), itself)
        true_R = beta * qrpo.log_mean_exp(torch.full_like(reward, beta), "identity", *cells).numpy()
        for rewards, objectives in ((R, knowing), (true_R, unknowing)):
            weight = np.exp(rewards / beta)
            weight /= weight.mean()  # pi / ref
            objectives.append((weight * R).mean() - beta * (weight * np.log(weight)).mean())
    return np.mean(knowing), np.mean(unknowing)


def calibration(data):
    """How far completions of the reference model are from their targets, passing and failing apart. mass: of
    the policy on them, the mean of e^log_ratio, next to the optimum's.
    """
    for name, chosen in {"passing": data.rewards >= 1, "failing": data.rewards < 1}.items():
        log_ratio, target = data.log_ratio[chosen], data.target[chosen]
        share = chosen.mean()
        yield {"completions": name, "share": share, "target": target.mean(), "log_ratio": log_ratio.mean(),
               "mass_at_optimum": share * np.exp(target).mean(), "mass": share * np.exp(log_ratio).mean()}


def main():
    args = parse_arguments()
    check_samples(args)
    with rows.writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    parts, calibrated = [], []
    for split in ("train", "test"):
        fresh = sample(args, args.ref_model, split, args.out / f"fresh_{split}", FRESH[split])
        for run in args.runs:
            policy = args.data / run
            folder = policy / "test/rewarded"  # run.sh has sampled these
            if split == "train":
                folder = sample(args, policy, split, args.out / run, SAMPLES)
            samples, refs = (log_ratios(args, policy, folder, name) for name in ("samples", "refs"))
            fresh_refs = log_ratios(args, policy, fresh, "samples")
            parts.append({"prompts": split, "run": run, **decompose(samples, refs, args.beta)})
            for kind, data in {"references": refs, "fresh": fresh_refs}.items():
                for line in calibration(data):
                    calibrated.append({"prompts": split, "run": run, "of": kind, **line})
        knowing, unknowing = cost_of_few_references(fresh_refs, args.beta)
        print(f"{split}: the optimum has {knowing:.4f} if it knows the references, {unknowing:.4f} if not")
    for name, table in {"diagnosis": parts, "calibration": calibrated}.items():
        table = pd.DataFrame(table)
        table.to_csv(args.out / f"{name}.csv", index=False)
        print(table.round(4).to_string(index=False))
    draw(pd.DataFrame(parts), args)


def draw(parts, args):
    """The gap of every run to the best possible, in two parts."""
    figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
    place = np.arange(len(parts))[::-1]
    rest = best_possible(args.beta) - parts.without_waste
    axis.barh(place, rest, label="too little mass on good rewards")
    axis.barh(place, parts.without_waste - parts.objective, left=rest, label="waste")
    axis.set_yticks(place, parts.prompts + ": " + parts.run, fontsize=8)
    axis.set(xlabel="objective, below the best possible")
    axis.legend(fontsize=8)
    figure.savefig(args.out / "diagnosis.png", dpi=120)


if __name__ == "__main__":
    main()
