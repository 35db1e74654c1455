"""The channel between a test and the program it tests: two processes that exchange plain data (JSON).

The judge runs the tests and asks: call this with these values, give me that attribute. The candidate runs the
program and answers. Neither trusts the other. In: values and the names of operations. Out: length-prefixed
JSON on a pipe, and the same values on the other side.

What is plain data travels by value (values.py), and so do instances of the classes of the row's preamble.
All else stays with the candidate, and the judge knows it by a number.

    python -m pytest tests/test_sandbox_honest.py
"""
import builtins
import enum
import json
import os
import sys

from .confine import take
from .values import CONSTANTS, KINDS, SCALARS, TAGS, carried, decode, encode, is_builtin, set_fields

ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False)
DECODER = json.JSONDecoder()


class Channel:
    """One end of two pipes: what both ends do alike."""

    levels = 2500  # of recursion, for values of 500 levels

    def __init__(self, source, target, classes):
        self.source, self.target, self.classes = source, target, classes
        self.forget()

    def forget(self):
        """Begin a call: no instance of the preamble's classes is known to both sides yet."""
        self.objects, self.positions = [], {}  # and their positions by id
        self.given = {}  # numbers of the containers that a call was given, by id

    # ---- values to JSON types: scalars and lists stand for themselves, all else is a dict of one tag ----

    def pack(self, value):
        if self.given and id(value) in self.given:
            return {"given": self.given[id(value)]}
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
        if kind is type and vars(builtins).get(value.__name__) is value:
            return {"builtin": value.__name__}
        if kind.__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
            return {"numpy": [value.dtype.str, list(value.shape), *encode(value.tobytes())]}
        return self.pack_other(value)

    def pack_instance(self, value, kind):
        """An instance of a class of the preamble: in the table, unless it is a kind of constant."""
        if isinstance(value, CONSTANTS):
            args = [value.value] if isinstance(value, enum.Enum) else [*value]
            return {"made": [kind.__name__, self.pack(args)]}
        if not carried(kind):
            return self.pack_other(value)
        number = self.positions.get(id(value))
        if number is None:
            number = self.positions[id(value)] = len(self.objects)
            self.objects.append(value)
        if number not in self.table:
            self.table[number] = None
            self.queue.append(number)
        return {"object": number}

    # ---- and back: an exception for whatever pack() does not write ----

    def unpack(self, value):
        if type(value) is list:
            if SCALARS.issuperset(map(type, value)):
                return value
            return [self.unpack(item) for item in value]
        if type(value) is not dict:
            return value
        (tag, body), = value.items()
        if tag in KINDS:
            parts = self.unpack(body)
            if type(parts) is not list:
                raise ValueError("a tag without a list")
            return KINDS[tag][2](parts)
        return getattr(self, f"unpack_{tag}")(body)

    def unpack_made(self, body):
        name, args = body
        if not issubclass(self.classes[name], CONSTANTS):
            raise ValueError("not a constant")
        return self.classes[name](*self.unpack(args))

    def unpack_object(self, number):
        return self.objects[number]

    def unpack_builtin(self, name):
        if not is_builtin(name):
            raise ValueError("not a class")
        return vars(builtins)[name]

    def unpack_numpy(self, body):
        dtype, shape, data = body
        return sys.modules["numpy"].frombuffer(bytearray(decode([data])), dtype).reshape(shape)[()]

    # ---- messages ----

    def dump(self, head, values):
        """A message: [head, values packed, table of instances], in bytes."""
        return unlimited(self.levels, self.write, head, values)

    def write(self, head, values):
        return ENCODER.encode(self.flatten(head, values)).encode("utf-8", "surrogatepass")

    def flatten(self, head, values):
        self.table, self.queue = {}, []
        body = self.pack(values)
        while self.queue:  # not by recursion: a linked list may be long, or closed to a ring
            number = self.queue.pop()
            thing = self.objects[number]
            contents = self.pack([*vars(thing).values()])
            self.table[number] = [number, type(thing).__name__, [*vars(thing)], contents]
        return [head, body, [self.table[number] for number in sorted(self.table)]]

    def load(self, message):
        """[head, values] of a message."""
        return unlimited(self.levels, self.read, message)

    def read(self, message):
        (head, body, table), _ = DECODER.raw_decode(message.decode("utf-8", "surrogatepass"))
        self.fill(table)
        return head, self.unpack(body)

    def fill(self, table):
        """Make and fill the instances of a message, without calling anything."""
        for number, name, _, _ in table:
            if not carried(self.classes[name]):
                raise ValueError("no class of such instances")
            if type(number) is not int or not 0 <= number <= len(self.objects):
                raise ValueError("an instance out of order")
            if number == len(self.objects):
                thing = object.__new__(self.classes[name])
                self.positions[id(thing)] = number
                self.objects.append(thing)
        for number, _, names, fields in reversed(table):  # the inner ones first: a set may ask for a hash
            if not all(type(name) is str for name in names):
                raise ValueError("names that are none")
            fields = [self.unpack(field) for field in fields]
            set_fields(self.objects[number], dict(zip(names, fields, strict=True)))

    def send(self, message):
        """Write one message: 4 bytes of length, then the bytes."""
        data = memoryview(len(message).to_bytes(4, "big") + message)
        while data:
            data = data[os.write(self.target, data):]

    def receive(self, longest=1 << 31):
        """One message, and no more. EOFError where the other side has ended."""
        data = os.read(self.source, 1 << 16)
        if not data:
            raise EOFError
        size = 4 + int.from_bytes(data[:4], "big")
        if not len(data) <= size <= longest:
            raise ValueError("too long, or more than one")
        if len(data) < size:
            data += take(size - len(data), self.source)
        return data[4:]


def unlimited(levels, step, *args):
    """step(*args). Where Python's limits on recursion and digits are in the way, with others."""
    try:
        return step(*args)
    except (RecursionError, ValueError):
        before, digits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    sys.setrecursionlimit(max(before, levels))
    sys.set_int_max_str_digits(0)
    try:
        return step(*args)
    finally:
        sys.setrecursionlimit(before)
        sys.set_int_max_str_digits(digits)
