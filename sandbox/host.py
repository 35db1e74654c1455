"""Judge programs: jobs from rows, workers that run them, and verdicts. Nothing here waits for a worker.

In: rows, see __main__.py. Out: verdicts, in any order. A worker is never trusted to answer: one that
shows no sign of life is ended, and its program given to another.

    python -c 'import sandbox; print(*sandbox.judge([{"id": 1, "test_list": ["assert f(1) == 2"],
        "fenced": False, "completion": "def f(x): return x + 1"}]))'
"""
import collections
import contextlib
import functools
import glob
import hashlib
import importlib.util
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time

from . import formats
from .formats import BLOCKS
from .runtimes import ENVIRONMENT, IMAGE, PACKAGES, RUNTIMES, command, remedy

FLAGS = {  # name: (default, what it means); the limits travel to the workers
    "test_cpu": (15.0, "CPU seconds a program may use for one test (its import counts to the first)"),
    "cpu": (120.0, "CPU seconds a program may use for all its tests"),
    "test_wall": (10.0, "seconds a test may wait without computing"),
    "wall": (60.0, "seconds all tests of a program may wait without computing"),
    "memory": (1024, "MiB of address space of a program"),
    "threads": (32, "threads a program may add to its first; it may never start a process"),
    "disk": (16, "MiB a program may write, all of it into an empty /tmp of its own"),
    "files": (64, "open files of a program, and a sixteenth of the files it may create"),
    "output": (16, "MiB of one value that a call returns"),
}
WAYS = {  # how tests and program meet: what it means
    "apart": "in two processes that exchange plain data; nothing can be forged",
    "together": "in one, as in a plain run: any test works, and a program written to cheat can",
}
LIMITS = {name: default for name, (default, _) in FLAGS.items()}
PATIENCE = 0.25  # s after which a program waits for those that have not run yet;
LONG = 10  # or this many times as long as the others take, where that is less
SIDE = 3  # such programs that may go on meanwhile, for each worker
SILENCE = 60.0  # s without a sign of life after which a worker is ended
TRIES = 3  # workers that a program may lose


# ---- workers and jobs ----

class Worker:
    """A running worker. Nothing here waits for it: its pipes do not block, and it has until `due`
    to show itself."""

    def __init__(self, command):
        bare = os.path.basename(command[0]) == "podman"  # this needs the user's own environment
        self.log = open(os.memfd_create("log"), "w+b")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, bufsize=0,
            start_new_session=True, env=None if bare else ENVIRONMENT)
        self.folders = json.loads(command[-1])["folders"]
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self.unsent, self.unread = b"", b""
        self.job = self.tests = None  # what it runs, and the tests that its judge holds

    def ask(self, job, patience, longest):
        """Begin to send a program. `longest`: seconds after which no answer can be expected any more."""
        self.job, self.pace, self.end = job, "new", time.monotonic() + longest
        self.due = time.monotonic() + SILENCE
        sides = job.candidate, b"" if job.judge == self.tests else job.judge
        self.unsent = memoryview(struct.pack("IIf", *map(len, sides), patience) + b"".join(sides))
        self.write()

    def write(self):
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # one that has ended shows it in read()
            while self.unsent:
                self.unsent = self.unsent[os.write(self.stdin, self.unsent):]

    def read(self):
        """The verdict, or None if there is none yet. OSError, with the last line it wrote, if it
        has failed."""
        self.write()
        with contextlib.suppress(BlockingIOError):
            more = os.read(self.stdout, 65536)
            self.unread += more
            if not more:
                self.log.seek(0)
                said = self.log.read().decode(errors="replace").strip().splitlines()
                raise OSError(said[-1] if said else "it ended")
        *lines, self.unread = self.unread.split(b"\n")
        for line in lines:
            self.due = time.monotonic() + SILENCE
            if line in (b"running", b"waiting"):
                self.pace = line.decode()
                continue
            word, passed, total, seconds, kept, detail = line.decode().split(" ", 5)
            passed, total = int(passed), int(total)
            self.tests = self.job.judge if kept == "1" else None
            return {"reward": passed / total if total else None, "passed": passed, "total": total,
                    "verdict": word, "detail": detail, "seconds": float(seconds)}
        if time.monotonic() > min(self.due, self.end):
            raise OSError("it hangs")

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()
        for folder in glob.glob(f"{self.folders}/sandbox-{self.process.pid}-*") if self.folders else ():
            shutil.rmtree(folder, ignore_errors=True)


def stop(workers):
    """End workers. A container ends when its standard input does, and by force if not."""
    for worker in workers:
        worker.process.stdin.close()
    end = time.monotonic() + 5
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.0, end - time.monotonic()))
        worker.kill()


NO_VERDICT = {"reward": None, "passed": 0, "total": 0, "verdict": "infra", "detail": "", "seconds": 0.0}
NO_CODE = NO_VERDICT | {"reward": 0.0, "verdict": "no_code"}


