"""The paper's tables and figures (arXiv 2507.08068) from the runs on disk.

Reads every evaluated run in --runs (see protocol.py). Half of the test prompts selects hyperparameters and
checkpoint, the other half is reported. Prints what it finds, and writes to --out:

    table      one row per method: table.md, table.csv (tables 2 and 3)
    compare    the method that the rule picks minus each other, prompt by prompt: compare.csv
    frontier   reward against KL, one point per setting, below the curve that no policy can pass
    figure1    the methods' rewards as bars
    figure3    reward against the number of reference rewards, for each beta
    figure4    log-ratio against normalised completion length, over all test prompts
    figure5    density of the reward under pi_ref and under pi*; needs no runs
    ties       what `paper` and `exact` converge to if rewards tie, on a toy problem; needs no runs
    figure6    held-out log-ratio of better and worse completions over the steps
    alpaca     each method's completions as AlpacaEval's JSON

A figure is a PNG with its numbers in a CSV; the paper's own results (published.json) are shown beside them.
The flags in --by define a method: `table --by=loss,quantile,train_on,beta` has a row for every beta.

    python paper/results.py table --runs=out/mini --out=out/results
"""
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import protocol  # noqa: E402
import qrpo  # noqa: E402
import rows  # noqa: E402
from model import load_tokenizer  # noqa: E402
from protocol import pd, stats  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PUBLISHED = rows.load_json(Path(__file__).with_name("published.json"))  # by loss; base: before training
ORDER = {loss: i for i, loss in enumerate(PUBLISHED["leetcode"])}       # of methods; other losses come last


def parse_arguments():
    parser = rows.Parser(__doc__)
    add = parser.add_argument
    add("what", choices=COMMANDS)
    add("--runs", nargs="+", help="folders that contain the runs of one dataset, at any depth")
    add("--out", type=Path, default=Path("out/results"), help="folder to write to")
    add("--by", help="flags of train.py that define a method; by default loss,quantile,train_on for the "
        "table, and loss for the others; figure3 has its own")
    add("--select", default="paper", choices=("paper", "reward", "objective"),
        help="choose a method's setting by the paper's rule, by mean reward alone, or by QRPO's objective")
    add("--method", help="compare: this one, by its name in the table, instead of the rule's pick")
    add("--beta", type=float, default=0.1, help="beta of the objective")
    add("--published", default="leetcode", choices=[name for name in PUBLISHED if name != "figure4"],
        help="the paper's results to show beside these")
    add("--tokenizer", help="count lengths in tokens of this tokenizer, as the paper does with the reward "
        "model's; by default in sampled tokens")
    args = parser.parse_args()
    if args.what not in ("figure5", "ties") and not args.runs:
        rows.fail("--runs is missing; name the folders that contain the runs")
    if args.what == "figure4" and args.tokenizer:
        rows.fail("--tokenizer: figure4 measures lengths in the model's own tokens; omit the flag")
    by = args.by or ("loss,quantile,train_on" if args.what == "table" else "loss")
    args.by = [flag.strip() for flag in by.split(",")]
    return args


# ---- methods ----

class Method(NamedTuple):
    name: str
    loss: str
    selected: str         # how the selected setting differs from the method's others
    models: pd.DataFrame  # the selected setting: a row of protocol.load for each training seed
    on_selection: list    # protocol.measure_thrice on the prompts to select on
    reported: dict        # protocol.measure on the others, with bounds of the reward

    def row(self):
        step = self.models["step"].iloc[0]
        head = {"method": self.name, "selected": self.selected, "loss": self.loss, "step": step}
        return head | self.reported


def load(args):
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    return protocol.load(args.runs, tokenizer)


def trained(models, loss=None):
    """Without the reference models, or only this loss."""
    found = models[models.loss == loss if loss else models.loss != "base"]
    if found.empty:
        rows.fail("--runs: contain no run for this figure")
    return found


