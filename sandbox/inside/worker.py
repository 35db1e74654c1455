"""A worker of the sandbox: the warm process in a container that runs programs against their tests,
one after another.

In: jobs on stdin, each as three numbers (sizes of the candidate's and of the judge's part,
patience) and the two parts, in JSON. Out: lines on stdout: a verdict (see Run.verdict); while a program
runs, a sign of life four times a second ("running" or "waiting"). host.py starts it, by __main__.py.

    supervisor (this process) --clone--> judge: runs the tests, compares, counts; stays for the same tests
              |                            |  ^   channel.py: arguments out, values back
              |                            v  |
              +-------------- clone -----> candidate: runs one program

Or one clone does both (together.py). Each clone has a session of its own, no capabilities, limits, a filter
on system calls, and the walls of namespaces.py or landlock.py. The supervisor never reads a job: each clone
takes its own part off the pipe. So a candidate's memory never held a test, nor anything of another program.
"""
import builtins
import contextlib
import gc
import json
import os
import platform
import select
import signal
import socket
import struct
import sys
import time

from .candidate import Candidate, run_candidate
from .confine import (LIBC, MACHINES, NoWalls, call_filter, module_space, set_limits, system, take,
                      wall_off)
from .judge import Judge, run_judge
from .landlock import Landlock
from .namespaces import Namespaces
from .tests import Tests
from .together import opened, run_together

TICK = 0.02  # s between two looks of the supervisor at its clocks
HELD = 0.125  # share of the time in which the kernel holds a program that counts as waiting
STAY = 0.1  # s on one core
SIGN = 0.25  # s between two signs of life
NICE = 5  # of a program that takes longer: behind the short ones, but a busy machine must not starve it
WORDS = {"w": "wrong", "e": "exception", "m": "memory", "o": "output", "k": "killed"}
WALLS = {"namespaces": Namespaces, "landlock": Landlock, "none": NoWalls}
WARM = """abc array bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq
    itertools json math numbers operator queue random re statistics string textwrap
    threading time typing""".split()


def rehearse(limits):
    """Run what clones will run: Python adapts code as it runs, and its clones then share what they
    would else adapt, and copy, each for itself.
    """
    job = {"preamble": "import math", "program": "def f(x, y):\n    return [x, y]", "entry_point": "f"}
    test = "def check(candidate):\n    assert candidate(x=1) == [1, 2.0]\n"
    replies, answer = os.pipe()
    for _ in range(20):
        candidate = Candidate(None, answer, limits)
        candidate.start(json.loads(json.dumps(job)))
        judge = Judge((None, replies, None), {}, Tests(test, "f"), limits)
        values = [judge.unpack_kept(0), [1, [2.0]], [], []]
        candidate.answer(*candidate.load(judge.dump("call", values)))
        judge.exchange(b"", values[1::2])
        exec(judge.tests.code, module_space())
    os.close(replies)
    os.close(answer)


