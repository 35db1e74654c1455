"""The real scripts one after another, as a user runs them."""
import json

import transformers

from conftest import MATERIAL, needs, read_rows, run, write_rows


def test_minicode_from_nothing_to_a_better_model(tmp_path):
    t = tmp_path
    run("data/minicode/prepare.py", f"--out={t}", "--steps=400")

    def sample(model, data, out, *flags):
        run("generate_refs.py", f"--model={model}", f"--data={data}", f"--out={out}", "--num_refs=8",
            "--max_new_tokens=48", *flags)
        run("score.py", f"--data={out}", f"--out={out}_scored", "--reward=tests")

    for split in ("train", "test"):
        sample(t / "model", t / f"{split}.jsonl", t / split)
    run("train.py", f"--model={t}/model", f"--data={t}/train_scored", f"--out={t}/qrpo", "--learning_rate=3e-4",
        "--batch_size=64")
    sample(t / "qrpo", t / "test_scored", t / "samples", "--field=samples")
    run("evaluate.py", f"--model={t}/qrpo", f"--ref_model={t}/model", f"--data={t}/samples_scored", f"--out={t}/qrpo")
    results = json.loads((t / "qrpo" / "results.json").read_text())
    gain, error = results["mean reward"]["difference"]
    assert gain > 0.02 and gain > 3 * error
    objective = results["optimality"]["objective"][0]  # above the reference's, below the bound
    assert results["quantile reward"]["reference"][0] < objective < results["optimality"]["best_possible"]
    for picture in ("curves", "data", "calibration", "results", "optimum"):
        assert (t / "qrpo" / f"{picture}.png").stat().st_size > 10_000


@needs("stories260K")
def test_a_really_trained_model_whose_bos_is_an_end_token_and_pad_is_unk(tmp_path):
    model, t = MATERIAL / "stories260K", tmp_path
    write_rows(t / "prompts.jsonl", [{"prompt": text} for text in (
        "Once upon a time, there was a", "Lily and Tom went to the", "The dog was sad because", "One day, a boy named Ben", "Sara had a big", "Max was a")])
    (t / "happy.py").write_text(
        "def happy(prompts, completions, **columns):\n"
        "    return [sum(text.count(word) for word in ('happy', 'fun', 'love', 'smile')) for text in completions]\n")

    def sample(model, name):
        run("generate_refs.py", f"--model={model}", f"--data={t}/prompts.jsonl", f"--out={t}/{name}", "--num_refs=64", "--max_new_tokens=80")
        run("score.py", f"--data={t}/{name}", f"--out={t}/{name}_scored", f"--reward={t}/happy.py:happy")
        return read_rows(t / f"{name}_scored")

    before = sample(model, "refs")
    run("train.py", f"--model={model}", f"--data={t}/refs_scored", f"--out={t}/run", "--learning_rate=1e-4", "--batch_size=16", "--epochs=3",
        "--quantile=exact")
    after = sample(t / "run", "after")
    means = [sum(r for row in rows for r in row["ref_rewards"]) / 384 for rows in (before, after)]
    assert means[1] > means[0] + 0.15, means
    for row in before:
        for c in row["ref_completions"]:
            assert not {1, 2} & set(c["token_ids"][:-1])  # nothing after an end token, and BOS is one here
    plain = transformers.AutoModelForCausalLM.from_pretrained(t / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(t / "run")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    text = tokenizer.decode(plain.generate(ids, max_new_tokens=30, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time") and len(text) > 60 and plain.generation_config.eos_token_id == [1, 2]
