"""Run a sweep on this machine or as a SLURM job array, report the state of its runs, and repeat what failed.

A grid is a name in paper/grids.py (chat, scaling, code, sft, refs; mini, frontier, hard, stories, real, and
NAME_refs for each of these), or FILE.py:NAME, a function of your own that yields runs in the same way. Input:
the grid. Output, in the folder of each run: log.txt, what it printed; and job.json, its record: where it runs
or ran, and its exit code. `status` needs only these and squeue. A run that reaches SLURM's time limit saves,
is queued again, and continues.

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
import json
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

ROOT = Path(__file__).resolve().parent.parent
THIS_FILE = shlex.quote(str(Path(__file__).resolve()))
sys.path.insert(0, str(ROOT))
import rows  # noqa: E402

SAVED = 75  # the exit code of a stage that saved when it was told to stop
STALLED = 30  # minutes without output after which a run counts as stalled
SAVE_TIME = 300  # seconds before SLURM's time limit at which a run saves
REMIND = 5  # seconds after which a run that was told to save is told again
UNSAVED = 3  # how often in a row a run may reach the time limit without saving


def parse_arguments():
    parser = rows.Parser(__doc__)
    add = parser.add_argument
    add("what", choices=("list", "run", "submit", "status", "task"),
        help="task: for SLURM itself, with the folder of a run instead of a grid")
    add("grid", help="a name in paper/grids.py, or FILE.py:NAME")
    add("--only", default="*",
        help="runs whose name contains this or matches this pattern of * and ?; separate several with commas")
    add("--rerun", action="store_true", help="run, submit: only runs that failed, not those never started")
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
    if told_to_end() or not take_lock(log):
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
    if told_to_end():  # since the check above
        send(child, signal.SIGTERM)
    code = None
    while code is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(REMIND)
        if code is None and RECEIVED and not told_to_end():
            stop(signal.SIGUSR1, None)  # a stage that has started since has not heard of it
    RUNNING.discard(child)
    rows.write_json(folder / "job.json", job | {"exit": code, "ended": time.time()})
    return code


def told_to_end():
    """Whether a signal came that means more than "save, and then stop"."""
    return bool(RECEIVED - {signal.SIGUSR1})


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
    bar = rows.progress(total=len(runs), desc="runs", unit="run", smoothing=0)
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

OWN = "--array", "--test-only", "--wait", "--wrap"  # flags without which submit() is not what it is
SHORT = {"-a": "--array", "-W": "--wait"}
SCRIPT = """#!/bin/bash
# A signal to save that comes before task() can handle it waits, or is lost where `env` cannot block it.
trap '' USR1
folders=({folders})
block=$(env --block-signal=USR1 echo env --block-signal=USR1 2> /dev/null)
exec $block {python} {this_file} task "${{folders[$SLURM_ARRAY_TASK_ID]}}"
"""


def sbatch_flags(text):
    """The words of --sbatch."""
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        rows.fail(f"--sbatch={text}: {error}")
    for word in words:
        flag = SHORT.get(word[:2], word.partition("=")[0])
        if len(flag) > 2 and any(own.startswith(flag) for own in OWN):  # sbatch takes short forms, too
            rows.fail(f"--sbatch: {word} cannot be set; every run is a task of one array. Omit it")
    return words


def submit(args, runs, records):
    """Submit these runs as one job array, held until the job.json of every run names its task. records: what
    was in job.json when they were chosen. A run whose record differs now has been started by somebody else.
    """
    more = sbatch_flags(args.sbatch)
    if not shutil.which("sbatch"):
        rows.fail("sbatch: not found; submit on a machine with SLURM, or use `run`")
    logs = Path(os.path.commonpath([(ROOT / run["folder"]).parent for run in runs])) / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    pattern = str(logs).replace("%", "%%")
    flags = [
        "--parsable", "--hold", "--requeue", "--open-mode=append", "--nodes=1", "--ntasks-per-node=1",
        f"--array=0-{len(runs) - 1}%{args.max_running}",
        f"--job-name={args.grid.rpartition(':')[2]}",
        f"--chdir={ROOT}",
        f"--output={pattern}/%A_%a.txt",
        f"--signal=B:USR1@{SAVE_TIME}",
        *more,  # the last value of a flag holds
    ]
    folders = " ".join(shlex.quote(run["folder"]) for run in runs)
    script = SCRIPT.format(folders=folders, python=shlex.quote(sys.executable), this_file=THIS_FILE)
    done = subprocess.run(["sbatch", *flags], text=True, capture_output=True, input=script)
    if done.returncode:
        rows.fail(f"sbatch refused the job: {done.stderr.strip()}")
    array = re.findall(r"^(\d+)(?:;.*)?$", done.stdout, re.MULTILINE)[-1]  # sites print other lines, too
    for k, (run, record) in enumerate(zip(runs, records)):
        if read_job(run["folder"]) == record:
            job = {"command": run["command"], "job": f"{array}_{k}", "slurm_log": f"{logs}/{array}_{k}.txt"}
            rows.write_json(ROOT / run["folder"] / "job.json", job)
    warn_of_short_limits(array, flags)
    error = slurm("scontrol", "release", array)[1]
    if error:
        rows.fail(f"job array {array} waits, as it could not be released ({error}); scontrol release {array}")
    print(f"job array {array}: {len(runs)} runs, at most {args.max_running} at a time")


def warn_of_short_limits(array, flags):
    """Say so where runs would spend most of their time after the signal to save."""
    seconds = int(re.findall(r"@(\d+)|$", [flag for flag in flags if "--signal" in flag][-1])[0] or SAVE_TIME)
    limit, _ = slurm("squeue", "--noheader", f"--jobs={array}", "--format=%l")  # 1-12:00:00, or UNLIMITED
    numbers = re.findall(r"\d+", limit.partition("\n")[0])
    limit = sum(int(n) * unit for n, unit in zip(reversed(numbers), (1, 60, 3600, 86400)))
    if 0 < limit < 2 * seconds:
        print(f"warning: runs have {limit} s, and save {seconds} s before the end: most of their time is "
              "lost. Give more --time, or --signal=B:USR1@SECONDS", file=sys.stderr)


def slurm(*command):
    """What a command of SLURM's prints, and its error, or ""."""
    if not shutil.which(command[0]):
        return "", f"{command[0]}: not found"
    done = subprocess.run(command, text=True, capture_output=True)
    return done.stdout, done.returncode and (done.stderr.strip() or f"exit code {done.returncode}") or ""