def choose_methods(args, models, by):
    """The setting that each method selects, as a list of Method."""
    for flag in by:
        if flag not in models:
            rows.fail(f"--by: no run has a flag {flag!r}; they have {', '.join(models)}")
    prompts = protocol.halves(models.evaluation.iloc[0].prompts.difficulty)
    ends = protocol.scale(models.evaluation)
    found = []
    for _, group in models.groupby(["loss", *by], dropna=False, sort=False):
        if group.loss.iloc[0] != "base":
            found.append(choose_setting(group, method_name(group.iloc[0], by), prompts, ends, args))
    reference_models = models[models.loss == "base"].groupby("model")
    for model, group in reference_models:
        name = f"reference model {model}" if len(reference_models) > 1 else "reference model"
        found.append(choose_setting(group, name, prompts, ends, args))
    print(f"selected on {len(prompts[0])} prompts, reported on the other {len(prompts[1])}")
    found = [method for method in found if method]
    if not found:
        rows.fail("--runs: no method is left, for the reasons above")
    return sorted(found, key=lambda method: (ORDER.get(method.loss, len(ORDER)), method.name))


def method_name(model, by):
    words = []
    for flag in by:
        value = model[flag]
        if isinstance(value, str):
            words.append(value)
        elif value is not None:
            words.append(f"{flag} {value}")
    return " ".join(words)


def choose_setting(group, name, prompts, ends, args):
    """Select a setting of a method on half of the prompts, report it on the others. None, with the reason
    printed, if that cannot be done. ends: of the scale of rewards.
    """
    selection, report = prompts
    settings = [setting for _, setting in group.groupby("setting", sort=False)]
    seeds = set.intersection(*[set(setting.seed) for setting in settings])  # those that all settings have
    if not seeds:
        return left_out(name, "its settings have no training seed in common; train the missing ones")
    candidates, measures = [], []
    for setting in settings:
        evaluations = setting[setting.seed.isin(seeds)].evaluation
        thrice = protocol.measure_thrice(evaluations, selection, args.beta, ends)
        if not np.isnan(thrice[0]["reward"]):
            candidates.append(setting)
            measures.append(thrice)
    if not candidates:
        return left_out(name, "no reward is known")
    if args.select == "objective" and any(np.isnan(m["objective"]) for m, _, _ in measures):
        return left_out(name, NO_KL.format("objective"))
    best = protocol.select_surely(measures, args.select)
    if best is None:
        counts = ", ".join(str(m["unknown"]) for m, _, _ in measures)
        return left_out(name, f"unknown rewards decide which of its settings is best ({counts} in each); "
                        "score them again")
    chosen = candidates[best]
    flags = group.drop(columns=["seed", "run", "setting", "evaluation"])
    differ = [flag for flag in flags if flags[flag].map(str).nunique() > 1]  # str: --template_args is a dict
    selected = ", ".join(f"{flag} {chosen[flag].iloc[0]}" for flag in differ)
    reported = with_bounds(protocol.measure_thrice(chosen.evaluation, report, args.beta, ends))
    return Method(name, chosen.loss.iloc[0], selected, chosen, measures[best], reported)


NO_KL = "there is no {}, as its samples were not drawn at temperature 1 and top_p 1"


def left_out(name, reason):
    print(f"{name}: left out, {reason}")


def with_bounds(measures):
    """Of protocol.measure_thrice: the measures of the known rewards, and what the unknown ones could make of
    the mean reward.
    """
    known, low, high = measures
    return known | {"reward_low": low["reward"], "reward_high": high["reward"]}


# ---- tables and figures ----

def panels(n):
    figure, axes = plt.subplots(1, n, figsize=(4 * n, 3.4), layout="constrained", squeeze=False)
    return figure, axes[0]


def save(figure, out, name, table):
    """NAME.png and the numbers in it, NAME.csv."""
    figure.savefig(out / f"{name}.png", dpi=120)
    plt.close(figure)
    save_csv(out / f"{name}.csv", table)


def save_csv(path, table):
    pd.DataFrame(table).to_csv(path, index=False)
    print(path)


