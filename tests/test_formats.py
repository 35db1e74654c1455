"""The test formats of sandbox/formats.md: ten problems in each, right and wrong programs; and code blocks in answers.

    pytest tests/test_formats.py
"""
# ruff: noqa: E501
import base64
import json
import pickle
import time
import zlib

import pytest
from test_sandbox import NAMED, RUNTIME, dataset, verdicts, works

import sandbox
from sandbox import formats, runtimes

pytestmark = pytest.mark.skipif(not works(), reason="no sandbox runtime works on this machine")

PROBLEMS = {  # name: (parameters, right body, wrong body, arguments of the tests)
    "total": ("xs", "return sum(xs)", "return sum(xs) + (len(xs) > 2)", [[[]], [[1, 2]], [[1, 2, 3]]]),
    "mean_of": ("xs", "return sum(xs) / len(xs)", "return sum(xs) / len(xs) + 0.1", [[[1, 2]], [[0.1, 0.2, 0.4]]]),
    "flip": ("text", "return text[::-1]", "return text", [["aba"], ["ab"], [""]]),
    "count_words": ("text", "return len(text.split())", "return text.count(' ') + 1", [["a b"], ["a  b c"]]),
    "pairs": ("xs", "return [[a, b] for a, b in zip(xs, xs[1:])]", "return []", [[[1, 2, 3]], [[4, 5]]]),
    "is_even": ("n", "return n % 2 == 0", "return True", [[4], [7]]),
    "table": ("n", "return [[i * j for j in range(n)] for i in range(n)]", "return [[0] * n] * n", [[1], [3]]),
    "power": ("a, b", "return a ** b", "return a * b", [[2, 2], [3, 4]]),
    "tally": ("text", "return {c: text.count(c) for c in text}", "return {c: 1 for c in text}", [["ab"], ["aab"]]),
    "smallest": ("xs", "return min(xs, default=None)", "return xs[0] if xs else None", [[[]], [[3, 1, 2]]]),
}


def function(name, wrong=False):
    parameters, *bodies, _ = PROBLEMS[name]
    return f"def {name}({parameters}):\n    {bodies[wrong]}\n"


def results(name):
    space = {}
    exec(function(name), space)
    return [space[name](*args) for args in PROBLEMS[name][3]]


def method(name, wrong=False):
    return f"class Solution:\n    def {name}(self, {PROBLEMS[name][0]}):\n        {PROBLEMS[name][1 + wrong]}\n"


def script(name, wrong=False):
    """A program that reads the arguments as JSON, one a line, and prints the result."""
    return (f"import sys, json\n{function(name, wrong)}\nif __name__ == '__main__':\n    args = [json.loads(line) for line "
            f"in sys.stdin.read().splitlines()]\n    print(json.dumps({name}(*args)), ' ')\n")


def texts(name):
    return (["\n".join(map(json.dumps, args)) for args in PROBLEMS[name][3]],
            [json.dumps(result) + "\n" for result in results(name)])


def mbpp(name):
    cases = zip(PROBLEMS[name][3], results(name))
    asserts = [f"assert {name}(*{args!r}) == {result!r}" for args, result in cases]
    return {"task_id": 1, "text": "Write it.", "code": function(name), "test_list": asserts, "test_setup_code": "",
            "challenge_test_list": []}


def mbpp_plus(name):
    test = (f"import numpy as np\n\ndef assertion(out, exp, atol):\n    if isinstance(exp, float):\n"
            f"        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n    else:\n        assert out == exp, out\n\n"
            f"inputs = {PROBLEMS[name][3]!r}\nresults = {results(name)!r}\nfor i, (inp, exp) in enumerate(zip(inputs, "
            f"results)):\n    assertion({name}(*inp), exp, 0)\n")
    return mbpp(name) | {"test": test, "test_imports": ["import math"], "prompt": "Write a function."}


