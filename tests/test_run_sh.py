"""run.sh, the first command that anybody types: its set-up, and the commands that it runs."""
import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, python

STUB = """#!/bin/sh
# an interpreter that prints its arguments, one a line, and ends train.py with $CODE
printf '%s\\n' "$@"
case "$1" in *train.py) exit ${CODE:-0} ;; esac
"""


def run_sh(*args, at, cwd=None, **env):
    """Run a copy of run.sh that lies in the folder `at` -> (exit code, what it printed)."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    done = subprocess.run(["bash", str(at / "run.sh"), *args], cwd=cwd or at, env=own | env, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


# ---- set-up ----

@pytest.fixture
def clone(tmp_path):
    """A folder with run.sh that installs no packages; train.py is what says that it is the project."""
    for name in "run.sh", "train.py":
        shutil.copy(ROOT / name, tmp_path)
    for name in "requirements.txt", "requirements-dev.txt":
        (tmp_path / name).write_text("")
    return tmp_path


def test_a_python_without_venv_is_named_and_leaves_nothing_behind(clone, tmp_path):
    """As Debian's and Ubuntu's before python3-venv is installed."""
    commands = tmp_path / "bin"
    commands.mkdir()
    python = commands / "python3"
    python.write_text(f"#!/bin/sh\ncase \"$*\" in *ensurepip*) exit 1;; esac\nexec {sys.executable} \"$@\"\n")
    python.chmod(0o755)
    code, printed = run_sh("lint", at=clone, PATH=f"{commands}:{os.environ['PATH']}")
    assert code == 2 and printed.count("\n") == 1 and "apt install python3-venv" in printed
    assert not (clone / ".venv").exists()


@pytest.mark.slow
def test_a_half_made_environment_is_made_whole(clone):
    """Guards the first command after python3-venv was installed: pip starts five times here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    code, printed = run_sh("lint", at=clone)
    assert "installing requirements-dev.txt" in printed and "No module named ruff" in printed, printed
    assert subprocess.run([clone / ".venv/bin/python", "-m", "pip", "--version"]).returncode == 0
    assert "installing" not in run_sh("lint", at=clone)[1]  # not a second time
    (clone / "requirements-dev.txt").write_text("# changed\n")
    assert "installing requirements-dev.txt" in run_sh("lint", at=clone)[1]


# ---- the commands ----

@pytest.fixture
def stub(tmp_path):
    """Flags for run_sh: an interpreter that only prints what it is told to do."""
    path = tmp_path / "stub"
    path.write_text(STUB)
    path.chmod(0o755)
    return {"PYTHON": str(path), "at": ROOT, "cwd": tmp_path}


def test_the_default_run_is_qrpo_as_published(stub):
    """prepare, generate, score, train, generate, score, evaluate."""
    code, printed = run_sh("--seed=3", **stub)
    scripts = [line.rpartition("/")[2] for line in printed.splitlines() if line.endswith(".py")]
    assert code == 0 and scripts == ["prepare.py", *["generate_refs.py", "score.py"] * 2, "train.py",
                                     "generate_refs.py", "score.py", "evaluate.py"]
    assert printed.splitlines().count("--reward=tests") == 3  # without the space before no more flags
    flags = printed.partition("train.py")[2].partition("generate_refs.py")[0].split()
    assert {"--loss=qrpo", "--beta=0.1", "--seed=3", "--resume"} <= set(flags)


def test_flags_keep_their_spaces_and_paths_are_the_callers(stub):
    template = '--template_args={"enable_thinking": false}'
    code, printed = run_sh(**stub, MODEL="m", DATA="my data", REWARD="rewards.py:exact",
                           GENERATE=f"--temperature=0.5 {template} --top_p=0.9", SCORE="--concurrency=16 ")
    lines = printed.splitlines()
    assert code == 0 and lines.count(template) == lines.count("--top_p=0.9") == 3
    assert lines.count("--reward=rewards.py:exact") == lines.count("--concurrency=16") == 3
    assert "--data=my data/train.jsonl" in lines and "--model=m" in lines and "--out=out/qrpo" in lines


def test_a_model_without_data_is_refused(stub):
    code, printed = run_sh(**stub, MODEL="m")
    assert code == 2 and printed == "error: set both MODEL and DATA, or neither\n"


def test_a_stage_that_saved_ends_run_sh_with_its_code(stub):
    code, printed = run_sh(**stub, CODE="75")
    assert code == 75 and "evaluate.py" not in printed


def test_several_nodes_are_refused_before_any_work(stub):
    """`sbatch --gpus=8` may spread over nodes, and ranks are started on one."""
    code, printed = run_sh(**stub, SLURM_JOB_NUM_NODES="2")
    assert code == 2 and printed.count("\n") == 1 and "--nodes=1" in printed
    done = subprocess.run(["bash", ROOT / "paper/pipeline.sh", "refs"], stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHON": "true", "SLURM_JOB_NUM_NODES": "2", "NPROC": "5",
                                            "SLURM_GPUS": "a100:8"})
    assert done.returncode == 2 and "a100:8 GPUs lie unevenly on 2 nodes" in done.stderr


@pytest.mark.slow
def test_minicode_from_nothing_to_a_better_model(tmp_path):
    """Guards the README's first command, with a smaller minicode in a folder of the caller's: the pass rate
    rises, and the objective ends between the reference model's and its bound.
    """
    python("data/minicode/prepare.py", f"--out={tmp_path}/mine", "--steps=400")
    code, printed = run_sh("--learning_rate=3e-4", "--batch_size=64", at=ROOT, cwd=tmp_path,
                           MODEL="mine/model", DATA="mine", PYTHON=sys.executable,
                           GENERATE="--num_refs=8 --max_new_tokens=48")
    assert code == 0, printed[-3000:]
    results = json.loads((tmp_path / "out/qrpo/results.json").read_text())
    gain, error = results["mean reward"]["difference"]
    assert gain > 0.02 and gain > 3 * error
    objective = {column: mean for column, (mean, _) in results["objective"].items()}
    assert objective["reference"] < objective["policy"] < objective["optimum"]
    for picture in ("curves", "results", "optimum"):
        assert (tmp_path / f"out/qrpo/{picture}.png").stat().st_size > 10_000
