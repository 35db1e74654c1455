"""Run a sweep: on this machine, or as a SLURM job array; and say what became of each of its runs.

A grid is a name in paper/grids.py (chat, scaling, code, sft, refs, mini, mini_refs), or FILE.py:NAME, a function of your
own that yields runs in the same way. Input: the grid. Output: what the runs write into their folders, and beside it
log.txt (what a run printed) and job.json (where it runs or ran, and its exit code).

    python paper/sweep.py list mini --only='qrpo*seed0'
    python paper/sweep.py run mini --jobs=2
    python paper/sweep.py status mini
"""
import argparse
import concurrent.futures
import fcntl
import fnmatch
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

import rows  # noqa: E402


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("list", "run", "status"))
    add("grid", help="a name in paper/grids.py, or FILE.py:NAME")
    add("--only", default="*", help="runs whose name holds this, or matches this pattern of * and ?")
    add("--jobs", type=int, default=1, help="run: so many side by side, each with its share of the cores (default 1)")
    return parser.parse_args()


def load_grid(name, only="*"):
    """The runs of a grid, in its order, those that --only names."""
    path, _, function = name.rpartition(":")
    path = Path(path or ROOT / "paper" / "grids.py")
    if not path.is_file():
        rows.fail(f"{path}: no such file; the grid must be a name in paper/grids.py, or FILE.py:NAME")
    spec = importlib.util.spec_from_file_location("grid_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        rows.fail(f"{path}: defines no grid {function!r}")
    runs = list(getattr(module, function)())
    found = [run for run in runs if fnmatch.fnmatch(run["name"], only) or only in run["name"]]
    if not found:
        rows.fail(f"--only={only}: none of the grid's {len(runs)} runs is called so; see sweep.py list {name}")
    return found


def record(run):
    """What job.json says of a run; {} where it never started."""
    path = ROOT / run["folder"] / "job.json"
    return rows.load_json(path) if path.exists() else {}


def done(run):
    return record(run).get("exit") == 0


CHILDREN = set()  # the runs that this process has started


def execute(run, threads=None):
    """Run one run to its end with its output in log.txt; returns its exit code, or None if it runs elsewhere already.

    The lock on log.txt lives as long as any process of the run, so it tells whether one still runs.
    """
    folder = ROOT / run["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / "log.txt", "a")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    job = {"command": run["command"], "host": socket.gethostname(), "started": time.time()}
    rows.write_json(folder / "job.json", job)
    env = {"PYTHON": sys.executable, "TQDM_MININTERVAL": "10"} | os.environ
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    child = subprocess.Popen(["bash", "-c", run["command"]], cwd=ROOT, env=env, stdout=log, stderr=log,
                             stdin=subprocess.DEVNULL, start_new_session=True)
    CHILDREN.add(child)
    code = child.wait()
    CHILDREN.discard(child)
    rows.write_json(folder / "job.json", job | {"exit": code, "ended": time.time()})
    return code


def run_here(runs, jobs):
    """All runs that are not done, `jobs` at a time."""
    todo = [run for run in runs if not done(run)]
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are done already")
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), unit="run") as bar:
        futures = {pool.submit(execute, run, threads): run for run in todo}
        try:
            for future in concurrent.futures.as_completed(futures):
                code, run = future.result(), futures[future]
                failed += code != 0
                if code != 0:
                    bar.write(f"{run['name']}: " + ("runs elsewhere" if code is None else f"exit code {code}; see "
                                                    f"{run['folder']}/log.txt"))
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(CHILDREN):
                os.killpg(child.pid, signal.SIGTERM)  # train.py saves
            raise SystemExit(130)
    raise SystemExit(failed > 0)


def main():
    args = arguments()
    runs = load_grid(args.grid, args.only)
    if args.what == "list":
        for run in runs:
            print(f"{run['name']}  {run['command']}")
    elif args.what == "run":
        run_here(runs, args.jobs)


if __name__ == "__main__":
    main()
