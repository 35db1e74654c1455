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
    import argparse, hashlib, importlib.util, queue, shutil, subprocess, tempfile, textwrap, threading
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
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}  # all that a worker has; the order of sets is the same in each
IMAGE, PACKAGES = "python:3.11-slim", "sortedcontainers"
RUNTIMES = ("bwrap", "podman", "apptainer", "unshare")
WORDS = {"w": "wrong", "e": "exception", "m": "memory", "o": "output", "k": "killed"}
WARM = """abc array bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq itertools
    json math numbers operator queue random re statistics string textwrap threading time typing
    sortedcontainers""".split()


# ---- values as plain data: both sides use these, neither trusts them ----

SCALARS = {type(None), bool, int, float, str}
CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque, "list": list}
NUMBERS = {"Fraction": fractions.Fraction, "Decimal": decimal.Decimal}
ITERATORS = (collections.abc.Iterator, collections.abc.MappingView)


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
    for tag, container in CONTAINERS.items():
        if isinstance(value, container):
            return {tag: pack([*value], note)}
    for plain in (int, float, str):  # subclasses, such as those of IntEnum
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, (bytes, bytearray)):
        return {kind.__name__: value.decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if kind.__name__ in NUMBERS:
        return {kind.__name__: str(value)}
    if isinstance(value, ITERATORS):  # a generator is run to its end here; the other side iterates over what it gave
        return {"iterator": pack([*value], note)}
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
    if tag in NUMBERS:
        return NUMBERS[tag](body)
    if tag in ("bytes", "bytearray"):
        return getattr(builtins, tag)(body.encode("latin-1"))
    body = unpack(body, objects, depth - 1)
    if type(body) is not list:
        raise ValueError("a tag without a list")
    if tag == "dict":
        keys, values = body
        if len(keys) != len(values):
            raise ValueError("keys without values")
        return dict(zip(keys, values))
    if tag == "iterator":
        return iter(body)
    if tag in ("range", "complex"):
        return getattr(builtins, tag)(*body)
    return CONTAINERS[tag](body)


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
    except MemoryError:
        return failure("MemoryError", "")
    except TypeError as error:
        return failure("Unsendable", error)
    except BaseException as error:  # raised by a generator on the way
        return failure(type(error).__name__, error)


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
        body += wrapped([statement], names) if is_test else [statement]
        total += is_test
    if not total:
        body, total = wrapped(check.body, names), 1
    check.body = body
    return compile(ast.fix_missing_locations(tree), "<test>", "exec", dont_inherit=True), total


def asserts(node):
    return any(isinstance(inner, ast.Assert) and not isinstance(inner.test, ast.Constant) for inner in ast.walk(node))


def wrapped(statements, names):
    """The statements of one test, between the calls that report it. `names` stand for the candidate."""
    template = ast.parse(f"__judge__.begin({any(mutable(statement, names) for statement in statements)})\ntry:\n pass\n"
                         "except BaseException as __error__:\n __judge__.failed(__error__)\nelse:\n __judge__.passed()")
    template.body[1].body = statements
    return template.body


def mutable(test, names):
    """Whether a test could see that a call changed its arguments: not where they are all written out in the call."""
    nodes = list(ast.walk(test))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    makers = {id(call.func) for call in calls}  # list_node in candidate(list_node([1, 2])) is no variable
    inner = [node for call in calls if getattr(call.func, "id", "") in names for node in ast.walk(call)]
    return any(isinstance(node, ast.Name) and id(node) not in makers for node in inner) or any(
        isinstance(node, ast.Name) and node.id in names and id(node) not in makers for node in nodes)


class Judge:
    """The judge's end of the line: `call` stands in for the candidate, the rest records the tests."""

    def __init__(self, space, requests, replies, report, total, limits):
        self.space, self.requests, self.replies, self.report = space, requests, replies, report
        self.total, self.limits = total, limits
        self.done = 0  # tests recorded
        self.gone = ""  # the code of why the candidate can answer no more
        self.detail = ""
        self.begin(True)

    def exchange(self, head, values, objects):
        """Send a call (none where head is None), give back the reply. Without a proper one, Gone now and ever after."""
        if self.gone:
            raise Gone
        try:
            message = None if head is None else dump(head, values, objects)
        except (TypeError, RecursionError):
            self.fault = "i"  # the test passes what is not plain data, such as a function: not for us to judge
            raise
        try:
            if message:
                send(self.requests, message)
            message = receive(self.replies, self.limits["output"] << 20)
            kind, values = load(message, objects, self.space, self.limits["depth"])
            if kind == "error":
                name, text = values
                if type(name) is str and type(text) is str:
                    return kind, values
            elif kind == ("ready" if head is None else "value"):
                return kind, values
            raise ValueError("a reply out of order")
        except BaseException as error:  # the process has ended, or sent bytes that are no proper reply
            self.gone = "k" if isinstance(error, (EOFError, BrokenPipeError)) else "o"
            raise Gone from None

    def call(self, *args, **keywords):
        """What a test calls as `candidate`."""
        kind, values = self.exchange(self.mutable, [args, keywords], [])
        if kind == "value":
            value, after = values
            if self.mutable:
                restore([args, keywords], after)
            return value
        name, text = values
        self.fault = {"MemoryError": "m", "Unsendable": "o"}.get(name, "e")
        self.why = name if hasattr(builtins, name) else ""
        raise expected_error(name, text)

    def begin(self, mutable):
        self.mutable, self.fault, self.why = mutable, "", ""

    def passed(self):
        self.record(self.gone or ".")

    def failed(self, error):
        self.record(self.gone or self.fault or "w", self.why or type(error).__name__.replace("AssertionError", ""))

    def record(self, code, why=""):
        """Report one test: a byte. Of the first that fails also why, as the name of a built-in exception: no text of a
        program or a test may reach the supervisor, whose memory every later program inherits."""
        if self.done == self.total:
            return
        self.done += 1
        os.write(self.report, code.encode())
        if code != "." and not self.detail:
            self.detail = f"test {self.done}" + (f": {why}" if hasattr(builtins, why) and code not in "ko" else "")
        self.begin(True)


def run_judge(size, channel, null, limits):
    """The judge's clone: judge one candidate after another against the same tests, until the supervisor ends it."""
    codes = None
    while pipes := socket.recv_fds(channel, 1, 3)[1]:
        requests, replies, report = pipes
        if os.read(replies, 1) != b"+":  # the candidate has not taken its own job yet
            return
        if codes is None:
            job, codes = json.loads(take(size)), []
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
        kind, values = judge.exchange(None, None, [])
        if kind == "error":
            why = values[0]
            code = "m" if why == "MemoryError" else "e"
        else:
            judge.space["check"](judge.call)
    except BaseException as error:  # raised between the tests: those after it have failed
        code, why = judge.fault or "w", judge.why or type(error).__name__
    while judge.done < judge.total:
        judge.record(judge.gone or code, why)
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
    kill, fail, allow = 0x80000000, 0x50000, 0x7FFF0000
    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, kill), (load, 0, 0, 0)]
    for number in REFUSED[platform.machine()].split():
        code += [(equal, 0, 1, int(number)), (give, 0, 0, fail | errno.EPERM)]
    for number in NEEDED:
        code += [(equal, 0, 1, number), (give, 0, 0, allow)]
    code += [(at_least, 0, 1, NEWER), (give, 0, 0, fail | errno.ENOSYS), (equal, 1, 0, clone), (give, 0, 0, allow),
             (load, 0, 0, 16), (bits, 1, 0, CLONE_THREAD), (give, 0, 0, fail | errno.EPERM), (give, 0, 0, allow)]
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
    for name, value in (("AS", limits["memory"] << 20), ("FSIZE", limits["disk"] << 20), ("NOFILE", limits["files"]),
                        ("STACK", 64 << 20), ("CORE", 0), ("NPROC", limits["threads"] + 3), ("MEMLOCK", 0),
                        ("SIGPENDING", 64), ("MSGQUEUE", 0)):
        if isolated or name in ("AS", "FSIZE", "NOFILE", "CORE"):
            try:
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
            except (AttributeError, ValueError, OSError):
                if isolated:
                    raise
    sys.setrecursionlimit(1050)  # the 1000 a program may count on, and what stands below it here


