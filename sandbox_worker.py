"""A worker of the sandbox: the warm process in a container that runs programs against their tests,
one after another.

In: jobs on stdin, each as three numbers (sizes of the candidate's and of the judge's part,
patience) and the two parts, in JSON. Out: lines on stdout: a verdict as JSON; while a program runs,
a sign of life four times a second ("running" or "waiting"). sandbox.py starts it, and says what a
verdict is.

    echo | python sandbox_worker.py '{"no": "options"}'  # a worker by itself does nothing: run sandbox.py

    supervisor (this process) --clone--> judge: runs the tests, compares, counts; stays for the same tests
              |                            |  ^   sandbox_line.py: arguments out, values back
              |                            v  |
              +-------------- clone -----> candidate: runs one program

Each clone has a pid namespace and a session of its own, no capabilities, limits, and a filter on
system calls. The supervisor never reads a job: each clone takes its own part off the pipe. So a
candidate's memory never held a test, nor anything of another program.
"""
import ast
import atexit
import builtins
import collections.abc
import contextlib
import ctypes
import errno
import gc
import importlib
import io
import json
import marshal
import operator
import os
import platform
import random
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import types

from sandbox_line import (SCALARS, CandidateError, Frozen, Line, Remote, TooLarge, classes_of, describe,
                          is_builtin, restore)
from sandbox_tests import Tests

TICK = 0.02  # s between two looks of the supervisor at its clocks
HELD = 0.125  # share of the time in which the kernel holds a program that counts as waiting
SIGN = 0.25  # s between two signs of life
NICE = 5  # of a program that takes longer: behind the short ones, but a busy machine must not starve it
NOBODY = 65534
WORDS = {"w": "wrong", "e": "exception", "m": "memory", "o": "output", "k": "killed"}
WARM = """abc array bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq
    itertools json math numbers operator queue random re statistics string textwrap
    threading time typing""".split()


# ---- the candidate: what runs in its clone ----

def module_space(name="solution"):
    """The namespace of a fresh module (dataclasses and pickle look it up in sys.modules)."""
    module = sys.modules[name] = types.ModuleType(name)
    return vars(module)


class Candidate(Line):
    """The program's end of the line."""

    def __init__(self, source, target, limits):
        super().__init__(source, target, {}, limits)
        self.longest["send"] = limits["output"] << 20
        self.operations = {"call": self.run_call, "get": self.get, "set": self.set, "more": self.piece}
        self.before = None  # the arguments of a call as they came, where the call could change them

    def start(self, job):
        """Run the program, up to its function."""
        self.space = module_space()
        if job["entry_point"] == "__main__":
            self.refer(script([compile(job[part], f"<{part}>", "exec", dont_inherit=True)
                               for part in ("preamble", "program")]))
            return
        try:
            parts = [compile(job[part], f"<{part}>", "exec", dont_inherit=True)
                     for part in ("preamble", "program")]
        except SyntaxError:  # perhaps a program that goes on inside the preamble's last function
            parts = [compile(job["preamble"] + "\n" + job["program"], "<program>", "exec", dont_inherit=True)]
        exec(parts[0], self.space)
        self.classes = classes_of(self.space)
        if len(parts) == 2:  # the program's own class of such a name takes the place of the preamble's
            exec(parts[1], self.space)
            self.classes = {name: self.space.get(name, kind) for name, kind in self.classes.items()}
        else:
            tree = ast.parse(job["preamble"] + "\n    pass")
            names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
            self.classes = {name: kind for name, kind in self.classes.items() if name in names}
        function = eval(job["entry_point"], self.space)
        if not callable(function):
            raise TypeError("the entry point is not callable")
        self.refer(function)

    def serve(self):
        """Answer the judge until killed."""
        while True:
            self.objects, self.positions = [], {}
            self.answer(*self.load(self.receive()))

    def answer(self, operation, values):
        self.after = None
        try:
            reply = self.dump("value", self.operations[operation](*values))
        except BaseException as error:  # the program's, or of a value that cannot be sent
            reply = self.failure(error)
        try:
            self.send(reply)
        except TooLarge as error:
            self.send(self.failure(error))

    def failure(self, error):
        """The message of an exception, with as much of it as can be sent."""
        names = [[type(error).__module__, type(error).__name__], ["builtins", "Exception"]]
        ways = (lambda: [*describe(error), self.after],
                lambda: [names, [str(error)[:200]], {}, None])
        for way in ways:
            with contextlib.suppress(BaseException):  # an exception class may break its own parts
                reply = self.dump("error", way())
                if len(reply) < self.longest["send"] // 4:
                    return reply
        return self.dump("error", [names, [], {}, None])

    def received(self, head, body, table):
        self.before = None
        if head == "call" and not SCALARS.issuperset(map(type, body[1] + body[3])):  # args, keywords' values
            self.before = marshal.dumps([body[1], body[3], table], 2)

    def run_call(self, function, args, names, values, world):
        """[the value of a call, its arguments if they changed, what it printed if the test asks for
        that]."""
        before, keywords = self.before, dict(zip(names, values))
        if not before and not world:
            return [function(*args, **keywords), None, ""]
        saved, printed = (sys.stdin, sys.stdout, builtins.input), io.StringIO()
        sys.stdin = io.StringIO(world["stdin"]) if "stdin" in world else sys.stdin
        sys.stdout = printed if "stdout" in world else sys.stdout
        builtins.input = world.get("input", builtins.input)
        try:
            value = function(*args, **keywords)
        finally:
            sys.stdin, sys.stdout, builtins.input = saved
            if before:
                after = Frozen([args, values])
                _, body, table = self.flatten("", after)
                self.after = after if marshal.dumps([*body, table], 2) != before else None
        return [value, self.after, printed.getvalue()]

    def get(self, thing, name):
        return [getattr(thing, name)]

    def set(self, thing, name, value):
        setattr(thing, name, value)

    def unpack_global(self, body, depth):
        """What the test calls by a name that only the program can have defined."""
        return self.space[body]

    def unpack_name(self, body, depth):
        """A function or class of the standard library."""
        module, name = body
        return operator.attrgetter(name)(importlib.import_module(module))


