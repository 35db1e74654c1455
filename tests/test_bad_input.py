"""A user's mistake ends in one line that names the place and the remedy, with exit code 2, and leaves nothing behind."""
import copy
import json
import shutil
import sys

import pytest
import torch
import transformers

import dataset
import generate_refs
import models
import rows
import score
import train
from conftest import read_rows, write_rows

GOOD = {"prompt": "p", "ref_rewards": [0.5, 1.0], "ref_completions": [
    {"text": "a", "token_ids": [66], "finish_reason": "length"}, {"text": "b", "token_ids": [67], "finish_reason": "length"}]}


@pytest.fixture(scope="module")
def loaded(tiny):
    model, tokenizer = models.load_model(tiny, torch.float32, "cpu"), models.load_tokenizer(tiny)
    for completion in GOOD["ref_completions"]:
        completion["token_ids"] = tokenizer(completion["text"], add_special_tokens=False).input_ids
    return tokenizer, model


def refused(call, capsys, *says):
    """The call ends in exit code 2 and one line of error that says all this."""
    with pytest.raises(SystemExit) as end:
        call()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    for text in says:
        assert text in lines[0], lines[0]


@pytest.mark.parametrize("content, says", (
    (b'{"prompt": "a"}\n{"prompt": "b"\n', (".jsonl:2", "not JSON")),
    (b'{"prompt": "a"}\n\n{"text": "b"}\n', (".jsonl:3", "no 'prompt'", "text")),
    (b'{"prompt": null}\n', (".jsonl:1", "no 'prompt'")),
    (b'["prompt"]\n', (".jsonl:1", "JSON object")),
    (b'{"prompt": "\xff"}\n', (".jsonl:1", "UTF-8")),
    (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', (".jsonl:2", ".jsonl:1", "unique")),
    (b'{"prompt": "a", "id": [1]}\n', (".jsonl:1", "id must be")),
    (b'{"prompt": "a", "id": "1"}\n{"prompt": "b", "id": 1}\n', (".jsonl:2", "unique")),  # they would be one in a file
    (b'{"prompt": "a", "id": 1.5}\n', (".jsonl:1", "id must be")),
    ('{"prompt": "a"}\n'.encode("utf-16"), (".jsonl:1", "not JSON")),
    (b'{"prompt": "a"} {"prompt": "b"}\n', (".jsonl:1", "not JSON")),
    (b'{"prompt": ' + b"[" * 100_000 + b"\n", (".jsonl:1", "not JSON")),  # nested deeper than a parser can follow
    (b"", ("holds no rows",)), (b"\n\n", ("holds no rows",)), (None, ("no such JSONL file",))))
def test_rows(tmp_path, capsys, content, says):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    refused(lambda: rows.read(path, require=("prompt",)), capsys, "data", *says)


def test_truncated_gzip(tmp_path, capsys):
    import gzip
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-20])
    refused(lambda: rows.read(path), capsys, "data.jsonl.gz", "cannot be read")


