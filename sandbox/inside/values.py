"""What values are made of, as plain data, and how they are made again: a table of kinds, instances of the
preamble's classes, exceptions.

    python -c 'from sandbox.inside import values; print(values.KINDS.keys())'
"""
import array
import binascii
import builtins
import collections.abc
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import sys
import types
import zoneinfo

SCALARS = {type(None), bool, int, float, str}


class CandidateError(Exception):
    """The other side raised something that has no counterpart here."""


def encode(data):
    return [binascii.b2a_base64(data, newline=False).decode()]


def decode(parts):
    return binascii.a2b_base64(parts[0])


def mapping(value):
    return [list(value), list(value.values())]


def unzip(parts):
    keys, values = parts
    return dict(zip(keys, values, strict=True))


def by_arguments(kind):
    """The entry of a class whose __reduce__ gives the arguments that make an equal value."""
    return kind, lambda value: list(value.__reduce_ex__(2)[1]), lambda parts: kind(*parts)


KINDS = {  # tag: (type, its parts as a list, the value of such a list)
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "Counter": (collections.Counter, mapping, lambda parts: collections.Counter(unzip(parts))),
    "OrderedDict": (collections.OrderedDict, mapping, lambda parts: collections.OrderedDict(unzip(parts))),
    "defaultdict": (collections.defaultdict, lambda value: [value.default_factory, *mapping(value)],
                    lambda parts: collections.defaultdict(parts[0], unzip(parts[1:]))),
    "dict": (dict, mapping, unzip),
    "mapping": (collections.abc.Mapping, mapping, unzip),  # any other
    "list": (list, list, list),
    "deque": (collections.deque, lambda value: [list(value), value.maxlen],
              lambda parts: collections.deque(*parts)),
    "bytes": (bytes, encode, decode),
    "bytearray": (bytearray, encode, lambda parts: bytearray(decode(parts))),
    "keys": (type({}.keys()), list, lambda parts: dict.fromkeys(parts).keys()),
    "values": (type({}.values()), list, lambda parts: dict(enumerate(parts)).values()),
    "items": (type({}.items()), list, lambda parts: dict(parts).items()),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "array": (array.array, lambda value: [value.typecode, list(value)], lambda parts: array.array(*parts)),
    "ZoneInfo": (zoneinfo.ZoneInfo, lambda value: [value.key], lambda parts: zoneinfo.ZoneInfo(*parts)),
    **{kind.__name__: by_arguments(kind) for kind in (
        range, slice, fractions.Fraction, decimal.Decimal, pathlib.PurePosixPath,
        datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)},
}
TAGS = {kind: tag for tag, (kind, _, _) in KINDS.items() if tag != "list"}
CONSTANTS = enum.Enum, tuple  # of the preamble's classes: made from their value, or their items
CHANGING = {KINDS[tag][0] for tag in (
    "list dict set deque bytearray array Counter OrderedDict defaultdict").split()}
BASES = tuple(kind for kind, _, _ in KINDS.values()) + (int, float, str)
SLOT = types.MemberDescriptorType


@functools.cache
def carried(kind):
    """Whether an instance of a class of the preamble is no more than its attributes."""
    slots = any(type(member) is SLOT for base in kind.__mro__ for member in vars(base).values())
    return not slots and not issubclass(kind, (*BASES, BaseException, type))


def set_fields(thing, fields):
    """Replace the attributes of an instance without calling its class. None of them hides a method."""
    vars(thing).clear()
    for name, value in fields.items():
        if not hides_method(type(thing), name):
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
    """Whether an instance's attribute would take the place of a method, of what a property remembers, or of
    what libraries look up by a special name, such as `__dataclass_fields__` and `__array_interface__`."""
    if name[:2] == name[-2:] == "__":
        return name != "__notes__"
    found = getattr(kind, name, None)
    is_code = callable(found) and not isinstance(found, type) or hasattr(found, "__get__")
    return is_code and name not in getattr(kind, "__dataclass_fields__", ())


def containers(values):
    """What can change in the arguments of a call: lists, dicts and their kin, also within others. In an order
    that is the same on both sides."""
    found, left = [], [values]
    while left:
        value = left.pop()
        if type(value) in CHANGING or type(value).__name__ == "ndarray" and value.shape:
            found.append(value)
        if isinstance(value, (list, tuple, dict, collections.deque)):
            inner = value.values() if isinstance(value, dict) else value
            left += [] if SCALARS.issuperset(map(type, inner)) else inner
    return found


def refill(old, new):
    """Give a container the contents that a call left in the other side's copy of it: a value of its kind."""
    if type(old) is not type(new):
        raise TypeError("no value of its kind")
    if isinstance(old, (dict, set, collections.deque)):
        old.clear()
        (old.extend if isinstance(old, collections.deque) else old.update)(new)
    else:
        old[:] = new


def classes_of(space):
    """The classes that a preamble defines, by name."""
    found = [kind for kind in space.values() if isinstance(kind, type) and kind.__module__ == "solution"]
    return {kind.__name__: kind for kind in found}


def is_builtin(name):
    return isinstance(getattr(builtins, name, None), type)