def humaneval_plus(name):
    head = f"import math\n\n\ndef {name}({PROBLEMS[name][0]}):\n    '''Do it.'''\n"
    test = (f"import numpy as np\n\ndef assertion(out, exp, atol):\n    if isinstance(exp, float):\n"
            f"        np.testing.assert_allclose(out, exp, rtol=1e-07, atol=atol)\n    else:\n        assert out == exp\n\n"
            f"def check(candidate):\n    inputs = {PROBLEMS[name][3]!r}\n    results = {results(name)!r}\n"
            f"    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n")
    return {"task_id": "HumanEval/0", "prompt": head, "canonical_solution": f"    {PROBLEMS[name][1]}\n",
            "entry_point": name, "test": test}


def apps(name):
    inputs, outputs = texts(name)
    return {"input_output": json.dumps({"inputs": inputs, "outputs": outputs}), "solutions": "[]", "starter_code": ""}


def apps_function(name):
    outputs = [[result] for result in results(name)]
    return {"input_output": json.dumps({"fn_name": name, "inputs": PROBLEMS[name][3], "outputs": outputs})}


def taco_columns(name):
    return {"fn_name": name, "inputs": PROBLEMS[name][3], "outputs": json.loads(json.dumps(results(name)))}


def live_code_bench(name):
    inputs, outputs = texts(name)
    cases = [{"input": given, "output": wanted, "testtype": "stdin"} for given, wanted in zip(inputs, outputs)]
    private = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases[1:])))).decode()
    return {"question_content": "?", "public_test_cases": json.dumps(cases[:1]), "private_test_cases": private,
            "metadata": "{}", "starter_code": ""}


def live_code_bench_function(name):
    row = live_code_bench(name) | {"metadata": json.dumps({"func_name": name})}
    cases = [dict(case, testtype="functional") for case in formats.unpacked(row["public_test_cases"])]
    private = [dict(case, testtype="functional") for case in formats.unpacked(row["private_test_cases"])]
    return row | {"public_test_cases": json.dumps(cases), "private_test_cases": json.dumps(private)}


FORMATS = {mbpp: function, mbpp_plus: function, humaneval_plus: function, apps: script, apps_function: method,
           taco_columns: function, live_code_bench: script, live_code_bench_function: method}


@pytest.fixture(scope="module")
def judged():
    rows = []
    for make, program in FORMATS.items():
        for name in PROBLEMS:
            for wrong in (False, True):
                rows.append({**make(name), "id": (make.__name__, name, wrong), "fenced": False,
                             "completion": program(name, wrong)})
    packages = "sortedcontainers,numpy"
    return {v["id"]: v for v in sandbox.judge(rows, packages=packages, **RUNTIME)}


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_right_programs_get_full_marks_and_wrong_ones_do_not(judged, make):
    for name in PROBLEMS:
        right, wrong = (judged[make.__name__, name, wrong] for wrong in (False, True))
        assert right["reward"] == 1, right
        assert wrong["reward"] is not None and wrong["reward"] < 1, wrong


def test_humaneval_is_judged_as_it_is_published():
    rows = [{**r, "fenced": False, "id": r["id"]} for r in dataset("humaneval/HumanEval.jsonl.gz", "canonical_solution")]
    for r in rows:
        r["prompt"] = r.pop("preamble")
    assert [v for v in verdicts(rows[:40]).values() if v["reward"] != 1] == []


DESIGN = """
class Cache:
    def __init__(self, size): self.size, self.kept = size, {}
    def put(self, key, value):
        self.kept.pop(key, None)
        self.kept[key] = value
        if len(self.kept) > self.size: del self.kept[next(iter(self.kept))]
    def get(self, key):
        if key not in self.kept: return -1
        self.kept[key] = value = self.kept.pop(key)
        return value
"""


@pytest.mark.parametrize("columns", [
    {"entry_point": "Cache", "test": "def check(candidate):\n c = candidate(2)\n c.put(1, 1)\n assert c.get(1) == 1\n"
                                     " c.put(2, 2)\n c.get(1)\n c.put(3, 3)\n assert c.get(2) == -1"},
    {"test_list": ["c = Cache(2)\nc.put(1, 1)\nassert c.get(1) == 1\nc.put(2, 2)\nc.get(1)\nc.put(3, 3)\n"
                   "assert c.get(2) == -1\nassert c.size == 2"]}])
