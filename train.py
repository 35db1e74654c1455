"""Train a language model from pointwise rewards with QRPO (or DPO, REBEL, SimPO, SFT on the same data).

Reads rewarded rows (score.py's output), writes OUT: a Hugging Face checkpoint, run.json (configuration, versions),
metrics.jsonl, curves.png, and checkpoints/ for --resume. One process, or several under torchrun (DDP):

    python train.py --model=data/minicode/model --data=out/scored --out=out/qrpo --beta=0.1 --learning_rate=3e-4
    torchrun --nproc_per_node=8 train.py --model=... --data=... --out=...

The policy starts as the reference model, so ref_logps are its own before step 0: no second model is ever in memory.
"""
import argparse
import contextlib
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dataset
import models
import qrpo
import rows

PAIRWISE = ("dpo", "simpo", "rebel")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # model and data
    add("--model", required=True, help="folder or hub name of the model to train; it is also the reference model")
    add("--ref_model", help="the reference model, where the policy does not start from it (a second round)")
    add("--data", required=True, help="JSONL file or folder of rewarded rows")
    add("--eval_data", help="held-out rows, of the same form")
    add("--out", required=True, help="folder of the run")
    add("--train_on", default="refs", choices=dataset.REGIMES,
        help="refs: all reference completions; best_worst: those two of them; random_pairs: references 0 and 1, "
        "2 and 3, ...; chosen_rejected: the dataset's pairs; completion: its single completions (default %(default)s)")
    add("--num_candidates", type=int, default=0, help="use the first so many references to train on; 0: all")
    add("--num_ref_rewards", type=int, default=0, help="use the first so many ref_rewards for quantiles; 0: all")
    add("--max_length", type=int, default=0,
        help="drop and count what has more tokens, prompt + completion; 0: nothing may exceed the context")
    # the loss
    add("--loss", default="qrpo", choices=("qrpo", *PAIRWISE, "sft"), help="(default %(default)s)")
    add("--beta", type=float, default=0.1, help="of the loss; QRPO: strength of the KL term (default %(default)s)")
    add("--transform", default="identity", choices=qrpo.TRANSFORMS, help="of the quantile, QRPO (default %(default)s)")
    add("--quantile", default="paper", choices=("paper", "exact"),
        help="QRPO: as published, or the cells that are right with ties too (default %(default)s)")
    add("--norm", default="mse", choices=("mse", "mae"), help="QRPO: squared or absolute (default %(default)s)")
    add("--gamma_beta_ratio", type=float, default=0.5, help="SimPO's margin, in nats a token (default %(default)s)")
    # optimisation
    add("--learning_rate", type=float, default=1e-6, help="peak of the cosine schedule (default %(default)s)")
    add("--warmup", type=float, default=0.1, help="share of the steps that warm up (default %(default)s)")
    add("--batch_size", type=int, default=256, help="completions (pairs, for pairwise losses) a step, over all ranks")
    add("--micro_batch_size", type=int, default=8, help="of these in one forward pass; the gradient is the same")
    add("--epochs", type=int, default=1, help="passes over the data (default %(default)s)")
    add("--weight_decay", type=float, default=0.0, help="AdamW's (default %(default)s)")
    add("--max_grad_norm", type=float, default=0.0, help="clip the gradient norm; 0: no clipping, as the paper")
    # the machine
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of forward and backward; weights are float32. auto: bfloat16 on a GPU")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--compile", action="store_true", help="torch.compile the model's body")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    # the run
    add("--seed", type=int, default=0, help="of the order of the data (default %(default)s)")
    add("--eval_every", type=int, default=0, help="steps between evaluations; 0: at the start and the end")
    add("--save_every", type=int, default=0, help="steps between checkpoints; 0: only at the end")
    add("--keep", type=int, default=1, help="newest checkpoints to keep resumable; older ones keep their model only")
    add("--resume", action="store_true", help="continue the run in OUT from its newest checkpoint")
    args = parser.parse_args()
    for name in ("beta", "learning_rate", "batch_size", "micro_batch_size", "epochs"):
        if not getattr(args, name) > 0:
            rows.fail(f"--{name} must be greater than 0")
    if args.loss in PAIRWISE and args.train_on not in dataset.PAIRED:
        rows.fail(f"--loss={args.loss} needs pairs; give --train_on={', '.join(dataset.PAIRED)}, or --loss=qrpo")
    return args


