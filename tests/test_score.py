"""score.py: its three kinds of reward."""
import sys

import pytest
import torch
import transformers

import score as score_script

from conftest import make_tokenizer, read_rows, run, write_rows

ROWS = [{"prompt": f"p{i}", "ref_completions": [{"text": "ab" * (i + k), "token_ids": [1], "finish_reason": "stop"}
                                                for k in range(3)], "extra": i} for i in range(7)]


def score(tmp_path, rows, reward, *flags, check=True):
    done = run("score.py", f"--data={write_rows(tmp_path / 'in.jsonl', rows)}", f"--out={tmp_path / 'out'}",
               f"--reward={reward}", *flags, check=check)
    return sorted(read_rows(tmp_path / "out"), key=lambda row: row["id"]) if done.returncode == 0 else done


def test_python_function_sees_columns_by_name_and_unknown_rewards_are_null(tmp_path):
    (tmp_path / "r.py").write_text(
        "def reward(prompts, completions, extra, **kwargs):\n"
        "    assert len(prompts) == len(completions) == len(extra) == 3\n"
        "    return [None if c == '' else len(c) + 100 * e for c, e in zip(completions, extra)]\n")
    rows = score(tmp_path, ROWS, f"{tmp_path / 'r.py'}:reward")
    assert [row["ref_rewards"] for row in rows] == [
        [None if i + k == 0 else 2.0 * (i + k) + 100 * i for k in range(3)] for i in range(7)]
    assert rows[3]["extra"] == 3 and rows[3]["ref_completions"] == ROWS[3]["ref_completions"]


def test_dataset_completions_are_rewarded_beside_the_references(tmp_path):
    (tmp_path / "r.py").write_text("def reward(prompts, completions, **kwargs):\n    return [len(c) for c in completions]\n")
    rows = score(tmp_path, [{**ROWS[1], "chosen": "xxxx", "rejected": "x"}, {"prompt": "p", "completion": "xx"}],
                 f"{tmp_path / 'r.py'}:reward")
    assert (rows[0]["ref_rewards"], rows[0]["chosen_reward"], rows[0]["rejected_reward"]) == ([2, 4, 6], 4, 1)
    assert rows[1]["reward"] == 2 and "ref_rewards" not in rows[1]


