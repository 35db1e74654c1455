"""Rewarded rows as flat arrays: what a training regime takes from each row, as token ids, rewards and reference
rewards.

Reads the rows that score.py writes. Every completion is a slice of one long array of tokens; pairs stand side by side,
chosen before rejected. Sampled completions keep the ids that were sampled; only a dataset's own text is tokenised.

    python -c 'import dataset; help(dataset.build)'
"""
import hashlib
import math

import numpy as np
import torch
from tqdm import tqdm

import models
import rows

PAIRED = ("best_worst", "random_pairs", "chosen_rejected")
REGIMES = ("refs", *PAIRED, "completion")


def build(path, tokenizer, model, train_on, num_candidates=0, num_ref_rewards=0, max_length=0,
          ties=True, chosen_only=False):
    """The completions that a regime (one of REGIMES) trains on, as a dict of numpy arrays; n completions of R rows:

    tokens (total,) all ids, prompt and completion after one another; starts (n,) where each begins; lens, prompt_lens
    (n,); rewards (n,) NaN if unknown; row (n,) its row; side (n,) +1 for the better and -1 for the worse: of its
    pair, or than its row's mean reference reward; among_refs (n,) whether it is one of its own references;
    ref_rewards (R, num_ref_rewards) NaN where unknown; std (R,) their standard deviation over its mean. ties=False
    drops pairs of equal reward; chosen_only=True drops the worse of each pair.
    """
    table = rows.read(path, require=("prompt",))
    ends, context = models.end_ids(model, tokenizer), models.context_length(model)
    vocab = model.config.get_text_config().vocab_size
    width = num_ref_rewards or max(len(row.get("ref_rewards") or []) for row in table)
    ref_rewards = np.full((len(table), width), np.nan, np.float32)
    sequences, out, dropped = [], {k: [] for k in ("prompt_lens", "rewards", "row", "side", "among_refs")}, {}

    def drop(why, count):
        dropped[why] = dropped.get(why, 0) + count

    for r, row in enumerate(table):
        at, prompt = row["__at__"], models.prompt_ids(tokenizer, models.check_prompt(row))
        known = [number(x, at, "ref_rewards") for x in (row.get("ref_rewards") or [])[:width]]
        if len(known) < num_ref_rewards:
            rows.fail(f"{at}: has {len(known)} ref_rewards, fewer than --num_ref_rewards={num_ref_rewards}; sample and "
                      "score more references, or lower it")
        ref_rewards[r, :len(known)] = known
        if train_on == "completion":
            groups = [[text_completion(row, "completion", "reward", tokenizer, ends)]]
        elif train_on == "chosen_rejected":
            groups = [[text_completion(row, "chosen", "chosen_reward", tokenizer, ends),
                       text_completion(row, "rejected", "rejected_reward", tokenizer, ends)]]
        else:
            groups = reference_groups(row, train_on, num_candidates, width, tokenizer if r < 100 else None)
        mean = np.nanmean(ref_rewards[r]) if len(known) and not np.isnan(ref_rewards[r]).all() else math.nan
        for group in groups:
            if len(group) == 2:
                sides = (1, -1)
                if not ties and group[0][1] == group[1][1]:
                    drop("of equal reward in their pair", 2)
                    continue
                group, sides = (group[:1], (1,)) if chosen_only else (group, sides)
            else:
                sides = [int(np.sign(group[0][1] - mean)) if not math.isnan(group[0][1] - mean) else 0]
            lengths = [len(prompt) + len(ids) for ids, _, _ in group]
            if max(lengths) > min(context, max_length or context):
                if not max_length:
                    rows.fail(f"{at}: prompt and completion have {max(lengths)} tokens and the model's context holds "
                              f"{context}; drop the row, or give --max_length={context} to drop all such")
                drop("too long", len(group))
                continue
            for (ids, reward, among), side in zip(group, sides):
                if not ids or max(ids) >= vocab or min(ids) < 0:
                    rows.fail(f"{at}: a completion is empty, or holds token ids beyond the model's vocabulary of "
                              f"{vocab}; sample again with this model")
                sequences.append(np.array(prompt + ids, np.int32))
                for key, value in zip(out, (len(prompt), reward, r, side, among)):
                    out[key].append(value)
    for reason, count in dropped.items():
        print(f"{path}: {count} completions dropped, {reason}", flush=True)
    if not sequences:
        rows.fail(f"{path}: nothing is left to train on")
    lens = np.array([len(s) for s in sequences], np.int64)
    types = (np.int64, np.float32, np.int64, np.int8, np.bool_)
    spread = np.array([np.std(x[~np.isnan(x)], ddof=1) if (~np.isnan(x)).sum() > 1 else math.nan for x in ref_rewards])
    mean_spread = np.nanmean(spread) if not np.isnan(spread).all() else 1
    return {"tokens": np.concatenate(sequences), "starts": np.cumsum(lens) - lens, "lens": lens,
            "ref_rewards": ref_rewards, "std": np.nan_to_num(spread / (mean_spread or 1)).astype(np.float32)} | {
        key: np.array(values, dtype) for (key, values), dtype in zip(out.items(), types)}


