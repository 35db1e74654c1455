"""Two rewards for data/sentences: sentiment is smooth, two_sentences has three levels and so many ties.

    python score.py --data=out/refs --out=out/rewarded --reward=data/sentences/reward.py:sentiment
"""
import re


def texts(completions):
    return [c if isinstance(c, str) else c[-1]["content"] for c in completions]


def sentiment(prompts, completions, **columns):
    """VADER's compound score, between -1 and 1: pip install vaderSentiment."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts(completions)]


def two_sentences(prompts, completions, **columns):
    """Half a point for two sentences, and half for a last sentence that ends."""
    rewards = []
    for text in texts(completions):
        ends = re.findall(r"[.!?]+(?=\s|$)", text)
        finished = bool(re.search(r"[.!?]\s*$", text))
        rewards.append(((len(ends) == 2) + finished) / 2)
    return rewards
