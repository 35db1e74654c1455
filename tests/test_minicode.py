"""data/minicode/prepare.py: the rows are sound, the tokenizers agree, and transformers loads the model.

    python -m pytest -q tests/test_minicode.py
"""
import collections
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Process, refused

SCRIPT = str(Path(__file__).resolve().parents[1] / "data" / "minicode" / "prepare.py")
TINY = ["--num_train=24", "--num_test=12", "--corpus_size=400", "--vocab_size=320", "--width=32",
        "--layers=1", "--steps=12"]


def rows(folder, part):
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


def share_passed(row, program):
    """Share of the row's asserts that hold for a program, run in this process."""
    scope, passed = {}, 0
    try:
        exec(row["preamble"] + program, scope)
    except SyntaxError:
        return 0.0
    head, *asserts = row["test"].splitlines()
    for line in asserts:
        exec(f"{head}\n{line}\n", scope)
        try:
            scope["check"](scope[row["entry_point"]])
            passed += 1
        except Exception:
            pass
    return passed / len(asserts)


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("minicode_prepare", SCRIPT)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture(scope="module")
def prepare(module):
    def prepare(out, *flags):  # in this process: importing torch and transformers takes longer than the work
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [SCRIPT, f"--out={out}", *TINY, *flags])
            module.main()
    return prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prepare):
    out = tmp_path_factory.mktemp("minicode")
    prepare(out)
    return out


def test_same_seed_same_bytes_and_a_rerun_reuses(folder, tmp_path, prepare, capsys):
    prepare(tmp_path)
    names = ["train.jsonl", "test.jsonl", "model/minicode.tiktoken", "model/tokenizer.json",
             "model/model.safetensors"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert "reused" not in capsys.readouterr().out
    prepare(tmp_path)
    assert "reused" in capsys.readouterr().out
    prepare(tmp_path, "--seed=1")  # other settings are made anew, the vocabulary included
    for name in names:
        assert (tmp_path / name).read_bytes() != (folder / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path)) == ["model", "test.jsonl", "train.jsonl"]


def test_a_killed_run_leaves_the_old_files_and_the_next_one_completes(folder, tmp_path, prepare):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    process = Process(SCRIPT, f"--out={tmp_path}", *TINY, "--seed=1", "--steps=100000")
    while not (tmp_path / ".model.new" / "tokenizer.json").exists():
        assert process.running()
        time.sleep(0.05)
    process.kill()
    for name in "train.jsonl", "test.jsonl", "model/model.safetensors":
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    prepare(tmp_path, "--seed=1")
    assert sorted(os.listdir(tmp_path)) == ["model", "test.jsonl", "train.jsonl"]
    assert json.loads((tmp_path / "model" / "recipe.json").read_text())["seed"] == 1


def test_seed_0_gives_the_rows_that_published_figures_were_made_with(module):
    train, test, taken = module.make_rows(random.Random(0), 320, 128, 12)
    corpus = module.make_corpus(random.Random(0), 100, 0.3, taken)
    text = json.dumps([train, test, corpus])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "532a59e18a3e9b5c"


def test_bad_flags_are_named(tmp_path, capsys):
    cases = {"--width=40": "multiple of 32", "--vocab_size=700": "259 to 600", "--step=3": "--step=3"}
    for flag, said in cases.items():
        refused(capsys, [said], SCRIPT, f"--out={tmp_path}", flag)


def test_rows_are_complete_and_disjoint(folder):
    train, test = rows(folder, "train"), rows(folder, "test")
    assert (len(train), len(test)) == (24, 12)
    for row in train + test:
        assert row["prompt"].endswith("\n") and row["entry_point"] == "f" and row["fenced"] is False
        assert row["test"].startswith("def check(candidate):\n    assert candidate(")
        assert row["test"].count("\n    assert candidate(") >= 10
    for field in "id", "prompt", "chosen":
        assert len({row[field] for row in train + test}) == len(train + test), field


def test_corpus_holds_no_specification_of_the_rows(module):
    rng = random.Random(3)
    train, test, taken = module.make_rows(rng, 40, 20, 12)
    corpus = module.make_corpus(rng, 3000, 0.0, taken)  # without mistakes, so that programs can be compared
    assert not {row["chosen"] for row in train + test} & {code for _, code in corpus}
    assert not {row["prompt"] for row in train + test} & {text for text, _ in corpus}


