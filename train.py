"""Train a language model from pointwise rewards with QRPO (or DPO, REBEL, SimPO, SFT on the same data).

Reads rewarded rows (score.py's output). Writes to OUT the trained model as a Hugging Face folder,
run.json (settings, versions), metrics.jsonl, and checkpoints/ to resume from. One process, or several
under torchrun:

    python train.py --model=MODEL --data=out/rewarded --out=out/run --beta=0.1 --learning_rate=1e-6
    torchrun --nproc_per_node=8 train.py --model=... --data=... --out=... --shard --gradient_checkpointing

The policy starts as the reference model, so ref_logps are its own log-probabilities before step 0, and
no second model is in memory (except with --ref_model, until they are computed). SIGTERM and SIGUSR1
save a checkpoint and exit with 75: start the same command again with --resume.
"""
import contextlib
import datetime
import importlib
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dataset
import qrpo
import rows
from dataset import REGIMES, get_batch, micro_batches
from model import (Policy, add_lora, flops_per_token, get_device, get_dtype, keep_freed_memory, load_model,
                   load_skeleton, load_tokenizer, model_fingerprint, peak_flops,
                   save_model, shard, sync_gradients)

# -----------------------------------------------------------------------------
# the losses; args are the settings below, b is a batch (see load_batch)


def pairs(values):
    """(2n,) with the chosen completions at even places -> chosen (n,), rejected (n,)."""
    return values[0::2], values[1::2]


def ranks(b):
    """The share of each completion's pool, itself and its references, with at most its reward; (B,)."""
    return qrpo.quantile_cells(b.rewards, b.ref_rewards, b.among_refs)[1]


# A new loss is a function in qrpo.py and one entry here. The completions of a term are 1, or 2: chosen
# and rejected.
LOSSES = {  # name: (completions in a term, what it needs of the data, f(b, logps (B,)) -> (terms,))
    "qrpo": (1, ("rewards", "targets"), lambda b, logps: qrpo.regression_loss(
        b.beta, logps, b.ref_logps, b.targets, args.norm)),
    "forward_kl": (1, ("rewards", "targets", "sampler_logps"),
                   lambda b, logps: qrpo.forward_kl_loss(logps, b.targets, b.ref_logps, b.sampler_logps)),
    "dpo": (2, (), lambda b, logps: qrpo.dpo_loss(args.beta, *pairs(logps), *pairs(b.ref_logps))),
    "dpo_norm": (2, (), lambda b, logps: qrpo.dpo_norm_loss(
        args.beta, *pairs(logps - b.ref_logps), *pairs(b.lens - b.prompt_lens))),
    "rebel": (2, ("rewards",), lambda b, logps: qrpo.rebel_loss(
        args.beta, *pairs(logps - b.ref_logps), *pairs(b.rewards))),
    "simpo": (2, (), lambda b, logps: qrpo.simpo_loss(
        args.beta, args.gamma_beta_ratio, *pairs(logps), *pairs(b.lens - b.prompt_lens))),
    "tup": (1, ("rewards", "targets"), lambda b, logps: qrpo.tup_loss(
        logps - b.ref_logps, ranks(b), args.truncation)),
    # its mean over a step is the mean negative log-likelihood of the step's completion tokens
    "sft": (1, (), lambda b, logps: -logps / b.mean_length),
}

# -----------------------------------------------------------------------------
# settings: every flag with its default and its unit

parser = rows.Parser(__doc__)
add = parser.add_argument_group("files").add_argument
add("--data", required=True, help="JSONL file or folder of rewarded rows")
add("--eval_data", help="held-out rows, of the same form")
add("--out", required=True, help="folder of the run")
add("--cache", help="folder for tokens and ref_logps, which runs can share (default OUT/cache)")

add = parser.add_argument_group("model and data").add_argument
add("--model", required=True, help="folder or hub name of the model to train; it is also the reference model")
add("--ref_model", help="the reference model, if the policy does not start from it (a second round)")
add("--template_args", type=rows.json_object, default={}, metavar="JSON",
    help="""what the chat template gets besides the messages, such as '{"enable_thinking": false}'""")
