"""Stories: beginnings of children's stories, for models of TinyStories (arXiv 2305.07759); reward.py says how happy.

Minicode's programs are all of one length. These stories end where the model likes, so this is the set to see what a
loss does to length. Input: none. Output, in --out: train.jsonl and test.jsonl, rows of id and prompt, 320 and 128
beginnings, all different. The model is yours to bring, as a Hugging Face folder: karpathy/tinyllamas' stories260K
trains on a laptop; on the hub there is roneneldan/TinyStories-33M.

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

args = source.arguments(__doc__, Path(__file__).parent, hub=False)
prompts = [f"Once upon a time, {name} and a little {animal} went to the {place}."
           for name, animal, place in itertools.product(NAMES, ANIMALS, PLACES)]
random.Random(0).shuffle(prompts)
for name, part in ("train", prompts[:320]), ("test", prompts[320:448]):
    source.write(args.out / f"{name}.jsonl", ({"id": f"{name}-{i}", "prompt": text} for i, text in enumerate(part)))
