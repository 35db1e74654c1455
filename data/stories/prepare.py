"""Stories: first sentences of children's stories, for models trained on TinyStories (arXiv 2305.07759).

Minicode's programs all have about the same length. A story ends where the model decides, so this dataset
shows what a loss does to length. reward.py says how happy a story is. Input: none. Output, in --out:
train.jsonl and test.jsonl, rows of id and prompt, 320 and 128 different sentences. A model that trains on a
laptop is in tests/data/stories260K; the hub has roneneldan/TinyStories-33M.

    python data/stories/prepare.py
"""
import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source  # noqa: E402

NAMES = "Anna", "Ben", "Lily", "Lucy", "Max", "Mia", "Sam", "Sara", "Tim", "Tom"
ANIMALS = "bear", "bird", "cat", "dog", "duck", "fish", "frog", "rabbit"
PLACES = "beach", "farm", "forest", "garden", "house", "park"

args = source.parse_arguments(__doc__, Path(__file__).parent, hub=False)
prompts = [f"Once upon a time, {name} and a little {animal} went to the {place}."
           for name, animal, place in itertools.product(NAMES, ANIMALS, PLACES)]
random.Random(0).shuffle(prompts)
for name, part in {"train": prompts[:320], "test": prompts[320:448]}.items():
    table = [{"id": f"{name}-{i}", "prompt": prompt} for i, prompt in enumerate(part)]
    source.write(args.out / f"{name}.jsonl", table)
