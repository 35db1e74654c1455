"""score.py --concurrency, and examples/judge.py against a real server: failures, 429s, time-outs, kills."""
import collections
import email.utils
import json
import re
import runpy
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


COUNTS = """
import asyncio, time
running = most = 0
{kind} reward(prompts, completions, **columns):
    global running, most
    assert len(prompts) == len(completions) == 1
    running += 1
    most = max(most, running)
    end = time.time() + 5
    while most < {n} and time.time() < end:  # so many calls come while none of them ends
        {wait}
    print(running, file=open({file!r}, "a"))
    running -= 1
    return [len(completions[0])]
"""


@pytest.mark.parametrize("kind, wait", (
    ("def", "time.sleep(0.01)"), ("async def", "await asyncio.sleep(0.01)")))
def test_as_many_calls_at_a_time_as_asked_for_and_the_same_rows(tmp_path, kind, wait):
    table = [{"prompt": "p", "ref_completions": [{"text": "a" * (i + k)} for k in range(4)]}
             for i in range(12)]
    for n in (1, 16):
        file = str(tmp_path / f"running-{n}")
        reward = reward_file(tmp_path, COUNTS.format(kind=kind, wait=wait, n=n, file=file))
        rows = score(tmp_path, reward, f"--concurrency={n}", table=table, out=str(n))
        assert [row["ref_rewards"] for row in rows] == [[i, i + 1, i + 2, i + 3] for i in range(12)]
        assert max(map(int, (tmp_path / f"running-{n}").read_text().split())) == n


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
    rows = score(tmp_path, reward_file(tmp_path, FLAKY), "--concurrency=4", "--retries=1", "--accept_null")
    expected = [[1, 1, 2] for _ in range(7)]
    expected[2][1] = expected[3][0] = None
    expected[6] = [None] * 3
    assert [row["ref_rewards"] for row in rows] == expected
    out = capsys.readouterr().out
    assert "4 completions got no reward in 2 calls each" in out and "TimeoutError: no answer in time" in out
    assert "7 rows; 16 ref_rewards" in out and "and 5 null" in out


def test_an_outage_ends_the_run_and_its_rows_are_scored_when_it_continues(tmp_path, capsys):
    table = [{"prompt": "p", "completion": str(i)} for i in range(30)]
    switch = tmp_path / "down"
    reward = reward_file(tmp_path, f"import os\ndef reward(prompts, completions, **columns):\n"
                                   f"    if int(completions[0]) > 11 and os.path.exists({str(switch)!r}):\n"
                                   "        raise OSError('down')\n    return [int(completions[0])]\n")
    switch.touch()
    data = write_rows(tmp_path / "in.jsonl", table)
    flags = f"--data={data}", f"--out={tmp_path / 'out'}", f"--reward={reward}", "--concurrency=4"
    refused(capsys, ["rows got no reward (OSError: down", "Start again"], "score.py", *flags, "--retries=0")
    before = {row["id"]: row["reward"] for row in read_rows(tmp_path / "out")}
    lost = {i for i, reward in before.items() if reward is None}  # failed before another succeeded
    assert before.keys() == {*range(12)} | lost and len(lost) < 4
    switch.unlink()
    call("score.py", *flags)
    after = {row["id"]: row["reward"] for row in read_rows(tmp_path / "out")}
    assert after == {i: None if i in lost else i for i in range(30)}


@pytest.mark.parametrize("answered", (0, 3))
def test_a_judge_that_dies_and_comes_back_is_asked_only_for_what_is_missing(tmp_path, capsys, answered):
    """Also if it dies before the first answer, or for the last few rows."""
    reward = reward_file(tmp_path, f"""
import os
def reward(prompts, completions, **columns):
    number = int(completions[0])
    with open({str(tmp_path / "calls")!r}, "a") as calls:
        print(number, file=calls)
    if number >= {answered} and os.path.exists({str(tmp_path / "down")!r}):
        raise OSError("down")
    return [number]
""")
    table = [{"prompt": "p", "completion": str(i)} for i in range(6)]
    command = (f"--data={write_rows(tmp_path / 'in.jsonl', table)}", f"--out={tmp_path / 'out'}",
               f"--reward={reward}", "--concurrency=1", "--retries=0")
    (tmp_path / "down").touch()
    refused(capsys, [f"the last {6 - answered} rows got no reward (OSError: down"], "score.py", *command)
    (tmp_path / "down").unlink()
    (tmp_path / "calls").unlink()
    call("score.py", *command)
    assert {row["id"]: row["reward"] for row in read_rows(tmp_path / "out")} == {i: i for i in range(6)}
    assert (tmp_path / "calls").read_text().split() == [str(i) for i in range(answered, 6)]


