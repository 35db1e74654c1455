"""Magpie-Air: 100,000 synthetic instructions, each with a preferred and a rejected answer (arXiv 2406.08464).

Reads Magpie-Align/Magpie-Air-DPO-100K-v0.1 from the hub, or local files with its `chosen` and `rejected`.
Writes train.jsonl and test.jsonl beside this script: rows with prompt, chosen and rejected as chat messages.
As in the paper, a row is kept if both answers have at most 2048 tokens of the reward model. The paper kept
97,812 of 98,000 training rows and 1,992 of 2,000 test rows.

    python data/magpie_air/prepare.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source  # noqa: E402

HUB = "Magpie-Align/Magpie-Air-DPO-100K-v0.1", None

args = source.parse_arguments(__doc__, Path(__file__).parent, tokenizer="RLHFlow/ArmoRM-Llama3-8B-v0.1")
count_tokens = source.token_counter(args.tokenizer)
for name in "train", "test":
    table = source.load(args.source, ("chosen", "rejected"), HUB, split=name)
    source.write(args.out / f"{name}.jsonl", source.pairs(table, count_tokens))
