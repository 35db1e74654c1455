"""A user's mistake ends in one line that names the place and the remedy, with exit code 2."""
import copy
import gzip
import json
import shutil

import pytest

import dataset
import rows
from conftest import call, one_line_of_error, read_rows, refused, write_rows


@pytest.fixture(scope="module")
def good(loaded):
    """A row that can be trained on."""
    completions = []
    for text in "ab":
        ids = loaded[0](text, add_special_tokens=False).input_ids
        completions.append({"text": text, "token_ids": ids, "finish_reason": "length"})
    return {"prompt": "p", "ref_rewards": [0.5, 1.0], "ref_completions": completions}


def build(tmp_path, data, loaded, **choices):
    """The arrays that QRPO trains on."""
    tokenizer, model = loaded
    choices = dataset.Choices(**{"needs_reward": True, "needs_refs": True} | choices)
    return dataset.load(data, tmp_path / "cache", model.name_or_path, tokenizer, model, choices)


# ---- rows ----

@pytest.mark.parametrize("content, says", (
    (b'{"prompt": "a"}\n{"prompt": "b"\n', (".jsonl:2", "not JSON")),
    (b'{"prompt": "a"}\n\n{"text": "b"}\n', (".jsonl:3", "no 'prompt'", "text")),
    (b'{"prompt": null}\n', (".jsonl:1", "no 'prompt'")),
    (b'5\n', (".jsonl:1", "JSON object")),
    (b'{"prompt": "a", "id": true}\n', (".jsonl:1", "id must be")),
    (b'{"prompt": "a", "id": "\\ud83d"}\n', (".jsonl:1", "surrogate")),
    (b'{"prompt": "a", "x": -1e400}\n', (".jsonl:1", "-1e400 is not a JSON number")),
    (b'{"prompt": "a", "x": [[2, 1e999]]}\n', (".jsonl:1", "1e999 is not a JSON number")),
    (b'{"prompt": "\xff"}\n', (".jsonl:1", "UTF-8")),
    (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', (".jsonl:2", ".jsonl:1", "unique")),
    (b'{"prompt": "a", "id": [1]}\n', (".jsonl:1", "id must be")),
    (b'{"prompt": "a", "id": "1"}\n{"prompt": "b", "id": 1}\n', (".jsonl:2", "unique")),  # one in a file
    (b'{"prompt": "a", "id": 1.5}\n', (".jsonl:1", "id must be")),
    ('{"prompt": "a"}\n'.encode("utf-16"), (".jsonl:1", "not JSON")),
    (b'{"prompt": "a"} {"prompt": "b"}\n', (".jsonl:1", "not JSON")),
    (b'{"prompt": ' + b"[" * 100_000 + b"\n", (".jsonl:1", "not JSON")),  # too deeply nested
    (b"", ("holds no rows",)), (b"\n\n", ("holds no rows",)), (None, ("no such JSONL file",))))
def test_rows_that_are_not_rows_are_refused(tmp_path, capsys, content, says):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    one_line_of_error(capsys, ["data", *says], lambda: rows.read(path, require=("prompt",)))


@pytest.mark.parametrize("row, says", (  # as hubs have them
    ({"messages": [1, 2]}, ("prompt = messages[:-1] and completion = messages[-1:]",)),
    ({"chosen": [1, 2], "rejected": [1, 3]}, ("prompt = chosen[:-1], chosen = chosen[-1:] and rejected",)),
    ({"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "b"}, (r"rsplit('\n\nAssistant:', 1)",)),
    ({"conversations": [{"from": "human", "value": "hi"}]}, ("'role': 'user'", "['value']"))))
def test_rows_of_other_formats_are_told_how_to_get_a_prompt(tmp_path, capsys, row, says):
    path = write_rows(tmp_path / "data.jsonl", [row])
    one_line_of_error(capsys, ["data.jsonl:1: has no 'prompt'", *says],
                      lambda: rows.read(path, require=("prompt",)))


@pytest.mark.parametrize("column, value", (
    ("made_by", "gpt-4"), ("made_by", ["gpt-4"]), ("made_by", {"ref_completions": "gpt-4"}), ("chosen", 2),
    ("rejected", False), ("completion", {"text": "a"}), ("prompt", {"role": "user", "content": "hi"}),
    ("samples", 5), ("ref_completions", {"text": "a"}), ("other_completions", "a"), ("ref_rewards", 1.5),
    ("sample_rewards", {"a": 1})))
def test_columns_of_a_users_that_have_our_names_are_refused_by_every_stage(tmp_path, capsys, column, value):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}, {"prompt": "b", column: value}])
    for stage in (rows.read, lambda path: rows.continue_stage(path, tmp_path / "out", {}, lambda row: None)):
        one_line_of_error(capsys, ["data.jsonl:2", f"{column} must be", "rename the column"],
                          lambda: stage(path))
    assert not (tmp_path / "out").exists()


