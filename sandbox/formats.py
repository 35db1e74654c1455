"""Test formats: from the columns of known data sets to what the sandbox runs (preamble, test, entry_point,
solution), and to the program in a model's answer.

In: a row of one of the formats in formats.md. Out: a dict of these strings and of `block`, which block of
an answer is the program; `solution` (the row's own, which shows whether its tests can be passed at all)
may be None. ValueError, with a reason, for a row of no known format.

    python -c 'import sandbox; print(sandbox.normalize({"test_list": ["assert f(1) == 2"]})["test"])'
"""
import ast
import base64
import builtins
import contextlib
import io
import json
import pickle
import re
import textwrap
import zlib

MARK = "\ufeff"  # a byte order mark
# What the programs of contests may use without importing it. Last come the built-in pow, open and compile.
STARS = """string re datetime collections heapq bisect copy math random statistics itertools functools
    operator io sys json typing builtins""".split()
SUPPLIED = "".join(f"from {name} import *\n" for name in STARS) + f"""
import {", ".join(STARS)}, fractions, time
try:
    import numpy as np
except (ImportError, OSError):  # not installed, or not shown
    pass
"""
LIMITS = """
sys.setrecursionlimit(50_000)
getattr(sys, "set_int_max_str_digits", int)(50_000)  # not in Python below 3.10.7
"""
COMPARE = """
from decimal import Decimal, InvalidOperation
inf, nan = float("inf"), float("nan")

def same_lines(printed, expected):
    # as LiveCodeBench: each line without the space around it, or the numbers in it
    printed, expected = (text.strip().split("\\n") for text in (printed, expected))
    return len(printed) == len(expected) and all(
        a.strip() == b.strip() or same(a.split(), b.split(), 0) for a, b in zip(printed, expected)
    )

def same_words(printed, expected):
    # as APPS: lines that are not blank, in each what stands between spaces; numbers as numpy's allclose
    printed, expected = (
        [line.split() for line in text.split("\\n") if line.strip()] for text in (printed, expected)
    )
    return len(printed) == len(expected) and all(same(a, b, 1e-5) for a, b in zip(printed, expected))

def same(words, expected, tolerance):
    if len(words) != len(expected):
        return False
    return all(tolerance and a == b or close(a, b, Decimal(tolerance)) for a, b in zip(words, expected))

def close(a, b, tolerance):
    try:
        a, b = Decimal(a), Decimal(b)
        return a == b or tolerance > 0 and b % 1 != 0 and abs(a - b) <= Decimal("1e-8") + tolerance * abs(b)
    except InvalidOperation:
        return False

def listed(value):
    return list(value) if isinstance(value, tuple) else value

def plain(value):
    # as JSON would have it
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value
"""
# What a contest supplies, and how it compares what is printed or returned
APPS = SUPPLIED, "same_words(candidate({}), {})", "plain(candidate(*{})) in {}"
LIVE_CODE_BENCH = SUPPLIED + LIMITS, "same_lines(candidate({}), {})", "listed(candidate(*{})) == {}"
DEFINED = ast.FunctionDef, ast.ClassDef
UNITTEST = """
import unittest

def passes(candidate, kind, name):
    result = unittest.TestSuite([kind(name)]).run(unittest.TestResult())
    assert result.wasSuccessful()

def check(candidate):
"""


def normalize(row, way="apart"):
    """What the sandbox needs of a row, to judge it in this way (see host.WAYS)."""
    row = {name: value.removeprefix(MARK) if isinstance(value, str) else value for name, value in row.items()}
    column = next((name for name in FORMATS if row.get(name) is not None), None)
    if column is None:
        raise ValueError(f"has no tests: one of the columns {', '.join(FORMATS)} is needed")
    convert, block = FORMATS[column]
    try:
        found = {"preamble": row.get("preamble") or "", "block": row.get("block") or block} | convert(row)
    except Exception as error:  # whatever is wrong with the row
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{column}: {reason}") from None
    for name in ("preamble", "test", "entry_point"):
        if not isinstance(found[name], str):
            raise ValueError(f"{name} must be a string")
    solutions = [row.get(name) for name in ("canonical_solution", "solution", "code")]
    found["solution"] = next((text for text in solutions if isinstance(text, str)), None)
    if found["block"] not in ("first", "last"):
        raise ValueError("block must be first or last")
    if found.pop("together", False) and way != "together":
        raise ValueError("unittest's cases change what is around the program: use --judge=together")
    return found


