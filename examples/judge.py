"""A judge behind an OpenAI-compatible endpoint as a reward: it grades a completion from 0 to 10.

The endpoint is a provider's, or that of `vllm serve NAME` on your own machine. Edit MODEL and PROMPT in a
copy of this file: with another MODEL or PROMPT it is another reward, and is not mixed with the first.

    export OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=...
    python score.py --data=out/refs --out=out/rewarded --reward=examples/judge.py:grade --concurrency=16
"""
import json
import os
import re
import urllib.request

MODEL = "Qwen/Qwen3-8B"
PROMPT = """Grade the answer to the request from 0 (useless) to 10 (perfect). Reply with the number only.
<request>
{}
</request>
<answer>
{}
</answer>"""
TIMEOUT = 300  # seconds; without one, a call can hang for ever


def ask(question):
    """The judge's reply. What goes wrong (time-outs, 429) is raised: score.py asks again."""
    url = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1") + "/chat/completions"
    body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": question}]}
    headers = {"Content-Type": "application/json",
               "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY')}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
        return json.load(reply)["choices"][0]["message"]["content"] or ""  # null if it only thought


def text_of(chat):
    return chat if isinstance(chat, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in chat)


def grade_in(reply):
    """The one number from 0 to 10 in a reply, after its thoughts (7.5, 7/10, "7 out of 10"); or None."""
    if "<think>" in reply and "</think>" not in reply:  # it ran out of tokens
        return None
    answer = re.sub(r"(/|\bof)\s*10(\.0)?\b", "", reply.rpartition("</think>")[2])
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
    if len(numbers) != 1 or not 0 <= float(numbers[0]) <= 10:
        return None
    return float(numbers[0])


def grade(prompts, completions, **columns):
    """A grade for each completion; None where the judge names none."""
    replies = [ask(PROMPT.format(text_of(p), text_of(c))) for p, c in zip(prompts, completions)]
    return [grade_in(reply) for reply in replies]
