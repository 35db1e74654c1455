"""paper/sweep.py: the grids' counts and flags, a sweep on this machine, and one on a real SLURM cluster of
one node, with a failure, a cancellation, a time limit, and a node that goes down.
"""
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest

from conftest import ROOT, read_rows, write_rows

sys.path.insert(0, str(ROOT / "paper"))
import grids  # noqa: E402
import sweep as sweep_module  # noqa: E402


TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone"


def sweep(*args, env=None, code=0):
    """Run sweep.py as a user does -> what it printed."""
    if args[0] in ("run", "task"):  # these wait for processes and signals
        done = subprocess.run([sys.executable, str(ROOT / "paper" / "sweep.py"), *map(str, args)],
                              capture_output=True, text=True, timeout=120, env=os.environ | (env or {}))
        found, printed = done.returncode, done.stdout + done.stderr
    else:
        found, printed = in_this_process(args, env or {})
    assert found == code, printed
    return printed


def in_this_process(args, env):
    """(exit code, what it printed) of sweep.py without a new Python."""
    printed, handler = io.StringIO(), signal.getsignal(signal.SIGPIPE)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), mock.patch.multiple(
                sys, argv=["sweep.py", *map(str, args)]), mock.patch.dict(os.environ, env):
            sweep_module.main()
        return 0, printed.getvalue()
    except SystemExit as end:
        return end.code or 0, printed.getvalue()
    finally:
        signal.signal(signal.SIGPIPE, handler)


def states(grid, **kwargs):
    """{name: (state, remark)} as `status` prints them."""
    found = {}
    for line in sweep("status", grid, **kwargs).splitlines()[:-1]:  # the last line counts the states
        name, *remark = line[14:].split()
        found[name] = line[:14].strip(), " ".join(remark)
    return found


def write_grid(tmp_path, commands):
    """A grid file with these commands by name; their folders are tmp_path/out/NAME. Returns what names it."""
    runs = [{"name": n, "folder": str(tmp_path / "out" / n), "command": c} for n, c in commands.items()]
    (tmp_path / "grid.py").write_text(f"def mine():\n    return {runs!r}\n")
    return f"{tmp_path / 'grid.py'}:mine"


# ---- the grids ----

GRIDS = (grids.chat, grids.scaling, grids.code, grids.sft, grids.refs, grids.mini, grids.mini_refs,
         grids.stories, grids.stories_refs)


@pytest.mark.parametrize(("name", "count"), (("chat", 972), ("scaling", 90), ("code", 72), ("sft", 10)))
def test_grids_have_as_many_runs_as_in_the_paper(name, count):
    assert len({line.split()[0] for line in sweep("list", name).splitlines()}) == count


def test_equal_names_mean_equal_runs():
    named = {}
    for grid in GRIDS:
        for run in grid():
            assert named.setdefault(run["name"], run) == run
    assert len({run["command"] for run in named.values()}) == len(named)
    for name in ("llama-magpie-sft-offpolicy2best-qrpo-n3-beta1e-3-lr3e-7", "llama-leetcode-sft",
                 "mistral-magpie-sft-refs",
                 "qrpo-exact-refs-n3-beta0.1-lr3e-4-seed2", "simpo-beta10-lr1e-4-seed0"):
        assert name in named  # names are folders on disk: they stay


def test_train_accepts_the_flags_of_every_run(monkeypatch):
    """train.py down to the line where it starts to work, with the flags of every run that trains."""
    monkeypatch.setenv("RANK", "0")  # as under torchrun: some are sharded
    settings, mark, _ = (ROOT / "train.py").read_text().partition("# set-up:")
    assert mark
    code = compile(settings, "train.py", "exec")
    for run in itertools.chain(*[grid() for grid in (*GRIDS, grids.frontier, grids.hard, grids.real)]):
        words = shlex.split(run["command"])
        if "train" in words:
            flags = words[words.index("train") + 1:]
            monkeypatch.setattr(sys, "argv", ["train.py", "--model=m", "--data=d", "--out=o", *flags])
            variables = {"__file__": str(ROOT / "train.py"), "__name__": "train"}
            exec(code, variables)
            assert variables["args"].batch_size * variables["size"] in (32, 64, 128, 256)


