"""Ways out of the sandbox, to its judge or to its neighbours, that once worked. Nothing here needs root or a network.

    pytest tests/test_sandbox_breaches.py
"""
# ruff: noqa: E501
import json
import os
import subprocess
import sys
import time

import pytest
from test_sandbox import ASKED, NAMED, NODES, REPO, RUNTIME, SHORT, in_call, at_import, probe, row, some, verdicts, works

import sandbox
from sandbox import host
from sandbox.inside import worker

pytestmark = [pytest.mark.skipif(not works(), reason="no sandbox runtime works on this machine")]
RIGHT = "def f(x): return 31 * x + 7"


def honest(count):
    return [row(("honest", n), f"{RIGHT} + 0 * {n}") for n in range(count)]


# ---- signals and priorities ----

SIGNALS = {
    **{f"kill(0, {n})": f"os.kill(0, {n})" for n in (1, 2, 9, 10, 15, 19, 20, 21)},
    **{f"killpg {n}": f"os.killpg(os.getpgrp(), {n})" for n in (9, 19)},
    "killpg(0)": "os.killpg(0, 9)",
    "kill the parent": "os.kill(os.getppid(), 9)", "stop the parent": "os.kill(os.getppid(), 19)",
    "kill all": "os.kill(-1, 9)", "stop all": "os.kill(-1, 19)",
    "SIGIO to the group": "import fcntl\nfor fd in range(9):\n try:\n  fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpgrp())\n"
                          "  fcntl.fcntl(fd, 10, 9); fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC)\n except OSError: pass",
}


@pytest.mark.parametrize("place", ["import", "call"])
def test_signals_reach_no_other_process(place):
    make = at_import if place == "import" else in_call
    long = ASKED.replace("def check", f"TEXT = {'x' * 100_000!r}\ndef check")  # more than a pipe holds
    rows = [row(name, make(code), long) for name, code in SIGNALS.items()] + honest(20)
    begun = time.monotonic()
    got = verdicts(rows, **SHORT)
    assert len(got) == len(rows) and time.monotonic() - begun < 240
    assert [v for name, v in got.items() if isinstance(name, tuple) and v["reward"] != 1] == []
    assert [v for name, v in got.items() if isinstance(name, str) and v["reward"] != 0] == []


def test_priorities_are_out_of_reach():
    rows = [row(1, probe(["os.setpriority(os.PRIO_PGRP, 0, 19) or 1", "os.setpriority(os.PRIO_USER, 0, 19) or 1",
                          "os.sched_setaffinity(0, {0}) or 1", "os.sched_setscheduler(0, os.SCHED_BATCH, "
                          "os.sched_param(0)) or 1", "os.getsid(0) != os.getpid()", "os.getpgrp() != os.getpid()"]),
                "def check(candidate):\n assert candidate(0) == []")]
    assert verdicts(rows)[1]["verdict"] == "pass"


# ---- what the kernel counts for a user, or does not count at all ----

def test_descriptors_in_flight():
    hog = """
import socket
a, b = socket.socketpair()
socket.send_fds(a, [b'x'], [0] * 253)
time.sleep(1.5)"""
    got = verdicts([row(("hog", n), in_call(hog + f"\nreturn {n}")) for n in range(4)] + honest(200),
                   **{**SHORT, "workers": 4})
    assert [v for name, v in got.items() if v["reward"] != (name[0] == "honest")] == []


def test_no_message_carries_descriptors_and_no_thread_has_a_table_of_its_own():
    clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    without_files = 0x100 | 0x200 | 0x800 | 0x10000 | 0x40000  # CLONE_VM, FS, SIGHAND, THREAD, SYSVSEM
    attempts = ["socket.send_fds(a, [b'x'], [0])", "a.sendmsg([b'x'])", f"syscall({clone}, {without_files}, 0, 0, 0, 0)",
                "syscall(436, 200, 300, 2)", "a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20) or 1",
                "fcntl.fcntl(pipe[1], 1031, 1 << 20)", "syscall(278, pipe[1], 0, 0, 0)",
                "socket.socketpair(30, socket.SOCK_STREAM)", "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) + 1"]
    program = probe(attempts, "import fcntl\na, b = socket.socketpair()\npipe = os.pipe()\n")
    assert verdicts([row(1, program, "def check(candidate):\n assert candidate(0) == []")])[1]["verdict"] == "pass"


