"""Tests and program in one process, as in a plain run: whatever a test does around the program (mocks, files,
random.seed, contexts, classes of its own) reaches it. And the program can reach the tests: see README.md.

In: a job, whole. Out: a report in which each part stands after a key that is made before the program runs.

    python -m sandbox --judge=together --data=programs.jsonl --out=verdicts.jsonl
"""
import json
import os
import random

from .candidate import Candidate
from .confine import compile_preamble, module_space, silence, take
from .tests import Report, Tests

KEY = 32  # characters of a key


def reporter(report):
    """A function that writes a part of the report; no frame shows the key."""
    key, write = os.urandom(KEY // 2).hex().encode(), os.write
    write(report, key)
    return lambda text: write(report, key + text.encode())


def run_together(size, report, limits):
    """The life of the clone: run the program, then the tests on it."""
    say = reporter(report)
    job = json.loads(take(size))
    silence()
    try:
        exec(compile_preamble(job["preamble"]), module_space())
        tests = Tests(job["test"], job["entry_point"])
        exec(tests.imports, module_space())  # what is not installed is no fault of the program
    except Exception as error:
        return say(f"?the row's own preamble or test fails: {type(error).__name__} {error}"[:300])
    say(f"{tests.total:08x}")
    judge = Report(tests.total, say)

    def check():
        candidate = Candidate(None, None, limits)
        candidate.start(job)
        space, function = candidate.space, candidate.kept[0]
        space = space if job["entry_point"] != "__main__" else {"__name__": "tests"}
        random.seed(0)
        space["__judge__"] = judge
        exec(tests.code, space)
        space[tests.check](function)
    judge.run(check)
    say("\n" + judge.detail)


def opened(data):
    """The report as a judge writes it, of what came through the pipe: only what stands after the key."""
    key, rest = data[:KEY], data[KEY:]
    parts = [part.decode("ascii", "replace") for part in rest.split(key)[1:]] if len(key) == KEY else []
    if not parts:
        return ""
    ends = [part for part in parts[1:] if part.startswith("\n")]
    codes = "".join(part[:1] for part in parts[1:] if not part.startswith("\n"))
    return parts[0] if parts[0].startswith("?") else parts[0][:8] + codes + (ends[-1] if ends else "")
