"""--judge=together: tests and program in one process. What a plain run passes, passes; what can be held is held.

    pytest tests/test_sandbox_together.py
"""
# ruff: noqa: E501
import pytest
from test_sandbox import HOSTILE, HONEST, LEETCODE, SHORT, TIGHT, dataset, in_call, row, some, verdicts, works
from test_sandbox_honest import CASES, NO_DATA, PREAMBLE

import sandbox
from sandbox.inside.surroundings import first

pytestmark = pytest.mark.skipif(not works(), reason="no sandbox runtime works on this machine")
SURROUNDINGS = {  # what a test does around the program, and cannot from another process
    "seed": ("import random\ndef f(n): return [random.random() for _ in range(n)]",
        " import random\n random.seed(1)\n want = [random.random() for _ in range(3)]\n random.seed(1)\n assert candidate(3) == want"),
    "file": ("def f(path):\n with open(path) as file: return file.read()",
        " import tempfile\n with tempfile.NamedTemporaryFile('w') as t:\n  t.write('x'); t.flush()\n  assert candidate(t.name) == 'x'"),
    "mock": ("import os\ndef f(): return os.getcwd()",
        " from unittest.mock import patch\n with patch('os.getcwd', return_value='here'): assert candidate() == 'here'"),
    "environment": ("import os\ndef f(): return os.environ['KEY']", " import os\n os.environ['KEY'] = 'v'\n assert candidate() == 'v'"),
    "warnings": ("import warnings\ndef f(): warnings.warn('old')",
        " import warnings\n with warnings.catch_warnings(record=True) as w:\n  warnings.simplefilter('always')\n  candidate()\n assert len(w) == 1"),
    "decimal context": ("import decimal\ndef f(a, b): return decimal.Decimal(a) / b",
        " import decimal\n with decimal.localcontext() as c:\n  c.prec = 3\n  assert str(candidate(1, 3)) == '0.333'"),
    "a class of the test": ("def f(p): return p.x + p.y", " import collections\n P = collections.namedtuple('P', 'x y')\n assert candidate(P(1, 2)) == 3"),
    "input": ("def f(): return int(input('a')) + int(input())",
        " from unittest.mock import patch\n with patch('builtins.input', side_effect=['1', '2']): assert candidate() == 3"),
    "stdin": ("import sys\ndef f(): return [input(), sys.stdin.read()]",
        " import io, sys\n sys.stdin = io.StringIO('a\\nb\\n')\n assert candidate() == ['a', 'b\\n']"),
    "stdout": ("def f(x): print('hello', x)", " import io, contextlib\n out = io.StringIO()\n"
        " with contextlib.redirect_stdout(out): candidate(3)\n assert out.getvalue() == 'hello 3\\n'"),
    "an attribute of a module": ("import math\ndef f(): return math.pi", " import math\n math.pi = 3\n assert candidate() == 3"),
    "a file given": ("def f(file): return file.read()", " import io\n assert candidate(io.StringIO('a')) == 'a'"),
    "recursion limit": ("def f(n): return n and 1 + f(n - 1)", " import sys\n sys.setrecursionlimit(9000)\n assert candidate(4000) == 4000"),
    "cache": ("import functools\n@functools.cache\ndef f(x): return x", " candidate(1)\n assert candidate.cache_info().misses == 1"),
    "isinstance of its own class": ("class A(ListNode): pass\ndef f(): return A()", " assert isinstance(candidate(), ListNode)"),
    "with": ("import contextlib\n@contextlib.contextmanager\ndef f(log):\n log.append(1)\n yield 5\n log.append(2)",
        " log = []\n with candidate(log) as v: assert v == 5\n assert log == [1, 2]"),
    "coroutine": ("async def f(x): return x", " import asyncio\n assert asyncio.run(candidate(3)) == 3"),
    "operators": ("class V:\n def __init__(self, x): self.x = x\n def __add__(self, o): return V(self.x + o.x)\n def __len__(self): return self.x\ndef f(x): return V(x)",
        " assert len(candidate(1) + candidate(2)) == 3"),
}


def test_what_a_plain_run_passes_passes():
    cases = CASES | NO_DATA | SURROUNDINGS
    rows = [row(name, program, "def check(candidate):\n" + test, "".join([PREAMBLE, *more]))
            for name, (program, test, *more) in cases.items()]
    assert {name: v for name, v in verdicts(rows, way="together").items() if v["reward"] != 1} == {}


