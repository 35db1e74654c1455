"""What the tests share: a tiny random model, rewarded rows for it, and ways to run a script.

    python -m pytest -q -n 2 tests              # bash run.sh test: minutes
    SLOW=1 python -m pytest -q -n 2 tests       # also those marked slow; each says what it guards
"""
import collections
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import pytest

# One thread for each process: the models are tiny, and the tests run on all cores (pytest -n).
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"  # idle threads sleep
os.environ["HF_HUB_OFFLINE"] = "1"  # no test depends on a network, or waits for one
ROOT = Path(__file__).resolve().parent.parent
MATERIAL = ROOT / "tests/data"  # real data; its README.md names sources and licences
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import tqdm  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

torch.set_num_threads(1)
# tqdm's own lock is shared with forks: one that is killed while it holds it would block this process for ever
tqdm.tqdm.set_lock(threading.RLock())
tqdm.tqdm.monitor_interval = 0  # no thread that could hold it during a fork


# ---- which tests run ----

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long by nature; runs only with SLOW=1 in the environment")


def pytest_runtest_logreport(report):
    """Say at once what failed: a run that is cut off never prints its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-3000:]}", file=sys.stderr, flush=True)


def pytest_terminal_summary(terminalreporter):
    """Say at the end what was skipped, and what it needs."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    for reason, n in collections.Counter(reasons).items():
        terminalreporter.line(f"{n} {reason.replace('Skipped: ', 'skipped: ')}")


def pytest_collection_modifyitems(items):
    gc.freeze()  # all that is imported, which would make each gc.collect() below take 0.1 s
    if os.environ.get("SLOW") == "1":
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; runs with SLOW=1"))


# ---- running a script ----

def call(script, *flags):
    """Run a script in this process, as `python SCRIPT FLAGS` would. Returns its global names, a dict."""
    argv, path, modules = sys.argv, sys.path.copy(), sys.modules.copy()
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    sys.argv = [str(script), *map(str, flags)]
    sys.path.insert(0, str((ROOT / script).parent))
    try:
        return runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.path[:] = argv, path
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for name in set(sys.modules) - set(modules):  # modules of a reward are loaded again
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith((tempfile.gettempdir(), str(ROOT / "data"), str(ROOT / "examples"))):
                del sys.modules[name]
        sys.modules.update(modules)  # a reward has taken the names of this project's
    gc.collect()  # closes the files of the script, which it has locked
    raise SystemExit(code)


class Process:
    """A script in a process of its own: a fork, which has all imports already. before() is called in it."""

    def __init__(self, script, *flags, env=None, before=None):
        self.code = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.environ.update(env or {})
            if before:
                before()
            call(script, *flags)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds=400):
        """The exit code; negative: the signal that ended it. A process that hangs is aborted, and says where.
        """
        deadline = time.monotonic() + seconds
        while self.running():
            time.sleep(0.005)
            if time.monotonic() > deadline:
                self.send(signal.SIGABRT)
                deadline = float("inf")
        return self.code

    def send(self, signum):
        os.kill(self.pid, signum)

    def kill(self):
        self.send(signal.SIGKILL)
        return self.wait()


def start_ranks(world, script, *flags, before=None):
    """A script in `world` processes that share the work, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(world):
        mine = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(Process(script, *flags, env=mine, before=before))
    return ranks


def die_at_write(n):
    """Kill this process before its n-th write: an appended row, or a file or folder moved into place."""
    import rows
    writes = []

    def counted(function):
        def wrapper(*args):
            writes.append(function)
            if len(writes) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return wrapper
    rows.append = counted(rows.append)
    os.replace = counted(os.replace)


def start_until_finished(script, *flags):
    """Start a script and kill it before its first write; start it again, kill it before its second; and so
    on to its end. Returns how many kills that took.
    """
    kills = 0
    while True:
        code = Process(script, *flags, before=lambda: die_at_write(kills + 1)).wait()
        if code == 0:
            return kills
        assert code == -signal.SIGKILL
        kills += 1


def python(script, *flags):
    """Run a script as a user does; returns the finished process."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run(script, *flags, check=True):
    """As `python`, but in a fork, which has all imports already."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        def before():
            os.chdir(ROOT)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        code = Process(script, *flags, before=before).wait()
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(script, code, out.read(), err.read())
    assert not check or code == 0, done.stderr[-3000:]
    return done


def ends_well(script, *flags):
    """The script ends itself, early, with exit code 0."""
    with pytest.raises(SystemExit) as end:
        call(script, *flags)
    assert not end.value.code


def refused(capsys, says, script, *flags):
    """The script ends with exit code 2 and one line of error, which says all these things."""
    one_line_of_error(capsys, says, lambda: call(script, *flags))


def one_line_of_error(capsys, says, function):
    """The call ends with exit code 2 and one line of error, which says all these things."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        function()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1, lines
    for text in says:
        assert text in lines[0], lines[0]


# ---- rows ----

def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)


def read_rows(path):
    """The rows of a JSONL file, or of a folder of them."""
    files = sorted(Path(path).glob("*.jsonl")) if Path(path).is_dir() else [Path(path)]
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


# ---- a model, and data for it ----

def make_tokenizer(**special):
    """A tokenizer of bytes; its pad token is its end token, as in many released models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = special or {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_tiny(folder, seed=0):
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random 2-layer Llama, 258 tokens, context 64; pad is eos."""
    return make_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def loaded(tiny):
    """The tokenizer and the model of `tiny`. Do not change them."""
    import model
    return model.load_tokenizer(tiny), model.load_model(tiny, torch.float32, torch.device("cpu"))


LETTERS = """
def letters(prompts, completions, **columns):
    return [sum(c.isalpha() for c in text) / (len(text) + 1) for text in completions]
"""


@pytest.fixture(scope="session")
def rewarded(tiny, tmp_path_factory):
    """30 rows with 4 sampled completions each, rewarded by their share of letters."""
    folder = tmp_path_factory.mktemp("data")
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "row " + "x" * (i % 7)} for i in range(30)])
    (folder / "reward.py").write_text(LETTERS)
    call("generate_refs.py", f"--model={tiny}", f"--data={prompts}", f"--out={folder / 'refs'}",
         "--num_refs=4", "--max_new_tokens=20")
    call("score.py", f"--data={folder / 'refs'}", f"--out={folder / 'scored'}",
         f"--reward={folder / 'reward.py'}:letters")
    return folder / "scored"