@pytest.mark.parametrize("change, options, says", (
    ({"prompt": ""}, {}, ("prompt must be",)),
    ({"prompt": [{"role": "user"}]}, {}, ("prompt must be",)),
    ({"prompt": [{"role": "user", "content": "hi"}]}, {}, ("chat template",)),
    ({"ref_rewards": [0.5]}, {}, ("as many ref_rewards",)),
    ({"ref_rewards": None}, {}, ("ref_rewards",)),
    ({"ref_rewards": [0.5, float("nan")]}, {}, ("finite numbers", "nan")),
    ({"ref_rewards": [0.5, float("inf")]}, {}, ("finite numbers", "inf")),
    ({"ref_rewards": [0.5, "1"]}, {}, ("finite numbers",)),
    ({"ref_rewards": [0.5, 10 ** 400]}, {}, ("finite numbers",)), ({"ref_rewards": [0.5, [None]]}, {}, ("finite numbers",)),
    ({"ref_rewards": [0.5, True]}, {}, ("finite numbers", "True")), ({"ref_rewards": "high"}, {}, ("must be a list",)),
    ({"prompt": 7}, {}, ("prompt must be",)), ({"prompt": []}, {}, ("prompt must be",)),
    ({"prompt": [{"role": "user", "content": None}]}, {}, ("prompt must be",)),
    ({"ref_completions": {"text": "a"}}, {}, ("ref_completions",)),
    ({"ref_completions": [{"text": "", "token_ids": [-1]}] * 2}, {}, ("vocabulary",)),
    ({"ref_completions": [{"text": "", "token_ids": ["a"]}] * 2}, {}, ("token_ids",)),
    ({"completion": 7, "reward": 1}, {"train_on": "completion"}, ("completion",)),
    ({"completion": "a", "reward": [1]}, {"train_on": "completion"}, ("finite numbers",)),
    ({}, {"train_on": "samples"}, ("samples", "generate_refs.py")),
    ({}, {"num_ref_rewards": 3}, ("has 2 ref_rewards", "--num_ref_rewards=3")),
    ({"ref_completions": ["a", "b"]}, {}, ("token_ids",)),
    ({"ref_completions": [{"text": "", "token_ids": []}] * 2}, {}, ("are empty",)),
    ({"ref_completions": [{"text": "", "token_ids": [5000]}] * 2}, {}, ("vocabulary",)),
    ({"ref_completions": [{"text": "z", "token_ids": [66]}] * 2}, {}, ("tokenizer", "sample again")),
    ({"prompt": "p" * 80}, {}, ("context holds 64", "--max_length")),
    ({"prompt": "p" * 80}, {"max_length": 64}, ("nothing is left",)),
    ({}, {"train_on": "chosen_rejected"}, ("no 'chosen'", "--train_on")),
    ({"chosen": "a", "rejected": "b", "chosen_reward": "high"}, {"train_on": "chosen_rejected"}, ("finite numbers",)),
    ({"completion": ""}, {"train_on": "completion"}, ("no 'completion'",)),
    ({"ref_rewards": [None, None]}, {}, ("nothing is left",))))
def test_training_rows(loaded, tmp_path, capsys, change, options, says):
    tokenizer, model = loaded
    rows_of = [{**GOOD, **change}]
    data = write_rows(tmp_path / "data.jsonl", rows_of)
    place = () if "nothing is left" in says else ("data.jsonl:1",) if "chat template" not in says else ()
    refused(lambda: dataset.build(data, tokenizer, model, **{"train_on": "refs"} | options), capsys, *place, *says)


def test_of_many_bad_rows_the_first_is_named(loaded, tmp_path, capsys):
    good, bad = {"prompt": "p", "completion": "a", "reward": 1, "ref_rewards": [0.5]}, {"prompt": "p", "ref_rewards": [1]}
    data = write_rows(tmp_path / "data.jsonl", [good] * 300 + [bad] * 40)
    refused(lambda: dataset.build(data, *loaded, "completion"), capsys, "data.jsonl:301", "no 'completion'")


def call(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
    return script.main


@pytest.mark.parametrize("flags, says", (
    (["--model=/no/such/model"], ("/no/such/model", "Hugging Face folder")),
    (["--temperature=-1"], ("--temperature",)), (["--top_p=0"], ("--top_p",)), (["--num_refs=0"], ("--num_refs",))))
def test_generate_flags(tiny, tmp_path, capsys, monkeypatch, flags, says):
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}])
    refused(call(generate_refs, monkeypatch, f"--model={tiny}", f"--data={data}", f"--out={tmp_path / 'out'}", *flags),
            capsys, *says)
    assert not (tmp_path / "out").exists()


def test_a_model_without_an_end_token(loaded, tmp_path, capsys):
    tokenizer, model = map(copy.deepcopy, loaded)
    tokenizer.eos_token = tokenizer.pad_token = None
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "p", "completion": "a", "reward": 1, "ref_rewards": [0.5]}])
    built = dataset.build(data, tokenizer, model, "completion")  # the model's own end token serves, and no padding token
    assert built["tokens"][-1] == model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    refused(lambda: dataset.build(data, tokenizer, model, "completion"), capsys, "end token", "eos_token_id")


