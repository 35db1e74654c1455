"""--judge=together: tests and program in one process. What a plain run passes, passes; what can be held is held.

    pytest tests/test_sandbox_together.py
"""
# ruff: noqa: E501
import pytest
from test_sandbox import HOSTILE, HONEST, SHORT, in_call, row, verdicts, works
from test_sandbox_honest import CASES, PREAMBLE

import sandbox

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
    "send": ("def f():\n x = yield 1\n yield x", " g = candidate()\n assert next(g) == 1 and g.send(5) == 5"),
    "with": ("import contextlib\n@contextlib.contextmanager\ndef f(log):\n log.append(1)\n yield 5\n log.append(2)",
        " log = []\n with candidate(log) as v: assert v == 5\n assert log == [1, 2]"),
    "coroutine": ("async def f(x): return x", " import asyncio\n assert asyncio.run(candidate(3)) == 3"),
    "operators": ("class V:\n def __init__(self, x): self.x = x\n def __add__(self, o): return V(self.x + o.x)\n def __len__(self): return self.x\ndef f(x): return V(x)",
        " assert len(candidate(1) + candidate(2)) == 3"),
}


def test_what_a_plain_run_passes_passes():
    cases = CASES | SURROUNDINGS
    rows = [row(name, program, "def check(candidate):\n" + test, PREAMBLE) for name, (program, test) in cases.items()]
    assert {name: v for name, v in verdicts(rows, way="together").items() if v["reward"] != 1} == {}


def test_a_test_that_passes_its_own_class_is_null_apart_and_says_what_helps():
    program, test = SURROUNDINGS["a class of the test"]
    verdict = verdicts([row(1, program, "import collections\nP = collections.namedtuple('P', 'x y')\ndef check(candidate):\n"
                            " assert candidate(P(1, 2)) == 3")])[1]
    assert verdict["reward"] is None and "--judge=together" in verdict["detail"]


def test_hostile_programs_only_win_by_values_that_lie():
    """In a plain run, a value whose == is always true passes any test. Nothing else does, and no verdict is null."""
    rows = [row(name, program) for name, program in HOSTILE.items()]
    got = verdicts(rows, way="together", **SHORT)
    assert {name for name, v in got.items() if v["reward"] != 0} <= {name for name in HOSTILE if name.startswith("lying")}


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