def test_only_selects_runs():
    assert len(sweep("list", "mini", "--only=sft-correct-lr1e-4").splitlines()) == 3
    assert len(sweep("list", "mini", "--only=sft*seed1").splitlines()) == 3
    assert len(sweep("list", "mini", "--only=sft*seed1,sft*lr1e-4*").splitlines()) == 5
    assert len(sweep("list", "mini", "--only=sft*seed1, ,").splitlines()) == 3
    assert "none of the grid's 342 runs" in sweep("list", "mini", "--only=nothing", code=2)
    for name in "maxi", "run", "product":  # no such name; a function with arguments; not defined there
        assert f"no grid {name!r}, a function without arguments; it has chat, " in sweep("list", name, code=2)


def test_a_grid_whose_runs_share_a_folder_is_refused(tmp_path):
    (tmp_path / "grid.py").write_text(
        "def two():\n    for name in 'ab':\n        yield {'name': name, 'folder': 'one'}\n")
    assert "2 runs of two have the folder 'one'" in sweep("list", f"{tmp_path}/grid.py:two", code=2)


# ---- this machine ----

def test_a_sweep_on_this_machine_says_how_each_run_ended(tmp_path):
    python = f"{sys.executable} -c"
    (tmp_path / "rank.py").write_text(
        "import os\nif os.environ['RANK'] == '1': raise IndexError('of rank 1')\n")
    grid = write_grid(tmp_path, {
        "good": "echo $OMP_NUM_THREADS", "crashes": f"{python} 'import no_such_module'",
        "refuses": f"{python} 'import rows; rows.fail(\"lower it\")'",
        "killed": f"{python} 'import os; os.kill(os.getpid(), 9)'; exit $?", "odd": "exit 255",
        "real_time": "exit 163",
        "ranks": f"{TORCHRUN} --nproc_per_node=2 {tmp_path}/rank.py",
        "second": "[ -e second ] || { touch second; exit 1; }".replace("second", str(tmp_path / "second"))})
    assert set(states(grid).values()) == {("never started", "")}
    sweep("run", grid, "--jobs=2", code=1)
    found = states(grid)
    assert found["good"][0] == "done" and found["second"] == ("failed", "exit code 1, no message")
    assert found["crashes"] == ("failed", "ModuleNotFoundError: No module named 'no_such_module'")
    assert found["refuses"] == ("failed", "error: lower it")
    assert found["ranks"] == ("failed", "IndexError: of rank 1")
    assert found["killed"] == ("failed", "killed by SIGKILL (often: out of memory)")
    assert found["odd"] == ("failed", "exit code 255, no message")
    assert found["real_time"] == ("failed", "exit code 163, no message")
    assert (tmp_path / "out/good/log.txt").read_text() == f"{max(1, len(os.sched_getaffinity(0)) // 2)}\n"
    before = (tmp_path / "out/good/job.json").read_text()
    sweep("run", grid, "--rerun", code=1)
    assert states(grid)["second"][0] == "done" and (tmp_path / "out/good/job.json").read_text() == before


def test_a_run_whose_command_the_grid_has_changed_is_not_done_in_silence(tmp_path):
    grid = write_grid(tmp_path, {"same": "echo 1", "changed": "echo 1"})
    sweep("run", grid)
    write_grid(tmp_path, {"same": "echo 1", "changed": "echo 2"})
    assert states(grid) == {"same": ("done", ""), "changed": ("done", sweep_module.CHANGED)}
    assert "2 done\nof these, 1 done by another command than the grid has now" in sweep("run", grid)
    assert (tmp_path / "out/changed/log.txt").read_text() == "1\n"
    shutil.rmtree(tmp_path / "out/changed")
    assert "another command" not in sweep("run", grid)
    assert (tmp_path / "out/changed/log.txt").read_text() == "2\n"


