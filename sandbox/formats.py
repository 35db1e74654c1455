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
except ImportError:
    pass
"""
LIMITS = """
sys.setrecursionlimit(50_000)
getattr(sys, "set_int_max_str_digits", int)(50_000)  # not in Python below 3.10.7
"""
COMPARE = """
from decimal import Decimal, InvalidOperation
inf, nan = float("inf"), float("nan")

def same_words(printed, expected):
    # as APPS: lines that are not blank, in each what stands between spaces
    printed, expected = (
        [line.split() for line in text.split("\\n") if line.strip()] for text in (printed, expected)
    )
    if [len(line) for line in printed] != [len(line) for line in expected]:
        return False
    pairs = zip([word for line in printed for word in line], [word for line in expected for word in line])
    return all(a == b or same_number(a, b) for a, b in pairs)

def same_number(a, b):
    # by value; what is no integer as numpy's allclose
    try:
        a, b = Decimal(a), Decimal(b)
        return a == b or b % 1 != 0 and abs(a - b) <= Decimal("1e-8") + Decimal("1e-5") * abs(b)
    except InvalidOperation:
        return False

def same_lines(printed, expected):
    # as LiveCodeBench: each line without the space around it, or as numbers
    printed, expected = ([line.strip() for line in text.strip().split("\\n")] for text in (printed, expected))
    return len(printed) == len(expected) and all(
        a == b or numbers(a) == numbers(b) != None for a, b in zip(printed, expected)
    )

def numbers(line):
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None

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
        found = {"preamble": row.get("preamble") or "", "solution": solution_of(row),
                 "block": row.get("block") or block} | convert(row)
    except Exception as error:  # whatever is wrong with the row
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{column}: {reason}") from None
    for name in ("preamble", "test", "entry_point"):
        if not isinstance(found[name], str):
            raise ValueError(f"{name} must be a string")
    if found["block"] not in ("first", "last"):
        raise ValueError("block must be first or last")
    if found.pop("together", False) and way != "together":
        raise ValueError("unittest's cases change what is around the program: use --judge=together")
    return found


def solution_of(row):
    for column in ("canonical_solution", "solution", "code"):
        if isinstance(row.get(column), str):
            return row[column]
    return None


def from_check(row):
    """`test` with `def check(candidate)`, as in HumanEval, or with a unittest.TestCase, as in BigCodeBench:
    the prompt, where that is Python, comes first."""
    if not isinstance(row.get("entry_point"), str):
        raise ValueError("has no 'entry_point', which names the function to test")
    prompt = row.get("prompt") or row.get("complete_prompt")
    preamble = prompt if isinstance(prompt, str) and is_code(prompt) else ""
    found = {"test": row["test"], "entry_point": row["entry_point"],
             "preamble": row.get("preamble") or preamble}
    if methods := methods_of(row["test"]):
        check = "".join(f"    passes(candidate, {kind}, {name!r})\n" for kind, name in methods)
        found |= {"test": row["test"] + UNITTEST + check, "together": True}
    return found


def is_code(text):
    for tail in ("", "\n    pass"):
        try:
            return any(isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
                       for node in ast.parse(text + tail).body)
        except SyntaxError:
            pass
    return False


