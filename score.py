"""Reward completions: those sampled (`ref_completions`, `samples`) and the dataset's own (`completion`,
or `chosen` and `rejected`).

Reads rows with completions, and writes them to OUT with the rewards added: `ref_rewards` and
`sample_rewards` (lists), `reward`, `chosen_reward`, `rejected_reward`. Three kinds of reward:

    --reward=tests          the share of the row's tests that the program passes, in the sandbox (sandbox/)
    --reward=FILE.py:NAME   a function reward(prompts, completions, **columns) -> list of float or None
    --reward=model:PATH     a sequence classifier with a `.score` output or one logit; or --model_class

A reward that could not be computed is null; nulls are counted at the end. Rewards that a row already has
are kept, except that those made by another reward are refused. A killed run continues; under torchrun the
processes share the rows. For a judge over a network, see --concurrency and examples/judge.py.

    python score.py --data=out/refs --out=out/rewarded --reward=tests

A second opinion, on completions that are rewarded already, goes to columns of its own: with --name=judge to
`ref_rewards_judge`, `sample_rewards_judge` and so on. Training ignores them, and evaluate.py shows both:

    python score.py --data=out/rewarded --out=out/judged --reward=judge.py:score --name=judge
"""
import asyncio
import importlib.util
import inspect
import itertools
import math
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import transformers
from tqdm import tqdm

import rows
import sandbox
from model import (context_length, get_device, get_dtype, keep_freed_memory, load_tokenizer, load_weights,
                   model_fingerprint, render)

REWARD_OF = {"ref_completions": "ref_rewards", "samples": "sample_rewards", "completion": "reward",
             "chosen": "chosen_reward", "rejected": "rejected_reward",
             "other_completions": "other_rewards"}  # column: the name of its reward
SAMPLED = "ref_completions", "samples", "other_completions"  # these hold lists of {"text", ...}


def arguments(argv=None):
    parser = rows.Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="JSONL file or folder of rows with completions")
    add("--out", required=True, help="folder for the rewarded rows")
    add("--reward", required=True, help="tests, FILE.py:NAME or model:PATH (see above)")
    add("--name", default="", help="of a second opinion, see above (default: the reward to train on)")
    add("--concurrency", type=int, default=0,
        help="function: make N calls at a time, each for one completion; a call that raises an error is "
             "made again. For judges over a network. 0: one call for each row, and an error ends the run")
    add("--retries", type=int, default=5,
        help="with --concurrency: calls after the first, 1, 2, 4, ... seconds apart; then the reward is null")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="model: auto is bfloat16 on a GPU")
    add("--batch_tokens", type=int, default=0,
        help="model: padded tokens in a forward pass; memory grows with it. 0: 16384 on a GPU, 1024 on a CPU")
    add("--max_length", type=int, default=2048, help="model: cut its input to N tokens")
    add("--model_class", help="model: FILE.py:CLASS that loads the checkpoint, where transformers has "
        "none for it, such as paper/armorm.py:ArmoRM")
    add("--trust_remote_code", action="store_true", help="model: run code that comes with it")
    add("--runtime", default="auto", choices=("auto", *sandbox.RUNTIMES),
        help="tests: auto is the first that works")
    add("--packages", default=sandbox.PACKAGES, help="tests: import names of installed packages that "
                                                     "programs and tests may use, such as numpy")
    add("--block", default="answer", choices=tuple(sandbox.BLOCKS),
        help="tests: which code block of an answer is the program; see sandbox/formats.md")
    add("--unsafe", action="store_true", help="tests: run without isolation. Never for programs of a model")
    for name, (default, text) in sandbox.FLAGS.items():
        add(f"--{name}", type=type(default), default=default, help=f"tests: {text}")
    args = parser.parse_args(argv)
    if args.name and not args.name.isidentifier():
        rows.fail(f"--name={args.name}: must be one word of letters, digits and _, as in --name=judge")
    kind = args.reward.split(":")[0]
    if kind not in REWARDS or kind == "function":
        kind = "function"  # FILE.py:NAME
        if ":" not in args.reward:
            rows.fail(f"--reward={args.reward}: must be tests, FILE.py:NAME or model:PATH")
    elif kind == "tests" and args.reward != "tests":
        rows.fail(f"--reward={args.reward}: did you mean tests?")
    if args.concurrency < 0 or args.retries < 0:
        rows.fail("--concurrency and --retries must not be negative")
    args.kind = REWARDS[kind]
    return args