add("--train_on", default="refs", choices=REGIMES,
    help="; ".join(f"{name}: {regime.help}" for name, regime in REGIMES.items()))
add("--num_candidates", type=int, default=0, help="train on the first N sampled completions only; 0: all")
add("--num_ref_rewards", type=int, default=0, help="use the first N ref_rewards for quantiles; 0: all")
add("--min_reward", type=float, help="train and evaluate only on completions of at least this reward")
add("--max_length", type=int, default=0,
    help="drop what has more tokens, prompt and completion; 0: refuse what exceeds the context")

add = parser.add_argument_group("loss").add_argument
add("--loss", default="qrpo", choices=LOSSES, help="what to minimise")
add("--beta", type=float, default=0.1, help="strength of the KL term, or the beta of another loss")
add("--transform", default="identity", choices=(*qrpo.TRANSFORMS, "scaled-normal-icdf"),
    help="QRPO: f in R = f(quantile)")
add("--quantile", default="paper", choices=qrpo.QUANTILES,
    help="QRPO: paper, as published, or exact, which is also right when rewards tie")
add("--norm", default="mse", choices=qrpo.NORMS, help="QRPO: squared or absolute error")
add("--length_normalize", action="store_true", help="QRPO: divide beta by the tokens of the completion")
add("--max_beta", type=float, default=0.0, help="QRPO: upper limit of that beta; 0: none")
add("--gamma_beta_ratio", type=float, default=0.5, help="SimPO: margin in nats per token")
add("--truncation", type=float, default=0.25, help="TUP: what is subtracted from ranks")

add = parser.add_argument_group("optimisation").add_argument
add("--learning_rate", type=float, default=1e-6, help="AdamW's, at the peak of the schedule")
add("--batch_size", type=int, default=256,
    help="completions (pairs, for losses of pairs) per step, over all ranks")
add("--epochs", type=int, default=1, help="passes over the data")
add("--max_grad_norm", type=float, default=0.0, help="clip the gradient norm; 0: do not, as the paper")
add("--seed", type=int, default=0, help="of the order of the data")
add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
    help="of forward and backward; weights are float32. auto: bfloat16 on a GPU")

add = parser.add_argument_group("machine").add_argument
add("--lora", type=int, default=0, metavar="RANK",
    help="train LoRA adapters of this rank (float32) on all linear layers, and freeze the weights, in "
         "--dtype; needs peft, and a higher learning rate. 0: train the weights")
add("--micro_batch_tokens", type=int, default=0,
    help="padded tokens in a forward pass, without effect on the gradient; 0: 16384 on a GPU, 1024 on a CPU")
add("--shard", action="store_true", help="shard weights, gradients and optimizer across ranks (FSDP2)")
add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")

add = parser.add_argument_group("run").add_argument
add("--eval_every", type=int, default=0, help="steps between evaluations; 0: before and after training")
add("--save_every", type=int, default=0, help="steps between checkpoints; 0: none but the trained model")
add("--resume", action="store_true", help="continue the run in OUT from where it last saved")
add("--track", choices=("wandb", "trackio"), help="also send the metrics there, if it is installed")
add("--dry_run", action="store_true", help="show some of the data, time a step, write nothing, and exit")
args = parser.parse_args()

# What a run may change when it is resumed; all else must stay as it was.
FREE = ("data", "eval_data", "out", "cache", "micro_batch_tokens", "shard", "gradient_checkpointing",
        "eval_every", "save_every", "resume", "track", "dry_run")
WARMUP = 0.1  # of the steps, as the paper

# -----------------------------------------------------------------------------
# check the settings

for name in ("beta", "learning_rate", "batch_size", "epochs"):
    if not getattr(args, name) > 0:
        rows.fail(f"--{name} must be greater than 0")