def from_check(row):
    """`test` with `def check(candidate)`, as in HumanEval, or with a unittest.TestCase, as in BigCodeBench:
    the prompt, where that is Python, comes first."""
    if not isinstance(row.get("entry_point"), str):
        raise ValueError("has no 'entry_point', which names the function to test")
    found = {"test": row["test"], "entry_point": row["entry_point"]}
    prompt = row.get("prompt") or row.get("complete_prompt")
    if any(isinstance(node, (ast.Import, ast.ImportFrom, *DEFINED)) for node in statements(prompt)):
        found["preamble"] = row.get("preamble") or prompt
    if "TestCase" not in row["test"] or re.search(r"^def check\(", row["test"], re.MULTILINE):
        return found
    cases = [node for node in statements(row["test"]) if isinstance(node, ast.ClassDef)
             and any(ast.unparse(base).endswith("TestCase") for base in node.bases)]
    check = "".join(f"    passes(candidate, {case.name}, {node.name!r})\n" for case in cases
                    for node in case.body if isinstance(node, DEFINED) and node.name.startswith("test"))
    if check:
        found |= {"test": row["test"] + UNITTEST + check, "together": True}
    return found


def statements(text):
    """Those of a text that is Python, where the last function may lack its body; else none."""
    for tail in ("", "\n    pass"):
        with contextlib.suppress(SyntaxError, TypeError):
            return ast.parse(text + tail).body
    return []


def from_asserts(row):
    """`test_list`, as in MBPP: assert statements that call the function by its name. MBPP+ has a
    `test` of more."""
    before = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    listed = [text.removeprefix(MARK) for text in row["test_list"]]
    tests = [row["test"]] if isinstance(row.get("test"), str) else listed
    return {
        "test": "\n".join([*before, *tests]),
        "entry_point": row.get("entry_point") or called("\n".join([*before, *listed])),
    }


def called(source):
    """The function that asserts call: the first name called, in an assert if there is one, that neither
    Python nor the source defines; else the first of Python's."""
    tree = ast.parse(source)
    known = {node.name for node in ast.walk(tree) if isinstance(node, DEFINED)}
    known |= {node.asname or node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}
    known |= set(vars(builtins))
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    names = [node.func.id for test in [*asserts, tree] for node in ast.walk(test)
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    if not names:
        raise ValueError("test_list calls no function")
    return next((name for name in names if name not in known), names[0])


def from_columns(row):
    """`inputs` and `outputs`: lists of equal length; with `fn_name` the arguments of calls, else
    stdin and stdout."""
    inputs, outputs = row["inputs"], row.get("outputs")
    lists = isinstance(inputs, list) and isinstance(outputs, list)
    if not lists or len(inputs) != len(outputs) or not inputs:
        raise ValueError("inputs and outputs must be lists of equal length, not empty")
    if not row.get("fn_name"):
        return contest(APPS, zip(map(lines, inputs), map(lines, outputs)))
    # JSON has no integers as keys; and most results are written as a list of one item
    inputs = [[int_keys(value) for value in given] for given in inputs]
    right = [[wanted, *wanted] if isinstance(wanted, list) and len(wanted) == 1 else [wanted]
             for wanted in outputs]
    return contest(APPS, zip(inputs, right), row["fn_name"])


def int_keys(value):
    try:
        return {int(key): item for key, item in value.items()}
    except (AttributeError, ValueError):
        return value


def lines(text):
    return text if isinstance(text, str) else "\n".join(map(str, text))


def from_live_code_bench(row):
    """`public_test_cases`, as in LiveCodeBench: JSON of {input, output, testtype}; private ones are
    packed."""
    cases = unpacked(row["public_test_cases"]) + unpacked(row.get("private_test_cases") or "[]")
    pairs = [(case["input"], case["output"]) for case in cases]
    if all(case["testtype"] == "stdin" for case in cases):
        return contest(LIVE_CODE_BENCH, pairs)
    name = unpacked(row.get("metadata") or "{}").get("func_name")
    if not name:
        raise ValueError("functional tests need a func_name in metadata")
    pairs = [([json.loads(line) for line in given.split("\n") if line.strip()], json.loads(wanted))
             for given, wanted in pairs]
    return contest(LIVE_CODE_BENCH, pairs, name)


class TextOnly(pickle.Unpickler):
    """Reads a pickle of a string, and nothing that could run code."""

    def find_class(self, module, name):
        raise ValueError("private_test_cases hold more than text")


def unpacked(value):
    """A value: as such, as JSON, or as LiveCodeBench packs its private tests."""
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] not in ("[", "{"):
        value = TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
    return json.loads(value)


