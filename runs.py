"""A training run's folder: run.json (configuration, command, versions), metrics.jsonl, checkpoints that appear whole or
not at all, and the trained model as a Hugging Face folder.

    python -c 'import runs; help(runs.save_checkpoint)'
"""
import importlib
import os
import shutil
import sys

import torch
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import rows

FREE = ("resume", "save_every", "eval_every", "keep", "micro_batch_tokens", "data", "eval_data", "out", "cache",
        "compile", "gradient_checkpointing", "shard", "track", "dry_run")  # what a run may change when it continues


def find_checkpoint(out, config, resume):
    """The newest checkpoint to resume from, or None. Refuses a folder that holds another run. Reads only."""
    path = out / "run.json"
    if out.exists() and not out.is_dir():
        rows.fail(f"{out}: is a file; --out must name a folder")
    if not path.exists():
        return None
    if not resume:
        rows.fail(f"{out}: holds a run already; continue it with --resume, or give another --out")
    before = rows.load_json(path)  # what the arguments say is compared here, and the data in `start`
    changed = [f"--{k}={before['config'].get(k)}, now {v}" for k, v in config.items()
               if k not in FREE and before["config"].get(k) != v]
    if changed:
        rows.fail(f"{out}: was started with {'; '.join(changed)}; use the same settings, or another --out")
    if before["finished"]:
        print(f"{out}: this run has finished, nothing to do")
        raise SystemExit(0)
    return max((p.parent for p in out.glob("checkpoints/step_*/resume.pt")), default=None)


def start(out, config, step):
    """Write OUT/run.json, and clear what was written after the checkpoint that the run continues from. Returns
    metrics.jsonl, locked against a second process until this one ends, and open for appending.
    """
    path = out / "run.json"
    if path.exists() and rows.load_json(path)["config"] | {"data_fingerprint": config["data_fingerprint"]} != \
            rows.load_json(path)["config"]:
        rows.fail(f"{out}: was started with other data (rows, rewards or tokenizer); give it back, or another --out")
    metrics = rows.open_part(out / "metrics.jsonl")
    for stale in out.glob("**/.new*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    if not path.exists():
        rows.write_json(path, record(config))
    # the evaluation before step 0 is done again, too
    rows.cut(metrics, lambda row: row["step"] <= step - (step == 0))
    print(f"{out}: " + (f"continuing after step {step}" if step else "starting"), flush=True)
    return metrics


def record(config):
    return {"config": config, "command": " ".join(sys.argv), "finished": False, "versions": {
        "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}}


def tracker(name, out, config):
    """A function that sends a row of metrics to an experiment tracker; name None: nowhere. A run continues its own."""
    if name is None:
        return lambda row: None
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(out / "tensorboard", purge_step=None)
            return lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items()] and writer.flush()
        module = importlib.import_module(name)  # trackio has the interface of wandb
    except ImportError as error:
        rows.fail(f"--track={name}: {error}; install it, or do without (metrics.jsonl holds everything)")
    module.init(project="qrpo", name=str(out), config=config, resume="allow",
                **({"id": rows.fingerprint(str(out.resolve()))} if name == "wandb" else {}))
    return lambda row: module.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


def save_model(folder, model, state, tokenizer):
    """A Hugging Face folder in the dtype that the model came in (its config's), which plain transformers or vLLM
    load. state: its state_dict, whole.
    """
    cast, out = {}, {}
    for name, tensor in state.items():  # tied weights stay one tensor
        if tensor.data_ptr() not in cast:
            cast[tensor.data_ptr()] = tensor.to(model.stored_dtype) if tensor.is_floating_point() else tensor
        out[name] = cast[tensor.data_ptr()]
    model.save_pretrained(folder, state_dict=out)
    rows.write_json(folder / "config.json", rows.load_json(folder / "config.json") | {
        "dtype": str(model.stored_dtype).removeprefix("torch.")})
    tokenizer.save_pretrained(folder)


def save_checkpoint(args, out, step, model, tokenizer, optimizer, main_rank):
    """OUT/checkpoints/step_N: the model as a Hugging Face folder, and resume.pt. It appears whole or not at all.

    The same form for any number of ranks, sharded or not. All ranks call it; the main one writes. The newest --keep
    checkpoints stay resumable; of older ones the model stays, but not where the run was only told to stop.
    """
    folder = out / "checkpoints" / f"step_{step:06d}"
    weights, states = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if not main_rank or folder.exists():
        return
    new = folder.with_name(f".new_{folder.name}")
    try:
        save_model(new, model, weights, tokenizer)
        # nothing in a step is random but the data's order, which the step number gives: there is no RNG state to keep
        torch.save({"model": weights, "optimizer": states}, new / "resume.pt")
        os.replace(new, folder)
    except Exception as error:  # libraries say in many ways that a disk is full
        shutil.rmtree(new, ignore_errors=True)
        rows.fail(f"{folder}: cannot be written ({error}); the last checkpoint stands: make room, and start again with "
                  "--resume")
    for old in sorted(out.glob("checkpoints/step_*/resume.pt"))[:-args.keep]:
        if args.save_every and int(old.parent.name.removeprefix("step_")) % args.save_every == 0:
            old.unlink()
        else:
            shutil.rmtree(old.parent)


def load_checkpoint(folder, model, optimizer):
    """Put a checkpoint's weights and optimizer states into theirs; all ranks read it."""
    state = torch.load(folder / "resume.pt", map_location="cpu", weights_only=True, mmap=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                   options=StateDictOptions(full_state_dict=True))


def finish(out, config, steps):
    """The last checkpoint's model becomes OUT itself."""
    for file in (out / "checkpoints" / f"step_{steps:06d}").iterdir():
        if file.name != "resume.pt":
            shutil.copy2(file, out / f".new_{file.name}")
            os.replace(out / f".new_{file.name}", out / file.name)
    rows.write_json(out / "run.json", record(config) | {"finished": True})