def table(args):
    methods = choose_methods(args, load(args), args.by)
    published = PUBLISHED[args.published]
    winner = protocol.select_surely([method.on_selection for method in methods], args.select)
    known = [method.reported for method in methods if not method.reported["unknown"]]
    best = {name: max([m[name] for m in known if not np.isnan(m[name])], default=None)
            for name in protocol.METRICS}
    best["length"] = best["kl"] = None  # more is not better
    head = ["method", "selected", "seeds", *protocol.METRICS, "std of reward", "the paper"]
    if len(known) < len(methods):
        head.insert(3, "unknown rewards: the mean reward with them")
    lines = [head, ["---"] * len(head)]
    for i, method in enumerate(methods):
        m = method.reported
        cells = [f"**{method.name}**" if i == winner else method.name, method.selected, str(m["seeds"])]
        if len(known) < len(methods):
            cells.append(unknown_rewards(m))
        cells += [cell(m, metric, m[metric] == best[metric]) for metric in protocol.METRICS]
        lines.append([*cells, f"{m['reward_std']:.4f}", " / ".join(map(str, published.get(method.loss, [])))])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    columns = " / ".join(published["columns"])
    text += f"\n\n{CAPTION} objective: at beta {args.beta}. The paper: {args.published}, {columns}."
    (args.out / "table.md").write_text(f"{text}\n")
    print(f"\n{text}\n\n{args.out / 'table.md'}")
    save_csv(args.out / "table.csv", [method.row() for method in methods])


CAPTION = (
    "Mean ± standard error over prompts ± standard error over training seeds. gain: the reward minus the "
    "mean reward of the references of the same prompt. std: over generation seeds, as in the paper. Unknown "
    "rewards are left out. Bold: the best of a column among methods that have none, and the method that the "
    "rule picks on the selection half, if unknown rewards cannot change that.")


def compare(args):
    """On the reported half, over the training seeds that both methods have."""
    models = load(args)
    methods = choose_methods(args, models, args.by)
    names = [method.name for method in methods]
    picked = protocol.select_surely([method.on_selection for method in methods], args.select)
    if args.method:
        rows.refuse(args.method not in names, f"--method={args.method}: must be one of {', '.join(names)}")
        picked = names.index(args.method)
    rows.refuse(picked is None, "unknown rewards decide which method is best; name one with --method")
    one = methods.pop(picked)
    report = protocol.halves(models.evaluation.iloc[0].prompts.difficulty)[1]
    head = [f"{one.name} minus", "seeds", *COMPARED, "objective, seed by seed"]
    found, lines = [], [head, ["---"] * len(head)]
    for other in methods:
        pairs = one.models.merge(other.models, on="seed")
        if pairs.empty:
            left_out(other.name, f"it has no training seed in common with {one.name}")
            continue
        if one.reported["unknown"] or other.reported["unknown"]:
            print(f"{other.name}: unknown rewards are left out")
        m = protocol.difference(pairs.evaluation_x, pairs.evaluation_y, report, args.beta)
        found.append({"method": one.name, "minus": other.name, **m})
        seed_by_seed = ", ".join(f"{value:.3f}" for value in m["objective_of_seeds"])
        lines.append([other.name, str(m["seeds"]), *[cell(m, metric, False) for metric in COMPARED],
                      seed_by_seed])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    save_csv(args.out / "compare.csv", found)


COMPARED = "reward", "full_marks", "kl", "objective"


def unknown_rewards(m):
    """How many there are, and the mean reward if all of them were the lowest or the highest of the scale."""
    if not m["unknown"]:
        return "0"
    return f"{m['unknown']} of {m['rewards']}: {m['reward_low']:.4f} to {m['reward_high']:.4f}"


def cell(m, metric, is_best):
    """A mean with its standard errors."""
    digits = 1 if metric == "length" else 4
    numbers = [m[metric], m[f"{metric}_se_prompts"]]
    if m["seeds"] > 1:
        numbers.append(m[f"{metric}_se_seeds"])
    if np.isnan(numbers[0]):
        return ""  # no KL where samples were not drawn at temperature 1
    texts = [f"{round(number, digits) + 0:.{digits}f}" for number in numbers]  # + 0: no "-0.0000"
    if is_best:
        texts[0] = f"**{texts[0]}**"
    return " ± ".join(texts)


