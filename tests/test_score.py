"""score.py: its three kinds of reward, and which rewards it keeps."""
import json
import shutil
import signal
import sys

import pytest
import torch
import transformers
from tokenizers import processors

from conftest import (call, make_tokenizer, one_line_of_error, read_rows, refused, start_ranks,
                      start_until_finished, write_rows)
from scoring.function import text_of

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


WRONG = {  # what a function returns for three completions, and what is said about it
    "[1.0]": "1 rewards for the 3", "[1.0] * 4": "4 rewards for the 3",
    "[float('nan')] * 3": "finite number", "[float('inf')] * 3": "finite number",
    "1.0": "1.0, not a list of numbers", "None": "None, not a list of numbers",
    "'000'": "it is a str", "b'000'": "it is a bytes", "{0: 1, 1: 2, 2: 3}": "it is a dict",
    "{1, 2, 3}": "it is a set",
    "['1.5'] * 3": "not a list of numbers", "[[1.0]] * 3": "not a list of numbers",
    "[{'score': 1.0}] * 3": "not a list of numbers", "[10 ** 400] * 3": "not a list of numbers",
    "1 / 0": "ZeroDivisionError: division by zero (r.py, line 2)", "exit()": "SystemExit",
    "columns['answer']": "KeyError: 'answer' (r.py, line 2)",
    "__import__('no_such_library')": "No module named 'no_such_library'"}


@pytest.mark.parametrize("kind, returns", (
    *(("def", returns) for returns in WRONG),
    *(("async def", returns) for returns in ("None", "[1.0]", "1 / 0", "exit()", "columns['answer']"))))
def test_what_a_function_does_wrong_is_one_line_that_names_it_and_its_row(tmp_path, capsys, kind, returns):
    file = reward_file(tmp_path, f"{kind} reward(prompts, completions, **columns):\n    return {returns}\n")
    refused(capsys, [WRONG[returns], "in.jsonl:1", "r.py:reward"], "score.py",
            *flags(tmp_path, ROWS, f"{file}:reward"))


@pytest.mark.parametrize("line, says", (
    ("exit(0)", "SystemExit: 0 (r.py, line 1)"), ("import no_such_library", "No module named 'no_such"),
    ("def f(:", "SyntaxError"), ("length = 3", "no function 'reward'"), ("1 / 0", "ZeroDivisionError")))
def test_a_reward_file_that_cannot_be_loaded_is_one_line(tmp_path, capsys, line, says):
    reward = f"{reward_file(tmp_path, line)}:reward"
    refused(capsys, [says, "r.py"], "score.py", *flags(tmp_path, ROWS, reward))


@pytest.mark.parametrize("returns", (
    "[len(c) for c in completions]", "(float(len(c)) for c in completions)", "numpy.array([2, 4, 6])",
    "torch.tensor([2.0, 4, 6], dtype=torch.bfloat16, requires_grad=True)", "torch.tensor([[2], [4], [6]])",
    "[fractions.Fraction(2), decimal.Decimal(4), numpy.float16(6)]"))
def test_everything_that_holds_numbers_is_taken(tmp_path, returns):
    file = reward_file(tmp_path, "import decimal, fractions, numpy, torch\n"
                                 f"def reward(prompts, completions, **columns):\n    return {returns}\n")
    assert score(tmp_path, [ROWS[1]], f"{file}:reward")[0]["ref_rewards"] == [2, 4, 6]


@pytest.mark.parametrize("concurrency", (0, 3))
def test_a_function_may_change_what_it_is_given(tmp_path, concurrency):
    """It gets copies: neither other completions nor the written rows have its changes."""
    file = reward_file(tmp_path, """
def reward(prompts, completions, words, **columns):
    for messages, completion, mine in zip(prompts, completions, words):
        messages += completion
        completion[0]["content"] = "mine"
        mine.pop()
        columns["nested"][0]["a"].append(1)
    return [len(messages) + 10 * len(mine) for messages, mine in zip(prompts, words)]
""")
    answer = [{"role": "assistant", "content": "yes"}]
    row = {"prompt": [{"role": "user", "content": "hi"}], "words": ["a", "b"], "nested": {"a": []},
           "ref_completions": [{"text": "a"}, {"text": "b"}], "chosen": answer, "rejected": answer}
    done = score(tmp_path, [row], f"{file}:reward", f"--concurrency={concurrency}")[0]
    assert done["ref_rewards"] == [12, 12] and done["chosen_reward"] == done["rejected_reward"] == 12
    assert {name: done[name] for name in row} == row