def test_what_is_tested_may_be_a_class(columns):
    rows = [{**columns, "id": n, "fenced": False, "completion": text} for n, text in enumerate(
        (DESIGN, DESIGN.replace("self.kept[key] = value = self.kept.pop(key)", "value = self.kept[key]")))]
    right, wrong = (verdict for _, verdict in sorted(verdicts(rows).items()))
    assert right["reward"] == 1 and wrong["reward"] < 1, (right, wrong)


def test_classes_that_only_the_program_has():
    """As in MBPP's problems with a Node or a Pair: the tests make objects of the program's own class."""
    code = ("class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef longest(pairs):\n"
            "    return max(pair.b - pair.a for pair in pairs)")
    row = {"test_list": ["assert longest([Pair(1, 4), Pair(2, 3)]) == 3", "p = Pair(0, 1)\np.b = 9\n"
                         "assert longest([p]) == 9"], "code": code, "fenced": False}
    got = verdicts([{**row, "id": 1, "completion": code}, {**row, "id": 2, "completion": code.replace("max", "min")},
                    {**row, "id": 3, "completion": code.replace("Pair", "Couple")}])
    assert [got[n]["reward"] for n in (1, 2, 3)] == [1, 0.5, 0]


SCRIPTS = [  # a program that prints the sum of the numbers that it reads, and whether it gets full marks
    ("print(sum(map(int, open(0).read().split())))", True),
    ("import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())), end='')", True),
    ("import os\nprint(sum(map(int, os.read(0, 1000).split())))", True),
    ("import sys\ninput = sys.stdin.readline\nn = int(input())\nsys.stdout.write(f'{n + sum(map(int, input().split()))}  \\n\\n')", True),
    ("n = int(input())\nprint(n + sum(map(int, input().split())))\ninput()", False),
    ("n = int(input())\nprint(n + sum(map(int, input().split())))\nexit()", True),
    ("n = int(input())\nprint(n + sum(map(int, input().split())))\nraise SystemExit(0)", True),
    ("import os\nn = int(input())\nos.write(1, b'%d' % (n + sum(map(int, input().split()))))", True),
    ("def main():\n    n = int(input())\n    print(n + sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()", True),
    *[("import sys\nsys.stdin = open('/dev/stdin')\nn = int(input())\nprint(n + sum(map(int, input().split())))", True)] * NAMED,
    ("import sys\nfor line in sys.stdin: pass\nprint(6)", False),
    ("import sys\nif len(sys.argv) > 1: sys.stdin = open(sys.argv[1])\nn = int(input())\nprint(n + sum(map(int, input().split())))", True),
    ("import fileinput\nprint(sum(int(word) for line in fileinput.input() for word in line.split()))", True),
    ("import threading, time\ndef main():\n    time.sleep(0.01)\n    n = int(input())\n    print(n + sum(map(int, input().split())))\n"
     "threading.Thread(target=main).start()", True),
    ("from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor()\n"
     "print(sum(pool.map(int, open(0).read().split())))", True),
    ("import atexit, io, sys\nsys.stdout = io.StringIO()\natexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\n"
     "n = int(input())\nprint(n + sum(map(int, input().split())))", True),
    ("import os, sys\nprint(sum(map(int, open(0).read().split())))\nsys.stdout.flush()\nos._exit(0)", True),
    ("import sys\nprint(sum(map(int, open(0).read().split())), flush=True)\nsys.stdout.close()", True),
    ("import resource\nresource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY,) * 2)\n"
     "print(sum(map(int, open(0).read().split())))", True),
    ("import os\nos.chdir(os.path.dirname(os.path.abspath(__file__)))\nprint(sum(map(int, open(0).read().split())))", True),
    ("import threading\ndef main():\n    n = int(input())\n    print(n + sum(map(int, input().split())))\n"
     "t = threading.Thread(target=main); t.start(); t.join()", True),
    ("write = open(1, 'w').write\nn = int(input())\nwrite(str(n + sum(map(int, input().split()))))", True),
    ("import io, sys\nout = io.TextIOWrapper(sys.stdout.buffer)\nn = int(input())\nout.write(str(n + sum(map(int, input().split()))))", True),
    ("import os, sys\nclass Out:\n    def __init__(self): self.parts = []\n    def write(self, text): self.parts.append(text)\n"
     "    def flush(self): os.write(1, str('').join(self.parts).encode()); self.parts.clear()\nsys.stdout = Out()\n"
     "n = int(input())\nprint(n + sum(map(int, input().split())))", True),
    ("input = open(0).readline\nn = int(input())\nprint(n + sum(map(int, input().split())))", True),
    ("class In:\n    def __init__(self): self.file, self.me = open(0, 'rb'), self\nread = In().file.readline\nn = int(read())\n"
     "print(n + sum(map(int, read().split())))", True),
    ("class End:\n    def __del__(self): print(n + sum(map(int, input().split())))\nend = End()\nn = int(input())", True),
    ("import builtins\nold = print\nbuiltins.print = lambda *args: old(*args)\nn = int(input())\nprint(n + sum(map(int, input().split())))", True),
    ("n = int(input())\nprint(float(n + sum(map(int, input().split()))))", True),
    ("n = int(input())\nprint('The sum is', n + sum(map(int, input().split())))", False),
    ("seen = globals().setdefault('seen', 0) + int(input())\nprint(seen + sum(map(int, input().split())))", True),
]


