"""What the prepare.py scripts share: rows of a dataset on the hub or in local files, and writing those that are kept.

A local source is a file, or a folder of files, of the hub's columns: .jsonl, .json (a list), .jsonl.gz or .parquet. The
hub is read with `datasets` and .parquet with pyarrow (`pip install datasets` brings both); nothing else needs them.

    python data/leetcode/prepare.py -h
"""
import collections
import gzip
import json
import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flags  # noqa: E402
import models  # noqa: E402
import rows  # noqa: E402


def arguments(doc, folder, tokenizer=None, hub=True):
    """--out; --source, where rows come from the hub; and --tokenizer, where there is a limit on tokens."""
    parser = flags.parser(doc)
    add = parser.add_argument
    if hub:
        add("--source", help="local file or folder of the hub's columns, instead of a download")
    add("--out", type=Path, default=folder, help="folder for train.jsonl and test.jsonl (default: the script's own)")
    if tokenizer:
        add("--tokenizer", default=tokenizer, help="folder or hub name of the one that counts tokens; empty: "
            "keep every length (default %(default)s)")
    return flags.parse(parser)


def load(hub, name, split, source, columns, config=None):
    """Yield the rows of a split as dicts with these columns. Locally the split is the files with its hub name in
    theirs, or else with `name` (train, test).
    """
    if not source:
        try:
            import datasets
        except ImportError:
            rows.fail("the hub is read with the datasets package; pip install datasets, or give --source")
        table = ((f"{hub}, {split}, row {i}", row) for i, row in enumerate(
            datasets.load_dataset(hub, config, split=split)))
    else:
        path = Path(source)
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else \
            rows.fail(f"{source}: no such file or folder")
        files = [f for f in files if f.name.endswith((".jsonl", ".jsonl.gz", ".json", ".parquet"))]

        def of(split):  # whole words: "latest" holds no test
            return [f for f in files if set(filter(None, split.split("_"))) <= set(re.split("[^a-z]", f.name.lower()))]

        if not (files and of(name) + of("train") + of("test")):
            rows.fail(f"{source}: no .jsonl, .json, .jsonl.gz or .parquet whose name says train or test; rename them")
        files = of(split) or of(name)
        if not files:
            print(f"{source}: no file of the {split} split, so no {name}.jsonl")
        table = (row for file in files for row in read(file))
    for at, row in table:
        if not isinstance(row, dict):
            rows.fail(f"{at}: must be a JSON object with {', '.join(columns)}")
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            rows.fail(f"{at}: has no {missing[0]!r}; its columns are {', '.join(row)}")
        yield row


def read(file):
    """(where it stands, row) of every row of a local file."""
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            rows.fail(f"{file}: needs pyarrow; pip install datasets")
        groups = pyarrow.parquet.ParquetFile(file).iter_batches()
        yield from ((f"{file}, row {i}", row) for i, row in enumerate(row for g in groups for row in g.to_pylist()))
        return
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as f:
        number = 0
        try:
            for number, text in enumerate([f.read()] if file.suffix == ".json" else f, 1):
                if text.strip():
                    value = json.loads(text)
                    table = value if file.suffix == ".json" and isinstance(value, list) else [value]
                    yield from ((f"{file}:{number}", row) for row in table)
        except (ValueError, OSError, EOFError) as error:
            rows.fail(f"{file}:{max(number, 1)}: not JSON ({error}); mend the file")


def counter(tokenizer):
    """A function from a text to its number of tokens; to 0 if there is no tokenizer."""
    tokenizer = tokenizer and models.load_tokenizer(tokenizer)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids) if tokenizer else 0


def pairs(table, tokens, limit=2048):
    """Rows of a chat dataset whose `chosen` and `rejected` are whole conversations that differ in their last message.

    Yields {id: position in the dataset, prompt, chosen, rejected} (messages), or why a row is dropped.
    """
    for i, row in enumerate(table):
        chosen, rejected = row["chosen"], row["rejected"]
        for name in "chosen", "rejected":
            if not (isinstance(row[name], list) and row[name] and all(
                    isinstance(m, dict) and isinstance(m.get("content"), str) for m in row[name])):
                rows.fail(f"row {i} of the dataset: {name} must be a list of {{role, content}} messages")
        if max(tokens(chosen[-1]["content"]), tokens(rejected[-1]["content"])) > limit:
            yield f"a response over {limit} tokens"
        else:
            yield {"id": i, "prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def write(path, table):
    """Write the rows of `table` as JSONL, whole or not at all, and say how many were dropped: a string in it, instead
    of a row, is the reason why one was. Nothing is written where there are no rows at all.
    """
    counts, new = collections.Counter(), path.with_name(f".{path.name}.{os.getpid()}")
    with rows.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(new, "w", encoding="utf-8") as f:
            for row in tqdm(table, desc=path.name, unit="row"):
                if isinstance(row, str):
                    counts[row] += 1
                else:
                    counts[""] += 1
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not counts:
            return
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    print(f"{path}: " + "; ".join([f"{counts.total():,} rows", *(
        f"{n:,} dropped, {why}" for why, n in counts.items() if why), f"{counts['']:,} kept"]))
