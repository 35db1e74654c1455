"""Rewarded rows as flat arrays on disk (the token ids, rewards and reference rewards that a training regime
takes from each row), and batches of them as tensors.

Reads the rows that score.py writes. Every completion is a slice of one long array of tokens; pairs are
side by side, chosen before rejected. Sampled completions keep the ids that were sampled; only a
dataset's own text is tokenised.

    python -c 'import dataset; help(dataset.build)'
"""
import collections
import concurrent.futures
import hashlib
import itertools
import math
import multiprocessing
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import transformers

import qrpo
import rows
from model import (Policy, TokenLogps, any_rank, barrier, chunked_logps, context_length, logits_of,
                   model_fingerprint)
from tokens import check_vocabulary, completion_ids, decode, end_ids, pad, row_prompt_ids, template_args


# ---- regimes: which completions of a row are trained on ----

class Completion(NamedTuple):
    ids: list                 # token ids, with an end token where one was sampled, or after a whole answer
    reward: float             # NaN if unknown
    among_refs: bool = False  # whether its reward is one of the ref_rewards that its quantile is taken among
    truncated: bool = False   # whether it ran out of tokens


def refs(row, reader):
    return [[completion] for completion in reader.sampled(row, "ref_completions", "ref_rewards")]


def samples(row, reader):
    return [[completion] for completion in reader.sampled(row, "samples", "sample_rewards")]


def best_worst(row, reader):
    pool = reader.sampled(row, "ref_completions", "ref_rewards")
    known = [completion for completion in pool if not math.isnan(completion.reward)]
    if len(known) < 2:
        return []
    best = max(known, key=lambda c: c.reward)
    worst = min((c for c in known if c is not best), key=lambda c: c.reward)
    return [[best, worst]]


def random_pairs(row, reader):
    pool = reader.sampled(row, "ref_completions", "ref_rewards")
    pairs = zip(pool[0::2], pool[1::2])
    return [sorted(pair, key=lambda c: -c.reward) for pair in pairs]


def mixed(row, reader):
    """As Apertus was aligned (arXiv 2509.14233): of references and other models' completions, one at
    quantile 1, and one at the highest quantile that is at most 0.2 (or the lowest reference's).
    """
    pool = reader.sampled(row, "ref_completions", "ref_rewards")
    pool += reader.sampled(row, "other_completions", "other_rewards")
    random.Random(repr(row["prompt"])).shuffle(pool)  # among equals, not always a reference
    ref_rewards = reader.ref_rewards(row)
    known = ref_rewards[~np.isnan(ref_rewards)]
    if len(known) == 0:
        return []
    limit = max(0.2, 1 / len(known))
    best, worst, worst_quantile = None, None, -1
    for completion in pool:
        if math.isnan(completion.reward):
            continue
        quantile = (known <= np.float32(completion.reward)).mean()
        if quantile == 1:
            best = best or completion
        elif worst_quantile < quantile <= limit:
            worst, worst_quantile = completion, quantile
    return [[best, worst]] if best and worst else []


def chosen_rejected(row, reader):
    return [[reader.text(row, "chosen", "chosen_reward"), reader.text(row, "rejected", "rejected_reward")]]


def chosen(row, reader):
    return [[reader.text(row, "chosen", "chosen_reward")]]


def completion(row, reader):
    return [[reader.text(row, "completion", "reward")]]


class Regime(NamedTuple):
    size: int         # completions in a group; in a pair the better one comes first
    sampled: bool     # sampled completions, or the dataset's own text
    groups: Callable  # (row, reader) -> list of groups
    help: str


REGIMES = {  # a new regime is one function and one entry
    "refs": Regime(1, True, refs, "all reference completions"),
    "best_worst": Regime(2, True, best_worst, "the best and the worst of them"),
    "random_pairs": Regime(2, True, random_pairs, "references 0 and 1, 2 and 3, ... (not an odd one)"),
    "mixed": Regime(2, True, mixed, "one at quantile 1 and one at 0.2 or less, also of other_completions"),
    "samples": Regime(1, True, samples, "what generate_refs.py --field=samples sampled"),
    "chosen_rejected": Regime(2, False, chosen_rejected, "the dataset's pairs"),
    "chosen": Regime(1, False, chosen, "the chosen completions of these pairs"),
    "completion": Regime(1, False, completion, "the dataset's single completions"),
}


