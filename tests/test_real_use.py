"""Real checkpoints, tokenizers, chat templates and rewards: nothing goes wrong without a word."""
import datetime
import errno
import os
import signal
import time
import tracemalloc

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

import dataset
import model as model_py
import tokens
import rows
from conftest import (MATERIAL, ROOT, Process, call, ends_well, make_tokenizer, one_line_of_error, read_rows,
                      refused, start_ranks, write_rows)
from test_families import make
from test_sharding import make_model, make_rows

CPU = torch.device("cpu")


# ---- what is saved is what was trained ----

def log_ratio(path, reference, data):
    """The mean log-ratio of a saved model on train.py's arrays."""
    logps = [dataset.all_logps(model_py.Policy(model_py.load_model(folder, torch.float32, CPU)), data,
                               10_000, CPU)
             for folder in (path, reference)]
    return float((logps[0] - logps[1]).mean())


def test_the_saved_model_has_the_last_logged_log_ratio(tmp_path):
    """Of a bfloat16 checkpoint, at the paper's lowest learning rate: most bfloat16 weights would not move."""
    model, data = make_model(tmp_path / "model", hidden_size=64), make_rows(tmp_path / "rows.jsonl")
    flags = (f"--model={model}", f"--data={data}", f"--eval_data={data}", "--batch_size=6", "--epochs=10",
             "--beta=0.03", "--learning_rate=1e-7")
    script = call("train.py", *flags, f"--out={tmp_path / 'run'}")
    logged = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["eval_log_ratio"]
    assert log_ratio(tmp_path / "run", model, script["eval_data"]) == pytest.approx(logged, rel=0.02)


# ---- checkpoints ----

def test_a_checkpoint_that_lacks_weights_is_refused_with_their_names(tmp_path, capsys):
    make("mixtral", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    refused(capsys, ["lm_head.weight", "lacks"], "generate_refs.py", f"--model={tmp_path / 'model'}",
            f"--data={data}",
            f"--out={tmp_path / 'out'}")
    make("llama", tmp_path / "base")  # a causal LM is no reward model: its score head would be random
    data = write_rows(tmp_path / "answers.jsonl", [{"prompt": "a", "completion": "b"}])
    refused(capsys, ["score.weight", "lacks"], "score.py", f"--data={data}", f"--out={tmp_path / 'scored'}",
            f"--reward=model:{tmp_path / 'base'}")


def test_longrope_ends_at_its_border_so_that_no_batch_changes_a_log_probability(tmp_path, capsys):
    make("phi3", tmp_path / "model")  # context 256, original length 64
    model = model_py.load_model(tmp_path / "model", torch.float32, CPU)
    assert model_py.context_length(model) == 64
    policy = model_py.Policy(model)
    tokens = torch.randint(0, 255, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = policy(tokens[:1, :40], torch.tensor([5]), torch.tensor([40]))[0]
        beside = policy(tokens, torch.tensor([5, 5]), torch.tensor([40, 64]))[0]
    assert abs(alone - beside) < 1e-3
    data = write_rows(tmp_path / "rows.jsonl",
                      [{"prompt": "a" * 60, "chosen": "b" * 20, "rejected": "c" * 20}])
    refused(capsys, ["81 tokens", "context holds 64"], "train.py", f"--model={tmp_path / 'model'}",
            f"--data={data}",
            f"--out={tmp_path / 'run'}", "--train_on=chosen", "--loss=sft")


def test_parameters_that_text_does_not_reach_stay_as_they_are_and_processes_do_not_wait_for_them(tmp_path):
    """A multimodal checkpoint: its vision tower gets no gradient."""
    make("gemma3", tmp_path / "model")
    flags = (f"--model={tmp_path / 'model'}", f"--data={make_rows(tmp_path / 'rows.jsonl')}",
             "--batch_size=6",
             "--save_every=2", "--learning_rate=1e-3")
    ranks = start_ranks(2, "train.py", *flags, f"--out={tmp_path / 'two'}")
    assert [rank.wait() for rank in ranks] == [0, 0]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "two"))
    same = {name for name in before if torch.equal(before[name].float(), after[name])}
    assert same and same == {name for name in before if "vision" in name or "multi_modal" in name}


