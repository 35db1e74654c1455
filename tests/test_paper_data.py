"""data/*/prepare.py: files of the hub's columns become rows; what is dropped; those rows in the project's
stages.
"""
import gzip
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from conftest import MATERIAL, ROOT, call, make_tokenizer, read_rows, run, write_rows


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("name, train, test", [("magpie_air", "train-00000-of-00001", "test-00000-of-00001"),
                                               ("ultrafeedback", "train_prefs-0", "test_prefs-0")])
def test_chat_pairs_of_at_most_2048_tokens_become_rows(tiny, tmp_path, name, train, test):
    answers = ("yes", "no"), ("y" * 2048, "n"), ("y" * 2049, "n"), ("y", "n" * 2049)
    table = [{"instruction": f"q{i}", "chosen": chat(f"q{i}", a), "rejected": chat(f"q{i}", b), "other": 1}
             for i, (a, b) in enumerate(answers)]
    source = tmp_path / "hub"
    source.mkdir()
    write_rows(source / f"{train}.jsonl", table)
    (source / f"{test}.json").write_text(json.dumps(table[:1]))
    if name == "ultrafeedback":
        write_rows(source / "train_sft-0.jsonl", table[:1] * 9)  # another split
    done = run(f"data/{name}/prepare.py", f"--source={source}", f"--out={tmp_path}", f"--tokenizer={tiny}")
    assert "4 rows; 2 dropped, a response over 2048 tokens; 2 kept" in done.stdout  # one token a byte
    rows = read_rows(tmp_path / "train.jsonl")
    assert rows[0] == {"id": 0, "prompt": [{"role": "user", "content": "q0"}],
                       "chosen": [{"role": "assistant", "content": "yes"}],
                       "rejected": [{"role": "assistant", "content": "no"}]}
    assert [row["id"] for row in rows] == [0, 1] and len(read_rows(tmp_path / "test.jsonl")) == 1


BROKEN = {  # pairs that are none: why they are dropped
    "no prompt, or two different ones": [
        {"chosen": chat("q", "a"), "rejected": chat("r", "b")},
        {"chosen": chat("q", "a")[1:], "rejected": chat("q", "b")[1:]},
        {"chosen": [{"role": "system", "content": "s"}, *chat("q", "a")], "rejected": chat("q", "b")}],
    "not ending in an answer of the assistant": [
        {"chosen": chat("q", "a") + chat("and?", "")[:1], "rejected": chat("q", "a") + chat("so?", "")[:1]},
        {"chosen": chat("q", "a"), "rejected": chat("q", "")[:1] + chat("b", "")[:1]}]}


@pytest.mark.parametrize("reason", BROKEN)
def test_pairs_that_are_no_pairs_are_dropped_and_counted(tmp_path, reason):
    table = [{"chosen": chat("q", "a"), "rejected": chat("q", "b")}, *BROKEN[reason]]
    file = write_rows(tmp_path / "train.jsonl", table)
    done = run("data/magpie_air/prepare.py", f"--source={file}", f"--out={tmp_path / 'out'}", "--tokenizer=")
    assert f"{len(table) - 1} dropped, {reason}; 1 kept" in done.stdout


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path):
    row = {"chosen": chat("q \ud83d", "a"), "rejected": chat("q \ud83d", "b")}
    file = write_rows(tmp_path / "train.jsonl", [row])
    run("data/magpie_air/prepare.py", f"--source={file}", f"--out={tmp_path / 'out'}", "--tokenizer=")
    assert read_rows(tmp_path / "out/train.jsonl")[0]["prompt"] == row["chosen"][:1]


def test_a_missing_column_is_named(tmp_path):
    table = [{"chosen": chat("q", "a"), "rejected": chat("q", "b")}, {"chosen": 1}]
    file = write_rows(tmp_path / "train.jsonl", table)
    done = run("data/magpie_air/prepare.py", f"--source={file}", f"--out={tmp_path / 'out'}", "--tokenizer=",
               check=False)
    assert done.returncode == 2 and f"{file}:2: has no 'rejected'" in done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name, content, says", (
    ("train.jsonl", b'{"chosen": "text", "rejected": "text"}', "chosen must be a list of {role, content}"),
    ("train.jsonl", b"[1, 2]", "train.jsonl:1: must be a JSON object"),
    ("train.jsonl", b"\xff", "train.jsonl:1: not JSON"),
    ("train.jsonl.gz", b"{}", "train.jsonl.gz:1: not JSON"),
    ("latest.jsonl", b"{}", "with train or test in its name")))
def test_a_broken_source_is_refused_with_file_and_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    done = run("data/magpie_air/prepare.py", f"--source={tmp_path}", f"--out={tmp_path}", "--tokenizer=",
               check=False)
    assert done.returncode == 2 and says in done.stderr, done.stderr


