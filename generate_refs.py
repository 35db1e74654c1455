"""Sample completions from a model: the reference completions whose rewards give QRPO its quantiles, or
those of a trained policy, to evaluate it.

Reads prompts (rows with `prompt`: a string or chat messages). Writes the rows to OUT with
`ref_completions` (with --field=samples: `samples`), a list of {"text", "token_ids", "finish_reason"}. An
end token is in token_ids only where the model sampled it ("stop"); a completion that ran out of tokens has
finish_reason "length". A killed run continues; under torchrun the processes share the rows. --engine=vllm
samples with vLLM, if it is installed.

    python generate_refs.py --model=data/minicode/model --data=data/minicode/train.jsonl --out=out/refs
    python generate_refs.py ... --engine=vllm --batch_size=512 --engine_options='{"tensor_parallel_size": 4}'
"""
import argparse
import collections
import hashlib
import importlib.util
import itertools
import math
import os
import time
import types

import numpy as np
import torch
import transformers

import rows
from kv_cache import Cache
from model import (backbone, context_length, get_device, keep_freed_memory, load_config, load_model,
                   load_tokenizer, logits_of, model_fingerprint, sampling_dtype)
from tokens import decode, end_ids, pad, prompt_text, row_prompt_ids, sampled_prompt


def arguments():
    parser = rows.Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub name of the causal LM")
    add("--data", required=True, help="JSONL file or folder of prompts")
    add("--out", required=True, help="folder for the rows with completions")
    add("--field", default="ref_completions", choices=("ref_completions", "samples"),
        help="samples: of a trained policy, stored beside the references, to evaluate it or to train on")
    add("--num_refs", type=rows.count, default=16, help="completions per prompt")
    add("--temperature", type=rows.not_negative, default=1.0, help="divides the logits; 0 is greedy")
    add("--top_p", type=rows.share, default=1.0, help="sample from the likeliest tokens of this probability")
    add("--max_new_tokens", type=rows.count, default=512, help="longest completion, in tokens")
    add("--max_length", type=rows.whole, default=0,
        help="limit on the tokens of prompt and completion; rows whose prompt reaches it are dropped and "
             "counted. 0: the model's context, and such rows are an error")
    add("--batch_size", type=rows.count, default=128,
        help="completions sampled at a time; memory grows with it")
    add("--engine", default="torch", choices=ENGINES, help="torch: the sampler in this file; or vllm")
    add("--engine_options", type=rows.json_object, default={}, metavar="JSON",
        help="""vllm: more arguments of vllm.LLM, such as '{"gpu_memory_utilization": 0.5}'""")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 on a GPU, with vLLM, and for models stored in it on CPUs that multiply it; for "
             "samples, the type of the references beside them")
    add("--template_args", type=rows.json_object, default={}, metavar="JSON",
        help="""what the chat template gets besides the messages, such as '{"enable_thinking": false}'""")
    add("--keep_special_tokens", action="store_true",
        help="in the texts that rewards see, such as a special <think>; by default, as in TRL, they see none")
    add("--seed", type=rows.whole, default=0, help="random seed")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    args = parser.parse_args()
    if args.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        rows.fail("--engine=vllm: vLLM is not installed here; pip install vllm, or omit --engine")
    if args.engine_options and args.engine != "vllm":
        rows.fail("--engine_options are for --engine=vllm; add it")
    if args.dtype == "auto" and args.field == "samples":
        args.dtype = dtype_of_references(args.data)
    if args.dtype == "auto" and args.engine == "vllm":
        args.dtype = "bfloat16"
    return args


def dtype_of_references(data):
    """The --dtype with which the references in rows were sampled, or auto: what is compared has one dtype."""
    first = next(rows.stream(data))
    dtype = first.get("made_by", {}).get("ref_completions", {}).get("dtype")
    return dtype if dtype in ("float32", "bfloat16") else "auto"


# ---- which token comes next ----

