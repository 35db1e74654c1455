"""Train a language model on pointwise rewards with QRPO, or with another loss (--loss) on the same data.

Reads rewarded rows (score.py's output). Writes to OUT the trained model as a Hugging Face folder, run.json
(settings and versions), metrics.jsonl, and with --save_every checkpoints/step_N, models of the same form. One
process, or several under torchrun:

    python train.py --model=MODEL --data=out/rewarded --out=out/run --beta=0.1 --learning_rate=1e-6
    torchrun --nproc_per_node=8 train.py --model=... --data=... --out=... --shard --gradient_checkpointing

The policy starts as the reference model, so ref_logps are its own log-probabilities before step 0, and no
second model is in memory (except with --ref_model, until they are computed). On SIGTERM or SIGUSR1 the run
finishes its step, saves its state in OUT/resume and exits with code 75 (torchrun itself with 1); continue it
by giving the same command with --resume.
"""
import importlib.util
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dataset
import qrpo
import rows
from dataset import REGIMES, Meter, get_batch, micro_batches
from model import (Policy, add_lora, any_rank, barrier, checkpoint_activations, cosine, flops_per_token,
                   get_device, get_dtype, keep_freed_memory, load_model, load_skeleton, load_state,
                   load_tokenizer, model_fingerprint, peak_flops, save_model, save_state, shard,
                   start_processes, sync_gradients)
from qrpo import qrpo_loss
from tokens import check_same_ids

# -----------------------------------------------------------------------------
# settings: every flag with its default and its unit

parser = rows.Parser(__doc__)
flag = parser.add_argument_group("files").add_argument
flag("--data", required=True, help="JSONL file or folder of rewarded rows")
flag("--eval_data", help="held-out rows, in the same format")
flag("--out", required=True, help="folder of the run")
flag("--cache", help="folder for tokens and ref_logps, which runs can share (default: OUT/cache)")

flag = parser.add_argument_group("model and data").add_argument
flag("--model", required=True, help="folder or hub name of the policy to train, and of its reference")
flag("--ref_model", help="the reference model, if the policy does not start from it (a second round)")
flag("--template_args", type=rows.json_object, default={}, metavar="JSON",
     help="""what the chat template gets besides the messages, such as '{"enable_thinking": false}'""")
flag("--train_on", default="refs", choices=REGIMES,
     help="; ".join(f"{name}: {regime.help}" for name, regime in REGIMES.items()))
flag("--num_candidates", type=rows.whole, default=0, help="train on the first N sampled completions; 0: all")
flag("--num_ref_rewards", type=rows.whole, default=0, help="take quantiles among the first N rewards; 0: all")
flag("--min_reward", type=float, help="train and evaluate only on completions of at least this reward")
flag("--max_length", type=rows.whole, default=0,
     help="drop completions that have more tokens, prompt included; 0: refuse those that exceed the context")

flag = parser.add_argument_group("loss").add_argument
flag("--loss", default="qrpo", metavar="NAME",
     help="qrpo; forward_kl (maximum likelihood of the optimum), sft; of pairs: dpo, dpo_norm, rebel, simpo")
flag("--beta", type=rows.positive, default=0.1, help="strength of the KL term, or the beta of another loss")
flag("--transform", default="identity", choices=qrpo.TRANSFORMS, help="QRPO: f in R = f(quantile)")
flag("--quantile", default="paper", choices=qrpo.QUANTILES,
     help="QRPO: paper, as published, or exact, which is also right when rewards tie")
flag("--length_normalize", action="store_true",
     help="QRPO: divide beta by the completion's tokens, and cap it at 0.1 (Apertus, arXiv 2509.14233)")

flag = parser.add_argument_group("optimisation").add_argument
flag("--learning_rate", type=rows.positive, default=1e-6,
     help="AdamW's, at the peak of a cosine with 10%% warm-up")
flag("--batch_size", type=rows.count, default=256,
     help="completions (pairs, for losses of pairs) per step, over all ranks")
flag("--epochs", type=rows.count, default=1, help="passes over the data")
flag("--max_grad_norm", type=rows.not_negative, default=0.0,
     help="clip the gradient norm; 0: do not, as in the paper")
flag("--seed", type=rows.whole, default=0, help="seed of the order of the data")
flag("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
     help="of forward and backward; weights are float32. auto: bfloat16 on a GPU")

flag = parser.add_argument_group("machine").add_argument
flag("--lora", type=rows.whole, default=0, metavar="RANK",
     help="train LoRA adapters of this rank (float32), and freeze the weights (in --dtype); needs peft and a "
          "higher learning rate. 0: train the weights")