def test_a_program_may_read_and_print_in_any_way():
    row = {"fenced": False, "inputs": ["2\n1 3\n", "1\n5", "0\n4 4 4\n"], "outputs": ["6\n", "6", "12"]}
    got = verdicts([row | {"id": n, "completion": program} for n, (program, _) in enumerate(SCRIPTS)])
    assert [SCRIPTS[n] for n, v in got.items() if (v["reward"] == 1) is not SCRIPTS[n][1]] == [] and len(got) == len(SCRIPTS)


WORDS = [  # printed, wanted, whether APPS's comparison calls them the same, whether LiveCodeBench's does
    ("1 2\n3\n", "1 2\n3", True, True), (" 1 2 \n3\n\n", "1 2\n3\n", True, True), ("1\n2", "1 2", False, False),
    ("1\n\n2", "1\n2", True, False), ("1  2", "1 2", True, True), ("a  b", "a b", True, False), ("", "", True, True),
    ("0.3333333", "0.33333333", True, False), ("1.0", "1", True, True), ("1.0 a", "1 a", True, False),
    ("100001", "100000", False, False), ("1.000001", "1", False, False), ("yes", "YES", False, False), ("nan", "nan", True, True),
    ("1 2 3", "1 2", False, False), ("1e400", "2e400", False, False), ("0", "0.000004", False, False), ("2 1", "1 2", False, False)]


@pytest.mark.parametrize("printed, wanted, words, lines", WORDS)
def test_outputs_are_compared_as_in_the_benchmarks(printed, wanted, words, lines):
    space = {}
    exec(formats.COMPARE, space)
    assert [space["same_words"](printed, wanted), space["same_lines"](printed, wanted)] == [words, lines]


@pytest.mark.parametrize("row, reason", [
    ({}, "has no tests"), ({"test": "x"}, "entry_point"), ({"inputs": [], "outputs": []}, "equal length"),
    ({"test_list": ["assert 1 == 1"]}, "calls no function"), ({"test_list": ["assert f(1) =="]}, "SyntaxError"),
    ({"test_list": [3]}, "AttributeError"), ({"input_output": "[1]"}, "TypeError"), ({"inputs": 1}, "equal length"),
    ({"public_test_cases": '[{"input": "1"}]'}, "KeyError"), ({"public_test_cases": "eA=="}, "incomplete"),
    ({"test_list": ["assert f(1) == 1"], "block": "second"}, "block must be"),
    ({"public_test_cases": base64.b64encode(zlib.compress(pickle.dumps(print))).decode()}, "more than text")])
def test_unknown_rows_say_why(row, reason):
    with pytest.raises(ValueError, match=reason):
        formats.normalize(row)
    verdict = verdicts([{**row, "id": 1, "completion": "```python\n1\n```"}])[1]
    assert verdict["reward"] is None and reason in verdict["detail"]


# ---- the program in an answer ----