def script(codes):
    """A function that runs a whole program on a text, to its very end: what the program prints."""
    os._exit = sys.exit

    def run(text):
        silence()  # the last run may have closed what it read
        with open("/tmp/.in", "w+b") as stdin, open("/tmp/.out", "w+b") as stdout:
            stdin.write(text.encode("utf-8", "surrogateescape"))
            stdin.seek(0)
            os.dup2(stdin.fileno(), 0)
            os.dup2(stdout.fileno(), 1)
            sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
            sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
            sys.__stdout__ = sys.stdout
            try:
                space = module_space("__main__")
                space["__file__"] = "/tmp/main.py"
                for code in codes:
                    exec(code, space)
            except SystemExit as end:
                if end.code not in (None, 0):
                    raise RuntimeError(f"exit status {end.code}") from None
            pool = getattr(sys.modules.get("concurrent.futures.thread"), "_threads_queues", ())
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon and thread not in pool:
                    thread.join()
            atexit._run_exitfuncs()
            for file in (sys.stdout, sys.__stdout__):
                with contextlib.suppress(AttributeError, ValueError):  # no file, or closed
                    file.flush()
            stdout.seek(0)
            return stdout.read().decode("utf-8", "replace")
    return run


def run_candidate(job, requests, replies, limits):
    line = Candidate(requests, replies, limits)
    try:
        line.start(job)
    except BaseException as error:
        line.send(line.failure(error))
        return
    line.send('["ready", [], []]')
    line.serve()


# ---- the judge: what runs in the tests' clone ----

# Exceptions that say "enough" to a loop: a success, if a program could raise them
ENDS = {"StopIteration", "StopAsyncIteration", "GeneratorExit"}


class Gone(BaseException):
    """The candidate can answer no more: what is not yet tested has failed. Not an Exception: no
    test may catch it."""


class RowFault(BaseException):
    """The row's own fault, or a value that cannot be carried: there is no verdict."""


class Thing(Remote):
    """What stays in the candidate: a test may call it, and get and set its attributes. It compares
    as itself only."""

    def __call__(self, *args, **keywords):
        with self._line.lock:
            return self._line.call(self, args, keywords)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._line.ask("get", [self, name])[0]

    def __setattr__(self, name, value):
        self._line.ask("set", [self, name, value])


