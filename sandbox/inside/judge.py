"""The judge: the clone that runs the tests, compares and counts. It stays for the next program of the
same tests.

In: the tests' part of a job, and for each program three pipes: calls out, values back, a report. Out:
the report.

    python -m pytest tests/test_sandbox_breaches.py
"""
import builtins
import json
import os
import random
import signal
import socket
import threading

from .channel import Channel
from .confine import compile_preamble, module_space, silence, take
from .surroundings import first
from .tests import Report, RowFault, Tests
from .values import (BASES, CONSTANTS, CandidateError, carried, classes_of, containers, exception_of,
                     is_builtin, refill)

# Exceptions that say "enough" to a loop, a success if a program could raise them, or that the row is at fault
ENDS = {"StopIteration", "StopAsyncIteration", "GeneratorExit", "NameError", "ImportError"}


class CandidateLost(BaseException):
    """The candidate can answer no more: what is not yet tested has failed. Not an Exception: no
    test may catch it."""


class CandidateObject:
    """What stays in the candidate: a test may call it, and get and set its attributes."""

    def __init__(self, judge, reference):
        self.__dict__.update(_judge=judge, _reference=reference)

    def __call__(self, /, *args, **keywords):
        return self._judge.ask("call", [self, [*args], [*keywords], [*keywords.values()]])

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._judge.ask("get", [self, name])

    def __setattr__(self, name, value):
        self._judge.ask("set", [self, name, value])

    def __str__(self):
        return self._judge.ask("str", [self])

    def __eq__(self, other):
        """As itself only: a program has no say in this. But no program could be right where the other one is
        of a class of the library that is not sent, and says nothing itself."""
        kind = type(other)
        says = getattr(kind.__eq__, "__module__", "") == "solution" or isinstance(other, SAYING)
        if not says and kind.__eq__(other, self) is NotImplemented:
            with self._judge.lock:
                self._judge.dump("", other)
        return NotImplemented

    __hash__ = object.__hash__

    def __enter__(self):
        self._judge.unfit("the tests use the program in a `with`")

    __exit__ = __enter__


class CandidateIterator(CandidateObject):
    """An iterator of the program, whose items come when they are asked for."""

    def __iter__(self):
        return self

    def __next__(self):
        for item in self._judge.ask("next", [self]):
            return item
        raise StopIteration


# What is equal to values of other kinds, too
SAYING = CandidateObject, int, float, str, *BASES