GOOD, DRAFT = "def f(x):\n    return 1", "def f(x):\n    return 0"
DOCUMENTED = f"{GOOD[:9]}\n    '''Call it:\n    ```python\n    f(1)  # it's 1\n    ```\n    '''{GOOD[9:]}"
QUOTED = f"{GOOD}\nFENCE = '```'\nMORE = \"a \\\" ```\""
OPEN = "def f(x):\n    return \'\'\'a"
ANSWERS = {  # name: (answer, the program by the rule `answer`, by the rule `first`)
    "python": (f"Here:\n```python\n{GOOD}\n```\nDone.", GOOD, GOOD),
    "py": (f"```py\n{GOOD}\n```", GOOD, GOOD), "python3": (f"```python3\n{GOOD}\n```", GOOD, GOOD),
    "Python": (f"``` Python\n{GOOD}\n```", GOOD, GOOD), "braces": (f"```{{python}}\n{GOOD}\n```", GOOD, GOOD),
    "braces and dot": (f"```{{.python}}\n{GOOD}\n```", GOOD, GOOD),
    "attributes": (f'```python title="a.py"\n{GOOD}\n```', GOOD, GOOD),
    "no language": (f"```\n{GOOD}\n```", GOOD, None),
    "no language before python": (f"```\n$ run\n```\n```python\n{GOOD}\n```", GOOD, GOOD),
    "closing on the same line": (f"```python\n{GOOD}```", GOOD, GOOD),
    "all on one line": ("```python def f(x): return 1```", "def f(x): return 1", "def f(x): return 1"),
    "tildes": (f"~~~python\n{GOOD}\n~~~", GOOD, GOOD), "four": (f"````python\n{GOOD}\n# ```\n````", f"{GOOD}\n# ```", f"{GOOD}\n# ```"),
    "carriage returns": (f"```python\r\n{GOOD}\r\n```\r\n", GOOD, GOOD),
    "after other text": (f"Here it is: ```python\n{GOOD}\n```", GOOD, GOOD), "byte order mark": (f"\ufeff```python\n{GOOD}\n```", GOOD, GOOD),
    "in a list": ("- ```py\n  def f(x):\n      return 1\n  ```", GOOD, GOOD),
    "indented": ("1. Do:\n   ```python\n   def f(x):\n       return 1\n   ```", GOOD, GOOD),
    "another language first": (f"```bash\nls\n```\n```python\n{GOOD}\n```", GOOD, GOOD),
    "two blocks": (f"```python\n{GOOD}\n```\n```python\n{DRAFT}\n```", GOOD, GOOD),
    "a draft in thought": (f"<think>\n```python\n{DRAFT}\n```\n</think>\n```python\n{GOOD}\n```", GOOD, DRAFT),
    "only the end of thought": (f"```python\n{DRAFT}\n```\n</think>```python\n{GOOD}\n```", GOOD, DRAFT),
    "thought without end": (f"<think>\n```python\n{DRAFT}\n```\n", None, DRAFT),
    "not closed": (f"```python\n{GOOD}\n", None, None), "another language": (f"```c\n{GOOD}\n```", None, None),
    "text after the end": (f"```python\n{GOOD}\n``` It is fast.", GOOD, GOOD), "a stop after the end": (f"```py\n{GOOD}\n```.\nSo", GOOD, GOOD),
    "text after, and a second block": (f"```py\n{GOOD}\n```: then\n```py\n{DRAFT}\n```", GOOD, GOOD),
    "a fence in a docstring": (f"```python\n{DOCUMENTED}\n```\nDone.\n```\nf(1)\n```", DOCUMENTED, DOCUMENTED),
    "a fence in a string": (f"```py\n{QUOTED}\n```", QUOTED, QUOTED), "a fence in a comment": (f"```py\n# ```\n{GOOD}\n```", f"# ```\n{GOOD}", f"# ```\n{GOOD}"),
    "an open string": (f"```py\n{OPEN}\n```\n```py\n{GOOD}\n```", OPEN, OPEN), "a mark in the block": (f"```py\n\ufeff{GOOD}\n```", GOOD, GOOD),
    "none": (GOOD, None, None), "empty": ("", None, None),
}


def program_in(answer, rule="answer", which="first"):
    return formats.program_of({"completion": answer}, which, rule)


@pytest.mark.parametrize("text", ["```python\nx{}y", "```{}", "``` {}", "{}", "```python\n{}\n```", "```python {}\n",
                                  "```py\n\"\"\"{}\\"])
