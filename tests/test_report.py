"""report.html in a real browser: a heading sorts the prompts, hostile completions stay text, and nothing is
loaded. Needs chromium, and skips where it is missing.
"""
import json
import os
import select
import shutil
import subprocess
import time

import pytest

from conftest import call, read_rows, write_rows

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
DEADLINE = 120  # seconds that anything here may take

HOSTILE = ("</pre></div><script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">"
           "<img src='http://127.0.0.1:9/leak'><b class=hostile>\"quoted\" & 'so' on\ud83d")


class Browser:
    """A page in headless chromium, driven over the pipes of its DevTools protocol."""

    def __init__(self, folder):
        to_browser, self.out = os.pipe()
        self.into, from_browser = os.pipe()
        os.set_inheritable(to_browser, True)
        os.set_inheritable(from_browser, True)
        start = f"exec {CHROMIUM} --headless --no-sandbox --window-size=1200,1400 --remote-debugging-pipe " \
                f"--user-data-dir={folder} 3<&{to_browser} 4>&{from_browser} >{folder}.log 2>&1"
        self.process = subprocess.Popen(["bash", "-c", start], pass_fds=(to_browser, from_browser),
                                        start_new_session=True)
        os.close(to_browser)
        os.close(from_browser)
        self.left, self.count, self.events, self.session = b"", 0, [], None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self("Network.enable")
        self("Page.enable")

    def __call__(self, method, **params):
        """The result of a command."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        answer = self.wait(lambda answer: answer.get("id") == self.count)
        assert "result" in answer, answer
        return answer["result"]

    def wait(self, wanted):
        """The first message that is wanted; keeps the others as events."""
        end = time.monotonic() + DEADLINE
        while True:
            while b"\0" not in self.left:
                ready, _, _ = select.select([self.into], [], [], max(0, end - time.monotonic()))
                data = os.read(self.into, 1 << 20) if ready else b""
                assert data, "chromium does not answer"
                self.left += data
            message, self.left = self.left.split(b"\0", 1)
            message = json.loads(message)
            if wanted(message):
                return message
            self.events.append(message)

    def open(self, path):
        self("Page.navigate", url=path.as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.wait(lambda message: message.get("method") == "Page.loadEventFired")

    def get(self, expression):
        """The value of a JavaScript expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector):
        """A press of the mouse, where the element is."""
        box = self.get(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center"}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def close(self):
        os.close(self.out)  # chromium ends when its pipe does
        os.close(self.into)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait(10)


@pytest.fixture(scope="module")
def page(tiny, rewarded, tmp_path_factory):
    """(a browser with the report of 12 rows, with a second opinion, the rows)."""
    folder = tmp_path_factory.mktemp("report")
    table = read_rows(rewarded)[:12]
    for i, row in enumerate(table):
        row["samples"] = row["ref_completions"][1:3]
        row["sample_rewards"] = [(7 * i) % 12 / 4, 1.0]
        row["ref_rewards_judge"], row["sample_rewards_judge"] = [1.0] * 4, [i * 2.0, None]
        del row["made_by"]
    table[4]["id"] = "<i>four</i>"
    table[4]["samples"] = [{**table[4]["samples"][0]}, {**table[4]["samples"][1], "text": HOSTILE}]
    table[5]["sample_rewards"] = [None, None]
    data = write_rows(folder / "rows.jsonl", table)
    call("evaluate.py", f"--model={tiny}", f"--ref_model={tiny}", f"--data={data}", f"--out={folder / 'out'}",
         "--beta=0.1")
    browser = Browser(folder / "profile")
    try:
        browser.open(folder / "out" / "report.html")
        yield browser, table
    finally:
        browser.close()


def column(browser, i):
    """The numbers of a column from top to bottom; None: NaN."""
    return browser.get(f"[...document.querySelectorAll('#prompts tbody')].map("
                       f"body => parseFloat(body.rows[0].cells[{i}].dataset.value))")


def test_a_click_on_a_heading_sorts_the_prompts(page):
    browser, table = page
    headings = browser.get("[...document.querySelectorAll('#prompts th')].map(th => th.innerText)")
    assert headings[:7] == ["row", "reference", "policy", "gain", "reference by judge", "policy by judge",
                            "gain by judge"]
    assert column(browser, 0) == list(range(12))
    known = [(7 * i % 12 / 4 + 1) / 2 for i in range(12) if i != 5]
    browser.click("#prompts th:nth-child(3) button")
    assert column(browser, 2)[:-1] == sorted(known, reverse=True) and column(browser, 0)[-1] == 5
    browser.click("#prompts th:nth-child(3) button")
    assert column(browser, 2)[:-1] == sorted(known) and column(browser, 0)[-1] == 5
    assert browser.get("document.querySelector('#prompts th:nth-child(3)').ariaSort") == "ascending"
    browser.click("#prompts th:nth-child(6) button")
    assert column(browser, 5) == [2.0 * i for i in reversed(range(12))]
    # the completions move with their prompt
    first = browser.get("document.querySelector('#prompts tbody').innerText")
    assert first.splitlines()[0].split("\t")[0] == str(table[11]["id"])
    browser.click("#prompts th:nth-child(1) button")
    browser.click("#prompts th:nth-child(1) button")
    assert column(browser, 0) == list(range(12))


def test_completions_are_shown_as_text_with_rewards_and_log_ratios(page):
    browser, table = page
    browser.click("#prompts tbody:nth-of-type(3) summary")
    shown = browser.get("document.querySelector('#prompts tbody:nth-of-type(3) .models').innerText")
    for row, k, field in ((table[2], 3, "ref_completions"), (table[2], 0, "samples")):
        assert f"{len(row[field][k]['token_ids'])} tokens" in shown
    assert f"reward {table[2]['sample_rewards'][0]:g}, reward by judge 4, log-ratio 0.000" in shown
    assert "reward 1, reward by judge unknown, log-ratio" in shown
    texts = browser.get("[...document.querySelectorAll('#prompts tbody:nth-of-type(5) .models pre')]"
                        ".map(pre => pre.textContent)")
    assert texts[-1] == HOSTILE.replace("\ud83d", "\\ud83d") and len(texts) == 6
    assert browser.get("document.querySelectorAll('#prompts td')[0].textContent") == str(table[0]["id"])


def test_nothing_in_a_completion_runs_and_nothing_is_loaded(page):
    browser, _ = page
    assert browser.get("document.title").startswith("/")  # a hostile script would have changed it
    assert browser.get("document.querySelectorAll('script, .hostile, #prompts i, #prompts img').length") == 1
    assert browser.get("[...document.images].every(image => image.naturalWidth > 0)")
    assert browser.get("document.images.length") == 3  # the pictures
    sent = [event["params"]["request"]["url"] for event in browser.events
            if event.get("method") == "Network.requestWillBeSent"]
    assert [url for url in sent if not url.startswith("data:")] == [browser.get("location.href")]


def test_not_even_a_script_in_the_page_itself_would_run(page):
    browser, _ = page
    browser.get("""(() => {
        const script = document.createElement("script");
        script.textContent = "document.title = 'ran'";
        document.body.append(script);
    })()""")
    assert browser.get("document.title") != "ran"
