"""Rows: JSONL datasets are read, shared between processes, and appended to so that a kill loses and repeats
nothing. Also what all scripts share: the command line, atomic files, signals and the record of a run.

A dataset is a JSONL file (or .jsonl.gz), or a folder of them; one row is one prompt. Every stage copies
its rows and adds fields. A stage writes OUT/part-00000.jsonl, one part per process, and
OUT/settings.json, what its rows were made with; an OUT that was made with other settings is refused.

    python -c 'import rows; print(next(rows.stream("data/minicode/test.jsonl")))'
"""
import argparse
import ast
import contextlib
import fcntl
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import marshal
import math
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import sys
import textwrap
from pathlib import Path

import msgspec
from tqdm import tqdm


class Exit(SystemExit):
    """Ends the process where the project itself asks for it, unlike an exit() in a user's code."""


def fail(message):
    """End with an error of the user's: one line on stderr, exit code 2."""
    if multiprocessing.parent_process():
        raise Exit(message)  # the main process prints it
    say = tqdm.write if sys.stderr.isatty() else print  # above a progress bar, not behind it
    say(f"error: {message}", file=sys.stderr)
    raise Exit(2)


def refuse(wrong, message):
    if wrong:
        fail(message)


# ---- the command line ----

class HelpFormat(argparse.RawDescriptionHelpFormatter):
    """Help of at most 100 columns that ends with each flag's default, if it has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action):
        if action.default in (None, False, "", argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormat)

    def error(self, message):
        fail(f"{message}; see --help")


def json_object(text):
    """The type of a flag whose value is a JSON object."""
    value = json.loads(text)  # argparse reports the ValueError
    if not isinstance(value, dict):
        raise ValueError
    return value


def installed(text):
    """The type of a flag whose value is a package."""
    if importlib.util.find_spec(text) is None:
        raise argparse.ArgumentTypeError(f"{text} is not installed; install it, or omit the flag")
    return text


def flag_type(kind, condition, what):
    """The type of a flag for numbers that meet a condition. what: the condition in words."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (condition(value) and abs(value) < math.inf):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value
    return convert


positive = flag_type(float, lambda value: value > 0, "a number above 0")
not_negative = flag_type(float, lambda value: value >= 0, "a number of at least 0")
share = flag_type(float, lambda value: 0 < value <= 1, "a number in (0, 1]")
count = flag_type(int, lambda value: value >= 1, "a whole number of at least 1")
whole = flag_type(int, lambda value: value >= 0, "a whole number of at least 0")


# ---- reading ----

def files(path):
    """The JSONL files of a dataset: the file itself, or those of a folder by name."""
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
    if not found:
        for file in sorted(path.glob("*.*")):
            if file.suffix in (".parquet", ".arrow", ".csv"):
                fail_format(file, file.suffix[1:])
        fail(f"{path}: no such JSONL file, or folder that holds *.jsonl")
    return found


STARTS = {b"PAR1": "parquet", b"ARROW1": "arrow", b"[": "json"}  # how a file of another format begins


def fail_format(file, name):
    """Refuse a file of another format, with the line that converts it. name: as `datasets` calls it."""
    fail(f"{file}: is {name}, not JSONL, which has one JSON object a line; convert it: python -c \"import "
         f"datasets; datasets.load_dataset('{name}', data_files='{file}')['train'].to_json('NAME.jsonl')\"")


def lines(path):
    """Yield ("FILE:NUMBER", bytes) for every line of a dataset that is not blank."""
    for file in files(path):
        try:
            with open(file, "rb", 1 << 20) as f:  # as a line may be long
                content = gzip.open(f) if f.peek(2)[:2] == b"\x1f\x8b" else f
                for start, name in STARTS.items():
                    if content.peek(64).lstrip().startswith(start):
                        fail_format(file, name)
                if file.suffix == ".csv":
                    fail_format(file, "csv")
                for number, line in enumerate(content, 1):
                    if not line.isspace():
                        yield f"{file}:{number}", line
        except (OSError, EOFError) as error:
            fail(f"{file}: cannot be read ({error}); is it complete, and may you read it?")