flag("--micro_batch_tokens", type=rows.whole, default=0,
     help="padded tokens in a forward pass, without effect on the gradient; 0: 16384 on a GPU, 1024 on a CPU")
flag("--shard", action="store_true", help="shard weights, gradients and optimizer across ranks (FSDP2)")
flag("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
flag("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")

flag = parser.add_argument_group("run").add_argument
flag("--eval_every", type=rows.whole, default=0, help="steps between evaluations; 0: only before and after")
flag("--save_every", type=rows.whole, default=0,
     help="steps between checkpoints (a model, and a state to resume from); 0: none before the end")
flag("--resume", action="store_true", help="continue the run in OUT from where it last saved")
flag("--track", type=rows.installed, choices=("wandb", "trackio"), help="also send the metrics there")
flag("--dry_run", action="store_true", help="print some of the data with their target log-ratios, and exit")
args = parser.parse_args()

MAX_BETA = 0.1          # with --length_normalize
GAMMA_BETA_RATIO = 0.5  # SimPO's margin in nats per token, as the paper
WARMUP = 0.1            # of the steps, as the paper
DRIFT_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # nats between two passes over one token
# what a run may change when it is resumed; all else must stay as it was
FREE = ("data", "eval_data", "out", "cache", "micro_batch_tokens", "shard", "gradient_checkpointing",
        "eval_every", "save_every", "resume", "track", "dry_run")

# -----------------------------------------------------------------------------
# the losses: b is a batch (dataset.get_batch), logps (B,) are the policy's


def qrpo_terms(b, logps):
    return qrpo_loss(betas(b), logps, b.ref_logps, b.rewards, b.ref_rewards, transform=args.transform,
                     quantile=args.quantile, among_refs=b.among_refs)  # (B,)


def betas(b):
    """Of every completion, (B,)."""
    beta = torch.full_like(b.rewards, args.beta)
    if args.length_normalize:
        return (beta / (b.lens - b.prompt_lens)).clamp(max=MAX_BETA)
    return beta


def targets(b):
    """The log-ratios that the loss asks for (qrpo, forward_kl), in nats, (B,)."""
    return qrpo.target_log_ratios(betas(b), b.rewards, b.ref_rewards, args.transform, args.quantile,
                                  b.among_refs)


def forward_kl(b, logps):
    return qrpo.forward_kl_loss(betas(b), logps, b.rewards, b.ref_rewards, args.transform, args.quantile,
                                b.among_refs)  # (B,)


def sft(b, logps):
    return -logps / b.mean_length  # (B,) its mean over a step is that of the step's completion tokens


def pairs(values):
    """(2n,) of pairs side by side -> chosen (n,), rejected (n,)."""
    return values[0::2], values[1::2]


def dpo(b, logps):
    return qrpo.dpo_loss(args.beta, *pairs(logps), *pairs(b.ref_logps))  # (B / 2,)


def dpo_norm(b, logps):
    return qrpo.dpo_norm_loss(args.beta, *pairs(logps - b.ref_logps), *pairs(b.lens - b.prompt_lens))


def rebel(b, logps):
    return qrpo.rebel_loss(args.beta, *pairs(logps - b.ref_logps), *pairs(b.rewards))


def simpo(b, logps):
    return qrpo.simpo_loss(args.beta, GAMMA_BETA_RATIO, *pairs(logps), *pairs(b.lens - b.prompt_lens))


class Loss(NamedTuple):
    terms: Callable      # (b, logps) -> (B,), or (B / 2,) for pairs
    size: int = 1        # completions in an example: 1, or 2 in a pair
    needs: tuple = ()    # of every example: "rewards", "ref_rewards"


LOSSES = {  # a new loss is a function and one entry
    "qrpo": Loss(qrpo_terms, needs=("rewards", "ref_rewards")),
    "forward_kl": Loss(forward_kl, needs=("rewards", "ref_rewards")),
    "sft": Loss(sft),
    "dpo": Loss(dpo, size=2),
    "dpo_norm": Loss(dpo_norm, size=2),
    "rebel": Loss(rebel, size=2, needs=("rewards",)),
    "simpo": Loss(simpo, size=2),
}
rows.refuse(args.loss not in LOSSES, f"--loss={args.loss}: no such loss; choose from {', '.join(LOSSES)}")
loss_terms, size, needs = LOSSES[args.loss]
has_targets = "ref_rewards" in needs  # see `targets`
paired_data = REGIMES[args.train_on].size == 2  # which a loss of single completions takes one by one

rows.refuse(size == 2 and not paired_data,
            f"--loss={args.loss} needs pairs, such as --train_on=best_worst, random_pairs or chosen_rejected")
rows.refuse(args.loss == "forward_kl" and (args.train_on, args.quantile) != ("refs", "exact"),
            "--loss=forward_kl weighs what the reference model sampled, with weights that average to 1; give "
            "--train_on=refs and --quantile=exact")
rows.refuse(args.loss == "sft" and paired_data,
            f"--loss=sft would also imitate the rejected completions of --train_on={args.train_on}; give "
            "--train_on=chosen, or refs with --min_reward")
rows.refuse(paired_data and args.min_reward is not None,
            f"--min_reward selects single completions, --train_on={args.train_on} pairs; drop one")
rows.refuse(args.length_normalize and args.loss != "qrpo",
            "--length_normalize is for --loss=qrpo; omit it (for DPO: --loss=dpo_norm)")
rows.refuse(args.lora and args.shard,
            "--lora does not go with --shard: its frozen weights are small enough for each rank; drop one")
rows.refuse(args.lora and importlib.util.find_spec("peft") is None, "--lora needs peft; pip install peft")
rows.refuse(args.shard and "RANK" not in os.environ,
            "--shard needs several processes: start it with torchrun --nproc_per_node=N train.py ...")
inputs = [path for path in (args.model, args.ref_model, args.data, args.eval_data) if path]
rows.refuse(Path(args.out).resolve() in [Path(path).resolve() for path in inputs],
            f"--out={args.out} would change the model or the data there; give another folder")
rows.refuse(args.dry_run and "RANK" in os.environ, "--dry_run is for one process: start it without torchrun")

# -----------------------------------------------------------------------------
# set-up: processes, device, precision, and the folder of the run

rows.stop_on_signals()  # before the first step there is nothing to save
device = get_device()
keep_freed_memory(device)  # a CPU reuses the large tensors of every step
rank, world = start_processes(device)
main_process = rank == 0
dtype = get_dtype(args.dtype, device)
autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
micro_batch_tokens = args.micro_batch_tokens or (16384 if device.type == "cuda" else 1024)

out = Path(args.out)
cache = args.cache or out / "cache"
config = {name: value for name, value in vars(args).items() if name not in FREE}
if args.dry_run:
    scratch = tempfile.TemporaryDirectory()
    cache = scratch.name
else:
    rows.check_run(out, config, args.resume)

# -----------------------------------------------------------------------------
# data and policy

tokenizer = load_tokenizer(args.model, args.trust_remote_code, args.template_args)
if args.ref_model:
    check_same_ids(tokenizer, load_tokenizer(args.ref_model, args.trust_remote_code))
load = load_skeleton if args.shard else load_model  # a skeleton has no weights before `shard`
weights_dtype = dtype if args.lora else torch.float32
# in evaluation mode, and it stays there: no dropout
model = load(args.model, weights_dtype, device, args.trust_remote_code)

choices = dataset.Choices(
    train_on=args.train_on, pairs=size == 2, needs_reward="rewards" in needs or args.min_reward is not None,
    needs_refs=has_targets, min_reward=args.min_reward, num_candidates=args.num_candidates,
    num_ref_rewards=args.num_ref_rewards, max_length=args.max_length)
train_data = dataset.load(args.data, cache, args.model, tokenizer, model, choices)
eval_data = None
if args.eval_data:
    eval_data = dataset.load(args.eval_data, cache, args.model, tokenizer, model, choices)
reference_files = model_fingerprint(args.ref_model or args.model)
for data in filter(None, (train_data, eval_data)):
    if main_process:
        print(data.summary, flush=True)
    if has_targets:
        dataset.check_references(data, args, reference_files)
tied = train_data.tied == 1  # every other reference has the same reward
if has_targets and tied.all():
    rows.fail(f"{args.data}: no completion's reward differs from its other references', so there is nothing "
              "to learn; look at the reward, or sample more references")
if args.loss == "qrpo" and args.quantile == "paper" and tied.mean() > 0.1:
    b = get_batch(train_data, np.flatnonzero(tied)[:256], device)
    rise = targets(b).mean().exp()
    if main_process:
        print(f"WARNING: {tied.mean():.0%} of the completions have the same reward as all of their "
              f"references, and --quantile=paper asks these to become {rise:.3g} times as likely, however "
              "bad they are; --quantile=exact would leave them as they are", flush=True)

num_examples = len(train_data.lens) // size  # completions or pairs
steps_per_epoch = math.ceil(num_examples / args.batch_size)  # all of nearly the same size
num_steps = args.epochs * steps_per_epoch
config |= {"data_fingerprint": train_data.fingerprint, "steps": num_steps, "has_targets": has_targets}


def examples_of(step):
    """The completions of a step, (n, size), the same on every rank: each epoch is one seeded shuffle."""
    epoch, i = divmod(step, steps_per_epoch)
    order = np.random.default_rng([args.seed, epoch]).permutation(num_examples)
    return np.array_split(order, steps_per_epoch)[i][:, None] * size + np.arange(size)


if args.dry_run:
    shown = examples_of(0)[:4].reshape(-1)
    b = get_batch(train_data, shown, device)
    asked = targets(b) if has_targets else torch.full_like(b.rewards, math.nan)
    dataset.show(train_data, tokenizer, shown, asked.tolist())
    sys.exit()

if main_process:
    metrics_file = rows.open_part(out / "metrics.jsonl")  # which no other process may have open
rows.check_run(out, config, args.resume)  # now also that the data are the same
if args.gradient_checkpointing:
    checkpoint_activations(model)
flops = flops_per_token(model, train_data.lens.mean())  # before the parameters are sharded
adapter = None
if args.lora:
    adapter = add_lora(model, args.lora, args.seed)
    flops *= 2 / 3  # frozen weights get no gradients
policy = Policy(model, length_groups=size)  # the two of a pair differ in length: less padding in two groups
# bytes: weights, gradients and two states of AdamW, in float32; or frozen weights
memory = sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in model.parameters())
if args.shard:
    policy = shard(policy, dtype, device)
    memory /= world

