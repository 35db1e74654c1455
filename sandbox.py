"""Run untrusted Python programs against their tests, without root, and say how many tests each one
passes.

In: JSONL rows with id, completion (a model's answer, see --block; with "fenced": false a text
without a block is all program), preamble (imports and helper classes), test (Python with `def
check(candidate)`) and entry_point (an expression that names the function), or the columns of
another known format (docs/test_formats.md).
Out: JSONL rows with id, reward (passed / total), passed, total, verdict (pass, wrong, exception,
timeout, memory, output, killed, no_code; or infra with a null reward: the row or the sandbox is at
fault), detail, and seconds. A killed run continues where it stopped.

    python sandbox.py --data=programs.jsonl --out=verdicts.jsonl

How it works: sandbox_worker.py, one worker a core, each in a container (bubblewrap, podman or
unshare) without network, the host's files or rights. What it promises: docs/sandbox.md. A worker is
never trusted to answer: one that shows no sign of life is ended, and its program given to another.
"""
import collections
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import formats

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
    "depth": (500, "levels of nesting of one value"),
}
LIMITS = {name: default for name, (default, _) in FLAGS.items()}
PATIENCE = 0.25  # s after which a program waits for those that have not run yet
SIDE = 3  # such programs that may go on meanwhile, for each worker
SILENCE = 60.0  # s without a sign of life after which a worker is ended
TRIES = 3  # workers that a program may lose
NOBODY = 65534
# All that a worker has: the order of sets is the same in each, and no clone has to look up C functions anew.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1",
               "OPENBLAS_NUM_THREADS": "1"}
IMAGE, PACKAGES = "python:3.11-slim", "sortedcontainers"
RUNTIMES = ("bwrap", "podman", "unshare")
HERE = os.path.dirname(os.path.realpath(__file__))
PARTS = ("sandbox_worker.py", "sandbox_line.py", "sandbox_tests.py")
BLOCKS = {  # rule: what it means
    "answer": "the first Python block after the last </think>, or else the first that names no language",
    "first": "the first block marked python, as in the paper",
}


# ---- the program in an answer ----

# At the start of a line, or after other text if it is marked as Python. No part may take quadratic time.
FENCE = re.compile(r"(?:^([ \t]*)|(?<!`)(?=```+py\w{0,5}[ \t\r]*\n))(```+(?!`)|~~~+(?!~))"
                   r"[ \t]{0,9}\{?\.?([\w+#-]{0,20})(?:[^\n`]*\n|(?= .*```))", re.MULTILINE | re.IGNORECASE)
PYTHON = ("python", "python3", "py", "py3")


def first_block(text, rule="answer"):
    """The program in a model's answer: the first closed block of code that the rule asks for (see
    BLOCKS), or None."""
    if rule == "answer":
        text = text.rpartition("</think>")[2]
        if text.lstrip().startswith("<think>"):  # the answer never came
            return None
    unmarked = None
    position = 0
    while start := FENCE.search(text, position):
        mark = start[2]
        end = re.compile(rf"(?<!{mark[0]}){mark}{mark[0]}*[ \t\r]*$", re.MULTILINE).search(text, start.end())
        if not end:
            break
        block = text[start.end():end.start()]
        if start[1] != "":
            block = textwrap.dedent(block)
        elif "\n" not in block:
            block = block.lstrip(" ")
        if start[3].lower() in PYTHON:
            return block
        if not start[3] and unmarked is None:
            unmarked = block
        position = end.end()
    return unmarked if rule == "answer" else None


# ---- containers ----

