"""Run untrusted Python programs against their tests, without root, and say how many tests each one passes.

In: JSONL rows with id, completion (a model's answer: its first closed ```python block is the program; with
"fenced": false a text without a block is all program), preamble (imports and helper classes), test (Python with
`def check(candidate)`) and entry_point (an expression that names the function).
Out: JSONL rows with id, reward (passed / total), passed, total, verdict (pass, wrong, exception, timeout, memory,
output, killed, no_code; or infra with a null reward: the judge itself failed) and detail. A killed run continues
where it stopped.

    python sandbox.py --data=programs.jsonl --out=verdicts.jsonl

How it works, one worker a core:

    host --(jobs)--> supervisor: warm, in a container (bubblewrap, podman, apptainer or unshare) without network, host
     ^                  |        files or rights. It clones itself for every program and for every set of tests; each
     |                  |        clone has a pid and a mount namespace of its own, no capabilities, limits and a filter
     |                  |        on system calls.
     +---(verdict)------+--> judge: runs the tests; holds the expected values, compares, counts
                        |       |  ^   arguments out, values back: length-prefixed JSON, nothing but plain data
                        |       v  |
                        +--> candidate: runs the program

The supervisor never reads a job: each clone takes its own off the host's pipe. So a candidate's memory never held a
test, nor anything of another program. All it can give is the values of its calls; a test without a value is a test
failed. A judge stays for the next program with the same tests, unless the last one broke a rule.

A test is a statement at the top of `check` that asserts: a plain `assert`, or a loop, a `with` or a `try` with asserts
inside, or a call of a helper that asserts. `assert True` tests nothing and is not counted. A program that is stopped
(time, a crash) has failed the tests from there on; an exception fails its own test only.
"""
import ast
import builtins
import collections
import collections.abc
import contextlib
import ctypes
import decimal
import errno
import fractions
import functools
import gc
import json
import os
import platform
import random
import re
import resource
import select
import signal
import socket
import struct
import sys
import time
import types

if not sys.argv[-1].startswith("--worker="):  # the host's own: a worker stays small, for it is cloned for every program
    import hashlib, importlib.util, shutil, subprocess, tempfile, textwrap
    from multiprocessing.connection import wait
    from pathlib import Path

FLAGS = {  # name: (default, what it means); the limits travel to the workers
    "test_cpu": (15.0, "CPU seconds a program may use for one test (its import counts to the first)"),
    "cpu": (120.0, "CPU seconds a program may use for all its tests"),
    "test_wall": (10.0, "seconds a test may wait: wall time beyond 8 times the CPU time it used"),
    "wall": (60.0, "seconds all tests of a program may wait, counted in the same way"),
    "memory": (1024, "MiB of address space of a program"),
    "threads": (8, "threads a program may add to its first; it may never start a process"),
    "disk": (16, "MiB a program may write, all of it into an empty /tmp of its own"),
    "files": (64, "open files of a program, and a sixteenth of the files it may create"),
    "output": (16, "MiB of one value that a call returns"),
    "depth": (100, "levels of nesting of one value"),
}
LIMITS = {name: default for name, (default, _) in FLAGS.items()}
SLOWDOWN = 8  # a loaded machine may stretch a program's time by this much before wall time begins to count
TICK = 0.02  # s between two looks of the supervisor at its clocks
NOBODY = 65534
# All that a worker has: the order of sets is the same in each, and no clone has to look up C functions anew.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1", "LANG": "C.UTF-8"}
IMAGE, PACKAGES = "python:3.11-slim", "sortedcontainers"
RUNTIMES = ("bwrap", "podman", "apptainer", "unshare")
WORDS = {"w": "wrong", "e": "exception", "m": "memory", "o": "output", "k": "killed"}
WARM = """abc array bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq itertools
    json math numbers operator queue random re statistics string textwrap threading time typing
    sortedcontainers""".split()


# ---- values as plain data: both sides use these, neither trusts them ----

SCALARS = {type(None), bool, int, float, str}
CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque, "bytes": bytes,
              "bytearray": bytearray, "list": list}
ITERATORS = (collections.abc.Iterator, collections.abc.MappingView)  # run to their end before they are sent
MADE = {"range": (range, lambda value: [value.start, value.stop, value.step]),  # tag: (type, the arguments it takes)
        "complex": (complex, lambda value: [value.real, value.imag]),
        "Fraction": (fractions.Fraction, lambda value: [str(value)]),
        "Decimal": (decimal.Decimal, lambda value: [str(value)])}


def pack(value, note):
    """A value as JSON types: scalars and lists stand for themselves, all else is a dict of one tag.

    `note(object)` gives the number of an instance of a class of the preamble. TypeError for what is not plain data.
    """
    kind = type(value)
    if kind in SCALARS:
        return value
    if kind is list:
        return value if SCALARS.issuperset(map(type, value)) else [pack(item, note) for item in value]
    if isinstance(value, dict):
        return {"dict": [pack(list(value), note), pack(list(value.values()), note)]}
    for tag, container in [*CONTAINERS.items(), ("iterator", ITERATORS)]:
        if isinstance(value, container):
            return {tag: pack([*value], note)}
    for plain in (int, float, str):  # subclasses, such as those of IntEnum
        if isinstance(value, plain):
            return plain(value)
    for tag, (made, arguments) in MADE.items():
        if isinstance(value, made):
            return {tag: arguments(value)}
    if kind.__module__ == "solution" and hasattr(value, "__dict__"):
        return {"object": note(value)}
    raise TypeError(f"a value of type {kind.__name__} is not plain data")


