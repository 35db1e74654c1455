"""The candidate: the clone that runs one program, and answers the judge's calls.

In: the program's part of a job, calls on a pipe. Out: values, or exceptions, on another.

    python -m pytest tests/test_sandbox_honest.py
"""
import ast
import atexit
import contextlib
import importlib
import json
import marshal
import operator
import os
import sys
import threading

from .channel import Channel, TooLarge
from .confine import module_space, silence, take
from .values import SCALARS, classes_of, describe


class Candidate(Channel):
    """The program's end of the channel."""

    def __init__(self, source, target, limits):
        super().__init__(source, target, {}, limits)
        self.longest["send"] = limits["output"] << 20
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
            reply = self.dump("value", getattr(self, f"do_{operation}")(*values))
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

    def do_call(self, function, args, names, values):
        """[the value of a call, its arguments if they changed]."""
        before, keywords = self.before, dict(zip(names, values))
        try:
            value = function(*args, **keywords)
        finally:
            if before:
                _, body, table = self.flatten("", [args, values])
                self.after = [args, values] if marshal.dumps([*body, table], 2) != before else None
        return [value, self.after]

    def do_get(self, thing, name):
        return [getattr(thing, name)]

    def do_set(self, thing, name, value):
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
    folder = os.getcwd()

    def run(text):
        silence()  # the last run may have closed what it read
        with open(f"{folder}/.in", "w+b") as stdin, open(f"{folder}/.out", "w+b") as stdout:
            stdin.write(text.encode("utf-8", "surrogateescape"))
            stdin.seek(0)
            os.dup2(stdin.fileno(), 0)
            os.dup2(stdout.fileno(), 1)
            sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
            sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
            sys.__stdout__ = sys.stdout
            try:
                space = module_space("__main__")
                space["__file__"] = f"{folder}/main.py"
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
    candidate.send('["ready", [], []]')
    candidate.serve()
