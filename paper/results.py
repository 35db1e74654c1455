"""The paper's tables and figures (arXiv 2507.08068) from the runs on disk.

Reads every evaluated run below --runs (see protocol.py). Half of the test prompts selects hyper-parameters and
checkpoint, the other half is reported. Writes to --out, and prints:

    table      one row a method: table.md, table.csv (tables 2 and 3)
    figure1    the methods' rewards as bars
    figure3    reward against the number of reference rewards, for each beta
    figure4    log-ratio against normalised completion length, over all test prompts
    figure5    density of the reward under pi_ref and under pi*; needs no runs
    figure6    held-out log-ratio of chosen and rejected over the steps
    alpaca     each method's completions as AlpacaEval's JSON

Figures are PNGs with the CSV behind them; what the paper found (published.json) is printed or drawn beside. A method is
what --by tells apart: a row for every beta is `table --by=loss,quantile,train_on,beta,num_ref_rewards`.

    python paper/results.py table --runs=out/mini --out=out/results
"""
import csv
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import figures  # noqa: E402
import flags  # noqa: E402
import models  # noqa: E402
import protocol  # noqa: E402
import qrpo  # noqa: E402
import rows  # noqa: E402

PUBLISHED = rows.load_json(Path(__file__).with_name("published.json"))  # by loss; "base" is the model before training


def arguments():
    parser = flags.parser(__doc__)
    add = parser.add_argument
    add("what", choices=COMMANDS)
    add("--runs", nargs="+", default=[], help="folders that hold the runs of one data set, however deep")
    add("--out", type=Path, default=Path("out/results"), help="folder to write to (default %(default)s)")
    add("--by", help="flags of train.py that make a method (default: loss,quantile,train_on for the table, else loss)")
    add("--select", default="paper", choices=("paper", "reward"),
        help="choose a method's setting by the paper's rule, or by mean reward alone (default %(default)s)")
    add("--published", default="leetcode", choices=[name for name in PUBLISHED if name != "figure4"],
        help="which of the paper's results to show beside (default %(default)s)")
    add("--tokenizer", help="count lengths in tokens of this one, as the paper does with the reward model's (default: "
        "the sampled tokens)")
    args = flags.parse(parser)
    if args.what != "figure5" and not args.runs:
        rows.fail("--runs names no folder; give those that hold the runs")
    if args.what == "figure4" and args.tokenizer:
        rows.fail("--tokenizer: figure4 has the lengths of samples in the model's own tokens; leave it away")
    if args.out.exists() and not args.out.is_dir():
        rows.fail(f"{args.out}: is a file; --out must name a folder")
    by = (args.by or ("loss,quantile,train_on" if args.what == "table" else "loss")).split(",")
    args.by = [field.strip() for field in by]
    return args


def chosen(args, by=None, only=lambda config: True):
    """The setting that each method selects, with its metrics (`measure`) on the other half of the prompts: a list of
    {method, selected (what was), loss, step, config, evaluations, on_selection (metrics there), seeds, reward, ...}.
    """
    by, groups, out = by or args.by, {}, []
    tokenizer = args.tokenizer and models.load_tokenizer(args.tokenizer)
    candidates = [c for c in protocol.load(args.runs, tokenizer) if only(c["config"])]
    if not candidates:
        rows.fail(f"{', '.join(args.runs)}: holds no run for this figure")
    for field in by:
        if not any(field in c["config"] for c in candidates):
            rows.fail(f"--by: no run has a flag {field!r}; they have {', '.join(candidates[-1]['config'])}")
    selection, report = protocol.halves(next(iter(candidates[0]["evaluations"].values()))["difficulty"])
    bases = sum(c["config"]["loss"] == "base" for c in candidates)
    for c in candidates:
        fields = ["model"] if c["config"]["loss"] == "base" else by  # nobody selects among reference models
        groups.setdefault(tuple(c["config"].get(field) for field in ("loss", *fields)), []).append(c)
    for (loss, *values), group in groups.items():
        common = set.intersection(*(set(c["evaluations"]) for c in group))  # training seeds that all settings have
        on_selection = [protocol.measure(c, selection, common) for c in group]
        known = [i for i, m in enumerate(on_selection) if not math.isnan(m["reward"])]
        if not known:
            print(f"{' '.join(map(str, (loss, *values)))}: left out, no reward is known")
            continue
        best = known[protocol.select([on_selection[i] for i in known], args.select)]
        words = [v if isinstance(v, str) else f"{field} {v}" for field, v in zip(by, values) if v is not None]
        if loss == "base":
            words = ["reference model", *values[:bases > 1]]
        out.append({"method": " ".join(words), "selected": differing(group, group[best]), "loss": loss, **group[best],
                    "on_selection": on_selection[best], **protocol.measure(group[best], report)})
    print(f"selected on {len(selection)} prompts, reported on the other {len(report)}")
    order = list(PUBLISHED["leetcode"])
    return sorted(out, key=lambda m: (order.index(m["loss"]), m["method"]))