def test_a_function_gets_what_trls_trainers_give_it(tmp_path):
    file = reward_file(tmp_path, """
def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
    log_extra("extra", list(columns["extra"]))
    log_metric("mean", 1.0)
    assert trainer_state is None and all(c[0]["role"] == "assistant" for c in completions)
    return [len(ids) for ids in completion_ids]
""")
    row = {"prompt": [{"role": "user", "content": "hi"}], "extra": 1, "trainer_state": "a column",
           "ref_completions": [{"text": "a", "token_ids": [5] * n} for n in (3, 1)]}
    assert score(tmp_path, [row], f"{file}:reward")[0]["ref_rewards"] == [3, 1]


def test_async_functions_of_all_rows_share_one_event_loop(tmp_path):
    """A client keeps connections, and these belong to the loop in which they were opened."""
    file = reward_file(tmp_path, """
import asyncio
opened = []
async def reward(prompts, completions, **columns):
    if not opened:
        opened.extend([asyncio.get_running_loop(), asyncio.get_running_loop().create_future()])
        opened[1].set_result(1.0)
    return [await opened[1] + (opened[0] is not asyncio.get_running_loop()) for _ in completions]
""")
    assert all(row["ref_rewards"] == [1, 1, 1] for row in score(tmp_path, ROWS, f"{file}:reward"))


# ---- what a reward's file imports and starts ----

POOLS = {
    "fork": "multiprocessing.get_context('fork').Pool(2)",
    "spawn": "multiprocessing.get_context('spawn').Pool(2)",
    "forkserver": "ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('forkserver'))"}


@pytest.mark.parametrize("method", POOLS)
def test_a_function_may_use_processes(tmp_path, method):
    """Workers find its module under its own name, and do not start score.py again."""
    file = reward_file(tmp_path, f"""
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
def work(text):
    return 100 * ("torch" in sys.modules and {method != "fork"}) + len(text)
def reward(prompts, completions, **columns):
    with {POOLS[method]} as pool:
        return list(pool.map(work, completions))
""", "graders.py")
    for row in score(tmp_path, ROWS[:3], f"{file}:reward"):
        assert row["ref_rewards"] == [len(c["text"]) for c in row["ref_completions"]]


def test_a_fork_ends_by_a_signal_at_any_moment(tmp_path):
    """As multiprocessing's Pool ends its workers: they do not inherit what score.py does at a signal."""
    file = reward_file(tmp_path, """
import multiprocessing, time
def reward(prompts, completions, **columns):
    codes = []
    for _ in completions:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(10)
        codes.append(child.exitcode)
    return codes
""")
    assert all(row["ref_rewards"] == [-signal.SIGTERM] * 3 for row in score(tmp_path, ROWS, f"{file}:reward"))


def test_a_signal_during_a_function_ends_the_run_with_75(tmp_path):
    file = reward_file(tmp_path, """
import os, signal
def reward(prompts, completions, extra, **columns):
    if extra[0] == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return [1.0 for _ in completions]
""")
    with pytest.raises(SystemExit) as end:
        score(tmp_path, ROWS, f"{file}:reward")
    assert end.value.code == 75 and len(read_rows(tmp_path / "out")) == 3