def test_a_model_with_a_recurrent_state_cannot_be_sampled(tiny, tmp_path, capsys, monkeypatch):
    transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(tmp_path / "mamba")
    models.load_tokenizer(tiny).save_pretrained(tmp_path / "mamba")
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}])
    refused(call(generate_refs, monkeypatch, f"--model={tmp_path / 'mamba'}", f"--data={data}", f"--out={tmp_path / 'out'}"),
            capsys, "mamba", "recurrent state", "--engine=vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("messages", ([{"role": "wizard", "content": "a"}], [{"role": "user", "content": "a"}] * 2))
def test_a_chat_template_that_refuses_the_messages(loaded, tmp_path, capsys, messages):
    tokenizer, model = loaded
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] or (m.role == 'user') != (loop.index0 % 2 == 0) "
        "%}{{ raise_exception('roles must alternate user and assistant') }}{% endif %}{{ m.content }}{% endfor %}")
    data = write_rows(tmp_path / "data.jsonl", [{**GOOD, "prompt": messages}])
    refused(lambda: dataset.build(data, tokenizer, model, "refs"), capsys, "data.jsonl:1", "roles must alternate")


def test_a_full_disk_and_a_folder_that_cannot_be_written(tiny, rewarded, tmp_path, capsys, monkeypatch):
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}])
    (tmp_path / "file").write_text("mine")
    for script, more in ((generate_refs, [f"--model={tiny}"]), (score, ["--reward=tests"])):
        source = data if script is generate_refs else rewarded
        for out, says in (("/proc/nowhere", ("/proc/nowhere",)), (tmp_path / "file" / "out", ("file",)),
                          (tmp_path / "file", ("is a file",))):
            refused(call(script, monkeypatch, *more, f"--data={source}", f"--out={out}"), capsys, *says)
    refused(call(train, monkeypatch, f"--model={tiny}", f"--data={rewarded}", "--out=/proc/nowhere"), capsys, "/proc/nowhere")
    assert (tmp_path / "file").read_text() == "mine"


def test_generate_prompt_over_the_context(tiny, tmp_path, capsys, monkeypatch):
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}, {"prompt": "a" * 64}])
    refused(call(generate_refs, monkeypatch, f"--model={tiny}", f"--data={data}", f"--out={tmp_path / 'out'}"), capsys,
            "data.jsonl:2", "64 tokens", "context holds 64")
    assert not list((tmp_path / "out").glob("part-*")) or not (tmp_path / "out" / "part-00000.jsonl").read_bytes()


def test_changed_settings_are_refused(tiny, tmp_path, capsys, monkeypatch):
    data, out = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}]), tmp_path / "out"
    flags = f"--model={tiny}", f"--data={data}", f"--out={out}", "--num_refs=2", "--max_new_tokens=4"
    call(generate_refs, monkeypatch, *flags)()
    before = (out / "part-00000.jsonl").read_bytes()
    refused(call(generate_refs, monkeypatch, *flags, "--seed=1"), capsys, "seed (0, now 1)", "another --out")
    for changed in ([{"prompt": "b"}, {"prompt": "a"}], [{"prompt": "b"}]):
        write_rows(data, changed)
        refused(call(generate_refs, monkeypatch, *flags), capsys, "rows (")
    assert (out / "part-00000.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ("model.safetensors", "tokenizer.json"))
def test_a_model_that_was_changed_is_refused_and_a_copy_of_it_is_not(tiny, tmp_path, capsys, monkeypatch, name):
    data, model = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}]), tmp_path / "model"
    flags = f"--model={model}", f"--data={data}", f"--out={tmp_path / 'out'}", "--num_refs=2", "--max_new_tokens=4"
    for _ in range(2):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(tiny, model, copy_function=shutil.copy)  # with times of its own
        call(generate_refs, monkeypatch, *flags)()
    content = (model / name).read_bytes()
    (model / name).write_bytes(content + b" " if name.endswith("json") else content[:-1] + bytes([content[-1] ^ 1]))
    refused(call(generate_refs, monkeypatch, *flags), capsys, "another files (", "another --out")