def test_tests_in_the_sandbox(tmp_path):
    text = "def f(x): return x + 1", "def f(x): return 2", "def f(x): return x +"
    rows = score(tmp_path, [{"prompt": "write f", "entry_point": "f", "fenced": False,
                             "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n",
                             "ref_completions": [{"text": t, "token_ids": [1], "finish_reason": "stop"} for t in text]}], "tests")
    assert rows[0]["ref_rewards"] == [1.0, 0.5, 0.0]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A random classifier whose pad token is also its end token, as in many released reward models."""
    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, initializer_range=0.3, pad_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_batches_stay_within_batch_tokens_and_fill_it(reward_model, tmp_path, monkeypatch, capsys):
    sizes, forward = [], transformers.LlamaForSequenceClassification.forward

    def recorded(self, input_ids, **kwargs):
        sizes.append(input_ids.shape)
        return forward(self, input_ids=input_ids, **kwargs)
    monkeypatch.setattr(transformers.LlamaForSequenceClassification, "forward", recorded)
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "p", "ref_completions": [
        {"text": "a" * n} for n in (1, 30, 2, 40, 3, 50)]} for _ in range(8)])
    monkeypatch.setattr(sys, "argv", ["score.py", f"--data={data}", f"--out={tmp_path / 'out'}",
                                      f"--reward=model:{reward_model}", "--batch_tokens=400"])
    score_script.main()
    assert sum(n for n, _ in sizes) == 48 and all(n * width <= 400 for n, width in sizes)
    assert len(sizes) <= 6  # of similar lengths; the 2,000 tokens or so would fill 5


def test_reward_model_gives_the_same_at_every_batch_size(reward_model, tmp_path):
    out = []
    for size in (1, 300, 100_000):
        (tmp_path / str(size)).mkdir()
        rows = score(tmp_path / str(size), [*ROWS, {"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes", "rejected": [
            {"role": "assistant", "content": "no"}]}], f"model:{reward_model}", f"--batch_tokens={size}")
        out.append(torch.tensor([r for row in rows[:7] for r in row["ref_rewards"]] + [
            rows[7]["chosen_reward"], rows[7]["rejected_reward"]]))
    for other in out[1:]:
        torch.testing.assert_close(out[0], other, rtol=1e-5, atol=1e-5)
    assert out[0].std() > 1e-3
    # by hand: the classifier's logit at the last token
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_model)
    ids = tokenizer("[user]p0<eos>[assistant]abab<eos>", add_special_tokens=False, return_tensors="pt").input_ids
    by_hand = model.score(model.model(ids).last_hidden_state[0, -1]).item()
    assert abs(out[0][2].item() - by_hand) < 1e-5


def test_score_output_of_models_with_code_of_their_own(reward_model, tmp_path):
    """As ArmoRM: a custom class, loaded with trust_remote_code, whose output has `.score`."""
    import json
    import shutil
    folder = shutil.copytree(reward_model, tmp_path / "armo")
    (folder / "code.py").write_text(
        "import dataclasses, torch\n"
        "from transformers import LlamaForSequenceClassification\n"
        "from transformers.utils import ModelOutput\n"
        "@dataclasses.dataclass\n"
        "class Out(ModelOutput):\n"
        "    logits: torch.Tensor = None\n"
        "    score: torch.Tensor = None\n"
        "class Scorer(LlamaForSequenceClassification):\n"
        "    def forward(self, input_ids=None, attention_mask=None, **kw):\n"
        "        n = attention_mask.sum(1).float()\n"
        "        return Out(logits=torch.randn(len(n), 19), score=n)\n")
    config = json.loads((folder / "config.json").read_text()) | {
        "auto_map": {"AutoModelForSequenceClassification": "code.Scorer"}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = score(tmp_path, ROWS[:2], f"model:{folder}", "--trust_remote_code")
    assert rows[1]["ref_rewards"][1] - rows[1]["ref_rewards"][0] == 2  # tokens
    (tmp_path / "out" / "part-00000.jsonl").unlink()
    assert score(tmp_path, ROWS[:2], f"model:{folder}", check=False)[0]["ref_rewards"] != rows[0]["ref_rewards"]


@pytest.mark.parametrize("body, says", (
    ("return [1.0]", "1 rewards for the 3"), ("return [float('nan')] * 3", "finite number")))
def test_a_wrong_function_is_named(tmp_path, body, says):
    (tmp_path / "r.py").write_text(f"def reward(prompts, completions, **kwargs):\n    {body}\n")
    done = score(tmp_path, ROWS, f"{tmp_path / 'r.py'}:reward", check=False)
    assert done.returncode == 2 and says in done.stderr and "in.jsonl:1" in done.stderr


def test_samples_are_rewarded_beside_references_whose_rewards_stay(tiny, rewarded, tmp_path):
    run("generate_refs.py", f"--model={tiny}", f"--data={rewarded}", f"--out={tmp_path / 'new'}", "--field=samples",
        "--num_refs=2", "--max_new_tokens=5", "--seed=1")
    (tmp_path / "length.py").write_text("def length(prompts, completions, **columns):\n"
                                        "    return [len(text) for text in completions]\n")
    run("score.py", f"--data={tmp_path / 'new'}", f"--out={tmp_path / 'out'}", f"--reward={tmp_path / 'length.py'}:length")
    before = {row["id"]: row for row in read_rows(rewarded)}
    for row in read_rows(tmp_path / "out"):
        assert row["ref_rewards"] == before[row["id"]]["ref_rewards"]
        assert row["sample_rewards"] == [len(c["text"]) for c in row["samples"]] and len(row["samples"]) == 2
    again = run("generate_refs.py", f"--model={tiny}", f"--data={rewarded}", f"--out={tmp_path / 'twice'}", check=False)
    assert again.returncode == 2 and "has ref_completions already" in again.stderr
