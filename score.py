"""Reward completions: those sampled (`ref_completions`, `samples`) and the dataset's own (`completion`,
or `chosen` and `rejected`).

Reads rows with completions, and writes them to OUT with the rewards added: `ref_rewards` and
`sample_rewards` (lists), `reward`, `chosen_reward`, `rejected_reward`. Three kinds of reward:

    --reward=tests          the share of the row's tests that the program passes, in the sandbox (sandbox/)
    --reward=FILE.py:NAME   a function reward(prompts, completions, **columns) -> list of float or None
    --reward=model:PATH     a sequence classifier with a `.score` output or one logit; or --model_class

A reward that could not be computed is null; nulls are counted at the end. Rewards that a row already has
are kept, but rewards made by another function or model are an error. A killed run continues; under torchrun
the processes share the rows. For a judge over a network, see --concurrency and examples/judge.py.

    python score.py --data=out/refs --out=out/rewarded --reward=tests

Given its own output as --data, it scores only the nulls again. A second opinion on completions that have
rewards goes to separate columns: with --name=judge to `ref_rewards_judge`, `sample_rewards_judge` and so on.
Training ignores them, and evaluate.py shows both:

    python score.py --data=out/rewarded --out=out/judged --reward=judge.py:score --name=judge
"""
import math
import sys
from functools import partial
from typing import Callable, NamedTuple

import rows
import sandbox
from scoring.function import Failed, Judge, function_rewards, function_settings, no_exit, text_of
from scoring.reward_model import RewardModel, model_settings
from tokens import is_chat

REWARD_OF = {"ref_completions": "ref_rewards", "samples": "sample_rewards", "completion": "reward",
             "chosen": "chosen_reward", "rejected": "rejected_reward",
             "other_completions": "other_rewards"}  # column: the name of its reward
SAMPLED = "ref_completions", "samples", "other_completions"  # these hold lists of {"text", ...}


def arguments(argv=None):
    parser = rows.Parser(__doc__)
    flag = parser.add_argument
    flag("--data", required=True, help="JSONL file or folder of rows with completions")
    flag("--out", required=True, help="folder for the rewarded rows")
    flag("--reward", required=True, help="tests, FILE.py:NAME or model:PATH (see above)")
    flag("--name", default="", help="name of a second opinion, see above (default: the reward to train on)")
    flag("--concurrency", type=rows.whole, default=0,
         help="function: for judges over a network: make N calls at a time, each for one completion, and "
              "repeat those that raise an error. 0: one call for each row, and an error ends the run")
    flag("--retries", type=rows.whole, default=7,
         help="with --concurrency: how often to repeat a call that raises an error, after 1, 2, 4, ... "
              "seconds, or when the server says so; then the reward is null")
    flag("--accept_null", action="store_true",
         help="continue even if ten rows in a row, or the last ones, get no reward at all")
    flag("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
         help="model: auto is bfloat16 on a GPU")
    flag("--batch_tokens", type=rows.whole, default=0,
         help="model: padded tokens in a forward pass; 0: 16384 on a GPU, 1024 on a CPU")
    flag("--max_length", type=rows.count, default=2048, help="model: cut its input to N tokens")
    flag("--model_class",
         help="model: FILE.py:CLASS that loads the checkpoint, if transformers has no class for it, such as "
              "paper/armorm.py:ArmoRM")
    flag("--trust_remote_code", action="store_true", help="model: run code that comes with it")
    flag("--runtime", default="auto", choices=("auto", *sandbox.RUNTIMES),
         help="tests: how programs are isolated; auto: the first way that works")
    flag("--packages", default=sandbox.PACKAGES,
         help="tests: import names of installed packages that programs and tests may use, such as numpy")
    flag("--block", default="answer", choices=tuple(sandbox.BLOCKS),
         help="tests: which code block of an answer is the program; see sandbox/formats.md")
    flag("--judge", default="apart", choices=tuple(sandbox.WAYS),
         help="tests: run them apart from the program, or together with it; see sandbox/README.md")
    flag("--unsafe", action="store_true", help="tests: run without isolation. Never for programs of a model")
    for name, (default, text) in sandbox.FLAGS.items():
        flag(f"--{name}", type=type(default), default=default, help=f"tests: {text}")
    args = parser.parse_args(argv)
    if args.name and not args.name.isidentifier():
        rows.fail(f"--name={args.name}: must be one word of letters, digits and _, as in --name=judge")
    args.kind = kind_of(args.reward)
    return args


def kind_of(reward):
    """The entry of REWARDS that --reward=reward names."""
    if reward.rpartition(":")[0].endswith(".py"):
        return REWARDS["FILE.py:NAME"]
    start, colon, rest = reward.partition(":")
    for form, kind in REWARDS.items():
        if form.partition(":")[:2] == (start, colon) and bool(rest) == bool(colon):
            return kind
    *others, last = REWARDS
    rows.fail(f"--reward={reward}: must be {', '.join(others)} or {last}")