# ---- how rows were sampled ----

def test_training_says_that_its_references_were_sampled_at_another_temperature(
        tiny, rewarded, tmp_path, capsys):
    table = read_rows(rewarded)
    for row in table:
        row["made_by"]["ref_completions"]["temperature"] = 0.7
    data = write_rows(tmp_path / "data.jsonl", table)
    ends_well("train.py", f"--model={tiny}", f"--data={data}", f"--out={tmp_path / 'run'}", "--dry_run")
    assert "sampled at temperature 0.7 and top_p 1.0" in capsys.readouterr().out


@pytest.mark.parametrize("flags, times", (
    ((), 10), (("--transform=log",), 11), (("--quantile=exact",), None), (("--loss=sft",), None)))
def test_training_says_what_the_published_quantile_asks_of_completions_that_all_tie(
        tiny, rewarded, tmp_path, capsys, flags, times):
    """At beta 0.1, e^{f(1)/beta} / Z: 10, and for the log transform 11."""
    table = read_rows(rewarded)
    for row in table[3:]:
        row["ref_rewards"] = [0.0] * 4
    data = write_rows(tmp_path / "data.jsonl", table)
    common = f"--model={tiny}", f"--data={data}", *flags
    ends_well("train.py", *common, f"--out={tmp_path / 'dry'}", "--dry_run")
    if not flags:
        call("train.py", *common, f"--out={tmp_path / 'run'}")
        ends_well("train.py", f"--model={tiny}", f"--data={rewarded}", f"--out={tmp_path}", "--dry_run")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(said) == (2 if not flags else 1 if times else 0)  # none where rewards do not tie
    for line in said:
        assert line.startswith("WARNING: 90% of the completions") and f" {times} times as likely" in line
        assert "--quantile=exact would leave them as they are" in line


# ---- SentencePiece ----