class Judge(Line):
    """The judge's end of the line: `test` is the context that each test runs in."""

    remote = Thing

    def __init__(self, pipes, classes, tests, limits):
        requests, replies, self.report = pipes
        super().__init__(replies, requests, classes, limits)
        self.longest["receive"] = limits["output"] << 20
        self.tests, self.done = tests, 0
        self.gone = ""  # the code of why the candidate can answer no more
        self.fault = self.why = ""  # of the present test: the code and the name of what the candidate raised
        self.detail = ""  # of the first test that failed
        self.level = 0  # calls under way: one inside another where the program calls a function of the test
        self.usual = sys.stdin, sys.stdout, builtins.input

    def begin(self):
        """Wait until the program has run up to its function, which is the first thing there:
        whether it did."""
        head, values = self.trusting_nothing(lambda: self.load(self.receive()))
        if head not in ("ready", "error"):
            self.leave("o")
        if head == "error":
            self.trusting_nothing(lambda: self.error(*values))
        return head == "ready"

    def leave(self, code):
        self.gone = code
        raise Gone from None

    def trusting_nothing(self, step):
        """The result of a step with the candidate; where that is no proper one, Gone now and ever
        after."""
        if self.gone:
            raise Gone
        try:
            return step()
        except (Gone, RowFault):
            raise
        except (EOFError, BrokenPipeError):
            self.leave("k")
        except BaseException:
            self.leave("o")

    def ask(self, operation, values):
        with self.lock:
            return self.converse(operation, values)

    def converse(self, operation, values):
        if self.level == 0:
            self.objects, self.positions = [], {}
        try:
            message = self.dump(operation, values)
        except (TypeError, RecursionError):
            raise RowFault("the tests pass what cannot be sent to a program") from None
        self.level += 1
        try:
            self.trusting_nothing(lambda: self.send(message))
            while True:
                head, values = self.trusting_nothing(lambda: self.load(self.receive()))
                if head == "value":
                    return values
                if head == "error":
                    raise self.trusting_nothing(lambda: self.error(*values))
                self.trusting_nothing(lambda: self.answer(head, values))
        finally:
            self.level -= 1

    def answer(self, operation, values):
        """The program calls a function that the test gave it, or wants more items of an
        iterator."""
        thing, *rest = values
        if not any(thing is own for own in self.things):
            raise ValueError("not a thing of the test")
        try:
            if operation == "call":
                args, names, values, _ = rest
                reply = self.dump("value", thing(*args, **dict(zip(names, values))))
            else:
                reply = self.dump("value", {"more": self.piece}[operation](thing, *rest))
        except Exception as error:
            reply = self.dump("error", [[[type(error).__module__, type(error).__name__]], [str(error)], {}])
        self.send(reply)

    def call(self, thing, args, keywords):
        """The value of a call. The arguments are changed as the call changed them."""
        args, names, values, world = list(args), list(keywords), list(keywords.values()), {}
        stdin, stdout, read = self.usual
        if sys.stdin is not stdin:
            world["stdin"] = sys.stdin.read()
        if sys.stdout is not stdout:
            world["stdout"] = True
        if builtins.input is not read:
            world["input"] = builtins.input
        self.after = None
        try:
            reply = self.ask("call", [thing, args, names, values, world])
            value, self.after, printed = self.trusting_nothing(lambda: [reply[0], reply[1], str(reply[2])])
        finally:
            if self.after is not None:
                self.trusting_nothing(lambda: restore([args, values], self.after))
        if "stdout" in world:
            sys.stdout.write(printed)
        return value

    def error(self, names, args, fields, after=None):
        """The exception that the candidate raised, as the nearest of its classes that is built in, the
        preamble's, or spoken of by the tests: those of the library may mean something to what runs a
        test. Never one that ends `all(map(candidate, ...))` early, unless the tests speak of it."""
        self.after, name = after, names[0][1]
        known = [pair for pair in names if pair[0] in ("builtins", "solution") or pair[1] in self.tests.names]
        error = super().error(known, args, fields)
        if any(kind.__name__ in ENDS - self.tests.names for kind in type(error).__mro__):
            error = CandidateError()
        self.fault = {"MemoryError": "m", "TooLarge": "o"}.get(name, "e")
        self.why = next((name for _, name in names if is_builtin(name)), "")
        return error

    def refer(self, value):
        """What can be called is called there by its name, if that is the standard library's, or
        else here."""
        if not callable(value):
            if isinstance(value, collections.abc.Iterator):
                return super().refer(value)
            raise TypeError
        owner = getattr(value, "__objclass__", value)
        module, name = getattr(owner, "__module__", None), getattr(value, "__qualname__", "")
        if str(module).partition(".")[0] in sys.stdlib_module_names and "<" not in name:
            with contextlib.suppress(AttributeError, KeyError):
                if operator.attrgetter(name)(sys.modules[module]) == value:
                    return {"name": [module, name]}
        return super().refer(value)

    # ---- tests ----

    def test(self):
        self.fault = self.why = ""
        return self

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if kind is RowFault:
            return False
        if kind in (NameError, ImportError, ModuleNotFoundError) and not self.fault and not self.gone:
            raise RowFault(f"the tests fail by themselves: {kind.__name__} {error.name}")
        self.record("." if kind is None else self.fault or "w",
                    self.why or ("" if kind in (None, AssertionError) else kind.__name__))
        return True

    def record(self, code, why=""):
        """Report one test: a byte. Of the first that fails also why, as the name of a built-in
        exception: no text of a program or a test may reach the supervisor, whose memory every later
        program inherits."""
        code = self.gone or code
        if self.done < self.tests.total:
            self.done += 1
            os.write(self.report, code.encode())
            if code != "." and not self.detail:
                self.detail = f"test {self.done}"
                if is_builtin(why) and code not in "ko":
                    self.detail += f": {why}"