def losses(args, batch, logps):
    """The loss of every unit of a batch: a completion, or a pair (chosen at even, rejected at odd places). ->
    (units,)
    """
    beta, ref_logps = torch.tensor([args.beta], device=logps.device), batch["ref_logps"]
    if args.loss == "qrpo":
        return qrpo.qrpo_loss(beta, logps, ref_logps, batch["rewards"], batch["ref_rewards"], args.transform,
                              args.quantile, batch["among_refs"], batch["std"], args.norm)
    if args.loss == "sft":  # mean over the tokens of the whole step
        return -logps / batch["mean_length"]
    pair = logps[0::2], logps[1::2]
    ref_pair = ref_logps[0::2], ref_logps[1::2]
    if args.loss == "dpo":
        return qrpo.dpo_loss(beta, *pair, *ref_pair)
    if args.loss == "simpo":
        lens = batch["lens"] - batch["prompt_lens"]
        return qrpo.simpo_loss(beta, args.gamma_beta_ratio, *pair, lens[0::2], lens[1::2])
    return qrpo.rebel_loss(beta, *pair, *ref_pair, batch["rewards"][0::2], batch["rewards"][1::2])


def learning_rate(args, step, steps):
    """Linear warm-up, then a cosine to 0."""
    warmup = math.ceil(args.warmup * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def main():
    args = arguments()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = models.device()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype, main_rank, out = models.pick_dtype(args.dtype, device), rank == 0, Path(args.out)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # ---- data: flat arrays of tokens and rewards, the same on every rank ----
    tokenizer = models.load_tokenizer(args.model, args.trust_remote_code)
    model = models.load_model(args.model, torch.float32, device, args.trust_remote_code)
    train_data, eval_data = (
        path and dataset.build(path, tokenizer, model, args.train_on, args.num_candidates, args.num_ref_rewards,
                               args.max_length, ties=args.loss not in PAIRWISE, chosen_only=args.loss == "sft")
        for path in (args.data, args.eval_data))
    unit = 2 if args.loss in PAIRWISE else 1  # completions in a unit of the loss
    units = len(train_data["lens"]) // unit
    steps = args.epochs * math.ceil(units / args.batch_size)

    # ---- the run's folder ----
    config = vars(args) | {"data_fingerprint": dataset.fingerprint(train_data), "steps": steps}
    checkpoint = find_checkpoint(args, out, config)
    start = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
    if world > 1:
        dist.barrier()  # all have looked, before the first writes
    if main_rank:
        start_run(out, config, start)

    # ---- reference log-probabilities: the policy's own, before it moves ----
    policy = models.Policy(model)
    if args.compile:
        model.base_model.compile(dynamic=True)
    reference = policy
    if args.ref_model:
        reference = models.Policy(models.load_model(args.ref_model, torch.float32, device, args.trust_remote_code))
    with autocast:
        for data in filter(None, (train_data, eval_data)):
            data["ref_logps"] = reference_logps(args, out, reference, data, rank, world, device)
    del reference

    # ---- optimizer, resume, DDP ----
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():  # these layers recompute when they think they train; their dropouts stay off
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    if checkpoint:
        state = torch.load(checkpoint / "resume.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if world > 1:
        policy = DistributedDataParallel(policy)
    metrics = rows.open_part(out / "metrics.jsonl") if main_rank else None
    if main_rank:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:,.2f}M parameters, {units:,} "
              f"{'pairs' if unit == 2 else 'completions'}, {steps - start} steps on {world} x {device.type}, {dtype}")

    def evaluate(step):
        if eval_data:
            all_units = np.arange(len(eval_data["lens"]) // unit)
            total = totals(args, policy, eval_data, all_units, rank, world, device, autocast)
            if main_rank:
                rows.append(metrics, {"step": step} | {f"eval_{k}": v for k, v in total.items() if k != "tokens"})

    # ---- the loop ----
    if start == 0:
        evaluate(0)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=args.loss, unit="step", disable=not main_rank)
    for step in bar:
        began = time.time()
        batch_units = step_units(args, units, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, steps)
        total = totals(args, policy, train_data, batch_units, rank, world, device, autocast, backward=True)
        if step == 0 and not args.ref_model:
            gate(args, total["drift"], dtype)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf).item()
        if not math.isfinite(total["loss"]) or not math.isfinite(grad_norm):
            rows.fail(f"step {step}: loss {total['loss']}, gradient norm {grad_norm}; nothing was saved since the last "
                      "checkpoint. Lower --learning_rate or raise --beta, and look at the data of this step")
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.time() - began
        if main_rank:
            rows.append(metrics, {"step": step + 1, "epoch": (step + 1) * args.batch_size / units, **total,
                                  "grad_norm": grad_norm, "learning_rate": group["lr"], "seconds": seconds})
            bar.set_postfix(loss=f"{total['loss']:.4g}", log_ratio=f"{total['log_ratio']:.3g}",
                            tokens_s=f"{total['tokens'] / seconds:,.0f}")
        if args.eval_every and (step + 1) % args.eval_every == 0 or step + 1 == steps:
            evaluate(step + 1)
        if args.save_every and (step + 1) % args.save_every == 0 or step + 1 == steps:
            if main_rank:
                save_checkpoint(args, out, model, tokenizer, optimizer, step + 1)
    if main_rank:
        finish(out, config, steps)
        plot(out)
        print(f"{out}: the trained model, metrics.jsonl and curves.png")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# ---- one step's arithmetic ----