def wall_off(box, judge):
    """Called by a fresh clone before it takes its job: a /tmp of its own, no rights, few system calls."""
    if box["isolated"]:
        system(LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", 6, box["disk"]), "mount of /tmp")  # 6: nosuid, nodev
        os.chdir("/tmp")
        system(LIBC.prctl(1, 9, 0, 0, 0), "PR_SET_PDEATHSIG")  # die with the supervisor
    if not judge:  # a judge serves many programs
        resource.setrlimit(resource.RLIMIT_CPU, box["seconds"])
    if box["isolated"]:
        system(LIBC.capset(NO_CAPABILITIES, bytes(24)), "capset")
    if box["filters"]:
        system(LIBC.prctl(22, 2, box["filters"], 0, 0), "seccomp")  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
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
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            LIBC.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
        except OSError:
            pass  # this root is but the name of an ordinary user, who has no other
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


def supervise(options):
    """The life of a worker: for each job on stdin two clones, and one line of JSON on stdout."""
    limits, isolated, filters = options["limits"], options["isolated"], None
    disk = f"size={limits['disk']}m,nr_inodes={limits['files'] * 16},mode=777".encode()
    seconds = int(limits["cpu"]) + 2  # where the supervisor's own look at the clock would fail
    sys.path[:] = [path for path in sys.path[1:] if path.startswith(sys.base_prefix)] + options["path"]
    os.closerange(3, 1024)
    null = os.open("/dev/null", os.O_RDWR)
    if isolated:
        lock_down(options["root"])
    if platform.machine() in CALLS and sys.platform == "linux":
        system(LIBC.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
        filters = call_filter()
    elif isolated:
        raise OSError(f"no list of system calls for {platform.machine()}: add one to CALLS and REFUSED")
    for name in WARM:
        try:
            __import__(name)
        except ImportError:
            pass
    for name in ("mount", "prctl", "capset"):
        getattr(LIBC, name)
    split_tests("def check(candidate):\n assert candidate(1) == [1]", "f")  # what a first use sets up, clones share
    load(dump(True, [[1], {"x": 1}], []).encode(), [], {}, 9)
    os.environ.clear()
    os.environ.update(HOME="/tmp", LANG="C.UTF-8")
    set_limits(limits, isolated)
    box = {"limits": limits, "isolated": isolated, "filters": filters, "null": null, "judge": None, "channel": None,
           "candidate": None, "disk": disk, "seconds": (seconds, seconds)}
    os.write(1, b"ready\n")
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        sizes = struct.unpack("II", take(8))
        os.write(1, json.dumps(one_program(box, *sizes)).encode() + b"\n")
        try:
            os.waitpid(box["candidate"], 0)  # not before: the host need not wait for its end
        except ChildProcessError:
            pass


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
    verdict["kept"] = not stopped and verdict["verdict"] in ("pass", "wrong", "exception")
    if not verdict["kept"]:
        end_judge(box)
    return verdict


def clone_side(box, size, *keep):
    """Clone the candidate's side (two pipes to keep) or the judge's (one channel): its pid."""
    pid = clone(box["isolated"])
    if pid:
        return pid
    try:
        below = 3
        for pipe in sorted((*keep, box["null"])):
            os.closerange(below, pipe)
            below = pipe + 1
        os.closerange(below, 256)
        wall_off(box, judge=len(keep) == 1)
        if len(keep) == 1:
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
        os.wait4(box["judge"], 0)
        box["channel"].close()
        box["judge"] = None


def verdict_of(data, stopped, candidate, cpu):
    """The verdict in the judge's report: passed, total, verdict, detail, and whether only wall time was against it."""
    total = int.from_bytes(data[:4], "little")
    codes, _, detail = data[4:].decode("ascii", "replace").partition("\n")
    codes = codes[:total].ljust(total, "k")
    word = "infra" if "i" in codes or not total else WORDS.get(codes.replace(".", "")[:1], "pass")
    if word == "killed":
        _, status, usage = os.wait4(candidate, 0)
        if stopped or usage.ru_utime + usage.ru_stime > cpu:
            word, how = "timeout", "stopped"
        else:
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "exited"
        detail = f"test {codes.index('k') + 1}: {how}"
    return {"passed": codes.count("."), "total": total, "verdict": word, "detail": detail, "wall": stopped == "wall"}


def cpu_seconds(pid):
    """CPU time of another process, all its threads; 0 where the system cannot say (not Linux)."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def watch(candidate, judge, results, limits):
    """Stop the candidate at its limits, until the judge is done: (its report, "" or "timeout" or "wall")."""
    os.set_blocking(results, False)
    poller = select.poll()
    poller.register(results, 0)  # only its end is an event
    poller.register(0, 0)
    data, stopped = b"", ""
    first = last = time.monotonic(), 0.0, cpu_seconds(judge)
    while True:
        events = dict(poller.poll(TICK * 1000))
        if 0 in events:  # the host has gone
            os.kill(candidate, signal.SIGKILL)
            os.kill(judge, signal.SIGKILL)
            sys.exit()
        now = time.monotonic(), cpu_seconds(candidate), cpu_seconds(judge)
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
    lines = text.split("\n")
    for start, line in enumerate(lines):
        opening = re.match(r"([ \t]*)(```+|~~~+)[ \t]*(?:python3?|py)\b", line, re.IGNORECASE)
        if opening:
            indent, fence = opening.groups()
            ends = (end for end in range(start + 1, len(lines))
                    if lines[end].strip().startswith(fence) and not lines[end].strip(" \t\r" + fence[0]))
            end = next(ends, None)
            block = None if end is None else "\n".join(lines[start + 1:end]) + "\n"
            return textwrap.dedent(block) if block and indent else block
    return None


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
    """Start a worker. OSError with the last line it wrote where it does not come up."""
    bare = os.path.basename(line[0]) in ("podman", "apptainer")  # these need the user's own environment
    log = tempfile.TemporaryFile()
    worker = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                              env=None if bare else ENVIRONMENT)
    worker.log, worker.tests = log, None
    if not select.select([worker.stdout], [], [], 600 if bare else 60)[0] or worker.stdout.readline() != b"ready\n":
        worker.kill()
        worker.wait()
        log.seek(0)
        raise OSError((log.read().decode(errors="replace").strip().splitlines() or ["it did not start"])[-1])
    return worker


def stop(worker):
    """End a worker; its container ends when its standard input does, and by force if not."""
    try:
        worker.stdin.close()
    except OSError:
        pass
    try:
        worker.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    worker.stdout.close()
    worker.log.close()


def ask(worker, job, limits):
    """One program through one worker: its verdict. OSError or ValueError where the worker fails."""
    tests = job["judge"]
    sides = job["candidate"], b"" if tests == worker.tests else tests
    worker.stdin.write(struct.pack("II", *map(len, sides)) + b"".join(sides))
    worker.stdin.flush()
    patience = SLOWDOWN * 2 * limits["cpu"] + limits["wall"] + 120
    if not select.select([worker.stdout], [], [], patience)[0]:
        raise OSError("the worker hangs")
    verdict = json.loads(worker.stdout.readline())
    worker.tests = tests if verdict.pop("kept") else None
    return verdict


INFRA = {"passed": 0, "total": 0, "verdict": "infra", "wall": False}


def work(line, jobs, results, limits, live):
    """A thread of the host: feeds one worker, and starts it anew where it fails. `live` holds its worker."""
    worker, me = None, threading.get_ident()
    while (job := jobs.get()) is not None:
        for _ in range(3):
            try:
                worker = live[me] = worker or start(line)
                verdict = ask(worker, job, limits)
                break
            except (OSError, ValueError) as error:
                verdict = INFRA | {"detail": f"the sandbox failed: {error}"}
                if worker:
                    stop(worker)
                worker = None
                if "over" in live:
                    return
        results.put((job, verdict))
    if worker:
        stop(worker)


def make_job(row):
    """What the two sides get to see of a row, or None where its answer holds no program."""
    program = first_block(row["completion"])
    if program is None and row.get("fenced") is False:
        program = row["completion"]
    if program is None:
        return None
    both = {"preamble": row.get("preamble") or "", "entry_point": row["entry_point"]}
    return {"candidate": json.dumps(both | {"program": program}).encode(),
            "judge": json.dumps(both | {"test": row["test"]}).encode()}


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
        try:
            worker = start(command(name, image, packages, LIMITS))
            try:
                verdict = ask(worker, job, LIMITS)
            finally:
                stop(worker)
            if (verdict["passed"], verdict["total"]) == (1, 2):
                print(f"sandbox: {name}", file=sys.stderr)
                return name
            reasons.append(f"{name} does not isolate ({verdict})")
        except (OSError, ValueError) as error:
            reasons.append(f"{name} fails ({error})")
    raise RuntimeError(f"no sandbox works here: {'; '.join(reasons)}. Install bubblewrap (apt install bubblewrap, or "
                       "dnf) and see that user namespaces are allowed (sysctl user.max_user_namespaces), or run "
                       "programs that you trust with --unsafe")


def judge(programs, workers=0, runtime="auto", image=IMAGE, packages=PACKAGES, unsafe=False, **limits):
    """Judge an iterable of rows; yield a verdict (a dict with the row's id) for each as they finish, in any order.

    workers: 0 is one for each core given to this process. limits: see FLAGS. Rows of the same program and tests are run
    once. RuntimeError where no isolation works and `unsafe` is not set.
    """
    unknown = set(limits) - set(LIMITS)
    if unknown:
        raise TypeError(f"no such limit: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    limits = LIMITS | limits
    line = command(None if unsafe else choose(runtime, image, packages), image, packages, limits)
    workers = workers or cores()
    jobs, results, threads, live = queue.Queue(), queue.Queue(), [], {}
    known, waiting, again = {}, {}, []  # by key: verdicts; ids that wait for one. And what wall time stopped
    programs, running, alone = iter(programs), 0, False
    try:
        while True:
            while running < (1 if alone else 2 * workers):
                row = None if alone else next(programs, None)
                if row is None and not again or (row is None and running and not alone):
                    break
                if row is None:  # all others are done: what had waited too long runs once more, one at a time
                    alone, job = True, again.pop()
                else:
                    job = make_job(row)
                    if job is None:
                        yield verdict_row(row["id"], {"passed": 0, "total": 0, "verdict": "no_code", "detail": ""})
                        continue
                    job["key"] = hashlib.sha256(job["candidate"] + job["judge"]).digest()
                    if job["key"] in known:
                        yield verdict_row(row["id"], known[job["key"]])
                        continue
                    waiting.setdefault(job["key"], []).append(row["id"])
                    if len(waiting[job["key"]]) > 1:
                        continue
                if len(threads) < workers:
                    threads.append(threading.Thread(target=work, args=(line, jobs, results, limits, live), daemon=True))
                    threads[-1].start()
                jobs.put(job)
                running += 1
            if not running:
                return
            job, verdict = results.get()
            running -= 1
            if verdict.pop("wall") and not alone:
                again.append(job)
                continue
            known[job["key"]] = verdict
            for name in waiting.pop(job["key"]):
                yield verdict_row(name, verdict)
    finally:
        if running:  # the caller wants no more: do not wait for the programs on the way
            live["over"] = jobs.queue.clear()
            for worker in [worker for worker in live.copy().values() if worker]:
                worker.kill()
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            thread.join()


def verdict_row(name, verdict):
    total = verdict["total"]
    reward = None if verdict["verdict"] == "infra" else verdict["passed"] / total if total else 0.0
    return {"id": name, "reward": reward, **verdict}


def cores():
    """CPU cores given to this process, by its affinity and by SLURM."""
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(have, int(os.environ.get("SLURM_CPUS_PER_TASK", have))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for name in LIMITS:
        if not args[name] > 0 and name != "threads":
            rows.fail(f"--{name} must be above 0")
    for row in programs:
        for name in ("completion", "preamble", "test", "entry_point"):
            if not isinstance(row.get(name, ""), str):
                rows.fail(f"{row['__at__']}: {name} must be a string")
    with rows.open_part(out) as part:
        part.seek(0)
        done = {str(json.loads(line)["id"]) for line in part}
        left = [row for row in programs if str(row["id"]) not in done]
        begun = shown = time.monotonic()
        count, rewards, words = 0, [], collections.Counter()
        try:
            for verdict in judge(left, **args):
                rows.append(part, verdict)
                count += 1
                rewards += [verdict["reward"]] if verdict["reward"] is not None else []
                words[verdict["verdict"]] += 1
                if time.monotonic() > shown + (1 if sys.stderr.isatty() else 30) or count == len(left):
                    shown = time.monotonic()
                    end = "\r" if sys.stderr.isatty() and count < len(left) else "\n"
                    print(f"{len(done) + count}/{len(programs)} programs, {count / (shown - begun):.1f}/s",
                          file=sys.stderr, end=end, flush=True)
        except RuntimeError as error:
            rows.fail(error)
    print(f"{out}: {count} new verdicts ({', '.join(f'{n} {word}' for word, n in words.most_common())}), mean reward "
          f"{sum(rewards) / max(1, len(rewards)):.4f}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("--worker="):
        supervise(json.loads(sys.argv[1][9:]))
    import rows
    main()