def start_sweep(grid):
    """A sweep that Ctrl-C stops, even if the tests themselves run in the background, where it is ignored."""
    return subprocess.Popen([sys.executable, str(ROOT / "paper/sweep.py"), "run", grid],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_status_sees_what_runs_and_stopping_the_sweep_stops_it(tmp_path):
    saves = ("import signal, sys, time;"
             "signal.signal(15, lambda *_: (time.sleep(0.5), print('saved'), sys.exit(75)));"
             "print('up', flush=True); time.sleep(60)")
    grid = write_grid(tmp_path, {"long": f"{sys.executable} -c {shlex.quote(saves)}; echo goes on",
                                 "waits": "true"})
    process = start_sweep(grid)
    log = tmp_path / "out/long/log.txt"
    wait_for(lambda: log.exists() and "up" in log.read_text())
    assert states(grid)["long"][0] == "running" and states(grid)["waits"][0] == "never started"
    silent = time.time() - 3600
    os.utime(log, (silent, silent))
    assert states(grid)["long"] == ("stalled", f"on {socket.gethostname()}, no output for 60 min")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert log.read_text() == "up\nsaved\n"  # it waited for the save, and ran nothing after it
    assert states(grid) == {"long": ("failed", "stopped, before its first checkpoint"),
                            "waits": ("never started", "")}
    (tmp_path / "out/long/resume/step_000003").mkdir(parents=True)
    assert states(grid)["long"] == ("failed", "stopped, with a checkpoint to continue from")


def test_torchrun_is_not_told_to_stop_while_its_workers_save(tmp_path):
    """It would kill them 30 seconds later."""
    (tmp_path / "rank.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(15, lambda *_: (time.sleep(0.5), print('saved'), sys.exit(75)))\n"
        "print('up', flush=True)\ntime.sleep(60)\n")
    grid = write_grid(tmp_path, {"ranks": f"{TORCHRUN} --nproc_per_node=2 {tmp_path}/rank.py"})
    process = start_sweep(grid)
    log = tmp_path / "out/ranks/log.txt"
    wait_for(lambda: log.exists() and log.read_text().count("up") == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130
    assert log.read_text().count("saved") == 2 and "death signal" not in log.read_text()
    (tmp_path / "out/ranks/resume/step_000003").mkdir(parents=True)
    assert states(grid)["ranks"] == ("failed", "stopped, with a checkpoint to continue from")


OOM = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=5.batch. Some of your processes may have"


@pytest.mark.parametrize(("job", "said", "reason"), (
    ({"exit": 137, "started": 1}, OOM, "error: Detected 1 oom"),
    ({"exit": 1, "started": 1}, OOM, "error: Detected 1 oom"),
    ({"started": 1},
     "slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***",
     "error: *** JOB 5"), ({"started": 1}, "", "ended without a message"),
    ({}, "", "cancelled before it started"),
    ({}, "/var/spool/script: line 4: /gone/python: No such file or directory", "/var/spool/script: line 4")))
def test_a_kill_is_explained_by_what_slurm_says(tmp_path, job, said, reason):
    (tmp_path / "slurm").write_text(said + "\n")
    (tmp_path / "log.txt").write_text("Traceback\nKeyError: 'x'\n")
    job = job | {"slurm_log": tmp_path / "slurm", "log_from": 0}
    assert sweep_module.why(tmp_path, job).startswith(reason)


# ---- SLURM's commands, slow or broken: stubs that stand before the real ones ----

@pytest.fixture
def slurm(tmp_path):
    """Write commands that print their arguments to calls.txt and then do what a test says -> environment."""
    folder = tmp_path / "stubs"
    folder.mkdir()

    def write(**commands):
        for name, text in commands.items():
            log = f"echo {name} \"$@\" >> {tmp_path}/calls.txt"
            (folder / name).write_text(f"#!/bin/bash\n{log}\n{text}\n")
            (folder / name).chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}"}
    write(squeue="", sacct="", scontrol="", sbatch="cat > /dev/null; echo 7")
    return write


def record(tmp_path, name, **job):
    """Write the job.json of a run of write_grid -> its path."""
    path = tmp_path / "out" / name / "job.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": f"touch {tmp_path}/ran", **job}))
    return path


def test_a_run_that_ends_while_squeue_is_slow_is_done(tmp_path, slurm):
    """squeue's answer is of a moment when the run had left the queue."""
    path = record(tmp_path, "a", job="7_0", started=1, command="true")
    env = slurm(squeue=f"sleep 0.5; sed -i 's/\"started\"/\"exit\": 0, \"started\"/' {path}")
    assert states(write_grid(tmp_path, {"a": "true"}), env=env)["a"] == ("done", "")