# ---- reward against KL ----

BETAS = np.geomspace(0.01, 30, 60)  # of the curve
RESAMPLES = 200
SHOWN = {"reward": "mean reward", "full_marks": "full marks (share of rewards of 1)"}


def frontier(args):
    """Every setting on the reported half: means over training seeds, with standard errors over these; hollow
    with one seed. The bound is that of the pooled references of all seeds.
    """
    models = load(args)
    base = models[models.loss == "base"]
    if base.model.nunique() > 1:
        rows.fail("--runs: have several reference models, and KL is to one; name the runs of one")
    report = protocol.halves(models.evaluation.iloc[0].prompts.difficulty)[1]
    points = frontier_points(args, models, report)
    pool = np.concatenate([evaluation.ref_reward.iloc[report] for evaluation in base.evaluation], axis=1)
    curves = {"reward": bound(pool), "full_marks": bound(np.where(np.isnan(pool), np.nan, pool >= 1))}
    best = max(curve.kl.max() for curve in curves.values())
    limit = min(1.1 * points.kl.max(), 1.5 * best or np.inf)  # collapsed runs are far away
    # some rewards never reach 1
    shown = [metric for metric in SHOWN if metric == "reward" or (pool >= 1).any()]
    figure, axes = panels(len(shown))
    for axis, metric in zip(axes, shown):
        curve = curves[metric]
        label = f"best possible ({pool.shape[1]} references)"
        axis.plot(curve.kl, curve["mean"], "k", linewidth=1.2, label=label)
        axis.fill_between(curve.kl, curve.low, curve.high, color="k", alpha=0.15)
        for color, (method, of_method) in zip(COLORS, points.groupby("method")):
            beyond = (of_method.kl > limit).sum()
            label = f"{method} ({beyond} beyond)" if beyond else method
            for few, some in of_method.groupby(of_method.seeds < 2):
                axis.errorbar(some.kl, some[metric], some[f"{metric}_se_seeds"].fillna(0),
                              some.kl_se_seeds.fillna(0), fmt="o", markersize=4, linewidth=0.8, color=color,
                              markerfacecolor="none" if few else color, label=label)
                label = None  # once in the legend
        axis.set(xlabel="KL to the reference model, nats", ylabel=SHOWN[metric], xlim=(0, limit or 1))
    note = "hollow: one seed" if (points.seeds < 2).any() else ""
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper", title=note)
    figure.set_figwidth(3 + 4 * len(shown))
    save_csv(args.out / "frontier_bound.csv", pd.concat(c.assign(metric=name) for name, c in curves.items()))
    save(figure, args.out, "frontier", points)


COLORS = [*plt.get_cmap("tab20").colors[::2], *plt.get_cmap("tab20").colors[1::2]] * 2


def frontier_points(args, models, report):
    """A table of the settings that have a KL, a row each."""
    ends = protocol.scale(models.evaluation)
    points = []
    for _, setting in trained(models).groupby("setting", sort=False):
        first = setting.iloc[0]
        m = with_bounds(protocol.measure_thrice(setting.evaluation, report, args.beta, ends))
        name = method_name(first, args.by)
        if np.isnan(m["kl"]):
            left_out(f"{first.run}", "no reward is known" if np.isnan(m["reward"]) else NO_KL.format("KL"))
            continue
        if m["unknown"]:
            print(f"{name}, {first.run}: unknown rewards {unknown_rewards(m)}")
        points.append({"method": name, "beta": first["beta"], "learning_rate": first["learning_rate"], **m})
    if not points:
        rows.fail("--runs: no setting has a KL to the reference model, for the reasons above")
    return pd.DataFrame(points).sort_values(["method", "kl"])