def run_judge(size, channel, limits):
    """The judge's clone: judge one candidate after another against the same tests, until the
    supervisor ends it."""
    job = line = None
    while pipes := socket.recv_fds(channel, 1, 3)[1]:
        report = pipes[2]
        if os.read(pipes[1], 1) != b"+":  # the candidate has not taken its own job yet
            return
        try:
            if job is None:
                job = json.loads(take(size))
                silence()
                preamble, tests = compile_preamble(job["preamble"]), Tests(job["test"], job["entry_point"])
            space = module_space()
            exec(preamble, space)
            line = Judge(pipes, classes_of(space), tests, limits)
            exec(tests.code, space)
            judge_one(line, space, job["entry_point"])
        except RowFault as error:
            os.write(report, b"?" + str(error).encode()[:300])
        except BaseException as error:
            name = getattr(error, "name", "")
            about = str(error) if isinstance(error, ValueError) else name if isinstance(name, str) else ""
            text = f"the row's own preamble or test fails: {type(error).__name__} {about}"
            os.write(report, b"?" + text.encode()[:300])
        if line:
            line.gone = "k"  # what the tests have kept must not speak to the next program
        for pipe in pipes:
            os.close(pipe)
        if threading.active_count() > 1:  # nor what they have left running
            return


def compile_preamble(source):
    try:
        return compile(source, "<preamble>", "exec", dont_inherit=True)
    except SyntaxError:  # perhaps it ends at the head of the function that the program is to fill
        return compile(source + "\n    pass", "<preamble>", "exec", dont_inherit=True)


def judge_one(line, space, entry_point):
    """Report on one candidate: number of tests (8 hexadecimal digits), a byte for each, a line
    break, the detail."""
    random.seed(0)  # tests that draw numbers draw the same for every program
    os.write(line.report, b"%08x" % line.tests.total)
    line.remotes[0] = candidate = Thing(line, {"here": 0})
    vars(candidate)["__name__"] = entry_point
    space["__judge__"] = line
    for name in line.tests.undefined - set(space) - set(vars(builtins)):
        space[name] = Thing(line, {"global": name})
    if entry_point.isidentifier():
        space[entry_point] = candidate  # some tests call the function by its own name
    code, why = "w", ""
    try:
        if not line.begin():
            code, why = line.fault, line.why
        else:
            space["check"](candidate)
            code = "." if line.done and not line.detail else "w"  # a `return` before the last test
    except RowFault:
        raise
    except BaseException as error:  # raised between the tests: those after it have failed
        code, why = line.fault or "w", line.why or type(error).__name__
    while line.done < line.tests.total:
        line.record(code, why)
    os.write(line.report, b"\n" + line.detail.encode())


# ---- a clone's walls (Linux, x86_64 and aarch64) ----

