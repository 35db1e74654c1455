"""QRPO on fresh samples. Every step samples completions of the policy, rewards them, and regresses their
log-ratios to the reference model on their targets: what the policy does now is what the step corrects.

Reads rewarded rows (score.py's output) for their prompts and ref_rewards. Starts from --model, best the
outcome of train.py on the same rows. Writes to OUT the trained model, run.json, metrics.jsonl, and samples/:
what was sampled, with rewards and log-ratios. One process, or several under torchrun (DDP):

    python examples/online.py --model=out/qrpo --ref_model=MODEL --data=out/train/rewarded --out=out/online \
        --reward=tests

On the policy's own samples, the gradient of the mean of (target - log-ratio)^2 / 2 is that of KL(pi || pi*),
so of the objective E[R] - beta KL(pi || pi_ref) itself, with a variance that vanishes at the optimum. No
baseline is needed, as Z is known. Policy and reference model are both in memory.
"""
import math
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate_refs
import qrpo
import rows
import score
from dataset import ANOTHER_MODEL, Meter, get_batch, micro_batches
from model import (Policy, barrier, context_length, cosine, get_device, get_dtype, keep_freed_memory,
                   load_model, load_state, load_tokenizer, model_fingerprint, save_model, save_state,
                   start_processes, sync_gradients)
from tokens import check_same_ids, decode, end_ids, row_prompt_ids
from qrpo import qrpo_loss

# -----------------------------------------------------------------------------
# settings

parser = rows.Parser(__doc__)
flag = parser.add_argument
flag("--model", required=True, help="folder or hub name of the policy to start from")
flag("--ref_model", required=True, help="the reference model, which ref_rewards belong to")
flag("--data", required=True, help="JSONL file or folder of rewarded rows: prompts and ref_rewards")
flag("--out", required=True, type=Path, help="folder of the run")
flag("--reward", required=True, help="tests, FILE.py:NAME or model:PATH, as score.py's; that of ref_rewards")
flag("--score", default="", help="more flags of score.py, in one string")
flag("--beta", type=rows.positive, default=0.1, help="strength of the KL term")
flag("--learning_rate", type=rows.positive, default=1e-6, help="AdamW's, at the peak of the schedule")
flag("--steps", type=rows.count, default=200, help="optimiser steps")
flag("--prompts", type=rows.count, default=32, help="prompts per step, over all ranks")
flag("--samples", type=rows.count, default=4, help="completions per prompt and step")
flag("--max_new_tokens", type=rows.count, default=512, help="longest completion, in tokens")
flag("--batch_size", type=rows.count, default=128, help="completions sampled at a time; memory grows with it")
flag("--micro_batch_tokens", type=rows.whole, default=0,
     help="padded tokens in a forward pass; 0: 16384 on a GPU, 1024 on a CPU")
flag("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
     help="of forward and backward; weights are float32. auto: bfloat16 on a GPU")