# ---- rows and their completions ----

def reward_columns(name):
    """REWARD_OF, or with a name its columns of a second opinion."""
    return {column: f"{reward}_{name}" if name else reward for column, reward in REWARD_OF.items()}


def unrewarded(row, made_by, reward_of):
    """(column, completion) of everything in the row that has no reward yet; a completion is text or messages.

    made_by: what stands for the present reward; refuses rewards that another one made. reward_of: where
    the rewards go, see `reward_columns`.
    """
    if not any(row.get(column) for column in REWARD_OF):
        rows.fail(f"{row['__at__']}: no completions to reward; run generate_refs.py first, or add "
                  "completion, or chosen and rejected")
    found = []
    for column, reward in reward_of.items():
        before = row.get("made_by", {}).get(reward, made_by)
        if row.get(reward) is not None and before != made_by:
            rows.fail(f"{row['__at__']}: its {reward} were made by another reward or version of it "
                      f"({before['reward']}); score the rows as they were before, delete their {reward}, or "
                      "give --name for a second opinion")
        if row.get(column) is None or row.get(reward) is not None:
            continue
        if column not in SAMPLED:
            found.append((column, row[column]))
            continue
        for completion in row[column] if isinstance(row[column], list) else [None]:
            if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
                rows.fail(f"{row['__at__']}: {column} must be a list of objects with a `text`, as "
                          "generate_refs.py writes them")
            found.append((column, completion["text"]))
    return found


def text_of(completion):
    """The text of a completion: a string, or the content of a chat completion's last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def as_messages(completion):
    """A completion as chat messages."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


# ---- tests ----

def tests_settings(args):
    return {"reward": "tests"} | {name: getattr(args, name) for name in ("packages", "block", *sandbox.FLAGS)}


def tests_rewards(args, todo):
    """Share of the row's tests passed, in [0,1]; None where there is no verdict. Formats:
    sandbox/formats.md.
    """
    waiting = {}  # row id: [row, rewards so far, how many are missing]
    slowest = []  # verdicts

    def programs():
        for row, completions in todo:
            try:
                tests = sandbox.normalize(row)
            except ValueError as error:
                rows.fail(f"{row['__at__']}: --reward=tests: {error}")
            waiting[row["id"]] = [row, [None] * len(completions), len(completions)]
            for k, completion in enumerate(completions):
                program = {"id": (row["id"], k), "completion": text_of(completion)}
                yield program | {"fenced": row.get("fenced", True)} | tests

    limits = {name: getattr(args, name) for name in sandbox.FLAGS}
    try:
        for verdict in sandbox.judge(programs(), runtime=args.runtime, packages=args.packages,
                                     unsafe=args.unsafe, block=args.block, **limits):
            row_id, k = verdict["id"]
            slowest = sandbox.slowest([*slowest, verdict])
            entry = waiting[row_id]
            entry[1][k] = verdict["reward"]
            entry[2] -= 1
            if entry[2] == 0:
                del waiting[row_id]
                yield entry[0], entry[1]
    except RuntimeError as error:  # a bad limit, or no isolation works here
        rows.fail(error)
    if slowest and slowest[0]["seconds"] > 1:
        print(sandbox.about(slowest), file=sys.stderr)


# ---- a Python function ----