@pytest.mark.parametrize("again", [" ", "`", "a", "~", "```python\n", "```\n", "\t \n", "``` ", "\\\"\"\"", "```\n\\'''\n```\n"])
def test_no_answer_takes_long_to_read(text, again):
    begun = time.process_time()
    for rule in sandbox.BLOCKS:
        program_in(text.format((again * 60_000)[:60_000]), rule)
    assert time.process_time() - begun < 1


def test_numpy_values_are_passed_and_compared():
    program = "import numpy as np\ndef f(a):\n    a[0] = 9\n    return [np.zeros((0, 3)), a.mean(), a * 2]"
    test = ("import numpy as np\ndef check(candidate):\n a = np.array([1, 2])\n x, y, z = candidate(a)\n assert a[0] == 9\n"
            " assert x.shape == (0, 3)\n assert y.round(0) == 6\n assert (z == np.array([18, 4])).all()")
    row = {"id": 1, "fenced": False, "completion": program, "test": test, "entry_point": "f"}
    verdict, = sandbox.judge([row], packages="numpy", **RUNTIME)
    assert (verdict["passed"], verdict["total"]) == (4, 4), verdict


@pytest.mark.parametrize("name", ANSWERS)
def test_the_block_that_counts(name):
    answer, *wanted = ANSWERS[name]
    got = [program_in(answer, rule) for rule in ("answer", "first")]
    assert [block and block.replace("\r", "").rstrip("\n ") for block in got] == wanted


def test_a_format_says_whether_the_first_or_the_last_block_counts():
    answer = f"```python\n{DRAFT}\n```\nBetter:\n```\n{GOOD}\n```"
    assert [program_in(answer, which=which).strip() for which in ("first", "last")] == [DRAFT, GOOD]
    assert program_in(answer, "first", "last").strip() == DRAFT  # the paper's rule, whatever the format
    case = {"input": "1", "output": "1", "testtype": "functional"}
    lcb = {"public_test_cases": json.dumps([case]), "metadata": json.dumps({"func_name": "f"})}
    mbpp = {"test_list": ["assert f(1) == 1"]}
    got = verdicts([{**columns, "id": n, "completion": answer}
                    for n, columns in enumerate((lcb, mbpp, mbpp | {"block": "last"}, sandbox.normalize(lcb)))])
    assert [got[n]["reward"] for n in range(4)] == [1, 0, 1, 1]


# ---- what the benchmarks supply ----

def lcb(inputs, outputs, name=None):
    cases = [{"input": a, "output": b, "testtype": "functional" if name else "stdin"} for a, b in zip(inputs, outputs)]
    return {"public_test_cases": json.dumps(cases), "metadata": json.dumps({"func_name": name} if name else {})}


DEEP = "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
SUPPLIED = {  # name: (program that reads a number n and prints it, or None; columns or None)
    "accumulate": "print([*accumulate([1, int(input()) - 1])][-1])", "fabs": "print(int(fabs(float(input()))))",
    "time": "t = time.time()\nprint(input())", "Fraction": "print(fractions.Fraction(int(input())))", "stdin": "print(stdin.readline())",
    "Counter": "print(sum(Counter(a=int(input())).values()))", "reduce": "print(reduce(add, [int(input()), 0]))", "lru_cache": "@lru_cache(None)\ndef f(): return input()\nprint(f())",
    "pow is Python's": "print(pow(int(input()), 1, 10 ** 9))", "deepcopy": "print(deepcopy([input()])[0])", "mean": "print(int(mean([int(input())])))",
    "datetime": "d = datetime.date(2020, 1, 1)\nprint(input())", "ascii_lowercase": "assert ascii_lowercase[0] == 'a'\nprint(input())", "nlargest": "print(nlargest(1, [int(input())])[0])",
    "StringIO": "print(StringIO(input()).read())", "loads": "print(loads(input()))", "Optional": "x: Optional[int] = int(input())\nprint(x)", "stdout": "stdout.write(input())",
}