def test_runs_that_are_submitted_while_squeue_is_slow_are_in_the_queue(tmp_path, slurm):
    path = record(tmp_path, "a", job="7_0", started=1, exit=1)
    env = slurm(squeue=f"echo '8_0|PENDING (Priority)' >> {tmp_path}/queue\n"
                       f"[ -e {tmp_path}/asked ] && cat {tmp_path}/queue\ntouch {tmp_path}/asked\n"
                       f"echo '{{\"job\": \"8_0\", \"command\": \"true\"}}' > {path}")
    assert states(write_grid(tmp_path, {"a": "true"}), env=env)["a"] == ("queued", "PENDING (Priority)")


def test_a_task_whose_run_has_ended_or_is_another_jobs_does_nothing(tmp_path, slurm):
    env = slurm() | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    for job in ({"job": "7_0", "exit": 0}, {"exit": 0}, {"job": "8_3"}):
        path = record(tmp_path, "a", **job)
        assert "nothing to do" in sweep("task", path.parent, env=env)
    assert not (tmp_path / "ran").exists()
    path = record(tmp_path, "a", job="7_0", exit=1)
    sweep("task", path.parent, env=env)
    assert (tmp_path / "ran").exists()


def test_submit_leaves_alone_what_ended_while_it_was_submitted(tmp_path, slurm):
    done, failed = record(tmp_path, "a", exit=1), record(tmp_path, "b", exit=1)
    env = slurm(sbatch=f"cat > /dev/null; echo '{{\"exit\": 0}}' > {done}; echo Welcome to it; echo 7")
    assert "job array 7: 2 runs" in sweep("submit", write_grid(tmp_path, {"a": "true", "b": "true"}), env=env)
    assert json.loads(done.read_text()) == {"exit": 0} and json.loads(failed.read_text())["job"] == "7_1"


def test_a_banner_in_squeues_answer_is_no_job(tmp_path, slurm):
    record(tmp_path, "a", job="7_0")
    env = slurm(squeue="echo Maintenance on Friday; echo; echo '7_0|PENDING (a|b)'")
    assert states(write_grid(tmp_path, {"a": "true"}), env=env)["a"] == ("queued", "PENDING (a|b)")


@pytest.mark.parametrize("flag", ("--array=0-3", "--arr=1", "-a0", "--wrap=hostname", "-W", "--wait",
                                  "--test-only"))
def test_flags_that_would_break_every_run_are_refused(tmp_path, slurm, flag):
    grid = write_grid(tmp_path, {"a": "true"})
    assert f"{flag} cannot be set" in sweep("submit", grid, f"--sbatch=--time=9 {flag}", env=slurm(), code=2)
    assert not (tmp_path / "out/a/job.json").exists()


def test_a_release_that_fails_is_said(tmp_path, slurm):
    env = slurm(scontrol="echo slurm_update error: busy >&2; exit 1",
                squeue="echo '7_0|PENDING (JobHeldUser)'")
    grid = write_grid(tmp_path, {"a": "true"})
    assert "job array 7 waits" in sweep("submit", grid, env=env, code=2)
    assert states(grid, env=env)["a"] == ("queued", "PENDING (JobHeldUser)")


@pytest.mark.parametrize("limit, flags, warns", (
    ("2:00", "", True), ("9:59", "", True), ("10:00", "", False), ("1-00:01:00", "", False),
    ("UNLIMITED", "", False), ("2:00", "--signal=B:USR1@20", False), ("30", "--signal=B:USR1@20", True)))
def test_a_time_limit_that_is_mostly_spent_on_saving_is_warned_of(tmp_path, slurm, limit, flags, warns):
    env = slurm(squeue=f"[[ \"$*\" != *%l* ]] || echo {limit}")
    said = sweep("submit", write_grid(tmp_path, {"a": "true"}), f"--sbatch={flags}", env=env)
    assert ("most of their time" in said) == warns