# -----------------------------------------------------------------------------
# reference log-probabilities: the policy's own, before it moves

reference = policy
if args.ref_model:
    reference = Policy(load(args.ref_model, weights_dtype, device, args.trust_remote_code))
    if args.shard:
        reference = shard(reference, dtype, device)
key = [reference_files, str(dtype), str(weights_dtype), args.shard]
for data in filter(None, (train_data, eval_data)):
    with autocast:
        data.ref_logps = dataset.cached_logps(reference, data, cache, key, micro_batch_tokens, device)
del reference

# -----------------------------------------------------------------------------
# optimizer, and where the run continues

parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.0, fused=True)
start_step = load_state(out / "resume", policy, optimizer)  # 0 for a new run
if world > 1 and not args.shard:
    policy = DistributedDataParallel(policy, gradient_as_bucket_view=True)

# -----------------------------------------------------------------------------
# the record of the run, and its metrics

tracker = None
if main_process:
    # drop what was logged after the state was saved; an evaluation is the first thing after that
    rows.keep_while(metrics_file, lambda line: line["step"] < start_step or (
        line["step"] == start_step and "loss" in line))
    rows.write_run(out, config, finished=False)
    if args.track:
        tracker = rows.Tracker(args.track, out, config)
    kind = "pairs" if size == 2 else "completions"
    print(f"{out}: from step {start_step} to {num_steps}, each of about {num_examples // steps_per_epoch} "
          f"{kind} and {train_data.lens.sum() // steps_per_epoch:,} tokens, on {world} x {device.type} in "
          f"{dtype}; {memory / 1e9:.2f} GB per process for weights, gradients and AdamW, and more for "
          "activations", flush=True)