def visible(packages):
    """What a container shows, as pairs (host's path, path inside): this Python's files, a few
    devices, `packages`."""
    paths = [os.path.realpath(sys.executable), sys.base_prefix + "/lib", "/lib", "/lib64", "/usr/lib",
             "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache",
             "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    return [(path, path) for path in paths if os.path.exists(path)] + extras(packages)


def extras(packages):
    """Such pairs for the worker's files and for those packages, by import name, that are installed."""
    pairs = [(f"{HERE}/{name}", f"/box/{name}") for name in PARTS]
    for name in filter(None, packages.split(",")):
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            path = os.path.dirname(spec.origin) if spec.submodule_search_locations else spec.origin
            found = [path, f"{os.path.dirname(path)}/{name}.libs"]  # a wheel's shared libraries
            pairs += [(path, "/box/" + os.path.basename(path)) for path in found if os.path.exists(path)]
    return pairs


def command(runtime, image, packages, limits):
    """The command line of a worker in a container of that runtime (None: in no container)."""
    options = {"limits": limits, "isolated": runtime is not None, "root": [], "path": ["/box"],
               "warm": [name for name in packages.split(",") if name]}
    root = os.geteuid() == 0
    own = [os.path.realpath(sys.executable), "-S", "-s", "-B", "/box/sandbox_worker.py"]
    if runtime is None:
        own[-1] = f"{HERE}/sandbox_worker.py"
        options["path"] = [HERE] + [os.path.dirname(path) for path, _ in extras(packages)[len(PARTS):]]
        start = []
    elif runtime == "bwrap":
        start = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
                 "--unshare-cgroup-try", "--hostname", "sandbox", "--die-with-parent", "--new-session",
                 "--cap-drop", "ALL"]
        # Real root needs no user namespace here; it becomes nobody inside, once Python runs.
        start += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user"]
        parents = {str(parent) for _, inside in visible(packages) for parent in Path(inside).parents}
        for parent in sorted(parents - {inside for _, inside in visible(packages)} - {"/"}):
            start += ["--perms", "0755", "--dir", parent]  # else they would be root's alone
        for path, inside in visible(packages):
            start += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, inside]
        start += ["--proc", "/proc", "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    elif runtime == "unshare":
        start = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts",
                 "--mount-proc"]
        start += [] if root else ["--user", "--map-root-user"]
        options["root"] = visible(packages)
        own[-1] = f"{HERE}/sandbox_worker.py"
    else:
        own[0] = "python3"
        start = ["podman", "run", "--rm", "--interactive", "--network=none", "--read-only", "--cap-drop=ALL",
                 f"--user={NOBODY}:{NOBODY}", "--security-opt=no-new-privileges",
                 "--security-opt=seccomp=unconfined",
                 "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096", "--http-proxy=false"]
        start += [f"--env={name}={value}" for name, value in ENVIRONMENT.items()]
        start += [f"--volume={path}:{inside}:ro" for path, inside in extras(packages)]
        start += ["--rootfs"] * os.path.isdir(image)  # a root file system, unpacked
        start += [image]
    return start + own + [json.dumps(options)]


# ---- workers and jobs ----

class Worker:
    """A running worker. Nothing here waits for it: its pipes do not block, and it has until `due`
    to show itself."""

    def __init__(self, line):
        bare = os.path.basename(line[0]) == "podman"  # this needs the user's own environment
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, bufsize=0,
            start_new_session=True, env=None if bare else ENVIRONMENT)
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
            verdict = json.loads(line)
            self.tests = self.job.judge if verdict.pop("kept") else None
            return verdict
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

    def __init__(self, row, program):
        both = {"preamble": row["preamble"], "entry_point": row["entry_point"]}
        sides = both | {"program": program}, both | {"test": row["test"]}
        self.candidate, self.judge = (json.dumps(side).encode() for side in sides)
        self.key = hashlib.sha256(self.candidate + self.judge).digest()
        self.tries, self.ids = TRIES, []
        self.row = row if row.get("solution") else None
        self.doubted = []  # (job, verdict): they failed all tests. Does this, the row's own solution, too?


class Jobs:
    """All jobs: those that have not run yet, then those that were put off, to run when cores are
    free."""

    def __init__(self, rows, block):
        self.rows, self.block = iter(rows), block
        self.verdicts, self.waiting = {}, {}  # by key
        self.first, self.later = collections.deque(), collections.deque()
        self.ready = []  # verdicts to give to the caller

    def new(self):
        """A job that has not run yet, or None."""
        while not self.first and (row := next(self.rows, None)):
            try:
                program = first_block(row["completion"], self.block)
                if program is None and row.get("fenced") is False:
                    program = row["completion"].rpartition("</think>")[2]
                if program is None:
                    self.ready.append({"id": row["id"], **NO_CODE})
                    continue
                job = self.add(Job(formats.normalize(row), program))
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
        if job.row is None or verdict["passed"] or verdict["verdict"] not in ("wrong", "exception"):
            return self.settle(job, verdict)
        solution = self.add(Job(job.row, job.row["solution"]))
        solution.row = None
        if solution is job:
            self.settle(job, verdict)
        elif solution.key in self.verdicts:
            self.settle(job, believed(verdict, self.verdicts[solution.key]))
        else:
            solution.doubted.append((job, verdict))

    def settle(self, job, verdict):
        self.verdicts[job.key] = verdict
        self.waiting.pop(job.key, None)
        self.ready += [{"id": name, **verdict} for name in job.ids]
        job.ids = []
        for other, doubted in job.doubted:
            self.settle(other, believed(doubted, verdict))


def believed(verdict, of_solution):
    """A verdict of no test passed, unless the row's own solution passes none either."""
    if of_solution["passed"]:
        return verdict
    return NO_VERDICT | {"detail": f"the row's own solution passes no test ({of_solution['detail']})"}


