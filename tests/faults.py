"""Stop and kill the sandbox's processes at random moments: every run must end, with the verdicts of an undisturbed one.

    python tests/faults.py --faults=200

Each fault is a SIGSTOP or a SIGKILL to a random process of a random kind: a supervisor, a judge or a
candidate. Prints the faults of each kind, and ends with 1 where a verdict changed or a run took too long.
"""
# ruff: noqa: E501
import argparse
import collections
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sandbox  # noqa: E402
from sandbox import host  # noqa: E402

PROGRAMS = {  # what each of the programs does beside its answer
    "plain": "", "busy": "sum(range(10 ** 6))", "sleeps": "time.sleep(0.03)", "starts threads":
    "t = threading.Thread(target=time.sleep, args=(0.02,)); t.start(); t.join()", "large": "y = [0] * 10 ** 5",
    "wrong": "x += 1", "fails": "x // 0", "leaves": "os._exit(0)", "long": "time.sleep(0.1)"}


def rows(count):
    test = "def check(candidate):\n" + "".join(f" assert candidate({x}) == {x}\n" for x in range(5))
    return [{"id": (name, n), "fenced": False, "test": test if n % 2 else test + f" assert candidate({n}) == {n}\n",
             "entry_point": "f", "completion": f"import os, threading, time\ndef f(x):\n    {code or 'pass'}\n    return x"
             f"  # {n}"} for n in range(count) for name, code in PROGRAMS.items() if name != "long" or n % 4 == 0]


def processes():
    """The processes below this one by kind."""
    children, lines = collections.defaultdict(list), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines[int(folder.name)] = (folder / "cmdline").read_bytes()
            children[int((folder / "stat").read_text().rpartition(")")[2].split()[1])].append(int(folder.name))
        except (OSError, IndexError):
            pass
    kinds = collections.defaultdict(list)
    level, inside = [(pid, 0) for pid in children[os.getpid()]], 0
    while level:
        for pid, inside in level:
            kinds[("supervisor", "judge or candidate")[min(inside, 1)]].append(pid)
        level = [(child, inside + is_worker(lines.get(child, b""))) for pid, inside in level for child in children[pid]]
    return kinds


def is_worker(line):
    return b"/inside\0" in line


def disturb(done, wanted, rng, counts):
    while not done.wait(rng.uniform(0.3, 2.0)) and sum(counts.values()) < wanted:
        kinds = processes()
        if kinds:
            kind = rng.choice(sorted(kinds))
            signum = rng.choice([signal.SIGSTOP, signal.SIGKILL])
            try:
                os.kill(rng.choice(kinds[kind]), signum)
                counts[f"{signum.name} to {kind}"] += 1
            except ProcessLookupError:
                pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args()
    host.SILENCE, host.TRIES = 4.0, 30  # many faults in a short time
    rng, counts, changed, runs, longest = random.Random(args.seed), collections.Counter(), 0, 0, 0.0
    expected = verdicts()
    while counts.total() < args.faults:
        done = threading.Event()
        thread = threading.Thread(target=disturb, args=(done, args.faults, rng, counts))
        begun = time.monotonic()
        thread.start()
        got = verdicts()
        longest, runs = max(longest, time.monotonic() - begun), runs + 1
        done.set()
        thread.join()
        for name, verdict in expected.items():
            if got.get(name) != verdict:
                changed += 1
                print(f"{name}: {verdict} became {got.get(name)}")
    for name, count in sorted(counts.items()):
        print(f"{count:4} {name}")
    print(f"{counts.total()} faults in {runs} runs of {len(expected)} programs, each at most {longest:.0f} s: "
          f"{changed} verdicts changed")
    sys.exit(changed > 0)


def verdicts():
    return {v.pop("id"): {**v, "seconds": 0} for v in sandbox.judge(rows(8), test_wall=5.0, wall=20.0)}


if __name__ == "__main__":
    main()
