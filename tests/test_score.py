"""score.py: its three kinds of reward, and which rewards it keeps."""
import json
import shutil

import pytest
import torch
import transformers

from conftest import call, make_tokenizer, read_rows, refused, start_ranks, start_until_finished, write_rows

ROWS = [{"prompt": f"p{i}", "extra": i, "ref_completions": [{"text": "ab" * (i + k)} for k in range(3)]}
        for i in range(7)]
LENGTH = "def length(prompts, completions, **columns):\n    return [len(text) for text in completions]\n"


def flags(tmp_path, table, reward, *more):
    data = write_rows(tmp_path / "in.jsonl", table)
    return f"--data={data}", f"--out={tmp_path / 'out'}", f"--reward={reward}", *more


def score(tmp_path, table, reward, *more):
    """The rewarded rows, by id."""
    call("score.py", *flags(tmp_path, table, reward, *more))
    return sorted(read_rows(tmp_path / "out"), key=lambda row: row["id"])


def reward_file(tmp_path, text, name="r.py"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


# ---- a Python function ----

def test_a_function_sees_columns_by_name_and_unknown_rewards_are_null(tmp_path):
    file = reward_file(tmp_path, """
def reward(prompts, completions, extra, **columns):
    assert len(prompts) == len(completions) == len(extra) == 3
    return [None if c == '' else len(c) + 100 * e for c, e in zip(completions, extra)]
""")
    rows = score(tmp_path, ROWS, f"{file}:reward")
    for i, row in enumerate(rows):
        assert row["ref_rewards"] == [None if i + k == 0 else 2.0 * (i + k) + 100 * i for k in range(3)]
    assert rows[3]["extra"] == 3 and rows[3]["ref_completions"] == ROWS[3]["ref_completions"]


def test_dataset_completions_are_rewarded_beside_the_references(tmp_path):
    table = [{**ROWS[1], "chosen": "xxxx", "rejected": "x", "other_completions": [{"text": "xxxxx"}]},
             {"prompt": "p", "completion": "xx"}]
    rows = score(tmp_path, table, f"{reward_file(tmp_path, LENGTH)}:length")
    assert (rows[0]["ref_rewards"], rows[0]["chosen_reward"], rows[0]["rejected_reward"]) == ([2, 4, 6], 4, 1)
    assert rows[0]["other_rewards"] == [5] and rows[1]["reward"] == 2 and "ref_rewards" not in rows[1]


def test_chat_completions_reach_a_function_as_messages(tmp_path):
    file = reward_file(tmp_path, """
def reward(prompts, completions, **columns):
    assert all(messages[0]["role"] == "user" for messages in prompts)
    return [len(messages[-1]["content"]) for messages in completions]
""")
    row = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes",
           "rejected": [{"role": "assistant", "content": "no"}]}
    rows = score(tmp_path, [row], f"{file}:reward")
    assert (rows[0]["chosen_reward"], rows[0]["rejected_reward"]) == (3, 2)


@pytest.mark.parametrize("body, says", (
    ("return [1.0]", "1 rewards for the 3"), ("return [float('nan')] * 3", "finite number")))
def test_a_wrong_function_is_named_with_its_row(tmp_path, capsys, body, says):
    file = reward_file(tmp_path, f"def reward(prompts, completions, **columns):\n    {body}\n")
    refused(capsys, [says, "in.jsonl:1"], "score.py", *flags(tmp_path, ROWS, f"{file}:reward"))


# ---- tests ----

def test_tests_in_the_sandbox(tmp_path):
    texts = "def f(x): return x + 1", "def f(x): return 2", "def f(x): return x +"
    rows = score(tmp_path, [{
        "prompt": "write f", "entry_point": "f", "fenced": False,
        "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n",
        "ref_completions": [{"text": text} for text in texts]}], "tests")
    assert rows[0]["ref_rewards"] == [1.0, 0.5, 0.0]


# ---- a reward model ----