# ---- the authors' reference data ----

TEXTS = ["a", "bb", "", "dddd"]


def reference_row(i, **columns):
    prompt = {"role": "user", "content": f"q{i}"}
    return {"chosen": chat(f"q{i}", "yes"), "rejected": chat(f"q{i}", "no"),
            "chosen_rewards": 0.5, "rejected_rewards": -0.5,
            "ref_completions": [prompt, {"role": "assistant", "content": json.dumps(TEXTS)}],
            "ref_rewards": [0.1, 0.2, 0.3, 0.4], "ref_completions_reward_tokens_len": [1, 2, 0, 4]} | columns


def prepare_reference(tmp_path, source, check=True):
    flags = f"--source={source}", f"--out={tmp_path / 'out'}"
    return run("data/qrpo_reference/prepare.py", *flags, check=check)


def test_reference_data_becomes_rows_that_train_in_every_regime(tiny, tmp_path):
    """Also what is trained on: the text after the prompt, closed by the template, and an end token."""
    model = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}")}))
    other = reference_row(9, ref_completions=reference_row(8)["ref_completions"])
    write_rows(tmp_path / "train-0.jsonl", [reference_row(0), other, reference_row(1)])
    (tmp_path / "test.json").write_text(json.dumps([reference_row(2)]))
    done = prepare_reference(tmp_path, tmp_path)
    assert "3 rows; 1 dropped, references to another prompt; 2 kept" in done.stdout
    rows = read_rows(tmp_path / "out/train.jsonl")
    assert [row["id"] for row in rows] == [0, 2] and len(read_rows(tmp_path / "out/test.jsonl")) == 1
    assert rows[0] == {
        "id": 0, "prompt": [{"role": "user", "content": "q0"}],
        "chosen": [{"role": "assistant", "content": "yes"}], "chosen_reward": 0.5,
        "rejected": [{"role": "assistant", "content": "no"}], "rejected_reward": -0.5,
        "ref_completions": [{"text": text} for text in TEXTS],
        "ref_rewards": [0.1, 0.2, 0.3, 0.4], "made_by": {"ref_completions": {
            "model": tmp_path.name, "temperature": 1.0, "top_p": 1.0, "from_text": True}}}
    texts = {"chosen_rejected": ["yes", "no"], "best_worst": ["", "a"], "random_pairs": ["bb", "a"]}
    for regime, expected in texts.items():
        script = call("train.py", f"--model={model}", f"--data={tmp_path / 'out/train.jsonl'}",
                      f"--eval_data={tmp_path / 'out/test.jsonl'}", f"--out={tmp_path / regime}",
                      f"--train_on={regime}", f"--num_candidates={3 if regime == 'best_worst' else 2}",
                      "--batch_size=2")
        data, tokenizer = script["train_data"], script["tokenizer"]
        found = [tokenizer.decode(data.tokens[start:start + n]) for start, n in zip(data.starts, data.lens)]
        assert found[:2] == [f"[q0][{text}]<eos>" for text in expected]
        assert data.ref_rewards.shape == (2, 4)


def test_reference_data_may_be_in_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = [reference_row(i) for i in range(250)]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "train-00000-of-00001.parquet")
    prepare_reference(tmp_path, tmp_path)
    rows = read_rows(tmp_path / "out/train.jsonl")
    assert len(rows) == 250 and rows[249]["prompt"][0]["content"] == "q249"
    assert rows[3]["ref_completions"] == [{"text": text} for text in TEXTS]
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 cut off")
    done = prepare_reference(tmp_path, tmp_path, check=False)
    assert done.returncode == 2 and "parquet, row 0: not Parquet" in done.stderr


def test_reference_data_by_name_is_read_with_datasets(tmp_path):
    """By the name of a folder here, as there is no hub; its split is called train_prefs."""
    pytest.importorskip("datasets")
    write_rows(tmp_path / "train.jsonl", [reference_row(0), reference_row(1)])
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n"
                                        "  - split: train_prefs\n    path: train.jsonl\n---\n")
    sys.path.insert(0, str(ROOT / "data"))
    import source
    (at, first), _ = source.read_hub(str(tmp_path), None, "train")
    assert at.endswith("train_prefs, row 0") and first["ref_rewards"] == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("change, says", (
    ({"ref_rewards": None}, "has no 'ref_rewards'"),
    ({"ref_rewards": [0.1]}, "needs as many ref_rewards"),
    ({"ref_completions": chat("q1", "not JSON")}, "ref_completions is not JSON"),
    ({"ref_completions": chat("q1", "[1, 2, 3, 4]")}, "must be a list of texts"),
    ({"ref_completions": "text"}, "ref_completions must be a list of")))
