"""What the prepare.py scripts share: reading a dataset, from the hub or from local files, and writing rows.

A local source is a file, or a folder of files, with the columns of the hub's dataset: .jsonl, .jsonl.gz,
.json (a list) or .parquet. The hub is read with `datasets`, .parquet with pyarrow; `pip install datasets`
installs both, and nothing else in the project needs them.

    python data/leetcode/prepare.py -h
"""
import collections
import gzip
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model  # noqa: E402
import rows  # noqa: E402

ENDINGS = ".jsonl", ".jsonl.gz", ".json", ".parquet"


def parse_arguments(doc, out, tokenizer=None, hub=True):
    """doc: the script's docstring. out, tokenizer: defaults of these flags."""
    parser = rows.Parser(doc)
    add = parser.add_argument
    if hub:
        add("--source", help="local file or folder with the hub's columns, instead of a download")
    add("--out", type=Path, default=out, help="folder for train.jsonl and test.jsonl")
    if tokenizer:
        add("--tokenizer", default=tokenizer,
            help="folder or hub name of the tokenizer that counts tokens; empty: keep rows of every length")
    return parser.parse_args()


# ---- reading ----

def load(source, columns, hub, split):
    """Yield the rows of a split as dictionaries that all have these columns, and `__at__`, where it is.

    source: local file or folder, or None for the hub. hub: (path, configuration or None). split: as there.
    """
    table = read_files(source, split) if source else read_hub(*hub, split)
    for at, row in table:
        check_columns(at, row, columns)
        yield row | {"__at__": at}


def check_columns(at, row, columns):
    if not isinstance(row, dict):
        rows.fail(f"{at}: must be a JSON object with {', '.join(columns)}")
    for column in columns:
        if row.get(column) is None:
            rows.fail(f"{at}: has no {column!r}; its columns are {', '.join(row)}")


def read_hub(path, configuration, split):
    try:
        import datasets
    except ImportError:
        rows.fail("reading from the hub needs the datasets package; pip install datasets, or give --source")
    try:
        splits = datasets.load_dataset(path, configuration)
    except (OSError, ValueError) as error:
        rows.fail(f"{path}: cannot be had from the hub ({error}); give --source=FILES, or another name")
    name = split if split in splits else next((n for n in splits if n.startswith(f"{split}_")), None)
    if name is None:
        rows.fail(f"{path}: has no split {split}, but {', '.join(splits)}")
    for i, row in enumerate(splits[name]):
        yield f"{path}, {name}, row {i}", row


def read_files(source, split):
    """(where it is, row) for the rows of a split. For the split train_prefs they are in the files with train
    and prefs in their names, or if there are none in those with train.
    """
    path = Path(source)
    if not path.exists():
        rows.fail(f"{source}: no such file or folder")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith(ENDINGS)]
    name = split.partition("_")[0]  # train or test
    if not (named(files, "train") or named(files, "test")):
        rows.fail(f"{source}: has no {', '.join(ENDINGS)} file with train or test in its name; rename them")
    files = named(files, split) or named(files, name)
    if not files:
        print(f"{source}: has no file of the split {split}, so there will be no {name}.jsonl")
    for file in files:
        yield from read_file(file)


def named(files, split):
    """The files whose names contain all words of the split's; "latest" does not contain "test"."""
    words = set(split.split("_"))
    return [file for file in files if words <= set(re.split("[^a-z]", file.name.lower()))]


def read_file(file):
    """(where it is, row) for every row of a local file."""
    if file.suffix == ".parquet":
        yield from read_parquet(file)
        return
    at = f"{file}:1"
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as f:
            if file.suffix == ".json":
                table = rows.loads(f.read())
                for i, row in enumerate(table if isinstance(table, list) else [table]):
                    yield f"{file}, row {i}", row
                return
            for number, line in enumerate(f, 1):
                at = f"{file}:{number}"
                if line.strip():
                    yield at, rows.loads(line)
    except (ValueError, OSError, EOFError) as error:
        rows.fail(f"{at}: not JSON ({error}); fix the file")


def read_parquet(file):
    try:
        import pyarrow.parquet
    except ImportError:
        rows.fail(f"{file}: needs pyarrow; pip install datasets")
    i = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(100):  # rows of 50 completions are large
            for row in batch.to_pylist():
                yield f"{file}, row {i}", row
                i += 1
    except (ValueError, OSError) as error:
        rows.fail(f"{file}, row {i}: not Parquet ({error}); download the file again")


# ---- rows ----

def token_counter(name):
    """A function from a text to its number of tokens; without a tokenizer, to 0."""
    if not name:
        return lambda text: 0
    tokenizer = model.load_tokenizer(name)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def pairs(table, count_tokens, limit=2048):
    """Rows of a chat dataset whose `chosen` and `rejected` are conversations with different last messages.

    Yields rows of id (the position in the dataset), prompt, chosen and rejected (lists of messages), or the
    reason why a row is dropped, a string.
    """
    for i, row in enumerate(table):
        for name in "chosen", "rejected":
            if not is_conversation(row[name]):
                rows.fail(f"{row['__at__']}: {name} must be a list of {{role, content}} messages")
        *prompt, chosen = row["chosen"]
        *other, rejected = row["rejected"]
        if prompt != other or not prompt:
            yield "no prompt, or two different ones"
        elif {chosen.get("role"), rejected.get("role")} != {"assistant"}:
            yield "not ending in an answer of the assistant"
        elif max(count_tokens(chosen["content"]), count_tokens(rejected["content"])) > limit:
            yield f"a response over {limit} tokens"
        else:
            yield {"id": i, "prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def is_conversation(messages):
    if not isinstance(messages, list) or not messages:
        return False
    return all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages)


def write(path, table):
    """Write JSONL completely or not at all, and print how many rows were kept. A string in `table` instead of
    a row says why one was dropped. An empty table writes nothing.
    """
    kept, dropped = 0, collections.Counter()
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with rows.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(new, "w", encoding="utf-8", errors="backslashreplace") as f:
            for row in rows.progress(table, desc=path.name, unit="row"):
                if isinstance(row, str):
                    dropped[row] += 1
                else:
                    kept += 1
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
        if kept or dropped:
            os.replace(new, path)
            reasons = "".join(f"{n:,} dropped, {reason}; " for reason, n in dropped.items())
            print(f"{path}: {kept + dropped.total():,} rows; {reasons}{kept:,} kept")
    finally:
        new.unlink(missing_ok=True)