def parse(at, line, require=()):
    """The row of a line, a dict, or an error of the user's. at: where the line is, which messages say, and
    row["__at__"]. NaN becomes None.
    """
    try:
        row = loads(line)
    except (ValueError, RecursionError) as error:
        fail(f"{at}: not JSON in UTF-8 ({error}); fix or delete the line")
    if not isinstance(row, dict):
        fail(f"{at}: a row must be a JSON object, not a {type(row).__name__}")
    for name in require:
        if row.get(name) is None:
            hints = [f"; {text}" for field, text in PROMPTS.items() if field in row and name == "prompt"]
            fail(f"{at}: has no {name!r}; the row's fields are {', '.join(row)}{''.join(hints)}")
    for name, kinds in COLUMNS.items():
        value = row.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            what = " or ".join(KINDS[kind] for kind in kinds)
            fail(f"{at}: {name} must be {what}, not {value!r:.60}; rename the column, if it is yours")
    for name in ("id", "made_by"):
        if name in row and row[name] is None:
            del row[name]
    refuse(not all(isinstance(made, dict) for made in row.get("made_by", {}).values()),
           f"{at}: made_by must be an object of objects, as the stages write it; rename the column")
    refuse(any("\ud800" <= c <= "\udfff" for c in str(row.get("id"))),
           f"{at}: id has half a surrogate pair; give another")
    row["__at__"] = at
    return row


# Columns that stages read or write, and what they hold
KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}
COLUMNS = {"id": (str, int), "made_by": (dict,)}
COLUMNS |= {name: (str, list) for name in ("prompt", "completion", "chosen", "rejected")}
COLUMNS |= {name: (list,) for name in ("ref_completions", "samples", "other_completions",
                                       "ref_rewards", "sample_rewards", "other_rewards")}
# How rows of other formats, told by a field, get a prompt
PROMPTS = {
    "messages": "write prompt = messages[:-1] and completion = messages[-1:]",
    "conversations": "write prompt = [{'role': 'user', 'content': conversations[0]['value']}], and so on",
    "chosen": "write prompt = chosen[:-1], chosen = chosen[-1:] and rejected = rejected[-1:], or if they are "
              "texts: prompt, chosen = chosen.rsplit('\\n\\nAssistant:', 1) and rejected likewise"}


def loads(line):
    """The JSON value of a line. What msgspec refuses goes to Python's parser, which is half as fast: it reads
    NaN, and says what is wrong.
    """
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return json.loads(line, parse_constant=constant, parse_float=finite)


def constant(name):
    """What Python writes for numbers that JSON lacks: NaN is unknown, and infinity is a mistake."""
    if name == "NaN":
        return None
    raise ValueError(f"{name} is not a JSON number")


def finite(text):
    """A number as Python reads it, which makes infinity of 1e999."""
    return float(text) if math.isfinite(float(text)) else constant(text)


def stream(path, require=()):
    """The rows of a dataset one by one, each with a unique `id` (its 0-based position if it has none).

    require: the fields that every row must have (not null).
    """
    seen = {}
    for at, line in lines(path):
        row = parse(at, line, require)
        name = str(row.setdefault("id", len(seen)))
        if name in seen:
            fail(f"{at}: id {row['id']!r} already appears at {seen[name]}; ids must be unique")
        seen[name] = at
        yield row
    if not seen:
        fail(f"{path}: holds no rows")


def order(path, ids):
    """The positions of rows in the order to use them: that of the file; in a folder by id, so that it
    does not matter how many processes wrote it.
    """
    positions = range(len(ids))
    if not Path(path).is_dir():
        return list(positions)
    return sorted(positions, key=lambda i: (isinstance(ids[i], str), ids[i]))


def read(path, require=()):
    """All rows of a dataset, in the order to use them."""
    table = list(stream(path, require))
    return [table[i] for i in order(path, [row["id"] for row in table])]


# ---- writing ----

@contextlib.contextmanager
def writing(path):
    """Report an error of the disk in one line."""
    try:
        yield
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror or error}); what is there is complete. Make "
             "room, or give another --out, and start again")