LIBC = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter lock, which a clone must inherit held
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
CLONE_THREAD, CLONE_FILES = 0x10000, 0x400
# System calls that no program needs, as numbers: processes, other processes, mounts and namespaces,
# sockets except for socketpair, messages that carry descriptors, memory that no limit counts
# (System V, memfd, keys, io, inotify, xattr, pages lent to pipes), file locks, priorities,
# administration of the machine.
REFUSED = {
    "x86_64": """
        57 58 59 322 101 310 311 312 272 308 165 166 155 161 133 259 303 304 41 42 43 49 50 288 29 30 31 64 68
        240 319 248 249 250 206 209 253 254 294 300 301 188 189 190 256 279 216 321 298 323 317 175 313 176
        246 320 169 167 168 163 179 164 227 159 305 170 171 172 173 103 135 154 153 134 180 212
        46 307 54 73 141 251 142 144 203 314 275 276 278""",
    "aarch64": """
        221 281 117 270 271 272 97 268 40 39 41 51 33 264 265 198 203 202 200 201 242 194 196 195 190 186 180
        279 217 218 219 0 2 26 27 262 263 5 6 7 238 239 234 280 241 282 277 105 273 106 104 294 142 224 225 89
        60 170 112 171 266 161 162 116 92 58 42 18
        211 269 208 32 140 30 118 119 122 274 76 77 75""",
}
# Calls that succeed and do nothing: they would make the host write its disks, and nothing in /tmp needs them
IDLE = {"x86_64": "26 74 75 162 277 306", "aarch64": "227 82 83 81 84 267"}  # msync, fsync, sync, syncfs, ...
# Calls of many meanings: (numbers on x86_64 and aarch64, position of the argument, the values that
# it may have).
LIMITED = {
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 1030, 1032)),  # duplicates, flags, the size of a pipe
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # terminals, FIONREAD, FIONBIO
    "prctl": ((157, 167), 0, (3, 15, 16, 0x53564D41)),  # PR_GET_DUMPABLE, names of threads and of memory
    "socketpair": ((53, 199), 0, (1,)),  # AF_UNIX
    "close_range": ((436, 436), 2, (0, 4)),  # no descriptor table of one's own, which no limit would count
}
# Column above, audit's name, clone()
MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
NO_CAPABILITIES = struct.pack("II", 0x20080522, 0)
# Numbers from 424 are the same everywhere: none is allowed except faccessat2 and those above
NEWER, NEEDED = 424, (439,)


