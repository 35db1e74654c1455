"""GSM8K: word problems whose answer is a number (arXiv 2110.14168), as prompts or as an offline dataset.

Without --source, or with local files that have the hub's columns (question, answer): openai/gsm8k as rows
with prompt, completion (the dataset's solution) and answer (a number): 7,473 questions for training and 1,319
for the test.

With --source=example_model_solutions.jsonl[.gz] of github.com/openai/grade-school-math: offline data with
pointwise rewards. A row is the answer of one of four models to one of the 1,319 test questions: completion;
reward, 1 if it is right and 0 if not; and ref_rewards, the rewards of the other three models, used in place
of the reference model's. Every fifth question is for the test. `train.py --train_on=completion` accepts these
rows as they are.

    python data/gsm8k/prepare.py
    python score.py --data=out/refs --out=out/rewarded --reward=data/gsm8k/reward.py:correct
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source  # noqa: E402
from reward import final_number  # noqa: E402

HUB = "openai/gsm8k", "main"
MODELS = "6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"


def make_row(row_id, question, solution, answer):
    return {
        "id": row_id,
        "prompt": f"Question: {question}\nAnswer:",
        "completion": f" {solution}",
        "answer": final_number(answer),
    }


def questions(table):
    for i, raw in enumerate(table):
        yield make_row(i, raw["question"], raw["answer"], raw["answer"])


def model_answers(path, split):
    """Four rows for each question of a split."""
    columns = "question", "ground_truth", *MODELS
    for i, (at, raw) in enumerate(source.read_file(path)):
        source.check_columns(at, raw, columns)
        if split != ("test" if i % 5 == 4 else "train"):
            continue
        rewards = [float(raw[model]["is_correct"]) for model in MODELS]
        for k, model in enumerate(MODELS):
            solution = end(raw[model]["solution"])
            row = make_row(f"{i}-{model}", raw["question"], solution, answer=end(raw["ground_truth"]))
            yield row | {"reward": rewards[k], "ref_rewards": rewards[:k] + rewards[k + 1:]}


def end(solution):
    """Mark the answer as the dataset's own solutions do."""
    return solution.replace("\nA:", "\n####")


args = source.parse_arguments(__doc__, Path(__file__).parent)
for name in "train", "test":
    if args.source and "model_solutions" in Path(args.source).name:
        table = model_answers(Path(args.source), name)
    else:
        table = questions(source.load(args.source, ("question", "answer"), HUB, split=name))
    source.write(args.out / f"{name}.jsonl", table)