def test_broken_reference_data_is_refused_with_file_and_row(tmp_path, change, says):
    file = write_rows(tmp_path / "train.jsonl", [reference_row(0), reference_row(1, **change)])
    done = prepare_reference(tmp_path, file, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(errors) == 1
    assert f"{file}:2: " in errors[0] and says in errors[0], errors
    assert not list((tmp_path / "out").iterdir())


def test_a_reference_dataset_that_is_nowhere_is_refused(tmp_path):
    done = run("data/qrpo_reference/prepare.py", f"--out={tmp_path}", check=False)
    assert done.returncode == 2 and "--source is missing" in done.stderr
    done = prepare_reference(tmp_path, "nobody/nothing", check=False)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "--source" in done.stderr


def test_stories_differ_and_their_reward_counts_words(tmp_path):
    run("data/stories/prepare.py", f"--out={tmp_path}")
    train, test = (read_rows(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    assert len({row["prompt"] for row in train + test}) == len(train) + len(test) == 448
    run("score.py", "--data=" + str(write_rows(tmp_path / "told.jsonl", [
        {"prompt": "Tim", "completion": "was SAD. He smiled and was happy, happily!"},
        {"prompt": "Tim", "completion": "was unhappy and glade"}])), f"--out={tmp_path / 'scored'}",
        f"--reward={ROOT / 'data/stories/reward.py'}:happy")
    assert [row["reward"] for row in read_rows(tmp_path / "scored")] == [2, 0]


def problem(i, asserts, answer="return x"):
    return {"task_id": f"t{i}", "difficulty": "Easy", "problem_description": "Add.",
            "entry_point": "Solution().f",
            "starter_code": "class Solution:\n    def f(self, x):\n        ",
            "prompt": "import math\ndef help(a):\n    b = a\n",
            "completion": f"class Solution:\n    def f(self, x):\n        {answer}\n",
            "test": "def check(candidate):\n" + "    assert candidate(1) == 1\n" * asserts}


def test_leetcode_keeps_20_tests_and_2048_tokens_and_says_what_runs_before(tiny, tmp_path):
    table = [problem(0, 20), problem(1, 19), problem(2, 20, "x" * 2000)]
    done = run("data/leetcode/prepare.py", f"--source={write_rows(tmp_path / 'x-train.jsonl', table)}",
               f"--out={tmp_path}", f"--tokenizer={tiny}")
    assert "3 rows; 1 dropped, fewer than 20 tests; 1 dropped, over 2048 tokens; 1 kept" in done.stdout
    row, = read_rows(tmp_path / "train.jsonl")
    text = row["prompt"][0]["content"]
    assert "import math\ndef help(a):\n```" in text and "b = a" not in text and "import whatever else" in text
    assert row["preamble"] == table[0]["prompt"]
    assert row["completion"] == f"```python\n{table[0]['completion']}```"


def test_leetcode_canonical_solutions_get_full_marks(tmp_path):
    run("data/leetcode/prepare.py", f"--source={MATERIAL / 'leetcode'}", f"--out={tmp_path}", "--tokenizer=")
    rows = read_rows(tmp_path / "test.jsonl")
    assert len(rows) == 224  # 228, of which 4 have fewer than 20 tests
    assert not (tmp_path / "train.jsonl").exists()
    few = sorted(rows, key=lambda row: len(row["test"]))[:3]
    few.append({**few[0], "id": "wrong", "completion": few[0]["completion"].replace("return", "return 1,")})
    run("score.py", f"--data={write_rows(tmp_path / 'few.jsonl', few)}", f"--out={tmp_path / 'out'}",
        "--reward=tests")
    rewards = {row["id"]: row["reward"] for row in read_rows(tmp_path / "out")}
    assert rewards.pop("wrong") == 0 and set(rewards.values()) == {1.0}


def test_the_reward_of_gsm8k_finds_the_final_number():
    spec = importlib.util.spec_from_file_location("reward", ROOT / "data/gsm8k/reward.py")
    reward = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reward)
    texts = ["so 3 + 4 = 7\n#### 7", "#### 1,007.0 eggs, not 7", "It is -7, no, 7", "none", "#### none, 7",
             "10-3", "is -3", "(a)42", "1)-2"]
    assert [reward.final_number(t) for t in texts] == [7, 1007, 7, None, 7, 3, -3, 42, 2]
    assert reward.correct(["p"], ["none"], answer=[None]) == [0]
    completions = ["7", [{"role": "assistant", "content": "#### 8"}]]
    assert reward.correct(["p"] * 2, completions, answer=[7.0, 7.0]) == [1, 0]


def test_gsm8k_model_answers_are_offline_data(tiny, tmp_path):
    file = MATERIAL / "gsm8k/example_model_solutions.jsonl.gz"
    run("data/gsm8k/prepare.py", f"--source={file}", f"--out={tmp_path}")
    train, test = (read_rows(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    assert (len(train), len(test)) == (4 * 1056, 4 * 263)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    first = json.loads(gzip.open(file).readline())  # of four models, only the last is right
    assert [row["reward"] for row in train[:4]] == [0, 0, 0, 1] and train[0]["answer"] == 18
    assert [row["ref_rewards"] for row in train[2:4]] == [[0, 0, 1], [0, 0, 0]]
    solution = first["175b_verification"]["solution"].replace("\nA: 18", "\n#### 18")
    assert train[3]["completion"] == " " + solution
    # the reward function, on its own, agrees with every verdict of the data set
    bare = [{k: v for k, v in row.items() if k != "reward"} for row in train + test]
    run("score.py", f"--data={write_rows(tmp_path / 'bare.jsonl', bare)}", f"--out={tmp_path / 'scored'}",
        f"--reward={ROOT / 'data/gsm8k/reward.py'}:correct")
    scored = {row["id"]: row["reward"] for row in read_rows(tmp_path / "scored")}
    assert scored == {row["id"]: row["reward"] for row in train + test}


def test_gsm8k_trains_on_model_answers(tmp_path):
    run("data/gsm8k/prepare.py", f"--source={MATERIAL / 'gsm8k/example_model_solutions.jsonl.gz'}",
        f"--out={tmp_path}")
    few = write_rows(tmp_path / "few.jsonl", read_rows(tmp_path / "train.jsonl")[:8])
    run("train.py", f"--model={MATERIAL / 'stories260K'}", f"--data={few}", f"--out={tmp_path / 'run'}",
        "--train_on=completion", "--quantile=exact", "--max_length=512", "--batch_size=2",
        "--learning_rate=1e-4")
    log = read_rows(tmp_path / "run/metrics.jsonl")
    assert len(log) >= 3 and log[-1]["log_ratio"] != 0


def test_questions_of_gsm8k_become_rows(tmp_path):
    run("data/gsm8k/prepare.py", f"--source={MATERIAL / 'gsm8k/test.jsonl'}", f"--out={tmp_path}")
    rows = read_rows(tmp_path / "test.jsonl")
    assert len(rows) == 1319 and rows[0]["answer"] == 18 and rows[0]["completion"].endswith("#### 18")
    assert all(isinstance(row["answer"], float) for row in rows)


# ---- AlpacaEval ----

@pytest.fixture
def chat_model(tiny, tmp_path):
    """The tiny model with a chat template."""
    folder = shutil.copytree(tiny, tmp_path / "chat")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def alpaca_flags(chat_model, tmp_path):
    table = [{"instruction": f"Say {i}", "output": "x", "generator": "gpt", "dataset": "koala"}
             for i in range(5)]
    file = tmp_path / "alpaca_eval.json"
    file.write_text(json.dumps(table))
    return [f"--model={chat_model}", f"--source={file}", f"--out={tmp_path / 'out'}",
            "--generate=--max_new_tokens=9 --temperature=0.6"]


def test_alpaca_eval_from_its_prompts_to_what_its_judge_takes(
        chat_model, alpaca_flags, tmp_path, monkeypatch, capsys):
    """And a second run samples nothing. generate_refs.py runs in this process: a new one takes seconds."""
    def in_this_process(command):
        _, script, *flags = command
        call(script, *flags)
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(subprocess, "run", in_this_process)
    call("paper/alpaca_eval.py", *alpaca_flags)
    answers = json.loads((tmp_path / "out" / "alpaca_eval.json").read_text())
    texts = {row["prompt"][0]["content"]: row["samples"][0]["text"]
             for row in read_rows(tmp_path / "out" / "sampled")}
    assert answers == [{"instruction": f"Say {i}", "output": texts[f"Say {i}"], "dataset": "koala",
                        "generator": str(chat_model)} for i in range(5)]
    assert "5 answers" in capsys.readouterr().out
    call("paper/alpaca_eval.py", *alpaca_flags)
    assert "5 of 5 rows" in capsys.readouterr().out


def test_prompts_of_another_schema_are_refused(tmp_path):
    file = tmp_path / "other.json"
    file.write_text(json.dumps([{"instruction": "a"}, {"prompt": "b"}]))
    done = run("paper/alpaca_eval.py", "--model=m", f"--source={file}", f"--out={tmp_path}", check=False)
    assert done.returncode == 2 and "row 1: has no 'instruction'" in done.stderr