def sentencepiece():
    """A tokenizer as Llama 2's: a mark at every word's start, dropped in decoding at the text's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>", "<s>", "</s>"],
                                  initial_alphabet=["\n"],
                                  show_progress=False)
    tokenizer.train_from_iterator(["once upon a time there was a yes and a no"] * 20, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def real_sentencepiece():
    return transformers.AutoTokenizer.from_pretrained(MATERIAL / "stories260K")


@pytest.mark.parametrize("load",
                         (sentencepiece, real_sentencepiece))
@pytest.mark.parametrize("prompt, completion",
                         (("once upon a", " time"), ("there was", "time"), ("once ", "upon a"),
                                                ("a", "\n no"), ("yes ", " no"), ("a ti", "me")))
def test_a_sentencepiece_completion_has_its_own_text(load, prompt, completion):
    """The text that follows the prompt, with its leading space; and a dataset's answer is tokenised to
    that text.
    """
    tokenizer = load()
    start = tokens.prompt_ids(tokenizer, prompt)
    ids = tokens.completion_ids(tokenizer, prompt, completion, [tokenizer.eos_token_id])
    assert ids[-1] == tokenizer.eos_token_id
    assert tokens.decode(tokenizer, start, ids) == completion
    assert tokenizer.decode(start + ids, skip_special_tokens=True) == prompt + completion


# ---- rewards ----

class Published(nn.Module):
    """What ArmoRM's published code computes, a sequence at a time, from the checkpoint's weights alone."""

    def __init__(self, weights, llama):
        super().__init__()
        self.weights, self.llama = weights, llama

    def forward(self, ids):
        header = [128009, 128006, 78191, 128007, 271]
        gate = max(i for i in range(len(ids)) if ids[i:i + 5] == header)  # the first token of the last header
        hidden = self.llama(torch.tensor([ids])).last_hidden_state[0]
        x = hidden[gate]
        for i in range(4):
            x = self.weights[f"gating.layers.{i}.weight"] @ x + self.weights[f"gating.layers.{i}.bias"]
            x = x.relu() if i < 3 else torch.softmax(x / 10, 0)
        rewards = self.weights["regression_layer.weight"] @ hidden[-1]
        x = x * self.weights["gating.logit_scale"][0]
        return (x * (rewards @ self.weights["reward_transform_matrix"])).sum().item()


def armorm(folder):
    """A small random checkpoint of ArmoRM's architecture, with its names; the tokenizer has Llama 3's
    header ids.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, num_labels=19, architectures=["LlamaForRewardModelWithGating"],
        pad_token_id=128255,
        auto_map={"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"})
    llama = transformers.LlamaModel(config).eval()
    weights = {f"model.{name}": tensor for name, tensor in llama.state_dict().items()}
    sizes = (16, 1024, 1024, 1024, 19)
    for i in range(4):
        weights[f"gating.layers.{i}.weight"] = torch.randn(sizes[i + 1], sizes[i]) * sizes[i] ** -0.5
        weights[f"gating.layers.{i}.bias"] = torch.randn(sizes[i + 1])
    weights |= {"gating.logit_scale": torch.tensor([1.3]), "regression_layer.weight": torch.randn(19, 16),
                "reward_transform_matrix": torch.eye(19) + 0.1 * torch.randn(19, 19)}
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    special = {"<|eot_id|>": 128009, "<|start_header_id|>": 128006, "assistant": 78191, "user": 882,
               "<|end_header_id|>": 128007, "\n\n": 271, "<unk>": 0}
    words = {f"w{i}": 1000 + i for i in range(50)}
    tokenizer = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
    tokenizer.save_pretrained(folder)
    return weights, llama, tokenizer


def test_armorm_gives_the_scores_of_its_published_code(tmp_path):
    """Also where --max_length cuts: it never loses the answer's header, and of an unseen answer the
    reward is unknown.
    """
    (tmp_path / "armo").mkdir()
    weights, llama, tokenizer = armorm(tmp_path / "armo")
    rng = np.random.default_rng(0)
    table = []
    for n in (1, 5, 20, 40):
        prompt = [{"role": "user", "content": " ".join(f"w{i}" for i in rng.integers(0, 50, n))},
                  {"role": "assistant", "content": "w1 w2"}, {"role": "user", "content": "w3"}]
        table.append({"prompt": prompt, "ref_completions": [
            {"text": " ".join(f"w{i}" for i in rng.integers(0, 50, m))} for m in (2, 10, 30)]})
    data = write_rows(tmp_path / "rows.jsonl", table)
    for limit in (2048, 45):
        out = tmp_path / str(limit)
        call("score.py", f"--data={data}", f"--out={out}", f"--reward=model:{tmp_path / 'armo'}",
             f"--max_length={limit}", f"--model_class={ROOT / 'paper/armorm.py'}:ArmoRM")
        for row in read_rows(out):
            start = tokens.prompt_ids(tokenizer, row["prompt"])
            for completion, reward in zip(row["ref_completions"], row["ref_rewards"]):
                answer = [{"role": "assistant", "content": completion["text"]}]
                text = tokenizer.apply_chat_template(row["prompt"] + answer, tokenize=False)
                ids = tokenizer(text, add_special_tokens=False).input_ids[:limit]
                if len(start) >= limit:
                    assert reward is None
                else:
                    assert reward == pytest.approx(Published(weights, llama)(ids), rel=1e-4, abs=1e-5)
        assert any(r is None for row in read_rows(out) for r in row["ref_rewards"]) == (limit == 45)