def random_key(args, row_id, k):
    """128 bits for the k-th completion of a row: the same however the work is batched or shared. Samples of
    a policy get others than its references, which a policy near its reference model would repeat.
    """
    name = f"{args.seed}/{row_id}/{k}"
    if args.field == "samples":
        name += "/samples"
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:16], "little")


def token_probs(logits, args):
    """The distribution to sample from, not normalised, (batch, vocab). Another rule is one line here."""
    logits = logits.float()
    if args.temperature != 1:
        logits = logits / args.temperature
    probs = torch.softmax(logits, -1)
    if args.top_p < 1:
        probs = keep_top_p(probs, args.top_p)
    return probs


def own_distribution(args):
    """Whether `token_probs` leaves the model's distribution as it is; if not, quantiles and KL are biased."""
    logits = torch.linspace(-30, 0, 200_000)[None]  # as many tokens as any model has, some hardly possible
    probs = token_probs(logits, args)
    return torch.allclose(probs / probs.sum(), logits.softmax(-1), rtol=1e-3, atol=0)


def keep_top_p(probs, top_p):
    """probs with 0 for every token after the one that crosses top_p, likeliest first."""
    vocab = probs.shape[-1]
    k = min(256, vocab)  # far cheaper than sorting the vocabulary, and nearly always enough
    top, order = probs.topk(k)
    while k < vocab and not (top.sum(-1) > top_p).all():
        k = min(8 * k, vocab)
        top, order = probs.topk(k)
    before = top.cumsum(-1) - top
    top = top.masked_fill(before >= top_p, 0)
    return torch.zeros_like(probs).scatter(-1, order, top)


def sample_tokens(logits, u, args):
    """Inverse transform sampling: logits (batch, vocab), u (batch,) uniform in [0,1) -> tokens (batch,)."""
    if args.temperature == 0:
        return logits.argmax(-1)
    cdf = token_probs(logits, args).cumsum(-1)
    total = cdf[:, -1]
    point = (u * total).minimum(total * (1 - 2 ** -23))  # below the total, so never an impossible token
    tokens = torch.searchsorted(cdf, point[:, None], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)


# ---- the sampler ----

class Completion:
    """A completion that is being sampled: its token ids so far, and a random number for each that it may
    get. `prefill` adds the number of its prompt in the cache, and `Cache` the column where it starts.
    """

    def __init__(self, request, k, args):
        self.request = request
        self.ids = []
        key = random_key(args, request["row"]["id"], k)
        generator = np.random.Generator(np.random.Philox(key))
        self.u = generator.random(request["limit"], np.float32)


def prefill(model, cache, requests, args):
    """One forward pass over some prompts; yields each of their completions with what it starts from."""
    if not requests:
        return
    prompt_cache = transformers.DynamicCache()
    # padded on the right without a mask: the padding comes after everything that a causal model can look at
    tokens = pad([request["prompt"] for request in requests], model.device)
    output = backbone(model)(input_ids=tokens, past_key_values=prompt_cache, use_cache=True)
    tensors = []
    for layer in prompt_cache.layers:
        tensors += [layer.keys, layer.values]
    lengths = [len(request["prompt"]) for request in requests]
    first = cache.add_prompts(tensors, lengths)
    ends = [length - 1 for length in lengths]
    hidden = output.last_hidden_state[range(len(ends)), ends]  # (prompts, dim)
    logits = logits_of(model, output, hidden)  # (prompts, vocab)
    for i, request in enumerate(requests):
        request["completions"] = [Completion(request, k, args) for k in range(args.num_refs)]
        request["missing"] = args.num_refs
        for completion in request["completions"]:
            completion.prompt = first + i
            completion.logits = logits[i:i + 1]  # of its first token, (1, vocab)
            yield completion


def decode_step(model, cache, tokens):
    """The logits after one more token each, (batch, vocab)."""
    with cache.step(model) as (mask, positions):
        output = model(input_ids=tokens[:, None], attention_mask=mask, position_ids=positions,
                       past_key_values=cache, use_cache=True)
    return output.logits[:, -1]