def test_a_thread_bomb_costs_no_worker(monkeypatch):
    started, popen = [], subprocess.Popen

    def counting(*args, **keywords):
        started.append(1)
        return popen(*args, **keywords)
    monkeypatch.setattr(subprocess, "Popen", counting)
    bomb = "import _thread\nwhile True: _thread.start_new_thread(time.sleep, (9,))"
    # (the tests differ, so that each has a judge of its own)
    rows = [row(n, at_import(bomb), ASKED + f" assert candidate({n}) == 1\n") for n in some(range(200), 4)]
    got = verdicts(rows, workers=1, **SHORT)
    assert {v["reward"] for v in got.values()} == {0} and len(started) == 1


ENDS = {
    "cpu limit": "resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
    "cpu limit of 0": "resource.setrlimit(resource.RLIMIT_CPU, (0, 0))\nwhile True: pass",
    "prlimit": "resource.prlimit(0, resource.RLIMIT_CPU, (0, 0))\nwhile True: pass",
    "prlimit by pid": "try: resource.prlimit(os.getpid(), resource.RLIMIT_CPU, (0, 0))\nexcept OSError: pass\n"
                      "while True: pass",
    "raw": "ctypes.CDLL(None).syscall(160, 0, (ctypes.c_long * 2)(0, 0))\nwhile True: pass",
    "SIGKILL": "try: os.kill(os.getpid(), 9)\nexcept OSError: pass\nreturn 0",
    "SIGKILL to the thread": "signal.pthread_kill(threading.get_ident(), 9)\nreturn 0",
    "SIGKILL by a timer": "event = (ctypes.c_int * 16)(0, 0, 9, 0)\ntimer = ctypes.c_int()\nlibc = ctypes.CDLL(None)\n"
                          "libc.syscall(222, 0, event, ctypes.byref(timer))\n"
                          "libc.syscall(223, timer, 0, (ctypes.c_long * 4)(0, 0, 0, 1000), None)\ntime.sleep(0.5)\nreturn 0",
    "SIGXCPU": "signal.signal(signal.SIGXCPU, signal.SIG_DFL)\nos.kill(os.getpid(), signal.SIGXCPU)\nreturn 0",
    "files": "resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))\nreturn 0",
    "memory": "resource.setrlimit(resource.RLIMIT_AS, (0, 0))\nreturn list(range(10 ** 7))",
    "file size": "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\nopen('a', 'w').write('x')\nreturn 0",
    "stack": "resource.setrlimit(resource.RLIMIT_STACK, (0, 0))\nreturn f(x)",
    "pending signals": "resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))\nreturn 0"}


def test_no_program_ends_itself_as_the_host_would(monkeypatch):
    """A program that ends like one whose worker was lost gets its 0 at once, not a null after three workers."""
    killed, kill = [], host.Worker.kill
    monkeypatch.setattr(host.Worker, "kill", lambda worker: killed.append(worker.job) or kill(worker))
    code = {name: f"import resource\n{text}" for name, text in ENDS.items()}
    rows = [row(name, in_call(text)) for name, text in code.items()]
    rows += [row(("import", name), at_import(text.replace("return", "x ="))) for name, text in some(code.items(), 4)]
    got = verdicts(rows, **{**SHORT, "test_cpu": 0.2, "cpu": 0.4})
    assert {name: v["reward"] for name, v in got.items() if v["reward"] != 0} == {}
    assert len(killed) <= 4 * sandbox.cores()


