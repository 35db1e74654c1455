"""MiniCode: LeetCode in miniature. Makes prompts, tests and a reference model from a seed.

A row asks in English for a one-line Python function and has a dozen tests. A specification is put
together from the tables below: where the items come from, which to keep, what to do to each, and what to
return. There are some nine thousand. No specification of test.jsonl is in train.jsonl, and none of either
is in the corpus.

The reference model is a tiny Llama trained on a corpus of such functions with everyday mistakes (< for
<=, range(n) for range(n + 1), min for max, a forgotten filter, a missing parenthesis), so only some of
its programs are right.

Takes no input. Writes to --out, in about a minute:
- train.jsonl and test.jsonl with the fields id, prompt, entry_point, preamble, test, chosen (the right
  program), rejected (one with mistakes), fenced and difficulty;
- model/, a Hugging Face folder, which also holds the vocabulary in tiktoken's format.

A harder variant, in which right programs are rare: the model has only seen right ones, but hardly any with
both a filter and a map, which all rows ask for. So its mistakes are its own:

    python data/minicode/prepare.py --out=data/hardcode --mistake_rate=0 --hard_share=0.0015

The same seed gives the same rows everywhere. The model's weights also depend, by rounding, on the machine
and its number of threads.

    python data/minicode/prepare.py
"""
import base64
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from tiktoken._educational import bpe_train
from tokenizers.processors import TemplateProcessing
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import rows  # noqa: E402

# ---- the pieces of specifications ----

