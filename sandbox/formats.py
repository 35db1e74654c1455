"""Test formats: from the columns of known data sets to what the sandbox runs: preamble, test,
entry_point, solution.

In: a row of one of the formats in formats.md. Out: a dict of four strings; `solution`
(the row's own, which shows whether its tests can be passed at all) may be None. ValueError, with a
reason, for a row of no known format.

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

# What the programs of contests may use without importing it, as in the benchmarks themselves.
IMPORTS = """
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator
import random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, log, sqrt
from typing import *
"""
COMPARE = """
from decimal import Decimal, InvalidOperation
inf, nan = float("inf"), float("nan")

def same_output(printed, expected, tolerance):
    # by lines without blank ones, in each by what stands between spaces; numbers by value
    printed, expected = (
        [line.split() for line in text.split("\\n") if line.strip()] for text in (printed, expected)
    )
    if [len(line) for line in printed] != [len(line) for line in expected]:
        return False
    pairs = zip([word for line in printed for word in line], [word for line in expected for word in line])
    return all(a == b or same_number(a, b, tolerance) for a, b in pairs)

def same_number(a, b, tolerance):
    try:
        a, b = Decimal(a), Decimal(b)
        margin = Decimal("1e-8") + Decimal(tolerance) * abs(b)
        return a == b or tolerance > 0 and b % 1 != 0 and abs(a - b) <= margin
    except InvalidOperation:
        return False

def plain(value):
    # as JSON would have it
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value
"""


def normalize(row):
    """What the sandbox needs of a row."""
    for column, convert in FORMATS.items():
        if row.get(column) is not None:
            found = {"preamble": row.get("preamble") or "", "solution": solution_of(row)} | convert(row)
            break
    else:
        raise ValueError(f"has no tests: one of the columns {', '.join(FORMATS)} is needed")
    for name in ("preamble", "test", "entry_point"):
        if not isinstance(found[name], str):
            raise ValueError(f"{name} must be a string")
    return found


def solution_of(row):
    for column in ("canonical_solution", "solution", "code"):
        if isinstance(row.get(column), str):
            return row[column]
    return None


def from_check(row):
    """`test` with `def check(candidate)`, as in HumanEval: its prompt, where that is Python, comes
    first."""
    if not isinstance(row.get("entry_point"), str):
        raise ValueError("has no 'entry_point', which names the function to test")
    prompt = row.get("prompt")
    preamble = prompt if isinstance(prompt, str) and is_code(prompt) else ""
    return {
        "test": row["test"],
        "entry_point": row["entry_point"],
        "preamble": row.get("preamble") or preamble,
    }


def is_code(text):
    for tail in ("", "\n    pass"):
        try:
            return any(isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
                       for node in ast.parse(text + tail).body)
        except SyntaxError:
            pass
    return False


def from_asserts(row):
    """`test_list`, as in MBPP: assert statements that call the function by its name. MBPP+ has a
    `test` of more."""
    before = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    tests = [row["test"]] if isinstance(row.get("test"), str) else row["test_list"]
    source = "\n".join([*before, *tests])
    return {
        "test": source,
        "entry_point": row.get("entry_point") or called("\n".join([*before, *row["test_list"]])),
    }


def called(source):
    """The function that asserts call: the first name called, in an assert if there is one, that
    neither Python nor the source defines."""
    tree = ast.parse(source)
    known = set(vars(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            known.add(node.asname or node.name)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    for node in [inner for test in asserts for inner in ast.walk(test)] + list(ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in known:
            return node.func.id
    raise ValueError("test_list calls no function")


def from_input_output(row):
    """`input_output`, as in APPS and TACO: JSON of inputs, outputs and perhaps fn_name."""
    cases = row["input_output"]
    cases = json.loads(cases) if isinstance(cases, str) else cases
    return from_columns({**row, **cases})


def from_columns(row):
    """`inputs` and `outputs`: lists of equal length; with `fn_name` the arguments of calls, else
    stdin and stdout."""
    inputs, outputs, name = row["inputs"], row.get("outputs"), row.get("fn_name") or row.get("entry_point")
    lists = isinstance(inputs, list) and isinstance(outputs, list)
    if not lists or len(inputs) != len(outputs) or not inputs:
        raise ValueError("inputs and outputs must be lists of equal length, not empty")
    if all(is_design(case, name) for case in inputs):
        return calls_of_methods(inputs, outputs)
    if not name:
        return of_scripts(map(lines, inputs), map(lines, outputs), "1e-5")
    wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
    return calls(name, inputs, [[output, *output] if wrapped else [output] for output in outputs])


def lines(text):
    return text if isinstance(text, str) else "\n".join(map(str, text))


def from_live_code_bench(row):
    """`public_test_cases`, as in LiveCodeBench: JSON of {input, output, testtype}; private ones are
    packed."""
    cases = unpacked(row["public_test_cases"]) + unpacked(row.get("private_test_cases") or "[]")
    inputs, outputs = ([case[side] for case in cases] for side in ("input", "output"))
    if all(case["testtype"] == "stdin" for case in cases):
        return of_scripts(inputs, outputs, "0")
    metadata = row.get("metadata") or "{}"
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    inputs = [[json.loads(line) for line in text.split("\n") if line.strip()] for text in inputs]
    outputs = [json.loads(text) for text in outputs]
    if all(is_design(case, name) for case in inputs):
        return calls_of_methods(inputs, outputs)
    if not name:
        raise ValueError("functional tests need a func_name in metadata")
    return calls(name, inputs, [[output] for output in outputs])


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

def source(asserts):
    return COMPARE + "\ndef check(candidate):\n" + "".join(f"    assert {text}\n" for text in asserts)


def of_scripts(inputs, outputs, tolerance):
    """A whole program reads stdin and prints."""
    asserts = [
        f"same_output(candidate({given!r}), {wanted!r}, {tolerance})"
        for given, wanted in zip(inputs, outputs)
    ]
    return {"preamble": IMPORTS, "test": source(asserts), "entry_point": "__main__"}


def calls(name, inputs, outputs):
    """A function, or a method of `Solution`; each output is a list of values of which one is right."""
    asserts = [
        f"plain(candidate(*{given!r})) in {[*map(as_json, wanted)]!r}"
        for given, wanted in zip(inputs, outputs)
    ]
    entry = f"(Solution().{name} if hasattr(globals().get('Solution'), {name!r}) else {name})"
    return {"preamble": IMPORTS, "test": source(asserts), "entry_point": entry}


def as_json(value):
    return json.loads(json.dumps(value))


def is_design(case, name):
    """Whether a case is the names of methods, a class's first, and the arguments of each."""
    if (
        not isinstance(case, list)
        or len(case) != 2
        or not all(isinstance(part, list) and part for part in case)
    ):
        return False
    names, arguments = case
    return (
        len(names) == len(arguments)
        and all(isinstance(text, str) and text.isidentifier() for text in names)
        and all(isinstance(values, list) for values in arguments)
        and name in (None, names[0])
    )


