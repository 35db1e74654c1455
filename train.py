"""Train a language model from pointwise rewards with QRPO (or DPO, REBEL, SimPO, SFT on the same data).

Reads rewarded rows (score.py's output), writes OUT: a Hugging Face checkpoint, run.json (configuration, versions),
metrics.jsonl, pictures, and checkpoints/ for --resume. One process, or several under torchrun:

    python train.py --model=data/minicode/model --data=out/rewarded --out=out/run --beta=0.1 --learning_rate=3e-4
    torchrun --nproc_per_node=8 train.py --model=... --data=... --out=... --shard --gradient_checkpointing

The policy starts as the reference model, so ref_logps are its own before step 0: no second model is in memory
(but for --ref_model, until they are computed).
SIGTERM and SIGUSR1 save a checkpoint and exit with 75: start the same command again with --resume.
"""
import atexit
import contextlib
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dataset
import figures
import flags
import models
import qrpo
import rows
import runs


def arguments():
    parser = flags.parser(__doc__)
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="folder or hub name of the model to train; it is also the reference model")
    add("--ref_model", help="the reference model, where the policy does not start from it (a second round)")
    add("--data", required=True, help="JSONL file or folder of rewarded rows")
    add("--eval_data", help="held-out rows, of the same form")
    add("--out", required=True, help="folder of the run")
    add("--cache", help="folder for tokens and ref_logps; runs on the same data can share it (default: OUT/cache)")
    add("--train_on", default="refs", choices=dataset.REGIMES,
        help="refs: all reference completions; best_worst: those two of them; random_pairs: references 0 and 1, "
        "2 and 3, ... (an odd one is left out); chosen_rejected: the dataset's pairs; completion: its single "
        "completions; samples: those of generate_refs.py --field=samples (default %(default)s)")
    add("--side", default="both", choices=("both", "chosen", "rejected"),
        help="QRPO: which side of the pairs; SFT takes the chosen (default %(default)s)")
    add("--num_candidates", type=int, default=0, help="use the first so many references to train on; 0: all")
    add("--num_ref_rewards", type=int, default=0, help="use the first so many ref_rewards for quantiles; 0: all")
    add("--min_reward", type=float, help="train (and evaluate) only on completions of at least this reward")
    add("--max_length", type=int, default=0,
        help="drop and count what has more tokens, prompt + completion; 0: nothing may exceed the context")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="qrpo", choices=("qrpo", *dataset.PAIRWISE, "sft"), help="(default %(default)s)")
    add("--beta", type=float, default=0.1, help="of the loss; QRPO: strength of the KL term (default %(default)s)")
    add("--transform", default="identity", choices=qrpo.TRANSFORMS, help="of the quantile, QRPO (default %(default)s)")
    add("--quantile", default="paper", choices=("paper", "exact"),
        help="QRPO: as published, or the cells that are right with ties too (default %(default)s)")
    add("--norm", default="mse", choices=("mse", "mae"), help="QRPO: squared or absolute (default %(default)s)")
    add("--length_normalize", action="store_true", help="QRPO: beta / tokens of the completion in every term")
    add("--max_beta", type=float, default=0.0, help="QRPO: clamp of a completion's beta; 0: no clamp")
    add("--gamma_beta_ratio", type=float, default=0.5, help="SimPO's margin, in nats a token (default %(default)s)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--learning_rate", type=float, default=1e-6, help="peak of the cosine schedule (default %(default)s)")
    add("--warmup", type=float, default=0.1, help="share of the steps that warm up (default %(default)s)")
    add("--batch_size", type=int, default=256,
        help="completions (pairs, for pairwise losses) a step, over all ranks (default %(default)s)")
    add("--epochs", type=int, default=1, help="passes over the data (default %(default)s)")
    add("--weight_decay", type=float, default=0.0, help="AdamW's (default %(default)s)")
    add("--max_grad_norm", type=float, default=0.0, help="clip the gradient norm; 0: no clipping, as the paper")

    add = parser.add_argument_group("machine").add_argument
    add("--micro_batch_tokens", type=int, default=0,
        help="padded tokens in a forward pass of a rank; the gradient is the same. 0: 16384 on a GPU, 1024 on a CPU")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of forward and backward; weights are float32. auto: bfloat16 on a GPU")
    add("--shard", action="store_true", help="cut weights, gradients and optimizer over the ranks (FSDP), not DDP")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--compile", action="store_true", help="torch.compile the model's body")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="of the order of the data (default %(default)s)")
    add("--eval_every", type=int, default=0, help="steps between evaluations; 0: at the start and the end")
    add("--save_every", type=int, default=0, help="steps between checkpoints; 0: only at the end")
    add("--keep", type=int, default=1, help="newest checkpoints to keep resumable; older ones keep their model only")
    add("--resume", action="store_true", help="continue the run in OUT from its newest checkpoint")
    add("--track", choices=("wandb", "trackio", "tensorboard"), help="send the metrics there, too, if it is installed")
    add("--dry_run", action="store_true", help="print a batch and its targets, time a step, write nothing, and exit")
    args = flags.parse(parser)
    for name in ("beta", "learning_rate", "batch_size", "epochs", "keep"):
        if not getattr(args, name) > 0:
            rows.fail(f"--{name} must be greater than 0")
    pairwise = args.loss in dataset.PAIRWISE
    for name in ("num_candidates", "num_ref_rewards", "max_length", "micro_batch_tokens"):
        if getattr(args, name) < 0:
            rows.fail(f"--{name} must not be negative")
    if pairwise and args.min_reward is not None:
        rows.fail(f"--min_reward is for losses of single completions, and --loss={args.loss} is of pairs; drop it")
    if pairwise and args.train_on not in dataset.PAIRED:
        rows.fail(f"--loss={args.loss} needs pairs; give --train_on={', '.join(dataset.PAIRED)}, or --loss=qrpo")
    if args.side != "both" and (pairwise or args.train_on not in dataset.PAIRED):
        rows.fail(f"--side={args.side} is for pointwise losses on pairs (--train_on={', '.join(dataset.PAIRED)})")
    if args.shard and "RANK" not in os.environ:
        rows.fail("--shard needs several processes: start it with torchrun --nproc_per_node=N train.py ...")
    if args.loss == "sft" and args.train_on in dataset.PAIRED:
        args.side = "chosen"
    return args