def test_columns_of_ours_that_are_null_are_as_if_they_were_not_there(tmp_path):
    names = ("id", "made_by", "completion", "samples")
    row, = rows.read(write_rows(tmp_path / "data.jsonl", [{"prompt": "a"} | dict.fromkeys(names)]))
    assert row["id"] == 0 and "made_by" not in row


FILES = {  # other formats: the content of a file, and how `datasets` calls it
    "a.parquet": (b"PAR1\x15\x04\x15\x80\x01", "parquet"), "a.jsonl": (b"PAR1\x15\x04", "parquet"),
    "b.jsonl": (b'[{"prompt": "a"}, {"prompt": "b"}]', "json"),
    "c.json": (b'[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n', "json"),
    "d.jsonl.gz": (gzip.compress(b"\n [\n{}]"), "json"),
    "e.csv": (b"prompt,answer\nq,4\n", "csv"), "f.arrow": (b"ARROW1\0\0", "arrow")}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_formats_are_told_the_line_that_converts_them(tmp_path, capsys, name):
    content, kind = FILES[name]
    (tmp_path / name).write_bytes(content)
    says = [f"is {kind}, not JSONL", f"datasets.load_dataset('{kind}', data_files='{tmp_path / name}')"]
    one_line_of_error(capsys, says, lambda: rows.read(tmp_path / name))
    if not name.endswith(".json"):
        one_line_of_error(capsys, says, lambda: rows.read(tmp_path))  # a folder of such files


def test_the_line_that_converts_a_file_does(tmp_path):
    datasets = pytest.importorskip("datasets")
    for kind, content in (("json", '[\n {"prompt": "a"},\n {"prompt": "b"}\n]'), ("csv", "prompt\na\nb\n")):
        (tmp_path / "file").write_text(content)
        table = datasets.load_dataset(kind, data_files=str(tmp_path / "file"))["train"]
        table.to_json(str(tmp_path / "new.jsonl"))
        assert [row["prompt"] for row in rows.read(tmp_path / "new.jsonl")] == ["a", "b"]


def test_compressed_files_are_known_by_what_they_hold(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    (tmp_path / "b.jsonl.gz").write_bytes(b'{"prompt": "b"}\n')
    assert [row["prompt"] for row in rows.read(tmp_path)] == ["a", "b"]


def test_a_truncated_gzip_file_is_refused(tmp_path, capsys):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-20])
    one_line_of_error(capsys, ["data.jsonl.gz", "cannot be read"], lambda: rows.read(path))


