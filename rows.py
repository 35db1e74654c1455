"""Rows: datasets as JSONL, read, shared between processes, and appended so that a kill loses and repeats nothing.

A dataset is a JSONL file (or .jsonl.gz), or a folder of them; one row is one prompt. Every stage copies its rows and
adds fields. A stage writes OUT/part-00000.jsonl (one part a process) and OUT/run.json, the settings its rows were
made with.

    python -c 'import rows; print(rows.read("data/minicode/test.jsonl")[0])'
"""
import contextlib
import fcntl
import gzip
import hashlib
import json
import marshal
import os
import signal
import sys
import threading
from pathlib import Path

from tqdm import tqdm


def fail(message):
    """A user's mistake: one line on stderr, exit code 2."""
    if threading.current_thread() is not threading.main_thread():
        raise SystemExit(message)  # who waits for this thread fails for it
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # else the message would stand behind a progress bar
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def files(path):
    """The JSONL files of a dataset: the file itself, or those of a folder by name."""
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.glob("*.jsonl*") if p.suffix in (".jsonl", ".gz")) if path.is_dir() else []
    if not found:
        fail(f"{path}: no such JSONL file, nor a folder that holds *.jsonl; give --data one of them")
    return found


def stream(path, require=()):
    """The rows of a dataset one by one as dicts, each with a unique `id` (its 0-based position where it has none).

    `require` names the fields that every row must have (not null). `__at__` says where the row stands, for messages.
    """
    where = {}
    for file in files(path):
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield check(line, f"{file}:{number}", require, where)
        except (OSError, EOFError) as error:
            fail(f"{file}: cannot be read ({error}); is it whole, and readable for you?")
    if not where:
        fail(f"{path}: holds no rows")


def check(line, at, require, where):
    """The row of a line. `where` collects the ids so far."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        fail(f"{at}: not JSON in UTF-8 ({error}); mend or delete the line")
    if not isinstance(row, dict):
        fail(f"{at}: a row must be a JSON object, this is a {type(row).__name__}")
    missing = [name for name in require if row.get(name) is None]
    if missing:
        fail(f"{at}: has no {missing[0]!r}; the row's fields are {', '.join(row)}")
    if not isinstance(row.setdefault("id", len(where)), (str, int)):
        fail(f"{at}: id must be a string or a whole number, not {row['id']!r}")
    if str(row["id"]) in where:
        fail(f"{at}: id {row['id']!r} stands already at {where[str(row['id'])]}; ids must be unique")
    where[str(row["id"])] = row["__at__"] = at
    return row


def order(path, ids):
    """Positions of rows in the order to use them: that of the file, or by id for a folder, so that it does not matter
    how many processes wrote it.
    """
    if not Path(path).is_dir():
        return list(range(len(ids)))
    return sorted(range(len(ids)), key=lambda i: (isinstance(ids[i], str), ids[i]))


def read(path, require=()):
    """All rows of a dataset, in the order to use them."""
    rows = list(stream(path, require))
    return [rows[i] for i in order(path, [row["id"] for row in rows])]


def share():
    """(rank, world): this process among those that share the work, from torchrun, a SLURM array, or both."""
    env = {name: int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("SLURM_ARRAY_TASK_ID", 0), ("SLURM_ARRAY_TASK_MIN", 0),
        ("SLURM_ARRAY_TASK_MAX", 0), ("SLURM_ARRAY_TASK_STEP", 1), ("SLURM_ARRAY_TASK_COUNT", 1))}
    step, low = env["SLURM_ARRAY_TASK_STEP"], env["SLURM_ARRAY_TASK_MIN"]
    if (env["SLURM_ARRAY_TASK_MAX"] - low) // step + 1 != env["SLURM_ARRAY_TASK_COUNT"]:
        fail("the SLURM array has holes; submit it as one range, such as --array=0-7 (what is done is skipped)")
    task = (env["SLURM_ARRAY_TASK_ID"] - low) // step
    return task * env["WORLD_SIZE"] + env["RANK"], env["SLURM_ARRAY_TASK_COUNT"] * env["WORLD_SIZE"]


@contextlib.contextmanager
def writing(path):
    """What a disk refuses ends in one line."""
    try:
        yield
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror or error}); what stands there is whole: make room or give "
             "another --out, and start again")


def open_part(path):
    """Open an output for appending: its torn last line cut off, locked against others until this process ends."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{path}: another process is writing it; wait for it, or stop it")
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    return file


def append(file, row):
    """Append one whole row, but for where it stood before."""
    row = {key: value for key, value in row.items() if key != "__at__"}
    line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with writing(file.name):
        file.write(line)
        file.flush()


def continue_stage(data, out, settings, require=()):
    """Start or continue a stage: (the rows that are left for this process, the open part file to append to).

    settings: what the output depends on; an OUT made with others is refused. The share of a process depends only on its
    rank, never on what the others have done, so two processes never take the same row.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # whole rows are written: "start me again"
    rank, world = share()
    rows, out = read(data, require), Path(out)
    if out.exists() and not out.is_dir():
        fail(f"{out}: is a file; --out must name a folder")
    digest = hashlib.sha256()
    for row in rows:  # marshal is ten times as fast as JSON; its version 2 writes equal rows as equal bytes
        digest.update(marshal.dumps({key: row[key] for key in row if key != "__at__"}, 2))
    settings = {key: str(value) for key, value in settings.items()} | {"rows": digest.hexdigest()[:16]}
    record = out / "run.json"
    # whole lines only: another process may be in the middle of one
    done = {str(row["id"]) for file in out.glob("part-*.jsonl") for row in load_lines(file)}
    if done and record.exists():
        before = load_json(record)
        changed = [f"{k} ({before.get(k)}, now {settings[k]})" for k in settings if settings[k] != before.get(k)]
        if changed:
            fail(f"{out}: its rows were made with another {', '.join(changed)}; give another --out, or delete it")
    write_json(record, settings)
    part = open_part(out / f"part-{rank:05d}.jsonl")
    mine = rows[rank::world]
    left = [row for row in mine if str(row["id"]) not in done]
    if len(left) < len(mine) and rank == 0:
        print(f"{out}: {len(mine) - len(left)} of {len(mine)} rows of this process are done already")
    return left, part


def write_json(path, value):
    """Write a JSON file whole or not at all."""
    path = Path(path)
    new, text = path.with_name(f".{path.name}.{os.getpid()}"), json.dumps(value, indent=1, allow_nan=False, default=str)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text + "\n")
        os.replace(new, path)


def load_json(path):
    return json.loads(Path(path).read_text())


def load_lines(path):
    """The whole lines of an output that may end in a torn one."""
    path = Path(path)
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def cut(file, wanted):
    """Drop the end of an opened output: everything from its first row that is not wanted."""
    file.seek(0)
    end = 0
    for line in file:
        if not wanted(json.loads(line)):
            break
        end += len(line)
    file.truncate(end)


def fingerprint(value):
    """16 hex digits that stand for a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