def differing(group, c):
    """What tells a setting from the others of its group, in words."""
    settings = [other["config"] | {"step": other["step"]} for other in group]
    fields = [field for field in settings[0] if len({str(s.get(field)) for s in settings}) > 1]
    return ", ".join(f"{field} {(c['config'] | {'step': c['step']}).get(field)}" for field in fields)


# ---- tables and figures ----

def write_csv(path, table):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, table[0])
        writer.writeheader()
        writer.writerows(table)
    print(path)


def flat(method):
    """A method as a row of a CSV."""
    return {key: v for key, v in method.items() if key not in ("config", "evaluations", "on_selection")}


def table(args):
    methods, published = chosen(args), PUBLISHED[args.published]
    winner = protocol.select([m["on_selection"] for m in methods], args.select)
    head = "method", "selected", "seeds", *protocol.METRICS, "std of reward", "the paper"
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for i, m in enumerate(methods):
        cells = [f"**{m['method']}**" if i == winner else m["method"], m["selected"], str(m["seeds"])]
        for name in protocol.METRICS:
            digits = 1 if name == "length" else 4
            mean, *errors = (f"{round(m[name + s], digits) + 0:.{digits}f}" for s in ("", "_se_prompts", "_se_seeds"))
            best = name != "length" and m[name] == max(other[name] for other in methods)
            cells.append(" ± ".join([f"**{mean}**" if best else mean, *errors[:1 + (m["seeds"] > 1)]]))
        cells += [f"{m['reward_std']:.4f}", " / ".join(map(str, published.get(m["loss"], ())))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Mean ± standard error over prompts ± standard error over training seeds; gain: of reward over the "
              "references' of the same prompt; std: over generation seeds, as the paper. Bold: the best of a column, "
              "and the method that the rule picks on the selection half. The paper: "
              f"{args.published}, {' / '.join(published['columns'])}."]
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("", *lines, "", args.out / "table.md", sep="\n")
    write_csv(args.out / "table.csv", [flat(m) for m in methods])


def figure1(args):
    methods, published = chosen(args), dict(PUBLISHED[args.published])
    columns = published.pop("columns")
    figure, axes = figures.panels(2)
    axes[0][0].bar([m["method"] for m in methods], [m["reward"] for m in methods],
                   yerr=[m["reward_se_prompts"] for m in methods], capsize=4)
    axes[0][0].set(ylabel="reward", title="these runs (bars: s.e. over prompts)")
    axes[0][1].bar(published.keys(), [v[0] for v in published.values()], color="C1")
    axes[0][1].set(ylabel=columns[0], title=f"the paper: {args.published}")
    for axis in axes[0]:
        for label in axis.get_xticklabels():
            label.set(rotation=30, horizontalalignment="right")
    figures.save(figure, args.out / "figure1.png")
    write_csv(args.out / "figure1.csv", [flat(m) | {"published": published.get(m["loss"], [""])[0]} for m in methods])