# A piece is (English, right code, mistakes). English has synonyms, separated by "/". {k} and {c} are a
# number and a letter drawn for each specification, and {j} is off by one from k. In code, x is the
# current item.
SOURCES = {  # kind: (English, arguments, right code, mistakes)
    "int": [
        ("the numbers in xs", "xs", "xs", ["xs[1:]"]),
        ("the integers from 1 to n", "n", "range(1, n + 1)", ["range(n)", "range(1, n)", "range(n + 1)"]),
        ("the integers from a to b", "a, b", "range(a, b + 1)", ["range(a, b)", "range(b + 1)"]),
        ("the digits of m", "m", "map(int, str(m))", ["str(m)", "range(len(str(m)))"]),
    ],
    "word": [
        ("the words of s", "s", "s.split()", ["s", "s.split(',')"]),
        ("the strings in ws", "ws", "ws", ["ws[1:]", "ws.split()"]),
    ],
    "char": [("the characters of s/the letters of s", "s", "s", ["s[1:]", "s.split()"])],
}
FILTERS = {
    "int": [
        ("are even", "x % 2 == 0", ["x % 2 == 1", "x % 2"]),
        ("are odd", "x % 2 == 1", ["x % 2 == 0", "x // 2 == 1"]),
        ("are positive", "x > 0", ["x >= 0", "x < 0"]),
        ("are negative", "x < 0", ["x <= 0", "x > 0"]),
        ("are greater than {k}/exceed {k}", "x > {k}", ["x >= {k}", "x < {k}"]),
        ("are less than {k}/are below {k}", "x < {k}", ["x <= {k}", "x > {k}"]),
        ("are at least {k}/are {k} or more", "x >= {k}", ["x > {k}", "x <= {k}"]),
        ("are at most {k}/are {k} or less", "x <= {k}", ["x < {k}", "x >= {k}"]),
        ("are divisible by {k}/are multiples of {k}", "x % {k} == 0",
         ["x % {k} != 0", "x // {k} == 0", "x % {k}"]),
        ("differ from {k}/are not {k}", "x != {k}", ["x == {k}", "x > {k}"]),
    ],
    "word": [
        ("are longer than {k}", "len(x) > {k}", ["len(x) >= {k}", "x > {k}"]),
        ("are shorter than {k}", "len(x) < {k}", ["len(x) <= {k}", "len(x) > {k}"]),
        ("have at least {k} letters", "len(x) >= {k}", ["len(x) > {k}", "len(x) == {k}"]),
        ("start with {c}/begin with {c}", "x[0] == '{c}'", ["x[-1] == '{c}'", "x[1] == '{c}'"]),
        ("end with {c}/end in {c}", "x[-1] == '{c}'", ["x[0] == '{c}'", "x[1] == '{c}'"]),
        ("contain {c}", "'{c}' in x", ["'{c}' not in x", "x == '{c}'"]),
        ("do not contain {c}/lack {c}", "'{c}' not in x", ["'{c}' in x", "x != '{c}'"]),
    ],
    "char": [
        ("are vowels", "x in 'aeiou'", ["x not in 'aeiou'", "x == 'aeiou'"]),
        ("are not vowels", "x not in 'aeiou'", ["x in 'aeiou'", "x != 'aeiou'"]),
        ("are not {c}/differ from {c}", "x != '{c}'", ["x == '{c}'"]),
        ("come after {c}", "x > '{c}'", ["x >= '{c}'", "x < '{c}'"]),
        ("come before {c}", "x < '{c}'", ["x <= '{c}'", "x > '{c}'"]),
    ],
}
MAPS = {  # English with {} for what is mapped and * for a plural s
    "int": [
        ("the square* of {}", "x * x", ["x * 2", "x + x"]),
        ("the cube* of {}", "x ** 3", ["x * 3", "x ** 2"]),
        ("the double* of {}/twice {}", "x * 2", ["x ** 2", "x + 2"]),
        ("the negative* of {}/{} with opposite sign*", "-x", ["abs(x)", "1 - x"]),
        ("the absolute value* of {}", "abs(x)", ["-x", "abs(-x + 1)"]),
        ("{} plus {k}", "x + {k}", ["x - {k}", "x + {j}"]),
        ("{} minus {k}", "x - {k}", ["x + {k}", "{k} - x"]),
        ("{} times {k}", "x * {k}", ["x + {k}", "x ** {k}"]),
        ("the remainder* of {} divided by {k}/{} modulo {k}", "x % {k}", ["x // {k}", "x / {k}"]),
        ("{} halved and rounded down", "x // 2", ["x / 2", "x % 2"]),
        ("the distance* of {} to {k}", "abs(x - {k})", ["x - {k}", "abs(x + {k})"]),
    ],
    "word": [
        ("{} in upper case/{} in capitals", "x.upper()", ["x.lower()", "upper(x)"]),
        ("{} reversed/{} spelled backwards", "x[::-1]", ["x[::1]", "x[-1]"]),
        ("the first letter* of {}/the initial* of {}", "x[0]", ["x[1]", "x[-1]"]),
        ("the last letter* of {}", "x[-1]", ["x[0]", "x[1:]"]),
        ("{} without the first letter", "x[1:]", ["x[:-1]", "x[1]"]),
        ("{} written twice", "x * 2", ["x ** 2", "x + 2"]),
        ("the length* of {}", "len(x)", ["len(x) - 1", "len(s)"]),
    ],
    "char": [
        ("{} in upper case/{} in capitals", "x.upper()", ["x.lower()", "upper(x)"]),
        ("{} written twice", "x * 2", ["x ** 2", "x + 2"]),
    ],
}
RETURNS = {  # English with {} for the items, code with {} for the comprehension
    "any": [
        ("the number of {}/how many there are of {}", "len([{}])", ["sum({})", "len([{}]) - 1"]),
        ("the list of {}", "[{}]", ["sum({})", "list({})[1:]"]),
        ("{} in ascending order/{} sorted", "sorted({})", ["[{}]", "sorted([{}], reverse=True)"]),
        ("{} in descending order", "sorted([{}], reverse=True)", ["sorted({})", "[{}][::-1]"]),
        ("{} in reverse order", "[{}][::-1]", ["[{}]", "[{}][::1]", "sorted([{}], reverse=True)"]),
        ("{} sorted without duplicates", "sorted(set({}))", ["sorted({})", "set({})"]),
        ("the number of distinct values among {}", "len(set({}))", ["len([{}])", "set({})"]),
        ("the first {k} of {}", "[{}][:{k}]", ["[{}][{k}:]", "[{}][:{j}]", "[{}][{k}]"]),
        ("the last {k} of {}", "[{}][-{k}:]", ["[{}][:-{k}]", "[{}][{k}:]", "[{}][-{k}]"]),
    ],
    "int": [
        ("the sum of {}/the total of {}", "sum({})", ["len([{}])", "sum({}) - 1"]),
        ("the product of {}", "prod({})", ["sum({})", "product({})"]),
        ("the largest of {}, or 0/the maximum of {}, or 0", "max([{}], default=0)",
         ["min([{}], default=0)", "max({})"]),
        ("the smallest of {}, or 0/the minimum of {}, or 0", "min([{}], default=0)",
         ["max([{}], default=0)", "min({})"]),
    ],
    "str": [
        ("{} joined by dashes", "'-'.join({})", ["''.join({})", "'-' + ({})"]),
        ("{} joined together", "''.join({})", ["' '.join({})", "sum({})"]),
        ("the longest of {}", "max([{}], key=len, default='')",
         ["max([{}], default='')", "max({}, key=len)"]),
        ("the shortest of {}", "min([{}], key=len, default='')",
         ["max([{}], key=len, default='')", "min([{}], default='')"]),
    ],
}
OPERATORS = [  # of two numbers a and b, each mapped first
    ("the sum of {} and {}", "({}) + ({})", ["({}) - ({})"]),
    ("the difference of {} and {}", "({}) - ({})", ["({1}) - ({0})", "{} - {}"]),
    ("the product of {} and {}", "({}) * ({})", ["({}) + ({})", "{} * {}"]),
    ("the larger of {} and {}/the maximum of {} and {}", "max({}, {})", ["min({}, {})", "max({}), {}"]),
    ("the smaller of {} and {}/the minimum of {} and {}", "min({}, {})", ["max({}, {})", "min({}), {}"]),
    ("whether {} is greater than {}/whether {} exceeds {}", "{} > {}", ["{} >= {}", "{} < {}"]),
    ("whether {} is less than {}/whether {} is below {}", "{} < {}", ["{} <= {}", "{} > {}"]),
    ("whether {} is at least {}", "{} >= {}", ["{} > {}", "{} <= {}"]),
]
NO_FILTER = ("", "", [])
NO_MAP = ("{}", "x", [])
PREAMBLE = "from math import prod\n"


