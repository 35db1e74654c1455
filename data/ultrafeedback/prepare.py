"""UltraFeedback, binarized: 60,000 prompts, each with a preferred and a rejected answer of other models.

Reads HuggingFaceH4/ultrafeedback_binarized (train_prefs, test_prefs) from the hub, or local files with its `chosen` and
`rejected`. Writes train.jsonl and test.jsonl beside this script: rows with prompt, chosen and rejected as chat
messages. As in the paper, a row is kept if both its answers have at most 2048 tokens of the reward model; the paper
states 61,135 rows to train on and 2,000 to test, of which it kept 61,024 and 1,995.

    python data/ultrafeedback/prepare.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source  # noqa: E402

args = source.arguments(__doc__, Path(__file__).parent, tokenizer="RLHFlow/ArmoRM-Llama3-8B-v0.1")
tokens = source.counter(args.tokenizer)
for name in "train", "test":
    table = source.load("HuggingFaceH4/ultrafeedback_binarized", name, f"{name}_prefs", args.source,
                        ("chosen", "rejected"))
    source.write(args.out / f"{name}.jsonl", source.pairs(table, tokens))