def log(step, values):
    """Append a line to metrics.jsonl. NaN: nothing to log."""
    if main_process:
        line = {"step": step} | {name: value for name, value in values.items() if not math.isnan(value)}
        rows.append(metrics_file, line)
        if tracker:
            tracker.log(line)


def metrics(b, logps, loss):
    """name -> values, whose mean over the whole step is logged; NaN: does not apply. A new one is a line."""
    log_ratio = logps - b.ref_logps
    return {
        "loss": loss,
        "log_ratio": log_ratio,
        "log_ratio_better": log_ratio.where(b.side > 0, math.nan),  # chosen, or better than the row's mean
        "log_ratio_worse": log_ratio.where(b.side < 0, math.nan),   # rejected, or worse; see dataset.sides
        "drift": log_ratio.abs() / (b.lens - b.prompt_lens),        # nats per token; 0 at the start
    }


@torch.no_grad()
def evaluate(step):
    """Log the means of the metrics on eval_data, as eval_NAME."""
    meter = Meter()
    examples = np.arange(len(eval_data.lens)).reshape(-1, size)
    for index, weight in micro_batches(eval_data.lens, examples, micro_batch_tokens, rank, world):
        b = get_batch(eval_data, index, device)
        b.mean_length = (eval_data.lens - eval_data.prompt_lens).mean()
        with autocast:
            logps = policy(b.tokens, b.prompt_lens, b.lens)
        meter.add(metrics(b, logps, loss_terms(b, logps)), weight)
    log(step, {f"eval_{name}": value for name, value in meter.means().items()})