# ---- rows and their completions ----

def reward_columns(name):
    """REWARD_OF, or with a name its columns of a second opinion."""
    if not name:
        return REWARD_OF
    return {column: f"{reward}_{name}" for column, reward in REWARD_OF.items()}


def completions_of(row):
    """(column, k, completion) of everything in a row that can have a reward: the k-th of a list, an object
    with a `text`; or for k = None a text or messages.
    """
    for column in REWARD_OF:
        if row.get(column) is None:
            continue
        if column not in SAMPLED:
            check_answer(row, column)
            yield column, None, row[column]
            continue
        for k, completion in enumerate(row[column]):
            if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
                rows.fail(f"{row['__at__']}: {column} must be a list of objects with a `text`, as "
                          "generate_refs.py writes them")
            yield column, k, completion


def check_answer(row, column):
    """Refuse what training refuses, too: an answer is a text, or one message of the assistant."""
    answer = row[column]
    if isinstance(answer, str):
        return
    if not (is_chat(answer) and [message["role"] for message in answer] == ["assistant"]):
        rows.fail(f"{row['__at__']}: {column} must be a text, or a list of one message of the assistant; "
                  "move earlier messages to the prompt")


def reward_in(row, name, k):
    """The k-th reward of a row's column, or that column's only one (None); None if there is none."""
    rewards = row.get(name)
    if k is None or rewards is None:
        return rewards
    return rewards[k] if k < len(rewards) else None


def unrewarded(row, made_by, reward_of):
    """Those of `completions_of` that have no reward yet.

    made_by: what stands for the present reward; refuses rewards that another one made. reward_of: where
    the rewards go, see `reward_columns`.
    """
    if not any(row.get(column) for column in REWARD_OF):
        rows.fail(f"{row['__at__']}: no completions to reward; run generate_refs.py first, or add "
                  "completion, or chosen and rejected")
    found = []
    for column, k, completion in completions_of(row):
        name = reward_of[column]
        before = row.get("made_by", {}).get(name)
        if row.get(name) is None:
            found.append((column, k, completion))
            continue
        if before is None:  # rewards that came with the data stay as they are, nulls included
            continue
        if before != made_by:
            rows.fail(f"{row['__at__']}: its {name} were made by another reward or version of it "
                      f"({before['reward']}); score the rows as they were before, delete their {name}, or "
                      "give --name for a second opinion")
        if k is not None and len(row[name]) != len(row[column]):
            rows.fail(f"{row['__at__']}: its {len(row[name])} {name} are not those of its "
                      f"{len(row[column])} {column}; delete {name} from the row, and score it again")
        if reward_in(row, name, k) is None:
            found.append((column, k, completion))
    return found


# ---- tests ----

def tests_settings(args):
    names = "packages", "block", "judge", *sandbox.FLAGS
    return {"reward": "tests"} | {name: getattr(args, name) for name in names}


def tests_of(args, row):
    """What the sandbox needs of a row; refuses one without tests that it can run."""
    try:
        return sandbox.normalize(row, args.judge)
    except ValueError as error:
        rows.fail(f"{row['__at__']}: --reward=tests: {error}")


def tests_rewards(args, todo):
    """Share of the row's tests passed, in [0,1]; None where there is no verdict. Formats:
    sandbox/formats.md.
    """
    waiting = {}  # row id: (row, how many completions, {k: reward} so far)
    slowest = []  # verdicts

    def programs():
        for row, completions in todo:
            tests = tests_of(args, row)
            waiting[row["id"]] = row, len(completions), {}
            for k, completion in enumerate(completions):
                program = {"id": (row["id"], k), "completion": text_of(completion)}
                yield program | {"fenced": row.get("fenced", True)} | tests

    limits = {name: getattr(args, name) for name in sandbox.FLAGS}
    try:
        for verdict in sandbox.judge(programs(), runtime=args.runtime, packages=args.packages,
                                     unsafe=args.unsafe, block=args.block, way=args.judge, **limits):
            row_id, k = verdict["id"]
            slowest = sandbox.slowest([*slowest, verdict])
            row, n, rewards = waiting[row_id]
            rewards[k] = verdict["reward"]
            if len(rewards) == n:
                del waiting[row_id]
                yield row, [rewards[k] for k in range(n)]
    except RuntimeError as error:  # a bad limit, or no isolation works here
        rows.fail(error)
    if slowest and slowest[0]["seconds"] > 1:
        print(sandbox.about(slowest), file=sys.stderr)


# ---- all kinds ----

class Kind(NamedTuple):
    settings: Callable  # args -> dict of what the rewards depend on
    load: Callable      # args -> f(iterable of (row, completions)), which yields (row, list of float or None)
    check: Callable = lambda args, row: None  # fails where a row cannot be rewarded, before any is