def figure3(args):
    """Lines only where a beta has two numbers of reference rewards or more."""
    points = []
    for m in chosen(args, ["quantile", "train_on", "beta", "num_ref_rewards"], lambda c: c["loss"] == "qrpo"):
        config, pool = m["config"], next(iter(m["evaluations"].values()))["ref_reward"].shape[1]
        points.append({"beta": config["beta"], "line": f"{config['quantile']} quantile, {config['train_on']}",
                       "num_ref_rewards": config["num_ref_rewards"] or pool, **flat(m)})  # 0: all
    points.sort(key=lambda p: (p["beta"], p["line"], p["num_ref_rewards"]))
    lines = {key: list(line) for key, line in itertools.groupby(points, lambda p: (p["beta"], p["line"]))}
    lines = {key: line for key, line in lines.items() if len(line) > 1}
    betas, names = (sorted({key[k] for key in lines}) for k in (0, 1))
    if not betas:
        rows.fail(f"{', '.join(args.runs)}: no beta was run with two numbers of reference rewards")
    figure, axes = figures.panels(len(betas))
    for (beta, name), line in lines.items():
        axis = axes[0][betas.index(beta)]
        axis.errorbar([p["num_ref_rewards"] for p in line], [p["reward"] for p in line],
                      [p["reward_se_seeds"] if p["seeds"] > 1 else p["reward_std"] for p in line],
                      fmt="o-", color=f"C{names.index(name)}", capsize=3, label=name)
        axis.set(xscale="log", xlabel="reference rewards", ylabel="reward", title=f"beta {beta}")
        ticks = sorted({p["num_ref_rewards"] for key, points in lines.items() if key[0] == beta for p in points})
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.legend(fontsize=8)
    figures.save(figure, args.out / "figure3.png")
    write_csv(args.out / "figure3.csv", [p for line in lines.values() for p in line])
    print("error bars: standard error over training seeds, or with one the standard deviation over generation seeds\n"
          "the paper: offline flat; off-policy rises, at beta 0.003 from 0.183 with 1 to 0.188 with 50")