def test_a_roberta_classifier_reads_as_many_tokens_as_it_has_positions(tmp_path):
    """Its positions begin after the padding id: two fewer than max_position_embeddings."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1,
                                        num_attention_heads=2,
                                        intermediate_size=32, max_position_embeddings=34, num_labels=1,
                                        pad_token_id=1)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    make_tokenizer().save_pretrained(tmp_path / "judge")
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b" * 100}])
    call("score.py", f"--data={data}", f"--out={tmp_path / 'out'}", f"--reward=model:{tmp_path / 'judge'}")
    assert isinstance(read_rows(tmp_path / "out")[0]["reward"], float)


# ---- the training loop ----

@pytest.mark.parametrize("length", (1, 16))
def test_the_gate_allows_the_rounding_of_one_token_and_less_per_token_of_many(tiny, tmp_path, capsys, length):
    """0.028 nats was seen on one-token completions in bfloat16; the errors of n tokens add up to
    sqrt(n) of one.
    """
    completion = {"text": "a" * length, "token_ids": [make_tokenizer()("a").input_ids[-1]] * length,
                  "finish_reason": "length"}
    table = [{"id": i, "prompt": "p", "ref_rewards": [0.0, 1.0],
             "ref_completions": [completion] * 2} for i in range(8)]
    script = call("train.py", f"--model={tiny}", f"--data={write_rows(tmp_path / 'rows.jsonl', table)}",
                  f"--out={tmp_path / 'run'}", "--dtype=bfloat16", "--batch_size=8")
    limit = 0.3 / length ** 0.5
    for drift in (0.99 * limit, 1.01 * limit):
        row = {"drift": drift, "grad_norm": 1.0, "loss": 1.0}
        if drift < limit:
            script["check"](1, row, script["lengths"], script["examples"])
        else:
            one_line_of_error(capsys, [f"limit {limit:.2g}"], lambda: script["check"](
                1, row, script["lengths"], script["examples"]))


def test_all_steps_of_an_epoch_have_nearly_the_same_size(tiny, rewarded, tmp_path):
    """120 completions in batches of at most 50: 40 a step, not 50, 50 and 20."""
    script = call("train.py", f"--model={tiny}", f"--data={rewarded}", f"--out={tmp_path / 'run'}",
                  "--batch_size=50")
    steps = [script["examples_of"](step) for step in range(script["num_steps"])]
    assert [len(terms) for terms in steps] == [40, 40, 40]
    assert sorted(np.concatenate(steps).reshape(-1)) == list(range(120))


def test_the_sampler_refuses_a_cache_that_it_does_not_carry(tmp_path, capsys):
    """As a recurrent state."""
    for kind in ("mamba", "minimax", "bart"):
        make(kind, tmp_path / kind)
        data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
        refused(capsys, [kind, "--engine=vllm"], "generate_refs.py", f"--model={tmp_path / kind}",
                f"--data={data}",
                f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


# ---- files, processes, memory ----

def test_ranks_wait_for_hours_while_the_main_one_reads_or_saves(tiny, rewarded, tmp_path):
    """The group's limit is for collectives of a step, which wait for no disk."""
    def before():
        barrier, build = torch.distributed.barrier, dataset.build

        def slow_build(*args):
            time.sleep(3)
            build(*args)

        def checked(timeout):
            assert timeout.total_seconds() > 3600
            barrier(timeout=timeout)
        torch.distributed.barrier, dataset.build = checked, slow_build
        init = torch.distributed.init_process_group
        torch.distributed.init_process_group = lambda backend, timeout: init(
            backend, timeout=datetime.timedelta(seconds=2))
    ranks = start_ranks(2, "train.py", f"--model={tiny}", f"--data={rewarded}", f"--out={tmp_path / 'run'}",
                        before=before)
    assert [rank.wait() for rank in ranks] == [0, 0]