def losses(args, batch, logps):
    """The loss of every unit of a batch: a completion, or a pair (chosen at even, rejected at odd places). ->
    (units,)
    """
    ref_logps, lens = batch["ref_logps"], batch["lens"] - batch["prompt_lens"]
    if args.loss == "qrpo":
        return qrpo.qrpo_loss(betas(args, lens), logps, ref_logps, batch["rewards"], batch["ref_rewards"],
                              args.transform, args.quantile, batch["among_refs"], batch["std"], args.norm)
    if args.loss == "sft":  # mean over the tokens of the whole step
        return -logps / batch["mean_length"]
    pair, ref_pair = (logps[0::2], logps[1::2]), (ref_logps[0::2], ref_logps[1::2])
    if args.loss == "dpo":
        return qrpo.dpo_loss(args.beta, *pair, *ref_pair)
    if args.loss == "simpo":
        return qrpo.simpo_loss(args.beta, args.gamma_beta_ratio, *pair, lens[0::2], lens[1::2])
    return qrpo.rebel_loss(args.beta, *pair, *ref_pair, batch["rewards"][0::2], batch["rewards"][1::2])


def betas(args, lens):
    """QRPO's beta of every completion, (batch,): the same for all, or by its tokens (lens) as Apertus was trained."""
    beta = args.beta / lens if args.length_normalize else torch.full(lens.shape, args.beta, device=lens.device)
    return beta.clamp(max=args.max_beta or math.inf)