def supervise(options):
    """The life of a worker: for each job on stdin two clones, and one line on stdout."""
    limits, isolated = options["limits"], options["walls"] != "none"
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, a program goes, not what started this
    del sys.argv[1:]  # programs look at it
    sys.path[:] = [path for path in sys.path[1:] if path.startswith(sys.base_prefix)] + options["path"]
    os.closerange(3, 1024)
    box = {"limits": limits, "isolated": isolated, "judge": None, "channel": None, "candidate": None,
           "together": options["way"] == "together", "cores": os.sched_getaffinity(0), "settled": 0.0}
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    if isolated and platform.machine() not in MACHINES:
        raise OSError(f"no list of system calls for {platform.machine()}: see REFUSED, LIMITED and MACHINES")
    walls = box["walls"] = WALLS[options["walls"]](options)
    os.fchdir(proc)  # it is hidden by now; this process looks at its clones there
    os.close(proc)
    system(LIBC.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    for name in WARM + options["warm"]:
        with contextlib.suppress(Exception):  # such as matplotlib's, if no folder is writable yet
            __import__(name)
    builtins.exit = builtins.quit = sys.exit  # as in an interactive Python, which contest programs rely on
    rehearse(limits)
    LIBC.mount, LIBC.capset  # looked up here, not in each clone
    os.environ.clear()
    os.environ.update(HOME="/tmp", LANG="C.UTF-8")
    set_limits(limits, isolated, walls.alone)
    box["filter"] = call_filter(options["walls"] == "landlock") if platform.machine() in MACHINES else None
    own_pid = os.getpid()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        while True:
            *sizes, patience = struct.unpack("IIf", take(12))
            os.write(1, one_program(box, *sizes, patience).encode() + b"\n")
            if time.monotonic() - box["settled"] > STAY:  # now the kernel may move it
                move(os.getpid(), box["cores"])
            os.waitpid(box["candidate"], 0)  # not before: the host need not wait for its end
    except EOFError:  # the host has no more, or has gone
        pass
    finally:
        if os.getpid() == own_pid:  # not a clone
            walls.remove()


def one_program(box, candidate_size, judge_size, patience):
    """The verdict of one program. Exits if a clone fails."""
    settle(box)
    box["walls"].renew()
    results, report = os.pipe()
    if box["together"]:
        pid = box["candidate"] = clone_side(
            box, [report], lambda: run_together(candidate_size, report, box["limits"]))
        sides = [pid]
    else:
        clone_both(box, candidate_size, judge_size, report)
        sides = [box["candidate"], box["judge"]]
    os.close(report)
    run = Run(sides, box, results, patience)
    run.watch()
    os.close(results)
    report = opened(run.data) if box["together"] else run.data.decode("ascii", "replace")
    verdict, kept = run.verdict(report)
    os.kill(box["candidate"], signal.SIGKILL)
    if not kept:
        end_judge(box)
    return verdict


def settle(box):
    """Stay on this core for a while, with all clones: judge and candidate take turns, and to wake another
    core costs more than a turn."""
    now = time.monotonic()
    if now - box["settled"] > STAY:
        box["settled"] = now
        for pid in filter(None, (os.getpid(), box["judge"])):
            move(pid, {LIBC.sched_getcpu()})


def move(thread, cores):
    with contextlib.suppress(OSError):  # it has ended, or no core may be chosen here
        os.sched_setaffinity(thread, cores)


def clone_both(box, candidate_size, judge_size, report):
    """Clone the candidate, and the judge that will report on it. No judge_size: its tests are those of the
    last, and so is the judge.

    That judge met only candidates that kept to the rules; any other costs the judge its life.
    """
    if judge_size:  # before the candidate, whose threads could use up the number of processes
        end_judge(box)
        box["channel"], theirs = socket.socketpair()
        box["judge"] = clone_side(box, [theirs.fileno()],
                                  lambda: run_judge(judge_size, theirs, box["limits"]), is_judge=True)
        theirs.close()
    requests, ask = os.pipe()
    replies, answer = os.pipe()
    box["candidate"] = clone_side(
        box, [requests, answer], lambda: run_candidate(candidate_size, requests, answer, box["limits"]))
    pipes = struct.pack("3i", ask, replies, report)
    box["channel"].sendmsg([b"+"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, pipes)])
    for pipe in (requests, ask, replies, answer):
        os.close(pipe)


def clone_side(box, keep, live, is_judge=False):
    """Clone a side, which keeps these descriptors and calls live(): its pid."""
    pid = box["walls"].clone(is_judge)
    if pid:
        return pid
    try:
        wall_off(box, is_judge)
        below = 3
        for pipe in sorted(keep):
            os.closerange(below, pipe)
            below = pipe + 1
        os.closerange(below, 256)
        live()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(0)


def end_judge(box):
    if box["judge"]:
        os.kill(box["judge"], signal.SIGKILL)
        os.waitpid(box["judge"], 0)
        box["channel"].close()
        box["judge"] = None


def exit_status(pid):
    """The exit status of a child that has closed its pipes; None if it still lives."""
    for _ in range(100):
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found:
            return found.si_status if found.si_code != os.CLD_EXITED else 0
        time.sleep(0.001)