for name in ("num_candidates", "num_ref_rewards", "max_length", "micro_batch_tokens"):
    if getattr(args, name) < 0:
        rows.fail(f"--{name} must not be negative")
term_size, needs, loss_terms = LOSSES[args.loss]
paired = REGIMES[args.train_on].size == 2
if term_size == 2 and not paired:
    names = ", ".join(name for name, regime in REGIMES.items() if regime.size == 2)
    rows.fail(f"--loss={args.loss} needs pairs; give --train_on={names}, or --loss=qrpo")
weighted = "sampler_logps" in needs
if weighted and (args.train_on not in ("refs", "random_pairs", "samples") or args.quantile != "exact"):
    rows.fail(f"--loss={args.loss} weighs what the reference model, or --model itself, sampled, so that the "
              "weights average to 1; give --train_on=refs (or random_pairs, samples) and --quantile=exact")
if args.loss == "sft" and paired:
    rows.fail(f"--loss=sft would also imitate the rejected completions of --train_on={args.train_on}; give "
              "--train_on=chosen, or refs with --min_reward")
if paired and args.min_reward is not None:
    rows.fail(f"--min_reward selects single completions, --train_on={args.train_on} pairs; drop one")
if args.lora and args.shard:
    rows.fail("--lora does not go with --shard: its frozen weights are small enough for each rank; drop one")
if args.shard and "RANK" not in os.environ:
    rows.fail("--shard needs several processes: start it with torchrun --nproc_per_node=N train.py ...")

# -----------------------------------------------------------------------------
# set-up: processes, device, precision, and the folder of the run

out = Path(args.out)
for signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(signum, lambda *_: sys.exit(75))  # there is nothing to save yet: "start me again"
rank, world = rows.rank_and_world()
main_process = rank == 0
device = get_device()
keep_freed_memory(device)
if "RANK" in os.environ:
    # the others wait for the main process while it reads the data or saves: hours, not NCCL's ten minutes
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
dtype = get_dtype(args.dtype, device)
autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
micro_batch_tokens = args.micro_batch_tokens or (16384 if device.type == "cuda" else 1024)
cache = args.cache or out / "cache"
if args.dry_run:
    cache = out.with_name(f".dry_run_{out.name}")  # deleted at the end


def defining(config):
    """The settings that a resumed run must not change."""
    return {name: value for name, value in config.items() if name not in FREE}


if out.exists() and not out.is_dir():
    rows.fail(f"{out}: is a file; --out must name a folder")
if (out / "run.json").exists() and not args.dry_run:
    record = rows.load_json(out / "run.json")
    if not args.resume:
        rows.fail(f"{out}: already holds a run; continue it with --resume, or give another --out")
    for name, value in defining(vars(args)).items():
        if record["config"].get(name) != value:
            rows.fail(f"{out}: was started with --{name}={record['config'].get(name)}, now {value}; use the "
                      "same settings, or another --out")
    if record["finished"]:
        print(f"{out}: this run has finished, nothing to do")
        sys.exit(0)

# -----------------------------------------------------------------------------
# model and data

tokenizer = load_tokenizer(args.model, args.trust_remote_code, args.template_args)
load = load_skeleton if args.shard else load_model
weights_dtype = dtype if args.lora else torch.float32
model = load(args.model, weights_dtype, device, args.trust_remote_code)
choices = dataset.Choices(
    train_on=args.train_on, pairs=term_size == 2,
    needs_reward="rewards" in needs or args.min_reward is not None, needs_refs="targets" in needs,
    min_reward=args.min_reward, num_candidates=args.num_candidates, num_ref_rewards=args.num_ref_rewards,
    max_length=args.max_length)
train_data = dataset.load(args.data, cache, args.model, tokenizer, model, choices)
eval_data = None
if args.eval_data:
    eval_data = dataset.load(args.eval_data, cache, args.model, tokenizer, model, choices)
if "targets" in needs and (train_data.tied == 1).all():
    rows.fail(f"{args.data}: no completion's reward differs from its references', so there is nothing to "
              "learn; look at the reward, or sample more references")

