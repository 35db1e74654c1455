"""Train on fresh samples: QRPO on-policy. Every step samples completions of the policy, rewards them, and
regresses their log-ratios to the reference model on their targets, so what the policy does now is what
the step corrects.

Reads rewarded rows (score.py's output) for their prompts and ref_rewards. Starts from --model, best the
outcome of `train.py --loss=forward_kl` on the same rows. Writes to OUT the trained model, run.json,
metrics.jsonl and samples.jsonl: what was sampled, with rewards and log-ratios. A killed run continues
with the same command.

    python online.py --model=out/qrpo --ref_model=MODEL --data=REWARDED --out=out/online --reward=tests

On the policy's own samples, the gradient of the mean of (target - log-ratio)^2 / 2 is that of KL(pi ||
pi*): of the objective E[R] - beta KL(pi || pi_ref) itself, with a variance that vanishes at the optimum.
No baseline is needed, as Z is known. Policy and reference model are both in memory; under torchrun, the
ranks share the prompts of a step (DDP).
"""
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dataset  # noqa: E402
import generate_refs  # noqa: E402
import qrpo  # noqa: E402
import rows  # noqa: E402
import score  # noqa: E402
from model import (Policy, context_length, decode, end_ids, get_device, get_dtype, keep_freed_memory,  # noqa: E402
                   load_model, load_tokenizer, row_prompt_ids)

# -----------------------------------------------------------------------------
# settings

parser = rows.Parser(__doc__)
add = parser.add_argument
add("--model", required=True, help="folder or hub name of the policy to start from")
add("--ref_model", required=True, help="the reference model, which ref_rewards belong to")
add("--data", required=True, help="JSONL file or folder of rewarded rows: prompts and ref_rewards")
add("--out", required=True, type=Path, help="folder of the run")
add("--reward", required=True, help="tests, FILE.py:NAME or model:PATH, as score.py's; that of ref_rewards")
add("--score", default="", help="more flags of score.py, in one string")
add("--beta", type=float, help="strength of the KL term (default: that of the run in --model)")
add("--transform", default="identity", choices=qrpo.TRANSFORMS, help="f in R = f(quantile)")
add("--quantile", default="exact", choices=qrpo.QUANTILES, help="see train.py")
add("--learning_rate", type=float, default=1e-6, help="AdamW's, at the peak of the schedule")
add("--steps", type=int, default=200, help="optimiser steps")
add("--prompts", type=int, default=32, help="prompts per step, over all ranks")
add("--samples", type=int, default=4, help="completions per prompt and step")
add("--max_new_tokens", type=int, default=512, help="longest completion, in tokens")
add("--batch_size", type=int, default=128, help="completions sampled at a time; memory grows with it")
add("--micro_batch_tokens", type=int, default=0,
    help="padded tokens in a forward pass; 0: 16384 on a GPU, 1024 on a CPU")
add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
    help="of forward and backward; weights are float32. auto: bfloat16 on a GPU")
add("--save_every", type=int, default=20, help="steps between saves, from which a killed run continues")
add("--seed", type=int, default=0, help="of prompts and samples")
add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
args = parser.parse_args()
if args.beta is None:
    before = Path(args.model) / "run.json"
    if not before.exists():
        rows.fail(f"--model={args.model} is not the folder of a run; give --beta")
    args.beta = rows.load_json(before)["config"]["beta"]

ADAM_BETAS = 0.9, 0.95  # the samples change, so a shorter memory of squared gradients than the usual 0.999
WARMUP = 0.05           # of the steps
METRICS = "loss", "reward", "quantile_reward", "kl", "objective", "length"  # means over a step's samples
FREE = "data", "out", "batch_size", "micro_batch_tokens", "save_every"  # what may change when a run continues

# -----------------------------------------------------------------------------
# set-up

for signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(signum, lambda *_: sys.exit(75))  # what was saved is complete: "start me again"
rank, world = rows.rank_and_world()
if args.prompts % world:
    rows.fail(f"--prompts={args.prompts} must be a multiple of the {world} processes, which share them")
device = get_device()
keep_freed_memory(device)
if "RANK" in os.environ:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
dtype = get_dtype(args.dtype, device)
autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
micro_batch_tokens = args.micro_batch_tokens or (16384 if device.type == "cuda" else 1024)