def test_a_reward_that_was_changed_is_refused(tmp_path, capsys, monkeypatch):
    data, file = write_rows(tmp_path / "data.jsonl", [{**GOOD, "ref_rewards": None}]), tmp_path / "r.py"
    flags = f"--data={data}", f"--out={tmp_path / 'out'}", f"--reward={file}:f"
    file.write_text("def f(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    call(score, monkeypatch, *flags)()
    file.write_text(file.read_text().replace("1.0", "2.0"))
    refused(call(score, monkeypatch, *flags), capsys, "another code (", "another --out")


@pytest.mark.parametrize("reward, row, says", (
    ("test", {}, ("--reward must be",)), ("nofile.py:f", {}, ("nofile.py",)),
    ("tests --cpu=-1", {"test": "def check(c): pass", "entry_point": "f"}, ("--cpu must be above 0",)),
    ("tests", {}, ("data.jsonl:1", "'test'")), ("model:/no/model", {}, ("/no/model",)),
    ("tests", {"ref_completions": None}, ("data.jsonl:1", "no completions")),
    ("tests", {"ref_completions": "text", "test": "def check(c): pass", "entry_point": "f"}, ("data.jsonl:1", "must be a list"))))
def test_score(tmp_path, capsys, monkeypatch, reward, row, says):
    data = write_rows(tmp_path / "data.jsonl", [{**GOOD, "ref_rewards": None, **row}])
    refused(call(score, monkeypatch, f"--data={data}", f"--out={tmp_path / 'out'}", *f"--reward={reward}".split()), capsys, *says)


@pytest.mark.parametrize("flags, says", (
    (["--beta=0"], ("--beta",)), (["--learnig_rate=1"], ("did you mean --learning_rate",)),
    (["--side=chosen"], ("--side",)), (["--shard"], ("torchrun",)), (["--beta=x"], ("--beta", "float")), (["--loss=dpo"], ("--loss=dpo needs pairs", "best_worst")), (["--epochs=0"], ("--epochs",)),
    (["--loss=dpo", "--train_on=best_worst", "--min_reward=1"], ("--min_reward", "drop it")),  # it would part the pairs
    (["--num_candidates=-1"], ("--num_candidates must not be negative",)),
    (["--data={tied}"], ("tied.jsonl: no completion's reward differs", "look at the reward")),
    (["--out={file}"], ("is a file",)), (["--data={empty}"], ("holds no rows",)), (["--model=/no/model"], ("/no/model",))))
def test_train_flags(tiny, rewarded, tmp_path, capsys, monkeypatch, flags, says):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    write_rows(tmp_path / "tied.jsonl", [row | {"ref_rewards": [0.3] * len(row["ref_rewards"])} for row in read_rows(rewarded)])
    flags = [flag.format(file=tmp_path / "file", empty=tmp_path / "empty.jsonl", tied=tmp_path / "tied.jsonl") for flag in flags]
    refused(call(train, monkeypatch, f"--model={tiny}", f"--data={rewarded}", f"--out={tmp_path / 'out'}",
                 f"--cache={tmp_path / 'cache'}", *flags), capsys, *says)
    assert not (tmp_path / "out").exists()


def test_a_second_run_in_the_same_folder_is_refused(tiny, rewarded, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    rows.write_json(out / "run.json", {"config": {"beta": 0.5}, "finished": False})
    flags = f"--model={tiny}", f"--data={rewarded}", f"--out={out}"
    refused(call(train, monkeypatch, *flags), capsys, "holds a run already", "--resume")
    refused(call(train, monkeypatch, *flags, "--resume"), capsys, "--beta=0.5, now 0.1")
    assert json.loads((out / "run.json").read_text())["config"] == {"beta": 0.5}
    with (out / "part-00000.jsonl").open("wb"):
        held = rows.open_part(out / "part-00000.jsonl")
        refused(lambda: rows.open_part(out / "part-00000.jsonl"), capsys, "another process")
        held.close()
