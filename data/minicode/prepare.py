"""
MiniCode: LeetCode in miniature, made from a seed in about a minute, with nothing to download.

A row asks in English for a one-line Python function and carries a dozen tests. The pieces of the tables below (where
the items come from, which to keep, what to do to each, what to return) compose to some nine thousand specifications;
those of test.jsonl are not in train.jsonl, and those of neither are in the corpus. The reference model is a tiny Llama
trained on a corpus of such functions with everyday mistakes (< for <=, range(n) for range(n + 1), min for max, a
forgotten filter, a missing parenthesis), so it writes a right program only some of the time.

Input: none. Output, in --out: train.jsonl and test.jsonl (rows: id, prompt, entry_point, preamble, test, chosen: the
right program, rejected: one with mistakes, fenced, difficulty) and model/ (a Hugging Face folder, with the vocabulary
in tiktoken's format too).

    python data/minicode/prepare.py
"""
import argparse
import base64
import hashlib
import json
import math
import os
import random
import re
import shutil

# TikTokenConverter reads the vocabulary through tiktoken's cache, which knows a file by its path alone and would hand
# back the vocabulary of an earlier run. An empty name turns the cache off.
os.environ["TIKTOKEN_CACHE_DIR"] = ""

import tiktoken
import torch
from tiktoken._educational import bpe_train
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils.logging import disable_progress_bar

# A piece is (English, right code, mistakes). English has synonyms, separated by "/". {k} and {c} are a number and a
# letter drawn for each specification, {j} is a number off by one from k. In code, x is the item at hand.
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
        ("are divisible by {k}/are multiples of {k}", "x % {k} == 0", ["x % {k} != 0", "x // {k} == 0", "x % {k}"]),
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
PREAMBLE = "from math import prod\n"
# Pre-tokens: words, single digits, runs of punctuation, each with the space before it, and other white space. Every
# character falls under some branch: tiktoken would drop the rest, the fast tokenizer would not.
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def fill(rng, english, right, mistakes):
    """One piece with a synonym and its constants drawn: (English, [right code, *mistakes], (number, letter))."""
    k, c = rng.randint(2, 5), rng.choice("aers")
    put = lambda text: text.replace("{k}", str(k)).replace("{j}", str(k + rng.choice([-1, 1]))).replace("{c}", c)
    return put(rng.choice(english.split("/"))), [put(code) for code in [right, *mistakes]], (k, c)


def draw_spec(rng):
    """A specification: its pieces, its arguments, and its key: the pieces without constants, synonyms and mistakes."""
    kind = rng.choices(["int", "word", "char", "pair"], [6, 3, 1, 2])[0]
    if kind == "pair":
        parts = [rng.choice(OPERATORS), rng.choice(MAPS["int"]), rng.choice(MAPS["int"])]
        pieces = [fill(rng, *part) for part in parts]
        for i, name in (1, "a"), (2, "b"):
            english, codes, constants = pieces[i]
            codes = [re.sub(r"\bx\b", name, code) for code in codes + ["x"]]
            pieces[i] = english.replace("*", "").format(name), codes, constants
        args = "a, b"
    else:
        english, args, *codes = rng.choice(SOURCES[kind])
        keep = rng.choice(FILTERS[kind]) if rng.random() < 0.7 else ("", "", [])
        each = rng.choice(MAPS[kind]) if rng.random() < 0.7 else ("{}", "x", [])
        numeric = kind == "int" or each[1] == "len(x)"
        parts = [(english, *codes), keep, each, rng.choice(RETURNS["any"] + RETURNS["int" if numeric else "str"])]
        pieces = [fill(rng, *part) for part in parts]
        for i, nothing in (1, ""), (2, "x"):  # one more mistake: to forget the filter or the map
            pieces[i][1].extend([nothing] if parts[i][1] != nothing else [])
    english, codes, constants = zip(*pieces)
    num_pieces = sum(len(part[2]) > 0 for part in parts)
    return {"kind": kind, "args": args, "key": tuple(part[1] for part in parts), "english": english, "codes": codes,
            "constants": constants, "difficulty": ["easy", "medium", "hard"][num_pieces - 2]}


def prompt(spec, rng):
    """The specification in words, as one phrase or in steps, and a newline: the program starts at a token boundary."""
    english = spec["english"]
    if spec["kind"] == "pair":
        return f"f({spec['args']}): {english[0].format(*english[1:])}\n"
    source, keep, each, give = english
    items, each = source + (f" that {keep}" if keep else ""), each.replace("*", "s")
    if rng.random() < 0.5:
        return f"f({spec['args']}): {give.format(each.format(items))}\n"
    steps = f"take {items}; " + (f"then {each.format('these')}; " if each != "{}" else "")
    return f"f({spec['args']}): {steps}return {give.format('these')}\n"


def program(spec, choice=(0, 0, 0, 0)):
    """The function as text, with the given one of each piece's codes; all zero is the right one."""
    codes = [codes[i] for codes, i in zip(spec["codes"], choice)]
    if spec["kind"] == "pair":
        body = codes[0].format(*codes[1:])
    else:
        source, keep, each, give = codes
        body = give.format(f"{each} for x in {source}" + (f" if {keep}" if keep else ""))
    return f"def f({spec['args']}): return {body}"


