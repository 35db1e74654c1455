"""A reward for GSM8K: is the final number right? The column `answer` has the right one; prepare.py writes it.

    python score.py --data=out/refs --out=out/rewarded --reward=data/gsm8k/reward.py:correct
"""
import re


def final_number(text):
    """The number after the first "####", or without that mark the last number; None if there is none."""
    _, mark, tail = text.partition("####")
    found = re.findall(r"(?:(?<![\d)])-)?\d[\d,]*(?:\.\d+)?", tail if mark else text)
    return float(found[0 if mark else -1].replace(",", "")) if found else None


def correct(prompts, completions, answer, **columns):
    """1.0 where the final number of a completion (a text or chat messages) is its answer, else 0.0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(right is not None and final_number(text) == right) for text, right in zip(texts, answer)]