class Piece(NamedTuple):
    english: str
    codes: list       # the right one, then mistakes
    constants: tuple  # the number and the letter that were drawn for it


class Spec(NamedTuple):
    kind: str    # int, word, char, or pair: an operator on two numbers
    args: str    # names of the function's arguments
    key: tuple   # right code of its pieces, without constants: specifications with the same key are variants
    pieces: list  # source, filter, map, return; of a pair: operator, map of a, map of b
    difficulty: str


def fill(rng, piece):
    """A piece of a table as a Piece, with a synonym and constants drawn."""
    english, *codes = piece[0], piece[1], *piece[2]
    k, c = rng.randint(2, 5), rng.choice("aers")
    filled = []
    for text in [rng.choice(english.split("/")), *codes]:
        j = k + rng.choice([-1, 1])
        filled.append(text.replace("{k}", str(k)).replace("{j}", str(j)).replace("{c}", c))
    return Piece(filled[0], filled[1:], (k, c))


def draw_spec(rng):
    """A random specification."""
    kind = rng.choices(["int", "word", "char", "pair"], [6, 3, 1, 2])[0]
    if kind == "pair":
        return draw_pair(rng)
    english, args, *codes = rng.choice(SOURCES[kind])
    keep = rng.choice(FILTERS[kind]) if rng.random() < 0.7 else NO_FILTER
    each = rng.choice(MAPS[kind]) if rng.random() < 0.7 else NO_MAP
    numeric = kind == "int" or each[1] == "len(x)"
    returns = RETURNS["any"] + RETURNS["int" if numeric else "str"]
    parts = [(english, *codes), keep, each, rng.choice(returns)]
    pieces = [fill(rng, part) for part in parts]
    if keep != NO_FILTER:
        pieces[1].codes.append("")   # to forget the filter is a mistake, too
    if each != NO_MAP:
        pieces[2].codes.append("x")  # and so is to forget the map
    key = tuple(part[1] for part in parts)
    difficulty = ["easy", "medium", "hard"][(keep != NO_FILTER) + (each != NO_MAP)]
    return Spec(kind, args, key, pieces, difficulty)


def draw_pair(rng):
    """A random specification of an operator on two numbers a and b, each mapped first."""
    parts = [rng.choice(OPERATORS), rng.choice(MAPS["int"]), rng.choice(MAPS["int"])]
    pieces = [fill(rng, part) for part in parts]
    for i, name in (1, "a"), (2, "b"):
        english, codes, constants = pieces[i]
        codes = [*codes, "x"]  # to forget the map is a mistake, too
        codes = [re.sub(r"\bx\b", name, code) for code in codes]
        pieces[i] = Piece(english.replace("*", "").format(name), codes, constants)
    return Spec("pair", "a, b", tuple(part[1] for part in parts), pieces, "medium")


# ---- its prompt and its programs ----