@torch.no_grad()
def sample(model, requests, args, ends):
    """Sample num_refs completions of every request {"row", "prompt": token ids, "limit": most new tokens}.

    Yields (row, completions as lists of token ids) as they end. batch_size completions are active at a time;
    when one ends, the next takes its place. A prompt is read once, in one forward pass with its neighbours.
    """
    if not hasattr(model, "shares_prompts"):
        check_sampler(model)
    requests = iter(requests)
    prompts_at_a_time = math.ceil(args.batch_size / (4 * args.num_refs))  # enough to fill the machine
    cache = Cache(args.batch_size, share=model.shares_prompts and args.num_refs > 1)
    ready = collections.deque()  # completions whose prompt has been read
    logits = []                  # tensors (n, vocab): of the next token of each active completion
    while True:
        while len(cache.active) < args.batch_size:
            if not ready:
                ready.extend(prefill(model, cache, list(itertools.islice(requests, prompts_at_a_time)), args))
            if not ready:
                break
            completion = ready.popleft()
            cache.join(completion)
            logits.append(completion.logits)
            del completion.logits
        if not cache.active:
            return

        u = torch.tensor([float(c.u[len(c.ids)]) for c in cache.active], device=model.device)
        u = u.split([len(part) for part in logits])  # part by part: to join the logits would copy them
        tokens = torch.cat([sample_tokens(part, its_u, args) for part, its_u in zip(logits, u)]).tolist()

        for i in reversed(range(len(tokens))):  # backwards, as `leave` moves completions of later rows
            completion, request = cache.active[i], cache.active[i].request
            completion.ids.append(tokens[i])
            if tokens[i] in ends or len(completion.ids) == request["limit"]:
                cache.leave(i)
                request["missing"] -= 1
                if request["missing"] == 0:
                    yield request["row"], [c.ids for c in request["completions"]]

        logits = []
        if cache.active:
            newest = torch.tensor([c.ids[-1] for c in cache.active], device=model.device)
            logits = [decode_step(model, cache, newest)]


@torch.no_grad()
def check_sampler(model):
    """Set model.shares_prompts: whether it can read a prompt once for all its completions (`attend` in
    kv_cache.py). Refuse a model whose cache `sample` does not carry at all, such as a recurrent state.
    """
    for shares in ((True, False) if model.device.type == "cpu" else (False,)):
        try:
            try_cache(model, Cache(2, shares))
            model.shares_prompts = shares
            return
        except Exception as failure:  # whatever the code of a family raises
            error = failure
    rows.fail(f"{model.name_or_path}: a {model.config.model_type} model has a cache or recurrent state that "
              f"this sampler does not carry ({error}); give --engine=vllm")


def try_cache(model, cache):
    """Raise ValueError unless two sequences of different lengths, read token by token with this cache, get
    the logits that the model computes without one.
    """
    vocab, steps = model.config.get_text_config().vocab_size, 8
    sequences = [[(31 * i + 7) % vocab for i in range(length + steps)] for length in (3, 12)]
    requests = [{"row": {"id": i}, "prompt": ids[:-steps], "limit": 1} for i, ids in enumerate(sequences)]
    args = argparse.Namespace(num_refs=1, seed=0, field="samples")
    for completion in prefill(model, cache, requests, args):
        cache.join(completion)
    logits = []  # of each step, (2, vocab)
    for i in range(steps, 0, -1):
        tokens = torch.tensor([ids[-i] for ids in sequences], device=model.device)
        logits.append(decode_step(model, cache, tokens))
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    tolerance = 0.01 if exact else 0.1  # in standard deviations
    for ids, found in zip(sequences, torch.stack(logits, 1)):  # (steps, vocab)
        ids = torch.tensor([ids], device=model.device)
        own = model(input_ids=ids, use_cache=False).logits[0, -steps:]
        errors = (found - own).abs().mean(1)  # (steps,)
        # their median, as in bfloat16 single tokens may go to other experts
        if not errors.median() < tolerance * own.std():
            raise ValueError("with its cache it computes other logits than without")


