"""train.py --lora: what is trained and saved, the gate, kills, and processes. Needs peft."""
import math
import signal
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file

import model as model_py
from conftest import Process, call, read_rows, refused, start_ranks
from test_real_use import log_ratio
from test_train import die_after_saving

FLAGS = "--lora=4", "--learning_rate=1e-2", "--batch_size=16", "--micro_batch_tokens=160", "--beta=0.1"


def flags(model, data, out, *more):
    return [f"--model={model}", f"--data={data}", f"--out={out}", *FLAGS, *more]


@pytest.fixture(scope="module")
def run(tiny, rewarded, tmp_path_factory):
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("lora") / "run"
    script = call("train.py", *flags(tiny, rewarded, out, f"--eval_data={rewarded}", "--save_every=3"))
    return out, script


def test_the_adapters_start_at_the_reference_and_the_merged_model_is_what_was_trained(tiny, run):
    out, script = run
    log = read_rows(out / "metrics.jsonl")
    assert log[0]["eval_drift"] < 1e-6 and log[-1]["eval_loss"] < log[0]["eval_loss"]
    assert abs(log[-1]["eval_log_ratio"]) > 0.1
    assert log_ratio(out, tiny, script["eval_data"]) == pytest.approx(log[-1]["eval_log_ratio"], rel=1e-3)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert (out / "checkpoints/step_000003/adapter/adapter_model.safetensors").exists()


def test_the_saved_adapter_on_the_base_model_is_the_merged_model(tiny, run):
    out, _ = run
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter")(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(out)(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert (adapted - before).abs().max() > 0.05


def test_what_is_trained_by_hand(tiny):
    """The delta of a layer is 2 B A, and B is 0 at first; weights stay bfloat16, adapters are float32."""
    pytest.importorskip("peft")
    model = model_py.load_model(tiny, torch.bfloat16, torch.device("cpu"))
    model_py.add_lora(model, 4, seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    name = "model.layers.1.mlp.up_proj"
    A, B = (trained[f"{name}.lora_{part}.default.weight"] for part in "AB")
    assert (B == 0).all() and A.shape == (4, 32)
    torch.nn.init.normal_(B)
    weight = model.get_parameter(f"{name}.base_layer.weight")
    merged = model_py.merged(model, model.state_dict())
    torch.testing.assert_close(merged[f"{name}.weight"], weight.float() + 2 * B @ A)


def test_a_run_in_bfloat16_passes_the_gate(tiny, rewarded, tmp_path):
    pytest.importorskip("peft")
    call("train.py", *flags(tiny, rewarded, tmp_path / "run", "--dtype=bfloat16"))
    log = read_rows(tmp_path / "run/metrics.jsonl")
    assert log[0]["drift"] < 0.1 and math.isfinite(log[-1]["log_ratio"]) and log[-1]["log_ratio"] != 0
    adapter = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_a_kill_and_ranks_change_nothing(tiny, rewarded, run, tmp_path):
    out, _ = run
    expected = load_file(out / "model.safetensors")
    command = flags(
        tiny, rewarded, tmp_path / "killed", f"--eval_data={rewarded}", "--save_every=3", "--resume")
    killed = Process("train.py", *command, before=lambda: die_after_saving(3))
    assert killed.wait() == -signal.SIGKILL
    call("train.py", *command)
    same = load_file(tmp_path / "killed/model.safetensors")
    assert same.keys() == expected.keys()
    assert all(torch.equal(same[name], expected[name]) for name in expected)
    assert (tmp_path / "killed/adapter/adapter_config.json").exists()
    ranks = start_ranks(2, "train.py", *flags(tiny, rewarded, tmp_path / "two"))
    assert [rank.wait() for rank in ranks] == [0, 0]
    two = load_file(tmp_path / "two/model.safetensors")
    for name in expected:
        torch.testing.assert_close(two[name], expected[name], rtol=1e-3, atol=1e-4)


def test_only_the_adapters_are_in_the_resume_state(tiny, rewarded, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    saved, save = [], dcp.save

    def recorded(state, **kwargs):
        saved.append(state)
        save(state, **kwargs)
    monkeypatch.setattr(dcp, "save", recorded)
    call("train.py", *flags(tiny, rewarded, tmp_path / "run"))
    for names in saved[0]["weights"], saved[0]["optimizer"]["state"]:
        assert all(".lora_" in name for name in names) and len(names) == 28


def test_what_does_not_go_together_and_a_missing_peft_are_refused_before_work_is_spent(
        tiny, rewarded, tmp_path, capsys, monkeypatch):
    command = flags(tiny, rewarded, tmp_path / "run", "--shard")
    refused(capsys, ["--lora does not go with"], "train.py", *command)
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(capsys, ["pip install peft"], "train.py", *flags(tiny, rewarded, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