def prompt(spec, rng):
    """The specification in English, as one phrase or in steps. It ends in a newline, so that the program
    starts at a token boundary.
    """
    head = f"f({spec.args}):"
    english = [piece.english for piece in spec.pieces]
    if spec.kind == "pair":
        operator, a, b = english
        return f"{head} {operator.format(a, b)}\n"
    source, keep, each, give = english
    items = f"{source} that {keep}" if keep else source
    each = each.replace("*", "s")
    if rng.random() < 0.5:
        return f"{head} {give.format(each.format(items))}\n"
    steps = f"take {items}; "
    if each != "{}":
        steps += f"then {each.format('these')}; "
    return f"{head} {steps}return {give.format('these')}\n"


def program(spec, choice=(0, 0, 0, 0)):
    """The function as text, with code number choice[i] of piece i. All zeros make the right program."""
    codes = [piece.codes[i] for piece, i in zip(spec.pieces, choice)]
    if spec.kind == "pair":
        operator, a, b = codes
        body = operator.format(a, b)
    else:
        source, keep, each, give = codes
        items = f"{each} for x in {source}"
        body = give.format(f"{items} if {keep}" if keep else items)
    return f"def f({spec.args}): return {body}"


def weak_program(spec, rng, rate):
    """The function as a weak programmer writes it: each piece is wrong with probability rate, and
    with probability rate / 10 there is a slip of syntax.
    """
    wrong = [len(piece.codes) > 1 and rng.random() < rate for piece in spec.pieces]
    choice = [rng.randrange(1, len(piece.codes)) if w else 0 for piece, w in zip(spec.pieces, wrong)]
    code = program(spec, choice)
    if rng.random() < rate / 10:
        slips = [code.replace(symbol, "", 1) for symbol in (":", "return ", ")")]
        code = rng.choice([code[:-1], *slips])
    return code


def mistaken(spec):
    """A wrong program of the weak programmer, the same whenever it is asked for."""
    right = program(spec)
    rng = random.Random(right)
    code = right
    while code == right:
        code = weak_program(spec, rng, 0.5)
    return code


# ---- rows: a prompt and its tests ----

def draw_input(rng, args, constants):
    """The arguments of one call, {name: value}. Values near the specification's constants are frequent."""
    numbers, letters = zip(*constants)

    def number():
        return rng.choice([rng.randint(-9, 12), rng.choice(numbers) + rng.randint(-1, 1)])

    def word():
        length = rng.randint(1, 8)
        return "".join(rng.choice(rng.choice(["abceorstnlm", letters])) for _ in range(length))

    words = [word() for _ in range(rng.choice([0, 1, 3, 4, 5, 6]))]
    a = number()
    draw = {
        "xs": lambda: [number() for _ in range(rng.choice([0, 1, 3, 5, 6, 7, 8]))],
        "n": lambda: rng.randint(0, 20),
        "m": lambda: rng.randint(0, 10 ** rng.randint(1, 5)),
        "a": lambda: a,
        "b": lambda: a + rng.randint(-2, 14),
        "s": lambda: " ".join(words),
        "ws": lambda: words,
    }
    return {name: draw[name]() for name in args.split(", ")}


def run(code, inputs):
    """What a program of this file returns for each of the inputs; None where it fails."""
    try:
        exec(PREAMBLE + code, scope := {})
    except SyntaxError:
        return [None] * len(inputs)
    answers = []
    for arguments in inputs:
        try:
            answers.append(scope["f"](**arguments))
        except Exception:
            answers.append(None)
    return answers


def pick_inputs(spec, pool, right):
    """Positions in the pool of inputs that expose the mistakes of a specification, one for each mistake
    that no earlier one exposes; None if no input shows that a piece was forgotten. right: the right
    answers to the pool.
    """
    picked = []
    for i, piece in enumerate(spec.pieces):
        for n, code in enumerate(piece.codes[1:], 1):
            choice = [0] * 4
            choice[i] = n
            answers = run(program(spec, choice), pool)
            exposing = [k for k in range(len(pool)) if answers[k] != right[k]]
            if not exposing and code in ("", "x", "a", "b"):
                return None
            if exposing and not set(exposing) & set(picked):
                picked.append(exposing[0])
    return picked


