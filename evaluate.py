"""Compare a trained policy with its reference model on held-out prompts, and with the best that its beta allows.

Reads rewarded rows that hold both the reference model's completions (`ref_completions`, `ref_rewards`) and the policy's
(`samples`, `sample_rewards`), and both models. Prints a table; writes it to OUT/results.json, the samples' log-ratios
and quantiles to OUT/samples.npz, and two pictures, OUT/results.png and OUT/optimum.png.

    python evaluate.py --model=out/qrpo --ref_model=data/minicode/model --data=out/qrpo/test/rewarded --out=out/qrpo

Standard errors are over prompts. The KL is the mean log-ratio of the policy's own samples: unbiased where they were
sampled at temperature 1 and top_p 1. The objective that QRPO maximises is E[R] - beta KL, R the transformed quantile of
the reward (its `exact` cell among the reference rewards); no policy can have more than beta log Z of it.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch

import dataset
import figures
import flags
import models
import qrpo
import rows


TRANSFORMS = [name for name in qrpo.TRANSFORMS if name != "scaled-normal-icdf"]  # whose optimum differs by prompt


def arguments():
    parser = flags.parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the policy: a Hugging Face folder")
    add("--ref_model", required=True, help="the reference model")
    add("--data", required=True, help="rewarded rows with the completions of both")
    add("--out", required=True, help="folder for results and pictures")
    add("--beta", type=float, help="of the objective (default: that of the QRPO run in --model, else no objective)")
    add("--transform", choices=TRANSFORMS, help="of the quantile (default: that of the run, or identity)")
    add("--tokens", type=int, default=8192, help="padded tokens in a forward pass (default %(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU, or float32")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    args = flags.parse(parser)
    model = Path(args.model)  # a run, or a checkpoint in one
    records = [path for path in (model / "run.json", model.parent.parent / "run.json") if path.exists()]
    config = rows.load_json(records[0])["config"] if records else {}
    if config.get("loss") == "qrpo" and not config["length_normalize"] and config["transform"] in TRANSFORMS:
        args.beta = args.beta or config["beta"]
        args.transform = args.transform or config["transform"]
    args.transform = args.transform or "identity"
    args.step = int(model.name[5:]) if model.name.startswith("step_") else config.get("steps")
    return args


def mean_and_se(values):
    """Mean and its standard error over prompts; NaN (prompts without a known reward) left out."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def per_prompt(table, completions, rewards):
    """(prompts, 3): the means of reward, of full marks and of length over a prompt's completions; and how many rewards
    are unknown, which are left out.
    """
    out, unknown = [], 0
    for row in table:
        known = [r for r in row[rewards] if r is not None]
        unknown += len(row[rewards]) - len(known)
        out.append((np.mean(known), np.mean([r >= 1 for r in known])) if known else (math.nan, math.nan))
        out[-1] += (np.mean([len(c["token_ids"]) for c in row[completions]]),)
    return np.array(out), unknown


def samples_and_log_ratios(args, device):
    """The policy's samples as arrays (dataset.build), and log pi - log pi_ref of each (n,)."""
    tokenizer, logps = models.load_tokenizer(args.model, args.trust_remote_code), []
    dtype = models.pick_dtype(args.dtype, device)
    for path in (args.model, args.ref_model):
        model = models.load_model(path, dtype, device, args.trust_remote_code)
        if not logps:
            data = dataset.build(args.data, tokenizer, model, "samples", "sft")
        logps.append(dataset.logps(models.Policy(model), data, args.tokens, device).double().cpu().numpy())
    return data, logps[0] - logps[1]


def quantiles(args, rewards, ref_rewards, among_refs):
    """Cells lo, hi and the transformed reward R of completions; (n,), (n, refs), (n,) bool -> three numpy (n,)."""
    values = [torch.as_tensor(np.asarray(x)) for x in (rewards, ref_rewards, among_refs)]
    lo, hi = qrpo.quantile_cells(*values)
    if args.beta is None:
        return lo.numpy(), hi.numpy(), ((lo + hi) / 2).numpy()
    beta = torch.full_like(lo, args.beta)
    return lo.numpy(), hi.numpy(), (beta * qrpo.log_mean_exp(beta, args.transform, lo, hi)).numpy()


