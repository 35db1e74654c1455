"""Sample completions from a model: the reference completions whose rewards give QRPO its quantiles, or an evaluation's.

Reads prompts (rows with `prompt`: a string or chat messages), writes the rows to OUT with `ref_completions` (or, with
--field=samples, `samples`): a list of {"text", "token_ids", "finish_reason"}. An end token stands in token_ids only where the model sampled it ("stop");
a completion that ran out of tokens has finish_reason "length". A killed run continues; under torchrun or in a SLURM
array the processes share the rows.

    python generate_refs.py --model=data/minicode/model --data=data/minicode/test.jsonl --out=out/try --num_refs=4
"""
import argparse
import hashlib
import time

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache

import models
import rows


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub name of the causal LM")
    add("--data", required=True, help="JSONL file or folder of prompts")
    add("--out", required=True, help="folder for the rows with completions")
    add("--field", default="ref_completions", choices=("ref_completions", "samples"),
        help="samples: of a trained policy, beside the references, to evaluate it or to train on (default %(default)s)")
    add("--num_refs", type=int, default=16, help="completions per prompt (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="of the softmax; 0 is greedy (default %(default)s)")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (default %(default)s)")
    add("--max_new_tokens", type=int, default=512, help="longest completion, in tokens (default %(default)s)")
    add("--batch_size", type=int, default=128, help="completions sampled at a time (default %(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU, or float32")
    add("--seed", type=int, default=0, help="of the random numbers (default %(default)s)")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    args = parser.parse_args()
    for name in ("num_refs", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            rows.fail(f"--{name} must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        rows.fail("--temperature must be at least 0, and --top_p in (0, 1]")
    return args


def uniforms(seed, row_id, k, n):
    """n random numbers in [0,1) of the k-th completion of a row: the same however the work is batched or shared."""
    digest = hashlib.sha256(f"{seed}/{row_id}/{k}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little"))).random(n, np.float32)


def sample_tokens(logits, u, temperature, top_p):
    """One token per row by the inverse of the cumulative distribution. logits (batch, vocab), u (batch,) -> (batch,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, -1)
    order = None
    if top_p < 1:
        probs, order = probs.sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # the token that crosses top_p stays
    cdf = probs.cumsum(-1)
    # strictly below the total, so that rounding never picks a token of probability 0 at the end
    point = (u * cdf[:, -1]).minimum(cdf[:, -1] * (1 - 2 ** -23))
    token = torch.searchsorted(cdf, point[:, None], right=True).clamp(max=probs.shape[-1] - 1)
    return (token if order is None else order.gather(-1, token))[:, 0]


@torch.no_grad()
def sample(model, prompts, u, limits, ends, temperature, top_p):
    """Sample one completion for every entry of `prompts`, all at once; equal neighbours share one prefill.

    prompts: lists of token ids. u: (batch, steps) uniforms. limits: most new tokens of each. Returns lists of token
    ids.
    """
    device, logits_of = model.device, models.output_layer(model)
    unique = {tuple(p): i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    lens = torch.tensor([len(p) for p in unique], device=device)
    width = int(lens.max())
    # prompts are padded on the left, so that every sequence continues at the same column
    tokens = torch.stack([torch.tensor((0,) * (width - len(p)) + p) for p in unique]).to(device)
    mask = (torch.arange(width, device=device) >= width - lens[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    hidden = model.base_model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                              use_cache=True).last_hidden_state[:, -1]
    which = torch.tensor([unique[tuple(p)] for p in prompts], device=device)
    cache.batch_select_indices(which)
    hidden, mask, position = hidden[which], mask[which], lens[which]

    u, limits = u.to(device), torch.tensor(limits, device=device)
    ends = torch.tensor(ends, device=device)
    alive = torch.arange(len(prompts), device=device)  # sequences still being sampled, as rows of the batch
    sampled = torch.zeros(len(prompts), int(limits.max()), dtype=torch.long, device=device)
    count = torch.zeros(len(prompts), dtype=torch.long, device=device)
    for step in range(sampled.shape[1]):
        token = sample_tokens(logits_of(hidden), u[alive, step], temperature, top_p)
        sampled[alive, step] = token
        count[alive] = step + 1
        going = ~torch.isin(token, ends) & (limits[alive] > step + 1)
        if not going.all():  # drop the rows that have ended
            keep = going.nonzero()[:, 0]
            if len(keep) == 0:
                break
            cache.batch_select_indices(keep)
            alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        hidden = model.base_model(input_ids=token[:, None], attention_mask=mask, position_ids=position[:, None],
                                  past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        position = position + 1
    return [tokens[:n] for tokens, n in zip(sampled.tolist(), count.tolist())]


def main():
    args = arguments()
    device = models.device()
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "out", "batch_size")}
    tokenizer = models.load_tokenizer(args.model, args.trust_remote_code)
    model = models.load_model(args.model, models.pick_dtype(args.dtype, device), device, args.trust_remote_code)
    ends, context = models.end_ids(model, tokenizer), models.context_length(model)
    if not ends:
        rows.fail(f"{args.model}: neither its generation_config nor its tokenizer names an end token; set eos_token_id")

    todo, part = rows.continue_stage(args.data, args.out, settings, require=("prompt",))
    for row in todo:
        if row.get(args.field) is not None:
            rows.fail(f"{row['__at__']}: has {args.field} already; remove them, or give --field=samples")
        row["__ids__"] = models.prompt_ids(tokenizer, models.check_prompt(row))
        if len(row["__ids__"]) >= context:
            rows.fail(f"{row['__at__']}: the prompt has {len(row['__ids__'])} tokens and the model's context holds "
                      f"{context}; drop the row or shorten it")
    todo.sort(key=lambda row: len(row["__ids__"]))  # prompts of similar length share a batch: little padding

    bar = tqdm(total=len(todo), unit="prompt", desc="generate", disable=rows.share()[0] != 0, smoothing=0)
    total, start = 0, time.time()
    jobs = [(row, k) for row in todo for k in range(args.num_refs)]
    for i in range(0, len(jobs), args.batch_size):
        batch = jobs[i:i + args.batch_size]
        limits = [min(args.max_new_tokens, context - len(row["__ids__"])) for row, _ in batch]
        u = torch.from_numpy(np.stack([uniforms(args.seed, row["id"], k, max(limits)) for row, k in batch]))
        completions = sample(model, [row["__ids__"] for row, _ in batch], u, limits, ends, args.temperature, args.top_p)
        for (row, k), ids in zip(batch, completions):
            row.setdefault("__sampled__", []).append({
                "text": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
                "token_ids": ids, "finish_reason": "stop" if ids[-1] in ends else "length"})
            total += len(ids)
            if k == args.num_refs - 1:
                sampled = row.pop("__sampled__")
                rows.append(part, {key: v for key, v in row.items() if key != "__ids__"} | {args.field: sampled})
                bar.update()
        bar.set_postfix_str(f"{total / (time.time() - start):,.0f} tokens/s")
    bar.close()


if __name__ == "__main__":
    main()