num_terms = len(train_data.lens) // term_size  # terms of the loss: completions or pairs
steps_per_epoch = math.ceil(num_terms / args.batch_size)  # all of nearly the same size, none of a few terms
num_steps = args.epochs * steps_per_epoch


def step_terms(step):
    """The completions of a step, (terms, term_size), the same on every rank: each epoch is one seeded
    shuffle.
    """
    epoch, i = divmod(step, steps_per_epoch)
    order = np.random.default_rng([args.seed, epoch]).permutation(num_terms)
    terms = np.array_split(order, steps_per_epoch)[i]
    return terms[:, None] * term_size + np.arange(term_size)


if args.dry_run:
    # keep one step of the data, and run it twice
    full_steps, num_steps, steps_per_epoch = num_steps, 2, 1
    train_data, eval_data = dataset.subset(train_data, step_terms(0).reshape(-1)), None
    num_terms = len(train_data.lens) // term_size

# -----------------------------------------------------------------------------
# the policy

if args.gradient_checkpointing:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():  # these layers recompute only in training mode; dropout stays off
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
num_parameters = sum(p.numel() for p in model.parameters())
flops = flops_per_token(model, train_data.lens.mean())  # before the parameters are sharded
adapter = None
if args.lora:
    adapter = add_lora(model, args.lora, args.seed)
    flops *= 2 / 3  # frozen weights get no gradients
# weights, gradients and two states of AdamW, in float32; or frozen weights
memory = sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in model.parameters())
policy = Policy(model, length_groups=term_size)
if args.shard:
    policy = shard(policy, dtype, device)


def any_rank(flag):
    """Whether the flag is true on any rank."""
    if world == 1:
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


def barrier():
    if world > 1:
        dist.barrier()


# -----------------------------------------------------------------------------
# reference log-probabilities: the policy's own, before it moves

NO_GRAD = 4  # times the tokens fit into a forward pass that keeps no activations
CODE = "qrpo.py", "model.py", "dataset.py"  # computed again when one of these files is edited


def start_logps(policy, name, data):
    """log pi of every completion, float32 numpy (n,), by the model of that name as it is before training:
    one forward pass, kept in the cache.
    """
    code = [Path(__file__).with_name(name).read_text() for name in CODE]
    key = rows.fingerprint([model_fingerprint(name), data.fingerprint, str(dtype), str(weights_dtype),
                            device.type, args.shard, code])
    path = Path(cache) / f"ref_logps-{key}.npy"
    if not any_rank(main_process and path.exists()):
        with autocast:
            logps = dataset.all_logps(policy, data, NO_GRAD * micro_batch_tokens, device)
        if main_process:
            new = path.with_name(f".new_{rank}_{path.name}")
            np.save(new, logps)
            os.replace(new, path)
        barrier()
    return np.load(path)


reference = policy
if args.ref_model:
    reference = Policy(load(args.ref_model, weights_dtype, device, args.trust_remote_code), term_size)
    if args.shard:
        reference = shard(reference, dtype, device)
for data in filter(None, (train_data, eval_data)):
    data.ref_logps = data.sampler_logps = start_logps(reference, args.ref_model or args.model, data)
    if weighted and args.train_on == "samples":  # mu is the policy of the last round, where this one starts
        data.sampler_logps = start_logps(policy, args.model, data)
del reference

# -----------------------------------------------------------------------------
# optimizer and checkpoints

optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.0, fused=True)


def learning_rate(step):
    """Linear warm-up, then a cosine to 0."""
    warmup = math.ceil(WARMUP * num_steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))