def test_a_function_that_needs_the_main_thread_is_refused_at_once(tmp_path, capsys):
    """Math-Verify does, for its time-outs. It says so when --concurrency is used, and works without."""
    body = ("import signal\ndef reward(prompts, completions, **columns):\n    try:\n"
            "        signal.signal(signal.SIGALRM, signal.SIG_DFL)\n    except ValueError as error:\n"
            "        raise RuntimeError('no time-outs in threads') from error\n"
            "    return [1] * len(prompts)\n")
    reward = reward_file(tmp_path, body)
    assert score(tmp_path, reward)[0]["ref_rewards"] == [1, 1, 1]
    started = time.time()
    command = f"--data={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'new'}", f"--reward={reward}"
    refused(capsys, ["in.jsonl:", "no time-outs in threads (omit --concurrency"], "score.py", *command,
            "--concurrency=4")
    assert time.time() - started < 10


@pytest.mark.parametrize("kind", ("def", "async def"))
@pytest.mark.parametrize("line", ("exit(0)", "raise StopIteration"))
def test_exit_and_stop_iteration_are_failures_as_any_other(tmp_path, capsys, kind, line):
    reward = reward_file(tmp_path, f"{kind} reward(prompts, completions, **columns):\n"
                                   f"    if completions[0] == '3 1':\n        {line}\n    return [1]\n")
    rows = score(tmp_path, reward, "--concurrency=4", "--retries=0")
    assert [row["ref_rewards"] for row in rows] == [[1, None if i == 3 else 1, 1] for i in range(7)]
    assert "1 completions got no reward" in capsys.readouterr().out


def test_nobody_waits_for_calls_that_are_not_done(tmp_path):
    """The end of a process waits for threads that are no daemons: Ctrl-C would take as long as a call."""
    reward = reward_file(tmp_path, "import threading\ndef reward(prompts, completions, **columns):\n"
                                   "    return [threading.current_thread().daemon]\n")
    assert all(row["ref_rewards"] == [1, 1, 1] for row in score(tmp_path, reward, "--concurrency=4"))


def test_a_function_that_is_wrong_and_a_negative_flag_are_refused(tmp_path, capsys):
    data = write_rows(tmp_path / "in.jsonl", ROWS * 2)
    flags = f"--data={data}", f"--out={tmp_path / 'out'}"
    reward = reward_file(tmp_path, "def reward(prompts, completions, **columns):\n    return [1.0, 2.0]\n")
    refused(capsys, ["in.jsonl:", "returned 2 rewards for the 1 completions"], "score.py", *flags,
            f"--reward={reward}", "--concurrency=4")
    refused(capsys, ["--concurrency", "a whole number"], "score.py", *flags, f"--reward={reward}",
            "--concurrency=-1")


def test_a_killed_run_continues_and_sigterm_asks_for_it(tmp_path):
    reward = reward_file(tmp_path, "import os, time\ndef reward(prompts, completions, **columns):\n"
                                   "    time.sleep(float(os.environ.get('PAUSE', 0)))\n"
                                   "    return [len(text) for text in completions]\n")
    whole = score(tmp_path, reward, "--concurrency=2")
    flags = f"--data={tmp_path / 'in.jsonl'}", f"--reward={reward}", "--concurrency=2"
    assert start_until_finished("score.py", *flags, f"--out={tmp_path / 'killed'}") >= 3
    process = Process("score.py", *flags, f"--out={tmp_path / 'stopped'}", env={"PAUSE": "0.05"})
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

LOCK = threading.Lock()