@pytest.mark.parametrize("change, options, says", (
    ({"prompt": ""}, {}, ("prompt must be",)),
    ({"prompt": [{"role": "user"}]}, {}, ("prompt must be",)),
    ({"prompt": [{"role": "user", "content": "hi"}]}, {}, ("chat template",)),
    ({"ref_rewards": [0.5]}, {}, ("as many ref_rewards",)),
    ({}, {"train_on": "samples"}, ("as many sample_rewards; run generate_refs.py --field=samples",)),
    ({}, {"train_on": "mixed"}, ("as many other_rewards; run score.py",)),
    ({"ref_rewards": None}, {}, ("ref_rewards",)),
    ({"ref_rewards": [0.5, float("inf")]}, {}, ("Infinity is not a JSON number",)),
    ({"ref_rewards": [0.5, "1"]}, {}, ("finite numbers",)),
    ({"ref_rewards": [0.5, 10 ** 400]}, {}, ("finite numbers",)),
    ({"ref_rewards": [0.5, [None]]}, {}, ("finite numbers",)),
    ({"ref_rewards": [0.5, True]}, {}, ("finite numbers", "True")),
    ({"ref_rewards": "high"}, {}, ("must be a list",)),
    ({"prompt": 7}, {}, ("prompt must be",)),
    ({"prompt": []}, {}, ("prompt must be",)),
    ({"prompt": [{"role": "user", "content": None}]}, {}, ("prompt must be",)),
    ({"ref_completions": {"text": "a"}}, {}, ("ref_completions",)),
    ({"ref_completions": [{"text": "", "token_ids": [-1]}] * 2}, {}, ("vocabulary",)),
    ({"ref_completions": [{"text": "", "token_ids": ["a"]}] * 2}, {}, ("token_ids",)),
    ({"completion": 7, "reward": 1}, {"train_on": "completion"}, ("completion",)),
    ({"completion": "a", "reward": [1]}, {"train_on": "completion"}, ("finite numbers",)),
    ({}, {"train_on": "samples"}, ("samples", "generate_refs.py")),
    ({}, {"num_ref_rewards": 3}, ("has 2 ref_rewards and 3 are needed", "--num_ref_rewards")),
    ({"ref_completions": ["a", "b"]}, {}, ("an object with a `text` and token_ids",)),
    ({"ref_completions": [{"token_ids": [66]}] * 2}, {}, ("an object with a `text` and token_ids",)),
    ({"ref_completions": [{"text": "a"}] * 2}, {}, ("token_ids are empty",)),
    ({"ref_completions": [{"text": "", "token_ids": []}] * 2}, {}, ("are empty",)),
    ({"ref_completions": [{"text": "", "token_ids": [5000]}] * 2}, {}, ("vocabulary",)),
    ({"ref_completions": [{"text": "z", "token_ids": [66]}] * 2}, {}, ("tokenizer", "sample again")),
    ({"prompt": "p" * 80}, {}, ("context holds 64", "--max_length")),
    ({"prompt": "p" * 80}, {"max_length": 64}, ("nothing is left",)),
    ({}, {"train_on": "chosen_rejected"}, ("no 'chosen'", "--train_on")),
    ({"chosen": "a", "rejected": "b", "chosen_reward": "high"}, {"train_on": "chosen_rejected"},
     ("finite numbers",)),
    ({"completion": None}, {"train_on": "completion"}, ("no 'completion'",)),
    ({"ref_rewards": None, "chosen": "a", "rejected": "b"}, {"train_on": "chosen_rejected"},
     ("has 0 ref_rewards and 1 are needed",)),
    ({"ref_rewards": [None, None]}, {}, ("nothing is left",))))
def test_rows_that_cannot_be_trained_on_are_refused(loaded, good, tmp_path, capsys, change, options, says):
    data = write_rows(tmp_path / "data.jsonl", [good | change])
    place = [] if "nothing is left" in says or "chat template" in says else ["data.jsonl:1"]
    one_line_of_error(capsys, [*place, *says], lambda: build(tmp_path, data, loaded, **options))


def test_of_many_bad_rows_the_first_is_named(loaded, tmp_path, capsys, monkeypatch):
    """Also if several processes read them."""
    good = {"prompt": "p", "completion": "a", "reward": 1, "ref_rewards": [0.5]}
    data = write_rows(tmp_path / "data.jsonl", [good] * 300 + [{"prompt": "p", "ref_rewards": [1]}] * 40)
    for chunk in (dataset.CHUNK_BYTES, 2000):
        monkeypatch.setattr(dataset, "CHUNK_BYTES", chunk)
        one_line_of_error(capsys, ["data.jsonl:301", "no 'completion'"],
                          lambda: build(tmp_path, data, loaded, train_on="completion"))


# ---- models ----