def bound(scores):
    """The best mean score at every KL, from the references' scores (prompts, references), with a 95% interval
    (basic bootstrap): how the curve changes when every prompt's references are drawn again from its pool.
    """
    kl, mean = protocol.best_tradeoff(scores, BETAS)
    rng = np.random.default_rng(0)
    changes = []
    for _ in range(RESAMPLES):
        again = np.take_along_axis(scores, rng.integers(scores.shape[1], size=scores.shape), axis=1)
        its_kl, its_mean = protocol.best_tradeoff(again, BETAS)
        changes.append(np.interp(kl, its_kl[::-1], its_mean[::-1]) - mean)  # KL falls with beta
    low, high = np.quantile(changes, (0.025, 0.975), axis=0)
    highest = np.minimum(mean - low, np.nanmax(scores))
    return pd.DataFrame({"kl": kl, "mean": mean, "low": mean - high, "high": highest})


def legend_below(figure, axes, title=""):
    """One legend for all panels, beside what they show."""
    entries = {}
    for axis in axes:
        entries |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(entries.values(), entries, fontsize=8, loc="outside lower center", ncols=3, title=title,
                  title_fontsize=8)


def figure1(args):
    bars = pd.DataFrame([method.row() for method in choose_methods(args, load(args), args.by)])
    published = {loss: values[0] for loss, values in PUBLISHED[args.published].items() if loss != "columns"}
    bars["published"] = bars.loss.map(published)
    figure, (here, paper) = panels(2)
    here.bar(bars.method, bars.reward, yerr=bars.reward_se_prompts, capsize=4)
    here.set(ylabel="reward", title="these runs (bars: s.e. over prompts)")
    paper.bar(published.keys(), published.values(), color="C1")
    paper.set(ylabel=PUBLISHED[args.published]["columns"][0], title=f"the paper: {args.published}")
    for axis in (here, paper):
        axis.tick_params(axis="x", rotation=30)
    save(figure, args.out, "figure1", bars)


def figure3(args):
    """Only lines with at least two numbers of reference rewards."""
    points = []
    by = ["quantile", "train_on", "beta", "num_ref_rewards"]
    for method in choose_methods(args, trained(load(args), "qrpo"), by):
        first = method.models.iloc[0]
        pool = first.evaluation.ref_reward.shape[1]
        line = f"{first['quantile']} quantile, {first['train_on']}"
        n = first["num_ref_rewards"] or pool  # 0: all
        points.append({"beta": first["beta"], "line": line, "num_ref_rewards": n, **method.row()})
    points = pd.DataFrame(points).sort_values(["beta", "line", "num_ref_rewards"])
    points = points.groupby(["beta", "line"]).filter(lambda line: len(line) > 1)
    if points.empty:
        rows.fail("--runs: no beta was run with two numbers of reference rewards")
    colors = {line: f"C{i}" for i, line in enumerate(sorted(points.line.unique()))}
    over = "seeds" if (points.seeds > 1).all() else "prompts"  # one kind of bars in a figure
    figure, axes = panels(points.beta.nunique())
    for axis, (beta, panel) in zip(axes, points.groupby("beta")):
        for name, line in panel.groupby("line"):
            axis.errorbar(line.num_ref_rewards, line.reward, line[f"reward_se_{over}"], fmt="o-", capsize=3,
                          color=colors[name], label=name)
        axis.set(xscale="log", xlabel="reference rewards", ylabel="reward", title=f"beta {beta}")
        ticks = sorted(panel.num_ref_rewards.unique())
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
    legend_below(figure, axes, f"bars: standard error over {over}")
    save(figure, args.out, "figure3", points)
    print("the paper: offline flat; off-policy rises, at beta 0.003 from 0.183 with 1 to 0.188 with 50")


