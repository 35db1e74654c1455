"""A Python function as the reward of score.py: how it is loaded, what it is called with, and what it may
return. One call for each row; or with --concurrency many at a time, for a judge over a network.

    python score.py --data=out/refs --out=out/rewarded --reward=examples/judge.py:grade --concurrency=16
"""
import asyncio
import concurrent.futures
import copy
import email.utils
import importlib.util
import inspect
import itertools
import math
import random
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import rows
from tokens import content_text

# what a function does not get as columns of the row
OWN = {"prompt", "prompts", "completion", "completions", "completion_ids", "chosen", "rejected",
       "ref_completions", "samples", "other_completions", "made_by", "__at__"}


def text_of(completion):
    """The text of a completion: a string, a sampled one, or the content of a chat's last message."""
    if isinstance(completion, list):
        return content_text(completion[-1].get("content"))
    return completion["text"] if isinstance(completion, dict) else completion


def as_messages(completion):
    """A completion as chat messages."""
    if isinstance(completion, list):
        return completion
    return [{"role": "assistant", "content": text_of(completion)}]


# ---- loading ----

@contextmanager
def in_one_line(reward, at=""):
    """Code of FILE.py:NAME runs in here. What it raises, exit() included, ends the run with one line."""
    try:
        yield
    except rows.Exit:
        raise
    except (Exception, SystemExit) as error:
        rows.fail(f"{at}{reward}: {describe(error, reward)}")


@contextmanager
def no_exit(reward):
    """All rows are done in here. An exit() that `in_one_line` does not see, as in a callback, is one too."""
    try:
        yield
    except SystemExit as end:
        if not isinstance(end, rows.Exit):
            rows.fail(f"{reward}: called exit({end.code}) before all rows were done")
        raise


def describe(error, reward):
    """What code of FILE.py:NAME raised, in one line, with the line in FILE.py that it comes from."""
    file = Path(reward.rpartition(":")[0]).resolve()
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    if lines:
        text += f" ({file.name}, line {lines[-1]})"
    return " ".join(text.split())


def modules_in(folder):
    """{name: file} of the loaded modules of a folder; not of an environment in it, and not this script."""
    found = {}
    for name, module in sys.modules.items():
        file = str(getattr(module, "__file__", None) or "")
        if file.startswith(f"{folder}/") and "/site-packages/" not in file and name != "__main__":
            found[name] = Path(file)
    return found


def look_first_in(folder):
    """What is imported from now on is looked for in a folder and among installed packages, and last among
    this project's modules, also if they are loaded already.
    """
    root = Path(__file__).resolve().parent.parent
    for name in modules_in(root):
        del sys.modules[name]
    others = [entry for entry in sys.path if Path(entry).resolve() not in (root, folder)]
    sys.path[:] = [str(folder), *others, str(root)]
    if folder == root:
        del sys.path[0]


def load_function(reward):
    """The function of FILE.py:NAME, and the code that it depends on: its file and the modules beside it. The
    file is a module of its own name, which processes that it starts can import, too.
    """
    path, _, name = reward.rpartition(":")
    if not Path(path).is_file():
        rows.fail(f"--reward={reward}: no file {path!r}")
    path = Path(path).resolve()
    look_first_in(path.parent)
    vars(sys.modules["__main__"]).pop("__file__", None)  # new processes would run this script again
    loaded = sys.modules.get(path.stem)
    if loaded and getattr(loaded, "__file__", None) != str(path):
        rows.fail(f"{path}: another module named {path.stem} is in use; give the file another name")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with in_one_line(reward):
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        names = ", ".join(n for n in vars(module) if not n.startswith("_"))
        rows.fail(f"{path}: defines no function {name!r}; it has {names}")
    beside = modules_in(path.parent)
    return function, [beside[other].read_text() for other in sorted(beside)]


def function_settings(args):
    args.function, code = load_function(args.reward)
    args.loop = asyncio.new_event_loop()  # one, as a client that the function keeps belongs to one
    asyncio.set_event_loop(args.loop)
    return {"reward": args.reward.rpartition(":")[2], "code": rows.fingerprint(code)}


# ---- calling ----

def log_nothing(name, value):
    """What a function gets for the log_extra and log_metric of TRL's trainers."""


def call_arguments(row, completions):
    """What a function is called with, as by TRL's trainers: lists with one entry per completion of prompts,
    completions, completion_ids (if all were sampled) and every column. Copies, as functions change them.
    """
    columns = {name: value for name, value in row.items() if name not in OWN}
    columns["prompts"] = row["prompt"]
    copies = [copy.deepcopy(columns) for _ in completions]
    arguments = {name: [entry[name] for entry in copies] for name in columns}
    if all(isinstance(c, dict) and "token_ids" in c for c in completions):
        arguments["completion_ids"] = [list(c["token_ids"]) for c in completions]
    if isinstance(row["prompt"], str):
        completions = [c["text"] if isinstance(c, dict) else c for c in completions]
    else:  # chat prompts have chat completions
        completions = [as_messages(c) for c in completions]
    arguments["completions"] = copy.deepcopy(completions)
    return arguments | {"trainer_state": None, "log_extra": log_nothing, "log_metric": log_nothing}