def start_task(tmp_path, env, k=0):
    """Run the script that `submit` gave to the stub of sbatch, as task k of the array 7."""
    env = os.environ | env | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(k)}
    log = open(tmp_path / "slurm.txt", "a")
    return subprocess.Popen(["bash", tmp_path / "script"], env=env, stdout=log, stderr=log)


def calls(tmp_path, command):
    return (tmp_path / "calls.txt").read_text().count(command)


def test_a_signal_to_save_is_not_lost_however_early_it_comes(tmp_path, slurm):
    """Before sweep.py can handle it, and before the stage that saves has started."""
    saves = ("import signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
             "time.sleep(60)")
    grid = write_grid(tmp_path, {"a": f"sleep 3; exec {sys.executable} -c {shlex.quote(saves)}"})
    env = slurm(sbatch=f"cat > {tmp_path}/script; echo 7")
    sweep("submit", grid, env=env)
    task = start_task(tmp_path, env)
    wait_for(lambda: Path(f"/proc/{task.pid}/cmdline").read_bytes().startswith(sys.executable.encode()))
    task.send_signal(signal.SIGUSR1)  # Python has only begun to start
    assert task.wait(60) == 75 and calls(tmp_path, "scontrol requeue 7_0") == 1
    env = slurm(squeue="echo '7_0|PENDING (BeginTime)'")
    assert states(grid, env=env)["a"] == ("queued", "PENDING (BeginTime)")
    assert states(grid, env=slurm(squeue=""))["a"] == (
        "failed", "cancelled in the queue, before its first checkpoint")


def test_a_run_that_never_saves_is_not_queued_again_without_end(tmp_path, slurm):
    env = slurm(sbatch=f"cat > {tmp_path}/script; echo 7")
    grid = write_grid(tmp_path, {"a": "echo up; sleep 60"})
    sweep("submit", grid, env=env)
    for times in (1, 2, 3):
        task = start_task(tmp_path, env)
        log = tmp_path / "out/a/log.txt"
        wait_for(lambda: log.exists() and log.read_text().count("up") == times)
        task.send_signal(signal.SIGUSR1)  # the time limit is near
        time.sleep(0.5)
        task.send_signal(signal.SIGTERM)  # and here it is
        assert task.wait(60) == 137
        assert calls(tmp_path, "scontrol requeue") == min(times, 2)
    assert states(grid, env=env)["a"] == (
        "failed", "reached its time limit 3 times without saving; give it more time")


def test_a_requeue_that_fails_is_said_and_the_run_is_there_to_submit(tmp_path, slurm):
    """As with --sbatch=--no-requeue."""
    env = slurm(sbatch=f"cat > {tmp_path}/script; echo 7",
                scontrol="[ $1 != requeue ] || { echo Requested operation is disabled >&2; exit 1; }")
    grid = write_grid(tmp_path, {"a": "exit 75"})
    sweep("submit", grid, env=env)
    assert start_task(tmp_path, env).wait(60) == 75
    assert states(grid, env=env)["a"] == (
        "failed", "error: could not be queued again (Requested operation is disabled); submit it again")


def test_the_status_of_972_runs_of_which_200_failed_takes_one_call_of_each_command(tmp_path, slurm):
    commands = {f"run{k}": "true" for k in range(972)}
    for k in range(972):
        record(tmp_path, f"run{k}", job=f"7_{k}", started=1, **({"exit": 0} if k < 700 else {}))
        (tmp_path / f"out/run{k}/log.txt").write_text("step 1\n" * 1000)
    accounts = "".join(f"7_{k}|NODE_FAIL|0:0|None\\n" for k in range(700, 900))
    env = slurm(squeue="for k in {900..971}; do echo \"7_$k|PENDING (Resources)\"; done",
                sacct=f"printf '{accounts}'")
    printed = sweep("status", write_grid(tmp_path, commands), env=env)
    assert "700 done, 200 failed, 72 queued" in printed and printed.count("NODE_FAIL") == 200
    assert (tmp_path / "calls.txt").read_text().count("\n") == 2


# ---- reasons ----

def test_output_before_an_exit_code_is_not_taken_for_its_reason(tmp_path):
    grid = write_grid(tmp_path, {"a": "echo step 10: loss 0.5; exit 3"})
    sweep("run", grid, code=1)
    assert states(grid)["a"] == ("failed", "exit code 3, after 'step 10: loss 0.5'")


