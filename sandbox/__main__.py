"""Run untrusted Python programs against their tests, and say how many tests each one passes.

In: JSONL rows with id, completion (a model's answer, see --block; with "fenced": false a text
without a block is all program), preamble (imports and helper classes), test (Python with `def
check(candidate)`) and entry_point (an expression that names the function), or the columns of
another known format (formats.md).
Out: JSONL rows with id, reward (passed / total), passed, total, verdict (pass, wrong, exception,
timeout, memory, output, killed, no_code; or infra with a null reward: the row or the sandbox is at
fault), detail, and seconds. A killed run continues where it stopped.

    python -m sandbox --data=programs.jsonl --out=verdicts.jsonl
"""
import argparse
import collections
import fcntl
import json
import os
import sys
import time

from . import BLOCKS, FLAGS, PACKAGES, RUNTIMES, WAYS, about, judge, slowest
from .runtimes import IMAGE


def fail(message):
    sys.exit(print(f"error: {message}", file=sys.stderr) or 2)


def arguments():
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="JSONL of programs")
    add("--out", required=True, help="JSONL of verdicts; what is there already is not run again")
    add("--workers", type=int, default=0, help="workers; 0: one for each core given")
    add("--runtime", choices=("auto", *RUNTIMES), default="auto", help="auto: the first that works")
    add("--image", default=IMAGE, help="podman's image")
    add("--packages", default=PACKAGES, help="import names of installed packages, such as numpy, that "
        "programs and tests may use besides the standard library")
    add("--unsafe", action="store_true", help="no isolation, only limits: not for programs of a model")
    rules = "; ".join(f"{name}: {text}" for name, text in BLOCKS.items())
    add("--block", choices=tuple(BLOCKS), default="answer", help=f"the program in an answer. {rules}")
    ways = "; ".join(f"{name}: {text}" for name, text in WAYS.items())
    add("--judge", choices=tuple(WAYS), default="apart", dest="way", help=f"tests and program. {ways}")
    for name, (default, text) in FLAGS.items():
        add(f"--{name}", type=type(default), default=default, help=f"{text} (default {default})")
    return vars(parser.parse_args())


def read(path):
    """The rows of a JSONL file. An id is the row's own, or its position."""
    rows, seen = [], set()
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = {"id": len(rows)} | json.loads(line)
            except (ValueError, TypeError) as error:
                fail(f"{path}:{number}: not a JSON object ({error})")
            if not isinstance(row.get("completion"), str):
                fail(f"{path}:{number}: completion must be a string")
            if str(row["id"]) in seen:
                fail(f"{path}:{number}: id {row['id']!r} appears twice; ids must be unique")
            seen.add(str(row["id"]))
            rows.append(row)
    return rows


def open_output(path):
    """The file to append to, locked, without the torn last line of a killed run; and the ids it holds."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    file = open(path, "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{path}: another process is writing it; wait for it, or stop it")
    file.seek(0)
    lines = [line for line in file if line.endswith(b"\n")]
    file.truncate(sum(map(len, lines)))
    return file, {str(json.loads(line)["id"]) for line in lines}


def main():
    args = arguments()
    path = args.pop("out")
    try:
        rows = read(args.pop("data"))
        out, done = open_output(path)
    except (OSError, ValueError) as error:
        fail(error)
    left = [row for row in rows if str(row["id"]) not in done]
    words, total, longest, begun, shown = collections.Counter(), 0.0, [], time.monotonic(), 0.0

    def summary():
        mean = total / max(1, words.total() - words["infra"])
        return f"{words.total() / (time.monotonic() - begun):.1f} programs/s, mean reward {mean:.4f}"
    try:
        for verdict in judge(left, **args):
            out.write(json.dumps(verdict).encode() + b"\n")
            out.flush()
            words[verdict["verdict"]] += 1
            total += verdict["reward"] or 0.0
            longest = slowest([*longest, verdict])
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                print(f"sandbox: {words.total()} of {len(left)}, {summary()}", file=sys.stderr, flush=True)
    except RuntimeError as error:
        fail(error)
    counts = ", ".join(f"{count} {word}" for word, count in words.most_common())
    print(f"{path}: {words.total()} new verdicts ({counts}), {summary()}\n{about(longest)}")


if __name__ == "__main__":
    main()