flag("--save_every", type=rows.count, default=20, help="steps between states to resume from")
flag("--resume", action="store_true", help="continue the run in OUT from where it last saved")
flag("--seed", type=rows.whole, default=0, help="of prompts and samples")
flag("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
args = parser.parse_args()

ADAM_BETAS = 0.9, 0.95  # the samples change, so a shorter memory of squared gradients than the usual 0.999
WARMUP = 0.05           # of the steps
FREE = "data", "out", "batch_size", "micro_batch_tokens", "save_every", "resume"  # may change on a resume

# -----------------------------------------------------------------------------
# set-up: processes, models, reward, prompts

rows.stop_on_signals()
device = get_device()
keep_freed_memory(device)
rank, world = start_processes(device)
rows.refuse(args.prompts % world,
            f"--prompts={args.prompts} must be a multiple of the {world} processes, which share them")
dtype = get_dtype(args.dtype, device)
autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
micro_batch_tokens = args.micro_batch_tokens or (16384 if device.type == "cuda" else 1024)
config = {name: value for name, value in vars(args).items() if name not in FREE}
config |= {"loss": "qrpo", "transform": "identity", "quantile": "exact", "has_targets": True}
rows.check_run(args.out, config, args.resume)

tokenizer = load_tokenizer(args.model, args.trust_remote_code)
check_same_ids(tokenizer, load_tokenizer(args.ref_model, args.trust_remote_code))
model = load_model(args.model, torch.float32, device, args.trust_remote_code)
reference = Policy(load_model(args.ref_model, torch.float32, device, args.trust_remote_code))
ends, context = end_ids(model, tokenizer), context_length(model)
score_args = score.arguments(["--data=", "--out=", f"--reward={args.reward}", *shlex.split(args.score)])
made_by = {"reward": args.reward, "fingerprint": rows.fingerprint(score_args.kind.settings(score_args))}
reward_of = score_args.kind.load(score_args)
barrier()  # all processes have looked into OUT before one writes there

requests, ref_rewards = [], []  # what generate_refs.sample takes, a row each
num_unknown = 0                 # rows that no quantile can be taken in
reference_files = model_fingerprint(args.ref_model)
for row in rows.read(args.data, require=("prompt", "ref_rewards")):
    before = row.get("made_by", {}).get("ref_rewards", made_by)
    rows.refuse(before["fingerprint"] != made_by["fingerprint"],
                f"{row['__at__']}: its ref_rewards were made by another reward ({before['reward']})")
    if row.get("made_by", {}).get("ref_completions", {}).get("files") not in (None, reference_files):
        rows.say_once(ANOTHER_MODEL.format(args.ref_model))
    if all(reward is None for reward in row["ref_rewards"]):
        num_unknown += 1
        continue
    ids = row_prompt_ids(tokenizer, model, row)
    rows.refuse(len(ids) >= context, f"{row['__at__']}: the prompt has {len(ids)} tokens and the model's "
                f"context holds {context}; drop the row")
    row = {name: value for name, value in row.items() if name not in score.REWARD_OF}
    requests.append({"row": row, "prompt": ids, "limit": min(args.max_new_tokens, context - len(ids))})
    ref_rewards.append([math.nan if reward is None else reward for reward in row["ref_rewards"]])
if num_unknown and rank == 0:
    print(f"{args.data}: {num_unknown} rows dropped, without a known reference reward")
rows.refuse(args.prompts > len(requests), f"--prompts={args.prompts}, but {args.data} has only "
            f"{len(requests)} rows to take them from; give fewer")
width = max(map(len, ref_rewards))
ref_rewards = np.array([r + [math.nan] * (width - len(r)) for r in ref_rewards], np.float32)  # (rows, width)
prompts = [request["prompt"] for request in requests]
config |= {"data_fingerprint": rows.fingerprint([prompts, ref_rewards.tolist()]),
           "reward_fingerprint": made_by["fingerprint"]}  # which the rows may not name


def prompts_of(step):
    """The numbers of this rank's prompts in a step: each pass over the data is one seeded shuffle, without
    the few at its end that fill no step. No prompt is twice in a step, where it would get the same samples.
    """
    epoch, i = divmod(step, len(requests) // args.prompts)
    order = np.random.default_rng([args.seed, epoch]).permutation(len(requests))
    return order[i * args.prompts:][:args.prompts][rank::world].tolist()


sampling = SimpleNamespace(num_refs=args.samples, temperature=1.0, top_p=1.0, batch_size=args.batch_size,
                           field="samples", seed=args.seed)  # as generate_refs.py's flags


def text_of(n, ids):
    """The text of a sample for prompt number n, as that of its references was made."""
    made_by = requests[n]["row"].get("made_by", {}).get("ref_completions", {})
    return decode(tokenizer, requests[n]["prompt"], ids, ends, made_by.get("keep_special_tokens", False))


def sample(step):
    """Fresh completions of the policy with their rewards, (row, token ids, text, reward): those of unknown
    reward are left out. row: which of this rank's prompts in the step.
    """
    numbers = prompts_of(step)
    step_requests = [requests[n] | {"row": {"id": f"{step}/{n}", "number": n}} for n in numbers]
    completions = {}  # number of the prompt: its samples; they end in any order
    with autocast:
        for row, sampled in generate_refs.sample(model, step_requests, sampling, ends):
            n = row["number"]
            completions[n] = [{"text": text_of(n, ids), "token_ids": ids} for ids in sampled]
    todo = [(requests[n]["row"], completions[n]) for n in numbers]
    rewards = {row["id"]: values for row, values in reward_of(todo)}  # which come in any order, too
    fresh = []
    for i, n in enumerate(numbers):
        for completion, reward in zip(completions[n], rewards[requests[n]["row"]["id"]]):
            if reward is not None and not isinstance(reward, score.Failed):
                fresh.append((i, completion["token_ids"], completion["text"], reward))
    return fresh


def as_arrays(fresh, numbers):
    """The samples of a step as the arrays that dataset.get_batch takes from."""
    row, completions, _, rewards = zip(*fresh)
    its_prompts = [prompts[numbers[i]] for i in row]
    sequences = [prompt + ids for prompt, ids in zip(its_prompts, completions)]
    lens = np.array([len(sequence) for sequence in sequences])
    return SimpleNamespace(
        tokens=np.concatenate(sequences, dtype=np.int32),
        starts=np.cumsum(lens) - lens,
        lens=lens,
        prompt_lens=np.array([len(prompt) for prompt in its_prompts]),
        rewards=np.array(rewards, np.float32),
        row=np.array(row),
        ref_rewards=ref_rewards[numbers])


# -----------------------------------------------------------------------------
# optimizer, and where the run continues

policy = Policy(model)
optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, ADAM_BETAS, weight_decay=0.0,
                              fused=True)
start_step = load_state(args.out / "resume", policy, optimizer)
if world > 1:
    policy = DistributedDataParallel(policy, gradient_as_bucket_view=True)
samples_file = rows.open_part(args.out / "samples" / f"part-{rank:05d}.jsonl")
parts = sorted((args.out / "samples").glob("part-*.jsonl"))  # also those of a run of more processes
for part in [samples_file, *map(rows.open_part, parts[world:][rank::world])]:
    rows.keep_while(part, lambda row: row["step"] <= start_step)
if rank == 0:
    rows.check_run(args.out, config, args.resume)  # now also that the data are the same
    metrics_file = rows.open_part(args.out / "metrics.jsonl")
    rows.keep_while(metrics_file, lambda row: row["step"] <= start_step)
    rows.write_run(args.out, config, finished=False)

# -----------------------------------------------------------------------------
# the training loop

beta = torch.tensor([args.beta], device=device)
best = (beta * qrpo.log_partition(beta)).item()  # no policy has a higher objective
bar = rows.progress(range(start_step, args.steps), initial=start_step, total=args.steps, unit="step")
for step in bar:
    started = time.time()
    fresh = sample(step)
    rows.refuse(not fresh, f"step {step}: {args.reward} gave no known reward; look at it, and give --resume")
    numbers = prompts_of(step)
    data = as_arrays(fresh, numbers)
    barrier()  # sampling takes some ranks longer
    count = torch.tensor(float(len(fresh)))  # completions of all ranks
    if world > 1:
        dist.all_reduce(count)
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate * cosine(step, args.steps, WARMUP)
    batches = list(micro_batches(data.lens, np.arange(len(fresh))[:, None], micro_batch_tokens))
    meter = Meter()
    for i, (index, _) in enumerate(batches):
        sync_gradients(policy, i == len(batches) - 1)
        b = get_batch(data, index, device)  # tokens (B, T); lens, rewards (B,); ref_rewards (B, n)
        with autocast:
            with torch.no_grad():
                ref_logps = reference(b.tokens, b.prompt_lens, b.lens)  # (B,)
            logps = policy(b.tokens, b.prompt_lens, b.lens)             # (B,)
        loss = qrpo_loss(beta, logps, ref_logps, b.rewards, b.ref_rewards, quantile="exact")  # (B,)
        (loss.sum() * world / count.item()).backward()

        kl = (logps - ref_logps).detach()
        targets = qrpo.target_log_ratios(beta, b.rewards, b.ref_rewards, quantile="exact")
        R = beta * targets + best
        meter.add({"loss": loss.detach(), "reward": b.rewards, "quantile_reward": R, "kl": kl,
                   "objective": R - beta * kl, "length": (b.lens - b.prompt_lens).float()})
        for k, log_ratio in zip(index, kl.tolist()):
            place, _, text, reward = fresh[k]
            name = requests[numbers[place]]["row"]["id"]
            rows.append(samples_file, {"step": step + 1, "id": name, "text": text, "reward": reward,
                                       "log_ratio": log_ratio})
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
    rows.refuse(not math.isfinite(grad_norm),
                f"step {step}: gradient norm {grad_norm}; lower --learning_rate or raise --beta")
    optimizer.step()
    optimizer.zero_grad()

    row = meter.means()
    bar.set_postfix(reward=f"{row['reward']:.3g}", kl=f"{row['kl']:.3g}",
                    objective=f"{row['objective']:.4g}/{best:.4g}", refresh=False)
    if rank == 0:
        rows.append(metrics_file, {"step": step + 1} | row | {
            "completions": int(count), "grad_norm": grad_norm, "learning_rate": group["lr"],
            "seconds": time.time() - started})
    if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
        save_state(args.out / "resume", step + 1, policy, optimizer)

save_model(model, args.model, args.out / ".trained")
if rank == 0:
    rows.finish_run(args.out, config)
    print(f"{args.out}: the trained model, run.json, metrics.jsonl and samples")
if dist.is_initialized():
    barrier()
    dist.destroy_process_group()