def sample_vllm(model, requests, args, ends):
    """As `sample`, by vLLM, with a seed for every completion. Its random numbers are others."""
    if "LOCAL_RANK" in os.environ:
        leave_torchrun()
    requests = list(requests)
    if not requests:
        return
    import vllm
    llm = start_vllm(args, max(len(request["prompt"]) + request["limit"] for request in requests))
    engine = llm.llm_engine
    waiting = collections.deque(itertools.product(range(len(requests)), range(args.num_refs)))
    found = collections.defaultdict(dict)  # number of the request: {k: token ids}
    while waiting or engine.has_unfinished_requests():
        while waiting and engine.get_num_unfinished_requests() < 2 * args.batch_size:  # so it never runs dry
            i, k = waiting.popleft()
            request = requests[i]
            seed = random_key(args, request["row"]["id"], k) % 2 ** 63
            params = vllm.SamplingParams(
                temperature=args.temperature, top_p=args.top_p, max_tokens=request["limit"], seed=seed,
                stop_token_ids=ends, detokenize=False,
                output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY)
            prompt = engine.renderer.render_cmpl([{"prompt_token_ids": request["prompt"]}])[0]
            engine.add_request(f"{i}/{k}", prompt, params)
        for output in engine.step():  # completions that have ended
            i, k = map(int, output.request_id.split("/"))
            ids, reason = list(output.outputs[0].token_ids), output.outputs[0].finish_reason
            if reason != ("stop" if ids and ids[-1] in ends else "length"):
                rows.fail(f"--engine=vllm: a completion ended by {reason!r} with the tokens {ids[-3:]}; this "
                          "version of vLLM omits end tokens, or failed")
            found[i][k] = ids
            if len(found[i]) == args.num_refs:
                completions = found.pop(i)
                yield requests[i]["row"], [completions[k] for k in range(args.num_refs)]


def start_vllm(args, longest):
    """A vllm.LLM for sequences of up to `longest` tokens."""
    import vllm
    from vllm.platforms import current_platform
    options = {"model": args.model, "seed": args.seed, "trust_remote_code": args.trust_remote_code,
               "dtype": args.dtype, "max_num_seqs": args.batch_size, "max_model_len": longest}
    if current_platform.is_cpu():
        # a prompt that is read in pieces wants its random numbers back, which a CPU's generator cannot give
        options["enable_chunked_prefill"] = False
    try:
        return vllm.LLM(**options | args.engine_options)
    except (TypeError, ValueError, RuntimeError) as error:  # options that do not fit; too little memory
        rows.fail(f"--engine=vllm does not start: {' '.join(str(error).split())[:300]}; see --engine_options")


def leave_torchrun():
    """One engine per process, each on its own GPU: otherwise vLLM would wait for the others."""
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    local = os.environ["LOCAL_RANK"]
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(local)] if gpus else local
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in list(os.environ):
        if name in names or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


ENGINES = {"torch": sample, "vllm": sample_vllm}
HOW_VLLM_RUNS = "tensor_parallel_size", "gpu_memory_utilization", "enforce_eager"  # not what it samples


def describe(path, trust_remote_code):
    """The configurations of a model without its weights."""
    config = load_config(path, trust_remote_code)
    try:
        generation_config = transformers.GenerationConfig.from_pretrained(path)
    except OSError:  # it has none of its own
        generation_config = transformers.GenerationConfig.from_model_config(config)
    return types.SimpleNamespace(config=config, generation_config=generation_config)


def load_sampler(args):
    """The model to sample from, checked; for vLLM, what there is to know of it without its weights."""
    if args.engine == "vllm":
        model = describe(args.model, args.trust_remote_code)
        model.dtype = args.dtype
        return model
    device = get_device()
    keep_freed_memory(device)
    dtype = sampling_dtype(args.dtype, device, load_config(args.model, args.trust_remote_code))
    model = load_model(args.model, dtype, device, args.trust_remote_code)
    check_sampler(model)
    return model


