"""LeetCodeDataset: 2,869 LeetCode problems with about a hundred tests each (arXiv 2504.14655).

Reads newfacade/LeetCodeDataset from the hub, or local files of its columns. Writes train.jsonl and test.jsonl beside
this script: rows with prompt (one chat message), completion (the dataset's own solution, fenced as an answer),
preamble, test, entry_point and difficulty, which `score.py --reward=tests` and the paper's stratified evaluation use.
As in the paper, a row is kept if it has at least 20 tests and prompt and answer have at most 2048 tokens together, and
the prompt says what runs before the answer; the paper states 2,641 rows to train on and 228 to test, of which it kept
2,563 and 223.

    python data/leetcode/prepare.py
    python score.py --data=data/leetcode/test.jsonl --out=out/solutions --reward=tests
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source  # noqa: E402

PROMPT = """{problem}

Write the solution in Python, with this starter code, in one ```python block:
```python
{starter}
```
These imports and helpers run before your answer; import whatever else it needs:
```python
{outline}
```"""
COLUMNS = "task_id", "difficulty", "problem_description", "starter_code", "prompt", "completion", "entry_point", "test"


def problems(table, tokens, min_tests=20, limit=2048):
    """The project's rows, or why one is dropped."""
    for raw in table:
        # what the code before the answer defines: its imports, constants and the heads of its classes and functions
        outline = re.findall(r"^(?:import|from|class|def|\w+ =|    def __init__).*", raw["prompt"], re.MULTILINE)
        prompt = PROMPT.format(problem=raw["problem_description"].strip(), starter=raw["starter_code"].rstrip(),
                               outline="\n".join(outline))
        completion = f"```python\n{raw['completion'].strip()}\n```"
        if len(re.findall(r"^\s*assert\b", raw["test"], re.MULTILINE)) < min_tests:
            yield f"fewer than {min_tests} tests"
        elif tokens(prompt) + tokens(completion) > limit:
            yield f"over {limit} tokens"
        else:
            yield {"id": raw["task_id"], "prompt": [{"role": "user", "content": prompt}], "completion": completion,
                   "preamble": raw["prompt"], "test": raw["test"], "entry_point": raw["entry_point"],
                   "difficulty": raw["difficulty"]}


args = source.arguments(__doc__, Path(__file__).parent, tokenizer="allenai/Llama-3.1-Tulu-3-8B-SFT")
tokens = source.counter(args.tokenizer)
for name in "train", "test":
    table = source.load("newfacade/LeetCodeDataset", name, name, args.source, COLUMNS)
    source.write(args.out / f"{name}.jsonl", problems(table, tokens))