def test_what_a_killed_process_left_in_the_cache_blocks_nobody(tiny, rewarded, tmp_path):
    flags = f"--model={tiny}", f"--data={rewarded}", f"--cache={tmp_path / 'cache'}"
    call("train.py", *flags, f"--out={tmp_path / 'one'}")
    arrays, = (tmp_path / "cache").glob("data-*/tokens.bin")
    logps, = (tmp_path / "cache").glob("ref_logps-*.npy")
    for path in arrays, logps:
        path.write_bytes(b"half")
    for path in arrays.parent, logps:  # as if both had been killed while they were written
        path.rename(path.with_name(f".{path.name}.new"))
    call("train.py", *flags, f"--out={tmp_path / 'two'}")
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors").read_bytes()
    assert not list((tmp_path / "cache").glob(".*.new"))


def test_a_finished_run_keeps_its_checkpoints_and_no_resume_state(tiny, rewarded, tmp_path):
    """Also one that continued with another --save_every."""
    flags = f"--model={tiny}", f"--data={rewarded}", f"--out={tmp_path / 'run'}", "--batch_size=20"

    def before():  # killed in the fourth step
        step = torch.optim.AdamW.step
        count = iter(range(100))

        def stepping(self, *args, **kwargs):
            if next(count) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args, **kwargs)
        torch.optim.AdamW.step = stepping
    assert Process("train.py", *flags, "--save_every=2", before=before).wait() == -signal.SIGKILL
    call("train.py", *flags, "--save_every=3", "--resume")
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step_000002", "step_000003"}
    assert not (tmp_path / "run" / "resume").exists()


def test_columns_of_any_name_and_content_reach_the_end(tiny, tmp_path):
    """NaN as pandas writes it, half a surrogate pair, and the names of the reward's own arguments."""
    line = '{"prompt": "a", "prompts": 1, "completions": 2, "score": NaN, "broken": "\\ud83d"}\n'
    (tmp_path / "rows.jsonl").write_text(line)
    (tmp_path / "reward.py").write_text(
        "def reward(prompts, completions, score, broken, **columns):\n"
        "    assert score == [None] * 2 and broken == ['\\ud83d'] * 2\n    return [0.0, 1.0]\n")
    call("generate_refs.py", f"--model={tiny}", f"--data={tmp_path / 'rows.jsonl'}",
         f"--out={tmp_path / 'refs'}", "--num_refs=2", "--max_new_tokens=4")
    call("score.py", f"--data={tmp_path / 'refs'}", f"--out={tmp_path / 'scored'}",
         f"--reward={tmp_path / 'reward.py'}:reward")
    row = read_rows(tmp_path / "scored")[0]
    assert row["ref_rewards"] == [0, 1] and row["prompts"] == 1 and row["broken"] == "\ud83d"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(rows.fcntl, "flock", no_locks)
    rows.append(rows.open_part(tmp_path / "part.jsonl"), {"id": 1})
    assert read_rows(tmp_path / "part.jsonl") == [{"id": 1}] and "No locks" in capsys.readouterr().out


def test_scoring_does_not_hold_the_rows_in_memory(tmp_path):
    """Python objects when the reward sees the last of 30 rows, of 0.4 MB each, as when it sees the tenth."""
    (tmp_path / "reward.py").write_text(
        "import tracemalloc\n"
        "def reward(prompts, completions, **columns):\n"
        f"    print(tracemalloc.get_traced_memory()[0], file=open({str(tmp_path / 'held')!r}, 'a'))\n"
        "    return [0.0] * len(completions)\n")
    completion = {"text": "word", "token_ids": list(range(10_000, 10_500)), "finish_reason": "stop"}
    table = [{"id": i, "prompt": "p", "ref_completions": [completion] * 20} for i in range(30)]
    data = write_rows(tmp_path / "rows.jsonl", table)
    del table
    tracemalloc.start()
    try:
        call("score.py", f"--data={data}", f"--out={tmp_path / 'out'}",
             f"--reward={tmp_path / 'reward.py'}:reward")
    finally:
        tracemalloc.stop()
    held = [int(line) / 1e6 for line in (tmp_path / "held").read_text().split()]
    assert len(held) == 30 and held[-1] - held[9] < 2, held