@contextlib.contextmanager
def locked(path):
    """Wait until no other process holds the lock of `path` (the file PATH.lock), and hold it."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.lock", "a") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def open_part(path):
    """Open an output for appending, without its torn last line, and locked until this process ends."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{path}: another process is writing it; wait for it, or stop it")
    except OSError as error:  # some network file systems
        print(f"{path}: cannot be locked here ({error.strerror}); see that no second process writes it",
              flush=True)
    file.seek(0)
    file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
    return file


def append(file, row):
    """Append one whole row."""
    row = {key: value for key, value in row.items() if key != "__at__"}
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    line = text.encode(errors="backslashreplace") + b"\n"  # half a surrogate pair becomes its JSON escape
    with writing(file.name):
        file.write(line)
        file.flush()


def keep_while(file, wanted):
    """Cut an opened output before its first row that is not wanted."""
    file.seek(0)
    end = 0
    for line in file:
        if not wanted(loads(line)):
            break
        end += len(line)
    file.truncate(end)


@contextlib.contextmanager
def replacing(path):
    """Write a file or a folder completely or not at all: yields a path beside `path`, and moves what was
    written there to `path` when the block ends. What a killed process left there is deleted first.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.new")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(new)
        yield new
        if path.is_dir():  # a folder cannot be moved onto another
            remove(path)
        os.replace(new, path)


def remove(path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file completely or not at all."""
    with replacing(path) as new:
        new.write_text(json.dumps(value, indent=1, allow_nan=False, default=str) + "\n")


def load_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        fail(f"{path}: not JSON ({error}); restore the file, or delete its folder")


def complete_lines(path):
    """The rows of an output, which may end in a torn line, one by one."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield loads(line)


def fingerprint(value):
    """16 hex digits that stand for a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def code_of(part):
    """The source of a module, function or class without comments and layout: what a cache of its results
    depends on.
    """
    return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(part))))


# ---- signals ----

STOP = signal.SIGTERM, signal.SIGUSR1


def stop(signum, frame):
    raise Exit(75)  # what was written is complete: "start me again"


def stop_on_signals(handler=stop):
    """What SIGTERM and SIGUSR1 do: by default, end with exit code 75, which means "start me again"."""
    for signum in STOP:
        signal.signal(signum, handler)


def end_in_forks():
    """Let the signals end a fork, such as a worker of multiprocessing's Pool, at once."""
    for signum in STOP:
        if callable(signal.getsignal(signum)):
            signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)


# A signal that comes during a fork waits for its end: Python would forget it.
os.register_at_fork(before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOP),
                    after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP),
                    after_in_child=end_in_forks)


# ---- a stage: rows in, the same rows with more fields out ----

def rank_and_world():
    """(rank, world): this process among those that torchrun started, which share the work."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world is None:
        return 0, 1
    if not (rank and world and rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        fail(f"RANK={rank} and WORLD_SIZE={world} in the environment do not name one of several processes; "
             "start with torchrun, or unset both")
    return int(rank), int(world)


@functools.cache
def say_once(text):
    """Print a line, once, by the main process."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


class Lines(tqdm):
    """A progress bar for a log file: one line each time."""

    def display(self, msg=None, pos=None):
        if msg is None:  # else the bar is to disappear
            print(self, file=self.fp)


def progress(*args, **kwargs):
    """tqdm's bar, of the main process; where stderr is no terminal, a line a minute. Set its postfix with
    refresh=False, and then update it.
    """
    kwargs.setdefault("disable", rank_and_world()[0] != 0)
    if sys.stderr.isatty():
        return tqdm(*args, **kwargs)
    line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
    kwargs |= {"delay": 60, "mininterval": 60, "maxinterval": 60, "miniters": 1, "leave": False}
    return Lines(*args, **kwargs, bar_format=line)