def figure4(args):
    methods = choose_methods(args, trained(load(args)), args.by)
    figure, axes = panels(len(methods))
    points, fits = [], []
    for axis, method in zip(axes, methods):
        samples = pd.concat([normalised_samples(e) for e in method.models.evaluation])
        x, y = samples.normalised_length, samples.log_ratio
        if x.nunique() < 2:
            rows.fail(f"{method.name}: its lengths do not differ, so there is no line to fit")
        fit = stats.linregress(x, y)
        rho = stats.spearmanr(x, y).statistic
        paper = PUBLISHED["figure4"].get(method.loss, "?")
        axis.scatter(x, y, s=3, alpha=0.2)
        axis.axline((0, fit.intercept), slope=fit.slope, color="k", linewidth=1.2)
        axis.set(xlabel="length, in standard deviations of the references'", ylabel="log-ratio, nats",
                 title=f"{method.name}: rho {rho:.2f} (paper {paper})")
        print(f"{method.name}: Spearman {rho:.3f} over {len(x)} samples, {fit.slope:.3g} nats a standard "
              f"deviation; paper {paper}")
        fits.append({
            "method": method.name, "selected": method.selected, "samples": len(x),
            "slope": fit.slope, "intercept": fit.intercept, "spearman": rho, "published": paper})
        points.append(samples.assign(method=method.name))
    save(figure, args.out, "figure4", pd.concat(points))
    save_csv(args.out / "figure4_fits.csv", fits)


def normalised_samples(evaluation):
    """Log-ratio of each sample, and its length in standard deviations from the mean of the references."""
    path = evaluation.folder.parents[1] / "samples.npz"
    if not path.exists():
        rows.fail(f"{path}: is missing; run evaluate.py on this model")
    samples = np.load(path)
    references = evaluation.ref_length.set_index(evaluation.prompts.id)
    references = references.loc[samples["row_ids"].astype(str)].iloc[samples["row"]]  # (samples, references)
    length = (samples["length"] - references.mean(axis=1)) / references.std(axis=1)
    table = pd.DataFrame({"normalised_length": length, "log_ratio": samples["log_ratio"]})
    return table[references.nunique(axis=1) > 1]


def figure5(args):
    reward = np.linspace(-4, 5, 901)
    columns = {"reward": reward, "pi_ref": stats.norm.pdf(reward)}
    figure, (axis,) = panels(1)
    for beta in (0.1, 0.01, 0.001):
        density, rises = optimum(beta, reward)
        columns[f"beta {beta}"] = density
        axis.plot(reward, density, label=f"pi*, beta {beta}: {rises:.0%} rises")
        print(f"beta {beta}: {1 - rises:.0%} of the reference's mass falls, {rises:.0%} rises")
    axis.plot(reward, columns["pi_ref"], "k--", label="pi_ref")
    axis.set(xlabel="reward", ylabel="density")
    legend_below(figure, [axis])
    save(figure, args.out, "figure5", columns)


def optimum(beta, reward):
    """The density of pi* = pi_ref e^{q/beta} / Z at these rewards, where pi_ref = N(0, 1); and the share of
    pi_ref's mass that rises: where q > beta log Z.
    """
    log_Z = qrpo.log_partition(torch.tensor([beta], dtype=torch.float64)).item()
    density = np.exp(stats.norm.logpdf(reward) + stats.norm.cdf(reward) / beta - log_Z)
    return density, 1 - beta * log_Z


