"""LeetCodeDataset: 2,869 LeetCode problems with about a hundred tests each (arXiv 2504.14655).

Reads newfacade/LeetCodeDataset from the hub, or local files of its columns. Writes train.jsonl and test.jsonl
beside this script: rows with prompt (one chat message), completion (the dataset's own solution, fenced like
an answer), preamble, test, entry_point and difficulty, which `score.py --reward=tests` and the paper's
stratified evaluation use. As in the paper, a row is kept if it has at least 20 tests, and prompt and answer
have at most 2048 tokens together, and the prompt says which code runs before the answer. The paper kept 2,563
of 2,641 training rows and 223 of 228 test rows.

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
HUB = "newfacade/LeetCodeDataset", None
COLUMNS = ("task_id", "difficulty", "problem_description", "starter_code", "prompt", "completion",
           "entry_point", "test")


# what the code before the answer defines: imports, constants, the first lines of classes and functions
OUTLINE = re.compile(r"^(?:import|from|class|def|\w+ =|    def __init__).*", re.MULTILINE)
TEST = re.compile(r"^\s*assert\b", re.MULTILINE)
MIN_TESTS = 20
MAX_TOKENS = 2048


def problems(table, count_tokens):
    """The project's rows, or why one is dropped."""
    for raw in table:
        outline = "\n".join(OUTLINE.findall(raw["prompt"]))
        prompt = PROMPT.format(
            problem=raw["problem_description"].strip(), starter=raw["starter_code"].rstrip(), outline=outline)
        completion = f"```python\n{raw['completion'].strip()}\n```"
        if len(TEST.findall(raw["test"])) < MIN_TESTS:
            yield f"fewer than {MIN_TESTS} tests"
        elif count_tokens(prompt) + count_tokens(completion) > MAX_TOKENS:
            yield f"over {MAX_TOKENS} tokens"
        else:
            yield {
                "id": raw["task_id"],
                "prompt": [{"role": "user", "content": prompt}],
                "completion": completion,
                "preamble": raw["prompt"],
                "test": raw["test"],
                "entry_point": raw["entry_point"],
                "difficulty": raw["difficulty"],
            }


args = source.parse_arguments(__doc__, Path(__file__).parent, tokenizer="allenai/Llama-3.1-Tulu-3-8B-SFT")
count_tokens = source.token_counter(args.tokenizer)
for name in "train", "test":
    table = source.load(args.source, COLUMNS, HUB, split=name)
    source.write(args.out / f"{name}.jsonl", problems(table, count_tokens))