def test_a_torn_record_is_a_failure_and_not_a_traceback(tmp_path):
    grid = write_grid(tmp_path, {"a": "true"})
    for text in ("", '{"command": "tr'):
        record(tmp_path, "a").write_text(text)
        assert states(grid)["a"] == ("failed", "its job.json is not complete, so how it ended is unknown")
    sweep("run", grid)
    assert states(grid)["a"] == ("done", "")


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk_is_said(tmp_path):
    (tmp_path / "out").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path / "out"], check=True)
    try:
        grid = write_grid(tmp_path, {"a": f"cat /dev/zero > {tmp_path}/out/a/big"})
        assert "No space left" in sweep("run", grid, code=2)
        assert states(grid)["a"] == ("failed", "cat: write error: No space left on device") or (
            states(grid)["a"] == ("failed", "ended without a message; its disk is full"))
    finally:
        subprocess.run(["umount", "-l", tmp_path / "out"], check=True)


def test_a_running_run_whose_folder_was_deleted_is_not_started_twice(tmp_path):
    grid = write_grid(tmp_path, {"a": "echo up; sleep 60"})
    process = start_sweep(grid)
    log = tmp_path / "out/a/log.txt"
    wait_for(lambda: log.exists() and "up" in log.read_text())
    shutil.rmtree(tmp_path / "out/a")
    try:
        assert states(grid)["a"] == ("running", "without a record, as its folder was deleted; stop it")
        assert sweep("run", grid) == "1 running\n"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


# ---- SLURM ----

def wait_for(condition, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "timed out"
        time.sleep(0.3)


class Cluster:
    """A temporary SLURM on this machine, where a node is a daemon: with its own munge key, ports and folders.
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # pytest's is for root only
        self.folder.chmod(0o755)
        self.env, self.daemons = {"SLURM_CONF": str(self.folder / "slurm.conf")}, {}

    def up(self, nodes):
        munge = self.folder / "munge"
        munge.mkdir()
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        for path in (munge, munge / "key"):
            shutil.chown(path, "munge")
        sockets = [socket.create_server(("localhost", 0)) for _ in range(1 + nodes)]
        port, *ports = [s.getsockname()[1] for s in sockets]  # free ones
        for s in sockets:
            s.close()
        lines = "\n".join(f"NodeName=node{k} NodeHostname={socket.gethostname()} NodeAddr=localhost Port={p} "
                          f"CPUs={2 // nodes}" for k, p in enumerate(ports))
        (self.folder / "slurm.conf").write_text(f"""
ClusterName=sweep
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/%n.pid
{lines}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
        self.start("munged", "--foreground", f"--socket={munge}/socket", f"--key-file={munge}/key",
                   f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
                   user="munge", group="munge", extra_groups=[])
        wait_for((munge / "socket").exists)
        self.start("slurmctld", "-D")
        for k in range(nodes):
            self.start("slurmd", "-D", "-N", f"node{k}")
        wait_for(lambda: self.call("sinfo", "-h", "-o", "%D %T") == f"{nodes} idle\n")

    def start(self, *command, **kwargs):
        self.daemons[command] = subprocess.Popen(command, stdout=open(self.folder / "daemons.log", "ab"),
                                                 stderr=subprocess.STDOUT, env=os.environ | self.env,
                                                 **kwargs)

    def call(self, *command):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.env, timeout=120)
        return done.stdout + done.stderr

    def down(self):
        self.call("scancel", "--user=root")
        end = time.time() + 30
        while self.call("squeue", "-h") and time.time() < end:
            time.sleep(0.3)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder)


