"""The judge: the clone that runs the tests, compares and counts. It stays for the next program of the
same tests.

In: the tests' part of a job, and for each program three pipes: calls out, values back, a report. Out:
the report.

    python -m pytest tests/test_sandbox_breaches.py
"""
import builtins
import collections.abc
import contextlib
import io
import json
import operator
import os
import random
import socket
import sys
import threading

from .channel import Channel, Remote
from .confine import module_space, silence, take
from .surroundings import first
from .tests import Tests
from .values import BASES, CandidateError, classes_of, describe, is_builtin, restore

# Exceptions that say "enough" to a loop: a success, if a program could raise them
ENDS = {"StopIteration", "StopAsyncIteration", "GeneratorExit"}


class CandidateLost(BaseException):
    """The candidate can answer no more: what is not yet tested has failed. Not an Exception: no
    test may catch it."""


class RowFault(BaseException):
    """The row's own fault, or a value that cannot be carried: there is no verdict."""


class CandidateObject(Remote):
    """What stays in the candidate: a test may call it, and get and set its attributes. It compares
    as itself only."""

    def __call__(self, *args, **keywords):
        with self._channel.lock:
            return self._channel.call(self, args, keywords)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._channel.ask("get", [self, name])[0]

    def __setattr__(self, name, value):
        self._channel.ask("set", [self, name, value])


class Judge(Channel):
    """The judge's end of the channel: `test` is the context that each test runs in."""

    remote = CandidateObject

    def __init__(self, pipes, classes, tests, limits):
        requests, replies, self.report = pipes
        super().__init__(replies, requests, classes, limits)
        self.longest["receive"] = limits["output"] << 20
        self.tests, self.done = tests, 0
        self.lost = ""  # the code of why the candidate can answer no more
        self.fault = self.why = ""  # of the present test: the code and the name of what the candidate raised
        self.detail = ""  # of the first test that failed
        self.level = 0  # calls under way: one inside another where the program calls a function of the test

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
        self.lost = code
        raise CandidateLost from None

    def trusting_nothing(self, step):
        """The result of a step with the candidate; where that is no proper one, CandidateLost now and ever
        after."""
        if self.lost:
            raise CandidateLost
        try:
            return step()
        except (CandidateLost, RowFault):
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
            raise RowFault("the tests pass what cannot be sent to a program: use --judge=together") from None
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
        if not any(thing is own for own in self.kept):
            raise ValueError("not an object of the test")
        try:
            if operation == "call":
                args, names, values = rest
                reply = self.dump("value", thing(*args, **dict(zip(names, values))))
            else:
                reply = self.dump("value", {"more": self.do_more}[operation](thing, *rest))
        except Exception as error:
            reply = self.dump("error", [describe(error)[0], [str(error)], {}])
        self.send(reply)

    def call(self, thing, args, keywords):
        """The value of a call. The arguments are changed as the call changed them."""
        args, values = list(args), list(keywords.values())
        self.after = None
        try:
            reply = self.ask("call", [thing, args, list(keywords), values])
            value, self.after = self.trusting_nothing(lambda: [reply[0], reply[1]])
        finally:
            if self.after is not None:
                self.trusting_nothing(lambda: restore([args, values], self.after))
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

    def pack_rare(self, value, kind):
        if isinstance(value, BASES) and kind.__module__ == "solution" or isinstance(value, io.IOBase):
            raise TypeError  # of the test's own class, or a file, which is more than its lines
        return super().pack_rare(value, kind)

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
        if kind in (NameError, ImportError, ModuleNotFoundError) and not self.fault and not self.lost:
            raise RowFault(f"the tests fail by themselves: {kind.__name__} {error.name}; with "
                           "--judge=together they see what the program defines")
        code = "." if kind is None else self.lost or self.fault or "w"
        if code in "we" and (found := first(self.tests.source, " ".join(self.tests.candidates))):
            line, what = found
            if trace.tb_lineno >= line:
                raise RowFault(f"the tests use {what} (line {line}), which does not reach the program: "
                               "use --judge=together")
        self.record(code,
                    self.why or ("" if kind in (None, AssertionError) else kind.__name__))
        return True

    def record(self, code, why=""):
        """Report one test: a byte. Of the first that fails also why, as the name of a built-in
        exception: no text of a program or a test may reach the supervisor, whose memory every later
        program inherits."""
        code = self.lost or code
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
    job = judge = None
    while pipes := socket.recv_fds(channel, 1, 3)[1]:
        report = pipes[2]
        if os.read(pipes[1], 1) != b"+":  # the candidate has not taken its own job yet
            return
        try:
            if job is None:
                job = json.loads(take(size))
                silence()
                preamble, tests = compile_preamble(job["preamble"]), Tests(job["test"], job["entry_point"])
                tests.source = job["test"]
            space = module_space()
            exec(preamble, space)
            judge = Judge(pipes, classes_of(space), tests, limits)
            exec(tests.code, space)
            judge_one(judge, space, job["entry_point"])
        except RowFault as error:
            os.write(report, b"?" + str(error).encode()[:300])
        except BaseException as error:
            name = getattr(error, "name", "")
            about = str(error) if isinstance(error, ValueError) else name if isinstance(name, str) else ""
            text = f"the row's own preamble or test fails: {type(error).__name__} {about}"
            os.write(report, b"?" + text.encode()[:300])
        if judge:
            judge.lost = "k"  # what the tests have kept must not speak to the next program
        for pipe in pipes:
            os.close(pipe)
        if threading.active_count() > 1:  # nor what they have left running
            return


def compile_preamble(source):
    try:
        return compile(source, "<preamble>", "exec", dont_inherit=True)
    except SyntaxError:  # perhaps it ends at the head of the function that the program is to fill
        return compile(source + "\n    pass", "<preamble>", "exec", dont_inherit=True)


def judge_one(judge, space, entry_point):
    """Report on one candidate: number of tests (8 hexadecimal digits), a byte for each, a line
    break, the detail."""
    random.seed(0)  # tests that draw numbers draw the same for every program
    os.write(judge.report, b"%08x" % judge.tests.total)
    judge.remotes[0] = candidate = CandidateObject(judge, {"here": 0})
    vars(candidate)["__name__"] = entry_point
    space["__judge__"] = judge
    for name in judge.tests.undefined - set(space) - set(vars(builtins)):
        space[name] = CandidateObject(judge, {"global": name})
    if entry_point.isidentifier():
        space[entry_point] = candidate  # some tests call the function by its own name
    code, why = "w", ""
    try:
        if not judge.begin():
            code, why = judge.fault, judge.why
        else:
            space[judge.tests.check](candidate)
            code = "." if judge.done and not judge.detail else "w"  # a `return` before the last test
    except RowFault:
        raise
    except BaseException as error:  # raised between the tests: those after it have failed
        code, why = judge.fault or "w", judge.why or type(error).__name__
    while judge.done < judge.tests.total:
        judge.record(code, why)
    leaves = "!" * (threading.active_count() > 1)  # something that runs on: this judge will end
    os.write(judge.report, b"\n" + (leaves + judge.detail).encode())
