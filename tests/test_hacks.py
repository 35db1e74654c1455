"""The README's changes, made as it shows them in a copy of the project, do what it says."""
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, read_rows, write_rows


def changes():
    """The README's diffs: (file, lines before, lines that are added, lines after)."""
    text = (ROOT / "README.md").read_text()
    for block in re.finditer(r"```diff\n(.*?)```", text, re.S):
        file = re.findall(r"in (\w+\.py)", text[:block.start()])[-1]
        parts = {"before": "", "added": "", "after": ""}
        for line in block.group(1).splitlines(keepends=True):
            place = "added" if line[0] == "+" else "after" if parts["added"] else "before"
            parts[place] += line[1:]
        yield file, parts


def change(folder):
    for file, parts in changes():
        source = (folder / file).read_text()
        found = parts["before"] + parts["after"]
        assert source.count(found) == 1, (file, found)
        (folder / file).write_text(source.replace(found, "".join(parts.values())))


def in_copy(folder, script, *flags):
    subprocess.run([sys.executable, folder / script, *flags], check=True, capture_output=True, cwd=folder)


@pytest.mark.slow
def test_a_loss_a_regime_a_reward_a_metric_and_a_sampling_rule(tiny, rewarded, tmp_path):
    """Guards that each kind of change has the one place that the README shows; four starts of Python."""
    code = tmp_path / "code"
    shutil.copytree(ROOT, code, ignore=shutil.ignore_patterns(".*", "out", "docs", "tests", "data"))
    change(code)
    table = read_rows(rewarded)[:8]
    for row in table:
        row["ref_completions"][0]["finish_reason"] = "stop"
    data = write_rows(tmp_path / "rows.jsonl", table)
    common = f"--model={tiny}", f"--data={data}", "--batch_size=8"

    in_copy(code, "train.py", *common, f"--out={tmp_path / 'ipo'}", "--loss=ipo", "--train_on=best_worst")
    first = read_rows(tmp_path / "ipo" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(25, rel=1e-3) and 0 <= first["share_up"] <= 1  # (1 / (2 * 0.1))^2
    in_copy(code, "train.py", *common, f"--out={tmp_path / 'finished'}", "--train_on=finished")
    assert len(read_rows(tmp_path / "finished" / "metrics.jsonl")) == 1  # 8 completions, one for each row
    in_copy(code, "generate_refs.py", f"--model={tiny}", f"--data={data}", f"--out={tmp_path / 'min_p'}",
            "--field=samples", "--num_refs=2", "--max_new_tokens=8")
    assert not read_rows(tmp_path / "min_p")[0]["made_by"]["samples"]["own_distribution"]
    answers = write_rows(tmp_path / "answers.jsonl", [{"prompt": "p", "completion": "a" * n} for n in (3, 5)])
    in_copy(code, "score.py", f"--data={answers}", f"--out={tmp_path / 'short'}", "--reward=short")
    assert [row["reward"] for row in read_rows(tmp_path / "short")] == [-3, -5]
