"""Rewarded rows as flat arrays: what a training regime takes from each row, as token ids, rewards and reference
rewards; and the batches made of them.

Reads the rows that score.py writes. Every completion is a slice of one long array of tokens; pairs stand side by side,
chosen before rejected. Sampled completions keep the ids that were sampled; only a dataset's own text is tokenised.

    python -c 'import dataset; help(dataset.build)'
"""
import hashlib
import itertools
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import models
import rows

PAIRED = ("best_worst", "random_pairs", "chosen_rejected")
REGIMES = ("refs", *PAIRED, "completion", "samples")
PAIRWISE = ("dpo", "simpo", "rebel")  # losses of pairs


def load(path, cache, main_rank, barrier, model_path, tokenizer, model, **choices):
    """`build`, done once by one process and kept in `cache`: arrays mapped from disk, shared by all ranks of a node."""
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in rows.files(path)]
    folder = Path(cache) / f"data-{rows.fingerprint([files, models.identity(model_path), choices])}"
    if main_rank and not folder.exists():
        data = build(path, tokenizer, model, **choices)
        new = folder.with_name(f".new_{folder.name}_{os.getpid()}")
        with rows.writing(new):
            new.mkdir(parents=True)
            for name, array in data.items():
                np.save(new / f"{name}.npy", array)
        rows.write_json(new / "about.json", {"fingerprint": fingerprint(data), "summary": summary(data)})
        try:
            os.replace(new, folder)
        except OSError:  # another run that shares the cache was faster
            shutil.rmtree(new)
    barrier()
    about = rows.load_json(folder / "about.json")
    if main_rank:
        print(f"{path}: {about['summary']}")
    return {"fingerprint": about["fingerprint"]} | {
        file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}


def build(path, tokenizer, model, train_on, loss="qrpo", side="both", min_reward=None, num_candidates=0,
          num_ref_rewards=0, max_length=0):
    """The completions that a regime (one of REGIMES) trains on, as a dict of numpy arrays; n completions of R rows:

    tokens (total,) all ids, prompt and completion after one another; starts (n,) where each begins; lens, prompt_lens
    (n,); rewards (n,) NaN if unknown; row (n,) its row; side (n,) +1 for the better and -1 for the worse: of its
    pair, or than its row's mean reference reward; among_refs (n,) whether it is one of its own references; truncated
    (n,); ref_rewards (R, num_ref_rewards) NaN where unknown; std (R,) their standard deviation over its mean; ids (R,).
    side keeps one side of pairs, min_reward what has at least this reward. Dropped and counted: what the loss cannot
    use (an unknown reward, for pairwise losses a pair of equal rewards), and what is longer than max_length.
    """
    ends, context = models.end_ids(model, tokenizer), models.context_length(model)
    vocab, limit = model.config.get_text_config().vocab_size, min(context, max_length or context)
    ids, refs, sequences, facts, dropped = [], [], [], [], {}  # two of rows, two of completions
    # only DPO, SimPO and SFT on the dataset's own text can do without rewards
    own_text = train_on in ("chosen_rejected", "completion")
    needs_reward = loss in ("qrpo", "rebel") or min_reward is not None or not own_text

    def drop(why, group):
        dropped[why] = dropped.get(why, 0) + len(group)

    def read(item):
        """(r, row) -> its id, its place in the file, its prompt's tokens, its reference rewards, its groups."""
        r, row = item
        at, prompt = row["__at__"], models.row_prompt_ids(tokenizer, row)
        listed = row.get("ref_rewards") or []
        if not isinstance(listed, list):
            rows.fail(f"{at}: ref_rewards must be a list of numbers; run score.py")
        if len(listed) < max(num_ref_rewards, loss == "qrpo"):
            rows.fail(f"{at}: has {len(listed)} ref_rewards; sample and score references" + (
                f", or lower --num_ref_rewards={num_ref_rewards}" if num_ref_rewards else ""))
        ref = np.array([number(x, at, "ref_rewards") for x in listed[:num_ref_rewards or None]], np.float32)
        if train_on == "completion":
            groups = [[text_completion(row, "completion", "reward", tokenizer, prompt, ends)]]
        elif train_on == "chosen_rejected":
            groups = [[text_completion(row, "chosen", "chosen_reward", tokenizer, prompt, ends),
                       text_completion(row, "rejected", "rejected_reward", tokenizer, prompt, ends)]]
        else:
            groups = sampled_groups(row, train_on, num_candidates, len(ref), vocab, tokenizer if r < 100 else None)
        return row["id"], at, prompt, ref, groups

    each = in_threads if own_text else map  # sampled ids are not tokenised again
    found = each(read, enumerate(rows.stream(path, require=("prompt",))))
    for r, (name, at, prompt, ref, groups) in enumerate(tqdm(found, desc="read", unit="row", delay=5)):
        ids.append(name)
        refs.append(ref)
        known = ref[~np.isnan(ref)]
        for group in groups:
            rewards = [reward for _, reward, _, _ in group]
            if needs_reward and any(map(math.isnan, rewards)):
                drop("of unknown reward", group)
                continue
            if loss == "qrpo" and len(known) == 0:
                drop("without a known reference reward", group)
                continue
            if loss in PAIRWISE and rewards[0] == rewards[1]:
                drop("of equal reward in their pair", group)
                continue
            lengths = [len(prompt) + len(tokens) for tokens, _, _, _ in group]
            if max(lengths) > limit:
                if not max_length:
                    rows.fail(f"{at}: prompt and completion have {max(lengths)} tokens and the model's context holds "
                              f"{context}; drop the row, or give --max_length={context} to drop all such")
                drop("too long", group)
                continue
            if len(group) == 2:
                sides = 1, -1
            else:
                mean = np.float32(known.mean(dtype=float)) if len(known) else np.nan
                sides = [int(np.sign(np.nan_to_num(np.float32(rewards[0]) - mean)))]
            for (tokens, reward, among, truncated), which in zip(group, sides):
                if len(group) == 2 and side != "both" and which != (1 if side == "chosen" else -1):
                    continue
                if min_reward is not None and reward < min_reward:
                    drop(f"of reward below {min_reward}", [0])
                    continue
                sequences.append(np.array(prompt + tokens, np.int32))
                facts.append((len(prompt), reward, r, which, among, truncated))
    for reason, count in dropped.items():
        print(f"{path}: {count} completions dropped, {reason}", flush=True)
    if not sequences:
        rows.fail(f"{path}: nothing is left to train on")

    kinds = {"prompt_lens": np.int64, "rewards": np.float32, "row": np.int64, "side": np.int8, "among_refs": np.bool_,
             "truncated": np.bool_}
    data = {key: np.array(values, kinds[key]) for key, values in zip(kinds, zip(*facts))}
    order = rows.order(path, ids)  # rows, and with them completions, as if one process had written the folder
    place = np.argsort(order)
    by_row = np.argsort(place[data["row"]], kind="stable")
    data = {key: values[by_row] for key, values in data.items()} | {"ids": np.array([str(ids[i]) for i in order])}
    data["row"] = place[data["row"]]
    data["lens"] = np.array([len(sequences[i]) for i in by_row], np.int64)
    data["starts"] = np.cumsum(data["lens"]) - data["lens"]
    data["tokens"] = np.concatenate([sequences[i] for i in by_row])
    data["ref_rewards"] = np.full((len(ids), max(map(len, refs))), np.nan, np.float32)
    for values, i in zip(data["ref_rewards"], order):
        values[:len(refs[i])] = refs[i]
    count = (~np.isnan(data["ref_rewards"])).sum(1)
    spread = np.zeros(len(ids))
    spread[count > 1] = np.nanstd(data["ref_rewards"][count > 1], 1, ddof=1)
    data["std"] = (spread / (spread[count > 1].mean() or 1) if (count > 1).any() else spread).astype(np.float32)
    return data