class Job:
    """A program with its tests: what the two sides get to see of a row, and the ids that wait for
    the verdict."""

    def __init__(self, row, program, way):
        both = {"preamble": row["preamble"], "entry_point": row["entry_point"]}
        sides = both | {"program": program}, both | {"test": row["test"]}
        if way == "together":
            sides = [sides[0] | sides[1]]
        self.candidate, self.judge = [*(json.dumps(side).encode() for side in sides), b""][:2]
        self.key = hashlib.sha256(self.candidate + self.judge).digest()
        self.tries, self.ids = TRIES, []
        self.row = row if row.get("solution") else None
        self.doubted = []  # (job, verdict): they failed all tests. Does this, the row's own solution, too?


class Jobs:
    """All jobs: those that have not run yet, then those that were put off, to run when cores are
    free."""

    def __init__(self, rows, block, way="apart"):
        self.rows, self.block, self.way = iter(rows), block, way
        self.verdicts, self.waiting = {}, {}  # by key
        self.first, self.later = collections.deque(), collections.deque()
        self.ready = []  # verdicts to give to the caller
        self.typical = PATIENCE  # s that a program takes which comes to an end

    def new(self):
        """A job that has not run yet, or None."""
        while not self.first and (row := next(self.rows, None)):
            try:
                tests = formats.normalize(row, self.way)
                program = formats.program_of(row, tests["block"], self.block)
                if program is None:
                    self.ready.append({"id": row["id"], **NO_CODE})
                    continue
                job = self.add(Job(tests, program, self.way))
                job.ids.append(row["id"])
                if job.key in self.verdicts:
                    self.settle(job, self.verdicts[job.key])
            except ValueError as error:
                self.ready.append({"id": row["id"], **NO_VERDICT, "detail": str(error)})
        return self.first.popleft() if self.first else None

    def add(self, job):
        """The job, or the equal one that is under way already."""
        if job.key not in self.verdicts and job.key not in self.waiting:
            self.first.append(job)
            self.waiting[job.key] = job
        return self.waiting.get(job.key, job)

    def finish(self, job, verdict):
        if verdict["verdict"] != "timeout":
            self.typical += (verdict["seconds"] - self.typical) / 10
        if job.row is None or verdict["passed"] or verdict["verdict"] not in ("wrong", "exception"):
            return self.settle(job, verdict)
        solution = self.add(Job(job.row, job.row["solution"], self.way))
        solution.row = None
        if solution is job:
            self.settle(job, verdict)
        elif solution.key in self.verdicts:
            self.settle(job, unless_the_solution_fails_too(verdict, self.verdicts[solution.key]))
        else:
            solution.doubted.append((job, verdict))

    def settle(self, job, verdict):
        self.verdicts[job.key] = verdict
        self.waiting.pop(job.key, None)
        self.ready += [{"id": name, **verdict} for name in job.ids]
        job.ids = []
        for other, doubted in job.doubted:
            self.settle(other, unless_the_solution_fails_too(doubted, verdict))


def unless_the_solution_fails_too(verdict, of_solution):
    """A verdict of no test passed, unless the row's own solution passes none either."""
    if of_solution["passed"]:
        return verdict
    return NO_VERDICT | {"detail": f"the row's own solution passes no test ({of_solution['detail']})"}


def run(jobs, worker_command, workers, limits):
    """Yield the verdicts of all jobs. Ends in bounded time, whatever the workers do."""
    idle, busy = [], []
    longest = 8 * (limits["cpu"] + limits["wall"]) + SILENCE  # even on a loaded machine
    try:
        while True:
            while found := next_job(jobs, busy, workers):
                worker = idle.pop() if idle else Worker(worker_command)
                worker.ask(*found, longest)
                busy.append(worker)
            ready, jobs.ready = jobs.ready, []
            yield from ready  # only now: while the caller works, so do the workers
            if not busy:
                return
            for worker in ready_workers(busy):
                job = worker.job
                try:
                    verdict = worker.read()
                    if verdict is None:
                        continue
                    idle.append(worker)
                except OSError as error:
                    worker.kill()
                    job.tries -= 1
                    verdict = NO_VERDICT | {"detail": f"the sandbox failed: {error}"}
                    if job.tries:
                        verdict["verdict"] = "again"
                busy.remove(worker)
                if verdict["verdict"] in ("again", "later"):
                    (jobs.later if verdict["verdict"] == "later" else jobs.first).append(job)
                else:
                    jobs.finish(job, verdict)
    finally:
        stop(busy + idle)