def test_scripts_and_their_functions_are_judged_together():
    script = {"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "11\n"], "completion": "print(sum(map(int, input().split())))"}
    calls = {"fn_name": "add", "inputs": [[1, 2], [5, 5]], "outputs": [3, 11], "completion": "def add(a, b): return a + b"}
    got = verdicts([{"id": n, "fenced": False, **row} for n, row in enumerate([script, calls])], way="together")
    assert {name: (v["passed"], v["total"]) for name, v in got.items()} == {0: (1, 2), 1: (1, 2)}


def test_apart_what_a_test_sets_up_is_null_and_says_what_helps():
    rows = [row(name, program, "def check(candidate):\n" + test, PREAMBLE)
            for name, (program, test) in SURROUNDINGS.items() if name != "operators"]  # there the fault is that of a value which the program returns
    program, test = SURROUNDINGS["a class of the test"]
    rows.append(row("a class of the test's module", program, "import collections\nP = collections.namedtuple('P', 'x y')\n"
                    "def check(candidate):\n assert candidate(P(1, 2)) == 3"))
    got = verdicts(rows)
    assert {name: v for name, v in got.items() if v["reward"] is not None or "--judge=together" not in v["detail"]} == {}


ORDINARY = {  # tests that set up nothing of the program: a wrong one gets 0
    "a seed for inputs": "import random\ndef check(f):\n random.seed(0)\n for _ in range(9):\n"
                         "  x = random.randint(0, 9)\n  assert f(x) == x",
    "a seed for a helper": "import random\ndef make(): return random.random()\ndef check(f):\n random.seed(0)\n"
                           " x = make()\n assert f(x) == x",
    "a seed for arguments": "from random import seed, sample\ndef check(f):\n seed(3)\n assert f(sample(range(9), 3))",
    "numpy": "import numpy as np\ndef check(f):\n np.random.seed(0)\n a = np.random.rand(3)\n assert f(a) == 0",
    "built-in classes": "import collections\ndef check(f):\n assert isinstance(f(1), (int, float))\n"
                        " assert isinstance(f(2), collections.Counter)",
    "its own names": "class Box:\n def close(self, a): assert a\ndef patch(x): return x\n"
                     "def check(f):\n Box().close(f(1))\n assert f(patch(1))",
    "names of its variables": "def check(f):\n for open, close in ['ab', 'cd']:\n  assert f(open, close=close) == 1",
    "raises": "import unittest\ndef check(f):\n with unittest.TestCase().assertRaises(ValueError): f(1)",
    "timing": "import time\ndef check(f):\n begun = time.time()\n assert f(1) == 1 and time.time() - begun < 9",
}


def test_ordinary_tests_set_up_nothing():
    assert {name: found for name, test in ORDINARY.items() if (found := first(test))[1]} == {}
    sets = dataset(LEETCODE, "completion") + dataset("humaneval/HumanEval.jsonl.gz", "canonical_solution")
    assert [r["id"] for r in sets[::7] if first(r["test"])[1]] == []


def test_what_fails_before_the_surroundings_is_0():
    test = "def check(candidate):\n assert candidate(1) == 38\n import os\n os.environ['A'] = 'b'\n assert candidate(2) == {}"
    rows = [row(name, f"def f(x): return {value}", test.format(wanted))
            for name, value, wanted in [("before", "69", 69), ("both", "31 * x + 7", 69), ("after", "38", 69)]]
    assert {name: v["reward"] for name, v in verdicts(rows).items()} == {"before": 0.5, "both": 1, "after": None}


def test_hostile_programs_only_win_by_values_that_lie():
    """In a plain run, a value whose == is always true passes any test. Nothing else does, and no verdict is null."""
    rows = [row(name, program) for name, program in some(HOSTILE.items(), 4)]
    got = verdicts(rows, way="together", **TIGHT)
    assert {name for name, v in got.items() if v["reward"] != 0 and not name.startswith("lying")} == set()


def test_forged_reports_and_early_exits_are_no_pass():
    forge = "for fd in range(3, 64):\n try: os.write(fd, {text})\n except OSError: pass\nos._exit(0)"
    texts = ["b'....\\n'", "b'0' * 32 + b'00000004....'", "b'x' * (1 << 16)"]
    rows = [row(n, in_call(forge.format(text=text))) for n, text in enumerate(texts)]
    rows += [row("late", "import os\nn = 0\ndef f(x):\n    global n\n    n += 1\n    return os._exit(0) if n > 2 else 31 * x + 7"), HONEST]
    got = {name: v["passed"] for name, v in verdicts(rows, way="together", **SHORT).items()}
    assert got == {0: 0, 1: 0, 2: 0, "late": 2, "honest": 4}


def test_a_wrong_way_is_an_error():
    with pytest.raises(RuntimeError, match="--judge must be one of apart, together"):
        list(sandbox.judge([HONEST], way="beside"))
