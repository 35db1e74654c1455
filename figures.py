"""The pictures of a run: what its data ask for, how training went, and how near the policy is to its optimum.

train.py and evaluate.py call these with what they have just computed; each writes one PNG.

    python -c 'import figures; from pathlib import Path; figures.curves(Path("out/qrpo"))'
"""
import matplotlib
import numpy as np

import rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def panels(n):
    return plt.subplots(1, n, figsize=(4 * n, 3.4), layout="constrained", squeeze=False)


def save(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)


def spread_histogram(lo, hi, bins=20, weights=None):
    """Density of quantiles, (bins,), where each completion's mass lies evenly over its cell [lo, hi]; all are (n,)."""
    edges = np.linspace(0, 1, bins + 1)
    inside = np.clip(np.minimum(hi[:, None], edges[1:]) - np.maximum(lo[:, None], edges[:-1]), 0, None)
    return np.average(inside / (hi - lo)[:, None], axis=0, weights=weights) * bins


def curves(out):
    """curves.png: the metrics over the steps; lines from training, points from held-out rows."""
    log = rows.load_lines(out / "metrics.jsonl")
    groups = ("loss",), ("log_ratio", "log_ratio_chosen", "log_ratio_rejected"), ("loss_down",), ("grad_norm",)
    groups = [names for names in groups if any(names[0] in row for row in log)]
    figure, axes = panels(len(groups))
    titles = {"log_ratio": "log-ratio to the reference, nats", "loss_down": "share of the loss that pushes down"}
    for axis, names in zip(axes[0], groups):
        for i, name in enumerate(names):
            for prefix, style in (("", "-"), ("eval_", "o--")):
                points = [(row["step"], row[prefix + name]) for row in log if prefix + name in row]
                if points:
                    axis.plot(*zip(*points), style, color=f"C{i}", label=prefix + name, markersize=4, linewidth=1.2)
        axis.set(xlabel="step", title=titles.get(names[0], names[0]))
        axis.legend(fontsize=8)
    save(figure, out / "curves.png")


def data(out, lo, hi, targets):
    """data.png: where the training completions lie among the reference rewards, and what the loss asks of them."""
    figure, axes = panels(2)
    axes[0][0].stairs(spread_histogram(lo, hi), np.linspace(0, 1, 21), fill=True, alpha=0.6)
    axes[0][0].axhline(1, color="k", linestyle=":")
    axes[0][0].set(xlabel="quantile among ref_rewards, ties spread", ylabel="density",
                   title="training completions\n(dotted: the reference model's)")
    axes[0][1].hist(targets, 50, alpha=0.6)
    axes[0][1].axvline(0, color="k", linestyle=":")
    axes[0][1].set(xlabel="target log-ratio, nats", ylabel="completions",
                   title="what the loss asks\nof the training completions")
    save(figure, out / "data.png")


def calibration(out, targets, log_ratios, held_out):
    """calibration.png: target against achieved log-ratio, one point a completion, with means over tenths."""
    figure, axes = panels(1)
    axis = axes[0][0]
    axis.scatter(targets, log_ratios, s=4, alpha=0.2)
    tenths = np.array_split(np.argsort(targets, kind="stable"), 10)
    axis.plot([targets[t].mean() for t in tenths], [log_ratios[t].mean() for t in tenths], "ko-", label="tenths' means")
    ends = np.array([targets.min(), targets.max()])
    axis.plot(ends, ends, "k:", label="target = achieved")
    axis.set(xlabel="target log-ratio, nats", ylabel="achieved", title=f"{'held-out' if held_out else 'training'} rows")
    axis.legend(fontsize=8)
    save(figure, out / "calibration.png")


def results(path, reference, policy, means):
    """Left: mean rewards with three standard errors. Right: each prompt's mean reward, before and after."""
    figure, axes = panels(2)
    bars, points = axes[0]
    for name in ("reference", "policy"):
        bars.bar(name, means[name][0], yerr=3 * means[name][1], capsize=6)
    bars.set(ylabel="mean reward", title="held-out prompts (bars: 3 standard errors)")
    points.scatter(reference, policy, s=12, alpha=0.6)
    ends = [np.nanmin([reference, policy]), np.nanmax([reference, policy])]
    points.plot(ends, ends, "k:", linewidth=1)
    points.set(xlabel="reference model's mean reward", ylabel="policy's mean reward", title="one point a prompt")
    save(figure, path)


def optimum(path, lo, hi, ref_lo, ref_hi, weights, curve, checkpoints):
    """Left: density of the quantiles of the policy's samples, its closed form at the optimum (curve: t, density), and
    the optimum that these ties allow. Right: the objective and its bound over checkpoints, with standard errors.
    """
    figure, axes = panels(2)
    density, gap = axes[0]
    edges = np.linspace(0, 1, 21)
    density.stairs(spread_histogram(lo, hi), edges, fill=True, alpha=0.5, label="policy")
    best = spread_histogram(ref_lo, ref_hi, weights=weights)
    density.stairs(best, edges, color="C3", label="optimum, with these ties")
    density.plot(*curve, "k--", linewidth=1.2, label="optimum, continuous reward")
    density.axhline(1, color="k", linestyle=":", linewidth=1, label="reference model")
    density.set(xlabel="quantile among the reference rewards", ylabel="density", title="quantiles of held-out samples")
    density.legend(fontsize=8)
    steps = [c["step"] for c in checkpoints]
    for name in ("quantile_reward", "objective"):
        value = np.array([c["optimality"][name] for c in checkpoints], float)  # (checkpoints, 2): mean, standard error
        gap.errorbar(steps, value[:, 0], yerr=value[:, 1], fmt="o-", capsize=3, label=name.replace("_", " "))
    gap.axhline(checkpoints[-1]["optimality"]["best_possible"], color="k", linestyle=":", label="best possible")
    gap.set(xlabel="step", title="objective: quantile reward - beta KL")
    gap.legend(fontsize=8)
    save(figure, path)