def unpack(value, objects, depth):
    """The value that pack() packed. Raises an exception for whatever pack() does not write."""
    if depth < 0:
        raise ValueError("nested too deep")
    if type(value) is list:
        return value if SCALARS.issuperset(map(type, value)) else [unpack(item, objects, depth - 1) for item in value]
    if type(value) is not dict:
        return value
    (tag, body), = value.items()
    if tag == "object":
        return objects[body]
    body = unpack(body, objects, depth - 1)
    if type(body) is not list:
        raise ValueError("a tag without a list")
    if tag == "dict":
        return dict(zip(*body, strict=True))
    if tag == "iterator":
        return iter(body)
    return MADE[tag][0](*body) if tag in MADE else CONTAINERS[tag](body)


def dump(head, values, objects):
    """A message: [head, values packed, table of instances]. `objects` (instances both sides know, by number) grows."""
    number = {id(thing): index for index, thing in enumerate(objects)}
    table, queue = {}, []

    def note(thing):
        index = number.setdefault(id(thing), len(objects))
        if index == len(objects):
            objects.append(thing)
        if index not in table:
            table[index] = None
            queue.append(index)
        return index

    body = pack(values, note)
    while queue:  # not by recursion: a linked list may be long, or closed to a ring
        index = queue.pop()
        thing = objects[index]
        table[index] = [index, type(thing).__name__, pack(list(vars(thing)), note), pack([*vars(thing).values()], note)]
    return json.dumps([head, body, [table[index] for index in sorted(table)]])


def load(message, objects, space, depth):
    """(head, values) of a message. Instances are made without calling anything, of classes of `space` only."""
    head, body, table = json.loads(message)
    for index, name, _, _ in table:
        if type(index) is not int or not 0 <= index <= len(objects):
            raise ValueError("an instance out of order")
        if index == len(objects):
            cls = space[name]
            if type(cls) is not type or cls.__module__ != "solution":
                raise ValueError("not a class of the preamble")
            objects.append(object.__new__(cls))
    for index, _, names, fields in table:
        fields = [unpack(field, objects, depth) for field in fields]
        if len(names) != len(fields) or not all(type(name) is str for name in names):
            raise ValueError("names without fields")
        vars(objects[index]).clear()
        vars(objects[index]).update(zip(names, fields))
    return head, unpack(body, objects, depth)


def send(pipe, message):
    """Write one message: 4 bytes of length, then the bytes."""
    message = memoryview(len(message).to_bytes(4, "big") + message.encode())
    while message:
        message = message[os.write(pipe, message):]


def receive(pipe, limit):
    """Read one message. EOFError where the other side has ended; ValueError where it is too long or more follows."""
    data = os.read(pipe, 65536)
    size = int.from_bytes(data[:4], "big")
    if not data:
        raise EOFError
    if len(data) < 4 or size > limit:
        raise ValueError("no message, or too long")
    parts, left = [data[4:]], size + 4 - len(data)
    while left > 0:
        data = os.read(pipe, min(left, 1 << 20))
        if not data:
            raise EOFError
        parts.append(data)
        left -= len(data)
    if left < 0:
        raise ValueError("more than was asked for")
    return b"".join(parts)


# ---- the two sides: what runs in a clone ----

def module_space():
    """The namespace of a fresh module `solution` (dataclasses and pickle look it up in sys.modules)."""
    module = sys.modules["solution"] = types.ModuleType("solution")
    return vars(module)


def run_candidate(job, requests, replies, limits):
    """The candidate's clone: run the program, then answer call after call until killed."""
    space = module_space()
    try:
        try:
            parts = [compile(job[part], f"<{part}>", "exec", dont_inherit=True) for part in ("preamble", "program")]
        except SyntaxError:  # perhaps a program that goes on inside the preamble's last function
            parts = [compile(job["preamble"] + "\n" + job["program"], "<program>", "exec", dont_inherit=True)]
        for part in parts:
            exec(part, space)
        function = eval(job["entry_point"], space)
        if not callable(function):
            raise TypeError("the entry point is not callable")
    except BaseException as error:
        send(replies, failure(type(error).__name__, error))
        return
    send(replies, '["ready", [], []]')
    while True:
        objects = []
        mutable, (args, keywords) = load(receive(requests, 1 << 32), objects, space, 10 ** 6)
        try:
            value = function(*args, **keywords)
        except BaseException as error:
            message = failure(type(error).__name__, error)
        else:
            message = reply(value, [args, keywords] if mutable else None, objects, limits["output"] << 20)
            del value
        send(replies, message)


def failure(name, error):
    try:
        return json.dumps(["error", [name, str(error)[:200]], []])
    except BaseException:  # an exception class may break its own str()
        return json.dumps(["error", [name, ""], []])


def reply(value, arguments, objects, limit):
    """The message that carries a value back, or, where it is not plain data or too large, the reason."""
    try:
        message = dump("value", [value, arguments], objects)
        return message if len(message) <= limit else failure("Unsendable", "too large")
    except BaseException as error:  # memory, no plain data, or whatever a generator raises on the way
        return failure("Unsendable" if isinstance(error, TypeError) else type(error).__name__, error)


class Gone(BaseException):
    """The candidate can answer no more: what is not yet tested has failed. Not an Exception: no test may catch it."""


ITERATION_ENDS = (StopIteration, StopAsyncIteration)


class CandidateError(Exception):
    """The candidate raised something that has no plain counterpart here."""