def test_programs_of_contests_need_not_import_what_the_benchmarks_supply():
    rows = [{"id": (name, n), "fenced": False, "completion": program} | columns for name, program in SUPPLIED.items()
            for n, columns in enumerate(({"inputs": ["7\n"], "outputs": ["7\n"]}, lcb(["7"], ["7"])))]
    assert {name: v for name, v in verdicts(rows).items() if v["reward"] != 1} == {}


def test_recursion_and_long_integers_have_the_limits_of_live_code_bench():
    """Recursion to 50,000, integers of 50,000 digits; in the other formats Python's own."""
    deep, long = DEEP + "print(f(int(input())))", "n = int(input())\nprint(len(str(10 ** n)) - 1)"
    rows = [{"id": (n, k), "fenced": False, "completion": program} | columns
            for n, program in enumerate((deep, long)) for k, columns in enumerate((
                lcb(["30000"], ["30000"]), {"inputs": ["30000"], "outputs": ["30000"]}))]
    rows.append({"id": "call", "fenced": False, "completion": DEEP} | lcb(["40000"], ["40000"], "f"))
    got = {name: v["reward"] for name, v in verdicts(rows).items()}
    assert got == {(0, 0): 1, (0, 1): 0, (1, 0): 1, (1, 1): 0, "call": 1}


def test_values_are_compared_as_in_the_benchmarks():
    """A tuple is a list, inside a list in APPS only; a lone item is its list in APPS; keys of its dicts were integers."""
    pair, nested, keys = "def f(x): return 1, 2", "def f(x): return [(1, 2)]", "def f(x): return {k + 1: x[k] for k in x}"
    cases = [(pair, 0, [1, 2], 1, 1), (nested, 0, [[1, 2]], 1, 0), ("def f(x): return 5", 0, [5], 1, 0),
             ("def f(x): return 1", 0, [1, 2], 0, 0), (keys, {"1": 2}, {"2": 2}, 1, 0), ("def f(x): return sum(map(len, x))", {"ab": 2}, 2, 1, 1),
             ("def f(x): return [*x]", {"3": 0}, ["3"], 0, 1)]
    rows = []
    for n, (program, given, wanted, *_) in enumerate(cases):
        rows.append({"id": (n, 0), "inputs": [[given]], "outputs": [wanted], "fn_name": "f"})
        rows.append({"id": (n, 1)} | lcb([json.dumps(given)], [json.dumps(wanted)], "f"))
    got = verdicts([row | {"fenced": False, "completion": cases[row["id"][0]][0]} for row in rows])
    assert [[got[n, k]["reward"] for k in (0, 1)] for n in range(len(cases))] == [case[3:] for case in map(list, cases)]


def test_byte_order_marks_change_nothing():
    mark, program, test = "\ufeff", "def f(x): return x + 1", "def check(candidate):\n assert candidate(1) == 2"
    base = {"fenced": False, "completion": program, "entry_point": "f"}
    rows = [base | {"test": test, "completion": mark + program}, base | {"test": mark + test},
            base | {"test": test, "preamble": mark + "import math"}, base | {"test_list": [mark + "assert f(1) == 2"] * 2},
            base | {"test": test, "solution": mark + program}, base | {"input_output": mark + '{"fn_name": "f", "inputs": [[1]], "outputs": [2]}'},
            {"completion": mark + "print(int(input()) + 1)", "inputs": ["1"], "outputs": ["2"], "fenced": False}]
    got = verdicts([row | {"id": n} for n, row in enumerate(rows)])
    assert [got[n]["reward"] for n in range(len(rows))] == [1] * len(rows)


@pytest.mark.parametrize("way", ["apart", "together"])
def test_a_failing_message_of_a_test_is_not_the_rows_fault(way):
    tests = ["if f(1) != 2:\n    raise ValueError(f'{missing}')", "assert f(1) == 2, missing", "for n in [1]:\n    if f(n) != 2: raise AssertionError(got)",
             "try:\n    if f(1) != 2: raise KeyError(oh[0]) from None\nexcept IndexError:\n    pass"]
    rows = [{"id": (n, k), "test_list": [test], "fenced": False, "completion": f"def f(x): return {k}"}
            for n, test in enumerate(tests) for k in (2, 3)]
    got = verdicts(rows, way=way)
    assert [[got[n, k]["reward"] for k in (2, 3)] for n in range(len(tests))] == [[1, 0]] * len(tests)
    fault = verdicts([{"id": 1, "test_list": ["assert f(missing) == 2"], "fenced": False, "completion": "def f(x): return 2"}])[1]
    assert fault["reward"] is None and "--judge=together" in fault["detail"]