class Choices(NamedTuple):
    """What to take from the rows. The loss decides the first four fields, the user the others."""
    train_on: str = "refs"
    pairs: bool = False         # the loss compares the two of a pair, so they must differ in reward
    needs_reward: bool = False  # drop completions of unknown reward
    needs_refs: bool = False    # drop completions without a known reference reward
    min_reward: float = None    # drop completions of a lower reward
    num_candidates: int = 0     # take only the first N sampled completions; 0: all
    num_ref_rewards: int = 0    # use only the first N reference rewards; 0: all
    max_length: int = 0         # drop what has more tokens, with prompt; 0: refuse what exceeds the context


# ---- from a row to its completions ----

class Reader:
    """Turns rows into completions as token ids; names the row in every error."""

    def __init__(self, tokenizer, model, choices):
        self.tokenizer, self.model, self.choices = tokenizer, model, choices
        self.ends = end_ids(model, tokenizer)
        self.context = context_length(model)
        self.vocab = model.config.get_text_config().vocab_size

    def sampled(self, row, field, rewards_field):
        """The completions that generate_refs.py sampled, with their rewards."""
        at, completions, rewards = row["__at__"], row.get(field), row.get(rewards_field)
        if completions is None or rewards is None or len(completions) != len(rewards):
            made = "" if field == "other_completions" else f"generate_refs.py --field={field} and "
            rows.fail(f"{at}: needs {field} and as many {rewards_field}; run {made}score.py")
        made_by = row.get("made_by", {}).get(field, {})
        if self.choices.num_candidates:
            completions = completions[:self.choices.num_candidates]
        pool = []
        num_refs = 0  # that quantiles are taken among
        if field == "ref_completions":
            num_refs = self.choices.num_ref_rewards or len(rewards)
        for k, (completion, reward) in enumerate(zip(completions, rewards)):
            if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
                rows.fail(f"{at}: {field} {k} must be an object with a `text` and token_ids, as "
                          "generate_refs.py writes them")
            if made_by.get("from_text") or field == "other_completions":  # without this model's token ids
                ids = self.text_ids(row, f"{field} {k}", completion["text"])
            else:
                ids = self.checked_ids(f"{at}: {field} {k}", completion)
                if k == 0 and not self.is_text_of(ids, completion["text"], row["prompt_ids"]):
                    rows.fail(f"{at}: its {field} have token_ids that are not their text in this model's "
                              "tokenizer; train the model that sampled them, or sample again")
            truncated = completion.get("finish_reason") == "length"
            reward = number(reward, at, rewards_field)
            pool.append(Completion(ids, reward, k < num_refs, truncated))
        return pool

    def checked_ids(self, at, completion):
        """The token ids of a sampled completion; refuses those of another tokenizer."""
        ids = np.array(completion.get("token_ids", []))
        # read as unsigned, a negative id is beyond every vocabulary
        if ids.dtype != np.int64 or ids.ndim != 1 or ids.view(np.uint64).max() >= self.vocab:
            rows.fail(f"{at}: its token_ids are empty, or not all in the model's vocabulary of {self.vocab}; "
                      "sample again with this model")
        return ids

    def is_text_of(self, ids, text, prompt):
        """Whether a text is that of sampled ids, with special tokens or without. Other samplers may leave
        out the space that it begins with.
        """
        for keep_special in (False, True):
            for ends in (self.ends, ()):
                found = decode(self.tokenizer, prompt, ids, ends, keep_special)
                if found.strip() == text.strip():
                    return True
        return False

    def text(self, row, field, reward_field):
        """A completion of the dataset's own, tokenised after its prompt."""
        at = row["__at__"]
        if row.get(field) is None:
            rows.fail(f"{at}: has no {field!r}; add it, or train on something else (--train_on)")
        ids = self.text_ids(row, field, row[field])
        return Completion(ids, number(row.get(reward_field), at, reward_field))

    def text_ids(self, row, field, text):
        """The token ids of a whole answer to the row's prompt, with an end token."""
        at, args = row["__at__"], template_args(row)
        try:
            ids = completion_ids(self.tokenizer, row["prompt"], text, self.ends, args)
        except Exception as error:  # whatever a template raises
            rows.fail(f"{at}: {field} cannot be turned into tokens ({error})")
        check_vocabulary(f"{at}: {field}", self.model, ids)
        return ids

    def ref_rewards(self, row):
        """The reference rewards that quantiles are taken among, float32, NaN where unknown."""
        listed = row.get("ref_rewards") or []
        wanted = max(self.choices.num_ref_rewards, int(self.choices.needs_refs))
        if len(listed) < wanted:
            rows.fail(f"{row['__at__']}: has {len(listed)} ref_rewards and {wanted} are needed; sample and "
                      "score references, or lower --num_ref_rewards")
        if self.choices.num_ref_rewards:
            listed = listed[:self.choices.num_ref_rewards]
        return np.array([number(value, row["__at__"], "ref_rewards") for value in listed], np.float32)

    def why_not(self, row, group, known_refs):
        """Why a group of completions cannot be trained on, or None."""
        rewards = [c.reward for c in group]
        unknown = any(math.isnan(reward) for reward in rewards)
        if unknown and (self.choices.needs_reward or REGIMES[self.choices.train_on].sampled):
            return "of unknown reward"
        if any(np.isin(c.ids[:-1], self.ends).any() for c in group):
            return "with an end token before their end"
        if self.choices.needs_refs and len(known_refs) == 0:
            return "without a known reference reward"
        if self.choices.pairs and rewards[0] == rewards[1]:
            return "of equal reward in their pair"
        if self.choices.min_reward is not None and not min(rewards) >= self.choices.min_reward:
            return f"of reward below {self.choices.min_reward}"
        length = len(row["prompt_ids"]) + max(len(c.ids) for c in group)
        limit = min(self.context, self.choices.max_length or self.context)
        if length <= limit:
            return None
        if not self.choices.max_length:
            rows.fail(f"{row['__at__']}: prompt and completion have {length} tokens and the model's context "
                      f"holds {limit}; drop the row, or give --max_length={limit} to drop all such")
        return "too long"

    def read(self, chunk):
        """(position of the first line, [(at, line)]) -> the arrays of these rows, as in `build`, and what
        was dropped.
        """
        first, chunk_lines = chunk
        table = collections.defaultdict(list)
        table["dropped"] = collections.Counter()
        for position, (at, line) in enumerate(chunk_lines, first):
            row = rows.parse(at, line, require=("prompt",))
            row["prompt_ids"] = row_prompt_ids(self.tokenizer, self.model, row)
            ref_rewards = self.ref_rewards(row)
            known = ref_rewards[~np.isnan(ref_rewards)]
            how = other_distribution(row, "ref_completions")
            if how:
                table["sampling"].append(how)
            sampled_by = row.get("made_by", {}).get("ref_completions", {}).get("files")
            if sampled_by:
                table["sampled_by"].append(sampled_by)
            table["ids"].append(row.get("id", position))
            table["ref_rewards"].append(ref_rewards)
            kept = []
            for group in REGIMES[self.choices.train_on].groups(row, self):
                reason = self.why_not(row, group, known)
                if reason:
                    table["dropped"][reason] += len(group)
                else:
                    kept.append(group)
            if kept:
                found = arrays_of(row["prompt_ids"], kept, known)
                found["row"] = np.full(len(found["lens"]), position)
                for name, values in found.items():
                    table[name].append(values)
        for name, kind in KINDS.items():
            table[name] = np.concatenate([np.empty(0, kind), *table[name]], dtype=kind)
        return table


