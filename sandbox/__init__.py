"""Run untrusted Python programs against their tests, without root, and say how many tests each one
passes. README.md says what is promised, formats.md which rows are understood.

    python -m sandbox --data=programs.jsonl --out=verdicts.jsonl

The package needs the standard library only, and can be copied alone.
"""
from .formats import BLOCKS, normalize
from .host import FLAGS, WAYS, about, cores, judge, slowest
from .runtimes import PACKAGES, RUNTIMES

__all__ = ["BLOCKS", "FLAGS", "PACKAGES", "RUNTIMES", "WAYS",
           "about", "cores", "judge", "normalize", "slowest"]