def test_the_names_of_this_project_are_free_for_a_reward(tmp_path, monkeypatch):
    """For modules beside it, also in a package and when it is called, and for installed ones."""
    installed = tmp_path / "site"
    (installed / "evaluate").mkdir(parents=True)
    (installed / "evaluate" / "__init__.py").write_text("VALUE = 1\n")
    (tmp_path / "sandbox").mkdir()
    (tmp_path / "sandbox" / "__init__.py").touch()
    (tmp_path / "sandbox" / "part.py").write_text("VALUE = 2\n")
    for i, name in enumerate(("model", "rows", "scoring", "train")):
        (tmp_path / f"{name}.py").write_text(f"VALUE = {10 ** (i + 1)}\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    file = reward_file(tmp_path, """
import evaluate, model, train
from sandbox.part import VALUE
def reward(prompts, completions, **columns):
    import rows, scoring
    return [evaluate.VALUE + VALUE + sum(m.VALUE for m in (model, rows, scoring, train))] * len(completions)
""")
    assert all(row["ref_rewards"] == [11113] * 3 for row in score(tmp_path, ROWS, f"{file}:reward"))


def test_a_file_with_the_name_of_a_module_in_use_is_refused(tmp_path, capsys):
    for name in ("json.py", "time.py", "torch.py"):
        refused(capsys, ["give the file another name"], "score.py",
                *flags(tmp_path, ROWS, f"{reward_file(tmp_path, LENGTH, name)}:length"))


def test_a_name_of_a_reward_means_what_its_entry_says_or_is_an_error(monkeypatch, capsys):
    import score as module
    kinds = {"short": "short", "judge:URL": "judge"}
    monkeypatch.setattr(module, "REWARDS", module.REWARDS | kinds)
    assert module.kind_of("short") == "short" and module.kind_of("judge:http://a:1") == "judge"
    assert module.kind_of("a:b/rewards.py:exact") is module.REWARDS["FILE.py:NAME"]
    for wrong in ("shrt", "short:", "short:x", "judge", "judge:", "tests:x", "tests.py", "model", "model:",
                  "rewards:exact", ""):
        says = f"--reward={wrong}: must be tests, FILE.py:NAME, model:PATH, short or judge:URL"
        one_line_of_error(capsys, [says], lambda: module.kind_of(wrong))


@pytest.mark.parametrize("rewards", ([1.0, 1.0], [1.0, 1.0, None, 1.0]))
def test_rewards_of_another_number_of_completions_are_refused(tmp_path, capsys, rewards):
    """Somebody removed completions, or added some: it is not known which reward is whose."""
    reward = f"{reward_file(tmp_path, LENGTH)}:length"
    table = score(tmp_path, ROWS, reward)
    table[1]["ref_rewards"] = rewards
    refused(capsys, [":2: its", f"{len(rewards)} ref_rewards", "3 ref_completions"], "score.py",
            *flags(tmp_path, table, reward, f"--out={tmp_path / 'again'}"))


# ---- tests ----

def test_the_reward_of_tests_is_the_share_that_passes(tmp_path):
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


@pytest.mark.parametrize("pad", (None, "<eos>", "<bos>"))
@pytest.mark.parametrize("size", (1, 100_000))
def test_a_reward_model_gives_what_its_own_forward_gives_for_one_sequence(reward_model, tmp_path, pad, size):
    """Which does not read the last token where that is the pad token, as after TRL's RewardTrainer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_model)
    folder = shutil.copytree(reward_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = pad and tokenizer.convert_tokens_to_ids(pad)
    (folder / "config.json").write_text(json.dumps(config))
    rows = score(tmp_path, ROWS[:3], f"model:{folder}", f"--batch_tokens={size}")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    for row in rows:
        for completion, reward in zip(row["ref_completions"], row["ref_rewards"]):
            text = f"[user]{row['prompt']}<eos>[assistant]{completion['text']}<eos>"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            assert reward == pytest.approx(model(ids).logits.item(), abs=1e-5)


def test_scores_of_a_reward_model_in_bfloat16_do_not_tie(tmp_path):
    """Its head is computed in float32: alone, it gives tens of numbers to hundreds of completions."""
    import score as module
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=24, num_attention_heads=2,
        num_labels=1, initializer_range=0.3))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = module.arguments([f"--reward=model:{tmp_path}", "--data=", "--out=", "--dtype=bfloat16"])
    scorer = module.RewardModel(args)
    texts = [f"{i} is a number" for i in range(200)]
    (_, rewards), = scorer([({"prompt": "p", "__at__": "1"}, texts)])
    assert len(set(rewards)) == 200
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    hidden = model.model(tokenizer("p" + texts[7], return_tensors="pt").input_ids).last_hidden_state[0, -1]
    by_hand = (hidden.float() @ model.score.weight[0].float()).item()
    assert rewards[7] == pytest.approx(by_hand, abs=0.05 * torch.tensor(rewards).std().item())