def in_threads(function, items):
    """function(item) for all items, in order, on all cores: tokenizers work outside Python's lock."""
    items = iter(items)
    with ThreadPoolExecutor() as pool:
        while block := list(itertools.islice(items, 256)):
            for future in [pool.submit(function, item) for item in block]:
                try:
                    result = future.result()
                except SystemExit as error:  # rows.fail of the first item, in order, that fails
                    pool.shutdown(cancel_futures=True)
                    rows.fail(error.code)
                yield result


def summary(data):
    """One line on a dataset: its size, and what QRPO should know of its rewards."""
    refs, row = data["ref_rewards"], data["row"]
    text = f"{len(row):,} completions of {len(np.unique(row)):,} prompts, {data['lens'].sum():,} tokens with prompts"
    if data["truncated"].any():
        text += f"; {data['truncated'].mean():.1%} of the completions ran out of tokens"
    if refs.shape[1]:
        tied = np.concatenate([(refs[row[i:i + 65536]] == data["rewards"][i:i + 65536, None]).sum(1)
                               for i in range(0, len(row), 65536)]) > data["among_refs"]
        known = ~np.isnan(refs)
        with np.errstate(invalid="ignore"):
            equal = np.nanmax(np.where(known, refs, -np.inf), 1) == np.nanmin(np.where(known, refs, np.inf), 1)
        hint = " (--quantile=exact is for ties)" if tied.mean() > 0.5 else ""
        text += (f"; mean reward {np.nanmean(data['rewards']):.4g}, of references {np.nanmean(refs):.4g}"
                 f"; {tied.mean():.1%} of the completions tie with a reference{hint}; all references are equal in "
                 f"{equal.mean():.1%} of the rows")
        if not known.all():
            text += f"; {1 - known.mean():.1%} of the reference rewards are unknown"
    return text


def number(value, at, field):
    """A reward as a float; null is NaN."""
    if value is None:
        return math.nan
    # beyond float32 a reward would be infinite
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -3e38 < value < 3e38:
        rows.fail(f"{at}: {field} must be finite numbers or null, not {value!r}; score the row again")
    return float(value)


