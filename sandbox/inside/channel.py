"""The channel between a test and the program it tests: two processes that exchange values as plain
data (JSON).

Both ends use it: the judge runs the tests, the candidate runs the program. Neither
trusts the other.
In: values and the names of operations. Out: length-prefixed JSON on a pipe, and the same values on
the other side.

What is plain data travels by value: numbers, text, containers, dates, instances of the classes of
the row's preamble. All else stays where it is, and the other side gets a `Remote`, which can be
called. An iterator travels item by item.

    python -c 'from sandbox.inside import channel; print(channel.KINDS.keys())'
"""
import array
import binascii
import builtins
import collections
import collections.abc
import datetime
import decimal
import enum
import fractions
import itertools
import json
import os
import pathlib
import re
import sys
import threading
import types
import uuid
import zoneinfo

SCALARS = {type(None), bool, int, float, str}
LONG = 14000  # bits of an int that is sent in hexadecimal: Python refuses to write long ones in decimal,
DIGITS = 4300  # beyond this limit
ENCODER = json.JSONEncoder(ensure_ascii=False)
TYPES = {
    kind.__name__: kind
    for kind in (int, float, str, bool, list, dict, tuple, set, frozenset, bytes, complex, type(None))
}


class Unchanged:
    """Stands for an argument that cannot be sent back, such as an iterator."""


class WithoutIterators(list):
    """Values whose iterators are left alone."""


class CandidateError(Exception):
    """The other side raised something that has no counterpart here."""


class TooLarge(Exception):
    """A message beyond the limit."""


def encode(data):
    return [binascii.b2a_base64(data, newline=False).decode()]


def decode(parts):
    return binascii.a2b_base64(parts[0])


def mapping(value):
    return [list(value), list(value.values())]


def unzip(parts):
    keys, values = parts
    return dict(zip(keys, values, strict=True))


def reduced(value):
    """The arguments that make a date, time or timezone again."""
    return list(value.__reduce__()[1])


KINDS = {  # tag: (type, its parts as a list, the value of such a list)
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "Counter": (collections.Counter, mapping, lambda parts: collections.Counter(unzip(parts))),
    "OrderedDict": (collections.OrderedDict, mapping, lambda parts: collections.OrderedDict(unzip(parts))),
    "defaultdict": (collections.defaultdict, lambda value: [value.default_factory, *mapping(value)],
                    lambda parts: collections.defaultdict(parts[0], unzip(parts[1:]))),
    "dict": (dict, mapping, unzip),
    "list": (list, list, list),
    "deque": (collections.deque, lambda value: [list(value), value.maxlen],
              lambda parts: collections.deque(*parts)),
    "bytes": (bytes, encode, decode),
    "bytearray": (bytearray, encode, lambda parts: bytearray(decode(parts))),
    "memoryview": (memoryview, encode, lambda parts: memoryview(decode(parts))),
    "keys": (type({}.keys()), list, lambda parts: dict.fromkeys(parts).keys()),
    "values": (type({}.values()), list, lambda parts: dict(enumerate(parts)).values()),
    "items": (type({}.items()), list, lambda parts: dict(parts).items()),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "Fraction": (fractions.Fraction, lambda value: [value.numerator, value.denominator],
                 lambda parts: fractions.Fraction(*parts)),
    "Decimal": (decimal.Decimal, lambda value: [str(value)], lambda parts: decimal.Decimal(*parts)),
    "datetime": (datetime.datetime, reduced, lambda parts: datetime.datetime(*parts)),
    "date": (datetime.date, reduced, lambda parts: datetime.date(*parts)),
    "time": (datetime.time, reduced, lambda parts: datetime.time(*parts)),
    "timedelta": (datetime.timedelta, reduced, lambda parts: datetime.timedelta(*parts)),
    "timezone": (datetime.timezone, reduced, lambda parts: datetime.timezone(*parts)),
    "ZoneInfo": (zoneinfo.ZoneInfo, lambda value: [value.key], lambda parts: zoneinfo.ZoneInfo(*parts)),
    "UUID": (uuid.UUID, lambda value: [str(value)], lambda parts: uuid.UUID(*parts)),
    "path": (pathlib.PurePath, lambda value: [str(value)], lambda parts: pathlib.PurePosixPath(*parts)),
    "ChainMap": (collections.ChainMap, lambda value: value.maps, lambda parts: collections.ChainMap(*parts)),
    "SimpleNamespace": (types.SimpleNamespace, lambda value: mapping(vars(value)),
                        lambda parts: types.SimpleNamespace(**unzip(parts))),
    "slice": (slice, lambda value: [value.start, value.stop, value.step], lambda parts: slice(*parts)),
    "pattern": (re.Pattern, lambda value: [value.pattern, value.flags], lambda parts: re.compile(*parts)),
    "array": (array.array, lambda value: [value.typecode, list(value)], lambda parts: array.array(*parts)),
}
TAGS = {kind: tag for tag, (kind, _, _) in KINDS.items() if tag != "list"}
BASES = tuple(kind for kind, _, _ in KINDS.values()) + (int, float, str)
SLOT = types.MemberDescriptorType