@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A random classifier whose pad token is also its end token, as in many released reward models."""
    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_labels=1, initializer_range=0.3,
        pad_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_gives_its_logit_at_the_last_token(reward_model, tmp_path):
    reward = score(tmp_path, ROWS, f"model:{reward_model}")[0]["ref_rewards"][2]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_model)
    text = "[user]p0<eos>[assistant]abab<eos>"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    by_hand = model.score(model.model(ids).last_hidden_state[0, -1]).item()
    assert abs(reward - by_hand) < 1e-5


@pytest.mark.parametrize("causal", (True, False))
def test_a_reward_model_gives_the_same_at_every_batch_size(reward_model, tmp_path, causal):
    if not causal:  # tokens look at later ones, too, so padding must be masked
        torch.manual_seed(1)
        config = transformers.BertConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_labels=1, initializer_range=0.3)
        tokenizer = transformers.AutoTokenizer.from_pretrained(reward_model)
        reward_model = tmp_path / "bert"
        transformers.BertForSequenceClassification(config).save_pretrained(reward_model)
        tokenizer.save_pretrained(reward_model)
    chat = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes",
            "rejected": [{"role": "assistant", "content": "no"}]}
    found = []
    for size in (1, 300, 100_000):
        folder = tmp_path / str(size)
        folder.mkdir()
        *rows, last = score(folder, [*ROWS, chat], f"model:{reward_model}", f"--batch_tokens={size}")
        rewards = [reward for row in rows for reward in row["ref_rewards"]]
        found.append(torch.tensor([*rewards, last["chosen_reward"], last["rejected_reward"]]))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-5)
    assert found[0].std() > 1e-3


def test_batches_stay_within_batch_tokens_and_fill_it(reward_model, tmp_path, monkeypatch):
    sizes, forward = [], transformers.LlamaForSequenceClassification.forward

    def recorded(self, input_ids, **kwargs):
        sizes.append(input_ids.shape)
        return forward(self, input_ids=input_ids, **kwargs)
    monkeypatch.setattr(transformers.LlamaForSequenceClassification, "forward", recorded)
    row = {"prompt": "p", "ref_completions": [{"text": "a" * n} for n in (1, 30, 2, 40, 3, 50)]}
    score(tmp_path, [row] * 8, f"model:{reward_model}", "--batch_tokens=400")
    sizes = sizes[2:]  # the first two find out whether it is causal
    assert sum(n for n, _ in sizes) == 48 and all(n * width <= 400 for n, width in sizes)
    assert len(sizes) <= 6  # of similar lengths; the 2,000 tokens or so would fill 5


SCORER = """
import dataclasses, torch
from transformers import LlamaForSequenceClassification
from transformers.utils import ModelOutput

@dataclasses.dataclass
class Out(ModelOutput):
    logits: torch.Tensor = None
    score: torch.Tensor = None

class Scorer(LlamaForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, **kw):
        n = attention_mask.sum(1).float()
        return Out(logits=torch.randn(len(n), 19), score=n)
