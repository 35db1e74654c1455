"""Run a sweep on this machine or as a SLURM job array, say what became of each of its runs, and run again what failed.

A grid is a name in paper/grids.py (chat, scaling, code, sft, refs; mini, mini_refs; stories, stories_refs), or
FILE.py:NAME, a function of your own that yields runs in the same way. Input: the grid. Output: what the runs write into
their folders, and beside it log.txt (what a run printed) and job.json (where it runs or ran, and its exit code), which
are all that `status` needs besides squeue. A run that SLURM's time limit would stop saves, is queued again and
continues.

    python paper/sweep.py list mini --only='qrpo*seed0'
    python paper/sweep.py run mini --jobs=2
    python paper/sweep.py submit chat --max_running=8 --gpus=8 --time=12:00:00 --account=mine
    python paper/sweep.py status chat
"""
import concurrent.futures
import contextlib
import fcntl
import fnmatch
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

import flags  # noqa: E402
import rows  # noqa: E402

SAVED = 75  # train.py's exit code for "saved, start me again"


def arguments():
    parser = flags.parser(__doc__)
    add = parser.add_argument
    add("what", choices=("list", "run", "submit", "status", "task"), help="task: for SLURM itself, with a run's folder")
    add("grid", help="a name in paper/grids.py, or FILE.py:NAME")
    add("--only", default="*", help="runs whose name holds this, or matches this pattern of * and ?; several by commas")
    add("--rerun", action="store_true", help="run, submit: just what failed (default: also what never started)")
    add("--jobs", type=int, default=1, help="run: so many side by side, each with its share of the cores (default 1)")
    add("--stalled", type=float, default=30, help="minutes of silence after which a run has stalled (default 30)")
    # SLURM
    add("--max_running", type=int, default=8, help="submit: most runs at a time (default %(default)s)")
    add("--gpus", type=int, default=0, help="submit: GPUs a node (default 0)")
    add("--nodes", type=int, default=1, help="submit: nodes a run (default 1)")
    add("--time", help="submit: time limit, as sbatch's; longer runs continue in the next (default: the partition's)")
    add("--account", help="submit: as sbatch's")
    add("--partition", help="submit: as sbatch's")
    add("--save_time", type=int, default=300, help="submit: seconds before --time to save at (default 300)")
    add("--sbatch", default="", help="submit: more flags for sbatch, such as '--cpus-per-task=32 --mem=0'")
    args = flags.parse(parser)
    if args.jobs < 1:
        rows.fail("--jobs must be at least 1")
    if args.what == "submit" and not shutil.which("sbatch"):
        rows.fail("sbatch: not found; submit where SLURM is, or take `run`")
    return args


def load_grid(name, only="*"):
    """The runs of a grid, in its order, those that --only names."""
    path, _, function = name.rpartition(":")
    path = Path(path or ROOT / "paper" / "grids.py")
    if not path.is_file():
        rows.fail(f"{path}: no such file; the grid must be a name in paper/grids.py, or FILE.py:NAME")
    spec = importlib.util.spec_from_file_location("grid_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    grids = [name for name, value in vars(module).items() if inspect.isfunction(value)
             and value.__module__ == "grid_file" and not inspect.signature(value).parameters]
    if function not in grids:
        rows.fail(f"{path}: defines no grid {function!r}, a function without arguments; it has {', '.join(grids)}")
    runs = list(getattr(module, function)())
    for key in "name", "folder":
        values = [run.get(key) for run in runs]
        for value, count in Counter(values).items():
            if count > 1 or not value:
                rows.fail(f"{path}: {count} runs of {function} have the {key} {value!r}; give each its own")
    parts = [part.strip() for part in only.split(",") if part.strip()]
    found = [run for run in runs if any(
        part in run["name"] or fnmatch.fnmatchcase(run["name"], part) for part in parts)]
    if not found:
        rows.fail(f"--only={only}: none of the grid's {len(runs)} runs is called so; see sweep.py list {name}")
    return found


# ---- running ----

RUNNING, STOPPED = set(), set()  # the processes that this one has started; the signals that it got


def execute(folder, command, job, threads=None):
    """Run a command to its end, its output appended to FOLDER/log.txt; returns its exit code, None if it runs already.

    The lock on log.txt lives as long as any process of the run, so it tells whether one still runs.
    """
    with rows.writing(ROOT / folder):
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        log = open(ROOT / folder / "log.txt", "ab")
    if STOPPED or not (lock(log) or time.sleep(1) or lock(log)):  # `status` holds it for an instant
        return None
    if "job" not in job and record(folder).get("exit") == 0:
        return 0  # another sweep.py was faster
    job = job | {"command": command, "host": socket.gethostname(), "started": time.time(), "log_from": log.tell()}
    rows.write_json(ROOT / folder / "job.json", job)
    # an array is of runs here, not of shares of one run's rows
    env = {"PYTHON": sys.executable, "TQDM_MININTERVAL": "10"} | {
        key: value for key, value in os.environ.items() if not key.startswith("SLURM_ARRAY_")}
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    # SIGUSR1 means "save and stop": nobody dies of it, and train.py, which sets its own handler, obeys it. At a SIGTERM
    # the shell waits for what saves, and ends with its exit code
    traps = "trap '' USR1; trap 'exit $(($? ? $? : 143))' TERM"
    child = subprocess.Popen(["bash", "-c", f"{traps}\n{command}"], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                             stdout=log, stderr=log, start_new_session=True)
    RUNNING.add(child)
    if STOPPED:  # meanwhile
        os.killpg(child.pid, signal.SIGTERM)
    code = child.wait()
    RUNNING.discard(child)
    rows.write_json(ROOT / folder / "job.json", job | {"exit": code, "ended": time.time()})
    return code