class Remote:
    """What stayed on the other side: this side knows a reference to it, and can call it."""

    def __init__(self, channel, reference):
        self.__dict__.update(_channel=channel, _reference=reference)

    def __call__(self, *args, **keywords):
        return self._channel.ask("call", [self, list(args), list(keywords), list(keywords.values()), {}])


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
        # Instances of the preamble's classes that both sides know in this call, and their positions by id
        self.objects, self.positions = [], {}
        self.frozen = self.careful = False
        self.lock = threading.RLock()  # one thread asks at a time, however deep

    # ---- values to JSON types: scalars and lists stand for themselves, all else is a dict of one tag ----

    def pack(self, value):
        """TypeError for what can neither be sent nor called."""
        kind = type(value)
        if kind is list:
            if not self.careful and SCALARS.issuperset(map(type, value)):
                return value
            return [self.pack(item) for item in value]
        if kind is int and value.bit_length() > LONG:
            return {"int": hex(value)}
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
        if isinstance(value, enum.Enum):
            if isinstance(value, enum.Flag):  # several together have no name
                return {"flag": [kind.__name__, value.value]}
            return {"enum": [kind.__name__, value.name]}
        if isinstance(value, tuple):
            return {"named": [kind.__name__, [self.pack(item) for item in value]]}
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
        if kind is WithoutIterators:
            self.frozen = True
            try:
                return [self.pack(item) for item in value]
            finally:
                self.frozen = False
        if isinstance(value, collections.abc.Iterator) and not callable(value):
            return {"same": 0} if self.frozen else {"iterator": self.refer(value)}
        if kind.__module__ == "numpy" and hasattr(value, "tolist"):
            return {"numpy": [str(value.dtype), list(value.shape), self.pack(value.tolist())]}
        for base in (int, float, str):
            if isinstance(value, base):
                return self.pack(base(value))
        for tag, (base, parts, _) in KINDS.items():
            if isinstance(value, base):
                return {tag: self.pack(parts(value))}
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return {"type": value.__name__}
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

    def unpack_int(self, body, depth):
        return int(body, 16)

    def unpack_enum(self, body, depth):
        cls, name = body
        return self.class_of(cls, enum.EnumMeta)._member_map_[name]

    def unpack_flag(self, body, depth):
        cls, value = body
        return self.class_of(cls, enum.EnumMeta)(value)

    def unpack_named(self, body, depth):
        cls, items = body
        return tuple.__new__(self.class_of(cls, type), [self.unpack(item, depth) for item in items])

    def unpack_object(self, body, depth):
        return self.objects[body]

    def unpack_iterator(self, body, depth):
        return self.stream(self.unpack(body, depth))

    def unpack_same(self, body, depth):
        return Unchanged

    def unpack_numpy(self, body, depth):
        dtype, shape, items = body
        return sys.modules["numpy"].array(self.unpack(items, depth), dtype).reshape(shape)[()]

    def unpack_type(self, body, depth):
        return TYPES[body]

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

    def class_of(self, name, meta):
        cls = self.classes[name]
        if not isinstance(cls, meta):
            raise ValueError("not a class")
        return cls

    def stream(self, iterator):
        """The items of an iterator of the other side, each when it is asked for."""
        while items := self.ask("more", [iterator]):
            yield items[0]

    def more(self, iterator):
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

    def answer(self, operation, values):
        raise NotImplementedError

    def error(self, names, args, fields, after=None):
        return exception_of(names, args, fields, self.classes)

    def dump(self, head, values):
        """A message: [head, values packed, table of instances]."""
        # A program may have lifted Python's limit here: on the other side it holds
        self.careful = getattr(sys, "get_int_max_str_digits", lambda: DIGITS)() != DIGITS
        try:
            return ENCODER.encode(self.flatten(head, values))
        except ValueError:  # an int in decimal that is too long
            self.careful = True
            return ENCODER.encode(self.flatten(head, values))

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
            head, body, table = json.loads(message)
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
                thing = object.__new__(self.class_of(name, type))
                self.positions[id(thing)] = number
                self.objects.append(thing)
        while table:
            later = []
            for row in table:
                number, _, names, fields = row
                if len(names) != len(fields) or not all(type(name) is str for name in names):
                    raise ValueError("names without fields")
                try:
                    fields = [self.unpack(field, self.depth) for field in fields]
                except AttributeError:  # the hash of an instance that is not filled yet
                    later.append(row)
                    continue
                set_fields(self.objects[number], dict(zip(names, fields)))
            if len(later) == len(table):
                raise ValueError("instances that hold each other in sets")
            table = later

    def send(self, message):
        """Write one message: 4 bytes of length, then the bytes."""
        data = message.encode("utf-8", "surrogatepass")
        if len(data) > self.longest["send"]:
            raise TooLarge
        data = memoryview(len(data).to_bytes(4, "big") + data)
        while data:
            data = data[os.write(self.target, data):]

    def receive(self):
        """One message. EOFError where the other side has ended; ValueError where it is too long or
        more follows."""
        data = os.read(self.source, 65536)
        size = int.from_bytes(data[:4], "big")
        if not data:
            raise EOFError
        if len(data) < 4 or size > self.longest["receive"]:
            raise ValueError("no message, or too long")
        parts, left = [data[4:]], size + 4 - len(data)
        while left > 0:
            data = os.read(self.source, min(left, 1 << 20))
            if not data:
                raise EOFError
            parts.append(data)
            left -= len(data)
        if left < 0:
            raise ValueError("more than was asked for")
        return b"".join(parts)


