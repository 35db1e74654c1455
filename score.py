"""Reward completions: those sampled (`ref_completions`, `samples`) and the dataset's own (`completion`, or `chosen`,
`rejected`).

Reads rows with completions, writes them to OUT with the rewards beside: `ref_rewards` and `sample_rewards` (lists),
`reward`, `chosen_reward`, `rejected_reward`. Rewards that a row has already are kept. Three kinds of reward:

    --reward=tests          the share of the row's tests that the program passes, in the sandbox (sandbox.py)
    --reward=FILE.py:NAME   a function reward(prompts, completions, **columns) -> list of float or None, as in TRL
    --reward=model:PATH     a reward model: a sequence classifier with a `.score` output (as ArmoRM) or one logit

A reward that could not be computed is null; nulls are counted at the end. A killed run continues; under torchrun or
in a SLURM array the processes share the rows.

    python score.py --data=out/refs --out=out/rewarded --reward=tests
"""
import importlib.util
import itertools
import math
import sys
from pathlib import Path

from tqdm import tqdm

import flags
import formats
import rows
import sandbox

REWARDS = {"ref_completions": "ref_rewards", "samples": "sample_rewards",  # column -> its reward's name
           "completion": "reward", "chosen": "chosen_reward", "rejected": "rejected_reward"}
SAMPLED = "ref_completions", "samples"  # these hold lists of {"text", ...}


