"""Sample completions from a model: the reference completions whose rewards give QRPO its quantiles, or an evaluation's.

Reads prompts (rows with `prompt`: a string or chat messages), writes the rows to OUT with `ref_completions` (or, with
--field=samples, `samples`): a list of {"text", "token_ids", "finish_reason"}. An end token stands in token_ids only
where the model sampled it ("stop"); a completion that ran out of tokens has finish_reason "length". A killed run
continues; under torchrun or in a SLURM array the processes share the rows. --engine=vllm hands the sampling to vLLM,
where that is installed.

    python generate_refs.py --model=data/minicode/model --data=data/minicode/train.jsonl --out=out/refs
"""
import collections
import hashlib
import importlib.util
import itertools
import os
import time
import types

import numpy as np
import torch
import transformers
from tqdm import tqdm

import rows
from model import (context_length, decode, end_ids, get_device, get_dtype, identity, load_model, load_tokenizer,
                   output_layer, pad, row_prompt_ids)


def arguments():
    parser = rows.Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub name of the causal LM")
    add("--data", required=True, help="JSONL file or folder of prompts")
    add("--out", required=True, help="folder for the rows with completions")
    add("--field", default="ref_completions", choices=("ref_completions", "samples"),
        help="samples: those of a trained policy, beside the references, to evaluate it or to train on")
    add("--num_refs", type=int, default=16, help="completions per prompt")
    add("--temperature", type=float, default=1.0, help="of the softmax; 0 is greedy")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    add("--max_new_tokens", type=int, default=512, help="longest completion, in tokens")
    add("--batch_size", type=int, default=128,
        help="completions sampled at a time; memory grows with it")
    add("--engine", default="torch", choices=ENGINES, help="what samples")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU, else float32")
    add("--seed", type=int, default=0, help="of the random numbers")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    args = parser.parse_args()
    for name in ("num_refs", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            rows.fail(f"--{name} must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        rows.fail("--temperature must be at least 0, and --top_p in (0, 1]")
    if args.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        rows.fail("--engine=vllm: vLLM is not installed here; pip install vllm, or omit --engine")
    return args


def random_key(args, row_id, k):
    """128 bits for the k-th completion of a row: the same however the work is batched or shared. Those of samples are
    not those of references: a policy near its reference would give each of them a twin.
    """
    name = f"{args.seed}/{row_id}/{k}" + (f"/{args.field}" if args.field == "samples" else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")


def sample_tokens(logits, u, temperature, top_p):
    """One token per row by the inverse of the cumulative distribution. logits (batch, vocab), u (batch,) -> (batch,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, -1)
    order, k = None, 256
    while top_p < 1:  # the likeliest k: far cheaper than sorting the vocabulary, and nearly always enough
        top, order = probs.topk(min(k, probs.shape[-1]))
        if k >= probs.shape[-1] or (top.sum(-1) > top_p).all():
            probs = top.masked_fill(top.cumsum(-1) - top >= top_p, 0)  # the token that crosses top_p stays
            break
        k *= 8
    cdf = probs.cumsum(-1)
    # strictly below the total, so that rounding never picks a token of probability 0 at the end
    point = (u * cdf[:, -1]).minimum(cdf[:, -1] * (1 - 2 ** -23))
    token = torch.searchsorted(cdf, point[:, None], right=True).clamp(max=probs.shape[-1] - 1)
    return (token if order is None else order.gather(-1, token))[:, 0]


class Cache(transformers.Cache):
    """Keys and values of the sequences in flight, written in place: a DynamicCache copies all of them at every step.

    Each buffer is (batch_size, heads, columns, dim). Sequence i is row i; its tokens end at column `end`, the same for
    all, so that a step writes one column, and begin at starts[i]. The rows in use are the first len(starts):

        . . a a a a a a _ _     starts = [2, 4, 5], end = 8: `join` puts a new sequence below, its end at `end` as well;
        . . . . b b b b _ _     `leave` moves the last one into the place of one that ended; with no column left,
        . . . . . c c c _ _     `make_room` copies all of them to the left of a wider buffer
    """

    def __init__(self, batch_size):
        super().__init__(layers=[])
        self.rows, self.buffers, self.starts, self.end = batch_size, [], [], 0

    def get_seq_length(self, layer_idx=0):
        return self.end - min(self.starts)  # columns before all starts are left out of sight

    def get_mask_sizes(self, query_length, layer_idx):
        return self.get_seq_length() + query_length, 0

    def update(self, keys, values, layer_idx, *args, **kwargs):
        n, first = len(self.starts), min(self.starts)
        for buffer, new in zip(self.buffers[2 * layer_idx:], (keys, values)):
            buffer[:n, :, self.end] = new[:, :, 0]
        return [buffer[:n, :, first:self.end + 1] for buffer in self.buffers[2 * layer_idx:2 * layer_idx + 2]]

    def make_room(self, before=0):
        """New buffers, with the sequences at their left end but at least `before` columns from it, and 128 free."""
        n, first = len(self.starts), min(self.starts, default=self.end)
        end = max(before, self.end - first)
        shift = end - self.end
        for i, old in enumerate(self.buffers):  # zeros: what is masked must still be finite
            self.buffers[i] = old.new_zeros(self.rows, old.shape[1], end + 128, old.shape[3])
            self.buffers[i][:n, :, first + shift:end] = old[:n, :, first:self.end]
        self.starts, self.end = [start + shift for start in self.starts], end

    def join(self, prefix, i, length):
        """A new last sequence: the first `length` tokens of row i of the tensors in `prefix`."""
        self.buffers = self.buffers or [tensor[:0, :, :0] for tensor in prefix]
        if self.end < length:
            self.make_room(length)
        for buffer, tensor in zip(self.buffers, prefix):
            buffer[len(self.starts), :, self.end - length:self.end] = tensor[i, :, :length]
        self.starts.append(self.end - length)

    def leave(self, i):
        """Sequence i has ended: the last one takes its row."""
        last = self.starts.pop()
        if i < len(self.starts):
            self.starts[i] = last
            for buffer in self.buffers:
                buffer[i, :, last:self.end] = buffer[len(self.starts), :, last:self.end]


def prefill(model, requests, args):
    """One forward pass over some prompts; yields each of their completions to sample with what it starts from."""
    if not requests:
        return
    cache, lens = transformers.DynamicCache(), [len(request["prompt"]) for request in requests]
    # padded on the right without a mask: the padding comes after everything that a causal model can look at
    tokens = pad([request["prompt"] for request in requests], model.device)
    hidden = model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
    prefix = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    for i, request in enumerate(requests):
        request["completions"], request["left"] = [[] for _ in range(args.num_refs)], args.num_refs
        for k, ids in enumerate(request["completions"]):
            generator = np.random.Generator(np.random.Philox(random_key(args, request["row"]["id"], k)))
            u = generator.random(request["limit"], np.float32)
            yield {"request": request, "ids": ids, "u": u, "start": (prefix, i, lens[i]),
                   "hidden": hidden[i:i + 1, lens[i] - 1]}


@torch.no_grad()
def sample(model, requests, args, ends):
    """Sample num_refs completions of every request {"row", "prompt": token ids, "limit": most new tokens}.

    Yields (row, completions as lists of token ids) as they end. batch_size completions are in flight: one that has
    ended makes place for the next. Each prompt is read once, by one forward pass with its neighbours.
    """
    logits_of, requests, ready = output_layer(model), iter(requests), collections.deque()
    cache, flying, hidden = Cache(args.batch_size), [], []
    while True:
        while len(flying) < args.batch_size:
            if not ready:  # a quarter of the batch at a time: enough prompts to fill the machine
                some = -(-args.batch_size // (4 * args.num_refs))
                ready.extend(prefill(model, list(itertools.islice(requests, some)), args))
            if not ready:
                break
            flying.append(ready.popleft())
            cache.join(*flying[-1].pop("start"))
            hidden.append(flying[-1].pop("hidden"))
        if not flying:
            return
        u = torch.tensor([float(one["u"][len(one["ids"])]) for one in flying], device=model.device)
        token = sample_tokens(logits_of(torch.cat(hidden)), u, args.temperature, args.top_p).tolist()
        for i in reversed(range(len(flying))):
            one, request = flying[i], flying[i]["request"]
            one["ids"].append(token[i])
            if token[i] in ends or len(one["ids"]) == request["limit"]:
                cache.leave(i)
                flying[i] = flying[-1]
                flying.pop()
                request["left"] -= 1
                if request["left"] == 0:
                    yield request["row"], request["completions"]
        hidden = []
        if flying:
            if cache.end == cache.buffers[0].shape[2]:
                cache.make_room()
            starts = torch.tensor(cache.starts, device=model.device)[:, None]
            mask = torch.arange(min(cache.starts), cache.end + 1, device=model.device) >= starts
            newest = torch.tensor([one["ids"][-1] for one in flying], device=model.device)
            hidden = [model.base_model(input_ids=newest[:, None], attention_mask=mask.long(),
                                       position_ids=cache.end - starts, past_key_values=cache,
                                       use_cache=True).last_hidden_state[:, -1]]
            cache.end += 1


def sample_vllm(model, requests, args, ends):
    """As `sample`, by vLLM, with a seed of its own for every completion. Its random numbers are not `sample`'s."""
    if "LOCAL_RANK" in os.environ:  # torchrun: every process is an engine of its own, on its own GPU
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        local = os.environ["LOCAL_RANK"]
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(local)] if gpus else local
        for name in [n for n in os.environ if n.startswith("TORCHELASTIC_") or n in (
                "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]:
            del os.environ[name]  # else vLLM would wait for the others
    import vllm
    requests = list(requests)
    if not requests:
        return
    engine = vllm.LLM(model=args.model, dtype="bfloat16" if args.dtype == "auto" else args.dtype, seed=args.seed,
                      trust_remote_code=args.trust_remote_code, max_num_seqs=args.batch_size,
                      max_model_len=max(len(request["prompt"]) + request["limit"] for request in requests))
    some = -(-16 * args.batch_size // args.num_refs)  # prompts at a time: a kill loses them
    for start in range(0, len(requests), some):
        chunk = requests[start:start + some]
        jobs = [(request, k) for request in chunk for k in range(args.num_refs)]
        outputs = engine.generate(
            [{"prompt_token_ids": request["prompt"]} for request, _ in jobs],
            [vllm.SamplingParams(temperature=args.temperature, top_p=args.top_p, max_tokens=request["limit"],
                                 seed=random_key(args, request["row"]["id"], k) % 2 ** 63, stop_token_ids=ends,
                                 detokenize=False) for request, k in jobs], use_tqdm=False)
        outputs = [output.outputs[0] for output in outputs]
        for output in outputs:
            if (output.finish_reason == "stop") != (output.token_ids[-1] in ends):
                rows.fail("--engine=vllm: this version of vLLM leaves end tokens out of token_ids; use another")
        for i, request in enumerate(chunk):
            yield request["row"], [list(output.token_ids) for output in
                                   outputs[i * args.num_refs:(i + 1) * args.num_refs]]


ENGINES = {"torch": sample, "vllm": sample_vllm}


def describe(path, trust_remote_code):
    """The configurations of a model without its weights."""
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    try:
        generation_config = transformers.GenerationConfig.from_pretrained(path)
    except OSError:  # it has none of its own
        generation_config = transformers.GenerationConfig.from_model_config(config)
    return types.SimpleNamespace(config=config, generation_config=generation_config)


def main():
    args = arguments()
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    if args.engine == "vllm":
        model = describe(args.model, args.trust_remote_code)
    else:
        device = get_device()
        model = load_model(args.model, get_dtype(args.dtype, device), device, args.trust_remote_code)
        if getattr(model, "_is_stateful", False):
            rows.fail(f"{args.model}: a {model.config.model_type} model keeps a recurrent state, which this sampler "
                      "does not carry; give --engine=vllm")
    ends, context = end_ids(model, tokenizer), context_length(model)

    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out", "batch_size")}
    settings["files"] = rows.fingerprint(identity(args.model))

    def request(row):
        """What `sample` needs of a row."""
        if row.get(args.field) is not None:
            rows.fail(f"{row['__at__']}: already has {args.field}; remove them, or give --field=samples")
        prompt = row_prompt_ids(tokenizer, row)
        if len(prompt) >= context:
            rows.fail(f"{row['__at__']}: the prompt has {len(prompt)} tokens and the model's context holds {context}; "
                      "drop the row or shorten it")
        return {"row": row, "prompt": prompt, "limit": min(args.max_new_tokens, context - len(prompt))}

    left, part = rows.continue_stage(args.data, args.out, settings, check=request)
    requests = (request(row) for row in rows.select(args.data, left))
    bar = tqdm(total=len(left), unit="prompt", desc="generate", disable=rows.share()[0] != 0, smoothing=0)
    made_by = {"model": args.model, "temperature": args.temperature, "top_p": args.top_p}
    total, start = 0, time.time()
    for row, completions in ENGINES[args.engine](model, requests, args, ends):
        row[args.field] = [{"text": decode(tokenizer, ids), "token_ids": ids,
                            "finish_reason": "stop" if ids[-1] in ends else "length"} for ids in completions]
        row["made_by"] = row.get("made_by", {}) | {args.field: made_by}
        rows.append(part, row)
        total += sum(map(len, completions))
        bar.update()
        bar.set_postfix_str(f"{total / (time.time() - start):,.0f} tokens/s")
    bar.close()


if __name__ == "__main__":
    main()