def test_threads_that_come_and_go_cost_the_supervisor_no_descriptors(monkeypatch):
    monkeypatch.chdir("/proc")
    threads = "import threading\nwhile True: threading.Thread(target=int).start()"
    other = subprocess.Popen([sys.executable, "-c", threads])
    try:
        run = worker.Run.__new__(worker.Run)
        run.sides = [other.pid]
        before = len(os.listdir("self/fd"))
        for _ in range(3000):
            run.waits()
        assert len(os.listdir("self/fd")) == before
    finally:
        other.kill()
        other.wait()


def test_no_program_makes_the_host_write_its_disks():
    # These would fail, if they reached the kernel
    sync = {"x86_64": 306, "aarch64": 267}[os.uname().machine]
    program = in_call(f"return [os.fsync(pipe), os.fdatasync(pipe), ctypes.CDLL(None).syscall({sync}, 99)]",
                      "pipe = os.pipe()[1]")
    assert verdicts([row(1, program, "def check(candidate):\n assert candidate(0) == [None, None, 0]")])[1]["reward"] == 1


# ---- marks for the next program, and channels to those beside ----

def test_flags_of_open_files_are_not_shared():
    marks = at_import("import fcntl\nfor fd in (0, 1, 2): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)")
    finds = in_call("import fcntl\nreturn [fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_APPEND | os.O_NONBLOCK) "
                    "for fd in (0, 1, 2)]")
    test = "def check(candidate):\n assert candidate(0) == [0, 0, 0]"
    rows = [row(n, (marks if n % 2 == 0 else finds) + f"# {n}", ASKED if n % 2 == 0 else test) for n in range(8)]
    assert [v["reward"] for _, v in sorted(verdicts(rows, workers=1).items())] == [0, 1] * 4


def test_no_locks_and_no_notes_on_shared_files():
    attempts = ["fcntl.flock(file, fcntl.LOCK_SH) or 1", "fcntl.lockf(file, fcntl.LOCK_SH) or 1",
                "fcntl.fcntl(folder, fcntl.F_NOTIFY, 1) or 1", "fcntl.fcntl(file, fcntl.F_SETLEASE, 0) or 1",
                "fcntl.fcntl(file, 1036, b'\\0' * 8) or 1"]
    program = probe(attempts, "import fcntl\nfile = open(os.__file__)\nfolder = os.open('.', os.O_RDONLY)\n")
    assert verdicts([row(1, program, "def check(candidate):\n assert candidate(0) == []")])[1]["verdict"] == "pass"


MARKS = [
    "open('a', 'w').write('x')", "os.mkdir('d')", "os.symlink('/', 's')", "os.chmod('.', 0o700)",
    "open('a', 'w').close(); os.remove('a')", "os.utime('.', (5, 5))", "os.mkfifo('f')",
    "open('a', 'wb').write(bytes(15 << 20))", "[os.mkdir(f'{n}') for n in range(900)]", "os.chmod('.', 0)",
    "[(os.mkdir('d'), os.chdir('d')) for n in range(700)]", "os.mkdir('d'); open('d/x', 'w'); os.mkdir('e', 0)"]


def test_the_folder_is_new_for_each_program():
    """One worker runs a program that leaves a mark, and then one that looks for marks; so for every mark.

    A program's folder is /tmp, or under Landlock one of its own, whose size nothing limits."""
    finds = in_call("s = os.stat('.')\nfree = os.statvfs('.').f_bavail * 4096 >> 20\n"
                    "return [os.listdir('.'), time.time() - s.st_mtime < 100]"
                    + " + [s.st_mode & 0o777, free]" * NAMED)
    test = "def check(candidate):\n assert candidate(0) == [[], True" + ", 0o777, 16" * NAMED + "]"
    rows = []
    for n, mark in enumerate(MARKS):
        rows += [row(("mark", mark), at_import(mark)), row(("find", mark), finds + f"# {n}", test)]
    got = verdicts(rows, workers=1)
    assert {name: v for name, v in got.items() if v["reward"] != (name[0] == "find")} == {} and len(got) == 2 * len(MARKS)