def test_a_model_without_an_end_token_is_refused(loaded, tmp_path, capsys):
    tokenizer, model = map(copy.deepcopy, loaded)
    tokenizer.eos_token = tokenizer.pad_token = None
    row = {"prompt": "p", "completion": "a", "reward": 1, "ref_rewards": [0.5]}
    data = write_rows(tmp_path / "data.jsonl", [row])
    built = build(tmp_path, data, (tokenizer, model), train_on="completion")
    assert built.tokens[-1] == model.generation_config.eos_token_id  # padding needs no token
    model.generation_config.eos_token_id = None
    shutil.rmtree(tmp_path / "cache")
    one_line_of_error(capsys, ["end token", "eos_token_id"],
                      lambda: build(tmp_path, data, (tokenizer, model), train_on="completion"))


@pytest.mark.parametrize("messages", (
    [{"role": "wizard", "content": "a"}], [{"role": "user", "content": "a"}] * 2))
def test_messages_that_a_chat_template_refuses_are_refused(loaded, good, tmp_path, capsys, messages):
    tokenizer, model = copy.deepcopy(loaded[0]), loaded[1]
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] or "
        "(m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
        "{{ m.content }}{% endfor %}")
    data = write_rows(tmp_path / "data.jsonl", [good | {"prompt": messages}])
    one_line_of_error(capsys, ["data.jsonl:1", "roles must alternate"],
                      lambda: build(tmp_path, data, (tokenizer, model)))


# ---- generate_refs.py ----

def prompts(model, tmp_path, table=({"prompt": "a"},)):
    """Flags for a short run on these rows."""
    data = write_rows(tmp_path / "data.jsonl", table)
    return (f"--model={model}", f"--data={data}", f"--out={tmp_path / 'out'}", "--num_refs=2",
            "--max_new_tokens=4")


@pytest.mark.parametrize("flags, says", (
    (["--model=/no/such/model"], ("/no/such/model", "Hugging Face folder")),
    (["--temperature=-1"], ("--temperature",)),
    (["--temperature=nan"], ("--temperature", "at least 0")),
    (["--seed=-1"], ("--seed", "at least 0")),
    (["--top_p=0"], ("--top_p",)),
    (["--num_refs=0"], ("--num_refs",))))
def test_flags_that_generate_refs_refuses(tiny, tmp_path, capsys, flags, says):
    refused(capsys, says, "generate_refs.py", *prompts(tiny, tmp_path), *flags)
    assert not (tmp_path / "out").exists()


def test_rows_that_have_references_already_are_refused(tiny, tmp_path, capsys, good):
    for name in ("ref_rewards", "ref_rewards_judge"):
        old = write_rows(tmp_path / "old.jsonl", [{"prompt": "p", name: [1.0] * 16}])
        refused(capsys, ["old.jsonl:1", f"already has {name}"], "generate_refs.py",
                f"--model={tiny}", f"--data={old}", f"--out={tmp_path / 'new'}")
    refused(capsys, ["data.jsonl:1: already has", "remove ref_completions", "--field=samples"],
            "generate_refs.py", *prompts(tiny, tmp_path, [good]))


def test_an_output_of_other_settings_or_rows_is_refused(tiny, tmp_path, capsys):
    flags, part = prompts(tiny, tmp_path), tmp_path / "out" / "part-00000.jsonl"
    call("generate_refs.py", *flags)
    before = part.read_bytes()
    refused(capsys, ["seed (0, now 1)", "another --out"], "generate_refs.py", *flags, "--seed=1")
    for changed in ([{"prompt": "b"}, {"prompt": "a"}], [{"prompt": "b"}]):
        write_rows(tmp_path / "data.jsonl", changed)
        refused(capsys, ["another rows (", "another --out"], "generate_refs.py", *flags)
    assert part.read_bytes() == before


@pytest.mark.parametrize("name", ("model.safetensors", "tokenizer.json"))
def test_a_model_that_was_changed_is_refused_and_a_copy_of_it_is_not(tiny, tmp_path, capsys, name):
    model = tmp_path / "model"
    flags = prompts(model, tmp_path)
    for _ in range(2):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(tiny, model, copy_function=shutil.copy)  # with times of its own
        call("generate_refs.py", *flags)
    content = (model / name).read_bytes()
    changed = content + b" " if name.endswith("json") else content[:-1] + bytes([content[-1] ^ 1])
    (model / name).write_bytes(changed)
    refused(capsys, ["another files (", "another --out"], "generate_refs.py", *flags)