def other_distribution(row, field):
    """How the completions in a field were sampled, if not from the model's own distribution; or None."""
    made_by = row.get("made_by", {}).get(field, {})
    temperature = made_by.get("temperature", 1)
    top_p = made_by.get("top_p", 1)
    how = f"temperature {temperature} and top_p {top_p}"
    if temperature != 1 or top_p != 1:
        return how
    if not made_by.get("own_distribution", True):
        return f"{how}, by another rule (token_probs)"
    return None


def arrays_of(prompt, groups, known_refs):
    """The arrays of `build` for the groups of one row, except `row`. prompt: its token ids; known_refs:
    its known reference rewards.
    """
    prompt = np.array(prompt)
    every = [completion for group in groups for completion in group]
    tokens = []
    for completion in every:
        tokens += [prompt, completion.ids]
    lens = [len(prompt) + len(completion.ids) for completion in every]
    rewards = np.array([completion.reward for completion in every], np.float32)
    among_refs = np.array([completion.among_refs for completion in every])
    others = len(known_refs) - among_refs  # of its references, without itself
    same = np.count_nonzero(rewards[:, None] == known_refs, 1) - among_refs
    return {
        "tokens": np.concatenate(tokens, dtype=np.int32),
        "prompt_lens": np.full(len(every), len(prompt)),
        "lens": np.array(lens),
        "rewards": rewards,
        "side": sides(rewards, len(groups[0]), known_refs),
        "among_refs": among_refs,
        "truncated": np.array([completion.truncated for completion in every]),
        "tied": np.where(others > 0, same / np.maximum(others, 1), 1),
    }