def learning_rate(args, step, steps):
    """Linear warm-up, then a cosine to 0."""
    warmup = math.ceil(args.warmup * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def main():
    args = arguments()
    stop = catch_signals()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = models.device()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    barrier = dist.barrier if world > 1 else lambda: None  # of one process there is no group
    dtype, main_rank, out = models.pick_dtype(args.dtype, device), rank == 0, Path(args.out)
    if args.dry_run:  # a folder that the ranks of a node share
        args.cache = os.path.join(tempfile.gettempdir(), f"qrpo_dry_run_{os.getppid()}")
        atexit.register(shutil.rmtree, args.cache, ignore_errors=True)
    args.cache = args.cache or str(out / "cache")
    args.micro_batch_tokens = args.micro_batch_tokens or (16384 if device.type == "cuda" else 1024)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    checkpoint = None if args.dry_run else runs.find_checkpoint(out, vars(args), args.resume)

    # ---- data: flat arrays of tokens and rewards, on disk and shared by the ranks ----
    tokenizer = models.load_tokenizer(args.model, args.trust_remote_code)
    model = models.load_model(args.model, torch.float32, device, args.trust_remote_code)
    names = "train_on", "loss", "side", "min_reward", "num_candidates", "num_ref_rewards", "max_length"
    train_data, eval_data = (path and dataset.load(
        path, args.cache, main_rank, barrier, args.model, tokenizer, model, **{k: getattr(args, k) for k in names})
        for path in (args.data, args.eval_data))
    if args.loss == "qrpo" and (np.ptp(cells(train_data), 0) == 1).all():
        rows.fail(f"{args.data}: no completion's reward differs from its references', so there is nothing to learn; "
                  "look at the reward, or sample more references")
    unit = 2 if args.loss in dataset.PAIRWISE else 1  # completions in a unit of the loss
    units = len(train_data["lens"]) // unit
    steps_per_epoch = math.ceil(units / args.batch_size)
    steps = args.epochs * steps_per_epoch
    config = vars(args) | {"data_fingerprint": train_data["fingerprint"], "steps": steps}
    start = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0

    # ---- the policy ----
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():  # these layers recompute when they think they train; their dropouts stay off
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
    if args.compile:
        model.base_model.compile(dynamic=True)
    flops = models.flops_per_token(model, train_data["lens"].mean())  # before its parameters are cut
    policy = models.shard(models.Policy(model), dtype) if args.shard else models.Policy(model)
    if args.dry_run:
        return dry_run(args, tokenizer, policy, train_data, steps, rank, world, device, autocast)
    track = runs.tracker(args.track, out, config) if main_rank else None
    metrics = runs.start(out, config, start) if main_rank else None

    # ---- reference log-probabilities: the policy's own, before it moves ----
    reference = policy
    if args.ref_model:
        reference = models.Policy(models.load_model(args.ref_model, torch.float32, device, args.trust_remote_code))
        reference = models.shard(reference, dtype) if args.shard else reference
    with autocast:
        for data in filter(None, (train_data, eval_data)):
            data["ref_logps"] = reference_logps(args, args.cache, reference, data, rank, world, device)
            data["targets"] = targets(args, data)
    del reference
    if main_rank and args.loss == "qrpo":
        figures.data(out, *cells(train_data), train_data["targets"])

    # ---- optimizer, resume, DDP ----
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    if checkpoint:
        runs.load_checkpoint(checkpoint, model, optimizer)
    if world > 1 and not args.shard:
        policy = DistributedDataParallel(policy)
    if main_rank:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count / 1e6:,.2f}M parameters: {16e-9 * count / (world if args.shard else 1):.2f} GB a process for "
              f"weights, gradients and AdamW, activations apart; {units:,} {'pairs' if unit == 2 else 'completions'}, "
              f"{steps - start} steps of {train_data['lens'].sum() / steps_per_epoch:,.0f} tokens on "
              f"{world} x {device.type}, {dtype}", flush=True)

    def log(row):
        rows.append(metrics, row)
        track(row)

    def evaluate(step):
        if eval_data:
            all_units = np.arange(len(eval_data["lens"]) // unit)
            total = totals(args, policy, eval_data, all_units, rank, world, device, autocast)
            if main_rank:
                log({"step": step} | {f"eval_{k}": v for k, v in total.items() if k not in ("tokens", "padding")})

    # ---- the loop ----
    if start == 0:
        evaluate(0)
    stop["at"] = "step"
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=args.loss, unit="step", disable=not main_rank)
    for step in bar:
        began = time.time()
        batch_units = step_units(args, units, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, steps)
        total = totals(args, policy, train_data, batch_units, rank, world, device, autocast, True, stop["asked"])
        asked = total.pop("stop")
        if step == 0 and not args.ref_model:
            gate(args, total["drift"], dtype)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        grad_norm = (grad_norm.full_tensor() if args.shard else grad_norm).item()
        if not math.isfinite(total["loss"]) or not math.isfinite(grad_norm):
            bad = sorted(set(train_data["ids"][train_data["row"][batch_units * unit]].tolist()))
            rows.fail(f"step {step}: loss {total['loss']}, gradient norm {grad_norm}; nothing was saved since the last "
                      f"checkpoint. Lower --learning_rate or raise --beta, and look at this step's rows, ids "
                      f"{', '.join(bad)}")
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.time() - began
        if main_rank:
            speed = {"tokens_per_second": total["tokens"] / seconds}
            if models.peak_flops(device):
                speed["share_of_peak"] = flops * speed["tokens_per_second"] / models.peak_flops(device) / world
            log({"step": step + 1, "epoch": (step + 1) / steps_per_epoch, **total, "grad_norm": grad_norm,
                 "learning_rate": group["lr"], "seconds": seconds, **speed})
            bar.set_postfix(loss=f"{total['loss']:.4g}", log_ratio=f"{total['log_ratio']:.3g}",
                            tokens_s=f"{speed['tokens_per_second']:,.0f}")
        if args.eval_every and (step + 1) % args.eval_every == 0 or step + 1 == steps:
            evaluate(step + 1)
        if args.save_every and (step + 1) % args.save_every == 0 or step + 1 == steps or asked:
            runs.save_checkpoint(args, out, step + 1, model, tokenizer, optimizer, main_rank)
        if asked and step + 1 < steps:
            bar.close()
            print(f"{out}: told to stop; saved step {step + 1}, start again with --resume", flush=True)
            raise SystemExit(75)
    if args.loss == "qrpo":  # how near the log-ratios came to what was asked of them
        data = eval_data or train_data
        with autocast:
            logps = reference_logps(args, None, policy, data, rank, world, device)
        if main_rank:
            figures.calibration(out, data["targets"], logps - data["ref_logps"], bool(eval_data))
    if main_rank:
        figures.curves(out)
        runs.finish(out, config, steps)
        print(f"{out}: the trained model, metrics.jsonl, curves.png" + (
            ", data.png and calibration.png" if args.loss == "qrpo" else ""))
    if "RANK" in os.environ:
        barrier()
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        os._exit(0)  # taking DDP and gloo apart in Python's own order can wait for ever