def check(done, means, lengths, examples):
    """Stop where training would go on with what is wrong."""
    # nats per token: the rounding errors of n tokens add up to about sqrt(n) of one's
    limit = DRIFT_LIMIT[dtype] * np.mean(1 / np.sqrt(lengths))
    if done == 1 and not args.ref_model and not means["drift"] < limit:  # it is still the reference model
        rows.fail(f"step 1: the policy's log-probabilities are {means['drift']:.2g} nats per token from the "
                  f"reference's (limit {limit:.2g}). Most likely {cache} was made with another model (delete "
                  "it), or the model is not deterministic")
    if not math.isfinite(means["grad_norm"]):
        ids = sorted(set(train_data.ids[train_data.row[examples.reshape(-1)]].tolist()))
        rows.fail(f"step {done}: loss {means['loss']}, gradient norm {means['grad_norm']}; nothing was saved "
                  "since the last checkpoint. Lower --learning_rate or raise --beta, and look at this step's "
                  f"rows, {', '.join(ids)}")


# -----------------------------------------------------------------------------
# the training loop

stop_requested = False


def request_stop(signum, frame):
    global stop_requested
    stop_requested = True


def due(every, step):
    return every > 0 and step % every == 0


rows.stop_on_signals(request_stop)
bar = rows.progress(range(start_step, num_steps), initial=start_step, total=num_steps, desc=args.loss,
                    unit="step")
for step in bar:
    if eval_data and (step == 0 or due(args.eval_every, step)):
        evaluate(step)
    if step > 0 and due(args.save_every, step):
        save_model(model, args.model, out / "checkpoints" / f"step_{step:06d}", adapter)

    started = time.time()
    lr = args.learning_rate * cosine(step, num_steps, WARMUP)
    for group in optimizer.param_groups:
        group["lr"] = lr
    examples = examples_of(step)                                    # (n, size) completions, n <= batch_size
    lengths = (train_data.lens - train_data.prompt_lens)[examples]  # (n, size) tokens of completion
    batches = list(micro_batches(train_data.lens, examples, micro_batch_tokens, rank, world))
    meter = Meter()
    for i, (index, weight) in enumerate(batches):            # weight 1; 0: a filler for a rank without work
        sync_gradients(policy, i == len(batches) - 1)        # the ranks average once, at the end
        b = get_batch(train_data, index, device)             # tokens (B, T); lens, rewards, ... (B,)
        b.mean_length = lengths.mean()                       # for SFT
        with autocast:
            logps = policy(b.tokens, b.prompt_lens, b.lens)  # (B,) log pi(y|x), summed over completion tokens
        # by default qrpo_loss(beta, logps, ref_logps, rewards, ref_rewards), see LOSSES
        loss = loss_terms(b, logps)                          # (B,), or (B / 2,) for pairs
        # times world, as the ranks average: the gradient is that of the step's mean, however it is split
        (loss.sum() * weight * world / len(examples)).backward()
        meter.add(metrics(b, logps.detach(), loss.detach()), weight)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
    if args.shard:
        grad_norm = grad_norm.full_tensor()
    meter.add({"grad_norm": grad_norm})
    optimizer.step()
    optimizer.zero_grad()

    means = meter.means()  # waits until the device has done the step
    done, seconds = step + 1, time.time() - started
    check(done, means, lengths, examples)
    tokens_per_second = int(train_data.lens[examples].sum()) / seconds
    means |= {"learning_rate": lr, "epoch": done / steps_per_epoch, "seconds": seconds,
              "tokens_per_second": tokens_per_second}
    if peak_flops(device):
        means["mfu"] = flops * tokens_per_second / world / peak_flops(device)
    log(done, means)
    bar.set_postfix(loss=f"{means['loss']:.4g}", log_ratio=f"{means['log_ratio']:.3g}",
                    tokens_s=f"{tokens_per_second:,.0f}", refresh=False)

    stop = any_rank(stop_requested) and done < num_steps
    if stop or done == num_steps or due(args.save_every, done):
        save_state(out / "resume", done, policy, optimizer)
    if stop:
        bar.close()
        if main_process:
            print(f"{out}: told to stop; saved step {done}, start again with --resume", flush=True)
        sys.exit(75)

# -----------------------------------------------------------------------------
# the trained model

if eval_data:
    evaluate(num_steps)
save_model(model, args.model, out / ".trained", adapter)
if main_process:
    rows.finish_run(out, config)
    print(f"{out}: the trained model, run.json and metrics.jsonl")
if dist.is_initialized():
    barrier()
    dist.destroy_process_group()