def by_prompt(values, row):
    """Means of values (n,) over the completions of each prompt that has any; row (n,)."""
    return np.bincount(row, values)[np.unique(row)] / np.bincount(row)[np.unique(row)]


def main():
    args = arguments()
    table = rows.read(args.data, require=("ref_completions", "ref_rewards", "samples", "sample_rewards"))
    (reference, ref_unknown), (policy, unknown) = (per_prompt(table, *names) for names in (
        ("ref_completions", "ref_rewards"), ("samples", "sample_rewards")))
    data, log_ratio = samples_and_log_ratios(args, models.device())
    row, refs = data["row"], data["ref_rewards"]
    lo, hi, reward = quantiles(args, data["rewards"], refs[row], np.zeros(len(row), bool))
    ref_row = np.nonzero(~np.isnan(refs))[0]
    ref_lo, ref_hi, ref_reward = quantiles(args, refs[~np.isnan(refs)], refs[ref_row], np.ones(len(ref_row), bool))

    results = {"step": args.step, "prompts": len(table), "unknown_rewards": [ref_unknown, unknown]}
    print(f"\n{len(table)} held-out prompts; mean +- standard error over prompts\n")
    print(f"{'':24}{'reference':>18}{'policy':>18}{'difference':>18}")

    def line(name, digits, *columns):
        results[name] = dict(zip(("reference", "policy", "difference"), columns))
        print(f"{name:24}" + "".join(f"{f'{m:.{digits}f} +- {se:.{digits}f}':>18}" for m, se in columns))

    for k, (name, digits) in enumerate((("mean reward", 4), ("full marks (reward 1)", 4), ("length, tokens", 1))):
        if k != 1 or max(np.nanmax(refs), data["rewards"].max()) <= 1:  # other rewards have no such mark
            line(name, digits, *(mean_and_se(v[:, k]) for v in (reference, policy, policy - reference)))
    kl, ref_means, means = by_prompt(log_ratio, row), by_prompt(ref_reward, ref_row), by_prompt(reward, row)
    line("quantile reward", 4, mean_and_se(ref_means), mean_and_se(means))
    line("KL to reference, nats", 4, (0.0, 0.0), mean_and_se(kl))
    if args.beta is not None:
        best = args.beta * qrpo.log_partition(torch.tensor([args.beta]), args.transform).item()
        line(f"- {args.beta:g} KL: objective", 4, mean_and_se(ref_means), mean_and_se(means - args.beta * kl))
        results["optimality"] = {"beta": args.beta, "transform": args.transform, "quantile_reward": mean_and_se(means),
                                 "objective": mean_and_se(means - args.beta * kl), "best_possible": best}
        print(f"objective {results['optimality']['objective'][0]:.4f} of a possible {best:.4f} (beta log Z)")
    if unknown + ref_unknown:
        print(f"left out: unknown rewards of {ref_unknown} reference and {unknown} policy samples")
    for name, field in ("reference", "ref_completions"), ("policy", "samples"):
        print(f"{name}'s first sample to row {table[0]['id']}: {table[0][field][0]['text'][:200]!r}")

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "samples.npz", log_ratio=log_ratio, length=data["lens"] - data["prompt_lens"], row=row,
             reward=data["rewards"], lo=lo, hi=hi, row_ids=data["ids"])
    rows.write_json(out / "results.json", json.loads(json.dumps(results), parse_constant=lambda nan: None))
    figures.results(out / "results.png", reference[:, 0], policy[:, 0], results["mean reward"])
    pictures = f"the picture {out / 'results.png'}"
    if args.beta is not None:
        start = {"step": 0, "optimality": results["optimality"] | dict.fromkeys(
            ("quantile_reward", "objective"), mean_and_se(ref_means))}
        before = [rows.load_json(path) for path in sorted(out.glob("checkpoints/*/results.json"))]
        t = torch.linspace(0, 1, 201)
        curve = (qrpo.apply_transform(t, args.transform) - best) / args.beta
        figures.optimum(out / "optimum.png", lo, hi, ref_lo, ref_hi, np.exp((ref_reward - best) / args.beta),
                        (t.numpy(), curve.exp().numpy()), [start, *before, results])
        pictures = f"the pictures {out / 'results.png'} and {out / 'optimum.png'}"
    print(f"\n{out / 'results.json'}, and {pictures}")


if __name__ == "__main__":
    main()