@pytest.fixture
def cluster(request, monkeypatch):
    """A cluster of as many nodes as the test asks for."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    if os.getuid() or not all(map(shutil.which, ("munged", "slurmctld", "slurmd"))):
        pytest.skip("SLURM and munge are not installed here, or this is not root")
    cluster = Cluster()
    try:
        cluster.up(request.param)
        yield cluster
    finally:
        cluster.down()


@pytest.mark.slow
@pytest.mark.parametrize("cluster", (1,), indirect=True)
def test_a_sweep_on_slurm(cluster, tmp_path, tiny, rewarded):
    """Guards that failures, time limits and dead nodes are seen, and queued again. Most of its time passes
    until SLURM's shortest time limit, a minute, which SLURM checks every 30 s.
    """
    slow = tmp_path / "slow.py"  # train.py, but sleeps at every step until it has saved
    slow.write_text("import runpy, sys, time, torch\nfrom pathlib import Path\n"
                    f"sys.path.insert(0, {str(ROOT)!r})\n"
                    "step, sleep = torch.optim.AdamW.step, 0 if Path(sys.argv[1], 'resume').exists() else 1\n"
                    "def slow_step(*args, **kwargs):\n    time.sleep(sleep)\n"
                    "    return step(*args, **kwargs)\n"
                    "torch.optim.AdamW.step = slow_step\n"
                    f"del sys.argv[1]\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    out, go, slurmd = tmp_path / "out", tmp_path / "go", ("slurmd", "-D", "-N", "node0")
    grid = write_grid(tmp_path, {
        "fails": f"[ -e {go} ] || {sys.executable} -c 'raise ValueError(\"no such luck\")'",
        "cancelled": f"[ -e {go} ] || sleep 600",
        "trains": f"{TORCHRUN} --nproc_per_node=1 {slow} {out}/trains "
                  f"--model={tiny} --data={rewarded} --out={out}/trains --epochs=10 --learning_rate=1e-3 "
                  "--batch_size=12 --resume; exit $?",
        "node": f"echo up; [ -e {go} ] || sleep 600; echo $SLURM_ARRAY_TASK_ID $SLURM_RESTART_COUNT"})

    def now(name):
        return states(grid, env=cluster.env)[name]

    def log(name):
        path = out / name / "log.txt"
        return path.read_text() if path.exists() else ""

    text = sweep("submit", grid, "--only=[fct]*", "--sbatch=--time=1 --signal=B:USR1@5", "--max_running=2",
                 env=cluster.env)
    array = text.split("job array ")[1].split(":")[0]
    wait_for(lambda: now("fails")[0] == "failed" and now("cancelled")[0] == now("trains")[0] == "running")
    assert now("fails") == ("failed", "ValueError: no such luck") and now("node")[0] == "never started"
    assert sweep("submit", grid, "--only=trains", env=cluster.env) == "1 running\n"  # so nothing is submitted
    cluster.call("scancel", f"{array}_1")
    wait_for(lambda: now("cancelled")[0] == "failed")
    assert "CANCELLED AT" in now("cancelled")[1]

    wait_for(lambda: now("trains")[0] == "queued")  # out of time: saved, and queued again by itself
    job = json.loads((out / "trains/job.json").read_text())
    assert job["exit"] == 1 and job["job"] == f"{array}_2"  # torchrun's own code; its workers' was 75
    sweep("submit", grid, "--only=node", env=cluster.env)
    wait_for(lambda: now("node")[0] == "running" and "up" in log("node"))
    cluster.daemons[slurmd].kill()  # the node goes down
    wait_for(lambda: now("node")[0] == "queued")
    go.touch()
    cluster.start(*slurmd)
    wait_for(lambda: now("trains")[0] == now("node")[0] == "done")
    assert re.search("from step [1-9]", log("trains"))  # continued
    assert [row["step"] for row in read_rows(out / "trains/metrics.jsonl")] == list(range(1, 101))
    # the shell on the dead node may outlive its sleep for a moment, and say so, or go on to its "0 "
    lines = [line.strip() for line in log("node").splitlines() if "Killed" not in line]
    lines = [line for line in lines if line not in ("", "0")]
    assert lines == ["up", "up", "0 1"]  # started again once

    assert log("fails").count("\nValueError: ") == 1  # the requeue of one task does not run the others again
    assert "2 failed" in sweep("submit", grid, "--rerun", env=cluster.env)
    wait_for(lambda: {state for state, _ in states(grid, env=cluster.env).values()} == {"done"})
    assert (out / "cancelled/job.json").stat().st_mtime > (out / "node/job.json").stat().st_mtime


@pytest.mark.slow
@pytest.mark.parametrize("cluster", (1,), indirect=True)
def test_names_outputs_and_folders_of_the_users_on_slurm(cluster, tmp_path):
    """A % in a folder's name, --output elsewhere, and a folder that is deleted under a running task."""
    tmp_path = tmp_path / "50% of %j"
    tmp_path.mkdir()
    grid = write_grid(tmp_path, {"good": "echo good", "bad": "exit 4", "gone": "echo up; sleep 600"})
    log = tmp_path / "out/gone/log.txt"
    for flags in "", f"--output={cluster.folder}/%j.txt", f"--error={cluster.folder}/err.txt":
        text = sweep("submit", grid, f"--sbatch={flags}", env=cluster.env)
        array = text.split("job array ")[1].split(":")[0]
        wait_for(lambda: log.exists() and "up" in log.read_text())
        wait_for(lambda: states(grid, env=cluster.env)["bad"] == ("failed", "exit code 4, no message"))
        wait_for(lambda: states(grid, env=cluster.env)["good"] == ("done", ""))
        shutil.rmtree(tmp_path / "out/gone")
        assert states(grid, env=cluster.env)["gone"] == (
            "running", f"without a record, as its folder was deleted; scancel {array}_2")
        assert "job array" not in sweep("submit", grid, "--only=gone", env=cluster.env)
        cluster.call("scancel", array)
        wait_for(lambda: states(grid, env=cluster.env)["gone"][0] == "failed")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("cluster", (1,), indirect=True)