def resume_state():
    """What is trained, and AdamW's state, by name. Nothing in a step is random except the order of the data,
    which the step gives.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter not in optimizer.state:
            optimizer.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter),
                                          "exp_avg_sq": torch.zeros_like(parameter)}
        state[name] = parameter.data
        for key, value in optimizer.state[parameter].items():
            state[f"{name}/{key}"] = value
    return state


@contextlib.contextmanager
def saving(folder):
    """Report a disk error in one line; torch and safetensors raise errors of their own for a full disk."""
    with rows.writing(folder):
        try:
            yield
        except dcp.CheckpointException as error:
            raise OSError(str(error).strip().splitlines()[-1]) from None


def save_resume(step):
    """OUT/resume/step_N, complete or not at all; every rank writes its part. Only the newest is kept."""
    folder = out / "resume" / f"step_{step:06d}"
    new = folder.with_name(f".new_{folder.name}")
    with saving(folder):
        if main_process:
            shutil.rmtree(new, ignore_errors=True)
        barrier()
        dcp.save(resume_state(), checkpoint_id=new, no_dist=world == 1)
        if main_process:
            os.replace(new, folder)
            for old in folder.parent.glob("step_*"):
                if old != folder:
                    shutil.rmtree(old)
    barrier()


# dcp says so on every save of a single process
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
start_step = 0
checkpoints = sorted(out.glob("resume/step_*"))
if checkpoints and not args.dry_run:
    start_step = int(checkpoints[-1].name.removeprefix("step_"))
    dcp.load(resume_state(), checkpoint_id=checkpoints[-1], no_dist=world == 1)  # in place
if world > 1 and not args.shard:
    policy = DistributedDataParallel(policy)

# -----------------------------------------------------------------------------
# the record of the run, and its metrics

metrics_file = None
tracker = None
if main_process and not args.dry_run:
    config = defining(vars(args)) | {"data_fingerprint": train_data.fingerprint, "steps": num_steps,
                                     "has_targets": "targets" in needs}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "transformers": transformers.__version__}
    new_record = {"config": config, "command": " ".join(sys.argv), "versions": versions, "finished": False}
    if (out / "run.json").exists():
        before = rows.load_json(out / "run.json")["config"]["data_fingerprint"]
        if before != train_data.fingerprint:
            rows.fail(f"{out}: was started with other data (rows, rewards or tokenizer); restore it, or give "
                      "another --out")
    metrics_file = rows.open_part(out / "metrics.jsonl")
    rows.write_json(out / "run.json", new_record)
    # drop what was logged after the checkpoint; the evaluation before step 0 is done again, too
    rows.keep_while(metrics_file, lambda row: row["step"] <= start_step and start_step > 0)
    print(f"{out}: {'continuing after step' if start_step else 'starting at step'} {start_step}", flush=True)
    if args.track:
        try:
            tracker = importlib.import_module(args.track)  # trackio has the interface of wandb
        except ImportError as error:
            rows.fail(f"--track={args.track}: {error}; install it, or omit the flag")
        tracker.init(project="qrpo", name=str(out), config=config, resume="allow")
if main_process:
    memory *= 1e-9 / (world if args.shard else 1)
    print(f"{num_parameters / 1e6:,.2f}M parameters: {memory:.2f} GB per process for weights, gradients and "
          f"AdamW, and more for activations; {num_terms:,} {'pairs' if term_size == 2 else 'completions'}, "
          f"{num_steps - start_step} steps of {train_data.lens.sum() / steps_per_epoch:,.0f} tokens on "
          f"{world} x {device.type}, {dtype}", flush=True)


def log(row):
    row = {name: value for name, value in row.items() if not math.isnan(value)}
    if metrics_file:
        rows.append(metrics_file, row)
    if tracker:
        tracker.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

# -----------------------------------------------------------------------------
# batches, metrics, evaluation


def load_batch(data, index, mean_length):
    """Completions `index` (B,) as tensors (see dataset.get_batch) with what the losses need."""
    b = get_batch(data, index, device)
    b.mean_length = mean_length                     # of the completions of the whole step, in tokens
    b.beta = torch.full_like(b.rewards, args.beta)  # (B,)
    if args.length_normalize:
        b.beta = (b.beta / (b.lens - b.prompt_lens)).clamp(max=args.max_beta or math.inf)
    if "targets" in needs:
        strength, transform = b.beta, args.transform
        if transform == "scaled-normal-icdf":  # R = sigma Phi^-1(q) is Phi^-1(q) at beta / sigma
            strength, transform = b.beta / b.std, "normal-icdf"
        b.targets = qrpo.target_log_ratios(    # (B,) log(pi*/pi_ref) = R/beta - log Z
            strength, b.rewards, b.ref_rewards, transform, args.quantile, b.among_refs)
    return b


def metrics(b, logps, loss):
    """What is logged: each name with its values, whose mean over the whole batch is logged. NaN: does
    not apply.
    """
    log_ratio = logps - b.ref_logps
    values = {
        "loss": loss,
        "log_ratio": log_ratio,
        "log_ratio_chosen": log_ratio.where(b.side > 0, math.nan),    # the better, see dataset.sides
        "log_ratio_rejected": log_ratio.where(b.side < 0, math.nan),  # the worse
        "drift": log_ratio.abs() / (b.lens - b.prompt_lens),          # nats per token; 0 at the start
    }
    if args.loss == "qrpo":
        values["loss_down"] = loss * (log_ratio > b.targets)  # the part that pushes completions down
    return values


def add(totals, values, works):
    """Add the values of a micro-batch (see `metrics`) to totals: name -> their sum and count, (2,)."""
    for name, v in values.items():
        sum_and_count = torch.stack([v.nansum().double(), v.isnan().logical_not().sum().double()])
        totals[name] = totals.get(name, 0) + sum_and_count * works


def means(totals):
    """The mean of every metric over all ranks; one transfer from the device."""
    table = torch.stack(list(totals.values()))  # (metrics, 2)
    if world > 1:
        dist.all_reduce(table)
    sums, counts = table.T.tolist()
    return {name: total / n if n else math.nan for name, total, n in zip(totals, sums, counts)}


@torch.no_grad()
def held_out():
    """The means of the metrics on eval_data."""
    terms = np.arange(len(eval_data.lens)).reshape(-1, term_size)
    mean_length = (eval_data.lens - eval_data.prompt_lens).mean()
    totals = {}
    for index, works in micro_batches(eval_data.lens, terms, micro_batch_tokens, rank, world):
        b = load_batch(eval_data, index, mean_length)
        with autocast:
            logps = policy(b.tokens, b.prompt_lens, b.lens)
        add(totals, metrics(b, logps, loss_terms(b, logps)), works)
    return means(totals)


def evaluate(step):
    """Log the metrics on eval_data, as eval_NAME."""
    log({"step": step} | {f"eval_{name}": value for name, value in held_out().items()})


# -----------------------------------------------------------------------------
# the training loop

# The policy before its first step is the reference model, so its log-probabilities may differ from
# ref_logps by rounding only. Nats, for one token: those of n tokens add up to about sqrt(n) of one.
DRIFT_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.3}
stop_requested = False


def request_stop(signum, frame):
    global stop_requested
    stop_requested = True


for signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(signum, request_stop)
if start_step == 0 and eval_data:
    evaluate(0)
bar = tqdm(range(start_step, num_steps), initial=start_step, total=num_steps, desc=args.loss, unit="step",
           disable=not main_process)
for step in bar:
    started = time.time()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    terms = step_terms(step)  # (n, term_size) completions, n <= batch_size
    lengths = (train_data.lens - train_data.prompt_lens)[terms]  # (n, term_size) tokens of completion
    batches = list(micro_batches(train_data.lens, terms, micro_batch_tokens, rank, world))
    totals = {}
    for i, (index, works) in enumerate(batches):
        sync_gradients(policy, i == len(batches) - 1)
        # tokens (B, T); lens, rewards, ref_logps, beta, targets (B,); ref_rewards (B, num_ref_rewards); ...
        b = load_batch(train_data, index, lengths.mean())
        with autocast:
            logps = policy(b.tokens, b.prompt_lens, b.lens)  # (B,) log pi(y|x), summed over tokens
        loss = loss_terms(b, logps)                                     # (B / term_size,)
        # The ranks average, so times world makes the gradient that of the mean over the step's terms,
        # however they are split. A filler of a rank without work counts 0.
        (loss.sum() * works * world / len(terms)).backward()
        add(totals, metrics(b, logps.detach(), loss.detach()), works)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
    if args.shard:
        grad_norm = grad_norm.full_tensor()
    add(totals, {"grad_norm": grad_norm}, True)
    optimizer.step()
    optimizer.zero_grad()

    row = means(totals)  # waits for the device, once for all metrics and with the whole step in its queue
    drift_limit = DRIFT_LIMIT[dtype] * np.mean(1 / np.sqrt(lengths))  # in nats per token
    if step == 0 and not args.ref_model and not row["drift"] < drift_limit:
        rows.fail(f"step 0: the policy's log-probabilities are {row['drift']:.2g} nats per token from the "
                  f"reference's (limit {drift_limit:.2g}). Most likely {cache} was made with another "
                  "model (delete it), or the model is not deterministic")
    if not math.isfinite(row["grad_norm"]):
        ids = sorted(set(train_data.ids[train_data.row[terms.reshape(-1)]].tolist()))
        rows.fail(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; nothing was saved "
                  "since the last checkpoint. Lower --learning_rate or raise --beta, and look at this "
                  f"step's rows, {', '.join(ids)}")

    done = step + 1
    seconds = time.time() - started
    tokens_per_second = int(train_data.lens[terms].sum()) / seconds
    row |= {"learning_rate": learning_rate(step), "epoch": done / steps_per_epoch,
            "seconds": seconds, "tokens_per_second": tokens_per_second}
    if peak_flops(device):
        row["share_of_peak"] = flops * tokens_per_second / world / peak_flops(device)
    log({"step": done} | row)
    bar.set_postfix(loss=f"{row['loss']:.4g}", log_ratio=f"{row['log_ratio']:.3g}",
                    tokens_s=f"{tokens_per_second:,.0f}")
    if args.dry_run:
        continue

    last = done == num_steps
    stop = any_rank(stop_requested) and not last
    if eval_data and (last or args.eval_every and done % args.eval_every == 0):
        evaluate(done)
    save = args.save_every and done % args.save_every == 0
    if save and not last:
        save_model(model, args.model, out / "checkpoints" / f"step_{done:06d}", adapter)
    if save or last or stop:
        save_resume(done)
    if stop:
        bar.close()
        print(f"{out}: told to stop; saved step {done}, start again with --resume", flush=True)
        sys.exit(75)

# -----------------------------------------------------------------------------
# the trained model

if args.dry_run:
    if main_process:
        first = step_terms(0)[:4].reshape(-1)
        dataset.show(train_data, tokenizer, first, load_batch(train_data, first, lengths.mean()))
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(
            resource.RUSAGE_SELF).ru_maxrss
        minutes = seconds * full_steps * (1 + 1 / (3 * args.epochs)) / 60  # that pass: a third of an epoch
        print(f"a step takes {seconds:.2f} s; {full_steps} steps and the reference pass {minutes:.1f} "
              f"minutes; {peak / 1e9:.2f} GB per process")
    barrier()
    if main_process:
        shutil.rmtree(cache)
else:
    save_model(model, args.model, out / ".trained", adapter)
    if main_process:
        shutil.rmtree(out / "adapter", ignore_errors=True)
        for file in (out / ".trained").iterdir():  # the trained model is OUT itself
            os.replace(file, out / file.name)
        (out / ".trained").rmdir()
        rows.write_json(out / "run.json", new_record | {"finished": True})
        shutil.rmtree(out / "resume")
        print(f"{out}: the trained model, run.json and metrics.jsonl")
if "RANK" in os.environ:
    barrier()
    dist.destroy_process_group()