# ---- one step's arithmetic ----

def step_units(args, units, step):
    """The units of a step, the same on every rank and for every number of ranks: epochs of one seeded shuffle each."""
    epoch, i = divmod(step, math.ceil(units / args.batch_size))
    order = np.random.default_rng([args.seed, epoch]).permutation(units)
    return order[i * args.batch_size:(i + 1) * args.batch_size]


def totals(args, policy, data, units, rank, world, device, autocast, backward=False, stop=False):
    """Means over these units on all ranks of the loss and what else is logged; with backward=True also the gradient.

    units: of the loss, completions or pairs. The gradient is that of the mean loss over all of them: independent of
    micro-batches and ranks, up to rounding. All ranks walk through the same blocks, of which rank r takes every
    world-th unit, as DDP and FSDP wait for every rank; one without work repeats a unit with weight 0.
    """
    unit = 2 if args.loss in dataset.PAIRWISE else 1
    members = units[:, None] * unit + np.arange(unit)  # (units, unit) completions
    mean_length = float((data["lens"][members] - data["prompt_lens"][members]).mean())
    blocks = list(dataset.micro_batches(data["lens"][members].max(1), unit, args.micro_batch_tokens, world))
    sums = 0
    for i, block in enumerate(blocks):
        works = rank < len(block)
        index = members[block[rank::world] if works else block[:1]].reshape(-1)
        batch = dataset.batch(data, index, device) | {"mean_length": mean_length}
        ddp_waits = isinstance(policy, DistributedDataParallel) and i + 1 < len(blocks)
        with policy.no_sync() if ddp_waits else contextlib.nullcontext(), torch.set_grad_enabled(backward):
            with autocast:
                logps = policy(batch["tokens"], batch["prompt_lens"], batch["lens"], unit)
            each = losses(args, batch, logps)
            if backward:  # ranks average their gradients: times world makes it a sum
                (each.sum() * (works * world / len(units))).backward()
        sums = sums + works * measures(args, batch, logps.detach(), each.detach(), unit)
    sums = torch.cat([sums, sums.new_tensor([stop])])
    if world > 1:
        dist.all_reduce(sums)
    *sums, stop = sums.tolist()
    sums = dict(zip(MEASURES, sums))
    n = sums["completions"]
    means = {"loss": sums["loss"] / len(units), "log_ratio": sums["log_ratio"] / n,
             "log_ratio_chosen": sums["log_ratio_chosen"] / max(sums["chosen"], 1),
             "log_ratio_rejected": sums["log_ratio_rejected"] / max(sums["rejected"], 1), "drift": sums["drift"] / n,
             "tokens": int(sums["tokens"]), "padding": 1 - sums["tokens"] / sums["positions"]}
    if args.loss == "qrpo":
        means |= {"loss_down": sums["down"] / max(sums["loss"], 1e-30), "quantile_reward": sums["quantile_reward"] / n}
    return means | ({"stop": stop > 0} if backward else {})


