"""What the tests share: a tiny random model with a byte-level tokenizer, rewarded rows for it, and a way to run a script."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["OMP_WAIT_POLICY"] = "passive"  # idle threads sleep: with more processes than cores, spinning costs 20 times
ROOT = Path(__file__).resolve().parent.parent
MATERIAL = ROOT.parent / "shared" / "data"  # real data to try things on, where it is there
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402


def needs(name):
    return pytest.mark.skipif(not (MATERIAL / name).exists(), reason=f"{name} is not here")


def run(script, *args, ranks=0, check=True, env=None):
    """Run a script of the project as a user does, with one process or under torchrun; returns the finished process."""
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
                                 if ranks else []), str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=180, env=os.environ | (env or {}))
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)


def read_rows(path):
    files = sorted(Path(path).glob("*.jsonl")) if Path(path).is_dir() else [Path(path)]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def make_tokenizer(**special):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = special or {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random 2-layer Llama, 258 tokens, context 64; pad is eos."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rewarded(tiny, tmp_path_factory):
    """30 rows with 4 sampled completions each, rewarded by their share of letters."""
    folder = tmp_path_factory.mktemp("data")
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "row " + "x" * (i % 7)} for i in range(30)])
    (folder / "reward.py").write_text(
        "def letters(prompts, completions, **columns):\n"
        "    return [sum(c.isalpha() for c in text) / (len(text) + 1) for text in completions]\n")
    run("generate_refs.py", f"--model={tiny}", f"--data={prompts}", f"--out={folder / 'refs'}", "--num_refs=4",
        "--max_new_tokens=20")
    run("score.py", f"--data={folder / 'refs'}", f"--out={folder / 'scored'}", f"--reward={folder / 'reward.py'}:letters")
    return folder / "scored"
