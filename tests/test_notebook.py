"""examples/qrpo.ipynb: its cells run in order, with real models, sampling, sandbox and training."""
import json
import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT

SETTINGS = 'PYTHON, OUT = sys.executable, "out/notebook"', "ONLINE_STEPS = 700, 16, 2, 200"
DEADLINE = 800  # seconds; it takes some three minutes


def as_script(out):
    """The code cells as one program, with smaller numbers and another folder; !COMMAND is the shell's."""
    notebook = json.loads((ROOT / "examples/qrpo.ipynb").read_text())
    lines = ["import subprocess"]
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "commit the notebook without outputs"
        source = "".join(cell["source"]).replace("\\\n", "")
        for line in source.splitlines() if cell["cell_type"] == "code" else ():
            if line.startswith("!"):
                line = f"subprocess.run(f{line[1:]!r}, shell=True, check=True)"
            lines.append(line)
    text = "\n".join(lines)
    assert text.count(SETTINGS[0]) == text.count(SETTINGS[1]) == 1
    text = text.replace(SETTINGS[0], f"PYTHON, OUT = sys.executable, {str(out)!r}")
    return text.replace(SETTINGS[1], "ONLINE_STEPS = 300, 6, 1, 10")


def test_the_notebook_is_what_jupyter_reads():
    notebook = json.loads((ROOT / "examples/qrpo.ipynb").read_text())
    ids = [cell["id"] for cell in notebook["cells"]]
    assert notebook["nbformat"] == 4 and len(set(ids)) == len(ids)
    compile(as_script("out"), "qrpo.ipynb", "exec")


@pytest.mark.slow
def test_the_notebook_runs_to_a_better_model(tmp_path):
    """Guards what somebody new does first; nothing else runs these cells."""
    process = subprocess.Popen([sys.executable, "-c", as_script(tmp_path)], cwd=ROOT / "examples", text=True,
                               env=os.environ | {"MPLBACKEND": "Agg"}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try:
        printed, _ = process.communicate(timeout=DEADLINE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed[-3000:]
    results = json.loads((tmp_path / "qrpo_online/results.json").read_text())
    assert results["mean reward"]["difference"][0] > 0.05
    assert "their mean is 1: 1.0" in printed or "their mean is 1: 0.99999" in printed
    assert printed.count("    0.") + printed.count("    1.") >= 10  # completions of both models