def weak_program(spec, rng, rate):
    """The function as a weak programmer writes it: pieces wrong with probability rate, at times a slip of syntax."""
    wrong = [len(codes) > 1 and rng.random() < rate for codes in spec["codes"]]
    code = program(spec, [rng.randrange(1, len(codes)) if w else 0 for codes, w in zip(spec["codes"], wrong)])
    if rng.random() < rate / 10:
        code = rng.choice([code[:-1], *(code.replace(piece, "", 1) for piece in (":", "return ", ")"))])
    return code


def mistaken(spec):
    """A program of the weak programmer that is not the right one; the same for the same specification."""
    rng = random.Random(program(spec))
    return next(code for code in iter(lambda: weak_program(spec, rng, 0.5), None) if code != program(spec))


def draw_input(rng, args, constants):
    """One call's arguments, {name: value}; values near the specification's own constants come up often."""
    numbers, letters = zip(*constants)
    number = lambda: rng.choice([rng.randint(-9, 12), rng.choice(numbers) + rng.randint(-1, 1)])
    word = lambda: "".join(rng.choice(rng.choice(["abceorstnlm", letters])) for _ in range(rng.randint(1, 8)))
    words = [word() for _ in range(rng.choice([0, 1, 3, 4, 5, 6]))]
    a = number()
    draw = {"xs": lambda: [number() for _ in range(rng.choice([0, 1, 3, 5, 6, 7, 8]))], "n": lambda: rng.randint(0, 20),
            "m": lambda: rng.randint(0, 10 ** rng.randint(1, 5)), "a": lambda: a, "ws": lambda: words,
            "b": lambda: a + rng.randint(-2, 14), "s": lambda: " ".join(words)}
    return {name: draw[name]() for name in args.split(", ")}


def run(code, inputs):
    """What a program of this file answers to each of the inputs; None where it fails."""
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


def make_row(spec, rng, num_tests):
    """A row of the dataset, or None where the tests could not tell the right program from one that skips a piece."""
    pool = [draw_input(rng, spec["args"], spec["constants"]) for _ in range(5 * num_tests)]
    right = run(program(spec), pool)
    if None in right or len(set(map(repr, right))) < 4 or max(len(repr(answer)) for answer in right) > 80:
        return None
    picked = []  # first the inputs that expose a mistake which the ones before do not
    for slot, codes in enumerate(spec["codes"]):
        for i in range(1, len(codes)):
            answers = run(program(spec, [i * (slot == other) for other in range(4)]), pool)
            exposing = [n for n in range(len(pool)) if answers[n] != right[n]]
            if not exposing and codes[i] in ("", "x", "a", "b"):
                return None
            if exposing and not set(exposing) & set(picked):
                picked.append(exposing[0])
    picked = (picked + [n for n in range(len(pool)) if n not in picked])[:num_tests]
    call = lambda arguments: ", ".join(f"{name} = {value!r}" for name, value in arguments.items())
    tests = "".join(f"    assert candidate({call(pool[n])}) == {right[n]!r}\n" for n in sorted(picked))
    return {"prompt": prompt(spec, rng), "entry_point": "f", "preamble": PREAMBLE,
            "test": "def check(candidate):\n" + tests, "chosen": program(spec), "rejected": mistaken(spec),
            "fenced": False, "difficulty": spec["difficulty"]}


def make_rows(rng, num_train, num_test, num_tests):
    """(train rows, test rows, taken): no two rows share a key or a program; taken holds all of both, for the corpus."""
    rows, taken = [], set()
    while len(rows) < num_train + num_test:
        spec = draw_spec(rng)
        row = None if taken & {spec["key"], program(spec)} else make_row(spec, rng, num_tests)
        if row:
            taken |= {spec["key"], program(spec)}
            part, number = ("train", len(rows)) if len(rows) < num_train else ("test", len(rows) - num_train)
            rows.append({"id": f"minicode-{part}-{number:04d}", **row})
    return rows[:num_train], rows[num_train:], taken


def make_corpus(rng, size, rate, taken):
    """(prompt, completion) pairs by a weak programmer; no specification of any row is among them."""
    corpus = []
    while len(corpus) < size:
        spec = draw_spec(rng)
        if not taken & {spec["key"], program(spec)}:
            corpus.append((prompt(spec, rng), weak_program(spec, rng, rate)))
    return corpus


def make_tokenizer(corpus, vocab_size, folder):
    """Write FOLDER/minicode.tiktoken and the same vocabulary as a fast tokenizer, which puts <bos> first by itself."""
    ranks = bpe_train("".join(p + c for p, c in corpus[:120]), vocab_size - 3, PATTERN, visualise=None)
    special = {name: len(ranks) + i for i, name in enumerate(["<bos>", "<eos>", "<pad>"])}
    path = os.path.join(folder, "minicode.tiktoken")
    with open(path, "wb") as f:  # as tiktoken.load.dump_tiktoken_bpe does, which needs one more package
        f.writelines(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())
    fast = TikTokenConverter(vocab_file=path, pattern=PATTERN, extra_special_tokens=special).converted()
    fast.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", special["<bos>"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
                                        model_max_length=256, clean_up_tokenization_spaces=False)
    tokenizer.save_pretrained(folder)
    return tiktoken.Encoding("minicode", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special), tokenizer