def load_function(reward):
    """The function of FILE.py:NAME, and the code that it depends on: its file and the modules beside it."""
    path, _, name = reward.rpartition(":")
    if not Path(path).is_file():
        rows.fail(f"--reward={reward}: no file {path!r}; give tests, FILE.py:NAME or model:PATH")
    folder = Path(path).resolve().parent
    spec = importlib.util.spec_from_file_location("reward_file", path)
    loaded = set(sys.modules) - {spec.name}
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        names = ", ".join(n for n in vars(module) if not n.startswith("_"))
        rows.fail(f"{path}: defines no function {name!r}; it has {names}")
    code = []
    for other in sorted(set(sys.modules) - loaded):
        file = Path(getattr(sys.modules[other], "__file__", None) or "/")
        if file.resolve().parent == folder:
            code.append(file.read_text())
    return function, code


def function_settings(args):
    args.function, code = load_function(args.reward)
    return {"reward": args.reward.rpartition(":")[2], "code": rows.fingerprint(code)}


def call_arguments(row, completions):
    """What a function is called with: prompts and every column as lists, one entry per completion."""
    n, prompt = len(completions), row["prompt"]
    if not isinstance(prompt, str):  # chat prompts have chat completions, as in TRL
        completions = [as_messages(completion) for completion in completions]
    columns = {name: [value] * n for name, value in row.items()
               if name not in ("prompt", "prompts", "completions", "made_by", "__at__", *REWARD_OF)}
    return {"prompts": [prompt] * n, "completions": completions} | columns


def function_rewards(args, todo):
    """A user's function, plain or async, called once per row."""
    for row, completions in todo:
        rewards = args.function(**call_arguments(row, completions))
        rewards = list(asyncio.run(rewards) if inspect.iscoroutine(rewards) else rewards)
        if len(rewards) != len(completions):
            rows.fail(f"{args.reward}: returned {len(rewards)} rewards for the {len(completions)} "
                      f"completions of {row['__at__']}")
        yield row, [None if reward is None else float(reward) for reward in rewards]


async def judge(args, limit, row, completion):
    """(reward or None, None or why all calls failed) of one completion."""
    async with limit:
        for retry in range(args.retries + 1):
            if retry:
                await asyncio.sleep(2 ** (retry - 1) * random.uniform(0.5, 1))  # not all at the same moment
            try:
                rewards = await asyncio.to_thread(args.function, **call_arguments(row, [completion]))
                reward, = await rewards if inspect.iscoroutine(rewards) else rewards
                return None if reward is None else float(reward), None
            except Exception as error:  # whatever a judge raises
                reason = f"{type(error).__name__}: {error}"
    return None, reason


async def judge_row(args, limit, row, completions):
    return row, await asyncio.gather(*[judge(args, limit, row, completion) for completion in completions])


OUTAGE = 10  # rows one after another of which every call failed: the judge is down


