"""--shard: what a rank holds shrinks as one over the ranks, and a stopped run has the time to save."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import ROOT, call, make_tokenizer, read_rows, start_ranks, write_rows
from test_families import make


def make_model(folder, **config):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256,
        "eos_token_id": 257} | config))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(path, n=8):
    """Rows with three completions each, of random letters."""
    tokenizer = make_tokenizer()
    rows = []
    for i in range(n):
        texts = ["abcdefgh"[i % 4:][:length] for length in (2, 3, 4)]
        completions = [{"text": text, "token_ids": tokenizer(text, add_special_tokens=False).input_ids,
                        "finish_reason": "length"} for text in texts]
        rows.append({"id": i, "prompt": f"row {i}", "ref_completions": completions,
                     "ref_rewards": [0.1, 0.5, 0.9]})
    return write_rows(path, rows)


LAYERS = 12
# phase: copies of the weights, split over the ranks; layers that each holds besides, with activations
HELD = {
    "reading": (0, 0.1), "load": (1, 4), "reference pass": (1, 4), "training": (4, 1), "resume state": (3, 1),
    "trained model": (3, 1)}


@pytest.mark.parametrize("world", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_what_a_rank_holds_shrinks_as_one_over_the_ranks(tmp_path, world):
    """In every phase at most its part, and a constant: the layers in flight with their gradients, and
    the activations.

    The last rank stands for what is on a GPU: rank 0 also has the checkpoint and the assembled model,
    in CPU memory.
    """
    model = make_model(tmp_path / "model", hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS)
    data = make_rows(tmp_path / "rows.jsonl", n=2)
    copy = 4 * sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(model).parameters())
    layer = copy / LAYERS

    def before():
        os.environ["MEMORY"] = str(tmp_path / "{rank}.json")
    ranks = start_ranks(world, "tests/memory.py", f"--model={model}", f"--data={data}", "--shard",
                        f"--out={tmp_path / 'run'}", "--micro_batch_tokens=36", before=before)
    assert [rank.wait() for rank in ranks] == [0] * world
    held = json.loads((tmp_path / f"{world - 1}.json").read_text())
    for phase, (copies, layers) in HELD.items():
        print(f"{phase:15} {held[phase] / copy:.2f} copies of the model")
        assert held[phase] < copies * copy / world + layers * layer, phase


def test_sharded_training_is_that_of_one_process_and_saves_tied_weights_once(tmp_path):
    model = make_model(tmp_path / "model", tie_word_embeddings=True, initializer_range=0.2)
    flags = (f"--model={model}", f"--data={make_rows(tmp_path / 'rows.jsonl')}", "--batch_size=6",
             "--learning_rate=1e-3")
    call("train.py", *flags, f"--out={tmp_path / 'one'}")
    ranks = start_ranks(2, "train.py", *flags, f"--out={tmp_path / 'two'}", "--shard")
    assert [rank.wait() for rank in ranks] == [0, 0]
    for one, two in zip(read_rows(tmp_path / "one" / "metrics.jsonl"),
                        read_rows(tmp_path / "two" / "metrics.jsonl")):
        for name in ("loss", "log_ratio", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5)
    with safe_open(tmp_path / "two" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
    one, two = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(two(ids).logits, one(ids).logits, rtol=0, atol=1e-3)


def test_the_checkpoint_decides_whether_weights_are_tied(tmp_path, capfd):
    """Where it has two matrices and the configuration says that they are one. And what makes a sharded model
    another than the loaded one is refused.
    """
    folder = make_model(tmp_path / "model", initializer_range=0.2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    flags = (f"--model={folder}", f"--data={make_rows(tmp_path / 'rows.jsonl')}", "--batch_size=6",
             "--learning_rate=1e-3")
    call("train.py", *flags, f"--out={tmp_path / 'one'}")
    ranks = start_ranks(2, "train.py", *flags, f"--out={tmp_path / 'two'}", "--shard")
    assert [rank.wait() for rank in ranks] == [0, 0]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and "lm_head.weight" in one
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["dtype"] == "float32"

    def before():
        import model
        model.is_tied = lambda model: True  # as if the configuration decided
    ranks = start_ranks(2, "train.py", *flags, f"--out={tmp_path / 'bad'}", "--shard", before=before)
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert "has other logits than the loaded one" in capfd.readouterr().err


def test_ranks_that_hold_nothing_of_a_small_tensor_do_not_wait_for_ever(tmp_path):
    """Two experts on four ranks: two ranks have no part of the router's weights."""
    make("mixtral", tmp_path / "model", num_local_experts=2, num_experts_per_tok=1)
    flags = (f"--model={tmp_path / 'model'}", f"--data={make_rows(tmp_path / 'rows.jsonl')}",
             "--batch_size=12", "--learning_rate=1e-3")
    call("train.py", *flags, f"--out={tmp_path / 'one'}")
    ranks = start_ranks(4, "train.py", *flags, f"--out={tmp_path / 'four'}", "--shard")
    deadline = time.time() + 120
    while any(rank.running() for rank in ranks) and time.time() < deadline:
        time.sleep(0.1)
    codes = [rank.wait() if not rank.running() else rank.kill() for rank in ranks]
    assert codes == [0] * 4
    one, four = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "four"))
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=0, atol=1e-4)


SLOW_SAVE = """
import time, torch.distributed.checkpoint as dcp
save = dcp.save
def slow(*args, **kwargs):
    time.sleep(3)
    save(*args, **kwargs)
dcp.save = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", (2, 60))
def test_torchrun_waits_for_a_slow_save_as_long_as_run_sh_tells_it(tmp_path, seconds):
    """run.sh sets TORCH_ELASTIC_SHUTDOWN_TIMEOUT: else torchrun kills the ranks 30 s after SIGTERM; here, 2.
    """
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=" in (ROOT / "run.sh").read_text()
    model, data, out = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(SLOW_SAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train.py",
               f"--model={model}", f"--data={data}", f"--out={out}", "--batch_size=1", "--epochs=1000"]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(seconds)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert bool(list(out.glob("resume/step_*"))) == (seconds == 60)