def ties(args):
    """20 completions of one prompt, rewards of three levels, 16 references: every loss to convergence."""
    generator = torch.Generator().manual_seed(0)
    ref_logps = torch.log_softmax(torch.randn(20, generator=generator, dtype=torch.float64) / 2, 0)
    rewards = torch.tensor([0.0] * 12 + [0.5] * 5 + [1.0] * 3, dtype=torch.float64)
    beta = torch.tensor([0.1], dtype=torch.float64)
    below = (ref_logps.exp() * (rewards < rewards[:, None])).sum(1)
    not_above = (ref_logps.exp() * (rewards <= rewards[:, None])).sum(1)
    R = beta * qrpo.log_mean_exp(beta.expand(20), "identity", below, not_above)  # the exact quantile reward
    best = (beta * (ref_logps + R / beta).logsumexp(0)).item()
    curves = {"step": np.arange(1, 501)}
    figure, (axis,) = panels(1)
    for quantile in qrpo.QUANTILES:
        logps = train_toy(beta, ref_logps, rewards, quantile)                    # (steps, 20)
        objective = (logps.exp() * (R - beta * (logps - ref_logps))).sum(1)
        curves[quantile] = objective.numpy()
        axis.plot(curves["step"], curves[quantile], label=f"--quantile={quantile}: {objective[-1]:.2f}")
        shares = [f"{logps[-1].exp()[rewards == level].sum():.3f}" for level in (0, 0.5, 1)]
        print(f"{quantile}: objective {objective[-1]:.4f} of {best:.4f}; "
              f"mass on rewards 0, 0.5, 1: {', '.join(shares)}")
    axis.axhline(best, color="k", linestyle=":", linewidth=1, label=f"the optimum: {best:.2f}")
    axis.set(xscale="log", xlabel="step", ylabel="objective, exact quantiles, beta 0.1")
    axis.legend(loc="lower right")
    save(figure, args.out, "ties", curves)


def train_toy(beta, ref_logps, rewards, quantile, steps=500):
    """QRPO on the logits of a categorical policy, with fresh samples of pi_ref at every step; the policy's
    logps at each step, (steps, completions).
    """
    generator = torch.Generator().manual_seed(1)
    logits = ref_logps.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.02)
    found = []
    for _ in range(steps):
        y = torch.multinomial(ref_logps.exp(), 64, replacement=True, generator=generator)
        refs = torch.multinomial(ref_logps.exp(), 64 * 16, replacement=True, generator=generator).view(64, 16)
        logps = torch.log_softmax(logits, 0)
        loss = qrpo.qrpo_loss(
            beta, logps[y], ref_logps[y], rewards[y], rewards[refs], quantile=quantile).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(torch.log_softmax(logits.detach(), 0))
    return torch.stack(found)


def figure6(args):
    methods = choose_methods(args, trained(load(args)), args.by)
    figure, axes = panels(len(methods))
    points = []
    for axis, method in zip(axes, methods):
        logs = [pd.DataFrame(rows.complete_lines(run / "metrics.jsonl")) for run in method.models.run]
        log = pd.concat(logs)
        for side, color in {"better": "C0", "worse": "C3"}.items():
            column = f"eval_log_ratio_{side}"
            if column not in log:
                rows.fail(f"{method.name}: its metrics.jsonl has no {column}; train with --eval_data")
            curve = log.dropna(subset=column).groupby("step")[column].agg(["mean", "count", "sem"])
            error = curve["sem"].fillna(0)  # one seed has none
            axis.errorbar(curve.index, curve["mean"], error, fmt="o-", capsize=3, color=color, label=side)
            points.append(curve.reset_index().assign(method=method.name, side=side))
        axis.axhline(0, color="k", linestyle=":", linewidth=1)
        axis.set(xlabel="step", ylabel="held-out log-ratio, nats", title=method.name)
    legend_below(figure, axes, "bars: standard error over training seeds")
    points = pd.concat(points).rename(columns={"mean": "log_ratio", "count": "seeds", "sem": "se_seeds"})
    save(figure, args.out, "figure6", points)


def alpaca(args):
    """The first sample of the first training seed, for every prompt."""
    for method in choose_methods(args, load(args), args.by):
        evaluation = method.models.evaluation.iloc[0]
        answers = []
        for row in rows.read(evaluation.folder):
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            text = row[evaluation.field][0]["text"]
            answers.append({"instruction": prompt, "output": text, "generator": method.name})
        path = args.out / f"alpaca-{re.sub('[^A-Za-z0-9._-]+', '-', method.name)}.json"
        rows.write_json(path, answers)
        print(path)


COMMANDS = {"table": table, "compare": compare, "frontier": frontier, "figure1": figure1, "figure3": figure3,
            "figure4": figure4, "figure5": figure5, "ties": ties, "figure6": figure6, "alpaca": alpaca}


def main():
    args = parse_arguments()
    with rows.writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