def judged_rewards(args, todo):
    """As function_rewards, for --concurrency calls at a time, each for one completion; calls that fail are
    made again. Rows come as they get done. Those of which every call failed are kept back until another
    succeeds: an outage ends the run, which begins with these rows when it continues.
    """
    loop, limit = asyncio.new_event_loop(), asyncio.Semaphore(args.concurrency)
    loop.set_default_executor(ThreadPoolExecutor(args.concurrency))  # for functions that are not async
    todo, running, kept_back, failed, reason = iter(todo), set(), [], 0, ""
    try:
        while True:
            for row, completions in itertools.islice(todo, args.concurrency - len(running)):
                running.add(loop.create_task(judge_row(args, limit, row, completions)))
            if not running:
                break
            done, running = loop.run_until_complete(
                asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
            for row, found in [task.result() for task in done]:
                rewards, reasons = zip(*found)
                kept_back.append((row, list(rewards)))
                reason = next(filter(None, reasons), reason)
                failed += len(reasons) - reasons.count(None)
                if None in reasons:  # a call succeeded
                    yield from kept_back
                    kept_back = []
            if len(kept_back) >= OUTAGE:
                rows.fail(f"{args.reward}: every call for the last {len(kept_back)} rows failed ({reason}); "
                          "see to the judge and start again: the rows before are done")
        yield from kept_back
    finally:
        cancelled = [task for task in running if task.cancel()]
        if cancelled:
            loop.run_until_complete(asyncio.wait(cancelled))
    if failed:
        print(f"{args.reward}: {failed} completions got no reward in {args.retries + 1} calls each, the last "
              f"because of {reason}")


# ---- a reward model ----

GROUP = 64  # batches whose completions are sorted by length together; a kill loses as many


def model_settings(args):
    path = args.reward.removeprefix("model:")
    return {"reward": args.reward, "files": model_fingerprint(path), "max_length": args.max_length,
            "dtype": args.dtype, "model_class": args.model_class}


class RewardModel:
    """A sequence classifier over the chat of prompt and completion. Its scores do not depend on the batch."""

    def __init__(self, args):
        self.device, self.path = get_device(), args.reward.removeprefix("model:")
        keep_freed_memory(self.device)
        self.tokenizer = load_tokenizer(self.path, args.trust_remote_code)
        kind = transformers.AutoModelForSequenceClassification
        if args.model_class:
            kind, _ = load_function(args.model_class)
        dtype = get_dtype(args.dtype, self.device)
        model = load_weights(kind, self.path, dtype=dtype, trust_remote_code=args.trust_remote_code)
        self.model = model.to(self.device).eval()
        self.limit = min(args.max_length, context_length(model))
        for name, module in model.named_modules():
            # RoBERTa's positions begin after this index
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
                self.limit = min(self.limit, module.num_embeddings - module.padding_idx - 1)
        self.budget = args.batch_tokens or (16384 if self.device.type == "cuda" else 1024)
        self.cut = 0  # completions whose end was not seen
        self.model.config.get_text_config().use_cache = False
        self.causal = self.is_causal()

    def ids(self, prompt, completion):
        """The token ids that the model reads, cut at the end; None if nothing of the completion is
        among them.
        """
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            answer = as_messages(completion)
            before = render(self.tokenizer, chat, add_generation_prompt=True)
            text = render(self.tokenizer, chat + answer)
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        elif isinstance(prompt, str):
            before = prompt
            ids = self.tokenizer(prompt + text_of(completion)).input_ids
        else:
            rows.fail(f"the prompts are chat messages but the tokenizer of {self.path} has no chat template")
        if len(ids) > self.limit:
            self.cut += 1
            if len(self.tokenizer(before, add_special_tokens=False).input_ids) >= self.limit:
                return None
        return ids[:self.limit]

    @torch.no_grad()
    def is_causal(self):
        """Whether tokens look at earlier ones only, so that padding on the right needs no mask: attention
        without one takes half the time.
        """
        ids = torch.arange(16, device=self.device)[None]
        try:
            start, whole = (
                self.model(input_ids=part, output_hidden_states=True).hidden_states[-1][0, :8]
                for part in (ids[:, :8], ids))
        except Exception:  # such a model may return whatever it likes
            return False
        return bool((start - whole).abs().median() < 0.01 * whole.std())

    @torch.no_grad()
    def scores(self, batch):
        """One float for each list of token ids in the batch; None where the model gives NaN."""
        # right padding with a token that the batch does not hold: the classifier finds the last token by
        # comparing ids
        used = {i for ids in batch for i in ids}
        pad = next(i for i in itertools.count() if i not in used)
        self.model.config.get_text_config().pad_token_id = self.model.config.pad_token_id = pad
        width = max(map(len, batch))
        tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids in batch], device=self.device)
        mask = None
        if not self.causal:
            lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
            mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        output = self.model(input_ids=tokens, attention_mask=mask)
        score = getattr(output, "score", None)
        if score is None:
            score = output.logits
        if score.numel() != len(batch):
            rows.fail(f"{self.path}: gives {score.numel() // len(batch)} numbers per completion; a reward "
                      "model gives one")
        return [None if math.isnan(value) else value for value in score.float().flatten().tolist()]

    def score_all(self, sequences):
        """Scores of many lists of token ids, in batches of similar length."""
        scores = [None] * len(sequences)
        known = [i for i, ids in enumerate(sequences) if ids]
        # the longest first: if memory runs out, then at once
        order = sorted(known, key=lambda i: -len(sequences[i]))
        while order:
            size = max(1, self.budget // max(1, len(sequences[order[0]])))
            batch, order = order[:size], order[size:]
            for i, score in zip(batch, self.scores([sequences[i] for i in batch])):
                scores[i] = score
        return scores


    def __call__(self, todo):
        """Yield (row, rewards) of an iterable of (row, completions)."""
        group, sequences = [], []
        for row, completions in itertools.chain(todo, [(None, [])]):
            if row is None or sum(len(ids or ()) for ids in sequences) >= GROUP * self.budget:
                scores = iter(self.score_all(sequences))
                for scored, n in group:
                    yield scored, list(itertools.islice(scores, n))
                group, sequences = [], []
            group.append((row, len(completions)))
            sequences += [self.ids(row["prompt"], completion) for completion in completions]
        if self.cut:
            print(f"the ends of {self.cut} completions were not seen, beyond {self.limit} tokens")


class Kind(NamedTuple):
    settings: Callable  # args -> dict of what the rewards depend on
    load: Callable      # args -> f(iterable of (row, completions)), which yields (row, list of float or None)


REWARDS = {  # --reward=KIND or KIND:...; a new kind of reward is one entry
    "tests": Kind(tests_settings, lambda args: partial(tests_rewards, args)),
    "function": Kind(function_settings, lambda args: partial(  # FILE.py:NAME
        judged_rewards if args.concurrency else function_rewards, args)),
    "model": Kind(model_settings, RewardModel),
}


def main():
    args = arguments()
    settings = args.kind.settings(args)
    made_by = {"reward": args.reward, "fingerprint": rows.fingerprint(settings)}
    reward_of = reward_columns(args.name)
    if args.name:
        settings["reward"] += f" as {args.name}"
    left, part = rows.continue_stage(
        args.data, args.out, settings, check=lambda row: unrewarded(row, made_by, reward_of))
    bar = tqdm(total=len(left), unit="row", desc="score", smoothing=0,
               disable=rows.rank_and_world()[0] != 0)
    kept = known = unknown = 0
    total, started = 0.0, time.time()

    def todo():
        """The rows with something to reward; the others are complete."""
        nonlocal kept
        for row in rows.select(args.data, left):
            found = unrewarded(row, made_by, reward_of)
            if found:
                yield row, [completion for _, completion in found]
            else:
                rows.append(part, row)
                kept += 1
                bar.update()

    for row, rewards in args.kind.load(args)(todo()):
        for (column, _), reward in zip(unrewarded(row, made_by, reward_of), rewards):
            if reward is not None and not math.isfinite(reward):
                rows.fail(f"{row['__at__']}: {args.reward} gave the reward {reward}; return a finite "
                          "number, or None for unknown")
            name = reward_of[column]
            row[name] = (row.get(name) or []) + [reward] if column in SAMPLED else reward
            row["made_by"] = row.get("made_by", {}) | {name: made_by}
        rows.append(part, row)
        unknown += rewards.count(None)
        known += len(rewards) - rewards.count(None)
        total += sum(reward for reward in rewards if reward is not None)
        speed = (known + unknown) / (time.time() - started)
        bar.set_postfix_str(f"{speed:,.1f} rewards/s, {unknown} unknown", refresh=False)
        bar.update()
    bar.close()
    if left and rows.rank_and_world()[0] == 0:
        mean = total / known if known else math.nan
        print(f"{args.out}: {known} rewards, mean {mean:.4f}; {unknown} unknown (null); {kept} rows "
              "already had all their rewards")


if __name__ == "__main__":
    main()
