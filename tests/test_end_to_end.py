"""The scripts one after another, as a user runs them, on a model that somebody trained."""
import transformers

from conftest import MATERIAL, call, read_rows, write_rows

PROMPTS = ("Once upon a time, there was a", "Lily and Tom went to the", "The dog was sad because",
           "One day, a boy named Ben", "Sara had a big", "Max was a")
REFS = 48
HAPPY = """
def happy(prompts, completions, **columns):
    return [sum(text.count(word) for word in ('happy', 'fun', 'love', 'smile')) for text in completions]
"""


def test_a_trained_storyteller_becomes_happier(tmp_path):
    """A really trained model, whose BOS is an end token and whose pad token is its unknown token."""
    model, t = MATERIAL / "stories260K", tmp_path
    write_rows(t / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    (t / "happy.py").write_text(HAPPY)

    def sample(model, name):
        call("generate_refs.py", f"--model={model}", f"--data={t}/prompts.jsonl", f"--out={t}/{name}",
             f"--num_refs={REFS}", "--max_new_tokens=64")
        call("score.py", f"--data={t}/{name}", f"--out={t}/{name}_scored", f"--reward={t}/happy.py:happy")
        table = read_rows(t / f"{name}_scored")
        return table, sum(reward for row in table for reward in row["ref_rewards"]) / (REFS * len(PROMPTS))

    table, before = sample(model, "refs")
    call("train.py", f"--model={model}", f"--data={t}/refs_scored", f"--out={t}/run", "--learning_rate=3e-4",
         "--batch_size=16", "--epochs=2", "--quantile=exact")
    _, after = sample(t / "run", "after")
    assert after > before + 0.15
    for row in table:
        for completion in row["ref_completions"]:  # nothing after an end token, and BOS is one here
            assert not {1, 2} & set(completion["token_ids"][:-1])
    assert continues("Once upon a time", t / "run")


def continues(text, folder):
    """Plain transformers loads the model and goes on from the text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    story = model.generate(ids, max_new_tokens=30, do_sample=False)[0]
    story = tokenizer.decode(story, skip_special_tokens=True)
    assert model.generation_config.eos_token_id == [1, 2]
    return story.startswith(text) and len(story) > len(text) + 40