def ranks(values):
    """1-based ranks; ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x, y):
    return np.corrcoef(ranks(x), ranks(y))[0, 1]


def figure4(args):
    methods = [m for m in chosen(args) if m["loss"] != "base"]
    figure, axes = figures.panels(len(methods))
    points, fits = [], []
    for axis, m in zip(axes[0], methods):
        xs, ys = [], []
        for e in m["evaluations"].values():
            path = e["folder"].parents[1] / "samples.npz"
            if not path.exists():
                rows.fail(f"{path}: not there; run evaluate.py on this model")
            samples = np.load(path)
            place = {row_id: i for i, row_id in enumerate(e["ids"])}
            row = np.array([place[str(row_id)] for row_id in samples["row_ids"]])[samples["row"]]
            on = np.ptp(e["ref_length"], 1)[row] > 0
            mean, std = e["ref_length"].mean(1)[row], e["ref_length"].std(1, ddof=1)[row]
            xs.append((samples["length"] - mean)[on] / std[on])
            ys.append(samples["log_ratio"][on])
        x, y = np.concatenate(xs), np.concatenate(ys)
        if len(x) < 2 or np.ptp(x) == 0:
            rows.fail(f"{m['method']}: lengths do not differ, so there is no line to fit")
        slope, intercept = np.polyfit(x, y, 1)
        rho, paper = spearman(x, y), PUBLISHED["figure4"].get(m["loss"], "")
        axis.scatter(x, y, s=3, alpha=0.2)
        axis.plot(np.sort(x), intercept + slope * np.sort(x), "k-", linewidth=1.2)
        axis.set(xlabel="length, in standard deviations of the references'", ylabel="log-ratio, nats",
                 title=f"{m['method']}: rho {rho:.2f}" + (f" (paper {paper})" if paper else ""))
        fits.append({"method": m["method"], "selected": m["selected"], "samples": len(x), "slope": slope,
                     "intercept": intercept, "spearman": rho, "published": paper})
        points += [{"method": m["method"], "normalised_length": a, "log_ratio": b} for a, b in zip(x, y)]
        print("{method}: Spearman {spearman:.3f} over {samples} samples, {slope:.3g} nats a standard deviation; paper "
              "{published}".format(**fits[-1]))
    figures.save(figure, args.out / "figure4.png")
    write_csv(args.out / "figure4.csv", points)
    write_csv(args.out / "figure4_fits.csv", fits)


def optimum(beta, reward):
    """Under pi_ref = N(0, 1), at these rewards: densities of pi_ref and of pi* = pi_ref e^{q/beta}/Z; and the share of
    pi_ref's mass that pi* raises: what lies above q = beta log Z.
    """
    beta, reward = torch.tensor([beta], dtype=torch.float64), torch.as_tensor(reward, dtype=torch.float64)
    log_Z = qrpo.log_partition(beta)
    log_ref = -reward.square() / 2 - math.log(2 * math.pi) / 2
    log_ratio = torch.special.ndtr(reward) / beta - log_Z
    return log_ref.exp().numpy(), (log_ref + log_ratio).exp().numpy(), 1 - (beta * log_Z).item()


def figure5(args):
    reward, betas = np.linspace(-4, 5, 901), (0.1, 0.01, 0.001)
    figure, axes = figures.panels(1)
    columns = {"reward": reward}
    for beta in betas:
        columns["pi_ref"], columns[f"beta {beta}"], rises = optimum(beta, reward)
        print(f"beta {beta}: {1 - rises:.0%} of the reference's mass falls, {rises:.0%} rises")
        axes[0][0].plot(reward, columns[f"beta {beta}"], label=f"pi*, beta {beta}: {rises:.0%} rises")
    axes[0][0].plot(reward, columns["pi_ref"], "k--", label="pi_ref")
    axes[0][0].set(xlabel="reward", ylabel="density")
    axes[0][0].legend(fontsize=8)
    write_csv(args.out / "figure5.csv", [dict(zip(columns, values)) for values in zip(*columns.values())])
    figures.save(figure, args.out / "figure5.png")


def figure6(args):
    methods, points = [m for m in chosen(args) if m["loss"] != "base"], []
    figure, axes = figures.panels(len(methods))
    for axis, m in zip(axes[0], methods):
        curves = {}  # (side, step) -> one value a training seed
        for e in m["evaluations"].values():
            folder = e["folder"].parents[1]
            folder = folder if (folder / "metrics.jsonl").exists() else folder.parents[1]  # a checkpoint's run
            for line in rows.load_lines(folder / "metrics.jsonl"):
                for side in ("chosen", "rejected"):
                    if f"eval_log_ratio_{side}" in line:
                        curves.setdefault((side, line["step"]), []).append(line[f"eval_log_ratio_{side}"])
        for side, color in ("chosen", "C0"), ("rejected", "C3"):
            line = [{"method": m["method"], "side": side, "step": step, "log_ratio": np.mean(values),
                     "seeds": len(values), "se_seeds": math.sqrt(protocol.variance(values) / len(values))}
                    for (s, step), values in sorted(curves.items()) if s == side]
            axis.errorbar([p["step"] for p in line], [p["log_ratio"] for p in line],
                          np.nan_to_num([p["se_seeds"] for p in line]), fmt="o-", color=color, capsize=3, label=side)
            points += line
        axis.axhline(0, color="k", linestyle=":", linewidth=1)
        axis.set(xlabel="step", ylabel="held-out log-ratio, nats", title=m["method"])
        axis.legend(fontsize=8)
    if not points:
        rows.fail(f"{', '.join(args.runs)}: no metrics.jsonl holds eval_log_ratio_chosen; train with --eval_data")
    figures.save(figure, args.out / "figure6.png")
    write_csv(args.out / "figure6.csv", points)


def alpaca(args):
    """The first sample of the first training seed, for every prompt."""
    for m in chosen(args):
        e, out = next(iter(m["evaluations"].values())), []
        for row in rows.read(e["folder"]):
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            out.append({"instruction": prompt, "output": row[e["field"]][0]["text"], "generator": m["method"]})
        path = args.out / f"alpaca-{m['method'].replace(' ', '-')}.json"
        rows.write_json(path, out)
        print(path)


COMMANDS = {command.__name__: command for command in (table, figure1, figure3, figure4, figure5, figure6, alpaca)}


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