def lock(log, kind=fcntl.LOCK_EX):
    """Whether the lock could be had."""
    try:
        fcntl.flock(log, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def family(pid):
    """A process and all that descend from it, in whatever session: torchrun's workers are in sessions of their own."""
    children, found = {}, [pid]
    for line in subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True).splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    for pid in found:
        found += children.get(pid, [])
    return found


def stop(signum, frame):
    """SIGUSR1 (the time limit is near) asks the runs to save; SIGTERM and SIGINT end them, those that save, saved."""
    near = signum == signal.SIGUSR1
    # what has not saved when the time is up will not
    sent = signal.SIGUSR1 if near else signal.SIGKILL if signal.SIGUSR1 in STOPPED else signal.SIGTERM
    STOPPED.add(signum)
    for child in list(RUNNING):
        for pid in family(child.pid) if near else [-child.pid]:  # negative: its process group
            with contextlib.suppress(ProcessLookupError):  # it may just have ended
                os.kill(pid, sent)
    if near:  # and what srun started, on all nodes
        subprocess.run(["scancel", "--signal=USR1", this_task()])


def this_task():
    """ARRAY_TASK, never SLURM_JOB_ID: that of an array's last task stands for the whole array."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def run_here(runs, jobs):
    """These runs on this machine, `jobs` at a time."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup
            signal.signal(signum, stop)
    threads, failed = max(1, len(os.sched_getaffinity(0)) // jobs), 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), unit="run", smoothing=0) as bar:
        futures = {pool.submit(execute, run["folder"], run["command"], {}, threads): run for run in runs}
        for future in concurrent.futures.as_completed(futures):
            code, run = future.result(), futures[future]
            if code is None and not STOPPED:
                bar.write(f"{run['name']}: runs already")
            if code and not STOPPED:
                bar.write(f"{run['name']}: exit code {code}, see {run['folder']}/log.txt")
            failed += bool(code)
            bar.update()
    raise SystemExit(130 if STOPPED else failed > 0)


def task(folder):
    """One task of the SLURM array: run what job.json in its folder says; save and queue again before the time limit."""
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, stop)
    job = rows.load_json(ROOT / folder / "job.json")
    code = execute(folder, job["command"], {
        "job": job["job"], "slurm_log": job["slurm_log"], "slurm_log_from": Path(job["slurm_log"]).stat().st_size,
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0))})
    if code != 0 and (signal.SIGUSR1 in STOPPED or code == SAVED and not STOPPED):
        subprocess.run(["scontrol", "requeue", this_task()], check=True)
    if code is None:
        rows.fail(f"{folder}: did not start, as it runs already or was stopped")
    raise SystemExit(code if code >= 0 else 128 - code)


def submit(args, runs):
    """These runs as one job array, held until every folder's job.json names its task."""
    try:
        more = shlex.split(args.sbatch)
    except ValueError as error:
        rows.fail(f"--sbatch={args.sbatch}: {error}")
    slurm = Path(os.path.commonpath([(ROOT / run["folder"]).parent for run in runs])) / "slurm"
    slurm.mkdir(parents=True, exist_ok=True)
    options = {
        "array": f"0-{len(runs) - 1}%{args.max_running}", "job-name": args.grid.rpartition(":")[2], "chdir": ROOT,
        "output": f"{slurm}/%A_%a.txt", "open-mode": "append", "signal": f"B:USR1@{args.save_time}",
        "nodes": args.nodes, "ntasks-per-node": 1, "gpus-per-node": args.gpus, "time": args.time,
        "account": args.account, "partition": args.partition}
    folders = "\n".join(shlex.quote(run["folder"]) for run in runs)
    script = (f"#!/bin/bash\nfolders=(\n{folders}\n)\nexec {shlex.quote(sys.executable)} "
              f"{shlex.quote(str(Path(__file__).resolve()))} task \"${{folders[$SLURM_ARRAY_TASK_ID]}}\"\n")
    done = subprocess.run(
        ["sbatch", "--parsable", "--hold", "--requeue", *(f"--{k}={v}" for k, v in options.items() if v),
         *more], text=True, capture_output=True, input=script)
    if done.returncode:
        rows.fail(f"sbatch refused the job: {done.stderr.strip()}")
    array = done.stdout.strip().partition(";")[0]
    for k, run in enumerate(runs):
        rows.write_json(ROOT / run["folder"] / "job.json", {
            "command": run["command"], "job": f"{array}_{k}", "slurm_log": f"{slurm}/{array}_{k}.txt"})
    subprocess.run(["scontrol", "release", array], check=True)
    print(f"job array {array}: {len(runs)} runs, at most {args.max_running} at a time")


