"""Honest programs and tests of unusual kinds: what a plain run in one process says, the sandbox must say.

    pytest tests/test_sandbox_honest.py
"""
# ruff: noqa: E501
import json

import pytest

from sandbox.inside.candidate import Candidate
from test_sandbox import NODES, row, verdicts, works

pytestmark = pytest.mark.skipif(not works(), reason="no sandbox runtime works on this machine")

PREAMBLE = NODES + """
import enum, collections, dataclasses, typing
class Colour(enum.Enum):
    RED, BLUE = 1, 2
class Level(enum.IntEnum):
    LOW, HIGH = 1, 2
Point = collections.namedtuple("Point", "x y")
class Pair(typing.NamedTuple):
    a: int
    b: list
@dataclasses.dataclass(frozen=True)
class Frozen:
    x: int
    inside: tuple = ()
class Right(enum.Flag):
    READ, WRITE = 1, 2
def plainly(x): return x
@dataclasses.dataclass
class Task:
    x: int
    run: typing.Callable = plainly
class TooSmall(ValueError):
    def __init__(self, limit, value):
        super().__init__(f"{value} < {limit}")
        self.limit = limit
class Node:
    def __init__(self, val, neighbours=None): self.val, self.neighbours = val, neighbours or []
"""
CASES = {  # name: (program, body of check)
    # arguments changed in place
    "after a literal-only test": ("def f(x): x.append(1); return x",
        " assert candidate([0]) == [0, 1]\n a = [5]\n candidate(a)\n assert a == [5, 1]"),
    "through a local helper": ("def f(x): x.sort()",
        " def run(xs):\n  candidate(xs)\n  return xs\n assert run([2, 1]) == [1, 2]"),
    "through an alias": ("def f(x): x.sort()", " g = candidate\n a = [2, 1]\n g(a)\n assert a == [1, 2]"),
    "through a lambda": ("def f(x): x.sort()", " g = lambda v: candidate(v) or v\n assert g([2, 1]) == [1, 2]"),
    "through an alias of the list": ("def f(x): x[0].append(1)", " a = [[]]\n b = a[0]\n candidate(a)\n assert b == [1]"),
    "through partial": ("def f(k, x): x.append(k)",
        " import functools\n a = []\n functools.partial(candidate, 3)(a)\n assert a == [3]"),
    "through map": ("def f(x): x.append(1)", " a = [[], []]\n list(map(candidate, a))\n assert a == [[1], [1]]"),
    "dict of lists": ("def f(d): d['a'].append(d.pop('b'))", " d = {'a': [], 'b': 2}\n candidate(d)\n assert d == {'a': [2]}"),
    "set, deque, bytearray, array": ("def f(s, q, b, a): s.add(1); q.appendleft(0); b[0] = 9; a.append(4)",
        " import array, collections\n s, q, b, a = set(), collections.deque([1], 5), bytearray(b'x'), array.array('i', [3])\n"
        " candidate(s, q, b, a)\n assert s == {1} and list(q) == [0, 1] and b == b'\\t' and a.tolist() == [3, 4]\n"
        " assert q.maxlen == 5"),
    "defaultdict, Counter, OrderedDict": ("def f(d, c, o): d[1].append(2); c['a'] += 1; o.move_to_end('a')",
        " import collections as k\n d, c, o = k.defaultdict(list), k.Counter('ab'), k.OrderedDict(a=1, b=2)\n"
        " candidate(d, c, o)\n assert d == {1: [2]} and c['a'] == 2 and list(o) == ['b', 'a']\n assert d[7] == []"),
    "lists that change places": ("def f(x): x.sort()", " a = [[3, 4], [1, 2]]\n b, first = sorted(a), a[0]\n candidate(a)\n assert a == b == [[1, 2], [3, 4]]\n assert a[1] is first"),
    "a list that is taken out": ("def f(d): d['b'] = (d.pop('a'), [d['b'].pop()])", " d = {'a': [1], 'b': [[2]]}\n a, b = d['a'], d['b']\n inner = b[0]\n candidate(d)\n"
        " assert d == {'b': ([1], [[2]])} and d['b'][0] is a and d['b'][1][0] is inner and b == []"),
    "a list that is returned": ("def f(x): return [x, x[0]]", " a = [[1]]\n b = candidate(a)\n b[1].append(2)\n assert b[0] is a and a == [[1, 2]]"),
    "a list that is returned as it is": ("def f(x): return x", " a = [1]\n assert candidate(a) is a and candidate({2: a})[2] is a"),
    "a list in an exception": ("def f(x): x.append(1); raise ValueError(x)", " a = []\n try:\n  candidate(a)\n except ValueError as e: assert e.args[0] is a and a == [1]"),
    "a list given twice": ("def f(x, y): x.append(1)", " a, row = [], [0]\n candidate(a, a)\n assert a == [1]\n g = [row, row]\n candidate(row, g)\n assert g == [[0, 1], [0, 1]]"),
    "a list in an object": ("def f(n, x): n.neighbours = x", " n, a = Node(1), [2]\n candidate(n, a)\n assert n.neighbours is a"),
    "deep lists that change": ("def f(v):\n while v[0]: v = v[0]\n v[0] = 5", " v = [0]\n for _ in range(400): v = [v]\n candidate(v)\n while v != 5: v = v[0]\n assert v == 5"),
    "grid": ("def f(g):\n for r in g:\n  for i in range(len(r)): r[i] *= 2", " g = [[1, 2], [3]]\n candidate(g)\n assert g == [[2, 4], [6]]"),
    "before an exception": ("def f(x): x.append(1); raise ValueError",
        " a = []\n try:\n  candidate(a)\n except ValueError: pass\n assert a == [1]"),
    "object's list": ("def f(n): n.neighbours.append(n)", " n = Node(1)\n candidate(n)\n assert n.neighbours[0] is n"),
    # values
    "long ints": ("def f(n): return 7 ** n", " assert candidate(20000) == 7 ** 20000\n assert [candidate(9999)] == [7 ** 9999]"),
    "long ints given": ("def f(x): return x[0] % 1000", " assert candidate([7 ** 20000]) == 7 ** 20000 % 1000"),
    "enum": ("def f(c): return Colour.BLUE if c is Colour.RED else [Level.LOW]",
        " assert candidate(Colour.RED) is Colour.BLUE\n assert candidate(Colour.BLUE) == [Level.LOW]\n"
        " assert isinstance(candidate(1)[0], Level)"),
    "long ints where the program lifts Python's limit": ("import sys\nsys.set_int_max_str_digits(0)\ndef f(n): return [7 ** n, n]",
        " assert candidate(20000) == [7 ** 20000, 20000]"),
    "flags": ("def f(r): return Right.READ | r", " assert candidate(Right.WRITE) == Right.READ | Right.WRITE\n"
        " assert candidate(Right.READ) is Right.READ"),
    "dataclass with a function": ("def f(x): return Task(x)", " assert candidate(3).x == 3"),
    "namedtuple": ("def f(p): return Point(p.y, p.x)", " assert candidate(Point(1, 2)).x == 2\n assert candidate(Point(1, 2)) == (2, 1)"),
    "NamedTuple": ("def f(p): p.b.append(1); return p._replace(a=9)", " p = Pair(1, [])\n assert candidate(p).a == 9\n assert p.b == [1]"),
    "frozen dataclass": ("def f(p): return {Frozen(p.x + 1, (p,)): 1}",
        " assert candidate(Frozen(1)) == {Frozen(2, (Frozen(1),)): 1}\n assert candidate(Frozen(3))[Frozen(4, (Frozen(3),))] == 1"),
    "dataclass in a set in a dataclass": ("def f(x): return Frozen(1, (frozenset([Frozen(2), Frozen(3)]),))",
        " assert Frozen(3) in candidate(0).inside[0]"),
    "datetime": ("import datetime as d\ndef f(x): return x + d.timedelta(days=1)",
        " import datetime as d\n assert candidate(d.date(2024, 2, 28)) == d.date(2024, 2, 29)\n"
        " t = d.datetime(2024, 1, 1, 5, tzinfo=d.timezone.utc)\n assert candidate(t).isoformat() == '2024-01-02T05:00:00+00:00'\n"
        " assert candidate(d.timedelta(1)) == d.timedelta(2)"),
    "time and timezone": ("import datetime as d\ndef f(h): return [d.time(h), d.timezone(d.timedelta(hours=h), 'x')]",
        " import datetime as d\n assert candidate(3) == [d.time(3), d.timezone(d.timedelta(hours=3), 'x')]"),
    "zoneinfo": ("import datetime as d, zoneinfo\ndef f(x): return d.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo(x))",
        " import datetime as d\n assert candidate('Europe/Paris').utcoffset() == d.timedelta(hours=2)"),
    "paths and slices": ("import pathlib\ndef f(x): return [pathlib.Path('a') / 'b', slice(x)]", " import pathlib\n assert candidate(5) == [pathlib.Path('a/b'), slice(5)]"),
    "a generator's methods": ("def f(seen):\n try:\n  x = yield 1\n  yield x\n finally: f.closed = True\ndef g(): return f.closed",
        " g = candidate(0)\n assert next(g) == 1 and g.send([5]) == [5]\n g.close()\n assert candidate.closed and list(g) == []"),
    "what a program returned is given back": ("def f(x): return iter([x]) if isinstance(x, int) else sorted(x)", " assert candidate(candidate(3)) == [3]\n g = candidate(4)\n assert next(g) == 4 and candidate(g) == []"),
    "a deep value given back": ("def f(v):\n for _ in range(480 * (v == 0)): v = [v]\n return v", " v = candidate(candidate(0))\n n = 0\n while v != 0: v, n = v[0], n + 1\n assert n == 480"),
    "mappings": ("import collections, types\ndef f(x): return [collections.ChainMap({1: x}, {1: 3}), types.MappingProxyType({x: 2}), collections.UserDict(a=x)]",
        " import collections\n assert candidate(5) == [{1: 5}, {5: 2}, {'a': 5}]\n assert candidate(5)[0] == collections.ChainMap({1: 5})"),
    "text of an object": ("class P:\n def __init__(self, x): self.x = x\n def __str__(self): return f'<{self.x}>'\ndef f(x): return P(x)",
        " assert str(candidate(3)) == '<3>'\n assert f'{candidate(4)}' == '<4>'"),
    "a generator whose later items take for ever": ("def f():\n yield 1\n yield 2\n while True: pass",
        " g = candidate()\n assert next(g) == 1 and next(g) == 2"),
    "array": ("import array\ndef f(x): return array.array('d', x)", " import array\n assert candidate([1.5]) == array.array('d', [1.5])"),
    "dict views": ("def f(d): return d.keys()", " assert candidate({1: 2}) == {1}\n assert len(candidate({1: 2, 3: 4})) == 2\n assert 1 in candidate({1: 2})"),
    "values": ("def f(d): return d.values()", " assert len(candidate({1: 2})) == 1\n assert list(candidate({1: 2})) == [2]\n assert sum(candidate({1: 2, 3: 4})) == 6"),
    "items": ("def f(d): return d.items()", " assert candidate({1: 2}) == {1: 2}.items()\n assert (1, 2) in candidate({1: 2})"),
    "Counter": ("import collections\ndef f(x): return collections.Counter(x)", " assert candidate('aab').most_common(1) == [('a', 2)]\n assert candidate('a')['z'] == 0"),
    "depth": ("def f(n):\n v = 0\n for _ in range(n): v = [v]\n return v", " def d(v):\n  n = 0\n  while v != 0: v, n = v[0], n + 1\n  return n\n assert d(candidate(150)) == 150\n assert d(candidate(400)) == 400"),
    "depth given": ("def f(v):\n n = 0\n while v != 0: v, n = v[0], n + 1\n return n", " v = 0\n for _ in range(300): v = [v]\n assert candidate(v) == 300"),
    "bytes": ("def f(n): return bytes(range(256)) * n", " assert candidate(1 << 15) == bytes(range(256)) * (1 << 15)"),
    "text": ("def f(n): return '\u6f22' * n", " assert candidate(3_000_000) == '\u6f22' * 3_000_000"),
    "odd text": ("def f(x): return x + '\\ud800\\x00\\u2028'", " assert candidate('\U0001F600') == '\U0001F600\\ud800\\x00\\u2028'"),
    "exceptions of math": ("def f(x): return 10.0 ** x", " try:\n  candidate(999)\n  assert False\n except OverflowError: pass"),
    "infinity and nan": ("def f(x): return [float('inf'), -float('inf'), float('nan')]", " a, b, c = candidate(0)\n assert a > 1e308 and b < -1e308 and c != c"),
    "memoryview and nested": ("def f(x): return {'a': (b'x', {1.5: [None, {True}]})}", " assert candidate(0) == {'a': (b'x', {1.5: [None, {True}]})}"),
    "a member of an enum of texts": ("import enum\nclass C(str, enum.Enum):\n RED = 'red'\ndef f(x): return {C.RED: C(x)}",
        " assert candidate('red') == {'red': 'red'}"),
    "a text with a text of its own": ("class S(str):\n def __str__(self): return '<>'\ndef f(x): return S(x)", " assert candidate('a') == 'a'"),
    "its own class of the preamble's name, with slots": ("class ListNode:\n __slots__ = 'val', 'next'\n"
        " def __init__(self, val, next=None): self.val, self.next = val, next\ndef f(n): return ListNode(n.val, ListNode(7))",
        " assert same(candidate(list_node([5, 6])), list_node([5, 7]))"),
    "its own class of the preamble's name, as a tuple": ("import collections\nNode = collections.namedtuple('Node', 'val neighbours')\n"
        "def f(n): return n.val", " assert candidate(Node(3, [])) == 3"),
    "arguments of any name": ("def f(**given): return given", " assert candidate(self=1, args=2, names=3, function=4) == dict(self=1, args=2, names=3, function=4)"),
    # exceptions
    "subclass of the expected": ("class E(ValueError): pass\ndef f(x): raise E('no')", " try:\n  candidate(1)\n  assert False\n except ValueError as e:\n  assert str(e) == 'no'"),
    "JSONDecodeError": ("import json\ndef f(x): return json.loads(x)", " import json\n try:\n  candidate('{')\n  assert False\n except json.JSONDecodeError: pass\n try:\n  candidate('{')\n  assert False\n except ValueError: pass"),
    "StopIteration": ("def f(x): return next(iter(x))", " try:\n  candidate([])\n  assert False\n except StopIteration: pass"),
    "SystemExit": ("import sys\ndef f(x): sys.exit(x)", " try:\n  candidate(3)\n  assert False\n except SystemExit as e:\n  assert e.code == 3"),
    "KeyboardInterrupt": ("def f(x): raise KeyboardInterrupt", " try:\n  candidate(3)\n  assert False\n except KeyboardInterrupt: pass"),
    "KeyError": ("def f(x): return {}[x]", " try:\n  candidate('k')\n  assert False\n except KeyError as e:\n  assert str(e) == \"'k'\" and e.args == ('k',)"),
    "the preamble's exception": ("def f(x):\n if x < 3: raise TooSmall(3, x)", " try:\n  candidate(1)\n  assert False\n except TooSmall as e:\n  assert e.limit == 3 and str(e) == '1 < 3'"),
    "OSError": ("def f(x): open('/nowhere/at/all')", " try:\n  candidate(1)\n  assert False\n except FileNotFoundError as e:\n  assert e.errno == 2"),
    "decimal": ("import decimal\ndef f(x): return decimal.Decimal(x)", " import decimal\n try:\n  candidate('x')\n  assert False\n except decimal.InvalidOperation: pass"),
    "assertRaises": ("def f(x): raise TypeError('bad')", " import unittest\n t = unittest.TestCase()\n with t.assertRaisesRegex(TypeError, 'bad'): candidate(1)"),
    "UnicodeDecodeError": ("def f(x): return x.decode()", " try:\n  candidate(b'\\xff')\n  assert False\n except UnicodeDecodeError as e:\n  assert e.start == 0"),
    "recursion": ("def f(x): return f(x)", " try:\n  candidate(1)\n  assert False\n except RecursionError: pass"),
    # iterators and functions
    "endless generator": ("def f():\n n = 0\n while True:\n  yield n\n  n += 1", " import itertools\n assert list(itertools.islice(candidate(), 20)) == list(range(20))\n g = candidate()\n assert next(g) == 0 and next(g) == 1"),
    "long generator": ("def f(n): yield from range(n)", " assert sum(candidate(50000)) == sum(range(50000))"),
    "generator that fails": ("def f():\n yield 1\n raise ValueError", " g = candidate()\n assert next(g) == 1\n try:\n  next(g)\n  assert False\n except ValueError: pass"),
    "function returned": ("def f(n): return lambda x: x + n", " add = candidate(3)\n assert add(4) == 7\n assert candidate(1)(1) == 2"),
    "object returned": ("class Box:\n def __init__(self): self.n = 0\n def add(self, k=1): self.n += k; return self\ndef f(): return Box()", " b = candidate()\n assert b.add().add(k=2).n == 3\n b.n = 9\n assert b.n == 9\n assert not hasattr(b, 'zzz')"),
    "patched print": ("def f(x): return x", " print(candidate(1))\n assert candidate(2) == 2"),
    # resources
    "threads of the test": ("def f(x): return [x, x * x]", " from concurrent.futures import ThreadPoolExecutor\n"
        " with ThreadPoolExecutor(4) as e: assert list(e.map(candidate, range(200))) == [[x, x * x] for x in range(200)]"),
    "threads": ("from concurrent.futures import ThreadPoolExecutor\nimport threading, time\ndef f(n):\n"
        " with ThreadPoolExecutor(12) as e: list(e.map(lambda x: time.sleep(0.05), range(12)))\n"
        " with ThreadPoolExecutor() as e: return sorted(e.map(abs, range(n)))\n", " assert candidate(50) == list(range(50))"),
    "thirty threads": ("import threading, time\ndef f(n):\n ts = [threading.Thread(target=time.sleep, args=(0.1,)) for _ in range(n)]\n"
        " for t in ts: t.start()\n for t in ts: t.join()\n return len(ts)", " assert candidate(30) == 30"),
    "sqlite in memory": ("import sqlite3\ndef f(x): return sqlite3.connect(':memory:').execute('select ?', (x,)).fetchone()[0]", " assert candidate(5) == 5"),
    "name of the function": ("def f(x): return x", " assert candidate(1) == 1, candidate.__name__\n assert candidate.__name__ == 'f'"),
    "logging, tempfile, uuid": ("import logging, tempfile, uuid\ndef f():\n logging.warning('x')\n with tempfile.TemporaryDirectory() as d: return len(str(uuid.uuid4())), d[:5]", " assert candidate() == (36, '/tmp/')"),
}
SLOTTED = """
class Slotted:
    __slots__ = ("x", "y")
    def __init__(self, x, y): self.x, self.y = x, y
    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)
@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Tight:
    x: int
"""
NO_DATA = {  # what is no plain data: it has a verdict in one process only (more of the preamble comes last)
    "slots": ("def f(s): s.x += 1; return Slotted(s.y, s.x)", " s = Slotted(1, 2)\n assert candidate(s) == Slotted(2, 2)\n assert s.x == 2", SLOTTED),
    "slots returned": ("def f(x): return sorted([Tight(3), Tight(x)])", " assert candidate(1) == [Tight(1), Tight(3)]", SLOTTED),
    "a preamble's subclass of dict": ("def f(x): return Bag(a=x)", " assert candidate(1).total() == 1", "class Bag(dict):\n    def total(self): return sum(self.values())\n"),
    "a generator is one": ("def f(x): yield x", " import types\n assert isinstance(candidate(3), types.GeneratorType)"),
    "a generator is one by another name": ("def f(x): yield x", " from types import GeneratorType\n assert isinstance(candidate(3), (GeneratorType, list))"),
    "UUID": ("import uuid\ndef f(x): return [uuid.UUID(int=x)]", " import uuid\n assert candidate(5) == [uuid.UUID(int=5)]"),
    "isinstance": ("import uuid\ndef f(x): return uuid.UUID(int=x)", " import uuid\n assert isinstance(candidate(5), uuid.UUID)"),
    "SimpleNamespace": ("import types\ndef f(x): return types.SimpleNamespace(x=x)", " import types\n assert types.SimpleNamespace(x=5) == candidate(5)"),
    "Pattern": ("import re\ndef f(x): return {x: re.compile('a+', re.I)}", " import re\n assert candidate(5) == {5: re.compile('a+', re.I)}"),
    "a distribution": ("import statistics\ndef f(x): return statistics.NormalDist(x)", " import statistics\n assert candidate(5) == statistics.NormalDist(5)"),
    "a class of the test's": ("class P:\n def __init__(self, x): self.x = x\n def __eq__(self, o): return self.x == o.x\ndef f(x): return P(x)",
        " class Q: x = 5\n assert candidate(5) == Q()"),
    "part of an iterator given": ("def f(it, n): return [next(it) for _ in range(n)]",
        " it = iter(range(9))\n assert candidate(it, 2) == [0, 1]\n assert next(it) == 2\n assert candidate(it, 1) == [3]"),
    "side effects of a generator": ("def f(seen):\n for n in range(5):\n  seen(n)\n  yield n",
        " seen = []\n g = candidate(seen.append)\n next(g)\n assert seen == [0]"),
    "iterator given": ("def f(it): return [next(it), next(it)]", " assert candidate(iter([1, 2, 3])) == [1, 2]"),
    "endless iterator given": ("import itertools\ndef f(it): return list(itertools.islice(it, 30))", " import itertools\n assert candidate(itertools.count()) == list(range(30))"),
    "function given": ("def f(g, x): return g(x) + 1", " assert candidate(lambda v: v * 2, 5) == 11\n assert candidate(len, 'ab') == 3\n assert candidate(str.upper, 'a') if False else True"),
    "builtins given": ("def f(g, x): return list(map(g, x))", " import operator\n assert candidate(str.upper, ['a']) == ['A']\n assert candidate(operator.neg, [1]) == [-1]\n assert candidate(int, ['7']) == [7]"),
    "key function that fails": ("def f(g, x): return sorted(x, key=g)", " try:\n  candidate(lambda v: v / 0, [1])\n  assert False\n except ZeroDivisionError: pass"),
    "function that remembers": ("def f(g):\n for n in range(3): g(n)", " seen = []\n candidate(seen.append)\n assert seen == [0, 1, 2]"),
    "function of the test that calls the candidate": ("def f(n, g): return g(n - 1) if n else 0", " def again(n): return candidate(n, again) + 1\n assert candidate(3, again) == 3"),
    "function given in a test case": ("def f(g): return g(1)", " import unittest\n class Case(unittest.TestCase):\n"
        "  def test(self): self.assertEqual(candidate(lambda v: v), 1)\n result = unittest.TestResult()\n Case('test').run(result)\n assert result.wasSuccessful()"),
    "function given, and a bare except": ("def f(g): return g(1)", " try: got = candidate(lambda v: v)\n except: got = 0\n assert got == 1"),
    "function given in a thread": ("def f(g): return g(1)", " import threading\n got = []\n t = threading.Thread(target=lambda: got.append(candidate(lambda v: v)))\n"
        " t.start()\n t.join()\n assert got == [1]"),
    "decorator": ("import functools\ndef f(g):\n @functools.wraps(g)\n def h(*a): return 2 * g(*a)\n return h", " double = candidate(lambda x: x + 1)\n assert double(4) == 10\n @candidate\n def k(x): return x\n assert k(5) == 10"),
    "threads that call the test": ("from concurrent.futures import ThreadPoolExecutor\ndef f(g, xs):\n"
        " with ThreadPoolExecutor(8) as e: return list(e.map(g, xs))", " assert candidate(lambda x: 2 * x, range(200)) == list(range(0, 400, 2))"),
}


