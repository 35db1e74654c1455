"""Compare a trained policy with its reference model on held-out prompts.

Reads two folders of rewarded samples of the same prompts (generate_refs.py and score.py, run with each model) and both
models; prints a table and writes it to OUT/results.json, with a picture, OUT/results.png. Standard errors are over
prompts. The KL is the mean log-ratio of the policy's own samples, so it is unbiased where they were sampled at
temperature 1 and top_p 1.

    python evaluate.py --model=out/qrpo --ref_model=data/minicode/model --data=out/qrpo/test --ref_data=out/test \
        --out=out/qrpo
"""
import argparse
import math
from pathlib import Path

import numpy as np

import dataset
import models
import rows


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="the policy: a Hugging Face folder")
    add("--ref_model", required=True, help="the reference model")
    add("--data", required=True, help="rewarded samples of the policy")
    add("--ref_data", required=True, help="rewarded samples of the reference model, to the same prompts")
    add("--out", required=True, help="folder for results.json and results.png")
    add("--batch_size", type=int, default=32, help="completions in a forward pass (default %(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU, or float32")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    return parser.parse_args()


def per_prompt(table):
    """For each row, by id: the means of reward, of full marks and of length over its samples; unknown rewards left
    out.
    """
    out, unknown = {}, 0
    for row in table:
        rewards = [math.nan if r is None else r for r in row["ref_rewards"]]
        known = [r for r in rewards if not math.isnan(r)]
        unknown += len(rewards) - len(known)
        lens = [len(c["token_ids"]) for c in row["ref_completions"]]
        solved = [r >= 1 for r in known]
        out[row["id"]] = *((np.mean(known), np.mean(solved)) if known else (math.nan, math.nan)), np.mean(lens)
    return out, unknown


def mean_and_se(values):
    """Mean and its standard error over prompts; NaN (prompts without a known reward) left out."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def log_ratios(args, device):
    """log pi - log pi_ref of every sample of the policy (n,), and the row of each."""
    tokenizer, logps = models.load_tokenizer(args.model, args.trust_remote_code), []
    dtype = models.pick_dtype(args.dtype, device)
    for path in (args.model, args.ref_model):
        model = models.load_model(path, dtype, device, args.trust_remote_code)
        if not logps:
            data = dataset.build(args.data, tokenizer, model, "refs")
        logps.append(dataset.logps(models.Policy(model), data, args.batch_size, device).double().cpu().numpy())
    return logps[0] - logps[1], data["row"]


def main():
    args = arguments()
    needed = "ref_completions", "ref_rewards"
    table, ref_table = rows.read(args.data, require=needed), rows.read(args.ref_data, require=needed)
    ids = [row["id"] for row in table]
    if set(ids) != {row["id"] for row in ref_table}:
        rows.fail(f"{args.data} and {args.ref_data} hold different prompts; sample both models on the same data")
    (policy, unknown), (reference, ref_unknown) = per_prompt(table), per_prompt(ref_table)
    log_ratio, row = log_ratios(args, models.device())
    kl = mean_and_se([log_ratio[row == r].mean() for r in np.unique(row)])

    columns = np.array([policy[i] for i in ids]), np.array([reference[i] for i in ids])  # (prompts, 3)
    results = {"prompts": len(ids), "unknown_rewards": [ref_unknown, unknown]}
    print(f"\n{len(ids)} held-out prompts; mean +- standard error over prompts\n")
    print(f"{'':24}{'reference':>18}{'policy':>18}{'difference':>18}")
    for k, name in enumerate(("mean reward", "full marks (reward 1)", "length, tokens")):
        cells = [mean_and_se(v[:, k]) for v in (columns[1], columns[0], columns[0] - columns[1])]
        results[name] = dict(zip(("reference", "policy", "difference"), cells))
        digits = 1 if k == 2 else 4
        print(f"{name:24}" + "".join(f"{f'{m:.{digits}f} +- {se:.{digits}f}':>18}" for m, se in cells))
    results["KL"] = kl
    print(f"{'KL to reference, nats':24}{'0':>18}{f'{kl[0]:.4f} +- {kl[1]:.4f}':>18}")
    if unknown + ref_unknown:
        print(f"left out: unknown rewards of {ref_unknown} reference and {unknown} policy samples")
    out = Path(args.out)
    rows.write_json(out / "results.json", results)
    plot(out / "results.png", columns[1][:, 0], columns[0][:, 0], results)
    print(f"\n{out / 'results.json'} and the picture {out / 'results.png'}")


def plot(path, reference, policy, results):
    """Left: mean rewards with three standard errors. Right: each prompt's mean reward, before and after."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (bars, points) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    reward = results["mean reward"]
    for name in ("reference", "policy"):
        bars.bar(name, reward[name][0], yerr=3 * reward[name][1], capsize=6)
    bars.set(ylabel="mean reward", title="held-out prompts (bars: 3 standard errors)")
    points.scatter(reference, policy, s=12, alpha=0.6)
    ends = [np.nanmin([reference, policy]), np.nanmax([reference, policy])]
    points.plot(ends, ends, "k:", linewidth=1)
    points.set(xlabel="reference model's mean reward", ylabel="policy's mean reward", title="one point a prompt")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