# ---- what became of them ----

def squeue(jobs):
    """State of this user's jobs in SLURM's queue, {"ARRAY_TASK": "PENDING (reason)"}; {} if none was ever submitted."""
    if not any("job" in job for job in jobs):
        return {}
    if not shutil.which("squeue"):
        rows.fail("squeue: not found, and only it knows of the runs that were submitted; ask where SLURM is")
    done = subprocess.run(["squeue", "--me", "--array", "--noheader", "--format=%i|%T (%r)"], text=True,
                          capture_output=True)
    if done.returncode:
        rows.fail(f"squeue does not answer, so nobody knows what became of the jobs: {done.stderr.strip()}")
    return dict(line.split("|", 1) for line in done.stdout.splitlines())


def record(folder):
    """What job.json says of a run; {} where it never started."""
    path = ROOT / folder / "job.json"
    return rows.load_json(path) if path.exists() else {}


def state(run, job, queue, stalled):
    """(state, remark): done, failed, queued, running, stalled or never started."""
    folder, slurm = ROOT / run["folder"], queue.get(job.get("job"), "")
    log = folder / "log.txt"
    if not job:
        return "never started", ""
    if job.get("exit") == 0:
        return "done", ""
    if slurm.startswith("PENDING"):
        return "queued", slurm
    if slurm or log.exists() and not lock(open(log, "rb"), fcntl.LOCK_SH):
        files = [path for path in (log, folder / "metrics.jsonl") if path.exists()]
        silent = (time.time() - max([path.stat().st_mtime for path in files], default=time.time())) / 60
        remark = f"on {job['host']}, silent for {silent:.0f} min" if "host" in job else "starting"
        remark += f", restarted {job['restarts']} times" if job.get("restarts") else ""
        return "stalled" if silent > stalled else "running", remark
    return "failed", why(job, log)


def why(job, log):
    """The line that says why a run has failed: the scheduler's where the run was killed, or its own last error."""
    code = job.get("exit")
    killed = code in (None, SAVED) or code < 0 or code - 128 in set(signal.Signals)
    # SLURM's log holds nothing but what SLURM says, and Python if it could not even start sweep.py
    said = last_line(job.get("slurm_log"), r".*\S.*" if killed else r".*oom.kill.*", job.get("slurm_log_from", 0))
    if said:
        return said
    if code is None:
        return accounting(job.get("job")) or ("ended without a word: it, sweep.py or the machine was killed"
                                              if "started" in job else "cancelled before it started")
    if code == SAVED:
        return "stopped, with a checkpoint to continue from"
    if killed:
        name = signal.Signals(-code if code < 0 else code - 128).name
        return f"killed by {name}" + " (often: out of memory)" * (name == "SIGKILL")
    error = r"error: .*|[\w.]+(Error|Exception|Interrupt)\b(?<!ChildFailedError).*|.*\(exitcode: -\d+\).*"
    return (last_line(log, error, job["log_from"]) or last_line(log, r".*\S.*", job["log_from"])
            or f"exit code {code}, without a word")


def last_line(path, pattern, start=0):
    """The last line, from byte `start` on, whose beginning fits; without the prefixes of ranks and of slurmstepd."""
    if not path or not Path(path).exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 1_000_000))
        lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    lines = [re.sub(r"^(\[rank\d+\]: |slurmstepd[^:]*: )", "", line) for line in lines]
    return next((line for line in reversed(lines) if re.match(pattern, line)), None)


def accounting(job):
    """What sacct knows of a job, where SLURM keeps accounts."""
    if not job or not shutil.which("sacct"):
        return None
    done = subprocess.run(["sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode,Reason"], text=True,
                          capture_output=True)
    return f"sacct: {done.stdout.splitlines()[-1]}" if done.returncode == 0 and done.stdout.strip() else None


def main():
    args = arguments()
    if args.what == "task":
        task(args.grid)
    runs = load_grid(args.grid, args.only)
    if args.what in ("list", "status"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends them in silence
    if args.what == "list":
        for run in runs:
            print(f"{run['name']}  {run['command']}")
        return
    jobs = [record(run["folder"]) for run in runs]
    queue = squeue(jobs)
    states = [state(run, job, queue, args.stalled) for run, job in zip(runs, jobs)]
    if args.what == "status":
        width = max(len(run["name"]) for run in runs)
        for run, (name, remark) in zip(runs, states):
            print(f"{name:14}{run['name']:{width}}  {remark}".rstrip())
    print(", ".join(f"{n} {name}" for name, n in Counter(name for name, _ in states).items()))
    if args.what == "status":
        return
    wanted = ("failed",) if args.rerun else ("failed", "never started")
    todo = [run for run, (name, _) in zip(runs, states) if name in wanted]
    if todo and args.what == "submit":
        submit(args, todo)
    elif todo:
        run_here(todo, args.jobs)


if __name__ == "__main__":
    main()