def text_completion(row, field, reward, tokenizer, start, ends):
    """(token ids, reward, False, False) of a dataset's own completion."""
    at = row["__at__"]
    if not row.get(field) or not isinstance(row[field], (str, list)):
        rows.fail(f"{at}: has no {field!r}; give it, or train on something else (--train_on)")
    try:
        ids = models.completion_ids(tokenizer, row["prompt"], start, row[field], ends)
    except Exception as error:  # whatever a template raises
        rows.fail(f"{at}: {field} cannot be turned into tokens ({error})")
    return ids, number(row.get(reward), at, reward), False, False


def sampled_groups(row, train_on, num_candidates, width, vocab, tokenizer):
    """The sampled completions that a regime takes, as groups of one or two (token ids, reward, is among the quantile's
    references, ran out of tokens).
    """
    at, names = row["__at__"], ("samples", "sample_rewards") if train_on == "samples" else (
        "ref_completions", "ref_rewards")
    completions, rewards = (row.get(name) for name in names)
    if not isinstance(completions, list) or not isinstance(rewards, list) or len(completions) != len(rewards):
        rows.fail(f"{at}: needs {names[0]} and as many {names[1]}; run generate_refs.py and score.py first")
    pool = []
    for k, (completion, reward) in enumerate(zip(completions[:num_candidates or None], rewards)):
        if not isinstance(completion, dict) or not isinstance(completion.get("token_ids"), list):
            rows.fail(f"{at}: {names[0]} {k} has no list of token_ids; sample with generate_refs.py")
        ids = np.array(completion["token_ids"])
        if ids.dtype.kind != "i" or ids.ndim != 1 or ids.min() < 0 or ids.max() >= vocab:
            rows.fail(f"{at}: the token_ids of {names[0]} {k} are empty, or not all of the model's vocabulary of "
                      f"{vocab}; sample again with this model")
        if tokenizer and completion.get("text") != tokenizer.decode(
                completion["token_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False):
            rows.fail(f"{at}: the token_ids of {names[0]} {k} are not its text in this model's tokenizer; "
                      "train the model that sampled them, or sample again")
        pool.append((completion["token_ids"], number(reward, at, names[1]), train_on != "samples" and k < width,
                     completion.get("finish_reason") == "length"))
    if train_on in ("refs", "samples"):
        return [[c] for c in pool]
    if train_on == "best_worst":
        known = [c for c in pool if not math.isnan(c[1])]
        best = max(known, key=lambda c: c[1], default=None)
        pairs = [(best, min((c for c in known if c is not best), key=lambda c: c[1]))] if len(known) > 1 else []
    else:
        pairs = zip(pool[0::2], pool[1::2])
    return [sorted(pair, key=lambda c: -c[1]) for pair in pairs]


def batch(data, index, device):
    """Completions `index` as tensors: tokens (batch, time) right-padded, ref_rewards (batch, num_ref_rewards), others
    (batch,).
    """
    spans = zip(data["starts"][index], data["lens"][index])
    out = {key: torch.as_tensor(data[key][index], device=device)
           for key in ("lens", "prompt_lens", "rewards", "side", "among_refs", "ref_logps", "targets") if key in data}
    row = data["row"][index]
    return out | {"tokens": models.pad([data["tokens"][start:start + n] for start, n in spans], device),
                  "ref_rewards": torch.as_tensor(data["ref_rewards"][row], device=device),
                  "std": torch.as_tensor(data["std"][row], device=device)}


def micro_batches(longest, unit, tokens, world=1):
    """Split units (of `unit` completions, the longest of each being longest (n,)) into blocks of similar length.

    Yields positions; a rank takes block[rank::world], which pads to at most `tokens` tokens (one unit may exceed it).
    The longest come first: what does not fit into memory shows at once.
    """
    order = np.argsort(-np.asarray(longest), kind="stable")
    while len(order):
        size = max(1, int(tokens // (unit * longest[order[0]]))) * world
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def logps(policy, data, tokens, device, rank=0, world=1):
    """log pi of every completion, float32 (n,) on device; this rank's share, 0 elsewhere. policy: a models.Policy.
    tokens: of a forward pass, see `micro_batches`.
    """
    out = torch.zeros(len(data["lens"]), dtype=torch.float32, device=device)
    with tqdm(total=len(out), desc="log-probabilities", unit="completion", disable=rank != 0) as bar:
        for block in micro_batches(data["lens"], 1, tokens, world):
            index = block[rank::world] if rank < len(block) else block[:1]  # sharded models need every rank each time
            b = batch(data, index, device)
            values = policy(b["tokens"], b["prompt_lens"], b["lens"])
            if rank < len(block):
                out[torch.as_tensor(index, device=device)] = values
            bar.update(len(block))
    return out


def fingerprint(data):
    """16 hex digits that stand for these arrays: tokens (so data and tokenizer), rewards, regime."""
    digest = hashlib.sha256()
    for key in sorted(data):
        digest.update(np.ascontiguousarray(data[key]).tobytes())
    return digest.hexdigest()[:16]