MEASURES = ("completions", "tokens", "positions", "loss", "down", "quantile_reward", "log_ratio", "drift",
            "chosen", "rejected", "log_ratio_chosen", "log_ratio_rejected")


def measures(args, batch, logps, each, unit):
    """The sums over a batch's completions of all MEASURES, (len(MEASURES),) float64. each: the losses of its units."""
    log_ratio, lens = (logps - batch["ref_logps"]).double(), batch["lens"]
    chosen, rejected = batch["side"] > 0, batch["side"] < 0
    parts = lens.sort(descending=True)[0].chunk(unit)  # as they went through
    down = quantiles = each.new_zeros(1)
    if args.loss == "qrpo":
        down = each * (batch["targets"] < log_ratio)
        quantiles = qrpo.quantile_rewards(batch["rewards"], batch["ref_rewards"])
    values = (torch.ones_like(lens), lens, torch.stack([len(part) * part[0] for part in parts]), each, down, quantiles,
              log_ratio, log_ratio.abs() / (lens - batch["prompt_lens"]), chosen, rejected, log_ratio * chosen,
              log_ratio * rejected)
    return torch.stack([value.sum(dtype=torch.float64) for value in values])


def reference_logps(args, cache, policy, data, rank, world, device):
    """log pi of every completion, float32 (n,): a forward pass shared by the ranks, kept in `cache` if one is given.

    The cached file is named for what it was computed from: the model's files, tokens and dtype.
    """
    source = models.identity(args.ref_model or args.model)
    key = rows.fingerprint([source, data["fingerprint"], args.dtype, str(device.type), args.shard])
    path = cache and Path(cache) / f"ref_logps-{key}.npy"
    cached = torch.tensor(bool(path and path.exists()), device=device)
    if world > 1:  # all ranks do as the main one: another run may write this file while they look
        dist.broadcast(cached, 0)
    if cached:
        return np.load(path)
    # no gradients are kept: four times the tokens fit
    logps = dataset.logps(policy, data, 4 * args.micro_batch_tokens, device, rank, world)
    if world > 1:
        dist.all_reduce(logps)
    logps = logps.cpu().numpy()
    if path and rank == 0:
        new = path.with_name(f".new_{os.getpid()}.npy")
        np.save(new, logps)
        os.replace(new, path)
    if world > 1:
        dist.barrier()  # no rank looks for the file of the next data before this one stands
    return logps