def train_model(corpus, encoding, tokenizer, args):
    """A tiny Llama trained on <bos> prompt completion <eos>, with the cross-entropy of completion and <eos>."""
    torch.manual_seed(args.seed)
    disable_progress_bar()  # of transformers, which shows one for each file it writes
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("bos", "eos", "pad")}
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=encoding.n_vocab, hidden_size=args.width, intermediate_size=3 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 32, max_position_embeddings=256,
        initializer_range=args.width ** -0.5,  # the usual 0.02 suits wide models and learns far more slowly here
        tie_word_embeddings=True, **ids))
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=64, **ids)
    tokens, prompt_lengths = [], []
    for text, code in corpus:
        prompt_ids = [ids["bos_token_id"], *encoding.encode_ordinary(text)]
        tokens.append(prompt_ids + encoding.encode_ordinary(code) + [ids["eos_token_id"]])
        prompt_lengths.append(len(prompt_ids))
    # a batch holds sequences of about one length, so that little is padding; batches come in random order
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    batches = [order[i:i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = 0.1 * args.steps + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(  # linear warm-up, then a cosine down to 0
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / max(1, args.steps))))
    for step in (bar := tqdm(range(args.steps), desc="training the reference model")):
        batch = rng.choice(batches)
        longest = max(len(tokens[i]) for i in batch)
        x = torch.full((len(batch), longest), ids["pad_token_id"])  # [batch, time]
        labels = torch.full_like(x, -100)  # -100: no loss, on prompts and padding
        for row, i in enumerate(batch):
            length = len(tokens[i])
            x[row, :length] = torch.tensor(tokens[i])
            labels[row, prompt_lengths[i]:length] = x[row, prompt_lengths[i]:length]
        loss = model(input_ids=x, labels=labels).loss  # causal: padding on the right is seen by nobody
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def write_rows(path, rows):
    with open(path + ".tmp", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(name, default, text):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)")

    flag("out", os.path.dirname(os.path.abspath(__file__)), "folder to write to")
    flag("seed", 0, "random seed of rows, corpus and model")
    # rows
    flag("num_train", 320, "prompts to train on")
    flag("num_test", 128, "held-out prompts")
    flag("num_tests", 12, "tests a prompt")
    # corpus
    flag("corpus_size", 20000, "programs in the corpus of the reference model")
    flag("mistake_rate", 0.3, "probability that a piece of a program in the corpus is wrong")
    # reference model
    flag("vocab_size", 512, "tokens, 256 bytes and 3 special tokens among them")
    flag("width", 128, "hidden size, a multiple of 32")
    flag("layers", 3, "number of layers")
    flag("steps", 700, "training steps")
    flag("batch_size", 32, "sequences a training step")
    flag("learning_rate", 4e-3, "peak learning rate of AdamW")
    args = parser.parse_args()
    if args.width % 32 or not 259 <= args.vocab_size <= 600 or args.num_train + args.num_test > 2000:
        parser.error("needs width a multiple of 32, vocab_size from 259 to 600, at most 2000 prompts in all")

    with open(__file__, "rb") as f:  # what the outputs depend on; the model carries a copy
        recipe = {**vars(args), "prepare.py": hashlib.sha256(f.read()).hexdigest()}
    del recipe["out"]
    outputs = [os.path.join(args.out, name) for name in ("train.jsonl", "test.jsonl", "model")]
    train_file, test_file, model_dir = outputs
    if all(map(os.path.exists, outputs)):
        with open(os.path.join(model_dir, "recipe.json")) as f:
            if json.load(f) == recipe:
                return print(f"{args.out}: complete, reused")

    rng = random.Random(args.seed)
    train, test, taken = make_rows(rng, args.num_train, args.num_test, args.num_tests)
    corpus = make_corpus(rng, args.corpus_size, args.mistake_rate, taken)
    shutil.rmtree(model_dir + ".tmp", ignore_errors=True)
    os.makedirs(model_dir + ".tmp")
    encoding, tokenizer = make_tokenizer(corpus, args.vocab_size, model_dir + ".tmp")
    model = train_model(corpus, encoding, tokenizer, args)
    model.save_pretrained(model_dir + ".tmp")
    with open(os.path.join(model_dir + ".tmp", "recipe.json"), "w") as f:
        json.dump(recipe, f, indent=2)
    # the old model goes first and the new one comes last: where a model stands, the rows beside it are its own
    shutil.rmtree(model_dir, ignore_errors=True)
    write_rows(train_file, train)
    write_rows(test_file, test)
    os.rename(model_dir + ".tmp", model_dir)
    print(f"{args.out}: {len(train)} train rows, {len(test)} test rows, model of {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