def as_numbers(rewards, n):
    """What a function returned for n completions, as a list of n floats or None."""
    try:
        if isinstance(rewards, (str, bytes, Mapping, Set)):
            raise TypeError(f"it is a {type(rewards).__name__}")
        # fsum takes everything that is one number, and unlike float() no text
        numbers = [None if reward is None else math.fsum([reward]) for reward in rewards]
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"returned {rewards!r:.60}, not a list of numbers ({error})") from error
    if len(numbers) != n:
        raise ValueError(f"returned {len(numbers)} rewards for the {n} completions")
    return numbers


def function_rewards(args, todo):
    """A user's function, plain or async, called once per row."""
    for row, completions in todo:
        with in_one_line(args.reward, f"{row['__at__']}: "):
            rewards = args.function(**call_arguments(row, completions))
            if inspect.isawaitable(rewards):
                rewards = args.loop.run_until_complete(rewards)
            rewards = as_numbers(rewards, len(completions))
        yield row, rewards


# ---- many calls at a time ----

class Failed(NamedTuple):
    """Stands for a reward where every call failed."""
    reason: str


def in_thread(function, arguments):
    """Call a function in a thread that the end of the process does not wait for: an awaitable (what it
    returned, what it raised).
    """
    future = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def work():
        try:
            outcome = function(**arguments), None
        except BaseException as error:  # of a user's code
            outcome = None, error
        future.set_result(outcome)
    threading.Thread(target=work, daemon=True).start()
    return asyncio.wrap_future(future)


def causes(error):
    """An error, and those that it was raised for."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def asked_wait(error):
    """The seconds that a server asks to wait (Retry-After), at most two minutes, or None. urllib and aiohttp
    keep its headers on the error; requests, httpx and openai on the error's response.
    """
    for cause in causes(error):
        headers = getattr(getattr(cause, "response", cause), "headers", None)
        text = headers.get("Retry-After", "") if headers else ""
        if text.isdecimal():
            return min(int(text), 120)
        date = email.utils.parsedate_tz(text)
        if date:
            seconds = email.utils.mktime_tz(date) + 1 - time.time()  # a date has whole seconds only
            return min(max(seconds, 0), 120)
    return None


class Judge:
    """As function_rewards, for --concurrency calls at a time, each for one completion; calls that fail are
    made again. Rows come as they get done.
    """

    def __init__(self, args):
        self.args, self.answers = args, 0
        self.limit = asyncio.Semaphore(args.concurrency)

    async def call(self, row, completion):
        """What the function returns. Plain functions run in threads, async ones in the event loop."""
        rewards, error = await in_thread(self.args.function, call_arguments(row, [completion]))
        if error:
            raise error
        rewards = await rewards if inspect.isawaitable(rewards) else rewards
        self.answers += 1
        return rewards

    async def reward(self, row, completion):
        """Of one completion; or Failed. A call that is put off while others are answered has not failed."""
        failures, answers = 0, None
        async with self.limit:
            while failures <= self.args.retries:
                try:
                    rewards = await self.call(row, completion)
                    break
                except (Exception, SystemExit) as error:
                    if any("main thread" in str(cause) for cause in causes(error)):  # Python's words
                        raise RuntimeError(f"{error} (omit --concurrency, whose calls are made in threads, "
                                           "or switch off that time-out by a signal)") from error
                    reason, wait = describe(error, self.args.reward), asked_wait(error)
                put_off = wait is not None and self.answers != answers
                failures += not put_off
                answers = self.answers
                if failures <= self.args.retries:
                    backoff = 2 ** (failures - 1) * random.uniform(0.5, 1)  # not all at the same moment
                    await asyncio.sleep(backoff if wait is None else wait + random.random())
            else:
                return Failed(reason)
        return as_numbers(rewards, 1)[0]

    async def rewards(self, row, completions):
        return await asyncio.gather(*[self.reward(row, completion) for completion in completions])

    def __call__(self, todo):
        loop, todo = self.args.loop, iter(todo)
        running = {}  # task: row
        try:
            while True:
                for row, completions in itertools.islice(todo, self.args.concurrency - len(running)):
                    running[loop.create_task(self.rewards(row, completions))] = row
                if not running:
                    return
                done, _ = loop.run_until_complete(
                    asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    row = running.pop(task)
                    with in_one_line(self.args.reward, f"{row['__at__']}: "):
                        rewards = task.result()
                    yield row, rewards
        finally:
            loop.set_exception_handler(lambda loop, context: None)  # the first error was said, the others not
            cancelled = [task for task in running if task.cancel()]
            if cancelled:
                loop.run_until_complete(asyncio.wait(cancelled))
