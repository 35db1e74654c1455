"""Mutants of real solutions: one operator or constant changed. Where a plain run fails, the sandbox gives no full marks.

    pytest tests/test_mutants.py
"""
# ruff: noqa: E501
import ast
import os
import random
import signal

import pytest
from test_sandbox import LEETCODE, dataset, verdicts, works

pytestmark = pytest.mark.skipif(not works(), reason="no sandbox runtime works on this machine")
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
         ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
         ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.Div: ast.Mult}


def changes(tree):
    """(node, name of its attribute, another value): an operator, or a whole number."""
    for node in ast.walk(tree):
        if type(getattr(node, "op", None)) in SWAPS:
            yield node, "op", SWAPS[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]]
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node, "value", node.value + 1


def mutants(source, most, rng):
    """Versions of a source with one change each."""
    tree = ast.parse(source)
    found = list(changes(tree))
    for node, name, value in rng.sample(found, min(most, len(found))):
        before = getattr(node, name)
        setattr(node, name, value)
        yield ast.unparse(tree)
        setattr(node, name, before)


def fails_plainly(row):
    """Whether a plain run of program and tests fails within a second; None if it takes longer."""
    child = os.fork()
    if child == 0:
        signal.alarm(1)
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            space = {"__name__": "solution"}
            exec(row["preamble"] + "\n" + row["completion"] + "\n" + row["test"], space)
            space["check"](eval(row["entry_point"], space))
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status) == 1


@pytest.mark.parametrize("path, column", [(LEETCODE, "completion"), ("humaneval/HumanEval.jsonl.gz", "canonical_solution")])
def test_no_mutant_gets_full_marks(path, column):
    rng, rows, expected = random.Random(0), [], {}
    solutions = dataset(path, column)
    rng.shuffle(solutions)
    for row in solutions[:20]:
        if row["completion"].startswith(" "):  # it goes on in the preamble
            row |= {"completion": row["preamble"] + row["completion"], "preamble": ""}
        for number, text in enumerate(mutants(row["completion"], 4, rng)):
            mutant = {**row, "id": (row["id"], number), "completion": text}
            failed = fails_plainly(mutant)
            if failed is not None:
                rows.append(mutant)
                expected[mutant["id"]] = failed
    got = verdicts(rows, test_cpu=6.0, cpu=20.0)
    assert [v for v in got.values() if expected[v["id"]] and v["reward"] == 1] == []
    assert [v for v in got.values() if not expected[v["id"]] and v["reward"] != 1] == []
    assert sum(expected.values()) >= 20
