"""report.html in a real browser: what it shows, on a desktop and a phone; hostile completions stay text, and
nothing is loaded. Needs chromium, and skips where it is missing.
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
LONG = "first" + "\n" * 20 + "last"


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
    """(a browser with the report of 12 rows, these rows)."""
    folder = tmp_path_factory.mktemp("report")
    table = read_rows(rewarded)[:12]
    for i, row in enumerate(table):
        row["id"] = f"task/{i}"
        row["samples"] = [dict(completion) for completion in row["ref_completions"][1:3]]
        row["samples"][0]["finish_reason"], row["samples"][1]["finish_reason"] = "stop", "length"
        row["sample_rewards"] = [(7 * i) % 12 / 4, 1.0]
        row["ref_rewards_judge"], row["sample_rewards_judge"] = [1.0] * 4, [i * 2.0, None]
        del row["made_by"]
    table[4]["id"] = "task/4<i>four</i>"
    table[4]["samples"][1]["text"] = HOSTILE
    table[5]["sample_rewards"] = [None, None]
    table[6]["prompt"] = LONG
    data = write_rows(folder / "rows.jsonl", table)
    config = {"beta": 0.1, "transform": "identity", "learning_rate": 0.00012345, "template_args": {}}
    with open(folder / "run.json", "w") as file:
        json.dump({"config": config | {"has_targets": True}, "command": "train.py --hostile=</td><i>"}, file)
    checkpoint = folder / "checkpoints" / "step_000040"
    checkpoint.parent.mkdir()
    checkpoint.symlink_to(tiny)
    call("evaluate.py", f"--model={checkpoint}", f"--ref_model={tiny}", f"--data={data}",
         f"--out={folder / 'out'}")
    browser = Browser(folder / "profile")
    try:
        browser.open(folder / "out" / "report.html")
        yield browser, table
    finally:
        browser.close()


def article(i):
    """JavaScript for the i-th row of the data."""
    return f"document.querySelector('article[data-place=\"{-i}\"]')"


def shown(browser, name):
    """The numbers of the prompts from top to bottom, by which the buttons sort; None: NaN."""
    return browser.get(f"[...document.querySelectorAll('article')].map("
                       f"article => parseFloat(article.dataset.{name}))")


IDS = "[...document.querySelectorAll('article summary small:first-child')].map(id => id.textContent)"


def test_the_largest_gain_is_open_and_a_click_sorts_the_prompts(page):
    browser, table = page
    gains = [gain for gain in shown(browser, "gain") if gain is not None]
    assert len(gains) == 11 and gains == sorted(gains, reverse=True)
    assert browser.get("[...document.querySelectorAll('details')].map(d => d.open)") == [True] + [False] * 11
    browser.click("#orders button[data-by=gain]")  # turns it round
    assert [gain for gain in shown(browser, "gain") if gain is not None] == gains[::-1]
    known = [(7 * i % 12 / 4 + 1) / 2 for i in range(12) if i != 5]
    button = "#orders button[data-by=policy]"
    browser.click(button)
    assert shown(browser, "policy")[:-1] == sorted(known, reverse=True)
    assert browser.get(IDS)[-1] == "task/5"  # unknown, so at the end
    browser.click(button)
    assert shown(browser, "policy")[:-1] == sorted(known) and browser.get(IDS)[-1] == "task/5"
    assert browser.get(f"document.querySelector('{button}').ariaPressed") == "true"
    assert browser.get("document.querySelectorAll('#orders [aria-pressed=true]').length") == 1
    browser.click("#orders button[data-by=place]")
    assert browser.get(IDS) == [row["id"] for row in table]


def test_a_prompt_is_whole_and_above_its_numbers_and_completions_before_pictures(page):
    browser, table = page
    assert browser.get(f"{article(6)}.querySelector('.prompt').textContent").strip() == LONG
    text = browser.get(f"{article(2)}.textContent")
    prompt, completion = text.index(table[2]["prompt"]), text.index(table[2]["samples"][0]["text"])
    assert prompt < text.index("mean reward") < completion
    parts = browser.get("[...document.querySelectorAll('h2')].map(heading => heading.id)")
    assert parts == ["numbers", "completions", "pictures", "settings"]


def test_a_closed_prompt_that_is_cut_ends_in_a_sign_and_opens_whole(page):
    browser, _ = page
    prompt = f"{article(6)}.querySelector('.prompt')"
    closed = browser.get(f"{prompt}.clientHeight")
    assert browser.get(f"getComputedStyle({prompt}).webkitLineClamp") == "3"
    browser.click('article[data-place="-6"] summary')
    assert browser.get(f"{prompt}.clientHeight") > 5 * closed


def test_completions_are_text_with_rewards_log_ratios_and_a_mark_where_they_were_cut(page):
    browser, table = page
    browser.get(f"{article(2)}.querySelector('details').open = true")
    text = browser.get(f"{article(2)}.querySelector('.models').innerText")
    for field, rewards in (("samples", "sample_rewards"), ("ref_completions", "ref_rewards")):
        for completion, reward in zip(table[2][field], table[2][rewards]):
            log_ratio = ", log-ratio 0" * (field == "samples")
            facts = f"reward {reward:.4g}{log_ratio}, {len(completion['token_ids'])} tokens"
            assert facts in " ".join(text.split())
    marks = [browser.get(f"{article(2)}.querySelectorAll('section')[{i}].querySelectorAll('mark').length")
             for i in range(2)]
    assert marks == [sum(c["finish_reason"] == "length" for c in table[2]["ref_completions"]), 1]
    texts = browser.get(f"[...{article(4)}.querySelectorAll('pre')]"
                        ".map(pre => pre.textContent)")
    assert HOSTILE.replace("\ud83d", "\\ud83d") in texts[4:] and len(texts) == 6


def test_the_page_says_which_run_and_settings_it_shows(page):
    browser, _ = page
    assert browser.get("document.title").endswith("step_000040: before and after training")
    text = browser.get("document.body.innerText")
    assert "0.00012345" in text and "train.py --hostile=</td><i>" in text
    assert time.strftime("%B %Y") in text and "12 prompts" in text
    assert "2 of the policy's rewards are unknown" in text


def test_nothing_leaves_the_screen_of_a_phone(page):
    browser, _ = page
    for width in (360, 1200):
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        browser("Emulation.setDeviceMetricsOverride", **screen)
        beyond = browser.get("[...document.querySelectorAll('body *')].filter(element => "
                             "element.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)")
        assert browser.get("innerWidth") == width and beyond == []
    browser("Emulation.clearDeviceMetricsOverride")


def test_nothing_in_a_completion_runs_and_nothing_is_loaded(page):
    browser, _ = page
    assert browser.get("document.title").startswith("/")  # a hostile script would have changed it
    assert browser.get("document.querySelectorAll('script, .hostile, i, article img').length") == 1
    assert browser.get("[...document.images].every(image => image.naturalWidth > 0)")
    assert browser.get("document.images.length") == 2  # the pictures
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
