"""How fast this project is beside what others offer for the same work: rates, peak memory and their ratio.

    python tests/bench.py sample    generate_refs.py         transformers' generate(), and vLLM, see below
    python tests/bench.py score     score.py --reward=model  prompt by prompt, padded to the longest
    python tests/bench.py train     train.py --loss=dpo      TRL's DPOTrainer, if --trl_python is given
    python tests/bench.py all       these, smaller, and the sandbox: seven minutes with --repeat=1
    python tests/bench.py growth    time and memory by length, vocabulary, references, prompts: growth.png

A 21M-parameter Llama of random weights with 32,000 words, float32; prompts of about 60 tokens, completions of
about 140 with a long tail. `sample` also takes a model and prompts of yours, in the type it is stored in:

    python tests/bench.py sample --model=SmolLM2 --data=prompts.jsonl --n=16 --limit=128 --vllm_python=PYTHON

Every run is a process of its own, and the best of --repeat counts. Times exclude imports and loading and
include everything else: for training the reference pass, too. Use a quiet machine.
"""
import argparse
import json
import math
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
transformers.utils.logging.disable_progress_bar()
WORDS, MEAN, LONGEST = 32_000, 140, 512  # the vocabulary; a completion's tokens on average and at most
# Random weights sample nearly uniformly, so this many end tokens give that mean.
ENDS = list(range(3, 3 + WORDS // MEAN))


# ---- the work ----

def make_model(folder, words=WORDS):
    """FOLDER/{model, reward_model}, with a tokenizer of `words` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(ids, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=1)
    for name, kind in (("model", transformers.LlamaForCausalLM),
                       ("reward_model", transformers.LlamaForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_work(folder, n, model=None):
    """`make_model` (or a model of the user's), and n rows in each of FOLDER/{prompts, pairs, refs}.jsonl;
    refs have 16 completions.
    """
    if model:
        (folder / "model").symlink_to(Path(model).resolve())
    else:
        make_model(folder)
    rng = np.random.default_rng(0)

    def text(length):
        return " ".join(f"w{i}" for i in rng.integers(3, WORDS, length))

    def answer():
        return " " + text(min(rng.geometric(1 / MEAN), LONGEST))

    def pair():
        return {"chosen": answer(), "rejected": answer()}

    def references():
        return {"ref_completions": [{"text": answer()} for _ in range(16)]}

    lengths = np.clip(rng.lognormal(np.log(55), 0.4, n), 8, 256).astype(int)
    prompts = [{"prompt": text(length)} for length in lengths]
    for name, fields in (("prompts", dict), ("pairs", pair), ("refs", references)):
        table = [prompt | fields() for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


def make_requests(folder, args):
    """FOLDER/requests.json: what generate_refs.sample takes, for prompts of ours or of --data."""
    import generate_refs
    import rows
    from model import load_tokenizer
    from tokens import end_ids, prompt_ids
    tokenizer, ends = load_tokenizer(folder / "model"), ENDS
    prompts = list(rows.stream(args.data or folder / "prompts.jsonl", require=("prompt",)))[:args.n]
    if args.model:
        ends = end_ids(generate_refs.describe(args.model, False), tokenizer)
    requests = []
    for i, row in enumerate(prompts):
        prompt = prompt_ids(tokenizer, row["prompt"])
        requests.append({"row": {"id": i}, "prompt": prompt, "limit": args.limit})
    (folder / "requests.json").write_text(json.dumps({"requests": requests, "ends": ends}))


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# ---- the two sides of each comparison: work done, seconds ----

def sampling_args(folder, n, engine, batch_size):
    """Arguments of generate_refs.py for n completions of a prompt, in the type the model is stored in."""
    import generate_refs
    stored = transformers.AutoConfig.from_pretrained(folder / "model").dtype
    sys.argv = ["generate_refs.py", f"--model={folder / 'model'}", "--data=-", "--out=-", f"--num_refs={n}",
                f"--batch_size={batch_size}", f"--dtype={str(stored).removeprefix('torch.')}",
                f"--engine={engine}"]
    if engine == "vllm":
        sys.argv.append('--engine_options={"gpu_memory_utilization": 0.2}')  # it reserves this share
    return generate_refs.arguments()


def start_engine(engine, folder, args, longest):
    """The model that generate_refs.py samples with. vLLM's engine starts here, where no time counts it."""
    import generate_refs
    from model import keep_freed_memory
    if engine == "torch":
        keep_freed_memory(torch.device("cpu"))  # as it does itself
        return load_ours(folder / "model")
    llm = generate_refs.start_vllm(args, longest)
    generate_refs.start_vllm = lambda *_: llm
    return None


def sample_with(engine, folder):
    import generate_refs
    work = json.loads((folder / "requests.json").read_text())
    at_a_time = min(256, 16 * len(work["requests"]))  # as the peer
    args = sampling_args(folder, 16, engine, at_a_time)
    longest = max(len(request["prompt"]) + request["limit"] for request in work["requests"])
    model = start_engine(engine, folder, args, longest)
    began = time.perf_counter()
    done = list(generate_refs.ENGINES[engine](model, work["requests"], args, work["ends"]))
    return sum(len(ids) for _, completions in done for ids in completions), time.perf_counter() - began


def sample_ours(folder):
    return sample_with("torch", folder)


def sample_vllm(folder):
    return sample_with("vllm", folder)


def sample_peer(folder):
    tokenizer, model = load(folder / "model", transformers.AutoModelForCausalLM)
    torch.manual_seed(0)
    work, total = json.loads((folder / "requests.json").read_text()), 0
    pad = tokenizer.pad_token_id
    began = time.perf_counter()
    for i in range(0, len(work["requests"]), 16):  # 256 completions at a time
        requests = work["requests"][i:i + 16]
        inputs = tokenizer.pad({"input_ids": [request["prompt"] for request in requests]},
                               padding_side="left", return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        out = model.generate(**inputs, do_sample=True, top_k=0, num_return_sequences=16, pad_token_id=pad,
                             max_new_tokens=requests[0]["limit"], eos_token_id=work["ends"])[:, width:]
        for ids in out.tolist():
            stops = [t for t, token in enumerate(ids, 1) if token in work["ends"]]
            total += min(stops, default=len(ids))
    return total, time.perf_counter() - began


def score_ours(folder):
    import score
    sys.argv = ["score.py", "--data=refs", "--out=out", f"--reward=model:{folder / 'reward_model'}",
                "--dtype=float32"]
    reward_model = score.RewardModel(score.arguments())
    todo = []
    for row in read(folder, "refs"):
        todo.append((row, [completion["text"] for completion in row["ref_completions"]]))
    began = time.perf_counter()
    return sum(len(rewards) for _, rewards in reward_model(todo)), time.perf_counter() - began


@torch.no_grad()
def score_peer(folder):
    tokenizer, model = load(folder / "reward_model", transformers.AutoModelForSequenceClassification)
    total, began = 0, time.perf_counter()
    for row in read(folder, "refs"):
        texts = [row["prompt"] + completion["text"] for completion in row["ref_completions"]]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        total += len(model(**inputs).logits.tolist())
    return total, time.perf_counter() - began


def train_ours(folder):
    """The steps, and the reference pass."""
    import dataset
    seconds, all_logps = [], dataset.all_logps

    def timed(*args):
        began = time.perf_counter()
        logps = all_logps(*args)
        seconds.append(time.perf_counter() - began)
        return logps
    dataset.all_logps = timed
    sys.argv = ["train.py", f"--model={folder / 'model'}", f"--data={folder / 'pairs.jsonl'}",
                f"--out={folder / 'run'}", "--loss=dpo", "--train_on=chosen_rejected", "--batch_size=8",
                "--learning_rate=1e-6", "--dtype=float32"]
    runpy.run_path(str(REPO / "train.py"), run_name="__main__")
    seconds += [row["seconds"] for row in read(folder / "run", "metrics") if "seconds" in row]
    return len(read(folder, "pairs")), sum(seconds)


def train_peer(folder):
    import datasets
    import trl
    tokenizer, model = load(folder / "model", transformers.AutoModelForCausalLM)
    config = trl.DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-6,
        max_length=None, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True)
    trainer = trl.DPOTrainer(model, args=config, processing_class=tokenizer,
                             train_dataset=datasets.Dataset.from_list(read(folder, "pairs")))
    began = time.perf_counter()
    trainer.train()
    return len(read(folder, "pairs")), time.perf_counter() - began


def train_products(folder):
    """The limit: nothing but the matrix products of the reference pass, the forward and the backward."""
    _, model = load(folder / "model", transformers.AutoModelForCausalLM)
    pairs, completion_tokens, tokens = read(folder, "pairs"), 0, 0
    for pair in pairs:
        lengths = [len(pair[side].split()) for side in ("chosen", "rejected")]
        completion_tokens += sum(lengths)
        tokens += sum(lengths) + 2 * len(pair["prompt"].split())
    batches = math.ceil(tokens / 1024)
    began = time.perf_counter()
    for _ in range(batches):
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                n = completion_tokens // batches if name == "lm_head" else 1024
                multiply(layer.weight.data, n)
    return len(pairs), time.perf_counter() - began


def multiply(weight, n):
    """The four products of a linear layer on n tokens."""
    x, gradient = torch.ones(n, weight.shape[1]), torch.ones(n, weight.shape[0])
    _ = x @ weight.T     # of the reference pass
    _ = x @ weight.T     # forward
    _ = gradient @ weight  # backward: the gradient of x
    _ = gradient.T @ x     # and that of the weight


def load(path, kind):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return tokenizer, kind.from_pretrained(path, dtype="auto").eval()


def load_ours(path):
    """A causal LM as this project loads it, in the type it is stored in."""
    from model import prepare
    model = load(path, transformers.AutoModelForCausalLM)[1]
    prepare(model)
    return model


SIDES = {  # name: (the unit of work, the default of --n, {side: its function}); the first side is ours
    "sample": ("tokens", 16, {"ours": sample_ours, "generate()": sample_peer, "vLLM": sample_vllm}),
    "score": ("completions", 64, {"ours": score_ours, "prompt by prompt": score_peer}),
    "train": ("pairs", 64, {"ours": train_ours, "matrix products alone": train_products,
                            "TRL's DPOTrainer": train_peer})}
SMALL = {"sample": 4, "score": 16, "train": 32}  # --n of `all`
ENVIRONMENT = {"vLLM": "vllm_python", "TRL's DPOTrainer": "trl_python"}  # sides that need one of their own


# ---- growth: the lines of a picture, and what to time for a point of each ----

def grow_step(length, words, folder, line):
    """A forward and a backward pass on one completion of `length` tokens."""
    from model import Policy
    make_model(folder, words)
    model = load_ours(folder / "model")
    policy, tokens = Policy(model), torch.randint(3, words, (1, length))

    def ours():
        policy(tokens, torch.tensor([1]), torch.tensor([length])).sum().backward()

    def plain():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        logits.log_softmax(2).gather(2, tokens[:, 1:, None]).sum().backward()
    return {"this": ours, "all logits at once": plain}[line]


def grow_references(n, folder, line):
    """Sampling n completions of 64 tokens to one prompt of 512."""
    import generate_refs
    make_model(folder)
    prompt = torch.randint(3, WORDS, (1, 512))
    if line == "generate()":
        _, model = load(folder / "model", transformers.AutoModelForCausalLM)
        return lambda: model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0,
            num_return_sequences=n, min_new_tokens=64, max_new_tokens=64, pad_token_id=0)
    engine = {"this": "torch", "vLLM": "vllm"}[line]
    args = sampling_args(folder, n, engine, n)
    model = start_engine(engine, folder, args, 576)

    def sampled():
        request = {"row": {"id": 0}, "prompt": prompt[0].tolist(), "limit": 64}
        list(generate_refs.ENGINES[engine](model, [request], args, []))
    return sampled


def grow_prompts(n, folder, line):
    """From n rows of 2 sampled completions of 500 tokens and 50 reference rewards to arrays that train."""
    import dataset
    from model import load_tokenizer
    from tokens import decode
    make_model(folder)
    tokenizer, model = load_tokenizer(folder / "model"), load_ours(folder / "model")
    ids = np.random.default_rng(0).integers(3, WORDS, 500)
    text = decode(tokenizer, tokenizer("w5 w6").input_ids, ids)
    sampled = {"text": text, "token_ids": ids.tolist(), "finish_reason": "length"}
    row = {"prompt": "w5 w6", "samples": [sampled] * 2, "sample_rewards": [0.1, 0.9],
           "ref_rewards": [k / 50 for k in range(50)]}
    with open(folder / "rows.jsonl", "w") as file:
        file.writelines(json.dumps({"id": i} | row) + "\n" for i in range(n))

    def ours():
        choices = dataset.Choices(train_on="samples", needs_reward=True, needs_refs=True)
        dataset.load(folder / "rows.jsonl", folder / "cache", folder / "model", tokenizer, model, choices)
    return {"this": ours}[line]


def grow_tokens(length, folder, line):
    return grow_step(length, WORDS, folder, line)


def grow_words(words, folder, line):
    return grow_step(512, words, folder, line)


GROWTH = {  # what grows: (points, lines, f(point, folder, line) -> what to time)
    "tokens of a sequence": ((256, 512, 1024, 2048, 4096), ("this", "all logits at once"), grow_tokens),
    "words of the vocabulary": ((8000, 32000, 64000, 128000), ("this", "all logits at once"), grow_words),
    "reference completions": ((1, 4, 16, 64), ("this", "generate()", "vLLM"), grow_references),
    "prompts": ((1000, 3000, 10000, 30000), ("this",), grow_prompts)}


def grow(title, x, line, folder):
    """(seconds, GB beyond what loading took) of one point."""
    run = GROWTH[title][2](x, folder, line)
    before = gigabytes()
    seconds = []
    for _ in range(1 if title == "prompts" else 4):  # the first warms up; prompts would be found in the cache
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds), gigabytes() - before


def exponent(points, values):
    """e of the power law value ~ point^e through the last two points."""
    return math.log(values[-1] / values[-2]) / math.log(points[-1] / points[-2])


def growth(args):
    """Draw --out: seconds above, peak memory below, for each of GROWTH; each point in its own process."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(2, len(GROWTH), figsize=(14, 6), layout="constrained")
    for (title, (points, lines, _)), (top, bottom) in zip(GROWTH.items(), axes.T):
        for line in available(lines, args):
            values = []
            for x in points:
                with tempfile.TemporaryDirectory() as folder:
                    values.append(child("growth", f"--point={title}:{x}:{line}", f"--folder={folder}",
                                        python=interpreter(line, args)))
                print(f"{title} {x:,}, {line}: {values[-1][0]:.3f} s, {values[-1][1]:.3f} GB", flush=True)
            seconds, memory = zip(*values)
            top.plot(points, seconds, "o-", label=f"{line}: x^{exponent(points, seconds):.2f}")
            bottom.plot(points, memory, "o-")
        top.set(title=title, ylim=(0, None))
        bottom.set(xlabel=title, ylim=(0, None))
        top.locator_params("x", nbins=4)
        bottom.locator_params("x", nbins=4)
        top.legend()
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak GB, without loading")
    figure.savefig(args.out, dpi=120)


# ---- running them ----

def available(sides, args):
    """Those that need no environment of their own, or whose interpreter is given."""
    return [side for side in sides if interpreter(side, args)]


def interpreter(side, args):
    return getattr(args, ENVIRONMENT[side]) if side in ENVIRONMENT else sys.executable


def gigabytes():
    """The most memory that this process has used so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def child(*flags, python=sys.executable):
    """What this script prints last with these flags, from JSON."""
    done = subprocess.run([python, __file__, *flags], check=False, capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def run(args, name, folder, side):
    """One side in a process and a folder of its own: {"rate", "work", "seconds", "gigabytes"}."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for made in folder.iterdir():
            (scratch / made.name).symlink_to(made)
        return child(name, f"--side={side}", f"--folder={scratch}", python=interpreter(side, args))


def compare(args, name):
    """{side: the best of its runs}, the sides in turn."""
    best = {}
    sides = available(SIDES[name][2], args)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_work(folder, args.n, args.model)
        if name == "sample":
            make_requests(folder, args)
        for _ in range(args.repeat):
            for side in sides:
                result = run(args, name, folder, side)
                best[side] = max(result, best.get(side, result), key=lambda r: r["rate"])
    return best


def show(unit, best):
    """A Markdown table of one comparison, with the ratios."""
    ours = best["ours"]
    print(f"\n| | {unit}/s | peak GB | {unit} | ours, as a multiple: speed | memory |\n|{' --- |' * 6}")
    for side, r in best.items():
        speed, memory = ours["rate"] / r["rate"], ours["gigabytes"] / r["gigabytes"]
        print(f"| {side} | {r['rate']:,.2f} | {r['gigabytes']:.2f} | {r['work']:,} | "
              f"{speed:.2f} | {memory:.2f} |")
    sys.stdout.flush()


def everything(args):
    """Every comparison in small, then the sandbox."""
    for name, (unit, _, _) in SIDES.items():
        args.n = SMALL[name]
        show(unit, compare(args, name))
    print(flush=True)
    command = [sys.executable, REPO / "tests/bench_sandbox.py", "--trivial=2000", "--bad=4"]
    subprocess.run(command, check=True)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=(*SIDES, "all", "growth"))
    add("--n", type=int, help="prompts (of 16 completions each) or pairs; default 16, 64, 64. Not for all")
    add("--repeat", type=int, default=2, help="runs of each side; the best counts (default %(default)s)")
    add("--trl_python", help="train: the interpreter of an environment with trl and torch")
    add("--vllm_python", help="sample, growth: the interpreter of an environment with vllm")
    add("--model", help="sample: the folder of a model of yours")
    add("--data", help="sample: JSONL file of its prompts")
    add("--limit", type=int, default=LONGEST,
        help="sample: longest completion, in tokens (default %(default)s)")
    add("--out", default="growth.png", help="growth: the picture (default %(default)s)")
    add("--side", help=argparse.SUPPRESS)  # `child` sets these three
    add("--point", help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if bool(args.model) != bool(args.data) or args.model and args.what != "sample":
        parser.error("--model and --data go together, and are for sample")
    return args


def main():
    args = arguments()
    if args.point:
        title, x, line = args.point.split(":")
        return print(json.dumps(grow(title, int(x), line, args.folder)))
    if args.side:
        work, seconds = SIDES[args.what][2][args.side](args.folder)
        rate = {"rate": work / seconds, "work": work, "seconds": seconds, "gigabytes": gigabytes()}
        return print(json.dumps(rate))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{torch.get_num_threads()} threads, {versions}")
    if args.what == "growth":
        return growth(args)
    if args.what == "all":
        return everything(args)
    unit, n, _ = SIDES[args.what]
    args.n = args.n or n
    show(unit, compare(args, args.what))


if __name__ == "__main__":
    main()
