"""How fast the sandbox is, at full isolation: programs/s and tests/s, and CPU time against bare forks and a plain run.

(a) trivial programs with 10 tests each; (b) the same with endless loops or sleepers among them (--bad); (c) the canonical
solutions of LeetCodeDataset's test split, where that file is beside the repository. Run it on a quiet machine:

    python tests/bench_sandbox.py
"""
# ruff: noqa: E501
import argparse
import ctypes
import gzip
import json
import os
import resource
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LEETCODE = REPO / "tests/data/leetcode/LeetCodeDataset-v0.3.1-test.jsonl.gz"
sys.path.insert(0, str(REPO))
import sandbox  # noqa: E402
from sandbox import host, runtimes  # noqa: E402


def trivial(count):
    """Programs that all differ, for equal ones would run once."""
    tests = "def check(candidate):\n" + "".join(f"    assert candidate(x={x}) == {x * x}\n" for x in range(10))
    return [{"id": n, "completion": f"```python\ndef f(x):\n    return x * x + {n} * 0\n```",
             "test": tests, "entry_point": "f"} for n in range(count)]


def mixed(honest, count, code):
    """Honest programs with `count` bad ones spread among them."""
    rows = list(honest)
    for n in range(count):
        program = f"```python\nimport time\ndef f(x):\n    while True: {code}  # {n}\n```"
        rows.insert(n * len(rows) // count, {**honest[0], "id": f"bad {n}", "completion": program})
    return rows


def leetcode():
    with gzip.open(LEETCODE, "rt") as file:
        rows = [json.loads(line) for line in file]
    return [{"id": row["task_id"], "completion": row["completion"], "fenced": False, "preamble": row["prompt"],
             "test": row["test"], "entry_point": row["entry_point"]} for row in rows]


def cpu():
    """CPU seconds of this process and of its ended descendants, also of those that a runtime leaves unreaped."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def sandboxed(rows, args):
    """(wall seconds, CPU seconds, tests, programs that pass all tests); starting the workers counts too."""
    before, wall = cpu(), time.perf_counter()
    verdicts = list(sandbox.judge(rows, workers=args.workers, runtime=args.runtime, unsafe=args.unsafe))
    wall = time.perf_counter() - wall
    return (wall, cpu() - before, sum(v["total"] for v in verdicts),
            sum(v["verdict"] == "pass" for v in verdicts))


def fork_cpu(count=500):
    """CPU seconds of a fork of this small process that ends at once: no sandbox can cost less."""
    before = cpu()
    for _ in range(count):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
    return (cpu() - before) / count


def plain(rows):
    """CPU seconds of the same programs and tests in one unprotected process."""
    before = cpu()
    if (child := os.fork()) == 0:
        for row in rows:
            space = {"__name__": "solution"}
            exec(row["preamble"] + "\n" + row["completion"] + "\n" + row["test"], space)
            space["check"](eval(row["entry_point"], space))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit("the plain run failed")
    return cpu() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trivial", type=int, default=5000, help="number of trivial programs (default %(default)s)")
    parser.add_argument("--bad", type=int, default=20, help="bad programs of a kind (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="workers; 0: one for each core given (default 0)")
    parser.add_argument("--runtime", default="auto", help="see python -m sandbox -h (default auto)")
    parser.add_argument("--unsafe", action="store_true", help="without isolation, for comparison")
    args = parser.parse_args()
    if not args.unsafe:
        host.choose(args.runtime, runtimes.IMAGE, runtimes.PACKAGES)
    cases = {"trivial": trivial(args.trivial)}
    for name, code in {"loops": "pass", "sleepers": "time.sleep(1)"}.items():
        cases[f"with {args.bad} {name}"] = mixed(trivial(1000), args.bad, code)
    if LEETCODE.exists():
        cases["leetcode"] = leetcode()
    for name, rows in cases.items():
        wall, used, tests, passed = sandboxed(rows, args)
        line = (f"{name}: {len(rows) / wall:.1f} programs/s, {tests / wall:.0f} tests/s, {passed}/{len(rows)} pass, "
                f"{used:.1f} s CPU")
        if name == "trivial":
            each, fork = used / len(rows), fork_cpu()
            line += f", {1000 * each:.2f} ms a program, {each / fork:.1f} times the {1000 * fork:.2f} ms of a fork"
        if name == "leetcode":
            floor = plain(rows)
            line += f", {used / floor:.2f} times the {floor:.1f} s of a plain run"
        print(line, flush=True)


if __name__ == "__main__":
    main()