config = {name: value for name, value in vars(args).items() if name not in FREE}
config |= {"has_targets": True, "length_normalize": False}  # as in train.py's record, for evaluate.py
record = args.out / "run.json"
if record.exists():
    before = rows.load_json(record)
    for name, value in config.items():
        if before["config"].get(name) != value:
            rows.fail(f"{args.out}: was started with --{name}={before['config'].get(name)}, now {value}; "
                      "use the same settings, or another --out")
    if before["finished"]:
        print(f"{args.out}: this run has finished, nothing to do")
        sys.exit(0)

tokenizer = load_tokenizer(args.model, args.trust_remote_code)
model = load_model(args.model, torch.float32, device, args.trust_remote_code)
reference = Policy(load_model(args.ref_model, torch.float32, device, args.trust_remote_code))
ends, context = end_ids(model, tokenizer), context_length(model)
score_args = score.arguments(["--data=", "--out=", f"--reward={args.reward}", *shlex.split(args.score)])
made_by = {"reward": args.reward, "fingerprint": rows.fingerprint(score_args.kind.settings(score_args))}
reward_of = score_args.kind.load(score_args)

prompts, ref_rewards = [], []
for row in rows.stream(args.data, require=("prompt", "ref_rewards")):
    before = row.get("made_by", {}).get("ref_rewards", made_by)
    if before["fingerprint"] != made_by["fingerprint"]:
        rows.fail(f"{row['__at__']}: its ref_rewards were made by another reward ({before['reward']})")
    ids = row_prompt_ids(tokenizer, row)
    row = {name: value for name, value in row.items() if name not in score.REWARD_OF}
    prompts.append({"row": row, "prompt": ids, "limit": min(args.max_new_tokens, context - len(ids))})
    ref_rewards.append([math.nan if reward is None else reward for reward in row["ref_rewards"]])
width = max(map(len, ref_rewards))
ref_rewards = np.array([r + [math.nan] * (width - len(r)) for r in ref_rewards], np.float32)  # (rows, width)


sampling = SimpleNamespace(num_refs=args.samples, temperature=1.0, top_p=1.0, batch_size=args.batch_size,
                           field="samples", seed=args.seed)  # as generate_refs.py's