# ---- forging ----

APPROX = """
class Approx:
    def __init__(self, value, tol=1e-6): self.value, self.tol = value, tol
    def __eq__(self, other): return abs(self.value - getattr(other, 'value', other)) <= self.tol
    __hash__ = None
class Any:
    def __eq__(self, other): return True
"""
FORGERIES = {
    "the test's Approx": APPROX + "def f(x):\n a = Approx(0); a.tol = float('inf'); return a",
    "the test's Any": APPROX + "def f(x): return Any()",
    "in a list": APPROX + "def f(x): return [Any()]",
    "by its name alone": "class C: pass\nC.__name__ = C.__qualname__ = 'Any'\ndef f(x): return C()",
    "a class of the judge": "class C: pass\nC.__name__ = 'CandidateObject'\ndef f(x): return C()",
    "an exception of the test": "class Wrong(Exception): pass\ndef f(x): raise Wrong",
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
    "a callable": "def f(x): return f",
    "an iterator without end": "import itertools\ndef f(x): return itertools.repeat(100)",
}


def test_no_forgery_by_the_classes_of_the_test():
    test = (APPROX + "class Wrong(Exception): pass\nimport unittest.mock\ndef check(candidate):\n"
            " assert candidate(3) == Approx(100)\n assert Approx(100) == candidate(3)\n assert Any() == 1 and "
            "candidate(3) == 100\n assert [100] == candidate(3)\n try:\n  assert candidate(1) == 38\n"
            " except ZeroDivisionError:\n  pass")
    got = verdicts([row(name, program, test, NODES) for name, program in FORGERIES.items()])
    assert {name: (v["passed"], v["total"]) for name, v in got.items()} == dict.fromkeys(FORGERIES, (0, 5))


def test_no_value_that_a_program_returns_makes_its_verdict_null():
    """Where a right program would pass, one that returns what cannot be sent gets 0, compared or given back."""
    test = """
import collections, enum
class Close:
    def __init__(self, value): self.value = value
    def __eq__(self, other): return abs(self.value - other) < 1 if isinstance(other, (int, float)) else NotImplemented
Point, Number = collections.namedtuple("Point", "x y"), enum.IntEnum("Number", "ONE TWO")
def check(candidate):
    assert candidate(1) == Close(1.5)
    assert Close(1.5) == candidate(1)
    assert candidate(1) in [Number.ONE]
    assert candidate((1, 2)) == Point(1, 2)
    assert {1: candidate({2: 3})} == {1: collections.ChainMap({2: 3})}
    assert candidate(candidate(1)) == 1
    assert candidate([candidate(1)]) == [1] and str(candidate(1)) == "1"
"""
    codes = {"right": "return x", "f": "return f", "object": "return object()", "in a list": "return [f]",
             "iterator": "return iter([x])", "generator": "yield x", "error": "return ValueError(x)",
             "deep": "v = [7]\nfor _ in range(790): v = [v]\nreturn v", "UUID": "import uuid\nreturn uuid.UUID(int=3)"}
    got = verdicts([row(name, in_call(code), test) for name, code in codes.items()])
    assert {name: v["reward"] for name, v in got.items()} == {name: int(name == "right") for name in codes}


NODE = """
import contextlib, functools
class Node:
    def __init__(self, v): self.v = v
    def same(self, other): return self.v == other.v
    def __eq__(self, other): return type(other) is Node and self.same(other)
class Other: pass
class Remembers:
    def __init__(self, v): self.v = v
    @functools.cache
    def value(self): return self.v
    @functools.cached_property
    def twice(self): return 2 * self.v
    def __eq__(self, other): return self is other or type(other) is Remembers and other.value() == self.v
    def __hash__(self): return id(self)
class Bad(Exception):
    def code(self): return 1
"""
# Bytes to the judge, and then True for whatever it asks
RAW = """
import select
def answer(*message):
    for fd in range(3, 12):
        with contextlib.suppress(OSError):
            data = json.dumps(message).encode()
            os.write(fd, len(data).to_bytes(4, 'big') + data)
def reply(*message):
    answer(*message)
    while True:
        for fd in range(3, 12):
            with contextlib.suppress(OSError):
                if select.select([fd], [], [], 0.01)[0] and os.read(fd, 65536):
                    answer('value', [True, None, ''], [])
"""