def methods_of(source):
    """(class, method) of each of unittest's tests in a source without `check`."""
    tree = ast.parse(source).body
    if any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree):
        return []
    cases = [node for node in tree if isinstance(node, ast.ClassDef)
             and any(ast.unparse(base).endswith("TestCase") for base in node.bases)]
    return [(case.name, node.name) for case in cases for node in case.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]


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
    known = set(vars(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            known.add(node.asname or node.name)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    names = [node.func.id for test in [*asserts, tree] for node in ast.walk(test)
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    if not names:
        raise ValueError("test_list calls no function")
    return next((name for name in names if name not in known), names[0])


def from_input_output(row):
    """`input_output`, as in APPS and TACO: JSON of inputs, outputs and perhaps fn_name."""
    cases = row["input_output"]
    return from_columns(json.loads(cases) if isinstance(cases, str) else cases)


def from_columns(row):
    """`inputs` and `outputs`: lists of equal length; with `fn_name` the arguments of calls, else
    stdin and stdout."""
    inputs, outputs = row["inputs"], row.get("outputs")
    lists = isinstance(inputs, list) and isinstance(outputs, list)
    if not lists or len(inputs) != len(outputs) or not inputs:
        raise ValueError("inputs and outputs must be lists of equal length, not empty")
    if row.get("fn_name"):
        return calls(row["fn_name"], SUPPLIED, [
            f"plain(candidate(*{[int_keys(value) for value in given]!r})) in {right_ones(wanted)!r}"
            for given, wanted in zip(inputs, outputs)])
    return script(SUPPLIED, "same_words", map(lines, inputs), map(lines, outputs))


def int_keys(value):
    """A dict whose keys were integers before it was JSON."""
    try:
        return {int(key): item for key, item in value.items()}
    except (AttributeError, ValueError):
        return value


def right_ones(wanted):
    """The values that are right: APPS writes most results as a list of one item."""
    wanted = json.loads(json.dumps(wanted))
    return [wanted, *wanted] if isinstance(wanted, list) and len(wanted) == 1 else [wanted]


def lines(text):
    return text if isinstance(text, str) else "\n".join(map(str, text))


def from_live_code_bench(row):
    """`public_test_cases`, as in LiveCodeBench: JSON of {input, output, testtype}; private ones are
    packed."""
    cases = unpacked(row["public_test_cases"]) + unpacked(row.get("private_test_cases") or "[]")
    inputs, outputs = ([case[side] for case in cases] for side in ("input", "output"))
    if all(case["testtype"] == "stdin" for case in cases):
        return script(SUPPLIED + LIMITS, "same_lines", inputs, outputs)
    metadata = row.get("metadata") or "{}"
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    if not name:
        raise ValueError("functional tests need a func_name in metadata")
    arguments = [[json.loads(line) for line in text.split("\n") if line.strip()] for text in inputs]
    return calls(name, SUPPLIED + LIMITS, [f"listed(candidate(*{given!r})) == {json.loads(wanted)!r}"
                                           for given, wanted in zip(arguments, outputs)])


class TextOnly(pickle.Unpickler):
    """Reads a pickle of a string, and nothing that could run code."""

    def find_class(self, module, name):
        raise ValueError("private_test_cases hold more than text")


def unpacked(cases):
    """A list of test cases: as such, as JSON, or as LiveCodeBench packs the private ones."""
    if not isinstance(cases, str):
        return cases
    if not cases.lstrip().startswith("["):
        cases = TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(cases)))).load()
    return json.loads(cases)


# ---- the source of tests ----

def source(preamble, entry_point, asserts):
    test = COMPARE + "\ndef check(candidate):\n" + "".join(f"    assert {text}\n" for text in asserts)
    return {"preamble": preamble, "test": test, "entry_point": entry_point}


def script(preamble, same, inputs, outputs):
    """A whole program reads stdin and prints."""
    return source(preamble, "__main__", [
        f"{same}(candidate({given!r}), {wanted!r})" for given, wanted in zip(inputs, outputs)])


def calls(name, preamble, asserts):
    """A function, or a method of `Solution`."""
    entry = f"(Solution().{name} if hasattr(globals().get('Solution'), {name!r}) else {name})"
    return source(preamble, entry, asserts)


FORMATS = {  # the column that tells a format: how it is converted, which block of an answer is the program
    "test_list": (from_asserts, "first"),                 # MBPP, MBPP+
    "test": (from_check, "first"),                        # LeetCodeDataset, HumanEval, BigCodeBench
    "input_output": (from_input_output, "first"),         # APPS, TACO
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