def fields_of(thing):
    """The attributes of an instance, from its dict and its slots."""
    fields = dict(getattr(thing, "__dict__", ()))
    for cls in type(thing).__mro__:
        for name, member in vars(cls).items():
            if type(member) is SLOT and cls.__module__ == "solution" and hasattr(thing, name):
                fields[name] = getattr(thing, name)
    return fields


def set_fields(thing, fields):
    """Replace the attributes of an instance without calling its class. None of them hides a method."""
    if hasattr(thing, "__dict__"):
        vars(thing).clear()
    for name, value in fields.items():
        member = getattr(type(thing), name, None)
        if type(member) is SLOT:
            member.__set__(thing, value)
        elif not hides_method(type(thing), name):
            vars(thing)[name] = value


def describe(error):
    """[names of the classes of an exception as [module, name], nearest first; its arguments; its
    attributes]."""
    names = [[kind.__module__, kind.__qualname__] for kind in type(error).__mro__[:-2]]
    return [names, list(error.args), dict(vars(error))]


def exception_of(names, args, fields, classes):
    """The exception that describe() described: of its nearest class that this side has, without
    running new code."""
    for module, name in names:
        space = classes if module == "solution" else {}
        if module.partition(".")[0] in sys.stdlib_module_names and module in sys.modules:
            space = vars(sys.modules[module])
        kind = space.get(name)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            break
    else:
        kind = CandidateError
    try:
        error = kind(*args)
    except Exception:  # one that takes other arguments
        error = kind.__new__(kind, *args)
    vars(error).update((name, value) for name, value in fields.items() if not hides_method(kind, name))
    return error


def hides_method(kind, name):
    """Whether an instance's attribute would take the place of a method, or of what a property remembers."""
    found = getattr(kind, name, None)
    is_code = callable(found) and not isinstance(found, type) or hasattr(found, "__get__")
    return is_code and name not in getattr(kind, "__dataclass_fields__", ())


def restore(old, new):
    """Give one's own argument the contents that a call left in the other side's copy of it: the
    argument to keep."""
    kind = type(old)
    if new is Unchanged or old is new:
        return old
    if kind is not type(new):
        return new
    if kind is list:
        old[:] = [restore(*pair) for pair in zip(old, new)] + new[len(old):]
    elif isinstance(old, dict):
        fresh = {key: restore(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(fresh)
    elif kind in (set, collections.deque):
        old.clear()
        (old.update if kind is set else old.extend)(new)
    elif kind in (bytearray, array.array) or kind.__name__ == "ndarray":
        old[:] = new
    elif isinstance(old, tuple) and len(old) == len(new):
        for pair in zip(old, new):
            restore(*pair)
    else:
        return new
    return old


def classes_of(space):
    """The classes that a preamble defines, by name."""
    found = [kind for kind in space.values() if isinstance(kind, type) and kind.__module__ == "solution"]
    return {kind.__name__: kind for kind in found}


def is_builtin(name):
    return isinstance(getattr(builtins, name, None), type)