REWARDS = {  # as --reward names them; a new kind of reward is one entry
    "tests": Kind(tests_settings, lambda args: partial(tests_rewards, args), tests_of),
    "FILE.py:NAME": Kind(function_settings, lambda args: (
        Judge(args) if args.concurrency else partial(function_rewards, args))),
    "model:PATH": Kind(model_settings, RewardModel),
}
OUTAGE = 10  # rows one after another without a reward


def without_outages(args, rewarded):
    """The (row, rewards) of an iterable. Rows without a reward are kept back until another row has one: an
    outage ends the run, which begins with these rows when it continues. Once something got a reward, null is
    an answer, too, and an outage is calls that fail.
    """
    kept_back, known = [], False
    reason = "all null"
    for row, rewards in rewarded:
        failed = [reward for reward in rewards if isinstance(reward, Failed)]
        if failed:
            reason = failed[0].reason
        if len(failed) + rewards.count(None) < len(rewards):
            known = True
        kept_back.append((row, rewards))
        if args.accept_null or known and len(failed) < len(rewards):
            yield from kept_back
            kept_back = []
        elif len(kept_back) == OUTAGE:
            break
    if kept_back:
        rows.fail(f"{args.reward}: the last {len(kept_back)} rows got no reward ({reason}) and are not "
                  "written; those before are. Start again when it works, or with --accept_null")


def set_rewards(row, rewards, made_by, reward_of):
    """Write the rewards of what is `unrewarded` into a row."""
    for (column, k, _), reward in zip(unrewarded(row, made_by, reward_of), rewards):
        name = reward_of[column]
        if isinstance(reward, Failed):
            reward = None
        if reward is not None and not math.isfinite(reward):
            rows.fail(f"{row['__at__']}: {made_by['reward']} gave the reward {reward}; return a finite "
                      "number, or None for unknown")
        if k is None:
            row[name] = reward
        else:
            row[name] = row.get(name) or [None] * len(row[column])
            row[name][k] = reward
        row["made_by"] = row.get("made_by", {}) | {name: made_by}


def summary(table, reward_of):
    """A line about rewarded rows: the mean of every column of rewards, and what is odd about them."""
    rewards = {}  # column: those in it
    num_rows = num_cut = num_tied = 0
    for row in table:
        num_rows += 1
        references = [reward for reward in row.get(reward_of["ref_completions"]) or [] if reward is not None]
        for column, k, completion in completions_of(row):
            name = reward_of[column]
            reward = reward_in(row, name, k)
            rewards.setdefault(name, []).append(reward)
            if k is not None and completion.get("finish_reason") == "length":
                num_cut += 1
            others = len(references) - (column == "ref_completions")  # a reference does not count itself
            if others > 0 and references.count(reward) == len(references):
                num_tied += 1
    line = f"{num_rows} rows"
    for name, values in rewards.items():
        known = [reward for reward in values if reward is not None]
        mean = sum(known) / len(known) if known else math.nan
        line += f"; {len(known)} {name}, mean {mean:.4f}"
        if len(known) < len(values):
            line += f", and {len(values) - len(known)} null"
    total = sum(map(len, rewards.values()))
    if num_cut:
        line += f"; {num_cut / total:.0%} of the completions ran out of tokens"
    if num_tied:
        line += f"; {num_tied / total:.0%} of the rewards tie with all (other) references of their prompt"
    return line


def main():
    args = arguments()
    settings = args.kind.settings(args)
    made_by = {"reward": args.reward, "fingerprint": rows.fingerprint(settings)}
    reward_of = reward_columns(args.name)
    if args.name:
        settings["reward"] += f" as {args.name}"

    def check(row):
        if unrewarded(row, made_by, reward_of):
            args.kind.check(args, row)

    left, part = rows.continue_stage(args.data, args.out, settings, check)
    rank, world = rows.rank_and_world()
    bar = rows.progress(total=len(left), unit="row", desc="score", smoothing=0)
    failed = []

    def todo():
        """The rows with something to reward; the others are complete."""
        for row in rows.select(args.data, left):
            found = unrewarded(row, made_by, reward_of)
            if found:
                yield row, [completion for _, _, completion in found]
            else:
                rows.append(part, row)
                bar.update()

    with bar, no_exit(args.reward):
        for row, rewards in without_outages(args, args.kind.load(args)(todo())):
            set_rewards(row, rewards, made_by, reward_of)
            rows.append(part, row)
            failed += [reward for reward in rewards if isinstance(reward, Failed)]
            bar.update()
    if failed:
        print(f"{args.reward}: {len(failed)} completions got no reward in {args.retries + 1} calls each, the "
              f"last because of {failed[-1].reason}. To ask for these again: --data={args.out} --out=NEW")
    if rank == 0:
        where = args.out if world == 1 else part.name
        line = summary(rows.complete_lines(part.name), reward_of)
        print(f"{where}: {line}")


if __name__ == "__main__":
    main()