def arguments():
    parser = flags.parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="JSONL file or folder of rows with completions")
    add("--out", required=True, help="folder for the rewarded rows")
    add("--reward", required=True, help="tests, FILE.py:NAME or model:PATH (see above)")
    # the sandbox
    add("--runtime", default="auto", choices=("auto", *sandbox.RUNTIMES), help="tests: default is the first that works")
    add("--packages", default=sandbox.PACKAGES, help="tests: import names of installed packages that programs and tests "
        "may use, such as numpy (default %(default)s)")
    add("--block", default="answer", choices=tuple(sandbox.BLOCKS), help="tests: the program in an answer (see sandbox.py)")
    add("--unsafe", action="store_true", help="tests: run programs without isolation. Never for programs of a model")
    for name, (default, text) in sandbox.FLAGS.items():
        add(f"--{name}", type=type(default), default=default, help=f"tests: {text} (default %(default)s)")
    # the reward model
    add("--batch_tokens", type=int, default=0,
        help="model: padded tokens in a forward pass; memory grows with it. 0: 16384 on a GPU, 1024 on a CPU")
    add("--max_length", type=int, default=2048, help="model: cut its input at so many tokens (default %(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="model: auto is bfloat16 on a GPU")
    add("--trust_remote_code", action="store_true", help="model: run the code that comes with it (ArmoRM needs this)")
    return flags.parse(parser)


def settings(args):
    """What the rewards depend on, for rows.continue_stage: a reward that was changed is no longer the same."""
    kind, _, name = args.reward.rpartition(":")
    if args.reward == "tests":
        return {"reward": "tests"} | {name: getattr(args, name) for name in ("packages", "block", *sandbox.FLAGS)}
    if kind == "model":
        import models
        return {"reward": args.reward, "files": rows.fingerprint(models.identity(name)),
                "max_length": args.max_length, "dtype": args.dtype}
    return {"reward": args.reward, "code": rows.fingerprint(Path(kind).read_text()) if Path(kind).is_file() else ""}


def unrewarded(row):
    """(column, completion) of everything in the row that has no reward yet; a completion is text or messages."""
    if not any(row.get(column) for column in REWARDS):
        rows.fail(f"{row['__at__']}: no completions to reward; run generate_refs.py first, or give completion, or "
                  "chosen and rejected")
    found = []
    for column in [c for c in REWARDS if row.get(c) is not None and row.get(REWARDS[c]) is None]:
        if column not in SAMPLED:
            found.append((column, row[column]))
            continue
        if not isinstance(row[column], list) or not all(isinstance(c, dict) and isinstance(c.get("text"), str)
                                                        for c in row[column]):
            rows.fail(f"{row['__at__']}: {column} must be a list of objects with a `text`, as generate_refs.py "
                      "writes them")
        found += [(column, completion["text"]) for completion in row[column]]
    return found


def text_of(completion):
    """The text of a completion: a string, or the content of a chat completion's last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


# ---- three kinds of reward: each takes an iterable of rows and yields (row, rewards), in any order ----

def tests_reward(todo, args):
    """Share of the row's tests passed, in [0,1]; None where there is no verdict. Formats: docs/test_formats.md."""
    waiting, verdicts = {}, []

    def programs():
        for row in todo:
            try:
                tests = formats.normalize(row)
            except ValueError as error:
                rows.fail(f"{row['__at__']}: {error}, for --reward=tests")
            completions = [c for _, c in unrewarded(row)]
            waiting[row["id"]] = [row, len(completions), [None] * len(completions)]
            for k, completion in enumerate(completions):
                yield {"id": (row["id"], k), "completion": text_of(completion), "fenced": row.get("fenced", True), **tests}

    limits = {name: getattr(args, name) for name in sandbox.FLAGS}
    try:
        for verdict in sandbox.judge(programs(), runtime=args.runtime, packages=args.packages, unsafe=args.unsafe,
                                     block=args.block, **limits):
            row_id, k = verdict["id"]
            verdicts = sandbox.slowest([*verdicts, verdict])
            entry = waiting[row_id]
            entry[1] -= 1
            entry[2][k] = verdict["reward"]
            if entry[1] == 0:
                del waiting[row_id]
                yield entry[0], entry[2]
    except RuntimeError as error:  # a bad limit, or no isolation works here
        rows.fail(error)
    print(sandbox.about(verdicts), file=sys.stderr)


def function_reward(todo, args):
    """A user's function, called once a row: prompts and every column come as lists, one entry per completion."""
    path, _, name = args.reward.rpartition(":")
    if not Path(path).is_file():
        rows.fail(f"--reward={args.reward}: no file {path!r}; give tests, FILE.py:NAME or model:PATH")
    spec = importlib.util.spec_from_file_location("reward_file", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        rows.fail(f"{path}: defines no function {name!r}; it has {', '.join(n for n in vars(module) if n[0] != '_')}")
    for row in todo:
        completions = [c for _, c in unrewarded(row)]
        n, prompt = len(completions), row["prompt"]
        if not isinstance(prompt, str):  # chat prompts have chat completions, as in TRL
            completions = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
        columns = {k: [v] * n for k, v in row.items() if k not in ("prompt", "__at__", *REWARDS)}
        rewards = list(function(prompts=[prompt] * n, completions=completions, **columns))
        if len(rewards) != n:
            rows.fail(f"{args.reward}: returned {len(rewards)} rewards for the {n} completions of {row['__at__']}")
        yield row, [None if r is None else float(r) for r in rewards]


def model_reward(todo, args):
    """A sequence classifier over the chat of prompt and completion. The result does not depend on the batch."""
    import torch
    import models
    device, path = models.device(), args.reward.removeprefix("model:")
    tokenizer = models.load_tokenizer(path, args.trust_remote_code)
    model = models.load_reward_model(path, models.pick_dtype(args.dtype, device), device, args.trust_remote_code)

    def ids_of(prompt, completion):
        nonlocal cut
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            text = tokenizer.apply_chat_template(chat + answer, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
        elif isinstance(prompt, str):
            ids = tokenizer(prompt + text_of(completion)).input_ids
        else:
            rows.fail(f"the prompts are chat messages but the tokenizer of {path} has no chat template")
        cut += len(ids) > args.max_length
        return ids[:args.max_length]

    @torch.no_grad()
    def scores(batch):
        # right padding with a token that the batch does not hold: the classifier finds the last token by comparing ids
        used = {i for ids in batch for i in ids}
        pad = next(i for i in range(len(used) + 1) if i not in used)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
        width = max(map(len, batch))
        tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids in batch], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch], device=device)
        output = model(input_ids=tokens, attention_mask=mask)
        score = output.score if getattr(output, "score", None) is not None else output.logits
        if score.numel() != len(batch):
            rows.fail(f"{path}: gives {score.numel() // len(batch)} numbers a completion; a reward model gives one")
        return score.float().flatten().tolist()

    budget = args.batch_tokens or (16384 if device.type == "cuda" else 1024)
    group, held, cut = [], 0, 0
    for n, row in enumerate(todo, 1):
        group.append((row, [ids_of(row["prompt"], completion) for _, completion in unrewarded(row)]))
        held += sum(map(len, group[-1][1]))
        if held < 64 * budget and n < len(todo):
            continue  # some 64 batches at a time: enough to find equal lengths among, and all that a kill loses
        jobs = sorted(((ids, i, k) for i, (_, all_ids) in enumerate(group) for k, ids in enumerate(all_ids)),
                      key=lambda job: -len(job[0]))  # the longest first: if memory runs out, then at once
        rewards = [[None] * len(all_ids) for _, all_ids in group]
        while jobs:
            size = max(1, budget // max(1, len(jobs[0][0])))
            for (_, i, k), score in zip(jobs, scores([ids for ids, _, _ in jobs[:size]])):
                rewards[i][k] = score
            jobs = jobs[size:]
        yield from zip((row for row, _ in group), rewards)
        group, held = [], 0
    if cut:
        print(f"{args.data}: the ends of {cut} completions were not seen, beyond --max_length={args.max_length} tokens")


def main():
    args = arguments()
    reward = tests_reward if args.reward == "tests" else model_reward if args.reward.startswith("model:") \
        else function_reward if ":" in args.reward else rows.fail("--reward must be tests, FILE.py:NAME or model:PATH")
    todo, part = rows.continue_stage(args.data, args.out, settings(args), require=("prompt",))
    count = total = unknown = 0
    bar = tqdm(total=len(todo), unit="row", desc="score", disable=rows.share()[0] != 0, smoothing=0)
    scored, unscored = [], []
    for row in todo:
        (unscored if unrewarded(row) else scored).append(row)
    if scored and rows.share()[0] == 0:
        print(f"{args.data}: {len(scored)} rows have all their rewards already; delete those columns to score again")
    for row, rewards in itertools.chain(((row, []) for row in scored), reward(unscored, args)):
        for r in rewards:
            if r is not None and not math.isfinite(r):
                rows.fail(f"{row['__at__']}: {args.reward} gave the reward {r}; return a finite number, or None "
                          "for unknown")
        for (column, _), r in zip(unrewarded(row), rewards):
            row[REWARDS[column]] = (row.get(REWARDS[column]) or []) + [r] if column in SAMPLED else r
        rows.append(part, row)
        known = [r for r in rewards if r is not None]
        count, total, unknown = count + len(known), total + sum(known), unknown + len(rewards) - len(known)
        bar.update()
    bar.close()
    if todo and rows.share()[0] == 0:
        print(f"{args.out}: {count} rewards, mean {total / max(count, 1):.4f}; {unknown} unknown (null)")


if __name__ == "__main__":
    main()
