"""The documents: what they show is what happens."""
import contextlib
import doctest
import io
import re
import runpy
import sys

import pytest
import torch

from conftest import ROOT

PATTERNS = ("*.py", "data/*/prepare.py", "examples/online.py", "paper/*.py", "tests/bench*.py",
            "tests/kills.py")


def test_the_derivation_prints_the_numbers_that_it_states():
    try:
        failed, tried = doctest.testfile(str(ROOT / "docs/derivation.md"), module_relative=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert failed == 0 and tried > 30


def scripts():
    """The programs of the project: what reads a command line."""
    found = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
    return [path for path in found if path.name == "prepare.py" or "parser.parse_args(" in path.read_text()]


def help_page(path, monkeypatch):
    """What `python PATH --help` prints; runs in this process, as one start of Python for all."""
    printed = io.StringIO()
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.syspath_prepend(path.parent)
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert not end.value.code, path
    return printed.getvalue()


def test_every_flag_that_the_documents_name_exists_and_help_fits_100_columns(monkeypatch):
    known = {"--index", "--wrap", "--nproc_per_node", "--standalone", "--nodes", "--gpus",
             "--help"}  # of others
    assert len(scripts()) >= 15
    for path in scripts():
        page = help_page(path, monkeypatch)
        options = page[page.index("options:"):] if "options:" in page else page
        assert max(map(len, options.splitlines())) <= 100, path
        known |= set(re.findall(r"--[a-z_]+", page))
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        unknown = set(re.findall(r"(?<![\w-])--[a-z_]+", document.read_text())) - known
        assert not unknown, document


def test_every_file_that_the_documents_link_to_exists():
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            assert "://" in link or (document.parent / link).exists(), f"{document}: {link}"