class Judge(Channel, Report):
    """The judge's end of the channel."""

    levels = 2 * Channel.levels  # what came can be sent back, from wherever in a test

    def __init__(self, pipes, classes, tests, limits):
        requests, replies, report = pipes
        Channel.__init__(self, replies, requests, classes)
        Report.__init__(self, tests.total, lambda text: os.write(report, text.encode()))
        self.longest = limits["output"] << 20
        self.tests = tests
        self.objects_there = {}  # by number
        self.row_fault = None
        self.lost = ""  # the code of why the candidate can answer no more
        self.fault = self.why = ""  # of the present test: the code and the name of what the candidate raised
        self.linked = False  # whether it has put a list that it was given into another
        self.changed = False  # whether a call has changed its arguments, which may be a module's
        self.lock = threading.RLock()  # one thread of the test asks at a time

    def ask(self, operation, values):
        """What the candidate answers. The arguments of a call are changed as the call changed them."""
        with self.lock:
            self.forget()
            return self.exchange(self.dump(operation, values), values[1::2])

    def exchange(self, message, arguments):
        """The answer to a message. Where it is no proper one, CandidateLost now and ever after."""
        if self.lost:
            raise CandidateLost
        self.arguments, self.containers = arguments, None
        try:
            if message:
                self.send(message)
            head, values = self.load(self.receive(self.longest))
            *parts, after = values
            if after is not None:
                for number, contents in after:
                    refill(self.unpack_given(number), contents)
                self.changed = True
            result = self.error(*parts) if head == "error" else parts[0]
        except (EOFError, BrokenPipeError):
            self.lost = "k"
        except BaseException:
            self.lost = "o"
        if self.lost:
            raise CandidateLost
        if head == "error":
            raise result
        return result

    def dump(self, head, values):
        try:
            return super().dump(head, values)
        except (TypeError, RecursionError) as error:
            if self.linked and isinstance(error, RecursionError):  # the program may have made a ring
                self.lost = "o"
                raise CandidateLost from None
            self.unfit(f"the tests have what cannot be sent to a program ({error})")

    def error(self, names, args, fields):
        """The exception that the candidate raised, as the nearest of its classes that is built in, the
        preamble's, or spoken of by the tests: those of the library may mean something to what runs a
        test. Never one that ends `all(map(candidate, ...))` early, unless the tests speak of it."""
        name = names[0][1]
        known = [pair for pair in names if pair[0] in ("builtins", "solution") or pair[1] in self.tests.names]
        error = exception_of(known, args, fields, self.classes)
        if any(kind.__name__ in ENDS - self.tests.names for kind in type(error).__mro__):
            error = CandidateError(*error.args)
        self.fault = {"MemoryError": "m", "TooLarge": "o"}.get(name, "e")
        self.why = next((name for _, name in names if is_builtin(name)), "")
        return error

    def pack_other(self, value):
        if isinstance(value, CandidateObject):
            return value._reference
        raise TypeError(f"a {type(value).__name__}")

    def unpack_kept(self, number, kind=CandidateObject):
        if type(number) is not int:
            raise ValueError("not a number")
        if number not in self.objects_there:
            self.objects_there[number] = kind(self, {"kept": number})
        return self.objects_there[number]

    def unpack_given(self, number):
        """A list or the like that this call was given: it stays what it is, wherever the call has put it."""
        if self.containers is None:
            self.linked, self.containers = True, containers(self.arguments)
        return self.containers[number]

    def unpack_iterator(self, number):
        return self.unpack_kept(number, CandidateIterator)

    # ---- tests ----

    def __exit__(self, kind, error, trace):
        if self.row_fault:
            raise self.row_fault
        missing = kind is NameError and not self.detail  # else perhaps a test that failed was to set it
        if (missing or kind in (ImportError, ModuleNotFoundError)) and not self.fault and not self.lost:
            raise RowFault(f"the tests fail by themselves: {kind.__name__} {error.name}; with "
                           "--judge=together they see what the program defines")
        if self.judged(kind)[0] in "we" and (what := self.surroundings(trace.tb_lineno)):
            self.unfit(f"the tests use {what}, which does not reach the program")
        self.record(kind)
        self.fault = self.why = ""
        return True

    def leaves(self):
        """Whether the next program could meet what this one's tests have left: this judge will end."""
        timers = any(signal.getitimer(kind)[0] for kind in range(3))
        return timers or threading.active_count() > 1 or self.changed or bool(first(self.tests.source)[1])

    def unfit(self, why):
        """The row has no verdict, also where what runs a test catches this, as unittest does."""
        self.row_fault = RowFault(f"{why}: use --judge=together")
        raise self.row_fault

    def judged(self, kind):
        if not kind and not self.lost:
            return ".", ""
        return self.lost or self.fault or "w", self.why or getattr(kind, "__name__", "")

    def surroundings(self, line):
        """What the row has, up to this line of its tests, that does not reach the program; or nothing."""
        for name, kind in self.classes.items():
            if not issubclass(kind, (*CONSTANTS, BaseException)) and not carried(kind):
                return f"objects of {name}"
        begins, what = first(self.tests.source)
        return f"{what} (line {begins})" if line >= begins else ""


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


def judge_one(judge, space, entry_point):
    """Report on one candidate: number of tests (8 hexadecimal digits), a byte for each, a line
    break, the detail."""
    random.seed(0)  # tests that draw numbers draw the same for every program
    judge.say(f"{judge.total:08x}")
    candidate = judge.unpack_kept(0)
    vars(candidate)["__name__"] = entry_point
    space["__judge__"] = judge
    for name in judge.tests.undefined - set(space) - set(vars(builtins)):
        space[name] = CandidateObject(judge, {"global": name})
    if entry_point.isidentifier():
        space[entry_point] = candidate  # some tests call the function by its own name

    def check():
        judge.exchange(b"", [])  # the program has run up to its function
        space[judge.tests.check](candidate)
    judge.run(check)
    judge.say("\n" + "!" * judge.leaves() + judge.detail)