# ---- score.py ----

TESTS = {"test": "def check(c): pass", "entry_point": "f"}


@pytest.mark.parametrize("reward, row, says", (
    (["test"], {}, ("must be tests, FILE.py:NAME or model:PATH",)),
    (["nofile.py:f"], {}, ("nofile.py",)),
    (["model:/no/model"], {}, ("/no/model",)),
    (["tests", "--cpu=-1"], TESTS, ("--cpu must be above 0",)),
    (["tests"], {"ref_completions": None}, ("data.jsonl:1", "no completions")),
    (["tests"], TESTS | {"ref_completions": "text"}, ("data.jsonl:1", "must be a list"))))
def test_flags_and_rows_that_score_refuses(good, tmp_path, capsys, reward, row, says):
    data = write_rows(tmp_path / "data.jsonl", [good | {"ref_rewards": None} | row])
    refused(capsys, says, "score.py", f"--data={data}", f"--out={tmp_path / 'out'}", f"--reward={reward[0]}",
            *reward[1:])


def test_a_row_without_tests_is_refused_before_any_is_judged(good, tmp_path, capsys):
    table = [good | {"ref_rewards": None} | TESTS, good | {"ref_rewards": None}]
    data = write_rows(tmp_path / "data.jsonl", [row | {"id": i} for i, row in enumerate(table)])
    refused(capsys, ["data.jsonl:2", "has no tests"], "score.py", f"--data={data}", "--reward=tests",
            f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_an_output_of_another_version_of_the_reward_is_refused(good, tmp_path, capsys):
    data, file = write_rows(tmp_path / "data.jsonl", [good | {"ref_rewards": None}]), tmp_path / "r.py"
    flags = f"--data={data}", f"--out={tmp_path / 'out'}", f"--reward={file}:f"
    file.write_text("def f(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    call("score.py", *flags)
    file.write_text(file.read_text().replace("1.0", "2.0"))
    refused(capsys, ["another code (", "another --out"], "score.py", *flags)


# ---- train.py ----

@pytest.mark.parametrize("flags, says", (
    (["--beta=0"], ("--beta", "must be a number above 0")),
    (["--beta=x"], ("--beta", "must be a number above 0")),
    (["--learning_rate=inf"], ("--learning_rate", "must be a number above 0")),
    (["--max_grad_norm=-1"], ("--max_grad_norm", "must be a number of at least 0")),
    (["--seed=-1"], ("--seed", "must be a whole number of at least 0")),
    (["--batch_size=1.5"], ("--batch_size", "must be a whole number of at least 1")),
    (["--epochs=0"], ("--epochs",)),
    (["--num_candidates=-1"], ("--num_candidates", "must be a whole number of at least 0")),
    (["--learnig_rate=1"], ("--learnig_rate=1", "see --help")),
    (["--side=chosen"], ("--side",)),
    (["--loss=ppo"], ("--loss=ppo", "qrpo")),
    (["--train_on=best_wurst"], ("--train_on", "best_worst")),
    (["--transform=cube"], ("--transform", "identity")),
    (["--loss=dpo"], ("--loss=dpo needs pairs", "best_worst")),
    (["--loss=sft", "--train_on=best_worst"], ("imitate the rejected", "--train_on=chosen")),
    (["--loss=dpo", "--train_on=best_worst", "--min_reward=1"], ("--min_reward", "drop one")),
    (["--loss=dpo", "--train_on=best_worst", "--length_normalize"], ("--length_normalize", "dpo_norm")),
    (["--shard"], ("torchrun",)),
    (["--data={tied}"], ("tied.jsonl: no completion's reward differs", "look at the reward")),
    (["--data={one}", "--transform=normal-icdf"], ("at least 2 known ref_rewards", "--quantile=exact")),
    (["--data={empty}"], ("holds no rows",)),
    (["--out={file}"], ("is a file",)),
    (["--model=out", "--out=out"], ("would change the model",)),
    (["--eval_data={data}", "--out={data}"], ("would change the model or the data",)),
    (["--model=/no/model"], ("/no/model",))))
def test_flags_and_data_that_train_refuses(tiny, rewarded, tmp_path, capsys, flags, says):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    shutil.copytree(rewarded, tmp_path / "data")
    write_rows(tmp_path / "tied.jsonl", [row | {"ref_rewards": [0.3] * 4} for row in read_rows(rewarded)])
    table = read_rows(rewarded)
    table[7]["ref_rewards"][1:] = [None] * 3
    write_rows(tmp_path / "one.jsonl", table)
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("empty", "tied", "one")}
    flags = [flag.format(file=tmp_path / "file", data=tmp_path / "data", **paths) for flag in flags]
    refused(capsys, says, "train.py", f"--model={tiny}", f"--data={rewarded}", f"--out={tmp_path / 'out'}",
            f"--cache={tmp_path / 'cache'}", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ("train.py", "evaluate.py", "examples/online.py"))
def test_a_reference_model_of_another_tokenizer_is_refused(tiny, rewarded, tmp_path, capsys, script):
    """Its vocabulary is as large, so it would read other texts without a word."""
    other = shutil.copytree(tiny, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocab, reversed(vocab.values())))
    (other / "tokenizer.json").write_text(json.dumps(content))
    table = [row | {"samples": row["ref_completions"], "sample_rewards": row["ref_rewards"]}
             for row in read_rows(rewarded)]
    more = [f"--reward={rewarded.parent / 'reward.py'}:letters"] if "online" in script else []
    refused(capsys, [f"{other}: its tokenizer gives tokens other ids"], script, f"--model={tiny}",
            f"--ref_model={other}", f"--data={write_rows(tmp_path / 'd.jsonl', table)}",
            f"--out={tmp_path / 'out'}", *more)