def sides(rewards, size, known_refs):
    """+1 for the better and -1 for the worse: of its pair, or than its row's mean reference reward; 0 if
    unknown. (n,).
    """
    if size == 2:
        return np.tile([1, -1], len(rewards) // 2)
    if len(known_refs) == 0:
        return np.zeros(len(rewards), int)
    mean = known_refs.mean(dtype=float).astype(np.float32)
    side = np.sign(rewards - mean)
    return np.nan_to_num(side).astype(int)


LARGEST = float(np.finfo(np.float32).max)


def number(value, at, field):
    """A reward as a float; null is NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        rows.fail(f"{at}: {field} must be finite numbers or null, not {value!r}; score the row again")
    return float(value)


# ---- from rows to arrays on disk ----

KINDS = {"tokens": np.int32, "prompt_lens": np.int64, "lens": np.int64, "rewards": np.float32,
         "row": np.int64, "side": np.int8, "among_refs": np.bool_, "truncated": np.bool_, "tied": np.float32}


def build(folder, path, tokenizer, model, choices):
    """Write the completions of a dataset that a regime trains on to `folder`, as arrays of n
    completions of R rows:

    tokens (total,) all ids, each prompt followed by its completion; starts (n,) where each begins; lens
    (n,) tokens of prompt and completion; prompt_lens (n,); rewards (n,) NaN if unknown; row (n,); side
    (n,) see `sides`; among_refs, truncated (n,); tied (n,) the share of the other references with the
    same reward, 1 if there is none; ref_rewards (R, num_ref_rewards) NaN where unknown; ids (R,). Also
    about.json: a fingerprint of them all, one line that describes them, and sampled_by, the fingerprints of
    the models that sampled the references.
    """
    reader = Reader(tokenizer, model, choices)
    digest = hashlib.sha256()
    parts = collections.defaultdict(list)  # name: what the chunks have of it
    dropped = collections.Counter()
    with open(folder / "tokens.bin", "wb") as tokens_file:
        for table in rows.progress(in_processes(reader, chunks(path)), desc="read", unit="chunk", delay=5):
            tokens = table.pop("tokens")  # of all chunks they may be more than memory holds
            tokens_file.write(tokens)
            digest.update(tokens)
            dropped.update(table.pop("dropped"))
            for name, values in table.items():
                parts[name].append(values)
    for reason, count in dropped.items():
        print(f"{path}: {count} completions dropped, {reason}", flush=True)
    arrays = {name: np.concatenate(parts[name]) for name in KINDS if name != "tokens"}
    if len(arrays["lens"]) == 0:
        rows.fail(f"{path}: nothing is left of its completions")
    ids, ref_rewards, sampling, sampled_by = (
        list(itertools.chain(*parts[name])) for name in ("ids", "ref_rewards", "sampling", "sampled_by"))
    if len(set(map(str, ids))) < len(ids):
        for _ in rows.stream(path):  # it refuses the second of two equal ids
            pass
    arrays = in_order(rows.order(path, ids), arrays, ids, ref_rewards)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
        digest.update(values)
    about = summary(SimpleNamespace(**arrays), np.concatenate(ref_rewards))
    if sampling and choices.needs_refs:
        about += (f"; WARNING: reference completions were sampled at {', '.join(sorted(set(sampling)))}, so "
                  "quantiles are not those among the model's own completions: sample them at 1 and 1")
    rows.write_json(folder / "about.json", {
        "fingerprint": digest.hexdigest()[:16],
        "summary": about,
        "sampled_by": sorted(set(sampled_by))})


def in_order(order, arrays, ids, ref_rewards):
    """The arrays of `build` with the rows, and so their completions, in an order (see `rows.order`), in which
    one process would have written them. Tokens stay where they are.
    """
    arrays["starts"] = np.cumsum(arrays["lens"]) - arrays["lens"]
    arrays["row"] = np.argsort(order)[arrays["row"]]
    by_row = np.argsort(arrays["row"], kind="stable")
    arrays = {name: values[by_row] for name, values in arrays.items()}
    arrays["ids"] = np.array([str(ids[i]) for i in order])
    most = max(map(len, ref_rewards))
    arrays["ref_rewards"] = np.full((len(ids), most), np.nan, np.float32)
    for r, i in enumerate(order):
        arrays["ref_rewards"][r, :len(ref_rewards[i])] = ref_rewards[i]
    return arrays


CHUNK_BYTES = 1 << 22  # of rows that a process takes at a time: a few rows of many long completions


def chunks(path):
    """The lines of a dataset in chunks: (position of the first line, [(at, line)])."""
    first, chunk, size = 0, [], 0
    for at, line in rows.lines(path):
        chunk.append((at, line))
        size += len(line)
        if size >= CHUNK_BYTES:
            yield first, chunk
            first, chunk, size = first + len(chunk), [], 0
    if chunk:
        yield first, chunk
    elif first == 0:
        rows.fail(f"{path}: holds no rows")


def in_processes(reader, chunks):
    """reader.read(chunk) of all chunks in order, on all cores; few chunks are in memory at a time."""
    global worker_reader
    worker_reader = reader  # the processes are forks, so they have it without being sent it
    cores = len(os.sched_getaffinity(0))
    first = next(chunks)
    second = next(chunks, None)
    if second is None:
        yield reader.read(first)
        return
    waiting = collections.deque()
    with concurrent.futures.ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        for chunk in itertools.chain([first, second], chunks):
            waiting.append(pool.submit(read_in_worker, chunk))
            if len(waiting) > 2 * cores:
                yield result_of(waiting.popleft(), pool)
        while waiting:
            yield result_of(waiting.popleft(), pool)


def read_in_worker(chunk):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already
    return worker_reader.read(chunk)


def result_of(future, pool):
    try:
        return future.result()
    except SystemExit as error:  # rows.fail in the worker
        pool.shutdown(cancel_futures=True)
        rows.fail(error.code)


def summary(data, ref_rewards):
    """One line about a dataset: its size, and what QRPO should know of its rewards. ref_rewards: those of all
    rows, (k,), without padding.
    """
    tied = data.tied
    prompts = len(np.unique(data.row))
    text = f"{len(tied):,} completions of {prompts:,} prompts, {data.lens.sum():,} tokens with prompts"
    if data.truncated.any():
        text += f"; {data.truncated.mean():.1%} of the completions ran out of tokens"
    if len(ref_rewards):
        text += f"; mean reward {np.nanmean(data.rewards):.4g}, of references {np.nanmean(ref_rewards):.4g}"
        text += f"; {(tied > 0).mean():.1%} of the completions tie with a reference"
        text += f", {(tied == 1).mean():.1%} with all"
        if np.isnan(ref_rewards).any():
            text += f"; {np.isnan(ref_rewards).mean():.1%} of the reference rewards are unknown"
    return text


def load(path, cache, model_path, tokenizer, model, choices):
    """The arrays of `build` as attributes, mapped from a folder in `cache`, where they are made by the
    main process if they are not there. Runs on the same data share them. Also: fingerprint, summary,
    sampled_by.
    """
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in rows.files(path)]
    code = [rows.code_of(sys.modules[name]) for name in ("dataset", "tokens")]
    key = rows.fingerprint([files, model_fingerprint(model_path), tokenizer.template_args, choices, code,
                            transformers.__version__])
    folder = Path(cache) / f"data-{key}"
    if rows.rank_and_world()[0] == 0:
        with rows.locked(folder):  # another run may share the cache
            if not folder.exists():
                with rows.replacing(folder) as new:
                    new.mkdir()
                    build(new, path, tokenizer, model, choices)
    barrier()
    about = rows.load_json(folder / "about.json")
    data = open_arrays(folder)
    data.fingerprint, data.sampled_by = about["fingerprint"], about["sampled_by"]
    data.summary = f"{path}: {about['summary']}"
    return data


ANOTHER_MODEL = ("WARNING: reference completions were sampled by another model than {}, by its files, so "
                 "quantiles are not those among the reference model's own completions")


def check_references(data, args, reference_files):
    """Refuse reference rewards that --transform cannot take; warn where the references were sampled by
    another model than that of the fingerprint reference_files.
    """
    num_known = np.isfinite(data.ref_rewards).sum(1)[data.row]
    infinite = args.quantile == "paper" and 1 in qrpo.TRANSFORMS[args.transform].infinite_at
    rows.refuse(infinite and num_known.min() < 2,
                f"--transform={args.transform} with --quantile=paper needs at least 2 known ref_rewards in "
                "every row; give --quantile=exact")
    if set(data.sampled_by) - {reference_files}:
        rows.say_once(ANOTHER_MODEL.format(args.ref_model or args.model))


def open_arrays(folder):
    """The arrays that `build` wrote to `folder`, as attributes, mapped."""
    data = SimpleNamespace(tokens=np.memmap(folder / "tokens.bin", np.int32, mode="r"))
    for file in folder.glob("*.npy"):
        setattr(data, file.stem, np.load(file, mmap_mode="r"))
    return data


def show(data, tokenizer, index, targets):
    """Print the completions `index` with their rewards and target log-ratios (nats)."""
    for i, target in zip(index, targets):
        start, n, end = data.starts[i], data.prompt_lens[i], data.lens[i]
        tokens = data.tokens[start:start + end]
        prompt = tokenizer.decode(tokens[:n])
        completion = tokenizer.decode(tokens[n:])
        name = data.ids[data.row[i]]
        print(f"---- row {name}: {n} tokens of prompt, {end - n} trained, between >>> and <<<; "
              f"reward {data.rewards[i]:.4g}, target log-ratio {target:.3f}")
        print(f"{prompt}>>>{completion}<<<")


# ---- batches ----

def get_batch(data, index, device):
    """Completions `index` (B,) as tensors: tokens (B, T) right-padded; prompt_lens, lens, rewards, side,
    among_refs, and ref_logps if they are known (B,); ref_rewards (B, num_ref_rewards).
    """
    b = SimpleNamespace()
    spans = zip(data.starts[index], data.lens[index])
    b.tokens = pad([data.tokens[start:start + n] for start, n in spans], device)
    for name in ("prompt_lens", "lens", "rewards", "side", "among_refs", "ref_logps"):
        if hasattr(data, name):
            values = getattr(data, name)[index]
            setattr(b, name, torch.as_tensor(values, device=device))
    ref_rewards = data.ref_rewards[data.row[index]]
    b.ref_rewards = torch.as_tensor(ref_rewards, device=device)
    return b


def micro_batches(lens, examples, budget, rank=0, world=1):
    """Split the examples of a step into micro-batches of similar length, for this rank.

    examples: (n, size) the completions of every example: 1, or 2 of a pair. budget: padded tokens in a
    micro-batch (one example may exceed it). Yields (index, weight): the completions, and 1. All ranks get
    the same number, as DDP and FSDP wait for every rank: a rank without work gets a filler, of weight 0.
    The longest come first, so what does not fit into memory shows at once.
    """
    longest = lens[examples].max(1)
    order = np.argsort(-longest, kind="stable")
    while len(order):
        tokens = examples.shape[1] * longest[order[0]]  # of the longest example that is left
        size = max(1, int(budget // tokens)) * world
        block, order = order[:size], order[size:]
        mine = block[rank::world]
        weight = int(len(mine) > 0)
        if not weight:
            mine = block[:1]
        yield examples[mine].reshape(-1), weight


@torch.no_grad()
def all_logps(policy, data, budget, device):
    """log pi of every completion, float32 numpy (n,): a forward pass shared by the ranks. policy: a
    model.Policy.
    """
    rank, world = rows.rank_and_world()
    logps = torch.zeros(len(data.lens), dtype=torch.float32, device=device)
    # not one by one, as every rank must make as many forward passes (FSDP)
    every = np.arange(len(data.lens)).reshape(-1, policy.length_groups)
    with rows.progress(total=len(logps), desc="log-probabilities", unit="completion") as bar:
        for index, weight in micro_batches(data.lens, every, budget, rank, world):
            b = get_batch(data, index, device)
            found = policy(b.tokens, b.prompt_lens, b.lens)
            if weight:
                logps[torch.as_tensor(index, device=device)] = found
            bar.update(len(index) * world)
    if world > 1:
        dist.all_reduce(logps)
    return logps.cpu().numpy()


def cached_logps(policy, data, cache, settings, micro_batch_tokens, device):
    """`all_logps`, kept in the folder `cache`. settings: what decides them besides data and code: the model,
    dtypes.
    """
    code = [rows.code_of(part) for part in (Policy, chunked_logps, TokenLogps, logits_of)]
    versions = [torch.__version__, transformers.__version__]
    key = rows.fingerprint([settings, data.fingerprint, device.type, code, versions])
    path = Path(cache) / f"ref_logps-{key}.npy"
    if not any_rank(rows.rank_and_world()[0] == 0 and path.exists()):
        # without activations, a forward pass may be larger
        logps = all_logps(policy, data, 4 * micro_batch_tokens, device)
        if rows.rank_and_world()[0] == 0:
            with rows.locked(path), rows.replacing(path) as new, open(new, "wb") as file:
                np.save(file, logps)
        barrier()
    return np.load(path)


class Meter:
    """The means of metrics over micro-batches and ranks."""

    def __init__(self):
        self.totals = {}  # name: sum and count, (2,)

    def add(self, metrics, weight=1):
        """metrics: name -> values of any shape; NaN: does not apply. weight: 0 for a filler, else 1."""
        for name, values in metrics.items():
            total = values.nansum()
            known = values.isnan().logical_not().sum()
            sum_and_count = torch.stack([total.double(), known.double()])
            self.totals[name] = self.totals.get(name, 0) + sum_and_count * weight

    def means(self):
        """name -> mean, a float; NaN where nothing was counted. Waits for the device, once for all."""
        table = torch.stack(list(self.totals.values()))  # (metrics, 2)
        if dist.is_initialized():
            dist.all_reduce(table)
        return {name: total / n if n else math.nan for name, (total, n) in zip(self.totals, table.tolist())}
