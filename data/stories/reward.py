"""A reward for stories: the number of happy words minus the number of sad words.

    python score.py --data=out/refs --out=out/rewarded --reward=data/stories/reward.py:happy
"""
import re

HAPPY = re.compile(r"\b(excited|fun|glad|happ\w+|hug\w*|joy\w*|laugh\w*|lov\w+|play\w*|proud|smil\w+)\b")
SAD = re.compile(r"\b(afraid|angry|cr(?:y|ied|ying)|hurt|lost|mad|sad|scared)\b")


def happy(prompts, completions, **columns):
    texts = [(c if isinstance(c, str) else c[-1]["content"]).lower() for c in completions]
    return [len(HAPPY.findall(text)) - len(SAD.findall(text)) for text in texts]