def restore(old, new):
    """Give the judge's own argument the contents that the call left in the candidate's copy of it."""
    if type(old) is not type(new):
        return new
    if type(old) is list:
        old[:] = [restore(*pair) for pair in zip(old, new)] + new[len(old):]
    elif type(old) is dict:
        fresh = {key: restore(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(fresh)
    elif isinstance(old, (set, collections.deque)):
        old.clear()
        (old.update if isinstance(old, set) else old.extend)(new)
    elif type(old) is bytearray:
        old[:] = new
    elif type(old) is tuple and len(old) == len(new):
        for pair in zip(old, new):
            restore(*pair)
    else:
        return new
    return old


def expected_error(name, message):
    """The exception that a test sees where the candidate raised one: a built-in one of that name, or CandidateError.

    Never one that steers the judge: a StopIteration would end `all(map(candidate, ...))` early, and with success.
    """
    kind = getattr(builtins, name, None)
    steers = not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, ITERATION_ENDS)
    try:
        return (CandidateError if steers else kind)(message)
    except Exception:  # UnicodeDecodeError and the like want more arguments
        return CandidateError(message)


def split_tests(source, entry_point):
    """(code of a test module whose `check` reports each of its tests, number of tests). IndexError without a check."""
    tree = ast.parse(source)
    check = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"][-1]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node is not check]
    helpers = {function.name for function in functions if asserts(function)}
    names = {check.args.args[0].arg, entry_point}
    body, total = [], 0
    for statement in check.body:
        calls_helper = any(isinstance(node, ast.Name) and node.id in helpers for node in ast.walk(statement))
        is_test = not isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and (asserts(statement) or calls_helper)
        body.append(reported([statement], names) if is_test else statement)
        total += is_test
    if not total:
        body, total = [reported(check.body, names)], 1
    check.body = body
    return compile(ast.fix_missing_locations(tree), "<test>", "exec", dont_inherit=True), total


def asserts(node):
    return any(isinstance(inner, ast.Assert) and not isinstance(inner.test, ast.Constant) for inner in ast.walk(node))


def reported(statements, names):
    """The statements of one test, in a `with` that reports how it went. `names` stand for the candidate."""
    test, = ast.parse(f"with __judge__.test({any(mutable(part, names) for part in statements)}): pass").body
    test.body = statements
    return test


def mutable(test, names):
    """Whether a test could see that a call changed its arguments: not where they are all written out in the call."""
    nodes = list(ast.walk(test))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    makers = {id(call.func) for call in calls}  # list_node in candidate(list_node([1, 2])) is no variable
    inner = [node for call in calls if getattr(call.func, "id", "") in names for node in ast.walk(call)]
    return any(isinstance(node, ast.Name) and id(node) not in makers for node in inner) or any(
        isinstance(node, ast.Name) and node.id in names and id(node) not in makers for node in nodes)


class Judge:
    """The judge's end of the line: `call` stands in for the candidate, `test` is the context that each test runs in."""

    def __init__(self, space, requests, replies, report, total, limits):
        self.space, self.requests, self.replies, self.report = space, requests, replies, report
        self.total, self.limits = total, limits
        self.done = 0  # tests recorded
        self.gone = ""  # the code of why the candidate can answer no more
        self.detail = ""  # of the first test that failed
        self.test(True)

    def exchange(self, head, values):
        """Send a call (none where head is None), give back the reply. Without a proper one, Gone now and ever after."""
        if self.gone:
            raise Gone
        objects = []
        try:
            message = None if head is None else dump(head, values, objects)
        except (TypeError, RecursionError):
            self.fault = "i"  # the test passes what is not plain data, such as a function: not for us to judge
            raise
        try:
            if message:
                send(self.requests, message)
            kind, values = load(receive(self.replies, self.limits["output"] << 20), objects, self.space,
                                self.limits["depth"])
            expected = "ready" if head is None else "value"
            if kind != expected and not (kind == "error" and [type(text) for text in values] == [str, str]):
                raise ValueError("a reply out of order")
            return kind, values
        except BaseException as error:  # the process has ended, or sent bytes that are no proper reply
            self.gone = "k" if isinstance(error, (EOFError, BrokenPipeError)) else "o"
            raise Gone from None

    def call(self, *args, **keywords):
        """What a test calls as `candidate`."""
        kind, values = self.exchange(self.mutable, [args, keywords])
        if kind == "value":
            value, after = values
            if self.mutable:
                restore([args, keywords], after)
            return value
        name, text = values
        self.fault = {"MemoryError": "m", "Unsendable": "o"}.get(name, "e")
        self.why = name
        raise expected_error(name, text)

    def test(self, mutable):
        self.mutable, self.fault, self.why = mutable, "", ""
        return self

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        self.record("." if kind is None else self.fault or "w",
                    self.why or ("" if kind in (None, AssertionError) else kind.__name__))
        return True

    def record(self, code, why=""):
        """Report one test: a byte. Of the first that fails also why, as the name of a built-in exception: no text of a
        program or a test may reach the supervisor, whose memory every later program inherits."""
        code = self.gone or code
        if self.done < self.total:
            self.done += 1
            os.write(self.report, code.encode())
            if code != "." and not self.detail:
                self.detail = f"test {self.done}" + (f": {why}" if hasattr(builtins, why) and code not in "ko" else "")


def run_judge(size, channel, null, limits):
    """The judge's clone: judge one candidate after another against the same tests, until the supervisor ends it."""
    codes = None
    while pipes := socket.recv_fds(channel, 1, 3)[1]:
        requests, replies, report = pipes
        if os.read(replies, 1) != b"+":  # the candidate has not taken its own job yet
            return
        if codes is None:
            job, codes = json.loads(take(size)), ()
            silence(null)
        try:
            codes = codes or prepare(job)
            space = module_space()
            exec(codes[0], space)
            exec(codes[1], space)
        except BaseException as error:
            name = getattr(error, "name", "")
            text = f"the row's own preamble or test fails: {type(error).__name__} {name if type(name) is str else ''}"
            os.write(report, bytes(4) + b"\n" + text.encode()[:200])
        else:
            judge_one(Judge(space, requests, replies, report, codes[2], limits), job["entry_point"])
        for pipe in pipes:
            os.close(pipe)


def prepare(job):
    """(code of the preamble, code of the tests, number of tests)."""
    try:
        preamble = compile(job["preamble"], "<preamble>", "exec", dont_inherit=True)
    except SyntaxError:  # perhaps it ends at the head of the function that the program is to fill
        preamble = compile(job["preamble"] + "\n    pass", "<preamble>", "exec", dont_inherit=True)
    return preamble, *split_tests(job["test"], job["entry_point"])


def judge_one(judge, entry_point):
    """Report on one candidate: number of tests (4 bytes), a byte for each, a line break, the detail."""
    random.seed(0)  # tests that draw numbers draw the same for every program
    os.write(judge.report, judge.total.to_bytes(4, "little"))
    judge.space["__judge__"] = judge
    if entry_point.isidentifier():
        judge.space[entry_point] = judge.call  # some tests call the function by its own name
    code, why = "w", ""
    try:
        kind, values = judge.exchange(None, None)
        if kind == "error":
            code, why = "m" if values[0] == "MemoryError" else "e", values[0]
        else:
            judge.space["check"](judge.call)
    except BaseException as error:  # raised between the tests: those after it have failed
        code, why = judge.fault or "w", judge.why or type(error).__name__
    while judge.done < judge.total:
        judge.record(code, why)
    os.write(judge.report, b"\n" + judge.detail.encode())


# ---- a clone's walls (Linux, x86_64 and aarch64) ----

LIBC = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter lock, which a clone must inherit held
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_THREAD = 0x20000, 0x10000000, 0x20000000, 0x10000
CALLS = {"x86_64": (0xC000003E, 56), "aarch64": (0xC00000B7, 220)}  # audit's name of the machine, number of clone()
# System calls that no program needs, as numbers: processes, other processes, mounts and namespaces, sockets but for
# socketpair, memory that no limit counts (System V, memfd, keys, io, inotify, xattr), administration of the machine.
REFUSED = {
    "x86_64": """
        57 58 59 322 101 310 311 312 272 308 165 166 155 161 133 259 303 304 41 42 43 49 50 288 29 30 31 64 68
        240 319 248 249 250 206 209 253 254 294 300 301 188 189 190 256 279 216 321 298 323 317 175 313 176
        246 320 169 167 168 163 179 164 227 159 305 170 171 172 173 103 135 154 153 134 180 212""",
    "aarch64": """
        221 281 117 270 271 272 97 268 40 39 41 51 33 264 265 198 203 202 200 201 242 194 196 195 190 186 180
        279 217 218 219 0 2 26 27 262 263 5 6 7 238 239 234 280 241 282 277 105 273 106 104 294 142 224 225 89
        60 170 112 171 266 161 162 116 92 58 42 18""",
}
NO_CAPABILITIES = struct.pack("II", 0x20080522, 0)
NEWER, NEEDED = 424, (436, 439)  # numbers from 424 are the same everywhere: none but close_range, faccessat2


def system(result, what):
    """The result of a C call; OSError where it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def call_filter():
    """The seccomp program of a clone, ready for prctl(). Refused calls fail with EPERM, unknown ones with ENOSYS."""
    machine, clone = CALLS[platform.machine()]
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = ((give, 0, 0, code) for code in (
        0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS))
    rules = {0: [allow], NEWER: [unknown]}  # each holds from its number up to the next
    for number in NEEDED:
        rules |= {number: [allow], number + 1: [unknown]}
    for number in sorted(map(int, REFUSED[platform.machine()].split())):
        rules |= {number: [refuse], number + 1: [allow]}
    rules |= {clone: [(load, 0, 0, 16), (bits, 1, 0, CLONE_THREAD), refuse, allow], clone + 1: rules[clone + 1]}

    def search(rules):
        """By halves: the kernel tries a filter on every call there is when a clone installs it."""
        if len(rules) == 1:
            return rules[0][1]
        low, high = rules[:len(rules) // 2], rules[len(rules) // 2:]
        code = search(low)
        return [(at_least, len(code), 0, high[0][0]), *code, *search(high)]

    code = [(load, 0, 0, 4), (equal, 1, 0, machine), kill, (load, 0, 0, 0), *search(sorted(rules.items()))]
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer)))
    program.buffer = buffer  # keeps it alive
    return program


def clone(isolated):
    """fork(), into a new pid and mount namespace. The interpreter must have one thread only."""
    if not isolated:
        return os.fork()
    flags = CLONE_NEWPID | CLONE_NEWNS | signal.SIGCHLD
    return system(LIBC.syscall(CALLS[platform.machine()][1], flags, 0, 0, 0, 0), "clone")


def set_limits(limits, isolated):
    """Called once by the supervisor, for all clones. NPROC counts its user namespace: itself, two clones, threads."""
    values = {"AS": limits["memory"] << 20, "FSIZE": limits["disk"] << 20, "NOFILE": limits["files"], "CORE": 0}
    if isolated:
        values |= {"STACK": 64 << 20, "NPROC": limits["threads"] + 3, "MEMLOCK": 0, "SIGPENDING": 64, "MSGQUEUE": 0}
    for name, value in values.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    sys.setrecursionlimit(1050)  # the 1000 a program may count on, and what stands below it here


def wall_off(box, is_judge):
    """Called by a fresh clone before it takes its job: a /tmp of its own, no rights, few system calls."""
    if not is_judge:  # a judge serves many programs
        resource.setrlimit(resource.RLIMIT_CPU, box["seconds"])
    if box["isolated"]:
        system(LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", 6, box["disk"]), "mount of /tmp")  # 6: nosuid, nodev
        os.chdir("/tmp")
        system(LIBC.prctl(1, 9, 0, 0, 0), "PR_SET_PDEATHSIG")  # die with the supervisor
        system(LIBC.capset(NO_CAPABILITIES, bytes(24)), "capset")
    if box["filter"]:
        system(LIBC.prctl(22, 2, box["filter"], 0, 0), "seccomp")  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    gc.enable()


# ---- the supervisor: the warm process that a worker's container holds ----

def build_root(paths):
    """A root of binds of `paths`, pairs of (host's, here), where the container still shows the host's files."""
    system(LIBC.mount(b"none", b"/", None, 0x44000, None), "private mounts")  # MS_REC | MS_PRIVATE
    system(LIBC.mount(b"tmpfs", b"/sys", b"tmpfs", 6, b"mode=755"), "mount of a new root")  # /sys: no bind needs it
    for path, new in paths + [("/proc", "/proc")]:
        new = "/sys" + new
        if os.path.isdir(path):
            os.makedirs(new, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(new), exist_ok=True)
            open(new, "w").close()
        system(LIBC.mount(os.path.realpath(path).encode(), new.encode(), None, 0x5000, None), f"bind of {path}")
    os.makedirs("/sys/tmp")
    os.chdir("/sys")
    system(LIBC.pivot_root(b".", b"."), "pivot_root")
    system(LIBC.umount2(b".", 2), "umount")  # MNT_DETACH: the host's root, stacked on the new one
    os.chdir("/")


def lock_down(paths):
    """Give up what root the container has, then make its files read-only and hide /proc: for all clones to come."""
    if paths:
        build_root(paths)
    if os.getuid() == 0:
        with contextlib.suppress(OSError):  # this root may be but the name of an ordinary user, who has no other
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            LIBC.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
    user, group = os.geteuid(), os.getegid()
    system(LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    read_only = struct.pack("QQQQ", 3, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
    system(LIBC.syscall(442, -100, b"/", 0x8000, read_only, len(read_only)), "mount_setattr (needs Linux 5.12)")
    for path in ("/proc", "/sys"):
        if os.path.isdir(path):
            system(LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", 7, b"size=4k,nr_inodes=2"), f"hiding {path}")
    system(LIBC.prctl(4, 0, 0, 0, 0), "PR_SET_DUMPABLE")  # no core file of a clone, wherever the host sends those


def take(size):
    """Exactly `size` bytes of the host's pipe; exits where it has closed."""
    data = bytearray()
    while len(data) < size:
        data += os.read(0, size - len(data)) or sys.exit()
    return bytes(data)


def rehearse():
    """Run what clones will run: Python adapts code as it runs, in memory that clones then share instead of copy."""
    source, pipe = os.pipe()
    job = {"preamble": "import math", "test": "def check(c):\n assert c(1) == [1]", "entry_point": "f"}
    for _ in range(30):
        send(pipe, dump(True, [[1, "x", [2.0, [None]]], {"x": {1: (2, 3)}}], []))
        load(receive(source, 1 << 20), [], {}, 9)
        send(pipe, reply([1], None, [], 1 << 20))
        load(receive(source, 1 << 20), [], {}, 9)
        for code in prepare(json.loads(json.dumps(job)))[:2]:
            exec(code, module_space())
    os.close(source)
    os.close(pipe)


def supervise(options):
    """The life of a worker: for each job on stdin two clones, and one line of JSON on stdout."""
    limits, isolated = options["limits"], options["isolated"]
    sys.path[:] = [path for path in sys.path[1:] if path.startswith(sys.base_prefix)] + options["path"]
    os.closerange(3, 1024)
    null = os.open("/dev/null", os.O_RDWR)
    if isolated:
        lock_down(options["root"])
        if platform.machine() not in CALLS:
            raise OSError(f"no list of system calls for {platform.machine()}: add one to CALLS and REFUSED")
    system(LIBC.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    for name in WARM:
        with contextlib.suppress(ImportError):
            __import__(name)
    rehearse()
    LIBC.mount, LIBC.capset  # looked up here, not in each clone
    os.environ.clear()
    os.environ.update(HOME="/tmp", LANG="C.UTF-8")
    set_limits(limits, isolated)
    seconds = int(limits["cpu"]) + 2  # where the supervisor's own look at the clock would fail
    box = {"limits": limits, "isolated": isolated, "null": null, "judge": None, "channel": None, "candidate": None,
           "filter": call_filter() if platform.machine() in CALLS else None, "seconds": (seconds, seconds),
           "disk": f"size={limits['disk']}m,nr_inodes={limits['files'] * 16},mode=777".encode()}
    gc.collect()
    LIBC.malloc_trim(0)  # the less memory, the faster a clone: this returns what compiling this file took
    gc.freeze()
    gc.disable()
    while True:
        sizes = struct.unpack("II", take(8))
        os.write(1, json.dumps(one_program(box, *sizes)).encode() + b"\n")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(box["candidate"], 0)  # not before: the host need not wait for its end


def one_program(box, candidate_size, judge_size):
    """The verdict of one program. No judge_size: its tests are those of the last, and so is the judge.

    That judge met only candidates that kept to the rules; any other costs the judge its life. Exits if a clone fails.
    """
    requests, ask = os.pipe()
    replies, answer = os.pipe()
    results, report = os.pipe()
    candidate = box["candidate"] = clone_side(box, candidate_size, requests, answer)
    if judge_size:
        end_judge(box)
        box["channel"], theirs = socket.socketpair()
        box["judge"] = clone_side(box, judge_size, theirs.fileno())
        theirs.close()
    socket.send_fds(box["channel"], [b"+"], [ask, replies, report])
    for pipe in (requests, ask, replies, answer, report):
        os.close(pipe)
    data, stopped = watch(candidate, box["judge"], results, box["limits"])
    os.close(results)
    os.kill(candidate, signal.SIGKILL)
    if len(data) < 4:
        sys.exit("the judge ended before it had begun")
    verdict = verdict_of(data, stopped, candidate, box["limits"]["cpu"])
    if not verdict["kept"]:
        end_judge(box)
    return verdict


def clone_side(box, size, *keep):
    """Clone the candidate's side (two pipes to keep) or the judge's (one channel): its pid."""
    pid = clone(box["isolated"])
    if pid:
        return pid
    try:
        below, is_judge = 3, len(keep) == 1
        for pipe in sorted((*keep, box["null"])):
            os.closerange(below, pipe)
            below = pipe + 1
        os.closerange(below, 256)
        wall_off(box, is_judge)
        if is_judge:
            run_judge(size, socket.socket(fileno=keep[0]), box["null"], box["limits"])
        else:
            job = json.loads(take(size))
            os.write(keep[1], b"+")
            silence(box["null"])
            run_candidate(job, *keep, box["limits"])
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(0)


def silence(null):
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


def end_judge(box):
    if box["judge"]:
        os.kill(box["judge"], signal.SIGKILL)
        os.waitpid(box["judge"], 0)
        box["channel"].close()
        box["judge"] = None


def verdict_of(data, stopped, candidate, cpu):
    """The verdict in the judge's report; `wall`: only wall time was against it; `kept`: the judge may stay."""
    total = int.from_bytes(data[:4], "little")
    codes, _, detail = data[4:].decode("ascii", "replace").partition("\n")
    codes = codes[:total].ljust(total, "k")
    word = "infra" if "i" in codes or not total else WORDS.get(codes.replace(".", "")[:1], "pass")
    if word == "killed":
        _, status, usage = os.wait4(candidate, 0)
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "exited"
        if stopped or usage.ru_utime + usage.ru_stime > cpu:
            word, how = "timeout", "stopped"
        detail = f"test {codes.index('k') + 1}: {how}"
    passed = codes.count(".")
    reward = None if word == "infra" else passed / total
    return {"reward": reward, "passed": passed, "total": total, "verdict": word, "detail": detail,
            "wall": stopped == "wall", "kept": not stopped and word in ("pass", "wrong", "exception")}


def watch(candidate, judge, results, limits):
    """Stop the candidate at its limits, until the judge is done: (its report, "" or "timeout" or "wall")."""
    os.set_blocking(results, False)
    poller = select.poll()
    for pipe in (results, 0):
        poller.register(pipe, 0)  # only its end is an event
    data, stopped = b"", ""

    def clocks():  # the last two: CPU time of a process with all its threads
        return time.monotonic(), *(time.clock_gettime(~pid << 3 | 2) for pid in (candidate, judge))

    first = last = clocks()
    while True:
        events = dict(poller.poll(TICK * 1000))
        if 0 in events:  # the host has gone
            os.kill(candidate, signal.SIGKILL)
            os.kill(judge, signal.SIGKILL)
            sys.exit()
        now = clocks()
        try:
            more = os.read(results, 1 << 20)
        except BlockingIOError:
            more = b""
        data += more[:(1 << 20) - len(data)]
        if results in events:
            return data, stopped
        if more and not stopped:
            last = now
        for then, scope in ((last, "test_"), (first, "")):
            cpu, wall = limits[scope + "cpu"], limits[scope + "wall"]
            waited, *used = [b - a for a, b in zip(then, now)]
            over = "timeout" if max(used) > cpu else "wall" if waited - SLOWDOWN * sum(used) > wall else ""
            if over and not stopped:  # the judge sees its pipe end, and reports the rest as failed
                stopped, last, first = over, now, now
                os.kill(candidate, signal.SIGKILL)
            elif over:
                os.kill(judge, signal.SIGKILL)


# ---- the host ----

def first_block(text):
    """The first fenced Python block of a model's answer, if it is closed; else None."""
    start = re.search(r"^([ \t]*)(```+|~~~+)[ \t]*(?:python3?|py)\b.*\n", text, re.IGNORECASE | re.MULTILINE)
    end = start and re.compile(rf"^[ \t]*{start[2]}{start[2][0]}*[ \t\r]*$", re.MULTILINE).search(text, start.end())
    if not end:
        return None
    block = text[start.end():end.start()]
    return textwrap.dedent(block) if start[1] else block


def visible(packages):
    """What a container shows, as pairs (host's path, path inside): this Python's files, a few devices, `packages`."""
    paths = [os.path.realpath(sys.executable), sys.base_prefix + "/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64",
             "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    return [(path, path) for path in paths if os.path.exists(path)] + extras(packages)


def extras(packages):
    """Such pairs for this file and for those packages, by import name, that are installed."""
    pairs = [(os.path.realpath(__file__), "/box/sandbox.py")]
    for name in filter(None, packages.split(",")):
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            path = os.path.dirname(spec.origin) if spec.submodule_search_locations else spec.origin
            pairs.append((path, "/box/" + os.path.basename(path)))
    return pairs


def command(runtime, image, packages, limits):
    """The command line of a worker in a container of that runtime (None: in no container)."""
    options = {"limits": limits, "isolated": runtime is not None, "root": [], "path": ["/box"]}
    root, own = os.geteuid() == 0, [os.path.realpath(sys.executable), "-S", "-s", "-B", "/box/sandbox.py"]
    if runtime is None:
        own[-1] = os.path.realpath(__file__)
        options["path"] = [os.path.dirname(path) for path, _ in extras(packages)[1:]]
        start = []
    elif runtime == "bwrap":
        start = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
                 "--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        # Real root needs no user namespace here; it becomes nobody inside, once Python runs.
        start += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user"]
        parents = {str(parent) for _, inside in visible(packages) for parent in Path(inside).parents}
        for parent in sorted(parents - {inside for _, inside in visible(packages)} - {"/"}):
            start += ["--perms", "0755", "--dir", parent]  # else they would be root's alone
        for path, inside in visible(packages):
            start += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, inside]
        start += ["--proc", "/proc", "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    elif runtime == "unshare":
        start = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts", "--mount-proc"]
        start += [] if root else ["--user", "--map-root-user"]
        options["root"] = visible(packages)
        own[-1] = os.path.realpath(__file__)
    else:
        own[0] = "python3"
        podman = runtime == "podman"
        start = (["podman", "run", "--rm", "--interactive", "--network=none", "--read-only", "--cap-drop=ALL",
                  f"--user={NOBODY}:{NOBODY}", "--security-opt=no-new-privileges", "--security-opt=seccomp=unconfined",
                  "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096", "--http-proxy=false"] if podman else
                 ["apptainer", "exec", "--containall", "--no-home", "--cleanenv", "--uts", "--net", "--network=none"])
        start += [f"--env={name}={value}" for name, value in ENVIRONMENT.items()]
        start += [f"--{'volume' if podman else 'bind'}={path}:{inside}:ro" for path, inside in extras(packages)]
        folder = os.path.isdir(image)  # a root file system, unpacked
        start += ["--rootfs"] * (folder and podman)
        start += [image if podman or os.path.exists(image) else f"docker://{image}"]
    return start + own + ["--worker=" + json.dumps(options)]


def start(line):
    """Start a worker: a process with log, job (of which it owes a verdict, until `due`) and tests (that it holds)."""
    bare = os.path.basename(line[0]) in ("podman", "apptainer")  # these need the user's own environment
    log = tempfile.TemporaryFile()
    worker = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                              env=None if bare else ENVIRONMENT)
    worker.log, worker.job, worker.tests = log, None, None
    return worker


def stop(workers):
    """End workers. A container ends when its standard input does, and by force if not."""
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.stdin.close()
    for worker in workers:
        try:
            worker.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        worker.stdout.close()
        worker.log.close()


def ask(worker, job, limits):
    """Send a program to a worker. One that has ended shows it in its answer."""
    worker.job, worker.due = job, time.monotonic() + 2 * SLOWDOWN * limits["cpu"] + limits["wall"] + 600
    sides = job["candidate"], b"" if job["judge"] == worker.tests else job["judge"]
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(struct.pack("II", *map(len, sides)) + b"".join(sides))
        worker.stdin.flush()


def answer(worker):
    """The verdict that a worker owes. OSError, with the last line it wrote, where it has failed."""
    if not wait([worker.stdout], max(0, worker.due - time.monotonic())):
        raise OSError("it hangs")
    try:
        verdict = json.loads(worker.stdout.readline())
    except ValueError:
        worker.log.seek(0)
        raise OSError((worker.log.read().decode(errors="replace").strip().splitlines() or ["it ended"])[-1]) from None
    worker.tests = worker.job["judge"] if verdict.pop("kept") else None
    return verdict


NO_VERDICT = {"reward": None, "passed": 0, "total": 0, "verdict": "infra", "detail": ""}


def make_job(row):
    """What the two sides get to see of a row, and a key that equal jobs share: None where the answer has no program."""
    program = first_block(row["completion"])
    if program is None and row.get("fenced") is False:
        program = row["completion"]
    both = {"preamble": row.get("preamble") or "", "entry_point": row["entry_point"]}
    candidate, judge = (json.dumps(both | side).encode() for side in ({"program": program}, {"test": row["test"]}))
    key = None if program is None else hashlib.sha256(candidate + judge).digest()
    return {"candidate": candidate, "judge": judge, "key": key, "tries": 3}


@functools.lru_cache(maxsize=None)
def choose(runtime, image, packages):
    """The first runtime that isolates and judges rightly; said once on stderr. RuntimeError if none does."""
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
    job = make_job({"completion": trial, "fenced": False, "entry_point": "probe",
                    "test": "def check(candidate):\n assert candidate(1) == 1\n assert candidate(2) == 3"})
    reasons = []
    for name in [runtime] if runtime != "auto" else RUNTIMES:
        if not shutil.which(name):
            reasons.append(f"{name} is not installed")
            continue
        worker = start(command(name, image, packages, LIMITS))
        try:
            ask(worker, job, LIMITS | {"cpu": 1.0})
            verdict = answer(worker)
            if (verdict["passed"], verdict["total"]) == (1, 2):
                print(f"sandbox: {name}", file=sys.stderr)
                return name
            reasons.append(f"{name} does not isolate ({verdict})")
        except OSError as error:
            reasons.append(f"{name} fails ({error})")
        finally:
            stop([worker])
    raise RuntimeError(f"no sandbox works here: {'; '.join(reasons)}. Install bubblewrap (apt install bubblewrap, or "
                       "dnf) and see that user namespaces are allowed (sysctl user.max_user_namespaces), or run "
                       "programs that you trust with --unsafe")


def judge(programs, workers=0, runtime="auto", image=IMAGE, packages=PACKAGES, unsafe=False, **limits):
    """Judge an iterable of rows; yield a verdict (a dict with the row's id) for each as they finish, in any order.

    workers: 0 is one for each core given to this process. limits: see FLAGS. Rows of the same program and tests are run
    once. RuntimeError where a limit is not above 0, or no isolation works and `unsafe` is not set.
    """
    if unknown := set(limits) - set(LIMITS):
        raise TypeError(f"no such limit: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    limits = LIMITS | limits
    for name in LIMITS:
        if not limits[name] > 0 and name != "threads":
            raise RuntimeError(f"--{name} must be above 0")
    line = command(None if unsafe else choose(runtime, image, packages), image, packages, limits)
    programs, workers, idle, busy = iter(programs), workers or cores(), [], []
    verdicts = {None: NO_VERDICT | {"reward": 0.0, "verdict": "no_code"}}  # by key
    waiting, ready = {}, []  # by key: ids of rows that wait for the verdict. And rows to give to the caller
    again, alone = [], False  # what wall time stopped runs once more when all others are done, one at a time
    try:
        while True:
            while len(busy) < (1 if alone else workers):
                row = next(programs, None)
                if row is not None:
                    job = make_job(row)
                    if job["key"] in verdicts:
                        yield {"id": row["id"], **verdicts[job["key"]]}
                        continue
                    waiting.setdefault(job["key"], []).append(row["id"])
                    if len(waiting[job["key"]]) > 1:
                        continue
                elif busy or not again:
                    break
                else:
                    alone, job = True, again.pop()
                busy.append(idle.pop() if idle else start(line))
                ask(busy[-1], job, limits)
            yield from ready  # only now: while the caller works, so do the workers
            if not busy:
                return
            ready, reports = [], wait([worker.stdout for worker in busy], 10)
            for worker in [w for w in busy if w.stdout in reports or time.monotonic() > w.due]:
                busy.remove(worker)
                job = worker.job
                try:
                    verdict = answer(worker)
                    idle.append(worker)
                except OSError as error:
                    stop([worker])
                    job["tries"] -= 1
                    if job["tries"]:
                        busy.append(start(line))
                        ask(busy[-1], job, limits)
                        continue
                    verdict = NO_VERDICT | {"detail": f"the sandbox failed: {error}"}
                if verdict.pop("wall", False) and not alone:
                    again.append(job)
                    continue
                verdicts[job["key"]] = verdict
                ready += [{"id": name, **verdict} for name in waiting.pop(job["key"])]
    finally:
        stop(busy + idle)


def cores():
    """CPU cores given to this process, by its affinity, by SLURM, and as one of several under torchrun."""
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    have = min(have, int(os.environ.get("SLURM_CPUS_PER_TASK", have)))
    return max(1, have // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def main():
    parser = rows.Parser(__doc__)
    parser.add_argument("--data", required=True, help="JSONL of programs")
    parser.add_argument("--out", required=True, help="JSONL of verdicts; what stands there already is not run again")
    parser.add_argument("--workers", type=int, default=0, help="workers; 0: one for each core given (default 0)")
    parser.add_argument("--runtime", choices=("auto",) + RUNTIMES, default="auto", help="default: the first that works")
    parser.add_argument("--image", default=IMAGE, help="podman's or apptainer's image (default %(default)s)")
    parser.add_argument("--packages", default=PACKAGES, help="import names, besides the standard library, that "
                        "programs may use where installed, pure Python (default %(default)s)")
    parser.add_argument("--unsafe", action="store_true", help="no isolation, only limits: not for programs of a model")
    for name, (default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default %(default)s)")
    args = vars(parser.parse_args())
    data, out = args.pop("data"), args.pop("out")
    programs = rows.read(data, require=("completion", "test", "entry_point"))
    for row in programs:
        for name in ("completion", "preamble", "test", "entry_point"):
            if not isinstance(row.get(name, ""), str):
                rows.fail(f"{row['__at__']}: {name} must be a string")
    with rows.open_part(out) as part:
        part.seek(0)
        done = {str(json.loads(line)["id"]) for line in part}
        left = [row for row in programs if str(row["id"]) not in done]
        words, total, known = collections.Counter(), 0.0, 0
        with tqdm(total=len(programs), initial=len(done), unit=" programs", desc="sandbox") as bar:
            try:
                for verdict in judge(left, **args):
                    rows.append(part, verdict)
                    words[verdict["verdict"]] += 1
                    if verdict["reward"] is not None:
                        total, known = total + verdict["reward"], known + 1
                    bar.set_postfix(mean_reward=f"{total / max(1, known):.4f}", refresh=False)
                    bar.update()
            except RuntimeError as error:
                rows.fail(error)
    print(f"{out}: {words.total()} new verdicts ({', '.join(f'{n} {word}' for word, n in words.most_common())}), "
          f"mean reward {total / max(1, known):.4f}")


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("--worker="):
        supervise(json.loads(sys.argv[1][9:]))
    import rows
    from tqdm import tqdm
    main()
