"""score.py --concurrency, and examples/judge.py against a real server: failures, 429s, time-outs, kills."""
import collections
import json
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import ROOT, Process, call, read_rows, refused, start_until_finished, write_rows

ROWS = [{"prompt": f"p{i}", "ref_completions": [{"text": f"{i} {k}"} for k in range(3)]} for i in range(7)]


def score(tmp_path, reward, *more, table=ROWS, out="out"):
    """The rewarded rows, by id."""
    data = write_rows(tmp_path / "in.jsonl", table)
    call("score.py", f"--data={data}", f"--out={tmp_path / out}", f"--reward={reward}", *more)
    return sorted(read_rows(tmp_path / out), key=lambda row: row["id"])


def reward_file(tmp_path, text):
    (tmp_path / "r.py").write_text(text)
    return f"{tmp_path / 'r.py'}:reward"


SLEEPS = {
    "plain": "import time\ndef reward(prompts, completions, **columns):\n    time.sleep(0.1)\n"
             "    return [len(text) for text in completions]\n",
    "async": "import asyncio\nasync def reward(prompts, completions, **columns):\n"
             "    await asyncio.sleep(0.1)\n    return [len(text) for text in completions]\n"}


@pytest.mark.parametrize("kind", SLEEPS)
def test_16_calls_at_a_time_are_many_times_as_fast_and_give_the_same_rows(tmp_path, capsys, kind):
    table = [{"prompt": "p", "ref_completions": [{"text": "a" * (i + k)} for k in range(4)]}
             for i in range(24)]
    reward = reward_file(tmp_path, SLEEPS[kind])
    seconds, found = [], []
    for n in (1, 16):
        started = time.time()
        found.append(score(tmp_path, reward, f"--concurrency={n}", table=table, out=str(n)))
        seconds.append(time.time() - started)
    assert found[0] == found[1] and found[0][23]["ref_rewards"] == [23, 24, 25, 26]
    assert seconds[0] > 9.6 and seconds[1] < seconds[0] / 4  # 15.7 times on a quiet machine
    assert "rewards/s, 0 unknown" in capsys.readouterr().err


def test_no_more_calls_at_a_time_than_asked_for(tmp_path):
    reward = reward_file(tmp_path, """
import asyncio
running = most = 0
async def reward(prompts, completions, **columns):
    global running, most
    assert len(prompts) == len(completions) == 1
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.05)
    running -= 1
    return [most]
""")
    rewards = [r for row in score(tmp_path, reward, "--concurrency=5") for r in row["ref_rewards"]]
    assert max(rewards) == 5


FLAKY = """
import collections
calls = collections.Counter()
def reward(prompts, completions, **columns):
    text = completions[0]
    calls[text] += 1
    if text == "2 1" or text.startswith("6") or calls[text] == 1 and text.endswith("2"):
        raise TimeoutError("no answer in time")
    return [None if text == "3 0" else calls[text]]
"""


def test_failures_are_tried_again_and_then_null_and_counted(tmp_path, capsys):
    """A text that ends in 2 fails once; "2 1" and row 6 always; for "3 0" the function returns None."""
    rows = score(tmp_path, reward_file(tmp_path, FLAKY), "--concurrency=4", "--retries=1")
    expected = [[1, 1, 2] for _ in range(7)]
    expected[2][1] = expected[3][0] = None
    expected[6] = [None] * 3
    assert [row["ref_rewards"] for row in rows] == expected
    out = capsys.readouterr().out
    assert "4 completions got no reward in 2 calls each" in out and "TimeoutError: no answer in time" in out
    assert "16 rewards" in out and "5 unknown (null)" in out


def test_an_outage_ends_the_run_and_its_rows_are_scored_when_it_continues(tmp_path, capsys):
    table = [{"prompt": "p", "completion": str(i)} for i in range(30)]
    switch = tmp_path / "down"
    reward = reward_file(tmp_path, f"import os\ndef reward(prompts, completions, **columns):\n"
                                   f"    if int(completions[0]) > 11 and os.path.exists({str(switch)!r}):\n"
                                   "        raise OSError('down')\n    return [int(completions[0])]\n")
    switch.touch()
    data = write_rows(tmp_path / "in.jsonl", table)
    flags = f"--data={data}", f"--out={tmp_path / 'out'}", f"--reward={reward}", "--concurrency=4"
    refused(capsys, ["rows failed (OSError: down)", "start again"], "score.py", *flags, "--retries=0")
    before = {row["id"]: row["reward"] for row in read_rows(tmp_path / "out")}
    lost = {i for i, reward in before.items() if reward is None}  # failed before another succeeded
    assert before.keys() == {*range(12)} | lost and len(lost) < 4
    switch.unlink()
    call("score.py", *flags)
    after = {row["id"]: row["reward"] for row in read_rows(tmp_path / "out")}
    assert after == {i: None if i in lost else i for i in range(30)}