def test_functions_may_have_any_name():
    rows = [{"id": (way, name), "test_list": [f"assert {name}(3, 4) == 7"] * 2, "fenced": False,
             "completion": f"def {name}(a, b): return a + b if a < 1 else {name}(a - 1, b + 1)"}
            for way in ("apart", "together") for name in ("check", "sum", "candidate", "len")]
    got = {}
    for way in ("apart", "together"):
        got |= verdicts([row for row in rows if row["id"][0] == way], way=way)
    assert {name: v for name, v in got.items() if v["reward"] != 1} == {}


# ---- unittest's cases, as in BigCodeBench ----

CASES = """
import os, random, tempfile, unittest
from unittest.mock import mock_open, patch
class TestCases(unittest.TestCase):
    def setUp(self):
        self.file = tempfile.NamedTemporaryFile("w+")
        self.file.write("3 4"); self.file.flush()
    def tearDown(self):
        self.file.close()
    def test_file(self):
        self.assertEqual(total(self.file.name), 7)
    @patch("builtins.open", mock_open(read_data="5 6"))
    def test_mock(self):
        self.assertEqual(total("anything"), 11)
    def test_error(self):
        with self.assertRaises(FileNotFoundError):
            total("/nowhere")
    def test_environment(self):
        with patch.dict(os.environ, {"EXTRA": "1"}):
            self.assertEqual(total(self.file.name), 8)
"""
BODY = "    with open(path) as file:\n        return sum(map(int, file.read().split())) + int(os.environ.get('EXTRA', 0))\n"
PROMPT = 'import os\ndef total(path):\n    """Sum up."""\n'


def test_unittest_needs_together_and_says_so():
    base = {"test": CASES, "entry_point": "total", "complete_prompt": PROMPT, "canonical_solution": BODY, "fenced": False}
    programs = [BODY, f"import os\ndef total(path):\n{BODY}", BODY.replace(" + int(os.environ.get('EXTRA', 0))", ""),
                "    return 7\n", "    raise SystemExit\n", "    os._exit(0)\n", "import unittest\nunittest.TestCase.assertEqual = 0\ndef total(path): return 1"]
    got = verdicts([base | {"id": n, "completion": program} for n, program in enumerate(programs)], way="together")
    assert [(got[n]["passed"], got[n]["total"]) for n in range(6)] == [(4, 4), (4, 4), (3, 4), (1, 4), (0, 4), (0, 4)]
    apart = verdicts([base | {"id": 1, "completion": BODY}])[1]
    assert apart["reward"] is None and "--judge=together" in apart["detail"]


@pytest.mark.parametrize("way", ["apart", "together"])
def test_what_is_not_installed_is_the_rows_fault(way):
    test = "import nosuchmodule\ndef check(candidate):\n assert candidate(1) == 1"
    rows = [{"id": 1, "test": test}, {"id": 2, "test": test.partition("\n")[2], "preamble": "from nosuchmodule import x"}]
    got = verdicts([row | {"entry_point": "f", "fenced": False, "completion": "def f(x): return x"} for row in rows], way=way)
    assert all(got[n]["reward"] is None and "nosuchmodule" in got[n]["detail"] for n in (1, 2)), got
    program = verdicts([{"id": 1, "test_list": ["assert f(1) == 1"], "fenced": False, "completion": "import nosuchmodule"}], way=way)[1]
    assert program["reward"] == 0


def test_a_package_comes_with_the_shared_libraries_of_its_wheel(tmp_path, monkeypatch):
    """Whatever the wheel's name is: PIL's are in pillow.libs."""
    (tmp_path / "lens").mkdir()
    (tmp_path / "lens/__init__.py").touch()
    (tmp_path / "optics.libs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert {inside for _, inside in runtimes.extras("lens")} == {"/box/inside", "/box/lens", "/box/optics.libs"}