def step_units(args, units, step):
    """The units of a step, the same on every rank and for every number of ranks: epochs of one seeded shuffle each."""
    epoch, i = divmod(step, math.ceil(units / args.batch_size))
    order = np.random.default_rng([args.seed, epoch]).permutation(units)
    return order[i * args.batch_size:(i + 1) * args.batch_size]


def totals(args, policy, data, units, rank, world, device, autocast, backward=False):
    """Means over these units on all ranks of the loss and what else is logged; with backward=True also the gradient.

    The gradient is that of the mean loss over all units: independent of micro-batches and ranks, up to rounding.
    """
    unit = 2 if args.loss in PAIRWISE else 1
    members = units[:, None] * unit + np.arange(unit)  # (units, unit) completions
    lens = data["lens"] - data["prompt_lens"]
    order = np.argsort(data["lens"][members].max(1), kind="stable")  # similar lengths share a micro-batch
    mine = members[order][rank::world]
    weight = float(len(mine) > 0)
    if weight == 0:  # a rank without work still takes part in the gradient's reduction
        mine = members[:1]
    sums = dict.fromkeys(("loss", "log_ratio", "log_ratio_chosen", "log_ratio_rejected", "chosen", "rejected",
                          "quantile_reward", "completions", "tokens", "drift"), 0.0)
    for i in range(0, len(mine), args.micro_batch_size):
        index = mine[i:i + args.micro_batch_size].reshape(-1)
        batch = dataset.batch(data, index, device) | {"mean_length": float(lens[members].mean())}
        last = i + args.micro_batch_size >= len(mine)
        sync = policy.no_sync() if world > 1 and not last else contextlib.nullcontext()
        with sync, torch.set_grad_enabled(backward):
            with autocast:
                logps = policy(batch["tokens"], batch["prompt_lens"], batch["lens"])
            loss = losses(args, batch, logps).sum()
            if backward:  # DDP averages over ranks: times world makes it a sum
                (loss * (weight * world / len(units))).backward()
        if weight:
            log_ratio, side = (logps.detach() - batch["ref_logps"]).double(), batch["side"]
            sums["loss"] += loss.item()
            sums["log_ratio"] += log_ratio.sum().item()
            sums["log_ratio_chosen"] += log_ratio[side > 0].sum().item()
            sums["log_ratio_rejected"] += log_ratio[side < 0].sum().item()
            sums["chosen"] += (side > 0).sum().item()
            sums["rejected"] += (side < 0).sum().item()
            if batch["ref_rewards"].shape[1]:
                q = qrpo.quantile_rewards(batch["rewards"], batch["ref_rewards"])
                sums["quantile_reward"] += q.nan_to_num().sum().item()
            sums["completions"] += len(index)
            sums["tokens"] += batch["lens"].sum().item()
            sums["drift"] += (log_ratio.abs() / (batch["lens"] - batch["prompt_lens"])).sum().item()
    if world > 1:
        vector = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
        dist.all_reduce(vector)
        sums = dict(zip(sums, vector.tolist()))
    n, chosen, rejected = sums.pop("completions"), sums.pop("chosen"), sums.pop("rejected")
    return {"loss": sums["loss"] / len(units), "log_ratio": sums["log_ratio"] / n,
            "log_ratio_chosen": sums["log_ratio_chosen"] / max(chosen, 1),
            "log_ratio_rejected": sums["log_ratio_rejected"] / max(rejected, 1),
            "quantile_reward": sums["quantile_reward"] / n, "tokens": int(sums["tokens"]), "drift": sums["drift"] / n}


def reference_logps(args, out, policy, data, rank, world, device):
    """log pi_ref of every completion, float32 (n,): one forward pass shared by the ranks, kept in OUT/cache.

    The cached file is named for what it was computed from: the model's files, tokens and dtype.
    """
    source = models.identity(args.ref_model or args.model)
    key = rows.fingerprint([source, dataset.fingerprint(data), args.dtype, str(device.type), args.micro_batch_size])
    path = out / "cache" / f"ref_logps-{key}.npy"
    if path.exists():
        return np.load(path)
    logps = dataset.logps(policy, data, args.micro_batch_size, device, rank, world)
    if world > 1:
        dist.all_reduce(logps)
    if rank == 0:
        path.parent.mkdir(exist_ok=True)
        new = path.with_suffix(".tmp.npy")
        np.save(new, logps.cpu().numpy())
        os.replace(new, path)
    if world > 1:
        dist.barrier()  # no rank looks for the file of the next data before this one stands
    return logps.cpu().numpy()