def step_prompts(step):
    """The indices of this rank's prompts in a step: each pass over the data is one seeded shuffle."""
    positions = np.arange(step * args.prompts, (step + 1) * args.prompts)
    order = {epoch: np.random.default_rng([args.seed, epoch]).permutation(len(prompts))
             for epoch in set(positions // len(prompts))}
    return [order[p // len(prompts)][p % len(prompts)] for p in positions][rank::world]


def sample(step):
    """Fresh completions of the policy, rewarded, as the arrays of dataset.build; those of unknown reward
    left out.
    """
    index = step_prompts(step)
    requests = [prompts[i] | {"row": {"id": f"{step}/{i}", "place": place}} for place, i in enumerate(index)]
    with autocast:
        found = {row["place"]: completions for row, completions in
                 generate_refs.sample(model, requests, sampling, ends)}
    todo = []
    for place, i in enumerate(index):
        todo.append((prompts[i]["row"] | {"place": place}, [
            decode(tokenizer, prompts[i]["prompt"], ids) for ids in found[place]]))
    rewards = {row["place"]: values for row, values in reward_of(todo)}

    fresh = SimpleNamespace(row=[], rewards=[], prompt_lens=[], sequences=[], texts=[])
    for place, i in enumerate(index):
        for ids, text, reward in zip(found[place], todo[place][1], rewards[place]):
            if reward is not None:
                fresh.row.append(place)
                fresh.rewards.append(reward)
                fresh.prompt_lens.append(len(prompts[i]["prompt"]))
                fresh.sequences.append(prompts[i]["prompt"] + ids)
                fresh.texts.append((prompts[i]["row"]["id"], text))
    fresh.row, fresh.prompt_lens = np.array(fresh.row, int), np.array(fresh.prompt_lens, int)
    fresh.rewards = np.array(fresh.rewards, np.float32)
    fresh.lens = np.array([len(ids) for ids in fresh.sequences], int)
    fresh.starts = np.cumsum(fresh.lens) - fresh.lens
    fresh.tokens = np.array([token for ids in fresh.sequences for token in ids], np.int32)
    fresh.among_refs = np.zeros(len(fresh.row), bool)
    fresh.ref_rewards = ref_rewards[index]
    return fresh


# -----------------------------------------------------------------------------
# optimizer, and where a killed run continues

policy = Policy(model)
if world > 1:
    policy = DistributedDataParallel(policy)
optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, ADAM_BETAS, weight_decay=0.0,
                              fused=True)


def learning_rate(step):
    """Linear warm-up, then a cosine to 0."""
    warmup = math.ceil(WARMUP * args.steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(args.steps - warmup, 1)))


def save(step):
    """OUT/resume.pt, complete or not at all."""
    if rank == 0:
        with rows.writing(args.out):
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, args.out / ".resume.pt")
            os.replace(args.out / ".resume.pt", args.out / "resume.pt")


start = 0
if (args.out / "resume.pt").exists():
    state = torch.load(args.out / "resume.pt", map_location=device, weights_only=True)
    start = state["step"]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    del state
samples_file = rows.open_part(args.out / "samples" / f"part-{rank:05d}.jsonl")
metrics_file = rows.open_part(args.out / "metrics.jsonl") if rank == 0 else None
for file in (samples_file, metrics_file):
    if file:
        rows.keep_while(file, lambda row: row["step"] <= start)
if rank == 0:
    rows.write_json(record, {"config": config, "command": shlex.join(sys.argv), "finished": False})

# -----------------------------------------------------------------------------
# the training loop

beta = torch.tensor([args.beta], device=device)
best = (beta * qrpo.log_partition(beta, args.transform)).item()  # no policy has a higher objective
bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step", disable=rank != 0)
for step in bar:
    started = time.time()
    fresh = sample(step)
    if len(fresh.row) == 0:
        rows.fail(f"step {step}: {args.reward} gave no known reward; look at it, and start again to continue")
    count = torch.tensor(float(len(fresh.row)), device=device)  # completions of all ranks
    if world > 1:
        dist.all_reduce(count)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
    every = np.arange(len(fresh.row))[:, None]
    batches = list(dataset.micro_batches(fresh.lens, every, micro_batch_tokens))
    for i, (index, _) in enumerate(batches):
        policy.require_backward_grad_sync = i == len(batches) - 1
        b = dataset.get_batch(fresh, index, device)  # tokens (B, T); lens, rewards (B,); ref_rewards (B, n)
        with autocast:
            with torch.no_grad():
                ref_logps = reference(b.tokens, b.prompt_lens, b.lens)  # (B,)
            logps = policy(b.tokens, b.prompt_lens, b.lens)             # (B,)
        targets = qrpo.target_log_ratios(                               # (B,) log(pi*/pi_ref)
            beta, b.rewards, b.ref_rewards, args.transform, args.quantile, b.among_refs)
        loss = qrpo.regression_loss(beta, logps, ref_logps, targets)    # (B,)
        (loss.sum() * world / count).backward()

        kl = (logps - ref_logps).detach()
        R = beta * targets + best
        values = loss.detach(), b.rewards, R, kl, R - beta * kl, b.lens - b.prompt_lens
        sums += torch.stack([value.double().sum() for value in values])
        for k, log_ratio in zip(index, kl.tolist()):
            row_id, text = fresh.texts[k]
            rows.append(samples_file, {"step": step + 1, "id": row_id, "text": text,
                                       "reward": float(fresh.rewards[k]), "log_ratio": log_ratio})
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
    if not math.isfinite(grad_norm):
        rows.fail(f"step {step}: gradient norm {grad_norm}; lower --learning_rate or raise --beta")
    optimizer.step()
    optimizer.zero_grad()

    if world > 1:
        dist.all_reduce(sums)
    row = dict(zip(METRICS, (sums / count).tolist()))
    bar.set_postfix(reward=f"{row['reward']:.3g}", kl=f"{row['kl']:.3g}",
                    objective=f"{row['objective']:.4g}/{best:.4g}")
    if metrics_file:
        rows.append(metrics_file, {"step": step + 1} | row | {
            "grad_norm": grad_norm, "learning_rate": learning_rate(step), "seconds": time.time() - started})
    if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
        save(step + 1)

# -----------------------------------------------------------------------------
# the trained model

if rank == 0:
    with rows.writing(args.out):
        model.config.dtype = torch.float32
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    rows.write_json(record, {"config": config, "command": shlex.join(sys.argv), "finished": True})
    (args.out / "resume.pt").unlink()
    print(f"{args.out}: the trained model, run.json, metrics.jsonl and samples")
if "RANK" in os.environ:
    dist.barrier()
    dist.destroy_process_group()
