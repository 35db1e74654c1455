"""Sentences: chat prompts that ask for two sentences about everyday things.

For small chat models, which often fail to follow such an instruction. reward.py has two rewards: a smooth one
(sentiment), and one with three levels and so many ties (are there two sentences?). Input: none. Output, in
--out: train.jsonl with 256 rows of id and prompt, and test.jsonl with 96 about other things. The grid `real`
of paper/grids.py trains SmolLM2-135M-Instruct on them.

    python data/sentences/prepare.py
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source  # noqa: E402

REQUESTS = (
    "Write two short sentences about {}.",
    "Tell me in two sentences what you think of {}.",
    "Describe {} in exactly two sentences.",
    "Tell a story of two sentences about {}.",
    "Give me advice about {} in two short sentences.",
    "Explain {} to a child in two sentences.",
    "Begin a diary entry about {} with two sentences.",
    "What should a visitor know about {}? Answer in two sentences.",
)
TRAIN = (
    "rain", "a broken bicycle", "the sea", "an old teacher", "bread", "a job interview", "the night bus",
    "a lost dog", "winter", "a new neighbour", "tax forms", "a birthday cake", "the dentist",
    "a mountain hike", "traffic", "a rusty key", "summer holidays", "an empty fridge", "the library",
    "a noisy school", "tea",
    "a long queue", "the moon", "a wedding", "a power cut", "the market", "a cold", "an exam", "a garden",
    "the hospital", "a flat tyre", "music",
)
TEST = (
    "snow", "a late train", "the forest", "a kind doctor", "coffee", "the airport", "a stray cat", "autumn",
    "a parking fine", "a picnic", "homework", "a leaking roof",
)

args = source.parse_arguments(__doc__, Path(__file__).parent, hub=False)
for name, things in {"train": TRAIN, "test": TEST}.items():
    table = []
    for i, (thing, request) in enumerate(itertools.product(things, REQUESTS)):
        prompt = [{"role": "system", "content": "Answer briefly."},
                  {"role": "user", "content": request.format(thing)}]
        table.append({"id": f"{name}-{i}", "prompt": prompt})
    source.write(args.out / f"{name}.jsonl", table)