"""


def test_a_model_with_code_of_its_own_gives_its_score(reward_model, tmp_path):
    """As ArmoRM: a custom class, loaded with --trust_remote_code, whose output has `.score`."""
    folder = shutil.copytree(reward_model, tmp_path / "armo")
    (folder / "code.py").write_text(SCORER)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "code.Scorer"}
    (folder / "config.json").write_text(json.dumps(config))
    rows = score(tmp_path, ROWS[:2], f"model:{folder}", "--trust_remote_code")
    assert rows[1]["ref_rewards"][1] - rows[1]["ref_rewards"][0] == 2  # tokens
    (tmp_path / "out" / "part-00000.jsonl").unlink()
    plain = score(tmp_path, ROWS[:2], f"model:{folder}")  # without the flag its code does not run
    assert plain[0]["ref_rewards"] != rows[0]["ref_rewards"]


# ---- rewards that are there already ----

def test_samples_are_rewarded_beside_references_whose_rewards_stay(tmp_path):
    file = reward_file(tmp_path, LENGTH)
    rows = score(tmp_path, ROWS, f"{file}:length")
    for row in rows:
        row["samples"] = [{"text": "z" * row["extra"]}]
    shutil.rmtree(tmp_path / "out")
    for before, row in zip(rows, score(tmp_path, rows, f"{file}:length")):
        assert row["ref_rewards"] == before["ref_rewards"] and row["sample_rewards"] == [row["extra"]]


def test_rewards_of_another_version_of_the_reward_are_refused_not_kept(tmp_path, capsys):
    """Also if only a module beside the reward file has changed."""
    file = reward_file(tmp_path, "import beside\ndef reward(prompts, completions, **columns):\n"
                                 "    return [beside.VALUE for _ in completions]\n")
    (tmp_path / "beside.py").write_text("VALUE = 1\n")
    rows = score(tmp_path, ROWS, f"{file}:reward")
    (tmp_path / "beside.py").write_text("VALUE = 2.5\n")
    shutil.rmtree(tmp_path / "out")
    refused(capsys, ["in.jsonl:1", "ref_rewards", "another reward or version"], "score.py",
            *flags(tmp_path, rows, f"{file}:reward"))


def test_a_second_opinion_goes_to_columns_of_its_own(tmp_path, capsys):
    file = reward_file(tmp_path, LENGTH + LENGTH.replace("length", "half").replace("(text)", "(text) / 2"))
    table = [{**row, "chosen": "xxxx", "rejected": "x"} for row in ROWS]
    first = score(tmp_path, table, f"{file}:length")
    again = f"--data={tmp_path / 'out'}", f"--out={tmp_path / 'two'}", f"--reward={file}:half"
    call("score.py", *again, "--name=judge")
    for before, after in zip(first, sorted(read_rows(tmp_path / "two"), key=lambda row: row["id"])):
        assert after.pop("ref_rewards_judge") == [reward / 2 for reward in before["ref_rewards"]]
        assert (after.pop("chosen_reward_judge"), after.pop("rejected_reward_judge")) == (2, 0.5)
        made_by = after.pop("made_by")
        assert made_by["ref_rewards_judge"]["reward"] == f"{file}:half"
        assert after | {"made_by": {name: made_by[name] for name in before["made_by"]}} == before
    refused(capsys, ["ref_rewards were made by another reward", "--name"], "score.py", *again)
    refused(capsys, ["made with another reward", "half as judge"], "score.py", *again, "--name=other")
    refused(capsys, ["--name=a b", "one word"], "score.py", *again, "--name=a b")


def test_rewards_that_a_data_set_came_with_are_kept(tmp_path):
    file = reward_file(tmp_path, LENGTH)
    row = {**ROWS[1], "chosen": "xxxx", "chosen_reward": 17}
    rows = score(tmp_path, [row], f"{file}:length")
    assert rows[0]["chosen_reward"] == 17 and rows[0]["ref_rewards"] == [2, 4, 6]


# ---- processes and kills ----

def test_a_killed_run_and_shared_runs_have_the_same_rows(tmp_path):
    whole = score(tmp_path, ROWS, f"{reward_file(tmp_path, LENGTH)}:length")
    command = flags(tmp_path, ROWS, f"{tmp_path / 'r.py'}:length")
    for name in ("killed", "shared"):
        mine = [flag for flag in command if not flag.startswith("--out")] + [f"--out={tmp_path / name}"]
        if name == "killed":
            assert start_until_finished("score.py", *mine) >= 3
        else:
            assert [rank.wait() for rank in start_ranks(2, "score.py", *mine)] == [0, 0]
        assert sorted(read_rows(tmp_path / name), key=lambda row: row["id"]) == whole


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({**ROWS[1], "extra": "\ud83d"}) + "\n")
    call("score.py", f"--data={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out'}",
         f"--reward={reward_file(tmp_path, LENGTH)}:length")
    assert read_rows(tmp_path / "out")[0]["extra"] == "\ud83d"
