"""The candidate: the clone that runs one program, and answers the judge's calls.

In: the program's part of a job, calls on a pipe. Out: values, or exceptions, on another.

    python -m pytest tests/test_sandbox_honest.py
"""
import atexit
import collections.abc
import contextlib
import gc
import itertools
import json
import marshal
import os
import sys
import threading
from typing import NamedTuple

from .channel import Channel, unlimited
from .confine import compile_preamble, module_space, silence, take
from .values import CONSTANTS, KINDS, SCALARS, carried, classes_of, containers, describe


class TooLarge(Exception):
    """A message beyond the limit."""


class Contents(NamedTuple):
    """Stands for what a container of the arguments holds, where that itself stands for the container."""
    of: object


class Candidate(Channel):
    """The program's end of the channel."""

    def __init__(self, source, target, limits):
        super().__init__(source, target, {})
        self.longest = limits["output"] << 20  # bytes of an answer
        self.kept, self.numbers = [], {}  # what is not sent: the judge knows it by number
        self.held = []     # the containers that a call was given
        self.after = None  # [number, contents] of what a call changed of its arguments

    def start(self, job):
        """Run the program, up to its function."""
        self.space = module_space()
        preamble, program = compile_preamble(job["preamble"]), job["program"]
        try:
            program = compile(program, "<program>", "exec", dont_inherit=True)
        except SyntaxError:  # perhaps it goes on inside the preamble's last function
            program = compile(job["preamble"] + "\n" + program, "<program>", "exec", dont_inherit=True)
        if job["entry_point"] == "__main__":
            self.keep(script([preamble, program]))
            return
        exec(preamble, self.space)
        self.classes = classes_of(self.space)
        exec(program, self.space)
        for name, kind in self.classes.items():  # its own class of such a name takes the preamble's place
            own, constant = self.space.get(name), issubclass(kind, CONSTANTS)
            if isinstance(own, type) and (issubclass(own, CONSTANTS) if constant else carried(own)):
                self.classes[name] = own
        function = eval(job["entry_point"], self.space)
        if not callable(function):
            raise TypeError("the entry point is not callable")
        self.keep(function)

    def serve(self):
        """Answer the judge until killed."""
        while True:
            self.forget()
            self.after = None
            self.answer(*self.load(self.receive()))

    def answer(self, operation, values):
        try:
            reply = self.dump("value", [getattr(self, f"do_{operation}")(*values), self.after])
        except BaseException as error:  # the program's, or of a value that cannot be sent
            reply = self.failure(error)
        if len(reply) > self.longest:
            reply = self.failure(TooLarge())
        self.send(reply)

    def failure(self, error):
        """The message of an exception. Of one whose parts are large, or fail, only its class."""
        with contextlib.suppress(BaseException):
            reply = self.dump("error", [*describe(error), self.after])
            if len(reply) < self.longest // 4:
                return reply
        names = [[type(error).__module__, type(error).__name__], ["builtins", "Exception"]]
        return self.dump("error", [names, [], {}, None])

    def do_call(self, function, args, names, values):
        keywords = dict(zip(names, values))
        if SCALARS.issuperset(map(type, args + values)):
            return function(*args, **keywords)
        given = [Contents(thing) for thing in containers([args, values])]
        self.held = given  # until the next call: a new list must not get the id of one of these
        self.given = {id(contents.of): number for number, contents in enumerate(given)}
        before = self.state(given)
        try:
            return function(*args, **keywords)
        finally:
            *contents, objects = [now != then for now, then in zip(self.state(given), before)]
            if objects or any(contents):
                self.after = [[n, given[n]] for n, changed in enumerate(contents) if changed or objects]

    def state(self, given):
        """Bytes for each container, and for all instances, that differ where a call has changed them."""
        _, contents, table = unlimited(self.levels, self.flatten, "", given)
        return [marshal.dumps(part, 2) for part in [*contents, table]]

    def do_get(self, thing, name):
        return getattr(thing, name)

    def do_set(self, thing, name, value):
        setattr(thing, name, value)

    def do_next(self, iterator):
        """[the next item], or nothing where there is none."""
        return list(itertools.islice(iterator, 1))

    def do_str(self, thing):
        return str(thing)

    def pack_other(self, value):
        """As the nearest kind that can be sent, or as a number."""
        if type(value) is Contents:
            number = self.given.pop(id(value.of))
            try:
                return self.pack(value.of)
            finally:
                self.given[id(value.of)] = number
        if isinstance(value, collections.abc.Iterator) and not callable(value):
            return {"iterator": self.keep(value)}
        for base, plain in ((int, int.__int__), (float, float.__float__), (str, str.__str__)):
            if isinstance(value, base):
                return plain(value)  # not base(value): str() of a member of an enum is its name
        for tag, (base, parts, _) in KINDS.items():
            if isinstance(value, base):
                return {tag: self.pack(parts(value))}
        return {"kept": self.keep(value)}

    def keep(self, value):
        number = self.numbers.setdefault(id(value), len(self.kept))
        if number == len(self.kept):
            self.kept.append(value)
        return number

    def unpack_kept(self, number):
        return self.kept[number]

    def unpack_global(self, name):
        """What the test calls by a name that only the program can have defined."""
        return self.space[name]


def script(codes):
    """A function that runs a whole program on a text, to its very end: what the program prints."""
    os._exit = sys.exit
    folder = os.getcwd()

    def run(text):
        forget_main()
        silence()  # the last run may have closed what it read
        with open(f"{folder}/.in", "w+b") as stdin, open(f"{folder}/.out", "w+b") as stdout:
            stdin.write(text.encode("utf-8", "surrogateescape"))
            stdin.seek(0)
            os.dup2(stdin.fileno(), 0)
            os.dup2(stdout.fileno(), 1)
            sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
            sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
            sys.__stdout__ = sys.stdout
            run_main(codes, f"{folder}/main.py")
            flush()
            forget_main()
            flush()
            stdout.seek(0)
            return stdout.read().decode("utf-8", "replace")
    return run


def run_main(codes, path):
    """Run a script, its threads, and what `atexit` holds."""
    try:
        space = module_space("__main__")
        space["__file__"] = path
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


def forget_main():
    """Let a script's objects go, as at its end: files write what they hold, and close descriptors 0 and 1
    now, not when these are another run's."""
    sys.modules.pop("__main__", None)
    gc.collect()


def flush():
    for file in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(AttributeError, ValueError):  # no file, or closed
            file.flush()


def run_candidate(size, requests, replies, limits):
    """The life of the clone: take the job, run the program, answer the judge."""
    job = json.loads(take(size))
    os.write(replies, b"+")
    silence()
    candidate = Candidate(requests, replies, limits)
    try:
        candidate.start(job)
    except BaseException as error:
        candidate.send(candidate.failure(error))
        return
    candidate.send(candidate.dump("value", [None, None]))  # ready
    candidate.serve()