def test_the_harder_variant_asks_for_what_its_corpus_hardly_holds(module):
    train, test, taken = module.make_rows(random.Random(3), 30, 10, 12, only_hard=True)
    assert {row["difficulty"] for row in train + test} == {"hard"}
    counts = {}
    for share in (1.0, 0.1, 0.0):
        corpus = module.make_corpus(random.Random(4), 2000, 0.0, taken, share)
        # a filter and a map: `for x in` something, with a condition, of something else than x
        counts[share] = sum(" if " in code and not re.search(r"[\[(]x for", code) for _, code in corpus)
    assert counts[0.0] == 0 and 0 < counts[0.1] < counts[1.0] / 4, counts


def test_tests_accept_the_solution_and_tell_it_from_others(module):
    rng = random.Random(5)
    train, test, _ = module.make_rows(rng, 100, 50, 12)
    scores = collections.defaultdict(list)
    for row in train + test:
        assert share_passed(row, row["chosen"]) == 1
        head = row["chosen"].split("return")[0]
        for answer in "None", "0", "True", "[]", "''":
            assert share_passed(row, f"{head}return {answer}") < 1, (row, answer)
        scores[row["difficulty"]].append(row)
        # a program for another specification with the same arguments fails somewhere
        other = next(r for r in train + test if r is not row and r["chosen"].split("return")[0] == head)
        assert share_passed(row, other["chosen"]) < 1, (row["chosen"], other["chosen"])
    assert set(scores) == {"easy", "medium", "hard"}
    rejected = [share_passed(row, row["rejected"]) for row in train + test]
    assert all(row["rejected"] != row["chosen"] for row in train + test)
    assert sum(r < 1 for r in rejected) > 0.9 * len(rejected) and len(set(rejected)) > 3


def test_weak_programs_are_right_sometimes_and_partly_right_often(module):
    rng, shares = random.Random(7), []
    while len(shares) < 600:
        spec = module.draw_spec(rng)
        if row := module.make_row(spec, rng, 12):
            try:
                shares.append(share_passed(row, module.weak_program(spec, rng, 0.3)))
            except SyntaxError:
                shares.append(0)
    assert 0.25 < sum(s == 1 for s in shares) / len(shares) < 0.5
    assert sum(0 < s < 1 for s in shares) / len(shares) > 0.2


def test_fast_tokenizer_equals_tiktoken(folder, module):
    ranks = load_tiktoken_bpe(str(folder / "model" / "minicode.tiktoken"))
    hf = AutoTokenizer.from_pretrained(folder / "model")
    special = {name: len(ranks) + i for i, name in enumerate(["<bos>", "<eos>", "<pad>"])}
    encoding = tiktoken.Encoding(
        "minicode", pat_str=module.PATTERN, mergeable_ranks=ranks, special_tokens=special)
    assert [hf.bos_token_id, hf.eos_token_id, hf.pad_token_id] == list(special.values())
    assert len(hf) == encoding.n_vocab
    rng = random.Random(0)
    corpus = module.make_corpus(rng, 2000, 0.3, set())
    texts = ["", "\n\n  x\t1234", "na\u00efve \u65e5\u672c \U0001f600"]
    texts += [prompt + code for prompt, code in corpus]
    for row in rows(folder, "train") + rows(folder, "test"):
        texts += [row["prompt"], row["chosen"], row["test"]]
    for text in texts:
        ids = hf(text, add_special_tokens=False)["input_ids"]
        assert ids == encoding.encode_ordinary(text), text
        assert hf.decode(ids) == encoding.decode(ids) == text
    # the boundary of prompt and completion is one of tokens too, and <bos> comes first, once
    encode = encoding.encode_ordinary
    for prompt, code in corpus[:200]:
        assert encode(prompt) + encode(code) == encode(prompt + code)
        assert hf(prompt)["input_ids"] == [hf.bos_token_id, *encode(prompt)]


def test_plain_transformers_loads_and_generates(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = tokenizer(rows(folder, "test")[0]["prompt"], return_tensors="pt")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    new = model.generate(**ids, min_new_tokens=4, max_new_tokens=4)[0, ids["input_ids"].shape[1]:]
    assert len(new) == 4


@pytest.mark.slow
def test_model_learns_to_stop(prepare, tmp_path):
    """Guards that its programs begin as asked and end by themselves; the only training beyond a few steps."""
    prepare(tmp_path, "--steps=150", "--width=64", "--learning_rate=0.01")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    prompts, stopped, shaped = rows(tmp_path, "test")[:8], 0, 0
    for row in prompts:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        new = model.generate(**ids)[0, ids["input_ids"].shape[1]:]  # the folder's own generation_config
        stopped += new[-1].item() == tokenizer.eos_token_id
        shaped += tokenizer.decode(new).startswith("def f(")
    assert stopped >= 0.75 * len(prompts) and shaped >= 0.75 * len(prompts)