def this_task():
    """ARRAY_TASK; never SLURM_JOB_ID, which for the last task of an array stands for the whole array."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def task(folder):
    """One task of the array: run the command in FOLDER/job.json; queue it again if time runs out."""
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    record = read_job(folder)
    if record.get("job") != this_task() or record.get("exit") == 0:
        print(f"{folder}: nothing to do; it has ended well, or another job was submitted for it")
        return
    slurm_log = os.readlink("/proc/self/fd/2")  # where SLURM's messages go, whatever sbatch was told
    job = {
        "job": record["job"],
        "slurm_log": slurm_log,
        "slurm_log_from": os.stat(2).st_size,
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "unsaved": record.get("unsaved", 0),
    }
    code = execute(folder, record["command"], job)
    if code is None:
        rows.fail(f"{folder}: did not start: it is already running, or was stopped")
    if code != 0 and signal.SIGUSR1 in RECEIVED or code == SAVED and not RECEIVED:
        queue_again(folder)
    sys.exit(code if code >= 0 else 128 - code)


def queue_again(folder):
    """Queue this task again after it saved, or died at its time limit; but not if it never saves."""
    record = read_job(folder)
    record["unsaved"] = 0 if saved(folder, record) else record["unsaved"] + 1
    record["requeued"] = record["unsaved"] < UNSAVED
    rows.write_json(ROOT / folder / "job.json", record)
    error = record["requeued"] and slurm("scontrol", "requeue", this_task())[1]
    if error:
        rows.write_json(ROOT / folder / "job.json", record | {"requeued": False})
        print(f"error: could not be queued again ({error}); submit it again", flush=True)


def squeue(needed):
    """This user's tasks in SLURM's queue: {"ARRAY_TASK": "PENDING (reason)"}. needed: some run is one."""
    printed, error = slurm("squeue", "--me", "--array", "--noheader", "--format=%i|%T (%r)")
    if error and needed:
        rows.fail(f"squeue failed, so the state of the jobs is unknown ({error}); ask where SLURM answers")
    return dict(re.findall(r"^(\d+_\d+)\|(.+)$", printed, re.MULTILINE))


def sacct(jobs):
    """What SLURM's accounting says about these jobs, where there is one: {"ARRAY_TASK": text}."""
    if not jobs:
        return {}
    printed, _ = slurm("sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", "JobID,State,ExitCode,Reason")
    return {job: f"sacct: {text}" for job, text in re.findall(r"^(\w+)\|(.+)$", printed, re.MULTILINE)}