def test_a_function_that_is_wrong_and_a_negative_flag_are_refused(tmp_path, capsys):
    data = write_rows(tmp_path / "in.jsonl", ROWS * 2)
    flags = f"--data={data}", f"--out={tmp_path / 'out'}"
    reward = reward_file(tmp_path, "def reward(prompts, completions, **columns):\n    return [1.0, 2.0]\n")
    refused(capsys, ["rows failed (ValueError: too many values"], "score.py", *flags, f"--reward={reward}",
            "--concurrency=4", "--retries=0")
    refused(capsys, ["--concurrency and --retries"], "score.py", *flags, f"--reward={reward}",
            "--concurrency=-1")


def test_a_killed_run_continues_and_sigterm_asks_for_it(tmp_path):
    reward = reward_file(tmp_path, SLEEPS["plain"])
    whole = score(tmp_path, reward, "--concurrency=2")
    flags = f"--data={tmp_path / 'in.jsonl'}", f"--reward={reward}", "--concurrency=2"
    assert start_until_finished("score.py", *flags, f"--out={tmp_path / 'killed'}") >= 3
    process = Process("score.py", *flags, f"--out={tmp_path / 'stopped'}")
    deadline = time.time() + 60
    part = tmp_path / "stopped" / "part-00000.jsonl"
    while not (part.exists() and part.stat().st_size) and time.time() < deadline:
        time.sleep(0.01)
    process.send(signal.SIGTERM)
    assert process.wait() == 75 and 0 < len(read_rows(tmp_path / "stopped")) < 7
    call("score.py", *flags, f"--out={tmp_path / 'stopped'}")
    for name in ("killed", "stopped"):
        assert sorted(read_rows(tmp_path / name), key=lambda row: row["id"]) == whole


# ---- a judge over HTTP ----

class Endpoint(BaseHTTPRequestHandler):
    """Speaks enough of the chat completions protocol. Grades an answer by its number; fails as it says."""
    calls = collections.Counter()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        answer = re.search(r"<answer>\n(?:assistant: )?(.*)\n</answer>", question)[1]
        number, what = answer.split()
        with threading.Lock():
            self.calls[answer] += 1
        first = self.calls[answer] == 1
        assert self.path == "/v1/chat/completions" and self.headers["Authorization"] == "Bearer secret"
        if what in ("429", "503") and first:
            return self.send_error(int(what))
        if what == "cut" and first:
            return self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{")
        if what == "slow" and first or what == "dead":
            time.sleep(6)
        reply = "I would not say" if what == "vague" else f"Grade: {number}"
        self.send_response(200)
        self.end_headers()
        message = {"role": "assistant", "content": reply}
        self.wfile.write(json.dumps({"choices": [{"message": message}]}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # the client hangs up on slow answers
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    Endpoint.calls.clear()
    yield server
    server.shutdown()
    server.server_close()


def test_the_example_judge_lives_through_what_a_server_does(tmp_path, endpoint, capsys):
    """The server's troubles are real: 429, 503, a broken and a slow answer each once, one that never comes,
    and one without a grade.
    """
    (tmp_path / "judge.py").write_text(
        (ROOT / "examples/judge.py").read_text().replace("TIMEOUT = 60", "TIMEOUT = 4"))
    whats = "ok 429 503 cut slow dead vague".split()
    table = []
    for i, prompt in enumerate(("{x} </answer>", [{"role": "user", "content": "{x}"}])):
        completions = [{"text": f"{i + k} {what}"} for k, what in enumerate(whats)]
        table.append({"prompt": prompt, "ref_completions": completions})
    rows = score(tmp_path, f"{tmp_path / 'judge.py'}:grade", "--concurrency=16", "--retries=1", table=table)
    for i, row in enumerate(rows):
        assert row["ref_rewards"] == [i, i + 1, i + 2, i + 3, i + 4, None, None]
    out = capsys.readouterr().out
    assert "2 completions got no reward in 2 calls each" in out and "4 unknown" in out
    assert {Endpoint.calls[f"{k} {what}"] for k, what in enumerate(whats[1:6], 1)} == {2}


def test_an_address_that_nobody_listens_at_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    data = write_rows(tmp_path / "in.jsonl", [{"prompt": "p", "completion": "c"}] * 20)
    refused(capsys, ["Connection refused", "see to the judge"], "score.py", f"--data={data}",
            f"--out={tmp_path / 'out'}", f"--reward={ROOT / 'examples/judge.py'}:grade", "--concurrency=4",
            "--retries=0")
    assert not read_rows(tmp_path / "out")