def contest(rules, pairs, name=None):
    """The test of a whole program by pairs (stdin, stdout), or of a function by (arguments, value)."""
    preamble, script, call = rules
    test = COMPARE + "\ndef check(candidate):\n"
    for given, wanted in pairs:
        test += f"    assert {(call if name else script).format(repr(given), repr(wanted))}\n"
    entry = f"(Solution().{name} if hasattr(globals().get('Solution'), {name!r}) else {name})"
    return {"preamble": preamble, "test": test, "entry_point": entry if name else "__main__"}


FORMATS = {  # the column that tells a format: how it is converted, which block of an answer is the program
    "test_list": (from_asserts, "first"),                 # MBPP, MBPP+
    "test": (from_check, "first"),                        # LeetCodeDataset, HumanEval, BigCodeBench
    "input_output": (lambda row: from_columns(unpacked(row["input_output"])), "first"),  # APPS, TACO
    "inputs": (from_columns, "first"),                    # the same without JSON
    "public_test_cases": (from_live_code_bench, "last"),  # LiveCodeBench
}


# ---- the program in an answer ----

# At the start of a line, or after other text if it is marked as Python. No part may take quadratic time.
FENCE = re.compile(r"(?:^([ \t]*)|(?<!`)(?=```+py\w{0,5}[ \t\r]*\n))(```+(?!`)|~~~+(?!~))"
                   r"[ \t]{0,9}\{?\.?([\w+#-]{0,20})(?:[^\n`]*\n|(?= .*```))", re.MULTILINE | re.IGNORECASE)
# What a fence does not end: Python's strings and comments
TEXT = r"#[^\n]*" + "".join(
    rf"|{q * 3}[^{q}\\]*(?:(?:\\.|{q}(?!{q * 2}))[^{q}\\]*)*(?:{q * 3}|\\?\Z)|{q}(?:\\.|[^{q}\\\n])*{q}?"
    for q in "'\"")
PYTHON = ("python", "python3", "py", "py3")
BLOCKS = {  # rule: what it means
    "answer": "the first Python block after the last </think>, or else the first that names no language; "
              "the last block of any kind where the row's format says so",
    "first": "the first block marked python, as in the paper",
}


def program_of(row, which, rule="answer"):
    """The program in a row's answer: a closed block, by a rule of BLOCKS and `which` of normalize(); all of
    the answer where it has none and the row says "fenced": false; else None."""
    answer = row["completion"].rpartition("</think>")[2]
    if rule == "first":
        programs = [block for language, block in blocks(row["completion"]) if language in PYTHON]
    elif answer.lstrip().startswith("<think>"):  # it never came
        programs = []
    elif which == "last":
        programs = [block for _, block in blocks(answer)][-1:]
    else:
        found = list(blocks(answer))
        programs = [block for names in (PYTHON, [""]) for language, block in found if language in names]
    programs += [answer] * (row.get("fenced") is False)
    return programs[0].removeprefix(MARK) if programs else None


def blocks(text):
    """(language, text) of each closed block of a Markdown text."""
    position, inside = 0, f"{TEXT}|"
    while start := FENCE.search(text, position):
        mark = start[2]
        fence = rf"(?<!{mark[0]}){mark}{mark[0]}*(?![\w{mark[0]}])"
        end = fence_after(f"{inside}({fence})", text, start.end())
        if not end and inside:  # a string without end: look for none any more, or each block would search all
            inside = ""
            end = fence_after(f"({fence})", text, start.end())
        if not end:
            return
        block = text[start.end():end.start()]
        if start[1] != "":
            block = textwrap.dedent(block)
        elif "\n" not in block:
            block = block.lstrip(" ")
        yield start[3].lower(), block
        position = end.end()


def fence_after(pattern, text, position):
    found = re.compile(pattern, re.DOTALL).finditer(text, position)
    return next((match for match in found if match[1]), None)