def tasks_by_folder(array):
    """The tasks of an array in the queue that this file submitted, by the folders in its script."""
    script, _ = slurm("scontrol", "write", "batch_script", array, "-")
    folders = re.search(r"^folders=\((.*)\)$", script, re.MULTILINE)
    if not folders or THIS_FILE not in script:
        return {}
    return {folder: f"{array}_{k}" for k, folder in enumerate(shlex.split(folders.group(1)))}


# ---- the state of a run ----

def read_job(folder):
    """A run's record, job.json; {} if it never started."""
    try:
        return json.loads((ROOT / folder / "job.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError:  # a disk error left a part of it
        return {"torn": True}


def read_states(runs):
    """(record, state, remark) of every run. SLURM is asked before the records are read, so that what ends
    meanwhile has its exit code there.
    """
    folders = [run["folder"] for run in runs]
    asked, jobs = None, {read_job(folder).get("job") for folder in folders}
    while asked is None or not jobs <= asked:  # again, if some were submitted meanwhile
        asked = jobs
        queue = squeue(needed=asked != {None})
        records = {folder: read_job(folder) for folder in folders}
        jobs = {record.get("job") for record in records.values()}
    records |= find_lost([f for f in folders if "command" not in records[f]], set(queue) - jobs)
    states = {f: state(f, record, queue.get(record.get("job"), "")) for f, record in records.items()}
    failed = {folder: read_job(folder) for folder in folders if states[folder][0] == "failed"}
    unclear = [r["job"] for r in failed.values() if "job" in r and ("exit" not in r or r.get("requeued"))]
    accounts = sacct(unclear)
    for folder, record in failed.items():
        states[folder] = "failed", why(ROOT / folder, record, accounts.get(record.get("job")))
    for run in runs:
        folder = run["folder"]
        if states[folder][0] == "done" and records[folder].get("command") not in (None, run["command"]):
            states[folder] = "done", CHANGED
    return [(failed.get(f, records[f]), *states[f]) for f in folders]


CHANGED = "by another command than the grid has now; delete the folder to run it again"


def find_lost(folders, tasks):
    """{folder: record} of those runs without a record that are running: somebody deleted their folders.
    tasks: those in the queue that no record names.
    """
    by_folder = {}
    for array in {task.partition("_")[0] for task in tasks} if folders else ():
        by_folder |= tasks_by_folder(array)
    outputs, lost = set(), {}
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            outputs.add(os.readlink(link))
    for folder in folders:
        log = ROOT / folder / "log.txt"
        if by_folder.get(folder) in tasks:
            lost[folder] = {"lost": f"scancel {by_folder[folder]}"}
        elif f"{log} (deleted)" in outputs or is_held(log):
            lost[folder] = {"lost": "stop it"}
    return lost


def state(folder, record, queued):
    """done, failed, queued, running, stalled or never started; and a remark. queued: squeue's word, or ""."""
    log = ROOT / folder / "log.txt"
    if not record:
        return "never started", ""
    if "lost" in record:
        return "running", f"without a record, as its folder was deleted; {record['lost']}"
    if record.get("exit") == 0:
        return "done", ""
    if queued.startswith("PENDING"):
        return "queued", queued
    if queued or is_held(log):
        written = [path.stat().st_mtime for path in (log, log.with_name("metrics.jsonl")) if path.exists()]
        minutes = (time.time() - max(written, default=time.time())) / 60
        remark = f"on {record['host']}, no output for {minutes:.0f} min" if "host" in record else "starting"
        if record.get("restarts"):
            remark += f", restarted {record['restarts']} times"
        return "stalled" if minutes > STALLED else "running", remark
    now = read_job(folder)  # once more: a run lets go of its log when its exit code is in its record
    return ("failed", "") if now == record else state(folder, now, queued)


def is_held(log):
    """Whether a process of a run is alive, which holds a lock on its log."""
    if not log.exists():
        return False
    with open(log, "rb") as file:
        return not is_free(file, fcntl.LOCK_SH)


ERROR = r"error: .*|[\w.]+(Error|Exception|Interrupt)\b(?<!ChildFailedError).*|.*\(exitcode: -\d+\).*"
WORKER_SAVED = rf".*\(exitcode: {SAVED}\).*"  # torchrun, of a rank


def why(folder, record, account=None):
    """Why a run failed, in a line: SLURM's, if it killed the run, or the run's own last error. account: what
    SLURM's accounting says, if it was asked.
    """
    log, start, code = folder / "log.txt", record.get("log_from", 0), record.get("exit")
    left = "with a checkpoint to continue from" if list(folder.glob("resume/step_*")) else (
        "before its first checkpoint")
    if "torn" in record:
        return "its job.json is not complete, so how it ended is unknown"
    if record.get("requeued"):
        return account or f"cancelled in the queue, {left}"
    if record.get("unsaved", 0) >= UNSAVED:
        return f"reached its time limit {UNSAVED} times without saving; give it more time"
    killed = code is not None and (code < 0 or code - 128 in set(signal.Signals))
    # SLURM's log has only what SLURM says, and Python, if it could not even start this file
    pattern = r".*\S.*" if killed or code in (None, SAVED) else r".*oom.kill.*"
    message = last_line(record.get("slurm_log"), pattern, record.get("slurm_log_from", 0))
    if message:
        return message
    if code is None:
        return account or ended_in_silence(folder, record)
    if saved(folder, record):
        return f"stopped, {left}"
    if killed:
        name = signal.Signals(abs(code) % 128).name
        return f"killed by {name}" + " (often: out of memory)" * (name == "SIGKILL")
    said = last_line(log, r".*\S.*", start)
    return last_line(log, ERROR, start) or f"exit code {code}, {f'after {said!r}' if said else 'no message'}"


def ended_in_silence(folder, record):
    full = last_line(folder / "log.txt", r".*No space left on device.*", record.get("log_from", 0))
    if "started" not in record:
        return "cancelled before it started"
    if full or shutil.disk_usage(folder).free == 0:
        return full or "ended without a message; its disk is full"
    return "ended without a message: it, sweep.py or the machine was killed"


def saved(folder, record):
    """Whether a run ended because it was told to save and stop; under torchrun with torchrun's own code."""
    code, log = record.get("exit"), ROOT / folder / "log.txt"
    return code == SAVED or code == 1 and bool(last_line(log, WORKER_SAVED, record.get("log_from", 0)))


def last_line(path, pattern, start=0):
    """The last line from byte `start` on that matches, without the prefixes of ranks and of slurmstepd."""
    if not path or not Path(path).exists():
        return None
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start if start <= size else 0, size - 1_000_000))
        lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    for line in reversed(lines):
        line = re.sub(r"^(\[rank\d+\]: |slurmstepd[^:]*: )", "", line)
        if re.match(pattern, line):
            return line
    return None


def main():
    args = parse_arguments()
    if args.what == "task":
        return task(args.grid)
    runs = load_grid(args.grid, args.only)
    if args.what in ("list", "status"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends them silently
    if args.what == "list":
        for run in runs:
            print(f"{run['name']}  {run['command']}")
        return
    states = read_states(runs)
    if args.what == "status":
        width = max(len(run["name"]) for run in runs)
        for run, (_, name, remark) in zip(runs, states):
            print(f"{name:14}{run['name']:{width}}  {remark}".rstrip())
    counts = Counter(name for _, name, _ in states)
    print(", ".join(f"{n} {name}" for name, n in counts.items()))
    changed = sum(remark == CHANGED for _, _, remark in states)
    if changed and args.what != "status":
        print(f"of these, {changed} done {CHANGED}")
    wanted = ["failed"] if args.rerun else ["failed", "never started"]
    todo = [(run, record) for run, (record, name, _) in zip(runs, states) if name in wanted]
    if todo and args.what == "run":
        run_here(args, [run for run, _ in todo])
    elif todo and args.what == "submit":
        submit(args, *zip(*todo))


if __name__ == "__main__":
    main()