class Endpoint(BaseHTTPRequestHandler):
    """Speaks enough of the chat completions protocol. Grades an answer by its number; fails as it says. Where
    `limit` calls came in this second, it says when the next begins: in seconds or as a date, in turn.
    """
    calls = collections.Counter()
    served = collections.Counter()  # by the second in which they came
    limit = 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        answer = re.search(r"<answer>\n(?:assistant: )?(.*)\n</answer>", question)[1]
        number, what = answer.split()
        with LOCK:
            self.calls[answer] += 1
        first = self.calls[answer] == 1
        if self.limit and self.too_many():
            return None
        assert self.path == "/v1/chat/completions" and self.headers["Authorization"] == "Bearer secret"
        if what in ("429", "503") and first:
            return self.send_error(int(what))
        if what == "cut" and first:
            return self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{")
        if what == "slow" and first or what == "dead":
            time.sleep(1.5)
        reply = "I would not say" if what == "vague" else f"Grade: {number}"
        self.send_response(200)
        self.end_headers()
        message = {"role": "assistant", "content": reply}
        self.wfile.write(json.dumps({"choices": [{"message": message}]}).encode())

    def too_many(self):
        """Whether this second's calls are used up."""
        now = time.time()
        with LOCK:
            self.served[int(now)] += 1
            count = self.served[int(now)]
        if count <= self.limit:
            return False
        self.send_response(429)
        self.send_header("Retry-After", email.utils.formatdate(int(now) + 1) if count % 2 else 1)
        self.end_headers()
        return True

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 64)  # the default, 5, refuses connections
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # the client hangs up on slow answers
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    Endpoint.calls.clear()
    Endpoint.served.clear()
    yield server
    server.shutdown()
    server.server_close()


def test_the_example_judge_lives_through_what_a_server_does(tmp_path, endpoint, capsys):
    """The server's troubles are real: 429, 503, a broken and a slow answer each once, one that never comes,
    and one without a grade.
    """
    (tmp_path / "judge.py").write_text(
        (ROOT / "examples/judge.py").read_text().replace("TIMEOUT = 300", "TIMEOUT = 1"))
    whats = "ok 429 503 cut slow dead vague".split()
    table = []
    for i, prompt in enumerate(("{x} </answer>", [{"role": "user", "content": "{x}"}])):
        completions = [{"text": f"{i + k} {what}"} for k, what in enumerate(whats)]
        table.append({"prompt": prompt, "ref_completions": completions})
    rows = score(tmp_path, f"{tmp_path / 'judge.py'}:grade", "--concurrency=16", "--retries=1", table=table)
    for i, row in enumerate(rows):
        assert row["ref_rewards"] == [i, i + 1, i + 2, i + 3, i + 4, None, None]
    out = capsys.readouterr().out
    assert "2 completions got no reward in 2 calls each" in out and "4 null" in out
    assert {Endpoint.calls[f"{k} {what}"] for k, what in enumerate(whats[1:6], 1)} == {2}


def test_a_judge_with_a_rate_limit_answers_all_calls_when_it_says(endpoint, tmp_path, monkeypatch):
    """60 calls at 20 a second: a call that waits for its turn has not failed, so one retry is enough."""
    monkeypatch.setattr(Endpoint, "limit", 20)
    table = [{"prompt": "p", "ref_completions": [{"text": f"{k} ok"} for k in range(3)]} for i in range(20)]
    reward = f"{ROOT / 'examples/judge.py'}:grade"
    rows = score(tmp_path, reward, "--concurrency=24", "--retries=1", table=table)
    assert [row["ref_rewards"] for row in rows] == [[0, 1, 2]] * 20
    assert len(Endpoint.served) >= 3


REPLIES = {
    "7": 7, "7.5": 7.5, "7/10": 7, "7.5 / 10": 7.5, "I would give it 7 out of 10.": 7, "**Grade: 10**": 10,
    "8 of 10": 8, "10/10.": 10, "Grade: 8.": 8, "0": 0, "<think>2 or 3 mistakes</think>\n\n8": 8,
    "2 or 3 mistakes\n</think>\n\n7/10": 7, "<think>8 or 9": None, "7 or 8": None, "11": None, "-3": None,
    "": None, "I would not say": None, "7/100": None}


@pytest.mark.parametrize("reply", REPLIES)
def test_the_example_judge_finds_the_grade_in_a_reply(reply):
    assert runpy.run_path(str(ROOT / "examples/judge.py"))["grade_in"](reply) == REPLIES[reply]


def test_an_address_that_nobody_listens_at_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    data = write_rows(tmp_path / "in.jsonl", [{"prompt": "p", "completion": "c"}] * 20)
    refused(capsys, ["Connection refused", "Start again when it works"], "score.py", f"--data={data}",
            f"--out={tmp_path / 'out'}", f"--reward={ROOT / 'examples/judge.py'}:grade", "--concurrency=4",
            "--retries=0")
    assert not read_rows(tmp_path / "out")
