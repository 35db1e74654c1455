"""The documents: what they show is what happens."""
import doctest
import re
import subprocess
import sys

import torch

from conftest import ROOT


def test_the_derivation_prints_the_numbers_that_it_states():
    try:
        failed, tried = doctest.testfile(str(ROOT / "DERIVATION.md"), module_relative=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert failed == 0 and tried > 30


def test_every_flag_that_the_readme_names_exists_and_help_fits_100_columns():
    scripts = [path for pattern in ("*.py", "data/*/prepare.py", "paper/*.py", "tests/bench*.py", "tests/kills.py")
               for path in ROOT.glob(pattern) if "__main__" in path.read_text() or path.name == "prepare.py"]
    known = {"--nproc_per_node", "--standalone", "--gpus"}  # torchrun's and sbatch's
    for path in scripts:
        done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=ROOT,
                              env={"COLUMNS": "100", "PATH": "/usr/bin:/bin"})
        assert done.returncode == 0, done.stderr
        options = done.stdout[done.stdout.index("options:"):] if "options:" in done.stdout else done.stdout
        assert max(map(len, options.splitlines())) <= 100, path
        known |= set(re.findall(r"--[a-z_]+", done.stdout))
    text = (ROOT / "README.md").read_text()
    unknown = set(re.findall(r"(?<![\w-])--[a-z_]+", text)) - known
    assert not unknown
