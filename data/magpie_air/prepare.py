"""Magpie-Air: 100,000 synthetic instructions, each with a preferred and a rejected answer (arXiv 2406.08464).

Reads Magpie-Align/Magpie-Air-DPO-100K-v0.1 from the hub, or local files with its `chosen` and `rejected`. Writes
train.jsonl and test.jsonl beside this script: rows with prompt, chosen and rejected as chat messages. As in the paper,
a row is kept if both its answers have at most 2048 tokens of the reward model; the paper states 98,000 rows to train on
and 2,000 to test, of which it kept 97,812 and 1,992.

    python data/magpie_air/prepare.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source  # noqa: E402

args = source.arguments(__doc__, Path(__file__).parent, tokenizer="RLHFlow/ArmoRM-Llama3-8B-v0.1")
tokens = source.counter(args.tokenizer)
for name in "train", "test":
    table = source.load("Magpie-Align/Magpie-Air-DPO-100K-v0.1", name, name, args.source, ("chosen", "rejected"))
    source.write(args.out / f"{name}.jsonl", source.pairs(table, tokens))
