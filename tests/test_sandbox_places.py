"""The machines on which the sandbox must work: containers, pods, low limits, odd installations.

    pytest tests/test_sandbox_places.py
"""
import json
import os
import resource
import subprocess
import sys
import tempfile

import pytest
from test_sandbox import HONEST, REPO, row, works

import sandbox
from sandbox import host, runtimes

pytestmark = pytest.mark.skipif(not works(), reason="no sandbox runtime works on this machine")
ROWS = [HONEST, row("wrong", "def f(x):\n    return 0"),
        row("exits", "import os\ndef f(x):\n    os.kill(os.getpid(), 9)\n    os._exit(0)"),
        row("memory", "def f(x):\n    return bytearray(1 << 40)"),
        row("imports", "import asyncio, email.parser, uuid\ndef f(x):\n    return 31 * x + 7")]
REWARDS = {"honest": 1, "wrong": 0, "exits": 0, "memory": 0, "imports": 1}


def judged_there(tmp_path, *restrictions, before=None):
    """What is said, and the rewards, of these rows in such a place, where no runtime is asked for."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    line = [sys.executable, "tests/like_container.py", *restrictions] if restrictions else []
    line += [sys.executable, "-m", "sandbox", f"--data={tmp_path}/data.jsonl", f"--out={tmp_path}/out.jsonl"]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, preexec_fn=before)
    assert done.returncode == 0, done.stderr
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    return done.stderr, {v["id"]: v["reward"] for v in out}


def test_a_container_without_namespaces_gets_landlock_and_is_told_so(tmp_path):
    said, rewards = judged_there(tmp_path, f"--user={os.getuid()}")
    assert rewards == REWARDS and "sandbox: landlock (namespaces: " in said and "sandbox/README.md" in said


def test_root_without_its_rights_gets_user_namespaces(tmp_path):
    said, rewards = judged_there(tmp_path, "--namespaces")
    assert rewards == REWARDS and "sandbox: namespaces\n" in said


def test_hard_limits_lower_than_ours_are_enough(tmp_path):
    def low():
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
        resource.setrlimit(resource.RLIMIT_AS, (900 << 20, 900 << 20))
    assert judged_there(tmp_path, before=low)[1] == REWARDS


@pytest.mark.parametrize("runtime", ["namespaces", "landlock"])
def test_a_package_under_tmp_that_only_its_owner_may_read_is_imported_late(tmp_path, monkeypatch, runtime):
    """As installed by root with umask 077, on scratch space of a node."""
    (tmp_path / "hidden").mkdir(0o700)
    for name, text in (("__init__.py", ""), ("late.py", "seven = 7")):
        (tmp_path / "hidden" / name).write_text(text)
        (tmp_path / "hidden" / name).chmod(0o600)
    monkeypatch.syspath_prepend(tmp_path)
    program = row(1, "def f(x):\n    import hidden.late\n    return 31 * x + hidden.late.seven")
    verdict, = sandbox.judge([program], runtime=runtime, packages="hidden")
    assert verdict["reward"] == 1, verdict


def test_a_misspelt_package_is_an_error():
    with pytest.raises(RuntimeError, match="--packages=nunpy: 'nunpy' is not installed"):
        list(sandbox.judge([HONEST], packages="nunpy"))


def test_podman_never_pulls_and_its_failure_costs_no_time(monkeypatch, tmp_path):
    (tmp_path / "podman").write_text('#!/bin/sh\ncase "$*" in *--pull=never*) exit 125 ;; esac; sleep 200\n')
    (tmp_path / "podman").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="podman: "):
        host.choose("podman", "no/such/image", "")


@pytest.mark.skipif(works() != "namespaces", reason="no namespaces work on this machine")
def test_no_temporary_folder_is_needed_with_namespaces(monkeypatch):
    monkeypatch.setattr(runtimes.tempfile, "gettempdir", lambda: 1 / 0)
    assert [v["reward"] for v in sandbox.judge([HONEST], runtime="namespaces")] == [1]


def test_where_memory_runs_out_workers_go_first(monkeypatch):
    scores, read = [], host.Worker.read

    def look(worker):
        with open(f"/proc/{worker.process.pid}/oom_score_adj") as file:
            scores.append(int(file.read()))
        return read(worker)
    monkeypatch.setattr(host.Worker, "read", look)
    list(sandbox.judge([HONEST], runtime=works()))
    assert 1000 in scores


def test_landlock_leaves_no_folder_behind(monkeypatch):
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    deep = "import os\nfor _ in range(300):\n    os.mkdir('d')\n    os.chdir('d')\ndef f(x): return 0"
    assert len(list(sandbox.judge([HONEST, row("deep", deep)], runtime="landlock"))) == 2
    os.rmdir(folder)  # fails where anything is in it