def number(value, at, field):
    """A reward as a float; null is NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        rows.fail(f"{at}: {field} must be finite numbers or null, not {value!r}; score the row again")
    return float(value)


def text_completion(row, field, reward, tokenizer, ends):
    """(token ids, reward, False) of a dataset's own completion."""
    at = row["__at__"]
    if not row.get(field):
        rows.fail(f"{at}: has no {field!r}; give it, or train on something else (--train_on)")
    try:
        ids = models.completion_ids(tokenizer, row["prompt"], row[field], ends)
    except (ValueError, TypeError, KeyError) as error:
        rows.fail(f"{at}: {field} cannot be turned into tokens ({error})")
    return ids, number(row.get(reward), at, reward), False


def reference_groups(row, train_on, num_candidates, width, tokenizer):
    """The references that a regime takes, as groups of one or two (token ids, reward, is among the quantile's
    references).
    """
    at = row["__at__"]
    completions, rewards = row.get("ref_completions"), row.get("ref_rewards")
    if not isinstance(completions, list) or not isinstance(rewards, list) or len(completions) != len(rewards):
        rows.fail(f"{at}: needs ref_completions and as many ref_rewards; run generate_refs.py and score.py first")
    pool = []
    for k, (completion, reward) in enumerate(zip(completions, rewards)):
        if num_candidates and k >= num_candidates:
            break
        if not isinstance(completion, dict) or not isinstance(completion.get("token_ids"), list):
            rows.fail(f"{at}: reference completion {k} has no list of token_ids; sample with generate_refs.py")
        text = completion.get("text")
        if tokenizer and text != tokenizer.decode(
                completion["token_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False):
            rows.fail(f"{at}: the token_ids of reference completion {k} are not its text in this model's tokenizer; "
                      "train the model that sampled them, or sample again")
        pool.append((completion["token_ids"], number(reward, at, "ref_rewards"), k < width))
    pairs = list(zip(pool[0::2], pool[1::2])) if train_on == "random_pairs" else []
    known = [c for c in pool if not math.isnan(c[1])]
    if train_on == "refs":
        return [[c] for c in known]
    if train_on == "best_worst":
        pairs = [(max(known, key=lambda c: c[1]), min(known, key=lambda c: c[1]))] if len(known) > 1 else []
    pairs = [pair for pair in pairs if not math.isnan(pair[0][1] + pair[1][1])]
    return [sorted(pair, key=lambda c: -c[1]) for pair in pairs]


def batch(data, index, device):
    """Completions `index` as tensors: tokens (batch, time) right-padded, ref_rewards (batch, num_ref_rewards), others
    (batch,).
    """
    spans = zip(data["starts"][index], data["lens"][index])
    out = {key: torch.as_tensor(data[key][index], device=device)
           for key in ("lens", "prompt_lens", "rewards", "side", "among_refs", "ref_logps") if key in data}
    row = data["row"][index]
    return out | {"tokens": models.pad([data["tokens"][start:start + n] for start, n in spans], device),
                  "ref_rewards": torch.as_tensor(data["ref_rewards"][row], device=device),
                  "std": torch.as_tensor(data["std"][row], device=device)}


@torch.no_grad()
def logps(policy, data, batch_size, device, rank=0, world=1):
    """log pi of every completion, float32 (n,) on device; this rank's share, 0 elsewhere. policy: a models.Policy."""
    order = np.argsort(data["lens"], kind="stable")[rank::world]  # similar lengths share a batch
    out = torch.zeros(len(data["lens"]), dtype=torch.float32, device=device)
    for i in tqdm(range(0, len(order), batch_size), desc="log-probabilities", unit="batch", disable=rank != 0):
        index = order[i:i + batch_size]
        b = batch(data, index, device)
        out[torch.as_tensor(index, device=device)] = policy(b["tokens"], b["prompt_lens"], b["lens"])
    return out


def fingerprint(data):
    """16 hex digits that stand for these arrays: tokens (so data and tokenizer), rewards, regime."""
    digest = hashlib.sha256()
    for key in sorted(data):
        digest.update(np.ascontiguousarray(data[key]).data)
    return digest.hexdigest()[:16]