PAIRS = {
    "bert": ({"type_vocab_size": 2}, "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "deberta-v2": ({"type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
                   "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ({"type_vocab_size": 1, "pad_token_id": 1}, "[CLS] $A [SEP] [SEP] $B [SEP]"),
    "electra": ({"embedding_size": 16}, "[CLS] $A [SEP] $B:1 [SEP]:1")}


@pytest.mark.parametrize("family", PAIRS)
def test_an_encoder_without_a_chat_template_reads_a_pair_of_texts(tmp_path, family):
    more, form = PAIRS[family]
    tokenizer = make_tokenizer(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=form,
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")])
    torch.manual_seed(1)
    config = transformers.CONFIG_MAPPING[family](
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, initializer_range=0.3, **({"pad_token_id": tokenizer.pad_token_id} | more))
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = score(tmp_path, ROWS[:3], f"model:{tmp_path / 'model'}")
    for row in rows:
        for completion, reward in zip(row["ref_completions"], row["ref_rewards"]):
            inputs = tokenizer(row["prompt"], completion["text"], return_tensors="pt")
            assert reward == pytest.approx(model(**inputs).logits.item(), abs=1e-5)


READS_PADDING = {  # model type: what it needs at this size, and why it is refused
    "xlnet": ({"n_layer": 2, "n_head": 2, "d_model": 32, "d_inner": 64}, "reads the padding of a batch"),
    "fnet": ({"num_hidden_layers": 2, "hidden_size": 32}, "reads the padding of a batch"),
    "bart": ({"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "Each example must contain"),
    "umt5": ({"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16}, "Each example must contain")}


@pytest.mark.parametrize("family", READS_PADDING)
def test_a_reward_model_whose_score_depends_on_its_batch_is_refused(reward_model, tmp_path, capsys, family):
    sizes, says = READS_PADDING[family]
    torch.manual_seed(1)
    config = transformers.CONFIG_MAPPING[family](
        vocab_size=300, num_labels=1, pad_token_id=1, eos_token_id=299, **sizes)
    folder = shutil.copytree(reward_model, tmp_path / "model")
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    refused(capsys, [f"a {family} model", says], "score.py", *flags(tmp_path, ROWS[:1], f"model:{folder}"))


def test_a_reward_model_reads_a_continued_answer_as_one_message(reward_model, tmp_path):
    user = {"role": "user", "content": "hi"}
    start, rest = ({"role": "assistant", "content": text} for text in ("it ", "is"))
    table = [{"prompt": [user, start], "completion": [rest]},
             {"prompt": [user], "completion": [start | {"content": "it is"}]}]
    continued, whole = score(tmp_path, table, f"model:{reward_model}")
    assert continued["reward"] == whole["reward"]


def test_a_chat_that_a_reward_model_refuses_is_one_line_with_its_row(reward_model, tmp_path, capsys):
    folder = shutil.copytree(reward_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}")
    chats = [[{"role": role, "content": "hi"}] for role in ("user", "system")]
    table = [{"prompt": chat + chats[0], "completion": "c"} for chat in chats]
    refused(capsys, ["in.jsonl:2", "no system role"], "score.py", *flags(tmp_path, table, f"model:{folder}"))


def test_a_reward_model_gives_the_same_at_every_batch_size(reward_model, tmp_path):
    """Also one whose tokens see later ones, so that padding must be masked."""
    folder = shutil.copytree(reward_model, tmp_path / "bert")  # its tokenizer and chat template
    torch.manual_seed(1)
    transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, initializer_range=0.3)).save_pretrained(folder)
    chat = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes",
            "rejected": [{"role": "assistant", "content": "no"}]}
    found = []
    for size in (1, 300, 100_000):
        (tmp_path / str(size)).mkdir()
        more = f"model:{folder}", f"--batch_tokens={size}"
        *rows, last = score(tmp_path / str(size), [*ROWS, chat], *more)
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
    sizes = sizes[4:]  # the first are the check of what padding does
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


def test_rewards_of_another_version_of_a_model_class_are_refused(reward_model, tmp_path, capsys):
    file = reward_file(tmp_path, "from transformers import LlamaForSequenceClassification as Scorer\n")
    more = f"model:{reward_model}", f"--model_class={file}:Scorer"
    score(tmp_path, ROWS[:1], *more)
    file.write_text(file.read_text() + "Scorer.scale = 2\n")
    refused(capsys, ["its rows were made with another code"], "score.py", *flags(tmp_path, ROWS[:1], *more))


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


def test_only_nulls_of_this_reward_are_asked_for_again(tmp_path):
    """Where its own output is --data. Nulls that the data came with are another scorer's, and stay."""
    file = reward_file(tmp_path, f"""
import os
def reward(prompts, completions, **columns):
    with open({str(tmp_path / "calls")!r}, "a") as calls:
        print(*completions, sep=chr(10), file=calls)
    works = os.path.exists({str(tmp_path / "works")!r})
    return [len(c) if works or len(c) != 4 else None for c in completions]
""")
    table = [{**row, "chosen": "abcd", "rejected": "x"} for row in ROWS]
    table[5] |= {"ref_rewards": [None, 1.0, None]}
    first = score(tmp_path, table, f"{file}:reward")
    (tmp_path / "works").touch()
    (tmp_path / "calls").unlink()
    call("score.py", f"--data={tmp_path / 'out'}", f"--out={tmp_path / 'again'}", f"--reward={file}:reward")
    again = sorted(read_rows(tmp_path / "again"), key=lambda row: row["id"])
    assert [row["ref_rewards"] for row in first[:3]] == [[0, 2, None], [2, None, 6], [None, 6, 8]]
    assert [row["ref_rewards"] for row in again[:3]] == [[0, 2, 4], [2, 4, 6], [4, 6, 8]]
    assert {row["chosen_reward"] for row in first} == {None}
    assert {row["chosen_reward"] for row in again} == {4}
    assert again[5]["ref_rewards"] == [None, 1, None]
    assert (tmp_path / "calls").read_text().split() == ["abab", "abcd"] * 3 + ["abcd"] * 4


def test_a_function_that_gives_only_nulls_ends_the_run(tmp_path, capsys):
    file = reward_file(tmp_path, "def reward(prompts, completions, **columns):\n"
                                 "    return [None] * len(completions)\n")
    command = flags(tmp_path, ROWS * 2, f"{file}:reward")
    refused(capsys, ["the last 10 rows got no reward (all null)", "--accept_null"], "score.py", *command)
    assert read_rows(tmp_path / "out") == []
    call("score.py", *command, "--accept_null")
    assert [row["ref_rewards"] for row in read_rows(tmp_path / "out")] == [[None] * 3] * 14


def test_the_last_line_says_what_was_made_and_what_is_odd_about_it(tmp_path, capsys):
    """The first row's two known references tie; the second row's three and its sample do not; and the third
    row's only reference has no others.
    """
    file = reward_file(tmp_path, "def reward(prompts, completions, **columns):\n"
                                 "    return [{'n': None}.get(c, len(c)) for c in completions]\n")
    table = []
    for texts in (["a", "b", "n"], ["aa", "aa", "aaa"], ["a"]):
        cut = [{"text": text, "finish_reason": "length"} for text in texts]
        table.append({"prompt": "p", "ref_completions": cut, "samples": [{"text": "n"}]})
    table[1]["samples"] = [{"text": "aa", "finish_reason": "stop"}]
    score(tmp_path, table, f"{file}:reward")
    assert capsys.readouterr().out.strip().endswith(
        "3 rows; 6 ref_rewards, mean 1.6667, and 1 null; 1 sample_rewards, mean 2.0000, and 2 null; "
        "70% of the completions ran out of tokens; 20% of the rewards tie with all (other) references of "
        "their prompt")


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


ASSISTANT, USER = {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}


@pytest.mark.parametrize("answer", (
    [], ["a"], [USER], [ASSISTANT, ASSISTANT], [USER, ASSISTANT], {"text": "a"}, [{"role": "assistant"}]))
def test_an_answer_that_training_refuses_is_not_scored(tmp_path, capsys, answer):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": [USER], "completion": answer}])
    (tmp_path / "reward.py").write_text("def one(prompts, completions, **columns):\n    return [1.0]\n")
    refused(capsys, ["rows.jsonl:1", "completion"], "score.py", f"--data={data}",
            f"--out={tmp_path / 'out'}", f"--reward={tmp_path / 'reward.py'}:one")


def test_an_answer_in_text_parts_is_judged_by_their_text():
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    assert text_of([{"role": "assistant", "content": parts}]) == "42"