def make_row(spec, rng, num_tests):
    """A row of the dataset, or None if tests could not tell the right program from wrong ones."""
    constants = [piece.constants for piece in spec.pieces]
    pool = [draw_input(rng, spec.args, constants) for _ in range(5 * num_tests)]
    right = run(program(spec), pool)
    texts = [repr(answer) for answer in right]
    if None in right or len(set(texts)) < 4 or max(map(len, texts)) > 80:
        return None
    picked = pick_inputs(spec, pool, right)
    if picked is None:
        return None
    others = [k for k in range(len(pool)) if k not in picked]
    test = "def check(candidate):\n"
    for k in sorted((picked + others)[:num_tests]):
        arguments = ", ".join(f"{name} = {value!r}" for name, value in pool[k].items())
        test += f"    assert candidate({arguments}) == {texts[k]}\n"
    return {
        "prompt": prompt(spec, rng),
        "entry_point": "f",
        "preamble": PREAMBLE,
        "test": test,
        "chosen": program(spec),
        "rejected": mistaken(spec),
        "fenced": False,
        "difficulty": spec.difficulty,
    }


def make_rows(rng, num_train, num_test, num_tests, only_hard=False):
    """(train rows, test rows, taken). No two rows share a key or a program; taken holds those of all rows."""
    train, test, taken = [], [], set()
    while len(train) + len(test) < num_train + num_test:
        spec = draw_spec(rng)
        names = {spec.key, program(spec)}
        if names & taken or only_hard and spec.difficulty != "hard":
            continue
        row = make_row(spec, rng, num_tests)
        if row is None:
            continue
        taken |= names
        if len(train) < num_train:
            train.append({"id": f"minicode-train-{len(train):04d}", **row})
        else:
            test.append({"id": f"minicode-test-{len(test):04d}", **row})
    return train, test, taken


def make_corpus(rng, size, rate, taken, hard_share=1.0):
    """(prompt, program) pairs of a weak programmer, of specifications that are not in `taken`; of the hard
    ones, a share.
    """
    corpus = []
    while len(corpus) < size:
        spec = draw_spec(rng)
        if hard_share < 1 and spec.difficulty == "hard" and rng.random() >= hard_share:
            continue
        if not taken & {spec.key, program(spec)}:
            corpus.append((prompt(spec, rng), weak_program(spec, rng, rate)))
    return corpus


# ---- the reference model ----

# A token lies within a word, a digit or a run of punctuation, each with the space before it, or is one
# character of white space. Every character must match: tiktoken drops what does not, and the fast
# tokenizer keeps it.
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def make_tokenizer(corpus, vocab_size, folder):
    """Byte-pair encoding learned from the corpus. Writes FOLDER/minicode.tiktoken and, with the same
    vocabulary, a fast tokenizer that puts <bos> before a text. Returns both: (tiktoken.Encoding,
    PreTrainedTokenizerFast).
    """
    text = "".join(prompt + code for prompt, code in corpus[:120])
    ranks = bpe_train(text, vocab_size - 3, PATTERN, visualise=None)
    special = {name: len(ranks) + i for i, name in enumerate(["<bos>", "<eos>", "<pad>"])}
    path = os.path.join(folder, "minicode.tiktoken")
    with open(path, "wb") as f:  # tiktoken.load.dump_tiktoken_bpe writes the same, but needs one more package
        f.writelines(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())
    # TikTokenConverter reads the file through tiktoken's cache, which knows a file by its path only, and
    # so would return the vocabulary of an earlier run. An empty name turns the cache off.
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    fast = TikTokenConverter(vocab_file=path, pattern=PATTERN, extra_special_tokens=special).converted()
    fast.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", special["<bos>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        model_max_length=256, clean_up_tokenization_spaces=False)
    tokenizer.save_pretrained(folder)
    encoding = tiktoken.Encoding("minicode", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return encoding, tokenizer


def make_model(tokenizer, args):
    """A tiny Llama with random weights."""
    torch.manual_seed(args.seed)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        max_position_embeddings=256,
        initializer_range=args.width ** -0.5,  # the usual 0.02 suits wide models; this one would learn slowly
        tie_word_embeddings=True,
        **special))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=64, **special)
    return model