def in_batches(data, function):
    """function(batch of rewards without their tokens) -> (batch,) over all completions, as numpy (n,)."""
    keys, out = ("rewards", "among_refs", "lens", "prompt_lens"), []
    for i in range(0, len(data["lens"]), 65536):
        batch = {key: torch.as_tensor(np.array(data[key][i:i + 65536])) for key in keys}
        row = data["row"][i:i + 65536]
        batch |= {key: torch.as_tensor(np.array(data[key][row])) for key in ("ref_rewards", "std")}
        out.append(function(batch).numpy())
    return np.concatenate(out)


def targets(args, data):
    """QRPO: the log-ratio that the loss asks of every completion, (n,) nats. Other losses name none: zeros."""
    if args.loss != "qrpo":
        return np.zeros(len(data["lens"]), np.float32)
    return in_batches(data, lambda b: qrpo.target_log_ratios(
        betas(args, b["lens"] - b["prompt_lens"]), b["rewards"], b["ref_rewards"], args.transform, args.quantile,
        b["among_refs"], b["std"]))


def cells(data):
    """The quantile cells of all completions, lo and hi (n,)."""
    return in_batches(data, lambda b: torch.stack(qrpo.quantile_cells(
        b["rewards"], b["ref_rewards"], b["among_refs"]), 1)).T


def dry_run(args, tokenizer, policy, data, steps, rank, world, device, autocast):
    """Print some of the first step's completions, run the step without moving a weight, and say what to expect."""
    unit = 2 if args.loss in dataset.PAIRWISE else 1
    first = step_units(args, len(data["lens"]) // unit, 0)
    data["ref_logps"], data["targets"] = np.zeros(len(data["lens"]), np.float32), targets(args, data)
    lo, hi = cells(data) if args.loss == "qrpo" else (None, None)
    for i in (first[:4, None] * unit + np.arange(unit)).reshape(-1) if rank == 0 else ():
        start, prompt_end, end = data["starts"][i] + (0, data["prompt_lens"][i], data["lens"][i])
        prompt, completion = (tokenizer.decode(data["tokens"][a:b])
                              for a, b in ((start, prompt_end), (prompt_end, end)))
        asked = "" if lo is None else (f"; quantiles {lo[i]:.3f} to {hi[i]:.3f}, target log-ratio "
                                       f"{data['targets'][i]:.3f} nats")
        print(f"---- row {data['ids'][data['row'][i]]}, reward {data['rewards'][i]:.4g}, {data['prompt_lens'][i]} "
              f"tokens of prompt, {end - prompt_end} trained, marked by >>> and <<<{asked}\n{prompt}>>>{completion}<<<")
    for units in (first[:8], first):  # the first few warm up
        began = time.time()
        total = totals(args, policy, data, units, rank, world, device, autocast, backward=True)
        step = time.time() - began
    if rank == 0:
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(
            resource.RUSAGE_SELF).ru_maxrss
        adam = 8 * sum(p.numel() for p in policy.parameters()) / (world if args.shard else 1)
        seconds = step * steps * (1 + 1 / (3 * args.epochs))  # a reference pass is a third of an epoch
        print(f"---- a step: {step:.2f} s, {total['tokens']:,} tokens, {total['padding']:.0%} padding; {steps} "
              f"steps and the reference pass: {seconds / 60:.1f} minutes; {(peak + adam) / 1e9:.2f} GB a process")
    if world > 1:
        dist.barrier()  # nobody goes, and deletes the data, before all have read them


def gate(args, drift, dtype):
    """Refuse to train unless the policy before its first step is the reference model, within rounding.

    drift: mean over the first batch of |logps - ref_logps| per completion token, in nats.
    """
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    if not drift < limit:
        rows.fail(f"step 0: the policy's log-probabilities are {drift:.2g} nats a token from the reference's (limit "
                  f"{limit}). Most likely {args.cache} was made with another model (delete it), or the model is "
                  "not deterministic (dropout, or a kernel that depends on the batch)")


def catch_signals():
    """Exit with 75 ("start me again") on SIGTERM and SIGUSR1: at once, or, in the loop, after the step in hand."""
    state = {"asked": False, "at": "set-up"}

    def handle(signum, frame):
        state["asked"] = True
        if state["at"] == "set-up":
            sys.exit(75)
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, handle)
    return state


if __name__ == "__main__":
    main()
