"""UltraFeedback, binarized: 60,000 prompts, each with a preferred and a rejected answer from other models.

Reads HuggingFaceH4/ultrafeedback_binarized (train_prefs, test_prefs) from the hub, or local files with its
`chosen` and `rejected`. Writes train.jsonl and test.jsonl beside this script: rows with prompt, chosen and
rejected as chat messages. As in the paper, a row is kept if both answers have at most 2048 tokens of the
reward model. The paper kept 61,024 of 61,135 training rows and 1,995 of 2,000 test rows.

    python data/ultrafeedback/prepare.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source  # noqa: E402

HUB = "HuggingFaceH4/ultrafeedback_binarized", None

args = source.parse_arguments(__doc__, Path(__file__).parent, tokenizer="RLHFlow/ArmoRM-Llama3-8B-v0.1")
count_tokens = source.token_counter(args.tokenizer)
for name in "train", "test":
    table = source.load(args.source, ("chosen", "rejected"), HUB, split=f"{name}_prefs")
    source.write(args.out / f"{name}.jsonl", source.pairs(table, count_tokens))