METHODS = [
    "n = Node(0); n.same = lambda other: True; return n", "n = Node(0); vars(n)['same'] = abs; return n",
    "e = Bad(); e.code = lambda: 2; raise e", "n = Remembers(0); n.value = lambda: 1; return n",
    "n = Remembers(0); n.twice = 2; return n",
    "reply('value', [{'object': 0}, None, ''], [[0, 'Node', ['v'], [0]], [0, 'Other', ['same'], [{'there': 9}]]])",
    "reply('value', [{'object': 0}, None, ''], [[0, 'Node', ['same'], [{'there': 9}]]])"]


def test_no_instance_of_the_preamble_has_a_method_of_its_own():
    test = ("def check(candidate):\n assert candidate(1) == Node(1)\n try:\n  candidate(1)\n  assert False\n"
            " except Bad as e:\n  assert e.code() == 2\n assert Remembers(1) == candidate(1)\n"
            " assert candidate(1).twice == 2")
    honest = "calls.append(x)\nreturn Node(x) if len(calls) < 3 else Remembers(x)"
    rows = [row(program, in_call(program, RAW), test, NODE) for program in METHODS]
    got = verdicts([*rows, row("honest", in_call(honest, "calls = []"), test, NODE)], **SHORT)
    assert {name: (v["passed"], v["total"]) for name, v in got.items()} == dict.fromkeys(METHODS, (0, 4)) | {"honest": (3, 4)}


@pytest.mark.parametrize("name, value, names", [("__dataclass_fields__", {}, "(f.name for f in dataclasses.fields(p))"),
                                                ("__match_args__", (), "p.__match_args__")])
def test_no_instance_of_the_preamble_has_special_names_of_its_own(name, value, names):
    """Of those that a library or a test looks up in the instance."""
    preamble = "import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: int\n"
    test = f"def check(candidate):\n p = candidate(5)\n assert all(getattr(p, name) == 5 for name in {names})\n"
    rows = [row(1, in_call(f"p = Point(0)\nvars(p)[{name!r}] = {value!r}\nreturn p"), test, preamble),
            row(2, in_call("return Point(x)"), test, preamble)]
    assert {n: v["reward"] for n, v in verdicts(rows).items()} == {1: 0, 2: 1}


@pytest.mark.parametrize("code", ["x[0].append(x)", "x.append(x)", "for _ in range(400): x = [x]\nreturn x"])
def test_no_program_makes_a_ring_of_the_tests_lists_or_nests_them_for_a_null(code):
    test = "def check(candidate):\n x = [[1]]\n for _ in range(15): x = candidate(x) or x\n assert x == [[1]]"
    assert verdicts([row(1, in_call(code), test)])[1]["reward"] == 0


def test_no_failure_of_a_program_passes_for_the_rows_own():
    """A name that a failed test was to set, and a NameError that comes out of a future, are no null."""
    cell = ("def check(candidate):\n a = candidate(1)\n assert a == 1\n assert all(a == x for x in candidate([1]))")
    late = ("from concurrent.futures import ThreadPoolExecutor\ndef check(candidate):\n"
            " with ThreadPoolExecutor(1) as pool: future = pool.submit(candidate, 1)\n assert future.result() == 1")
    rows = [row("cell", in_call("if x == 1: raise ValueError\nreturn x"), cell), row("right", in_call("return x"), cell),
            row("late", in_call("raise NameError('x')"), late), row("import", in_call("raise ImportError('x')"), late)]
    got = {name: (v["passed"], v["total"]) for name, v in verdicts(rows).items()}
    assert got == {"cell": (0, 2), "right": (2, 2), "late": (1, 2), "import": (1, 2)}


