"""Run a sweep on this machine or as a SLURM job array, report the state of its runs, and repeat what failed.

A grid is a name in paper/grids.py (chat, scaling, code, sft, refs; mini, mini_refs; frontier, frontier_refs;
stories, stories_refs), or FILE.py:NAME, a function of your own that yields runs in the same way. Input: the
grid. Output, in the folder of each run: log.txt, what it printed; and job.json, where it runs or ran, and its
exit code. `status` needs only these and squeue. A run that reaches SLURM's time limit saves, is queued again,
and continues.

    python paper/sweep.py list mini --only='qrpo*seed0'
    python paper/sweep.py run mini --jobs=2
    python paper/sweep.py submit chat --sbatch='--gpus-per-node=8 --time=12:00:00 --account=mine'
    python paper/sweep.py status chat
"""
import concurrent.futures
import contextlib
import fcntl
import fnmatch
import inspect
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rows  # noqa: E402

SAVED = 75  # the exit code of a stage that saved when it was told to stop
STALLED = 30  # minutes without output after which a run counts as stalled
SAVE_TIME = 300  # seconds before SLURM's time limit at which a run saves


def parse_arguments():
    parser = rows.Parser(__doc__)
    add = parser.add_argument
    add("what", choices=("list", "run", "submit", "status", "task"),
        help="task: for SLURM itself, with the folder of a run instead of a grid")
    add("grid", help="a name in paper/grids.py, or FILE.py:NAME")
    add("--only", default="*",
        help="runs whose name contains this or matches this pattern of * and ?; separate several with commas")
    add("--rerun", action="store_true", help="run, submit: only what failed, and not what never started")
    add("--jobs", type=int, default=1, help="run: how many at a time; they share the cores")
    add("--max_running", type=int, default=8, help="submit: how many at a time")
    add("--sbatch", help="submit: flags for sbatch, such as '--gpus-per-node=8 --time=12:00:00'; a run that "
        "takes longer continues in its next job")
    args = parser.parse_args()
    if args.jobs < 1:
        rows.fail("--jobs must be at least 1")
    return args


def load_grid(name, only="*"):
    """The runs of a grid that --only names, in its order."""
    path, _, function = name.rpartition(":")
    path = Path(path or ROOT / "paper/grids.py")
    if not path.is_file():
        rows.fail(f"{path}: no such file; a grid is a name in paper/grids.py, or FILE.py:NAME")
    grids = {}
    for key, value in runpy.run_path(path, run_name="grids").items():
        defined_here = inspect.isfunction(value) and value.__module__ == "grids"
        if defined_here and not inspect.signature(value).parameters:
            grids[key] = value
    if function not in grids:
        rows.fail(f"{path}: defines no grid {function!r}, a function without arguments; it has "
                  f"{', '.join(grids)}")
    runs = list(grids[function]())
    for key in "name", "folder":
        for value, count in Counter(run.get(key) for run in runs).items():
            if count > 1 or not value:
                rows.fail(f"{path}: {count} runs of {function} have the {key} {value!r}; each needs its own")
    patterns = [pattern.strip() for pattern in only.split(",") if pattern.strip()]
    found = [run for run in runs if matches(run["name"], patterns)]
    if not found:
        rows.fail(f"--only={only}: matches none of the grid's {len(runs)} runs; see sweep.py list {name}")
    return found