def calls_of_methods(inputs, outputs):
    """A class: an object is made, and its methods called in turn."""
    asserts = [
        f"plain(candidate(*{given!r})) == {as_json(wanted)!r}" for given, wanted in zip(inputs, outputs)
    ]
    name = inputs[0][0][0]
    entry = (
        f"(lambda names, args: (lambda it: "
        f"[None, *(getattr(it, n)(*a) for n, a in zip(names[1:], args[1:]))])"
        f"({name}(*args[0])))"
    )
    return {"preamble": IMPORTS, "test": source(asserts), "entry_point": entry}


FORMATS = {"test_list": from_asserts, "test": from_check,
           "input_output": from_input_output, "inputs": from_columns,
           "public_test_cases": from_live_code_bench}


# ---- the program in an answer ----

# At the start of a line, or after other text if it is marked as Python. No part may take quadratic time.
FENCE = re.compile(r"(?:^([ \t]*)|(?<!`)(?=```+py\w{0,5}[ \t\r]*\n))(```+(?!`)|~~~+(?!~))"
                   r"[ \t]{0,9}\{?\.?([\w+#-]{0,20})(?:[^\n`]*\n|(?= .*```))", re.MULTILINE | re.IGNORECASE)
PYTHON = ("python", "python3", "py", "py3")
BLOCKS = {  # rule: what it means
    "answer": "the first Python block after the last </think>, or else the first that names no language",
    "first": "the first block marked python, as in the paper",
}


def first_block(text, rule="answer"):
    """The program in a model's answer: the first closed block of code that the rule asks for (see
    BLOCKS), or None."""
    if rule == "answer":
        text = text.rpartition("</think>")[2]
        if text.lstrip().startswith("<think>"):  # the answer never came
            return None
    unmarked = None
    position = 0
    while start := FENCE.search(text, position):
        mark = start[2]
        end = re.compile(rf"(?<!{mark[0]}){mark}{mark[0]}*[ \t\r]*$", re.MULTILINE).search(text, start.end())
        if not end:
            break
        block = text[start.end():end.start()]
        if start[1] != "":
            block = textwrap.dedent(block)
        elif "\n" not in block:
            block = block.lstrip(" ")
        if start[3].lower() in PYTHON:
            return block
        if not start[3] and unmarked is None:
            unmarked = block
        position = end.end()
    return unmarked if rule == "answer" else None