def check_run(out, config, resume):
    """Refuse an OUT that is not this run's: run.json there says with which settings (config) it was started.
    Ends with exit code 0 if the run has finished.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        fail(f"{out}: is a file; --out must name a folder")
    if not (out / "run.json").exists():
        return
    if not resume:
        fail(f"{out}: already holds a run; continue it with --resume, or give another --out")
    record = load_json(out / "run.json")
    for name, value in config.items():
        before = record["config"].get(name)
        if before != value:
            what = f"{name}={before}, now {value}"
            if name == "data_fingerprint":
                what = "other data (rows, rewards or tokenizer)"
            fail(f"{out}: was started with {what}; use the same, or another --out")
    if record["finished"]:
        print(f"{out}: this run has finished, nothing to do")
        sys.exit(0)


def write_run(out, config, finished):
    """OUT/run.json: the settings of a run, the versions of what it runs on, and whether it has finished."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    write_json(Path(out) / "run.json", {
        "config": config, "command": shlex.join(sys.argv), "finished": finished,
        "versions": {"python": platform.python_version()} | versions})


def finish_run(out, config):
    """The model in OUT/.trained becomes OUT itself, and run.json says that the run has finished."""
    out = Path(out)
    with writing(out):
        for file in (out / ".trained").iterdir():
            remove(out / file.name)
            os.replace(file, out / file.name)
        (out / ".trained").rmdir()
        write_run(out, config, finished=True)
        shutil.rmtree(out / "resume")


class Tracker:
    """Sends metrics to wandb, or to trackio, which has its interface. Its errors do not end the training."""

    def __init__(self, name, out, config):
        # the same run when it is resumed: wandb goes by this id, trackio by the name
        os.environ.setdefault("WANDB_RUN_ID", fingerprint([str(Path(out).resolve()), config]))
        self.module = importlib.import_module(name)
        self.call(self.module.init, project="qrpo", name=str(out), config=config, resume="allow")

    def log(self, row):
        if self.module:
            self.call(self.module.log, {k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def call(self, function, *args, **kwargs):
        try:
            function(*args, **kwargs)
        except Exception as error:  # whatever a tracker raises
            print(f"no metrics are sent any more: {type(error).__name__}: {error}", file=sys.stderr)
            self.module = None


def continue_stage(data, out, settings, check, require=("prompt",)):
    """Start or continue a stage. Returns (left, part): the ids of the rows that are left for this
    process, a set of strings, and the open file to append to.

    settings: what the output depends on; an OUT that was made with others is refused. check(row) fails if
    the stage cannot use a row; it is called on all rows before the first is worked on. The share of a
    process depends on its rank alone, so two processes never take the same row.
    """
    stop_on_signals()  # complete rows are on disk
    rank, world = rank_and_world()
    out = Path(out)
    if out.exists() and not out.is_dir():
        fail(f"{out}: is a file; --out must name a folder")
    refuse(out.resolve() == Path(data).resolve(), f"--out={out} is also the data; give another folder")
    ids, digest = [], 0
    for row in stream(data, require):
        check(row)
        ids.append(row["id"])
        del row["__at__"]
        content = hashlib.sha256(marshal.dumps(row, 2)).digest()  # version 2 writes equal rows as equal bytes
        digest ^= int.from_bytes(content[:8], "little")           # in any order: a folder's parts may differ
    settings = {key: str(value) for key, value in settings.items()} | {"rows": f"{digest:016x}"}
    done = {str(row["id"]) for file in out.glob("part-*.jsonl") for row in complete_lines(file)}
    record = out / "settings.json"
    if done and record.exists():
        before = load_json(record)
        for name, value in settings.items():
            if before.get(name) != value:
                fail(f"{out}: its rows were made with another {name} ({before.get(name)}, now {value}); "
                     "give another --out, or delete it")
    if rank == 0:
        write_json(record, settings)
    part = open_part(out / f"part-{rank:05d}.jsonl")
    mine = {str(ids[i]) for i in order(data, ids)[rank::world]}
    left = mine - done
    if len(left) < len(mine) and rank == 0:
        print(f"{out}: {len(mine) - len(left)} of {len(mine)} rows of this process are already done")
    return left, part


def select(data, left):
    """The rows of a dataset whose ids are in `left`, one by one."""
    return (row for row in stream(data) if str(row["id"]) in left)
