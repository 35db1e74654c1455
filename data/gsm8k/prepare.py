"""GSM8K: school problems in words whose answer is a number (arXiv 2110.14168); to sample on, or as an offline dataset.

Without --source, or with local files of the hub's columns (question, answer): openai/gsm8k as rows with prompt,
completion (the dataset's solution) and answer (a number), of 7,473 questions to train on and 1,319 to test.

With --source=example_model_solutions.jsonl[.gz] of github.com/openai/grade-school-math: offline data with pointwise
rewards. A row is the answer of one of four models to one of the 1,319 test questions: completion, its reward (1 right,
0 wrong) and, as ref_rewards, those of the other three, which stand in for the reference model's. Every fifth question
is test. `train.py --train_on=completion` takes these rows as they are.

    python data/gsm8k/prepare.py
    python score.py --data=out/refs --out=out/rewarded --reward=data/gsm8k/reward.py:correct
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source  # noqa: E402
from reward import final_number  # noqa: E402

MODELS = "6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"


def row(i, question, solution, answer):
    return {"id": i, "prompt": f"Question: {question}\nAnswer:", "completion": " " + solution, "answer": answer}


def questions(table):
    for i, raw in enumerate(table):
        yield row(i, raw["question"], raw["answer"], final_number(raw["answer"]))


def model_answers(table, test):
    """Four rows a question, of the questions that are (or are not) for the test."""
    for i, raw in enumerate(table):
        if (i % 5 == 4) == test:
            rewards = [float(raw[m]["is_correct"]) for m in MODELS]
            for k, m in enumerate(MODELS):
                solution = raw[m]["solution"].replace("\nA:", "\n####")  # as the dataset's own solutions end
                answer = final_number(raw["ground_truth"].replace("\nA:", "\n####"))
                yield row(f"{i}-{m}", raw["question"], solution, answer) | {
                    "reward": rewards[k], "ref_rewards": rewards[:k] + rewards[k + 1:]}


args = source.arguments(__doc__, Path(__file__).parent)
for name in "train", "test":
    if args.source and "model_solutions" in Path(args.source).name:
        table = source.load(None, "", "", args.source, ("question", "ground_truth", *MODELS))
        table = model_answers(table, test=name == "test")
    else:
        table = questions(source.load("openai/gsm8k", name, name, args.source, ("question", "answer"), config="main"))
    source.write(args.out / f"{name}.jsonl", table)