def test_run_sh_finds_its_own_files_as_a_batch_script_from_another_folder(cluster, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\npwd\necho \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    out = cluster.folder / "out.txt"
    cluster.call("sbatch", f"--chdir={tmp_path}", f"--output={out}", f"--export=ALL,PYTHON={tmp_path}/python",
                 str(ROOT / "run.sh"), "test", "--collect-only", "tests/a/run.sh")
    wait_for(lambda: out.exists() and "collect" in out.read_text(), 60)
    assert out.read_text() == f"{ROOT}\n-m pytest --collect-only tests/a/run.sh\n"


@pytest.mark.slow
@pytest.mark.parametrize("cluster", (2,), indirect=True)
def test_two_nodes_share_a_run(cluster, tmp_path, tiny):
    prompts = write_rows(tmp_path / "train.jsonl", [{"prompt": "row " + "x" * (i % 7)} for i in range(24)])
    shutil.copy(prompts, tmp_path / "test.jsonl")
    (tmp_path / "reward.py").write_text("def letters(prompts, completions, **columns):\n"
                                        "    return [sum(map(str.isalpha, text)) for text in completions]\n")
    out = tmp_path / "out"
    settings = (f"OUT={out} RUN=trains MODEL={tiny} DATA={tmp_path} REWARD={tmp_path}/reward.py:letters "
                "MASTER_ADDR=localhost NPROC=1 GENERATE='--num_refs=4 --max_new_tokens=8'")
    grid = write_grid(tmp_path, {"refs": f"{settings} bash paper/pipeline.sh refs",
                                 "trains": f"{settings} bash paper/pipeline.sh train "
                                 "--epochs=100 --batch_size=24 --learning_rate=1e-4"})
    sweep("submit", grid, "--only=refs", "--sbatch=--nodes=2", env=cluster.env)
    wait_for(lambda: states(grid, env=cluster.env)["refs"][0] == "done")
    for stage in ("sampled", "rewarded"):
        assert [len(read_rows(out / "train" / stage / f"part-{k:05d}.jsonl")) for k in range(2)] == [12, 12]

    array = sweep("submit", grid, "--sbatch=--nodes=2", env=cluster.env).split("job array ")[1].split(":")[0]
    metrics = out / "trains/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5)
    # what SLURM sends when the time limit is near
    cluster.call("scancel", "--batch", "--signal=USR1", f"{array}_0")
    wait_for(lambda: states(grid, env=cluster.env)["trains"][0] == "queued")
    wait_for(lambda: json.loads((out / "trains/run.json").read_text())["finished"])
    log = (out / "trains/log.txt").read_text()
    assert "on 2 x cpu" in log and re.search("from step [1-9]", log)  # continued
    assert [row["step"] for row in read_rows(metrics) if "loss" in row] == list(range(1, 401))