def main():
    args = arguments()
    tokenizer = load_tokenizer(args.model, args.trust_remote_code, args.template_args)
    model = load_sampler(args)
    ends, context = end_ids(model, tokenizer), context_length(model)
    longest = min(context, args.max_length or context)

    settings = vars(args).copy()
    for name in ("data", "out", "batch_size"):  # the completions do not depend on these
        del settings[name]
    options = {name: value for name, value in args.engine_options.items() if name not in HOW_VLLM_RUNS}
    settings |= {"engine_options": options, "files": model_fingerprint(args.model),
                 "dtype": str(model.dtype).removeprefix("torch.")}  # auto may be another where it continues

    def request(row):
        """What `sample` needs of a row, which then says what it was sampled after."""
        rewards = {"ref_completions": "ref_rewards", "samples": "sample_rewards"}[args.field]
        for name, values in row.items():  # score.py would take old rewards for those of the new completions
            if values is not None and (name == args.field or name.startswith(rewards)):
                rows.fail(f"{row['__at__']}: already has {name}; remove {args.field} and all their rewards, "
                          "or give --field=samples")
        sampled_after = sampled_prompt(row) or {"template_args": args.template_args}
        prompt = row_prompt_ids(tokenizer, model, row)
        if len(prompt) >= longest and not args.max_length:
            rows.fail(f"{row['__at__']}: the prompt has {len(prompt)} tokens and the model's context holds "
                      f"{context}; drop the row, or give --max_length={context} to drop all such")
        sampled_after |= {"text": prompt_text(tokenizer, prompt), "token_ids": prompt}
        row = row | {"made_by": row.get("made_by", {}) | {"prompt": sampled_after}}
        return {"row": row, "prompt": prompt, "limit": min(args.max_new_tokens, longest - len(prompt))}

    too_long = set()

    def check(row):
        if request(row)["limit"] < 1:
            too_long.add(str(row["id"]))

    left, part = rows.continue_stage(args.data, args.out, settings, check)
    left -= too_long
    main_process = rows.rank_and_world()[0] == 0
    if too_long and main_process:
        print(f"{args.data}: {len(too_long)} rows dropped, whose prompts have {longest} tokens or more")
    requests = (request(row) for row in rows.select(args.data, left))
    args.batch_size = min(args.batch_size, args.num_refs * max(1, len(left)))
    made_by = settings | {"own_distribution": own_distribution(args)}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - set(ends)
    counts, start = collections.Counter(), time.time()
    bar = rows.progress(total=len(left), unit="prompt", desc="generate", smoothing=0)
    for row, completions in ENGINES[args.engine](model, requests, args, ends):
        row[args.field] = as_field(row, completions, tokenizer, ends, args)
        row["made_by"] |= {args.field: made_by}
        rows.append(part, row)
        counts["completions"] += len(completions)
        counts["tokens"] += sum(map(len, completions))
        counts["truncated"] += sum(ids[-1] not in ends for ids in completions)
        counts["hidden"] += sum(not special.isdisjoint(ids) for ids in completions)
        speed = counts["tokens"] / (time.time() - start)
        bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        bar.update()
    bar.close()
    if counts and main_process:
        print(summary(args, counts), flush=True)


def as_field(row, completions, tokenizer, ends, args):
    """The completions of a row, lists of token ids, as its field holds them."""
    prompt = row["made_by"]["prompt"]["token_ids"]
    found = []
    for ids in completions:
        text = decode(tokenizer, prompt, ids, ends, args.keep_special_tokens)
        reason = "stop" if ids[-1] in ends else "length"
        found.append({"text": text, "token_ids": ids, "finish_reason": reason})
    return found


def summary(args, counts):
    """The last line: what this process made, and what is odd about it."""
    text = (f"{args.out}: {counts['completions']:,} completions of {counts['tokens']:,} tokens; "
            f"{counts['truncated'] / counts['completions']:.1%} ran out of tokens "
            f"(--max_new_tokens={args.max_new_tokens})")
    if counts["hidden"] and not args.keep_special_tokens:
        text += (f"; {counts['hidden']} hold special tokens that their texts, and so rewards, leave out "
                 "(--keep_special_tokens keeps them)")
    return text


if __name__ == "__main__":
    main()