def train_model(model, corpus, encoding, args):
    """Train on <bos> prompt program <eos>, with the cross-entropy of the program and <eos>.

    Why not train.py --loss=sft: its model is as good but takes 1.4 times as long, because it pads random
    batches and first computes the reference log-probabilities of the whole corpus.
    """
    config = model.config
    examples = []  # (tokens, labels), both (time,); label -100: no loss
    for prompt, code in corpus:
        prompt_ids = [config.bos_token_id, *encoding.encode_ordinary(prompt)]
        code_ids = [*encoding.encode_ordinary(code), config.eos_token_id]
        labels = [-100] * len(prompt_ids) + code_ids
        examples.append((torch.tensor(prompt_ids + code_ids), torch.tensor(labels)))
    # the sequences of a batch are of similar length, so there is little padding; the batches come in
    # random order
    examples.sort(key=lambda example: len(example[0]))
    batches = [examples[i:i + args.batch_size] for i in range(0, len(examples), args.batch_size)]
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = 0.1 * args.steps + 1
    bar = rows.progress(range(args.steps), desc="training the reference model")
    for step in bar:
        # linear warm-up and a cosine to 0, whichever is lower
        share = min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * share
        tokens, labels = zip(*rng.choice(batches))
        tokens = pad_sequence(tokens, batch_first=True, padding_value=config.pad_token_id)  # (batch, time)
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)  # (batch, time)
        # no attention mask: the padding comes after everything that a causal model can look at
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


# ---- the command ----

def arguments():
    parser = rows.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent,
                        help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of rows, corpus and model")
    group = parser.add_argument_group("rows")
    group.add_argument("--num_train", type=int, default=320, help="prompts to train on")
    group.add_argument("--num_test", type=int, default=128, help="held-out prompts")
    group.add_argument("--num_tests", type=int, default=12, help="tests per prompt")
    group = parser.add_argument_group("corpus")
    group.add_argument("--corpus_size", type=int, default=20000, help="programs to train the model on")
    group.add_argument("--mistake_rate", type=float, default=0.3, help="probability that a piece is wrong")
    group.add_argument("--hard_share", type=float, default=1.0,
                       help="share of the hard programs (filter and map) to keep; below 1, all rows are hard")
    group = parser.add_argument_group("reference model")
    group.add_argument("--vocab_size", type=int, default=512, help="with 256 bytes and 3 special tokens")
    group.add_argument("--width", type=int, default=128, help="hidden size, a multiple of 32")
    group.add_argument("--layers", type=int, default=3, help="number of layers")
    group.add_argument("--steps", type=int, default=700, help="training steps")
    group.add_argument("--batch_size", type=int, default=32, help="sequences per step")
    group.add_argument("--learning_rate", type=float, default=4e-3, help="at the peak of the schedule")
    args = parser.parse_args()
    if args.width % 32:
        rows.fail("--width must be a multiple of 32")
    if not 259 <= args.vocab_size <= 600:
        rows.fail("--vocab_size must be from 259 to 600")
    if args.num_train + args.num_test > 2000:
        rows.fail("--num_train and --num_test must be at most 2000 together")
    return args


def write_rows(path, table):
    """Write a JSONL file completely or not at all."""
    with rows.replacing(path) as new, open(new, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in table)


def main():
    args = arguments()
    train_file, test_file, folder = args.out / "train.jsonl", args.out / "test.jsonl", args.out / "model"
    # what the outputs depend on; the model carries a copy
    recipe = {name: value for name, value in vars(args).items() if name != "out"}
    recipe["prepare.py"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if train_file.exists() and test_file.exists() and folder.exists():
        if rows.load_json(folder / "recipe.json") == recipe:
            print(f"{args.out}: complete, reused")
            return

    rng = random.Random(args.seed)
    train, test, taken = make_rows(rng, args.num_train, args.num_test, args.num_tests, args.hard_share < 1)
    corpus = make_corpus(rng, args.corpus_size, args.mistake_rate, taken, args.hard_share)
    new = args.out / ".model.new"
    shutil.rmtree(new, ignore_errors=True)  # of a killed run
    with rows.writing(new):
        new.mkdir(parents=True)
    disable_progress_bar()  # of transformers, which shows one for each file it writes
    encoding, tokenizer = make_tokenizer(corpus, args.vocab_size, new)
    model = make_model(tokenizer, args)
    train_model(model, corpus, encoding, args)
    model.save_pretrained(new)
    rows.write_json(new / "recipe.json", recipe)
    # the old model goes first and the new one comes last, so the rows beside a model are always its own
    shutil.rmtree(folder, ignore_errors=True)
    write_rows(train_file, train)
    write_rows(test_file, test)
    os.rename(new, folder)
    print(f"{args.out}: {len(train)} train rows, {len(test)} test rows, "
          f"model of {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
