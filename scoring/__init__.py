"""The kinds of reward of score.py that are more than a few lines."""