class Run:
    """One program under test, as the supervisor watches it."""

    def __init__(self, sides, box, results, patience):
        self.limits, self.cores = box["limits"], box["cores"]
        self.sides = sides  # sides: pids of the candidate, and of a judge of its own
        self.results, self.patience = results, patience
        self.data = b""  # the judge's report
        self.stopped = ""  # why the candidate was stopped
        self.judge_stopped = False
        self.slow = False  # whether it was given a lower priority, which lasts
        self.waited = 0.0  # s in which neither side computed
        self.threads = 1  # of the candidate
        self.begun = self.clocks()

    def clocks(self):
        """Seconds: what both sides waited; CPU time of the candidate and of the judge, with all
        their threads."""
        return [self.waited, *(time.clock_gettime(~pid << 3 | 2) for pid in self.sides)]

    def waits(self):
        """The share of the time that counts as waiting. None where a thread runs or could run: a loaded
        machine's delay is no waiting of a program. Little where the kernel holds one, as for a disk."""
        states, threads = set(), [os.listdir(f"{pid}/task") for pid in self.sides]
        self.threads = len(threads[0])
        for thread in [f"{pid}/task/{name}" for pid, names in zip(self.sides, threads) for name in names]:
            with contextlib.suppress(OSError), open(f"{thread}/stat", "rb") as file:  # unless it has ended
                states.add(file.read().rpartition(b")")[2][1:2])
        return 0.0 if b"R" in states else HELD if b"D" in states else 1.0

    def watch(self):
        """Stop the program at its limits, until the judge is done. Say that it runs, every SIGN
        seconds."""
        os.set_blocking(self.results, False)
        poller = select.poll()
        for pipe in (self.results, 0):
            poller.register(pipe, 0)  # only its end is an event
        signed = seen = time.monotonic()
        first, last, waited = self.begun, self.begun, 0.0
        while True:
            events = dict(poller.poll(TICK * 1000))
            if 0 in events:  # the host has gone
                self.kill(*self.sides)
                sys.exit()
            more = self.read()
            if self.results in events:
                return
            now = time.monotonic()
            self.waited += (now - seen) * self.waits()
            seen, clocks = now, self.clocks()
            if more and not self.stopped:
                last = clocks
            why = self.over(last, clocks, "test_") or self.over(first, clocks, "") or self.impatient(clocks)
            if self.threads > self.limits["threads"] + 1:  # where the kernel does not count them
                why = "threads"
            if why and not self.stopped:  # the judge sees its pipe end, and reports the rest as failed
                self.stopped, last, first = why, clocks, clocks
                self.kill(*self.sides if why == "later" else self.sides[:1])
            elif why and why != "later":
                self.judge_stopped = True
                self.kill(self.sides[-1])
            if now - signed > SIGN:
                os.write(1, b"waiting\n" if self.waited - waited > SIGN / 2 else b"running\n")
                signed, waited = now, self.waited
                self.slow = True
                # Short programs first. And no clone can stop itself, so something else did if one is stopped.
                for pid in self.sides:
                    with contextlib.suppress(ProcessLookupError):
                        os.setpriority(os.PRIO_PGRP, pid, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
                    os.kill(pid, signal.SIGCONT)
                    for thread in os.listdir(f"{pid}/task"):  # they may take more than one core, and any
                        move(int(thread), self.cores)

    def over(self, then, now, scope):
        waited, *used = (b - a for a, b in zip(then, now))
        if sum(used) > self.limits[scope + "cpu"] or waited > self.limits[scope + "wall"]:
            return "timeout"
        return ""

    def impatient(self, now):
        return "later" if self.patience and sum(now) - sum(self.begun) > self.patience else ""

    def read(self):
        try:
            more = os.read(self.results, 1 << 16)  # all that a pipe holds
        except BlockingIOError:
            return b""
        self.data += more[:(1 << 20) - len(self.data)]
        return more

    def kill(self, *pids):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def verdict(self, report):
        """A line of a word, tests passed, all tests, seconds, whether the judge stays, and a detail; and
        whether it stays. For the host, which knows what to make of it: JSON would touch more memory."""
        used = self.clocks()
        seconds = sum(used[1:]) - sum(self.begun[1:]) + self.waited
        if self.stopped == "later":
            return "later 0 0 0 0 ", False
        report, _, fault = report.partition("?")
        codes, whole, detail = report[8:].partition("\n")
        leaves, detail = detail.startswith("!"), detail.removeprefix("!")
        cut = not whole and not fault and not self.judge_stopped and len(self.sides) == 2
        if cut and exit_status(self.sides[1]) in (None, 0, signal.SIGKILL):
            sys.exit("the judge was killed from outside")
        total = 0 if fault else int(report[:8] or "0", 16)
        codes = codes[:total].ljust(total, "k")
        word = WORDS.get(codes.replace(".", "")[:1], "pass") if total else "infra"
        if word == "infra":
            detail = fault.replace("\n", " ") or "the judge crashed"
        if word == "killed":
            word, how = self.death()
            detail = f"test {codes.index('k') + 1}: {how}"
        kept = not (self.stopped or self.slow or leaves) and word in ("pass", "wrong", "exception")
        return f"{word} {codes.count('.')} {total} {seconds:.3f} {kept:d} {detail}", kept

    def death(self):
        """(verdict, detail) of a candidate that has ended, or closed its pipes."""
        status = None if self.stopped else exit_status(self.sides[0])
        if self.stopped == "threads":
            return "killed", "too many threads"
        if self.stopped:
            return "timeout", "stopped"
        if status == signal.SIGKILL:  # nothing inside can do this
            sys.exit("the program was killed from outside; is there too little memory?")
        return "killed", f"signal {status}" if status else "exited"