def system(result, what):
    """The result of a C call; OSError where it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def call_filter():
    """The seccomp program of a clone, ready for prctl(). Refused calls fail with EPERM, unknown
    ones with ENOSYS."""
    column, machine, clone = MACHINES[platform.machine()]
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = ((give, 0, 0, code) for code in (
        0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS))
    calls = {NEWER - 1: [allow]} | {number: [allow] for number in NEEDED}
    calls |= {int(number): [refuse] for number in REFUSED[platform.machine()].split()}
    calls |= {int(number): [(give, 0, 0, 0x50000)] for number in IDLE[platform.machine()].split()}
    for numbers, position, values in LIMITED.values():
        tests = [(equal, len(values) - n, 0, value) for n, value in enumerate(values)]
        calls[numbers[column]] = [(load, 0, 0, 16 + 8 * position), *tests, refuse, allow]
    calls[clone] = [(load, 0, 0, 16), (bits, 0, 1, CLONE_THREAD), (bits, 1, 0, CLONE_FILES), refuse, allow]
    rules = {0: [allow]}  # each holds from its number up to the next
    for number, code in sorted(calls.items()):
        rules |= {number: code, number + 1: [unknown if number + 1 >= NEWER else allow]}

    def search(rules):
        """By halves: the kernel tries a filter on every call there is when a clone installs it."""
        if all(code == rules[0][1] for _, code in rules):
            return rules[0][1]
        low, high = rules[:len(rules) // 2], rules[len(rules) // 2:]
        code = search(low)
        return [(at_least, len(code), 0, high[0][0]), *code, *search(high)]

    code = [(load, 0, 0, 4), (equal, 1, 0, machine), kill, (load, 0, 0, 0), *search(sorted(rules.items()))]
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer)))
    program.buffer = buffer  # keeps it alive
    return program


def clone(isolated, is_judge):
    """fork(), into a new pid namespace, and a mount namespace for a judge. The interpreter must
    have one thread only."""
    if not isolated:
        return os.fork()
    flags = CLONE_NEWPID | CLONE_NEWNS * is_judge | signal.SIGCHLD
    return system(LIBC.syscall(MACHINES[platform.machine()][2], flags, 0, 0, 0, 0), "clone")


def set_limits(limits, isolated):
    """Called once by the supervisor, for all clones. NPROC counts its user namespace: itself, two
    clones, threads."""
    values = {"AS": limits["memory"] << 20, "FSIZE": limits["disk"] << 20,
              "NOFILE": limits["files"], "CORE": 0}
    if isolated:
        values |= {"NPROC": limits["threads"] + 3, "MEMLOCK": 0, "SIGPENDING": 64, "MSGQUEUE": 0}
        stack = resource.getrlimit(resource.RLIMIT_STACK)[1]  # programs may raise it: the memory is limited
        resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, stack))
    for name, value in values.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    sys.setrecursionlimit(1050)  # the 1000 a program may count on, and what stands below it here


def wall_off(box, is_judge):
    """Called by a fresh clone before it takes its job: a session of its own, no rights, few system
    calls."""
    os.setsid()
    if not is_judge:  # a judge serves many programs
        resource.setrlimit(resource.RLIMIT_CPU, box["seconds"])
    if box["isolated"]:
        if is_judge:
            mount_tmp(box)
        system(LIBC.prctl(1, 9, 0, 0, 0), "PR_SET_PDEATHSIG")  # die with the supervisor
        system(LIBC.capset(NO_CAPABILITIES, bytes(24)), "capset")
    os.chdir("/tmp")
    if box["filter"]:
        system(LIBC.prctl(22, 2, box["filter"], 0, 0), "seccomp")  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    gc.enable()


def mount_tmp(box):
    """An empty /tmp in the place of the old one."""
    LIBC.umount2(b"/tmp", 2)  # MNT_DETACH
    flags = 0x406  # nosuid, nodev, noatime
    system(LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", flags, box["disk"]), "mount of /tmp")


def state_of_tmp():
    """What differs if anything was made in /tmp, or done to it."""
    status, space = os.stat("/tmp"), os.statvfs("/tmp")
    return status.st_ctime_ns, status.st_mode, status.st_nlink, space.f_ffree, space.f_bfree


# ---- the supervisor: the warm process that a worker's container holds ----

def build_root(paths):
    """A root of binds of `paths`, pairs of (host's, here), where the container still shows the
    host's files."""
    system(LIBC.mount(b"none", b"/", None, 0x44000, None), "private mounts")  # MS_REC | MS_PRIVATE
    # In /sys, which no bind needs
    system(LIBC.mount(b"tmpfs", b"/sys", b"tmpfs", 6, b"mode=755"), "mount of a new root")
    for path, new in paths + [("/proc", "/proc")]:
        new = "/sys" + new
        if os.path.isdir(path):
            os.makedirs(new, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(new), exist_ok=True)
            open(new, "w").close()
        source = os.path.realpath(path).encode()
        system(LIBC.mount(source, new.encode(), None, 0x5000, None), f"bind of {path}")  # MS_BIND | MS_REC
    os.makedirs("/sys/tmp")
    os.chdir("/sys")
    system(LIBC.pivot_root(b".", b"."), "pivot_root")
    system(LIBC.umount2(b".", 2), "umount")  # MNT_DETACH: the host's root, stacked on the new one
    os.chdir("/")


def lock_down(paths):
    """Give up what root the container has, then make its files read-only and hide /proc: for all
    clones to come."""
    if paths:
        build_root(paths)
    if os.getuid() == 0:
        with contextlib.suppress(OSError):  # this root may be the name of an ordinary user, who has no other
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            LIBC.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
    user, group = os.geteuid(), os.getegid()
    system(LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
    maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {user} 1", "gid_map": f"{NOBODY} {group} 1"}
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    read_only = struct.pack("QQQQ", 3, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
    recursive = 0x8000
    system(LIBC.syscall(442, -100, b"/", recursive, read_only, len(read_only)),
           "mount_setattr (needs Linux 5.12)")
    for path in ("/proc", "/sys"):
        if os.path.isdir(path):
            system(LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", 7, b"size=4k,nr_inodes=2"), f"hiding {path}")
    # No core file of a clone, wherever the host sends those
    system(LIBC.prctl(4, 0, 0, 0, 0), "PR_SET_DUMPABLE")


def take(size):
    """Exactly `size` bytes of the host's pipe; exits where it has closed."""
    data = bytearray()
    while len(data) < size:
        data += os.read(0, size - len(data)) or sys.exit()
    return bytes(data)


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
        candidate.send('["ready", [], []]')
        judge = Judge((None, replies, None), {}, Tests(test, "f"), limits)
        judge.begin()
        function = judge.remotes[0] = Thing(judge, {"here": 0})
        message = judge.dump("call", [function, [1, [2.0]], [], [], {}])
        candidate.answer(*candidate.load(message.encode()))
        judge.load(judge.receive())
        exec(judge.tests.code, module_space())
    os.close(replies)
    os.close(answer)


def supervise(options):
    """The life of a worker: for each job on stdin two clones, and one line of JSON on stdout."""
    limits, isolated = options["limits"], options["isolated"]
    del sys.argv[1:]  # programs look at it
    sys.path[:] = [path for path in sys.path[1:] if path.startswith(sys.base_prefix)] + options["path"]
    os.closerange(3, 1024)
    box = {"limits": limits, "isolated": isolated, "judge": None, "channel": None,
           "candidate": None, "tmp": None}
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    if isolated:
        lock_down(options["root"])
        if platform.machine() not in MACHINES:
            raise OSError(f"no list of system calls for {platform.machine()}: "
                          "add it to REFUSED, LIMITED and MACHINES")
    os.fchdir(proc)  # it is hidden by now; this process looks at its clones there
    os.close(proc)
    system(LIBC.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    for name in WARM + options["warm"]:
        with contextlib.suppress(ImportError):
            __import__(name)
    builtins.exit = builtins.quit = sys.exit  # as in an interactive Python, which contest programs rely on
    rehearse(limits)
    LIBC.mount, LIBC.capset  # looked up here, not in each clone
    os.environ.clear()
    os.environ.update(HOME="/tmp", LANG="C.UTF-8")
    set_limits(limits, isolated)
    seconds = int(limits["cpu"]) + 2  # where the supervisor's own look at the clock would fail
    box |= {
        "filter": call_filter() if platform.machine() in MACHINES else None,
        "seconds": (seconds, seconds),
        "disk": f"size={limits['disk']}m,nr_inodes={limits['files'] * 16},mode=777".encode(),
    }
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        *sizes, patience = struct.unpack("IIf", take(12))
        os.write(1, json.dumps(one_program(box, *sizes, patience)).encode() + b"\n")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(box["candidate"], 0)  # not before: the host need not wait for its end


def one_program(box, candidate_size, judge_size, patience):
    """The verdict of one program. No judge_size: its tests are those of the last, and so is the
    judge.

    That judge met only candidates that kept to the rules; any other costs the judge its life. Exits
    if a clone fails.
    """
    if box["isolated"] and (not box["tmp"] or state_of_tmp() != box["tmp"]):
        mount_tmp(box)
        box["tmp"] = state_of_tmp()
    if judge_size:  # before the candidate, whose threads could use up the number of processes
        end_judge(box)
        box["channel"], theirs = socket.socketpair()
        box["judge"] = clone_side(box, judge_size, theirs.fileno())
        theirs.close()
    requests, ask = os.pipe()
    replies, answer = os.pipe()
    results, report = os.pipe()
    candidate = box["candidate"] = clone_side(box, candidate_size, requests, answer)
    socket.send_fds(box["channel"], [b"+"], [ask, replies, report])
    for pipe in (requests, ask, replies, answer, report):
        os.close(pipe)
    run = Run(box, results, patience)
    run.watch()
    os.close(results)
    verdict = run.verdict()
    os.kill(candidate, signal.SIGKILL)
    if not verdict["kept"]:
        end_judge(box)
    return verdict


def clone_side(box, size, *keep):
    """Clone the candidate's side (two pipes to keep) or the judge's (one channel): its pid."""
    is_judge = len(keep) == 1
    pid = clone(box["isolated"], is_judge)
    if pid:
        return pid
    try:
        below = 3
        for pipe in sorted(keep):
            os.closerange(below, pipe)
            below = pipe + 1
        os.closerange(below, 256)
        wall_off(box, is_judge)
        if is_judge:
            run_judge(size, socket.socket(fileno=keep[0]), box["limits"])
        else:
            job = json.loads(take(size))
            os.write(keep[1], b"+")
            silence()
            run_candidate(job, *keep, box["limits"])
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(0)


def silence():
    null = os.open("/dev/null", os.O_RDWR)  # opened here: the flags of an open file are shared
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if null > 2:
        os.close(null)


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

    def __init__(self, box, results, patience):
        self.limits, self.results, self.patience = box["limits"], results, patience
        self.sides = self.candidate, self.judge = box["candidate"], box["judge"]
        self.data = b""  # the judge's report
        self.stopped = ""  # why the candidate was stopped
        self.judge_stopped = False
        self.slow = False  # whether it was given a lower priority, which lasts
        self.waited = 0.0  # s in which neither side computed
        self.begun = self.clocks()

    def clocks(self):
        """Seconds: what both sides waited; CPU time of the candidate and of the judge, with all
        their threads."""
        return [self.waited, *(time.clock_gettime(~pid << 3 | 2) for pid in self.sides)]

    def waits(self):
        """The share of the time that counts as waiting. None where a thread runs or could run: a loaded
        machine's delay is no waiting of a program. Little where the kernel holds one, as for a disk."""
        states = set()
        for thread in [f"{pid}/task/{thread}" for pid in self.sides for thread in os.listdir(f"{pid}/task")]:
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
            if why and not self.stopped:  # the judge sees its pipe end, and reports the rest as failed
                self.stopped, last, first = why, clocks, clocks
                self.kill(*self.sides if why == "later" else [self.candidate])
            elif why and why != "later":
                self.judge_stopped = True
                self.kill(self.judge)
            if now - signed > SIGN:
                os.write(1, b"waiting\n" if self.waited - waited > SIGN / 2 else b"running\n")
                signed, waited = now, self.waited
                self.slow = True
                # Short programs first. And no clone can stop itself, so something else did if one is stopped.
                for pid in self.sides:
                    with contextlib.suppress(ProcessLookupError):
                        os.setpriority(os.PRIO_PGRP, pid, NICE)
                    os.kill(pid, signal.SIGCONT)

    def over(self, then, now, scope):
        waited, *used = (b - a for a, b in zip(then, now))
        if max(used) > self.limits[scope + "cpu"] or waited > self.limits[scope + "wall"]:
            return "timeout"
        return ""

    def impatient(self, now):
        return "later" if self.patience and sum(now) - sum(self.begun) > self.patience else ""

    def read(self):
        try:
            more = os.read(self.results, 1 << 20)
        except BlockingIOError:
            return b""
        self.data += more[:(1 << 20) - len(self.data)]
        return more

    def kill(self, *pids):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def verdict(self):
        """What sandbox.py says of a verdict; `kept`: the judge may stay."""
        used = self.clocks()
        seconds = round(sum(used[1:]) - sum(self.begun[1:]) + self.waited, 3)
        if self.stopped == "later":
            return {"later": True, "kept": False}
        report, _, fault = self.data.decode("ascii", "replace").partition("?")
        codes, whole, detail = report[8:].partition("\n")
        cut = not whole and not fault and not self.judge_stopped
        if cut and exit_status(self.judge) in (None, 0, signal.SIGKILL):
            sys.exit("the judge was killed from outside")
        total = 0 if fault else int(report[:8] or "0", 16)
        codes = codes[:total].ljust(total, "k")
        word = WORDS.get(codes.replace(".", "")[:1], "pass") if total else "infra"
        if word == "infra":
            detail = fault or "the judge crashed"
        if word == "killed":
            word, how = self.death(used[1] - self.begun[1])
            detail = f"test {codes.index('k') + 1}: {how}"
        passed = codes.count(".")
        return {"reward": passed / total if total else None, "passed": passed, "total": total,
                "verdict": word, "detail": detail, "seconds": seconds,
                "kept": not self.stopped and not self.slow and word in ("pass", "wrong", "exception")}

    def death(self, seconds):
        """(verdict, detail) of a candidate that has ended, or closed its pipes."""
        status = None if self.stopped else exit_status(self.candidate)
        if self.stopped or seconds > self.limits["cpu"]:
            return "timeout", "stopped"
        if status == signal.SIGKILL:  # nothing inside can do this
            sys.exit("the program was killed from outside; is there too little memory?")
        return "killed", f"signal {status}" if status else "exited"


if __name__ == "__main__":
    supervise(json.loads(sys.argv[1]))