def matches(name, patterns):
    return any(pattern in name or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# ---- one run ----

RUNNING = set()   # the processes that this one has started
RECEIVED = set()  # the signals that it got


def execute(folder, command, job, threads=None):
    """Run a command and return its exit code; None if it is already running, or the sweep was stopped.

    Its output is appended to FOLDER/log.txt. Every process of the run holds a lock on that file, so the lock
    tells whether one of them is still alive. job: more entries for job.json.
    """
    folder = ROOT / folder
    with rows.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "log.txt", "ab")
    if RECEIVED or not take_lock(log):
        return None
    if "job" not in job and read_job(folder).get("exit") == 0:
        return 0  # another sweep.py has just run it
    job = job | {"command": command, "host": socket.gethostname(), "started": time.time(),
                 "log_from": log.tell()}
    rows.write_json(folder / "job.json", job)
    env = {"PYTHON": sys.executable, "TQDM_MININTERVAL": "10", **os.environ}
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    # SIGUSR1 means "save and stop". All processes of the run ignore it except train.py, which sets its own
    # handler. At a SIGTERM the shell waits for its current command, which may be saving, and then exits.
    traps = "trap '' USR1; trap 'exit $(($? ? $? : 143))' TERM"
    child = subprocess.Popen(
        ["bash", "-c", f"{traps}\n{command}"], cwd=ROOT, env=env, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    RUNNING.add(child)
    if RECEIVED:  # since the check above
        send(child, signal.SIGTERM)
    code = child.wait()
    RUNNING.discard(child)
    rows.write_json(folder / "job.json", job | {"exit": code, "ended": time.time()})
    return code


def take_lock(log):
    """Lock a log for a run; False if a run holds it. `status` holds it for an instant, so try twice."""
    if is_free(log, fcntl.LOCK_EX):
        return True
    time.sleep(1)
    return is_free(log, fcntl.LOCK_EX)


def is_free(log, kind):
    """Whether a lock could be had, which the file then has until it is closed."""
    try:
        fcntl.flock(log, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def stop(signum, frame):
    """SIGUSR1, the time limit is near: training must save. SIGTERM, SIGINT: end the runs, which save first;
    after a SIGUSR1 the time is up, so kill what has not saved.
    """
    if signum == signal.SIGUSR1:
        sent = signal.SIGUSR1
    elif signal.SIGUSR1 in RECEIVED:
        sent = signal.SIGKILL
    else:
        sent = signal.SIGTERM
    RECEIVED.add(signum)
    for child in list(RUNNING):
        send(child, sent)
    if signum == signal.SIGUSR1:  # also to what srun has started on other nodes
        subprocess.run(["scancel", "--signal=USR1", this_task()])


def send(child, signum):
    """Signal the processes of a run: the shell that this process started, and its descendants."""
    parents, groups, commands, children = {}, {}, {}, {}
    for line in subprocess.check_output(["ps", "-e", "-o", "pid=,ppid=,pgid=,args="], text=True).splitlines():
        pid, parent, group, *command = line.split(maxsplit=3)
        parents[pid], groups[pid], commands[pid] = parent, group, " ".join(command)
        children.setdefault(parent, []).append(pid)
    run = str(child.pid)
    family = [run]
    for pid in family:
        family += children.get(pid, [])
    torchrun = [pid for pid in family if pid != run and "torch.distributed.run" in commands[pid]]
    for pid in family:
        if signum == signal.SIGTERM:
            # torchrun kills its workers 30 seconds after a SIGTERM, perhaps before they have saved. It ends
            # when they do, so only they are told. Processes in other sessions, such as the sandbox's, end
            # with those that started them.
            worker = parents.get(pid) in torchrun
            if pid in torchrun and pid in children or groups.get(pid) != run and not worker:
                continue
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(int(pid), signum)


# ---- on this machine ----

def run_here(args, runs):
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signum, stop)
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    failed = False
    bar = tqdm(total=len(runs), unit="run", smoothing=0)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool, bar:
        futures = {pool.submit(execute, run["folder"], run["command"], {}, threads): run for run in runs}
        for future in concurrent.futures.as_completed(futures):
            code = future.result()
            run = futures[future]
            if code is None and not RECEIVED:
                bar.write(f"{run['name']}: is already running")
            elif code and not RECEIVED:
                bar.write(f"{run['name']}: exit code {code}, see {run['folder']}/log.txt")
                failed = True
            bar.update()
    sys.exit(130 if RECEIVED else failed)


# ---- on SLURM ----

def submit(args, runs):
    """Submit these runs as one job array, held until the job.json of every run names its task."""
    if not shutil.which("sbatch"):
        rows.fail("sbatch: not found; submit on a machine with SLURM, or use `run`")
    try:
        more = shlex.split(args.sbatch or "")
    except ValueError as error:
        rows.fail(f"--sbatch={args.sbatch}: {error}")
    logs = Path(os.path.commonpath([(ROOT / run["folder"]).parent for run in runs])) / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    flags = [
        "--parsable", "--hold", "--requeue", "--open-mode=append", "--nodes=1", "--ntasks-per-node=1",
        f"--array=0-{len(runs) - 1}%{args.max_running}",
        f"--job-name={args.grid.rpartition(':')[2]}",
        f"--chdir={ROOT}",
        f"--output={logs}/%A_%a.txt",
        f"--signal=B:USR1@{SAVE_TIME}",
        *more,  # the last value of a flag holds
    ]
    python = shlex.quote(sys.executable)
    script = f"""#!/bin/bash
folders=({" ".join(shlex.quote(run["folder"]) for run in runs)})
exec {python} {shlex.quote(str(Path(__file__).resolve()))} task "${{folders[$SLURM_ARRAY_TASK_ID]}}"
"""
    done = subprocess.run(["sbatch", *flags], text=True, capture_output=True, input=script)
    if done.returncode:
        rows.fail(f"sbatch refused the job: {done.stderr.strip()}")
    array = done.stdout.strip().partition(";")[0]
    for k, run in enumerate(runs):
        job = {"command": run["command"], "job": f"{array}_{k}", "slurm_log": f"{logs}/{array}_{k}.txt"}
        rows.write_json(ROOT / run["folder"] / "job.json", job)
    subprocess.run(["scontrol", "release", array], check=True)
    print(f"job array {array}: {len(runs)} runs, at most {args.max_running} at a time")


def this_task():
    """ARRAY_TASK; never SLURM_JOB_ID, which for the last task of an array stands for the whole array."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def task(folder):
    """One task of the array: run the command in FOLDER/job.json; queue it again if time runs out."""
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, stop)
    submitted = read_job(folder)
    job = {
        "job": submitted["job"],
        "slurm_log": submitted["slurm_log"],
        "slurm_log_from": Path(submitted["slurm_log"]).stat().st_size,
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }
    code = execute(folder, submitted["command"], job)
    if code is None:
        rows.fail(f"{folder}: did not start: it is already running, or was stopped")
    # under torchrun a run that saved ends with torchrun's own code
    if code != 0 and signal.SIGUSR1 in RECEIVED or code == SAVED and not RECEIVED:
        subprocess.run(["scontrol", "requeue", this_task()], check=True)
    sys.exit(code if code >= 0 else 128 - code)


def squeue():
    """This user's jobs in SLURM's queue: {"ARRAY_TASK": "PENDING (reason)"}."""
    if not shutil.which("squeue"):
        rows.fail("squeue: not found, but some runs were submitted to SLURM; ask on a machine with SLURM")
    done = subprocess.run(["squeue", "--me", "--array", "--noheader", "--format=%i|%T (%r)"], text=True,
                          capture_output=True)
    if done.returncode:
        rows.fail(f"squeue failed, so the state of the jobs is unknown: {done.stderr.strip()}")
    return dict(line.split("|", 1) for line in done.stdout.splitlines())


def sacct(job):
    """What SLURM's accounting says about a job, where there is one."""
    if not job or not shutil.which("sacct"):
        return None
    done = subprocess.run(["sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode,Reason"], text=True,
                          capture_output=True)
    if done.returncode or not done.stdout.strip():
        return None
    return f"sacct: {done.stdout.splitlines()[-1]}"


# ---- the state of a run ----

def read_job(folder):
    """A run's job.json; {} if it never started."""
    path = ROOT / folder / "job.json"
    return rows.load_json(path) if path.exists() else {}


def state(folder, job, queued):
    """(done, failed, queued, running, stalled or never started; remark). queued: what squeue says, or ""."""
    folder = ROOT / folder
    log = folder / "log.txt"
    if not job:
        return "never started", ""
    if job.get("exit") == 0:
        return "done", ""
    if queued.startswith("PENDING"):
        return "queued", queued
    if queued or log.exists() and not is_free(open(log, "rb"), fcntl.LOCK_SH):
        written = [path.stat().st_mtime for path in (log, folder / "metrics.jsonl") if path.exists()]
        minutes = (time.time() - max(written, default=time.time())) / 60
        remark = f"on {job['host']}, no output for {minutes:.0f} min" if "host" in job else "starting"
        if job.get("restarts"):
            remark += f", restarted {job['restarts']} times"
        return "stalled" if minutes > STALLED else "running", remark
    return "failed", why(folder, job)


ERROR = r"error: .*|[\w.]+(Error|Exception|Interrupt)\b(?<!ChildFailedError).*|.*\(exitcode: -\d+\).*"
WORKER_SAVED = rf".*\(exitcode: {SAVED}\).*"  # torchrun, of a rank


def why(folder, job):
    """The line that says why a run failed: SLURM's, if it killed the run, or the run's own last error."""
    code = job.get("exit")
    log, start = folder / "log.txt", job.get("log_from", 0)
    killed = code is not None and (code < 0 or code - 128 in set(signal.Signals))
    # SLURM's log has only what SLURM says, and Python, if it could not even start sweep.py
    pattern = r".*\S.*" if killed or code in (None, SAVED) else r".*oom.kill.*"
    message = last_line(job.get("slurm_log"), pattern, job.get("slurm_log_from", 0))
    if message:
        return message
    if code is None:
        return sacct(job.get("job")) or (
            "ended without a message: it, sweep.py or the machine was killed" if "started" in job
            else "cancelled before it started")
    if code == SAVED or code == 1 and last_line(log, WORKER_SAVED, start):
        if list(folder.glob("resume/step_*")):
            return "stopped, with a checkpoint to continue from"
        return "stopped, before its first checkpoint"
    if killed:
        name = signal.Signals(abs(code) % 128).name
        return f"killed by {name}" + " (often: out of memory)" * (name == "SIGKILL")
    return last_line(log, ERROR, start) or last_line(log, r".*\S.*", start) or f"exit code {code}, no message"


def last_line(path, pattern, start=0):
    """The last line from byte `start` on that matches, without the prefixes of ranks and of slurmstepd."""
    if not path or not Path(path).exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 1_000_000))
        lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    for line in reversed(lines):
        line = re.sub(r"^(\[rank\d+\]: |slurmstepd[^:]*: )", "", line)
        if re.match(pattern, line):
            return line
    return None


def main():
    args = parse_arguments()
    if args.what == "task":
        task(args.grid)
    runs = load_grid(args.grid, args.only)
    if args.what in ("list", "status"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends them silently
    if args.what == "list":
        for run in runs:
            print(f"{run['name']}  {run['command']}")
        return
    jobs = [read_job(run["folder"]) for run in runs]
    queue = squeue() if any("job" in job for job in jobs) else {}
    states = [state(run["folder"], job, queue.get(job.get("job"), "")) for run, job in zip(runs, jobs)]
    if args.what == "status":
        width = max(len(run["name"]) for run in runs)
        for run, (name, remark) in zip(runs, states):
            print(f"{name:14}{run['name']:{width}}  {remark}".rstrip())
    counts = Counter(name for name, _ in states)
    print(", ".join(f"{n} {name}" for name, n in counts.items()))
    wanted = ["failed"] if args.rerun else ["failed", "never started"]
    todo = [run for run, (name, _) in zip(runs, states) if name in wanted]
    if todo and args.what == "run":
        run_here(args, todo)
    elif todo and args.what == "submit":
        submit(args, todo)


if __name__ == "__main__":
    main()
