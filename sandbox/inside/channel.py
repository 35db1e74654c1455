"""The channel between a test and the program it tests: two processes that exchange values as plain data
(JSON).

Both ends use it: the judge runs the tests, the candidate runs the program. Neither trusts the other.
In: values and the names of operations. Out: length-prefixed JSON on a pipe, and the same values on the
other side.

What is plain data travels by value (values.py), and so do instances of the classes of the row's preamble.
All else stays where it is, and the other side gets a `Remote`, which can be called. An iterator travels item
by item.

    python -m pytest tests/test_sandbox_honest.py
"""
import collections.abc
import enum
import itertools
import json
import os
import sys
import threading

from .confine import take
from .values import (BASES, CONSTANTS, KINDS, SCALARS, TAGS, decode, encode, exception_of, fields_of,
                     set_fields)

ENCODER = json.JSONEncoder(ensure_ascii=False)


class TooLarge(Exception):
    """A message beyond the limit."""


class Remote:
    """What stayed on the other side: this side knows a reference to it, and can call it."""

    def __init__(self, channel, reference):
        self.__dict__.update(_channel=channel, _reference=reference)

    def __call__(self, *args, **keywords):
        return self._channel.ask("call", [self, list(args), list(keywords), list(keywords.values())])


class Channel:
    """One end of two pipes. Each end may ask while it owes an answer: a program calls a function of
    the test."""

    remote = Remote

    def __init__(self, source, target, classes, limits):
        self.source, self.target, self.classes = source, target, classes
        self.longest = {"send": 1 << 31, "receive": 1 << 31}  # bytes of a message
        self.depth = limits["depth"]
        self.kept, self.numbers = [], {}  # what is not sent: the other side knows it by number
        self.remotes = {}  # what stays there, by number
        self.streams = {}  # iterators of the other side, by id: (what stands for it here, reference)
        # Instances of the preamble's classes that both sides know in this call, and their positions by id
        self.objects, self.positions = [], {}
        self.lock = threading.RLock()  # one thread asks at a time, however deep

    # ---- values to JSON types: scalars and lists stand for themselves, all else is a dict of one tag ----

    def pack(self, value):
        """TypeError for what can neither be sent nor called."""
        kind = type(value)
        if kind is list:
            return value if SCALARS.issuperset(map(type, value)) else [self.pack(item) for item in value]
        if kind in SCALARS:
            return value
        if kind in TAGS:
            tag = TAGS[kind]
            return {tag: self.pack(KINDS[tag][1](value))}
        if kind.__module__ == "solution" and kind.__name__ in self.classes:
            return self.pack_instance(value, kind)
        return self.pack_rare(value, kind)

    def pack_instance(self, value, kind):
        """An instance of a class of the preamble: in the table, unless it is a kind of constant."""
        if isinstance(value, CONSTANTS):
            args = [value.value] if isinstance(value, enum.Enum) else [*value]
            return {"made": [kind.__name__, self.pack(args)]}
        if isinstance(value, (*BASES, BaseException, type)):
            return self.pack_rare(value, kind)
        number = self.positions.get(id(value))
        if number is None:
            number = self.positions[id(value)] = len(self.objects)
            self.objects.append(value)
        if number not in self.table:
            self.table[number] = None
            self.queue.append(number)
        return {"object": number}

    def pack_rare(self, value, kind):
        if isinstance(value, Remote):
            return value._reference
        if id(value) in self.streams:
            return self.streams[id(value)][1]
        if isinstance(value, collections.abc.Iterator) and not callable(value):
            return {"iterator": self.refer(value)}
        if kind.__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
            return {"numpy": [value.dtype.str, list(value.shape), *encode(value.tobytes())]}
        for base in (int, float, str):
            if isinstance(value, base):
                return self.pack(base(value))
        for tag, (base, parts, _) in KINDS.items():
            if isinstance(value, base):
                return {tag: self.pack(parts(value))}
        return self.refer(value)

    def refer(self, value):
        """A reference to what is not sent."""
        number = self.numbers.setdefault(id(value), len(self.kept))
        if number == len(self.kept):
            self.kept.append(value)
        return {"there": number}

    # ---- and back: an exception for whatever pack() does not write ----

    def unpack(self, value, depth):
        if depth < 0:
            raise ValueError("nested too deep")
        if type(value) is list:
            if SCALARS.issuperset(map(type, value)):
                return value
            return [self.unpack(item, depth - 1) for item in value]
        if type(value) is not dict:
            return value
        (tag, body), = value.items()
        if tag in KINDS:
            body = self.unpack(body, depth - 1)
            if type(body) is not list:
                raise ValueError("a tag without a list")
            return KINDS[tag][2](body)
        return getattr(self, f"unpack_{tag}")(body, depth - 1)

    def unpack_made(self, body, depth):
        name, args = body
        if not issubclass(self.classes[name], CONSTANTS):
            raise ValueError("not a constant")
        return self.classes[name](*self.unpack(args, depth))

    def unpack_object(self, body, depth):
        return self.objects[body]

    def unpack_iterator(self, body, depth):
        stream = self.stream(self.unpack(body, depth))
        self.streams[id(stream)] = stream, {"here": body["there"]}
        return stream

    def unpack_numpy(self, body, depth):
        dtype, shape, data = body
        return sys.modules["numpy"].frombuffer(bytearray(decode([data])), dtype).reshape(shape)[()]

    def unpack_there(self, body, depth):
        if type(body) is not int:
            raise ValueError("not a number")
        if body not in self.remotes:
            self.remotes[body] = self.remote(self, {"here": body})
        return self.remotes[body]

    def unpack_here(self, body, depth):
        if type(body) is not int or not 0 <= body < len(self.kept):
            raise ValueError("no such reference")
        return self.kept[body]

    def stream(self, iterator):
        """The items of an iterator of the other side, each when it is asked for."""
        while items := self.ask("more", [iterator]):
            yield items[0]

    def do_more(self, iterator):
        return list(itertools.islice(iterator, 1))

    # ---- messages ----

    def ask(self, operation, values):
        """The other side's answer. Meanwhile it may ask in its turn: a program calls a function of
        the test."""
        with self.lock:
            self.send(self.dump(operation, values))
            while True:
                head, values = self.load(self.receive())
                if head == "value":
                    return values
                if head == "error":
                    raise self.error(*values)
                self.answer(head, values)

    def error(self, names, args, fields, after=None):
        return exception_of(names, args, fields, self.classes)

    def dump(self, head, values):
        """A message: [head, values packed, table of instances]."""
        return without_limit(ENCODER.encode, self.flatten(head, values))

    def flatten(self, head, values):
        self.table, self.queue = {}, []
        old = sys.getrecursionlimit()
        sys.setrecursionlimit(max(old, 3 * self.depth + 1000))
        try:
            body = self.pack(values)
            while self.queue:  # not by recursion: a linked list may be long, or closed to a ring
                number = self.queue.pop()
                thing = self.objects[number]
                fields = fields_of(thing)
                contents = self.pack([*fields.values()])
                self.table[number] = [number, type(thing).__name__, list(fields), contents]
        finally:
            sys.setrecursionlimit(old)
        return [head, body, [self.table[number] for number in sorted(self.table)]]

    def load(self, message):
        """[head, values] of a message in JSON types. Makes and fills the instances without calling
        anything."""
        old = sys.getrecursionlimit()
        sys.setrecursionlimit(max(old, 3 * self.depth + 1000))
        try:
            head, body, table = without_limit(json.loads, message)
            self.received(head, body, table)
            self.fill(table)
            return head, self.unpack(body, self.depth + 4)
        finally:
            sys.setrecursionlimit(old)

    def received(self, head, body, table):
        """For a side that wants to see a message before it is unpacked."""

    def fill(self, table):
        for number, name, _, _ in table:
            if type(number) is not int or not 0 <= number <= len(self.objects):
                raise ValueError("an instance out of order")
            if number == len(self.objects):
                thing = object.__new__(self.classes[name])
                self.positions[id(thing)] = number
                self.objects.append(thing)
        for number, _, names, fields in reversed(table):  # the inner ones first: a set may ask for a hash
            if not all(type(name) is str for name in names):
                raise ValueError("names that are none")
            fields = [self.unpack(field, self.depth) for field in fields]
            set_fields(self.objects[number], dict(zip(names, fields, strict=True)))

    def send(self, message):
        """Write one message: 4 bytes of length, then the bytes."""
        data = message.encode("utf-8", "surrogatepass")
        if len(data) > self.longest["send"]:
            raise TooLarge
        data = memoryview(len(data).to_bytes(4, "big") + data)
        while data:
            data = data[os.write(self.target, data):]

    def receive(self):
        """One message. EOFError where the other side has ended; ValueError where it is too long."""
        size = int.from_bytes(take(4, self.source), "big")
        if size > self.longest["receive"]:
            raise ValueError("too long")
        return take(size, self.source)


def without_limit(step, data):
    """step(data); where Python's limit on the digits of an int is in the way, without it."""
    try:
        return step(data)
    except ValueError:
        old = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)
        try:
            return step(data)
        finally:
            sys.set_int_max_str_digits(old)