def run(jobs, line, workers, limits):
    """Yield the verdicts of all jobs. Ends in bounded time, whatever the workers do."""
    idle, busy = [], []
    longest = 8 * (limits["cpu"] + limits["wall"]) + SILENCE  # even on a loaded machine
    try:
        while True:
            while found := next_job(jobs, busy, workers):
                worker = idle.pop() if idle else Worker(line)
                worker.ask(*found, longest)
                busy.append(worker)
            ready, jobs.ready = jobs.ready, []
            yield from ready  # only now: while the caller works, so do the workers
            if not busy:
                return
            for worker in those_with_news(busy):
                job = worker.job
                try:
                    verdict = worker.read()
                    if verdict is None:
                        continue
                    idle.append(worker)
                except OSError as error:
                    worker.kill()
                    job.tries -= 1
                    verdict = {"again": True}
                    if not job.tries:
                        verdict = NO_VERDICT | {"detail": f"the sandbox failed: {error}"}
                busy.remove(worker)
                if "reward" in verdict:
                    jobs.finish(job, verdict)
                else:
                    (jobs.first if "again" in verdict else jobs.later).append(job)
    finally:
        stop(busy + idle)


def next_job(jobs, busy, workers):
    """(job, patience) to start now, or None. Programs that have not run yet come first, and are put
    off after PATIENCE where many go on already; those that were put off run when cores are free.
    """
    new = sum(worker.pace == "new" for worker in busy)
    computing = sum(worker.pace != "waiting" for worker in busy)
    if len(busy) >= (1 + SIDE) * workers:
        return None
    if new < workers and (job := jobs.new()):
        return job, PATIENCE if len(busy) >= SIDE * workers else 0.0
    return (jobs.later.popleft(), 0.0) if jobs.later and computing < workers else None


def those_with_news(busy):
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

@functools.lru_cache(maxsize=None)
def choose(runtime, image, packages):
    """The first runtime that isolates and judges rightly; said once on stderr. RuntimeError if none
    does."""
    trial = f"HOST = {os.path.realpath(__file__)!r}" + """
import os, socket
def probe(right):
    if os.path.exists("/proc/self") or os.path.exists(HOST) or os.environ.get("PATH"):
        return "not isolated"
    for forbidden in (os.fork, socket.socket, lambda: open("/box/new", "w"), lambda: os.execv("/", ["x"])):
        try:
            forbidden()
            return "not isolated"
        except OSError:
            pass
    return right
"""
    row = {"id": 0, "completion": trial, "fenced": False, "entry_point": "probe",
           "test": "def check(candidate):\n assert candidate(1) == 1\n assert candidate(2) == 3"}
    reasons = []
    for name in [runtime] if runtime != "auto" else RUNTIMES:
        if not shutil.which(name):
            reasons.append(f"{name} is not installed")
            continue
        verdict, = run(Jobs([row], "answer"), command(name, image, packages, LIMITS), 1, LIMITS)
        if (verdict["passed"], verdict["total"]) == (1, 2):
            print(f"sandbox: {name}", file=sys.stderr)
            return name
        reasons.append(f"{name}: {verdict['detail']}")
    raise RuntimeError(
        f"no sandbox works here: {'; '.join(reasons)}. Install bubblewrap (apt install bubblewrap, or "
        "dnf) and see that user namespaces are allowed (sysctl user.max_user_namespaces), or run "
        "programs that you trust with --unsafe"
    )


def judge(programs, workers=0, runtime="auto", image=IMAGE, packages=PACKAGES, unsafe=False, block="answer",
          **limits):
    """Judge an iterable of rows; yield a verdict (a dict with the row's id) for each as they
    finish, in any order.

    workers: 0 is one for each core given to this process. limits: see FLAGS; block: see BLOCKS.
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
    line = command(None if unsafe else choose(runtime, image, packages), image, packages, limits)
    yield from run(Jobs(programs, block), line, workers or cores(), limits)


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


def main():
    parser = rows.Parser(__doc__)
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
    for name, (default, text) in FLAGS.items():
        add(f"--{name}", type=type(default), default=default, help=f"{text}")
    args = vars(parser.parse_args())
    data, out = args.pop("data"), args.pop("out")
    programs = rows.read(data, require=("completion",))
    for row in programs:
        if not isinstance(row["completion"], str):
            rows.fail(f"{row['__at__']}: completion must be a string")
    with rows.open_part(out) as part:
        part.seek(0)
        done = {str(json.loads(line)["id"]) for line in part}
        left = [row for row in programs if str(row["id"]) not in done]
        words, total, longest = collections.Counter(), 0.0, []
        with tqdm(total=len(programs), initial=len(done), unit=" programs", desc="sandbox") as bar:
            try:
                for verdict in judge(left, **args):
                    rows.append(part, verdict)
                    words[verdict["verdict"]] += 1
                    total += verdict["reward"] or 0.0
                    longest = slowest([*longest, verdict])
                    mean = f"{total / max(1, words.total() - words['infra']):.4f}"
                    bar.set_postfix(mean_reward=mean, refresh=False)
                    bar.update()
            except RuntimeError as error:
                rows.fail(error)
    counts = ", ".join(f"{count} {word}" for word, count in words.most_common())
    print(f"{out}: {words.total()} new verdicts ({counts}), mean reward "
          f"{total / max(1, words.total() - words['infra']):.4f}\n{about(longest)}")


if __name__ == "__main__":
    import rows
    from tqdm import tqdm
    main()