def test_no_exception_ends_a_test_case_with_success():
    test = """
import unittest
def check(candidate):
    class Case(unittest.TestCase):
        def test(self): self.assertEqual(candidate(1), 38)
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert result.wasSuccessful()
"""
    rows = [row(1, in_call("import unittest\nraise unittest.SkipTest"), test),
            row(2, in_call("import unittest\nclass S(unittest.SkipTest): pass\nraise S"), test),
            row(3, in_call("return 31 * x + 7"), test),
            row(4, in_call("import unittest.case\nraise unittest.case._ShouldStop"), test)]
    assert {name: v["reward"] for name, v in verdicts(rows).items()} == {1: 0, 2: 0, 3: 1, 4: 0}


def test_no_exception_of_the_preamble_ends_a_loop_with_success():
    done = "class Done(StopIteration): pass\n"
    test = "def check(candidate):\n assert all(map(candidate, [1, 2]))\n"
    program = in_call("reply('error', [[['solution', 'Done']], [], {'dict': [[], []]}, None], [])", "import contextlib" + RAW)
    rows = [row(1, in_call("raise Done"), test, done), row(2, program, test, done), row(3, in_call("return x"), test, done)]
    assert {name: v["reward"] for name, v in verdicts(rows, **SHORT).items()} == {1: 0, 2: 0, 3: 1}


def test_what_tests_leave_running_meets_no_other_program(monkeypatch):
    test = """
import threading
def check(candidate):
    def again():
        while True: candidate(5)
    threading.Thread(target=again, daemon=True).start()
    assert candidate(1) == 38
"""
    rows = [row(n, f"{RIGHT} + 0 * {n}", test) for n in some(range(40), 3)]
    lost, read = [], host.Worker.read

    def reading(worker):
        try:
            return read(worker)
        except OSError as error:
            lost.append(error)
            raise
    monkeypatch.setattr(host.Worker, "read", reading)
    assert [v for v in verdicts(rows, workers=1).values() if v["reward"] != 1] == []
    assert lost == []