def next_job(jobs, busy, workers):
    """(job, patience) to start now, or None. Programs that have not run yet come first, and are put
    off after PATIENCE where many go on already; those that were put off run when cores are free.
    """
    patience = min(PATIENCE, LONG * jobs.typical) if len(busy) >= SIDE * workers else 0.0
    new = sum(worker.pace == "new" for worker in busy)
    computing = sum(worker.pace != "waiting" for worker in busy)
    if len(busy) >= (1 + SIDE) * workers:
        return None
    if new < workers and (job := jobs.new()):
        return job, patience
    return (jobs.later.popleft(), 0.0) if jobs.later and computing < workers else None


def ready_workers(busy):
    """The workers that have said something, take more of their job, or are overdue; after a second
    at most."""
    poller = select.poll()
    for worker in busy:
        poller.register(worker.stdout, select.POLLIN)
        if worker.unsent:
            poller.register(worker.stdin, select.POLLOUT)
    events, now = dict(poller.poll(1000)), time.monotonic()
    return [worker for worker in busy
            if worker.stdout in events or worker.stdin in events or now > min(worker.due, worker.end)]


# ---- what a user calls ----

# A program that shows that it is alone, and can import what programs import, in the place in which they run
PROBE = """
import os, socket
def probe(right):
    forbidden = [os.fork, socket.socket, lambda: os.execv("/", ["x"]), lambda: open(HOST),
                 lambda: open(HOST + ".new", "w"), lambda: os.listdir(os.path.dirname(HOST)),
                 lambda: open("/proc/self/status"), lambda: os.environ["PATH"]]
    for what in forbidden:
        try:
            what()
            return "not isolated"
        except (OSError, KeyError):
            pass
    import asyncio, csv, email.parser, encodings.idna, unittest.mock, uuid, xml.etree.ElementTree, zoneinfo
    for name in PACKAGES:
        __import__(name)
    with open("x", "w") as file:
        file.write("x")
    return right
"""
PROBE_ROW = {"id": 0, "fenced": False, "entry_point": "probe",
             "test": "def check(candidate):\n assert candidate(1) == 1\n assert candidate(2) == 3"}


@functools.lru_cache(maxsize=None)
def choose(runtime, image, packages):
    """The first runtime that isolates and judges rightly; said once on stderr. RuntimeError if none
    does."""
    names = [name for name in packages.split(",") if name and importlib.util.find_spec(name)]
    program = f"HOST = {os.path.realpath(__file__)!r}\nPACKAGES = {names}\n" + PROBE
    reasons = []
    for name in [runtime] if runtime != "auto" else RUNTIMES:
        if name == "podman" and not shutil.which(name):
            reasons.append("podman is not installed")
            continue
        row = PROBE_ROW | {"completion": program}
        verdict, = run(Jobs([row], "answer"), command(name, image, packages, LIMITS), 1, LIMITS)
        if (verdict["passed"], verdict["total"]) == (1, 2):
            weaker = f" ({reasons[0]}), whose promises are weaker: see sandbox/README.md" if reasons else ""
            print(f"sandbox: {name}{weaker if name == 'landlock' else ''}", file=sys.stderr)
            return name
        reasons.append(f"{name}: {verdict['detail'].removeprefix('the sandbox failed: ')}")
    raise RuntimeError(f"no sandbox works here: {'; '.join(reasons)}. What may help: {remedy()}; or run "
                       "programs that you trust with --unsafe")


def judge(programs, workers=0, runtime="auto", image=IMAGE, packages=PACKAGES, unsafe=False, block="answer",
          way="apart", **limits):
    """Judge an iterable of rows; yield a verdict (a dict with the row's id) for each as they
    finish, in any order.

    workers: 0 is one for each core given to this process. limits: see FLAGS; block: see BLOCKS; way:
    see WAYS.
    Rows of the same program and tests are run once. RuntimeError where a limit is not above 0, or
    no isolation works and `unsafe` is not set.
    """
    if unknown := set(limits) - set(LIMITS):
        raise TypeError(f"no such limit: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    limits = LIMITS | limits
    for name in LIMITS:
        if not limits[name] > 0 and name != "threads":
            raise RuntimeError(f"--{name} must be above 0")
    if block not in BLOCKS:
        raise RuntimeError(f"--block must be one of {', '.join(BLOCKS)}")
    if way not in WAYS:
        raise RuntimeError(f"--judge must be one of {', '.join(WAYS)}")
    worker_command = command("none" if unsafe else choose(runtime, image, packages), image, packages, limits,
                             way)
    yield from run(Jobs(programs, block, way), worker_command, workers or cores(), limits)


def cores():
    """CPU cores given to this process, by its affinity, by SLURM, and as one of several under
    torchrun."""
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    have = min(have, int(os.environ.get("SLURM_CPUS_PER_TASK", have)))
    return max(1, have // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def slowest(verdicts, count=5):
    """The verdicts of the programs that took longest."""
    return sorted(verdicts, key=lambda verdict: -verdict["seconds"])[:count]


def about(verdicts):
    return "slowest: " + ", ".join(f"{v['id']} {v['seconds']:.1f} s ({v['verdict']})" for v in verdicts)