def gate(args, drift, dtype):
    """Refuse to train unless the policy before its first step is the reference model, within rounding.

    drift: mean over the first batch of |logps - ref_logps| per completion token, in nats.
    """
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    if not drift < limit:
        rows.fail(f"step 0: the policy's log-probabilities are {drift:.2g} nats a token from the reference's (limit "
                  f"{limit}). Most likely {args.out}/cache was made with another model (delete it), or the model is "
                  "not deterministic (dropout, or a kernel that depends on the batch)")


# ---- the run's folder ----

def find_checkpoint(args, out, config):
    """The newest checkpoint to resume from, or None. Refuses a folder that holds another run. Reads only."""
    record = out / "run.json"
    if out.exists() and not out.is_dir():
        rows.fail(f"{out}: is a file; --out must name a folder")
    if not record.exists():
        return None
    if not args.resume:
        rows.fail(f"{out}: holds a run already; continue it with --resume, or give another --out")
    before = rows.load_json(record)
    free = ("resume", "save_every", "eval_every", "keep", "micro_batch_size", "data", "eval_data", "out")
    changed = [f"--{k}={before['config'].get(k)}, now {v}" for k, v in config.items()
               if k not in free and before["config"].get(k) != v]
    if changed:
        rows.fail(f"{out}: was started with {'; '.join(changed)}; use the same settings, or another --out")
    if before["finished"]:
        print(f"{out}: this run has finished, nothing to do")
        raise SystemExit(0)
    return max((p.parent for p in out.glob("checkpoints/step_*/resume.pt")), default=None)


def start_run(out, config, start):
    """Write OUT/run.json, and clear what was written after the checkpoint that the run continues from."""
    for stale in out.glob("**/.new*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    if not (out / "run.json").exists():
        rows.write_json(out / "run.json", run_record(config))
    rows.keep_lines(out / "metrics.jsonl", lambda row: row["step"] <= start - (start == 0))  # step 0: evaluated again
    print(f"{out}: " + (f"continuing after step {start}" if start else "starting"))


def run_record(config):
    return {"config": config, "command": " ".join(sys.argv), "finished": False, "versions": {
        "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}}


def save_model(folder, model, tokenizer):
    """A Hugging Face folder in the dtype that the model came in (its config's), which plain transformers or vLLM
    load.
    """
    cast, state = {}, {}
    for name, tensor in model.state_dict().items():  # tied weights stay one tensor
        if tensor.data_ptr() not in cast:
            cast[tensor.data_ptr()] = tensor.to(model.stored_dtype) if tensor.is_floating_point() else tensor
        state[name] = cast[tensor.data_ptr()]
    model.save_pretrained(folder, state_dict=state)
    rows.write_json(folder / "config.json", rows.load_json(folder / "config.json") | {
        "dtype": str(model.stored_dtype).removeprefix("torch.")})
    tokenizer.save_pretrained(folder)


def save_checkpoint(args, out, model, tokenizer, optimizer, step):
    """OUT/checkpoints/step_N: the model as a Hugging Face folder, and resume.pt. It appears whole or not at all."""
    folder = out / "checkpoints" / f"step_{step:06d}"
    new = folder.with_name(f".new_{folder.name}")
    save_model(new, model, tokenizer)
    # nothing in a step is random but the order of the data, which the step number gives: there is no RNG state to keep
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, new / "resume.pt")
    os.replace(new, folder)
    for old in sorted(out.glob("checkpoints/step_*/resume.pt"))[:-args.keep]:
        old.unlink()


def finish(out, config, steps):
    """The last checkpoint's model becomes OUT itself."""
    last = out / "checkpoints" / f"step_{steps:06d}"
    for file in last.iterdir():
        if file.name != "resume.pt":
            shutil.copy2(file, out / f".new_{file.name}")
            os.replace(out / f".new_{file.name}", out / file.name)
    rows.write_json(out / "run.json", run_record(config) | {"finished": True})


def plot(out):
    """curves.png: every metric of metrics.jsonl over the steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = rows.load_lines(out / "metrics.jsonl")
    panels = (("loss",), ("log_ratio", "log_ratio_chosen", "log_ratio_rejected"), ("grad_norm",), ("learning_rate",))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, names in zip(axes, panels):
        for i, name in enumerate(names):
            for prefix, style in (("", "-"), ("eval_", "o--")):
                points = [(row["step"], row[prefix + name]) for row in log if prefix + name in row]
                if points:
                    axis.plot(*zip(*points), style, color=f"C{i}", label=prefix + name, markersize=4, linewidth=1.2)
        axis.set(xlabel="step", title=names[0])
        axis.legend(fontsize=8)
    axes[1].set_title("log-ratio to the reference, nats")
    figure.savefig(out / "curves.png", dpi=120)


if __name__ == "__main__":
    main()