LEFT = {  # name: (a test that leaves something in its process, a program that finds or makes it, an honest one)
    "a module's list": ("import keyword\ndef check(candidate):\n assert len(keyword.kwlist) > 30\n assert candidate(keyword.kwlist) > 30",
                        "n = len(x); x.clear(); return n", "return len(x)"),
    "a module's attribute": ("import math\ndef check(candidate):\n assert candidate(math.pi) > 3.1\n math.pi = 3", "return x + 0", "return x"),
    "a timer": ("import signal\ndef late(*args): raise TimeoutError\ndef check(candidate):\n signal.signal(signal.SIGALRM, late)\n"
                " signal.setitimer(signal.ITIMER_REAL, 0.2)\n assert candidate(1) == 1", "return x + 0", "return x\ntime.sleep(0.4)"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_tests_leave_behind_meets_no_other_program(name):
    test, *codes = LEFT[name]
    in_calls = [in_call(codes[0]), in_call(*codes[1].split("\n"))]
    got = verdicts([row(n, program, test) for n, program in enumerate(in_calls)], workers=1)
    assert [got[n]["reward"] for n in (0, 1)] == [1, 1]


# ---- wrong programs ----

KEPT = {  # wrong programs whose fault is what they change or share: (program, body of check)
    "sorts what is given": ("def f(x): x.sort(); return x", " a = [[2], [1]]\n b = a[:]\n assert candidate(a) == [[1], [2]] and a == b"),
    "returns what is given": ("def f(x): return x", " a = [[1]]\n b = candidate(a)\n assert b == a and b is not a"),
    "copies too little": ("def f(x): return x[:]", " a = [[1]]\n b = candidate(a)\n b[0].append(2)\n assert a == [[1]]"),
}


def test_no_program_that_changes_or_shares_its_arguments_passes_for_one_that_does_not():
    rows = [row((name, right), "import copy\nfrom copy import deepcopy\ndef f(x): return sorted(deepcopy(x))" if right else program,
                "def check(candidate):\n" + test) for name, (program, test) in KEPT.items() for right in (False, True)]
    assert {name: v["reward"] for name, v in verdicts(rows).items()} == {(name, right): right for name in KEPT for right in (False, True)}


IDIOMS = {  # what follows asserts that `return 2` passes; it raises no ValueError, and is wrong for 5
    "expected exception": " try:\n  candidate(-1)\n  assert False\n except ValueError:\n  pass",
    "expected exception, else": " try:\n  candidate(-1)\n except ValueError:\n  pass\n else:\n  raise AssertionError",
    "trailing raise": " if candidate(5) != 10:\n  raise AssertionError('no')",
    "raise at the end": " try:\n  candidate(-1)\n except ValueError:\n  return\n raise AssertionError",
    "unittest": " import unittest\n t = unittest.TestCase()\n t.assertEqual(candidate(5), 10)",
    "unittest raises": " import unittest\n t = unittest.TestCase()\n with t.assertRaises(ValueError):\n  candidate(-1)",
    "unittest raises in a call": " import unittest\n unittest.TestCase().assertRaises(ValueError, candidate, -1)",
    "raises": " with raises(ValueError):\n  candidate(-1)",
    "helper of a helper": " outer(candidate, 5, 10)",
    "lambda helper": " same = lambda a, b: inner(a, b)\n same(candidate(5), 10)",
    "lambda helper with the candidate inside": " go = lambda: inner(candidate(5), 10)\n go()",
    "partial helper": " import functools\n go = functools.partial(outer, candidate)\n go(5, 10)",
    "asserting method": " Checker().same(candidate(5), 10)",
    "object that holds the candidate": " c = Checker(candidate)\n c.run()",
    "exception after the last assert": " x = candidate(5)\n {10: 1}[x]",
    "comprehension": " [inner(candidate(x), 2 * x) for x in (1, 5)]",
    "all of helpers": " any(outer(candidate, x, 2 * x) for x in (1, 5))",
    "map of helpers": " list(map(lambda x: outer(candidate, x, 2 * x), (1, 5)))",
    "loop of raises": " for x in (1, 5):\n  if candidate(x) != 2 * x:\n   raise ValueError(x)",
    "while": " x = 1\n while x < 6:\n  inner(candidate(x), 2 * x)\n  x += 1",
    "exec": " exec('assert candidate(5) == 10')",
    "assigned": " ok = inner(candidate(5), 10)",
    "walrus": " if (y := candidate(5)) != 10:\n  assert not y",
    "match": " match candidate(5):\n  case 10: pass\n  case _: raise AssertionError",
    "local def": " def go():\n  inner(candidate(5), 10)\n go()",
    "finally": " try:\n  pass\n finally:\n  inner(candidate(5), 10)",
    "sys.exit": " import sys\n if candidate(5) != 10: sys.exit(1)",
    "numpy-like": " Checker().close(candidate(5), 10, places=2)",
    "global helper by its own name": " by_name()",
    "decorator": " @Checker().now\n def _():\n  inner(candidate(5), 10)",
    "delete": " d = {10: 1}\n del d[candidate(5)]",
    "unpack": " (a,) = candidate(5),\n [10].remove(a)",
    "annotated": " x: int = [10].index(candidate(5))",
    "augmented": " x = 1\n x += {10: 1}[candidate(5)]",
    "assert in an else": " if candidate(5) == 10:\n  pass\n else:\n  assert False",
}
HELPERS = """
import contextlib
@contextlib.contextmanager
def raises(kind):
    try:
        yield
    except kind:
        return
    raise AssertionError
def inner(a, b):
    if a != b:
        raise AssertionError
def outer(f, x, y):
    inner(f(x), y)
def by_name():
    inner(f(5), 10)
class Checker:
    def __init__(self, f=None): self.f = f
    def same(self, a, b): assert a == b
    def close(self, a, b, places): assert abs(a - b) < 10 ** -places
    def run(self): outer(self.f, 5, 10)
    def now(self, function): function()
"""


@pytest.fixture(scope="module")
def idioms():
    rows = []
    for name, body in IDIOMS.items():
        test = f"{HELPERS}\ndef check(candidate):\n assert candidate(1) == 2\n{body}\n"
        right = "def f(x):\n if x < 0: raise ValueError\n return 2 * x"
        rows += [row(("wrong", name), "def f(x): return 2", test), row(("right", name), right, test)]
    return verdicts(rows)


@pytest.mark.parametrize("name", IDIOMS)
def test_every_statement_of_a_test_counts(idioms, name):
    assert idioms["right", name]["reward"] == 1, idioms["right", name]
    assert idioms["wrong", name]["reward"] < 1, idioms["wrong", name]


# ---- time ----

def test_honest_work_comes_first():
    """Endless programs, sleepers, and those that sleep most of the time stand before the honest ones in the file.

    All honest verdicts are there long before the first of the others could be.
    """
    codes = "pass", "time.sleep(0.5)", "time.sleep(0.02); sum(range(50000))"
    rows = [row((code, n), in_call(f"while True: {code}  # {n}")) for code in codes for n in range(3)]
    limits = {"test_cpu": 120.0, "cpu": 120.0, "test_wall": 120.0, "wall": 120.0}
    verdicts = sandbox.judge([*rows, *honest(30)], **RUNTIME, workers=1, **limits)
    first = [next(verdicts)["id"] for _ in range(30)]
    verdicts.close()
    assert {kind for kind, _ in first} == {"honest"}, first


def test_where_the_run_has_a_low_priority_already(tmp_path):
    """Programs that take long get a lower one than the run, or the lowest; not a higher one, which would need root."""
    program = row(1, in_call("sum(range(2 * 10 ** 7))\nreturn 31 * x + 7"))
    (tmp_path / "data.jsonl").write_text(json.dumps(program) + "\n")
    line = ["nice", "-n", "19", sys.executable, "-m", "sandbox", f"--data={tmp_path}/data.jsonl", f"--out={tmp_path}/out.jsonl",
            f"--runtime={RUNTIME['runtime']}", f"--image={RUNTIME['image']}"]
    subprocess.run(line, check=True, cwd=REPO)
    assert json.loads((tmp_path / "out.jsonl").read_text())["reward"] == 1


def test_what_the_kernel_holds_is_bounded():
    """A program can be where it neither computes nor sleeps (state D): here each call waits for all other CPUs."""
    number = {"x86_64": 324, "aarch64": 283}[os.uname().machine]
    program = in_call(f"call = ctypes.CDLL(None).syscall\nwhile True: call({number}, 1, 0, 0)")
    assert verdicts([row(1, program)], test_cpu=2.0, cpu=2.0, test_wall=0.2, wall=0.2)[1]["verdict"] == "timeout"


def test_endless_tests_hold_no_honest_work_up():
    test = ASKED + " for n in range(10 ** 18 if candidate(1) != 38 else 1):\n  assert n < 10 ** 18\n"
    rows = [row(n, f"def f(x): return {n}", test) for n in range(6)] + honest(20)
    begun, verdicts = time.monotonic(), sandbox.judge(rows, **RUNTIME, workers=1, test_cpu=60.0)
    first = [next(verdicts)["id"] for _ in range(20)]
    verdicts.close()
    assert all(isinstance(name, tuple) for name in first) and time.monotonic() - begun < 120


def test_a_sleeper_holds_no_worker_for_long():
    got = verdicts([row(n, in_call(f"while True: time.sleep(0.08); sum(range(50000))  # {n}")) for n in range(4)],
                   test_wall=1.0, workers=1)
    assert {v["verdict"] for v in got.values()} == {"timeout"}
    assert max(v["seconds"] for v in got.values()) < 6