def test_a_run_that_is_not_finished_continues_with_its_own_settings_and_data_only(
        tiny, rewarded, tmp_path, capsys):
    data, out = write_rows(tmp_path / "data.jsonl", read_rows(rewarded)), tmp_path / "out"
    flags = f"--model={tiny}", f"--data={data}", f"--out={out}", "--batch_size=120"
    call("train.py", *flags, "--beta=0.5")
    record = json.loads((out / "run.json").read_text()) | {"finished": False}
    rows.write_json(out / "run.json", record)
    refused(capsys, ["already holds a run", "--resume"], "train.py", *flags, "--beta=0.5")
    refused(capsys, ["beta=0.5, now 0.1"], "train.py", *flags, "--resume")
    write_rows(data, read_rows(rewarded)[:-1])
    refused(capsys, ["was started with other data"], "train.py", *flags, "--beta=0.5", "--resume")
    assert len(list((out / "cache").glob("ref_logps-*.npy"))) == 1  # before the reference pass
    assert json.loads((out / "run.json").read_text()) == record


# ---- disks ----

def test_outputs_that_cannot_be_written_are_refused(tiny, rewarded, tmp_path, capsys):
    """Or that another process writes, or that are also the data."""
    held = rows.open_part(tmp_path / "part-00000.jsonl")
    one_line_of_error(capsys, ["another process"], lambda: rows.open_part(tmp_path / "part-00000.jsonl"))
    held.close()
    (tmp_path / "file").write_text("mine")
    table = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}])
    folder = rewarded.parent
    scripts = (("generate_refs.py", f"--model={tiny}", f"--data={table}"),
               ("score.py", f"--reward={folder}/reward.py:letters", f"--data={folder}/refs"),
               ("train.py", f"--model={tiny}", f"--data={rewarded}"))
    for command in scripts:
        for out, says in (("/proc/nowhere", "/proc/nowhere"), (tmp_path / "file", "is a file"),
                          (tmp_path / "file" / "out", "file")):
            refused(capsys, [says], *command, f"--out={out}")
    refused(capsys, ["is also the data"], *scripts[1], f"--out={folder}/refs")
    for out in ("/proc/nowhere", tmp_path / "file"):  # before any work, so before the data are looked for
        refused(capsys, [f"{out}: cannot be written"], "evaluate.py", "--model=none", "--ref_model=none",
                "--data=none", f"--out={out}")
    assert (tmp_path / "file").read_text() == "mine"
