"""The reference data that the paper's authors released: for each prompt a chosen and a rejected answer, 50
completions of the reference model, and the rewards of all. With them, training needs no sampling.

Reads a dataset of huggingface.co/collections/skandermoalla/qrpo-reference-datasets by its name, or local
files with its columns. Writes train.jsonl and test.jsonl to --out, which train.py takes as they are. They
have no token ids (rows say `from_text`), so train.py tokenises what it trains on.

    python data/qrpo_reference/prepare.py --source=NAME --out=out/reference
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source  # noqa: E402
from source import rows  # noqa: E402

COLUMNS = "chosen", "rejected", "chosen_rewards", "rejected_rewards", "ref_completions", "ref_rewards"


def convert(table, name):
    """The project's rows, or why one is dropped. name: of the dataset."""
    made_by = {"model": name, "temperature": 1.0, "top_p": 1.0, "from_text": True}
    for i, raw in enumerate(table):
        at = raw["__at__"]
        for column in "chosen", "rejected", "ref_completions":
            if not source.is_conversation(raw[column]):
                rows.fail(f"{at}: {column} must be a list of {{role, content}} messages; fix the row")
        *prompt, chosen = raw["chosen"]
        *asked, answers = raw["ref_completions"]
        try:
            texts = json.loads(answers["content"])
        except ValueError as error:
            rows.fail(f"{at}: the last message of ref_completions is not JSON ({error}); fix the row")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            rows.fail(f"{at}: the last message of ref_completions must be a list of texts; fix the row")
        if not isinstance(raw["ref_rewards"], list) or len(raw["ref_rewards"]) != len(texts):
            rows.fail(f"{at}: has {len(texts)} ref_completions, and needs as many ref_rewards; fix the row")
        if [m["content"] for m in asked] != [m["content"] for m in prompt]:
            yield "references to another prompt"
            continue
        yield {
            "id": i, "prompt": prompt, "chosen": [chosen], "rejected": raw["rejected"][-1:],
            "chosen_reward": raw["chosen_rewards"], "rejected_reward": raw["rejected_rewards"],
            "ref_completions": [{"text": text} for text in texts], "ref_rewards": raw["ref_rewards"],
            "made_by": {"ref_completions": made_by},
        }


args = source.parse_arguments(__doc__, Path(__file__).parent)
if not args.source:
    rows.fail("--source is missing; give the name of one of the authors' datasets, or files of its columns")
local = args.source if Path(args.source).exists() else None
for split in "train", "test":
    table = source.load(local, COLUMNS, (args.source, None), split)
    source.write(args.out / f"{split}.jsonl", convert(table, Path(args.source).name))
