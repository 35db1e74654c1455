"""The sandbox against real solutions, hostile programs and honest ones. Nothing here needs root or a network.

    pytest tests/test_sandbox.py                # SLOW=1: with the sets whole, of which it else runs a part
    RUNTIME=podman IMAGE=/path/to/a/root/file/system pytest tests/test_sandbox.py
"""
# ruff: noqa: E501
import collections
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "tests/data"
sys.path.insert(0, str(REPO))
import sandbox  # noqa: E402
from sandbox import host  # noqa: E402
from sandbox.runtimes import NOBODY  # noqa: E402

RUNTIME = {"runtime": os.environ.get("RUNTIME", "auto"), "image": os.environ.get("IMAGE", "python:3.11-slim")}
SHORT = {"test_cpu": 1.0, "cpu": 3.0, "test_wall": 2.0, "wall": 5.0 + os.getpid() / 1e8, "memory": 512}  # no other's
TIGHT = {**SHORT, "test_cpu": 0.5, "cpu": 1.5, "test_wall": 1.0}  # for programs of which many go on to the limit
NODES = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next
class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right
def list_node(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head
def same(a, b):
    while a and b:
        if a.val != b.val:
            return False
        a, b = a.next, b.next
    return a is b
"""
# The function asked for is x -> 31 x + 7. No hostile program computes it, so a reward above 0 is a forgery.
ASKED = "def check(candidate):\n" + "".join(f" assert candidate({x}) == {31 * x + 7}\n" for x in (3, -2, 100, 5))


def works():
    """The runtime that these tests run with, or None."""
    try:
        return host.choose(*RUNTIME.values(), "sortedcontainers")
    except RuntimeError:
        return None


# Landlock does not hide names: there a program may see that a file exists; chmod and utime succeed and do nothing;
# and where only root can read this Python, programs run by root's name
NAMED = works() != "landlock"
pytestmark = pytest.mark.skipif(not works(), reason="no sandbox runtime works on this machine")


def some(rows, step):
    """Every so manieth of a large set; all of it with SLOW=1."""
    return list(rows) if os.environ.get("SLOW") == "1" else list(rows)[::step]


def row(name, program, test=ASKED, preamble="", entry_point="f"):
    return {"id": name, "completion": f"```python\n{program}\n```", "test": test, "preamble": preamble,
            "entry_point": entry_point}


def verdicts(rows, **limits):
    return {verdict["id"]: verdict for verdict in sandbox.judge(rows, **RUNTIME, **limits)}


def dataset(path, column):
    with gzip.open(DATA / path, "rt") as file:
        rows = [json.loads(line) for line in file]
    return [{"id": r["task_id"], "fenced": False, "test": r["test"], "entry_point": r["entry_point"],
             "preamble": r["prompt"], "completion": r[column]} for r in rows]


# ---- real solutions ----

LEETCODE = "leetcode/LeetCodeDataset-v0.3.1-test.jsonl.gz"
MINUTES = {  # these two need a minute of CPU
    "find-the-number-of-subsequences-with-equal-gcd", "maximum-number-of-moves-to-kill-all-pawns"}


@pytest.mark.parametrize("path, column, count", [
    (LEETCODE, "completion", 228), ("humaneval/HumanEval.jsonl.gz", "canonical_solution", 164)])
def test_canonical_solutions(path, column, count):
    rows = dataset(path, column)
    assert len(rows) == count
    got = verdicts(some(sorted(rows, key=lambda r: r["id"] not in MINUTES)[::-1], 5))
    assert [v for v in got.values() if v["reward"] != 1] == []
    assert len(got) >= count // 5


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; SLOW=1 runs it")
@pytest.mark.parametrize("column", ["completion", "response"])
def test_verdicts_do_not_depend_on_load(column):
    """The same verdicts on an idle machine and with two busy processes a core beside."""
    rows = [row for row in dataset(LEETCODE, column) if row["id"] not in MINUTES][::3]
    idle, others = verdicts(rows), []
    try:
        others += [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * sandbox.cores())]
        loaded = verdicts(rows)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert len(idle) == 76 and without_seconds(loaded) == without_seconds(idle)


def without_seconds(got):
    return {name: {**verdict, "seconds": 0} for name, verdict in got.items()}


# ---- hostile programs: in each, f is what the tests call ----

def in_call(code, at_import=""):
    body = "".join(f"    {line}\n" for line in code.strip("\n").split("\n"))
    return f"import builtins, ctypes, gc, json, os, signal, sys, threading, time\n{at_import}\ndef f(x):\n{body}"


def at_import(code):
    return in_call("return 0", code)


LIAR = """
class Liar{base}:
    __eq__ = __le__ = __ge__ = __contains__ = lambda self, other: True
    __ne__ = __lt__ = __gt__ = lambda self, other: False
    __hash__ = lambda self: 0
    __bool__ = lambda self: True
    __class__ = int
    __iter__ = lambda self: iter([self])
"""
EXITS = {"sys.exit": "sys.exit(0)", "SystemExit": "raise SystemExit(0)", "os._exit": "os._exit(0)",
         "abort": "os.abort()", "KeyboardInterrupt": "raise KeyboardInterrupt", "GeneratorExit": "raise GeneratorExit",
         "execv": "os.execv('/bin/true', ['true'])", "kill itself": "os.kill(os.getpid(), 9); os._exit(0)",
         "raw exit": "ctypes.CDLL(None).exit(0)", "segfault": "ctypes.string_at(0)",
         "thread exit": "ctypes.CDLL(None).syscall(60, 0)", "BaseException": "class B(BaseException): pass\nraise B",
         "AssertionError": "raise AssertionError", "StopIteration": "raise StopIteration"}
FORGED = """
import itertools
good = json.dumps({"passed": 4, "total": 4, "verdict": "pass", "detail": "", "wall": False}).encode() + b"\\n"
reports = [good, b"\\x04\\0\\0\\0....\\n", b"....", b"+", b"ready\\n", b'\\0\\0\\0\\x10["value", [true]]', b"\\xff" * 9]
for fd, report in itertools.product(range(256), reports):
    try:
        os.write(fd, report)
    except OSError:
        pass
"""
PEEK = """
seen, secret = set(), "assert " + "candidate"
def look(thing, depth=0):
    if id(thing) in seen or depth > 6:
        return
    seen.add(id(thing))
    if isinstance(thing, (str, bytes)) and (secret in str(thing) or "cand" "idate(3) ==" in str(thing)):
        raise LookupError("the tests are here")
    for inner in gc.get_referents(thing):
        look(inner, depth + 1)
frame = sys._getframe()
while frame:
    for thing in (frame.f_locals, frame.f_globals):
        look(dict(thing))
    frame = frame.f_back
for thing in gc.get_objects() + list(sys.modules.values()):
    look(thing)
"""
HOSTILE = {
    **{f"{name} at import": at_import(code) for name, code in EXITS.items()},
    **{f"{name} in the call": in_call(code) for name, code in EXITS.items()},
    **{f"lying {base}": in_call(f"return {make}", LIAR.format(base=f"({base})" if base else ""))
       for base, make in {"": "Liar()", "int": "Liar(3)", "str": "Liar('a')", "float": "Liar(1)", "list": "Liar()",
                          "dict": "Liar()", "tuple": "Liar()", "set": "Liar()", "bytes": "Liar()",
                          "Exception": "Liar()", "type": "Liar('L', (), {})"}.items()},
    "lying inside a list": in_call("return [[Liar()]]", LIAR.format(base="")),
    "lying class": in_call("return type('ListNode', (), {'__eq__': lambda a, b: True})()"),
    **{value: in_call(f"return {value}") for value in ("float('nan')", "None", "NotImplemented", "f", "sys", "...")},
    "forged verdicts at import": at_import(FORGED), "forged verdicts in the call": in_call(FORGED),
    "forged verdicts, then exit": in_call(FORGED + "os._exit(0)"),
    "forged on stdout": in_call("print('....\\n4 passed\\nok\\n{\"passed\": 4}', flush=True)\nos._exit(0)"),
    "peeking": in_call(PEEK),
    "patched builtins": at_import("for n in dir(builtins):\n if n[0].islower() and n not in ('id', 'type'): "
                                  "setattr(builtins, n, lambda *a, **k: True)"),
    "patched json": at_import(
        "json.dumps = lambda *a, **k: '[\"value\", [true, null], []]'\njson.loads = lambda *a, **k: 1"),
    "patched main": at_import("for n, v in list(vars(sys.modules['__main__']).items()):\n"
                              " if callable(v): setattr(sys.modules['__main__'], n, lambda *a, **k: True)"),
    "patched modules": at_import("sys.modules.clear(); sys.path.clear()\ntime.time = time.monotonic = lambda: 0"),
    "tracing": at_import("sys.settrace(lambda *a: os._exit(0)); sys.setprofile(lambda *a: os._exit(0))"),
    "audit hook": at_import("def h(*a): raise SystemExit\nsys.addaudithook(h)"),
    "atexit": at_import("import atexit; atexit.register(os._exit, 0); sys.exit(0)"),
    "rewritten frame": in_call(
        "frame = sys._getframe(1)\nframe.f_locals.update(x=0, value=38, message='[\"value\", [1, null], []]')\n"
        "ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), 0)\nreturn 0"),
    "fork and return": in_call("if os.fork(): time.sleep(100)\nreturn 0"),
    "fork bomb": at_import("while True:\n try: os.fork()\n except OSError: pass"),
    "thread bomb": at_import(
        "def g():\n while True:\n  try: threading.Thread(target=g).start()\n  except RuntimeError: pass\ng()"),
    "memory bomb": at_import("a = []\nwhile True: a.append('x' * 10 ** 7)"),
    "memory in one go": in_call("return bytearray(1 << 40)"),
    "memory again and again": in_call(
        "a = []\nwhile True:\n try: a.append(bytearray(1 << 20))\n except MemoryError: pass"),
    "disk bomb": at_import("def g(n):\n with open(f'/tmp/{n}', 'wb') as o:\n  while True: o.write(b'x' * 65536)\n"
                           "n = 0\nwhile True:\n n += 1\n try: g(n)\n except OSError: pass"),
    "inode bomb": at_import("n = 0\nwhile True:\n n += 1\n try: os.mkdir(f'/tmp/{n}')\n except OSError: pass"),
    "descriptor bomb": at_import("a = []\nwhile True:\n try: a.append(os.pipe())\n except OSError: pass"),
    "printing for ever": at_import("while True: print('x' * 65536)"),
    "large value": in_call("return ['x' * (20 << 20)]"), "large string": in_call("return 'x' * 10 ** 8"),
    "endless generator": in_call("def g():\n while True: yield 1\nreturn g()"),
    "deep value": in_call("v = []\nfor _ in range(10 ** 5): v = [v]\nreturn v"),
    "rather deep value": in_call("v = 7\nfor _ in range(300): v = [v]\nreturn v"),
    "value in a ring": in_call("v = []; v.append(v); return v"),
    "recursion": in_call("return f(x)"),
    "recursion without limit": in_call("sys.setrecursionlimit(10 ** 9)\nreturn json.dumps(v) if 0 else f(x)"),
    "C recursion": in_call("v = []\nfor _ in range(10 ** 7): v = [v]\ndel v\nreturn repr(0)"),
    "endless loop at import": at_import("while True: pass"), "endless loop": in_call("while True: pass"),
    "sleep": in_call("time.sleep(10 ** 6)"),
    "naps": in_call("while True: time.sleep(0.01)"),
    "ignored signals": in_call("for n in set(range(1, 65)) - {9, 19, 32, 33}: signal.signal(n, lambda *a: None)\n"
                               "while True: pass"),
    "raised limits": in_call("import resource\nfor n in range(16):\n try: resource.setrlimit(n, (-1, -1))\n"
                             " except Exception: pass\nwhile True: pass"),
    "regex": in_call("import re\nreturn re.match('(a*)*b', 'a' * 40)"),
    "long arithmetic": in_call("return 7 ** 10 ** 9"),
    "stopped": in_call("os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: time.sleep(1)"),
    "closes all": in_call("os.closerange(0, 256)\nreturn 0"),
    "reads the calls": in_call(
        "while True:\n for fd in range(3, 12):\n  try: os.read(fd, 1 << 16)\n  except OSError: pass"),
    "answers twice": in_call(
        "for fd in range(3, 12):\n try: os.write(fd, b'\\0\\0\\0\\x16' + b'[\"value\",[100,null],[]]')\n"
        " except OSError: pass\nreturn 0"),
    **{f"bytes {name}": in_call(f"m = {body}\nfor fd in range(3, 12):\n"
                                " try: os.write(fd, len(m).to_bytes(4, 'big') + m)\n"
                                " except OSError: pass\nwhile True: time.sleep(1)") for name, body in {
        "too long": "b'x' * 0", "not JSON": "b'{'", "not UTF-8": "b'\\xff' * 9", "a list": "b'[]'", "null": "b'null'",
        "deep": "b'[' * 50000", "bad tag": "b'[\"value\", [{\"eval\": \"1\"}, null], []]'",
        "bad object": "b'[\"value\", [{\"object\": -1}, null], []]'",
        "bad class": "b'[\"value\", [{\"object\": 0}, null], [[0, \"__judge__\", [], []]]]'",
        "two tags": "b'[\"value\", [{\"set\": [], \"list\": []}, null], []]'",
        "bad number": "b'[\"value\", [{\"given\": 9}, null], []]'", "bad change": "b'[\"value\", [1, [[0, 5]]], []]'",
        "no tag": "b'[\"value\", [{}, null], []]'", "bad key": "b'[\"value\", [{\"dict\": [[[]], [1]]}, null], []]'",
        "ready": "b'[\"ready\", [], []]'", "error": "b'[\"error\", [1, 2], []]'",
        "long int": "b'[\"value\", [' + b'9' * 9999 + b', null], []]'"}.items()},
    "syntax error": "def f(x) return 0", "null byte": "def f(x): return '\0'",
    "surrogate": "def f(x): return '\ud800' and 0",
    "no function": "g = 0", "not a function": "f = 3", "deep source": "f = " + "(" * 5000 + ")" * 5000,
    "unary bomb": "f = " + "-" * 200000 + "1",
}
ODD = {
    "no code": {"completion": "I do not know."},
    "empty": {"completion": ""},
    "not closed": {"completion": "```python\ndef f(x):\n    return 31 * x + 7\n"},
    "another language": {"completion": "```c\nint f(int x) { return 31 * x + 7; }\n```"},
}
HONEST = row("honest", "def f(x):\n    return 31 * x + 7")


def leftovers():
    """Workers with the limits of these tests, shared-memory segments and files that a program could leave behind.

    Programs run as nobody where this is root: what others do in /dev/shm meanwhile does not count.
    """
    users = {os.getuid() or NOBODY, NOBODY}
    segments = Path("/proc/sysvipc/shm")
    shm = segments.read_text().count("\n") if segments.exists() else 0
    files = [name for name in os.listdir("/dev/shm") if owner(f"/dev/shm/{name}") in users]
    mine = f'"wall": {SHORT["wall"]}'.encode()
    boxes = [pid for pid in os.listdir("/proc") if pid.isdigit() and mine in cmdline(pid)]
    return {"shm": shm, "/dev/shm": files, "boxes": sorted(boxes)}


def owner(path):
    try:
        return os.stat(path).st_uid
    except OSError:
        return None


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def hostile():
    """All hostile programs in one run, an honest one after each; what there was before and after it."""
    rows = []
    for name, program in HOSTILE.items():
        rows += [row(name, program), row(("after", name), f"# {name!r}\ndef f(x):\n    return 31 * x + 7")]
    rows += [{**HONEST, "id": name, **change} for name, change in ODD.items()]
    before = leftovers()
    got = verdicts(rows, **TIGHT)
    time.sleep(0.5)
    return got, before, leftovers()


@pytest.mark.parametrize("name", list(HOSTILE) + list(ODD))
def test_hostile_program_scores_nothing(hostile, name):
    verdict = hostile[0][name]
    assert verdict["reward"] == 0 and verdict["passed"] == 0 and verdict["verdict"] != "infra", verdict


def test_neighbours_keep_their_verdicts(hostile):
    wrong = [v for name, v in hostile[0].items() if isinstance(name, tuple) and v["reward"] != 1]
    assert wrong == []
    assert len(hostile[0]) == 2 * len(HOSTILE) + len(ODD)


def test_nothing_is_left_behind(hostile):
    assert hostile[1] == hostile[2]


@pytest.mark.parametrize("name, word", [
    ("endless loop", "timeout"), ("sleep", "timeout"), ("memory in one go", "memory"),
    ("os._exit in the call", "killed"),
    ("large value", "output"), ("f", "wrong"), ("BaseException in the call", "exception"), ("None", "wrong"),
    ("no code", "no_code"), ("not closed", "no_code"), ("syntax error", "exception"), ("bytes not JSON", "output"),
    ("segfault in the call", "killed"), ("ignored signals", "timeout")])
def test_the_word_of_a_verdict_says_how_the_program_ended(hostile, name, word):
    assert hostile[0][name]["verdict"] == word


# ---- probes: programs that try what must not work and say what did; all must answer [] ----

IMPORTS = "import glob, mmap, socket, subprocess, multiprocessing\nsyscall = ctypes.CDLL(None).syscall\n"


def probe(attempts, setup=""):
    """A program that runs every attempt (an expression) and returns those that neither failed nor gave nothing."""
    return in_call(f"""
worked = []
for attempt in {attempts!r}:
    try:
        if eval(attempt, globals()) not in (-1, None, False, [], b""):
            worked.append(attempt)
    except Exception:
        pass
return worked""", IMPORTS + setup)


HOST_FILES = RUNTIME["runtime"] not in ("podman", "apptainer")  # those show the image's own, which are no secret
X86 = {"mount": 165, "umount": 166, "unshare user": 272, "setns": 308, "bpf": 321, "keyctl": 250, "add_key": 248,
       "ptrace": 101, "perf": 298, "userfaultfd": 323, "memfd": 319, "shmget": 29, "msgget": 68, "semget": 64,
       "mq_open": 240, "chroot": 161, "pivot_root": 155, "io_uring": 425, "clone3": 435, "open_tree": 428,
       "pidfd_open": 434, "fork": 57, "vfork": 58, "personality": 135, "process_vm_readv": 310, "name_to_handle": 303,
       "fanotify": 300, "kexec": 246, "x32 getpid": 0x40000027, "inotify": 294, "io_setup": 206, "execveat": 322,
       "landlock": 444, "memfd_secret": 447, "mount_setattr": 442}
PROBES = {
    "sockets": probe([f"socket.socket({family}, {kind}).fileno()" for family in range(0, 46) for kind in (1, 2, 3, 5)]),
    "connections": probe(["socket.create_connection(('1.1.1.1', 53), 1)", "socket.getaddrinfo('example.org', 80)",
                          "a.bind('\\0x') or 1", "a.connect('\\0x') or 1"],
                         "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"),
    "system calls": probe([f"syscall({number}, {flags}, 0, 0, 0, 0)" for number in X86.values() for flags in
                           (0, 0x10000000, 0x20000, 0x40000000)]) if os.uname().machine == "x86_64" else probe([]),
    "processes": probe(["os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "subprocess.run(['true'])",
                        "os.system('') == 0", "multiprocessing.Process(target=print).start() or 1",
                        "os.popen('echo x').read()", "os.forkpty()"]),
    "signals": probe(["os.kill(-1, 9) or 1", "os.killpg(1, 9) or 1", "os.kill(os.getppid() or 99, 0) or 1"]
                     + [f"os.kill({pid}, 0) or 1" for pid in range(2, 400)]),
    "secrets": probe([*(f"os.listdir('{path}')" for path in ("/proc", "/sys", "/home", "/root/.ssh", "/work", "/tmp",
                                                             "/dev/shm", "/mnt", "/boot", *["/var"] * HOST_FILES)),
                      *(f"open('{path}').read()" for path in ("/proc/self/mem", "/proc/1/environ", "/dev/mem",
                                                              "/dev/kmsg", *["/etc/passwd"] * HOST_FILES)),
                      "list(os.environ.keys() - {'HOME', 'LANG', 'TMPDIR'})", "sys.argv[2:]", *[f"os.stat({str(REPO)!r})"] * NAMED,
                      "glob.glob('/*/*.jsonl')", "glob.glob('/box/*.json*')"]),
    "writing": probe([*(f"open('{path}', 'w')" for path in ("/x", "/box/x", "/usr/lib/x", "/dev/x",
                                                            "/proc/x", "/dev/shm/x", os.__file__)),
                      *["os.chmod(os.__file__, 0o777) or 1", "os.utime(os.__file__) or 1"] * NAMED, "os.remove(os.__file__) or 1",
                      "os.mkdir('/x') or 1", "os.mknod('d', 0o20666, 0x101) or 1", "os.truncate(os.__file__, 0) or 1",
                      "os.open(os.__file__, os.O_TRUNC)", "os.chown(os.__file__, 0, 0) or 1",
                      "os.setxattr('.', 'user.x', b'x') or 1", "os.link(os.__file__, 'x') or 1"]),
    "escapes": probe(["os.listdir('up/home')", "os.listdir('root/work')", "os.listdir('up/proc')",
                      "os.chroot('.') or 1", "os.listdir(f'/proc/{os.getppid()}/cwd')", "os.listdir('../../../../home')"],
                     "import contextlib\nwith contextlib.suppress(OSError):\n"
                     " os.symlink('/../..', 'up')\n os.symlink('/', 'root')"),
    "descriptors": probe(["len(pipes) != 2", "not all(stat.S_ISFIFO(os.fstat(fd).st_mode) for fd in pipes)",
                          "os.fstat(0).st_rdev != 0x103", "os.write(pipes[0], b'x')", "os.read(pipes[1], 1)"],
                         "import fcntl, stat\ndef is_open(fd):\n try: return fcntl.fcntl(fd, fcntl.F_GETFD) >= 0\n"
                         " except OSError: return False\npipes = [fd for fd in range(3, 1024) if is_open(fd)]"),
    "rights": probe([f"os.setuid({0 if NAMED else 5}) or 1", f"os.setgid({0 if NAMED else 5}) or 1",
                     "os.setgroups([0]) or 1", "os.nice(-5)",
                     "os.sethostname(b'x') or 1", "time.clock_settime(0, 0) or 1",
                     "os.sched_setscheduler(0, 1, os.sched_param(1)) or 1",
                     "ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 1"]),
    "shared memory": probe(["ctypes.CDLL(None).shmget(7, 4096, 0o1777) >= 0", "os.memfd_create('x')",
                            "multiprocessing.shared_memory.SharedMemory('x', True, 64)"],
                            "import multiprocessing.shared_memory"),
}


@pytest.fixture(scope="module")
def probes():
    return verdicts([row(name, program, "def check(candidate):\n for x in [candidate(0)]:\n  assert x == [], x\n")
                     for name, program in PROBES.items()], **{**SHORT, "test_cpu": 5.0, "cpu": 9.0})


@pytest.mark.parametrize("name", PROBES)
def test_nothing_forbidden_works(probes, name):
    assert probes[name]["verdict"] == "pass", probes[name]


def test_no_program_reaches_the_next():
    """A program marks every place it can; the same worker then shows the next one nothing of it."""
    marks = in_call("return 31 * x + 7", """
open('mark', 'w').write('mark')
for module in list(sys.modules.values()):
    try: module.mark = 1
    except Exception: pass
builtins.mark = 1
os.environ['MARK'] = '1'
json.dumps.__globals__['mark'] = json.dumps.__defaults__ = None
text = b'ma' + b'rk' * 5000
keep = [bytes(text) for _ in range(500)]""")
    finds = in_call("""
found = os.listdir('.') + [m.__name__ for m in list(sys.modules.values()) if hasattr(m, 'mark')]
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
heap = ctypes.string_at(libc.sbrk(0) - (1 << 19), 1 << 19)
heap += b''.join(ctypes.string_at(page, 4096) for page in {id(o) & -4096 for o in gc.get_objects()})
return found + list(os.environ.keys() - {'HOME', 'LANG', 'TMPDIR'}) + [1] * bool(__import__('re').search(rb'ma(?:rk){50}', heap))""")
    # (they are distinct programs, so that none is answered from memory)
    rows = [row(n, (marks if n % 2 == 0 else finds) + f"# {n}", ASKED if n % 2 == 0 else
                "def check(candidate):\n assert candidate(0) == []") for n in range(10)]
    assert {v["verdict"] for v in verdicts(rows, workers=1).values()} == {"pass"}


# ---- the judge: forms of tests, and attacks on their logic ----

FORMS = {  # name: (program, body of check or the whole test, (passed, total))
    "several lines": ("def f(x): return x",
        " assert (\n  candidate(1)\n  == 1\n ), 'no'\n assert candidate(\n   x=2) == 2", (2, 2)),
    "partial credit": ("def f(x): return min(x, 2)",
        " assert candidate(0) == 0\n assert candidate(1) == 1\n assert candidate(2) == 2\n assert candidate(3) == 3\n"
        " assert candidate(4) == 4\n", (3, 5)),
    "exception counts once": ("def f(x): return 1 // x",
        " assert candidate(0) == 0\n assert candidate(1) == 1", (1, 2)),
    "dead from there": ("import os\ndef f(x): return x if x < 2 else os._exit(0)",
        " assert candidate(1) == 1\n assert candidate(2) == 2\n assert candidate(1) == 1\n x = 1\n"
        " assert x == 1", (1, 4)),
    "loop and tolerance": ("def f(x): return x / 3",
        " import math\n for n in range(9):\n  assert math.isclose(candidate(n), n / 3)\n"
        "  assert abs(candidate(n) * 3 - n) < 1e-9", (1, 1)),
    "helper": ("def f(x): return x",
        "def helper(f, x):\n assert f(x) == x\ndef check(candidate):\n helper(candidate, 1)\n"
        " helper(candidate, [2])", (2, 2)),
    "a call of check at the end": ("def f(x): return x", "def check(candidate):\n assert candidate(1) == 1\n\ncheck(f)", (1, 1)),
    "local helper": ("def f(x): return x", " def t(x):\n  assert candidate(x) == x\n t(1)\n t('a')", (2, 2)),
    "constant asserts": ("def f(x): return 0", " assert True\n assert candidate(1) == 1\n assert True, 'x'", (0, 1)),
    "no asserts": ("def f(x): return x", " if candidate(1) != 1:\n  raise ValueError", (1, 1)),
    "variables": ("def f(x): return x", " a = candidate(1)\n b = candidate(2)\n assert a == 1\n assert b == 2", (2, 2)),
    "variables fail": ("def f(x): return 1 // (x - 2)",
        " a = candidate(1)\n assert a == -1\n b = candidate(2)\n assert b == 2", (1, 2)),
    "expected exception": ("def f(x): raise ValueError('no')",
        " try:\n  candidate(1)\n  assert False and candidate\n except ValueError as e:\n"
        "  assert str(e) == 'no'", (1, 1)),
    "unexpected exception": ("def f(x): raise KeyError",
        " try:\n  candidate(1)\n  assert 0 * x\n except ValueError:\n  pass", (0, 1)),
    "by its own name": ("def f(x): return x", " assert candidate(1) == f(1)", (1, 1)),
    "mutated list": ("def f(x): x.sort(); x[0].append(9)",
        " a = [[3], [1]]\n inner = a[1]\n candidate(a)\n assert a == [[1, 9], [3]], a", (1, 1)),
    "mutated dict, set, keyword": ("def f(d, *, s): d[1] = 2; s.add(3)",
        " d, s = {}, {1}\n candidate(d, s=s)\n assert d == {1: 2} and s == {1, 3}", (1, 1)),
    "left as it was": ("def f(x): return x", " a = [1]\n b = a\n assert candidate(a) == [1]\n assert a is b", (2, 2)),
    "values": ("def f(x): return x",
        " import collections as c, fractions, decimal\n"
        " for v in [(1, [2]), {1: {'a': (2,)}}, {1, 2}, frozenset('ab'), b'\\xff', 1 + 2j, 2 ** 9000, 1e300, None,\n"
        "   '\xe9\\ud800\\0', c.deque([1]), c.Counter('aab'), range(3), fractions.Fraction(1, 3), {}, [[]],\n"
        "   {(1, 2): 3}, -0.0, True, float('inf'), decimal.Decimal('0.1'), bytearray(b'x')]:\n  w = candidate(v)\n"
        "  assert w == v and isinstance(v, type(w)), v", (1, 1)),
    "tuple is no list": ("def f(x): return (1, 2)", " assert candidate(0) == [1, 2]", (0, 1)),
    "generator": ("def f(x): yield from range(x)",
        " assert list(candidate(3)) == [0, 1, 2]\n assert candidate(2) == [0, 1]", (1, 2)),
    "map": ("def f(x): return map(str, x)", " assert list(candidate([1])) == ['1']", (1, 1)),
    "list nodes": ("def f(head):\n    out = None\n    while head:\n"
        "        head.next, out, head = out, head, head.next\n    return out",
        " assert same(candidate(list_node([1, 2, 3])), list_node([3, 2, 1]))\n"
        " assert same(candidate(head=list_node(list(range(5000)))), list_node(list(range(5000))[::-1]))\n"
        " assert candidate(None) is None", (3, 3)),
    "own list node": ("class ListNode:\n    def __init__(self, val): self.val, self.next = val, None\n"
        "def f(x): return ListNode(x)", " assert same(candidate(4), list_node([4]))", (1, 1)),
    "ring": ("def f(head):\n    slow = fast = head\n    while fast and fast.next:\n"
        "        slow, fast = slow.next, fast.next.next\n        if slow is fast: return True\n    return False",
        " a = list_node([1, 2, 3])\n assert candidate(a) is False\n a.next.next.next = a\n"
        " assert candidate(a) is True", (2, 2)),
    "same node": ("def f(root, p): return p",
        " p = TreeNode(5)\n root = TreeNode(1, p, TreeNode(5))\n assert candidate(root, p) is p\n"
        " assert candidate(root, p) is not root.right", (2, 2)),
    "changed nodes": ("def f(root): root.left.val = 8; root.right = None",
        " p = TreeNode(5)\n root = TreeNode(1, p, TreeNode(6))\n candidate(root)\n"
        " assert p.val == 8 and root.right is None", (1, 1)),
    "node with an eq": ("class ListNode:\n    __eq__ = lambda a, b: True\n    __bool__ = lambda a: True\n"
        "def f(x): return ListNode()",
        " assert candidate(1) == ListNode(1)\n assert same(candidate(1), list_node([1]))", (0, 2)),
    "node of nothing": ("def f(x):\n    n = ListNode(); vars(n).clear(); vars(n)['__class__'] = 1; return n",
        " assert same(candidate(1), list_node([1]))", (0, 1)),
    "all map": ("def f(x): raise StopIteration",
        " assert all(map(candidate, range(3)))\n assert not list(map(candidate, range(3)))\n"
        " assert sum(x != 3 for x in map(candidate, [1])) == 0", (0, 3)),
    "named after the trap": ("class StopIteration(Exception): pass\ndef f(x): raise StopIteration",
        " assert all(map(candidate, range(3)))", (0, 1)),
    "bare except": ("import os\ndef f(x): os._exit(0)",
        " try:\n  candidate(1)\n except:\n  pass\n else:\n  assert candidate(2)\n assert 1 + 1 == 2", (0, 2)),
    "endless test": ("def f(x): return 10 ** 18",
        " assert candidate(1)\n for n in range(candidate(1)):\n  assert n == n\n assert candidate(1)", (1, 3)),
    "exploding test": ("def f(x): return 10 ** 12",
        " assert candidate(1)\n assert [0] * candidate(1) == []\n assert candidate(2) == 10 ** 12", (2, 3)),
    "colliding keys": ("def f(x): return [n * (2 ** 61 - 1) for n in range(60000)]",
        " assert len(set(candidate(1))) == 1\n assert candidate(2) == 3", (0, 2)),
    "main block": ("import sys\ndef f(x): return x\nif __name__ == '__main__':\n    f(1)\n    sys.exit(f(0))",
        " assert candidate(1) == 1", (1, 1)),
    "prints": ("import sys\ndef f(x):\n"
        "    print('..', x, flush=True); sys.stderr.write('x'); sys.stdout.buffer.write(b'ok'); return x",
        " print(candidate(1))\n assert candidate(1) == 1", (1, 1)),
    "slow import": ("import time\nn = sum(range(10 ** 7))\ntime.sleep(0.5)\nimport asyncio, unittest, email\n"
        "def f(x): return x", " assert candidate(1) == 1", (1, 1)),
    "recursion near the limit": ("def f(n): return n and 1 + f(n - 1)", " assert candidate(985) == 985", (1, 1)),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10 ** 6)\ndef f(n): return n and 1 + f(n - 1)",
        " assert candidate(20000) == 20000", (1, 1)),
    "floats": ("def f(x): return [x / 3, float('inf'), -0.0, 1e-320]",
        " assert candidate(0.1) == [0.1 / 3, float('inf'), 0, 1e-320]\n import math\n"
        " assert math.copysign(1, candidate(1)[2]) == -1", (2, 2)),
    "large output": ("def f(n): return [[i, str(i)] for i in range(n)]",
        " assert candidate(200000) == [[i, str(i)] for i in range(200000)]", (1, 1)),
    "large input": ("def f(x): return sum(x)", " assert candidate([1] * 10 ** 6) == 10 ** 6", (1, 1)),
    "threads": ("from concurrent.futures import ThreadPoolExecutor\ndef f(n):\n"
        "    with ThreadPoolExecutor(4) as e: return list(e.map(abs, range(n)))",
        " assert candidate(9) == list(range(9))", (1, 1)),
    "asyncio": ("import asyncio\nasync def g(x): return x\ndef f(x): return asyncio.run(g(x))",
        " assert candidate(1) == 1", (1, 1)),
    "files": ("import tempfile\ndef f(x):\n    with tempfile.NamedTemporaryFile('w+') as t:\n"
        "        t.write(x); t.seek(0); return t.read()", " assert candidate('a') == 'a'", (1, 1)),
    "dataclass, future, enum": ("from __future__ import annotations\nfrom dataclasses import dataclass\nimport enum\n"
        "@dataclass\nclass P:\n    x: int\nclass E(enum.IntEnum):\n    A = 3\ndef f(x): return [P(x).x, E.A]",
        " assert candidate(1) == [1, 3]", (1, 1)),
    "state": ("n = 0\ndef f():\n    global n\n    n += 1\n    return n",
        " assert candidate() == 1\n assert candidate() == 2", (2, 2)),
    "method": ("class Solution:\n    def f(self, x, y=2): return x + y",
        " assert candidate(1) == 3\n assert candidate(x=1, y=1) == 2", (2, 2)),
    "goes on in the preamble": ("    return x", " assert candidate(3) == 3", (1, 1)),
}


@pytest.fixture(scope="module")
def forms():
    preambles = {"goes on in the preamble": NODES + "def f(x):\n    '''Give back x.'''\n"}
    rows = {name: row(name, program, test if "def check" in test else "def check(candidate):\n" + test,
                      preambles.get(name, NODES), "Solution().f" if name == "method" else "f")
            for name, (program, test, _) in FORMS.items()}
    to_the_limit = [rows.pop("endless test"), rows.pop("colliding keys")]
    return verdicts(to_the_limit, **TIGHT) | verdicts(rows.values(), **{**SHORT, "test_cpu": 3.0, "cpu": 6.0})


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_tests(forms, name):
    assert (forms[name]["passed"], forms[name]["total"]) == FORMS[name][2], forms[name]


def test_several_blocks_the_first_python_block_counts():
    answer = ("```text\ndef f(x): return 0\n```\n1.  ~~~Python\n    no\n\n   ```py\n   def f(x):\n"
              "       return 31 * x + 7\n   ```\n```python\nno\n```")
    bare = {"completion": "def f(x): return 31 * x + 7", "fenced": False}
    got = verdicts([{**HONEST, "completion": answer}, {**HONEST, "id": 2, **bare}])
    assert [v["reward"] for v in got.values()] == [1, 1]


FAULTY = [  # what is wrong with a row
    {"test": "def check(candidate) assert"}, {"test": "x = 1"}, {"preamble": "import no_such_module"},
    {"test": "def check(candidate):\n assert candidate(object()) == 1"},
    {"test": "def check(candidate):\n import no_such\n assert candidate(3) == 1"},
    {"test": "def check(candidate, other):\n assert candidate(3) == 1"},
    {"test": "def check(candidate):\n assert isclose(candidate(3), 1)"},
    {"test": "def check(candidate):\n yield candidate(3)"}, {"test": "def test_f(candidate):\n assert candidate(3) == 1"},
    {"solution": "def f(x): return 0", "completion": "```python\ndef f(x): return 1\n```"}]


def test_what_the_judge_cannot_judge_is_null():
    got = verdicts([{**HONEST, **change, "id": n} for n, change in enumerate(FAULTY)])
    assert [FAULTY[n] for n, v in got.items() if v["reward"] is not None or v["verdict"] != "infra"] == []
    assert len(got) == len(FAULTY)


def test_a_lost_worker_is_replaced(monkeypatch):
    """The host kills a worker in the middle of a program: the verdict is as if it had not."""
    asked, count = host.Worker.ask, collections.Counter()

    def ask(worker, *rest):
        count["asked"] += 1
        if count["asked"] in (2, 5):
            os.killpg(worker.process.pid, signal.SIGKILL)
        return asked(worker, *rest)
    monkeypatch.setattr(host.Worker, "ask", ask)
    got = verdicts([row(n, f"def f(x): return 31 * x + 7 + 0 * {n}") for n in range(9)])
    assert {v["verdict"] for v in got.values()} == {"pass"}
    assert count["asked"] in (10, 11)  # one of the two may have answered before it died


def test_equal_programs_run_once(monkeypatch):
    asked, count = host.Worker.ask, collections.Counter()
    monkeypatch.setattr(host.Worker, "ask", lambda *a: count.update(n=1) or asked(*a))
    got = list(sandbox.judge(({**HONEST, "id": n} for n in range(50)), **RUNTIME))
    assert sorted(v["id"] for v in got) == list(range(50)) and count["n"] == 1


def test_without_isolation_it_refuses(monkeypatch, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(HONEST) + "\n")
    line = [sys.executable, "tests/like_container.py", "--no-landlock", sys.executable, "-m", "sandbox",
            f"--data={tmp_path}/data.jsonl", f"--out={tmp_path}/out.jsonl"]
    done = subprocess.run(line, env={**os.environ, "PATH": ""}, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and "What may help" in done.stderr and "--unsafe" in done.stderr
    assert not (tmp_path / "out.jsonl").read_text()
    done = subprocess.run(line + ["--unsafe"], env={**os.environ, "PATH": ""}, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads((tmp_path / "out.jsonl").read_text())["reward"] == 1
    assert " programs/s, mean reward 1.0000" in done.stdout


def test_the_package_works_when_copied_alone(tmp_path):
    """With the standard library only (python -S), in a folder that holds nothing else."""
    shutil.copytree(REPO / "sandbox", tmp_path / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data.jsonl").write_text(json.dumps(HONEST) + "\n")
    line = [sys.executable, "-S", "-m", "sandbox", "--data=data.jsonl", "--out=out.jsonl", "--packages="]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text())["reward"] == 1
    line = [sys.executable, "-S", "-c", "from sandbox import judge; import sandbox; assert sandbox.judge is judge"]
    subprocess.run(line, cwd=tmp_path, check=True)


def test_killed_run_continues(tmp_path):
    """SIGKILL twice on the way: every row has one verdict in the end."""
    rows = [row(n, f"import time\ndef f(x): time.sleep(0.02); return 31 * x + 7 + 0 * {n}") for n in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    line = [sys.executable, "-m", "sandbox", f"--data={tmp_path}/data.jsonl", f"--out={tmp_path}/out.jsonl"]
    for after in (5, 12):
        run = subprocess.Popen(line, cwd=REPO, stderr=subprocess.DEVNULL)
        while not (tmp_path / "out.jsonl").exists() or (tmp_path / "out.jsonl").read_bytes().count(b"\n") < after:
            assert run.poll() is None
            time.sleep(0.02)
        run.kill()
        run.wait()
    with open(tmp_path / "out.jsonl", "a") as file:
        file.write('{"id": 29, "rew')  # what a kill in the middle of a write leaves
    subprocess.run(line, check=True, cwd=REPO, stderr=subprocess.DEVNULL)
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(v["id"] for v in got) == list(range(30)) and {v["reward"] for v in got} == {1}