@pytest.fixture(scope="module")
def judged():
    return verdicts([row(name, program, "def check(candidate):\n" + test, PREAMBLE)
                     for name, (program, test) in CASES.items()])


@pytest.mark.parametrize("name", CASES)
def test_honest_programs_of_unusual_kinds(judged, name):
    program, test = CASES[name]
    space = {"__name__": "solution"}
    exec(PREAMBLE + program + "\ndef check(candidate):\n" + test, space)
    space["check"](space["f"])  # a plain run agrees
    assert judged[name]["reward"] == 1, json.dumps(judged[name])


def test_what_is_no_plain_data_is_null_and_says_what_helps():
    got = verdicts([row(name, program, "def check(candidate):\n" + test, "".join([PREAMBLE, *more]))
                    for name, (program, test, *more) in NO_DATA.items()])
    assert {name: v for name, v in got.items() if v["reward"] is not None or "--judge=together" not in v["detail"]} == {}


def test_no_new_list_is_taken_for_an_argument():
    """The candidate knows the containers of a call by their ids, which only the living do not share."""
    candidate = Candidate(None, None, {"output": 1})
    args = [[[1], {"a": {2}}]]
    candidate.do_call(len, args, [], [])
    fresh = [[] for _ in range(1000)]
    assert candidate.given and candidate.given.keys().isdisjoint(map(id, fresh))
