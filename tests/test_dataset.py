"""dataset.py: which completions a regime takes from a row, and the arrays in the cache."""
import json
from pathlib import Path

import numpy as np
import pytest

import dataset
import rows
from conftest import call, read_rows, write_rows
from model import Policy, backbone


def build(folder, path, loaded, train_on="refs", **choices):
    """The arrays of a dataset, with their cache in FOLDER/cache."""
    tokenizer, model = loaded
    choices = dataset.Choices(train_on=train_on, **choices)
    return dataset.load(path, Path(folder) / "cache", model.name_or_path, tokenizer, model, choices)


def texts(data, tokenizer):
    """What is trained on, as text."""
    found = []
    for start, n, end in zip(data.starts, data.prompt_lens, data.lens):
        found.append(tokenizer.decode(data.tokens[start + n:start + end]))
    return found


# ---- rows ----

def test_the_fast_parser_reads_what_pythons_own_does():
    """Every float to the last bit, whole numbers of any size, and what strict JSON lacks."""
    bits = np.random.default_rng(0).integers(0, 2 ** 64, 100_000, np.uint64)
    floats = bits.view(np.float64)
    values = [*floats[np.isfinite(floats)].tolist(), 5e-324, -0.0, 10 ** 18, -10 ** 30, 2 ** 64, "é"]
    line = json.dumps(values).encode()
    assert [repr(value) for value in rows.loads(line)] == [repr(value) for value in values]
    assert rows.loads(b'["\\ud800"]') == ["\ud800"]  # half a surrogate pair
    assert rows.loads(b'{"reward": NaN}') == {"reward": None}
    with pytest.raises(ValueError, match="Infinity is not a JSON number"):
        rows.loads(b"[Infinity]")


# ---- regimes ----

@pytest.fixture
def row(loaded):
    completions = []
    for letter in "abcde":
        ids = loaded[0](letter, add_special_tokens=False).input_ids
        completions.append({"text": letter, "token_ids": ids, "finish_reason": "length"})
    return {"prompt": "p", "completion": "c", "reward": 2,
            "chosen": "yes", "rejected": "no", "chosen_reward": 3, "rejected_reward": 4,
            "ref_completions": completions, "ref_rewards": [0.1, 0.9, 0.5, 0.5, None],
            "other_completions": [{"text": "xx"}, {"text": "yy"}], "other_rewards": [0.95, 0.05],
            "samples": completions[:2], "sample_rewards": [7, 8]}


REGIMES = {  # regime: what is trained on, and its rewards; an end token only where one was sampled or belongs
    "refs": ("a b c d", [0.1, 0.9, 0.5, 0.5]),
    "best_worst": ("b a", [0.9, 0.1]),
    "random_pairs": ("b a c d", [0.9, 0.1, 0.5, 0.5]),
    "samples": ("a b", [7, 8]),
    "mixed": ("xx<eos> a", [0.95, 0.1]),  # quantiles 1 and 1/3, of 3 references
    "chosen_rejected": ("yes<eos> no<eos>", [3, 4]),
    "chosen": ("yes<eos>", [3]),
    "completion": ("c<eos>", [2])}


@pytest.mark.parametrize("regime", dataset.REGIMES)
def test_what_each_regime_trains_on(loaded, row, tmp_path, regime):
    """A completion of unknown reward is dropped."""
    data = build(tmp_path, write_rows(tmp_path / "d.jsonl", [row]), loaded, regime, num_ref_rewards=3)
    expected, rewards = REGIMES[regime]
    assert texts(data, loaded[0]) == expected.split()
    np.testing.assert_allclose(data.rewards, rewards)
    np.testing.assert_allclose(data.ref_rewards, [[0.1, 0.9, 0.5]])
    if dataset.REGIMES[regime].size == 2:
        assert data.side.tolist() == [1, -1] * (len(rewards) // 2)  # chosen before rejected


def test_a_completion_is_among_its_references_where_its_reward_is_used(loaded, row, tmp_path):
    data = build(tmp_path, write_rows(tmp_path / "d.jsonl", [row]), loaded, num_ref_rewards=3)
    assert data.among_refs.tolist() == [True, True, True, False]
    assert data.side.tolist() == [-1, 1, 0, 0]  # against the mean reference reward
    for regime in ("samples", "chosen_rejected", "completion"):
        assert not build(tmp_path, tmp_path / "d.jsonl", loaded, regime).among_refs.any()


def test_mixed_pools_take_one_at_quantile_1_and_one_at_most_at_a_fifth(loaded, row, tmp_path):
    """By hand: ten references of rewards 1 to 10, so reward r of another completion is at quantile r / 10."""
    ids = row["ref_completions"][0]
    row |= {"ref_completions": [ids | {"text": "a"} for _ in range(10)], "ref_rewards": [*range(1, 11)]}
    cases = [  # rewards of other completions: those of the pair
        ([], [10, 1.5]), ([11, 0], [11, 1.5]), ([9, 5], [10, 1.5]), ([2.5], [10, 2.5]), ([3], [10, 1.5])]
    row["ref_rewards"][1] = 1.5  # at quantile 0.2, with what is below 3
    for others, expected in cases:
        row |= {"other_completions": [{"text": f"t{r}"} for r in others], "other_rewards": others}
        table = [row | {"prompt": f"p{i}"} for i in range(12)]  # among equals, chance decides: by the prompt
        data = build(tmp_path / str(others), write_rows(tmp_path / "d.jsonl", table), loaded, "mixed")
        found = set(map(tuple, data.rewards.reshape(12, 2).tolist()))
        assert data.side.tolist() == [1, -1] * 12
        equals = {tuple(expected)}
        if others == [11, 0]:  # 10 is at quantile 1, too
            equals.add((10, 1.5))
        if others == [2.5]:
            equals.add((10, 1.5))
        assert found == equals, others


def test_mixed_pools_without_a_low_completion_or_with_all_rewards_equal_have_no_pair(loaded, row, tmp_path):
    other = {"prompt": "q", "other_completions": [], "other_rewards": []}
    for i, ref_rewards in enumerate(([1, 1, 1, 1, 1], [1, 1, 1, 2, 2], [None] * 5)):
        bad = row | other | {"ref_rewards": ref_rewards}
        path = write_rows(tmp_path / "d.jsonl", [row, bad])
        assert build(tmp_path / str(i), path, loaded, "mixed").row.tolist() == [0, 0]


def test_answers_with_an_end_token_before_their_end_are_dropped_and_counted(loaded, row, tmp_path, capsys):
    """After it sampling would stop, so what follows would never be seen."""
    table = [row | {"completion": text} for text in ("a<eos>b", "a<eos>", "<eos><eos>", "a")]
    data = build(tmp_path, write_rows(tmp_path / "d.jsonl", table), loaded, "completion")
    assert texts(data, loaded[0]) == ["a<eos>", "a<eos>"]
    assert "2 completions dropped, with an end token before their end" in capsys.readouterr().out
    row["ref_completions"][1]["token_ids"] = [257, 66]
    row["ref_completions"][1]["text"] = "<eos>b"
    data = build(tmp_path, write_rows(tmp_path / "d.jsonl", [row]), loaded)
    assert texts(data, loaded[0]) == ["a", "c", "d"]


def test_losses_of_pairs_drop_pairs_of_equal_reward(loaded, row, tmp_path):
    data = build(tmp_path, write_rows(tmp_path / "d.jsonl", [row]), loaded, "random_pairs", pairs=True)
    np.testing.assert_allclose(data.rewards, [0.9, 0.1])


def test_the_first_candidates_and_a_lowest_reward(loaded, rewarded, tmp_path):
    every = build(tmp_path, rewarded, loaded).rewards
    first = build(tmp_path, rewarded, loaded, num_candidates=3).rewards
    np.testing.assert_array_equal(first.reshape(30, 3), every.reshape(30, 4)[:, :3])
    good = build(tmp_path, rewarded, loaded, min_reward=0.5).rewards
    assert 0 < len(good) == (every >= 0.5).sum() < len(every)


def test_the_order_of_rows_does_not_depend_on_how_many_processes_wrote_them(loaded, rewarded, tmp_path):
    table = read_rows(rewarded)
    (tmp_path / "two").mkdir()
    write_rows(tmp_path / "two" / "part-00000.jsonl", table[1::2])
    write_rows(tmp_path / "two" / "part-00001.jsonl", table[0::2])
    one, two = build(tmp_path, rewarded, loaded), build(tmp_path, tmp_path / "two", loaded)
    assert texts(one, loaded[0]) == texts(two, loaded[0])
    for name in ("lens", "rewards", "row", "ids", "ref_rewards"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("left", (120, 6))  # with 6 completions some processes find nothing
def test_several_processes_build_the_arrays_of_one(loaded, rewarded, tmp_path, monkeypatch, left):
    rewards = build(tmp_path, rewarded, loaded).rewards
    least = float(np.sort(rewards)[-left])
    one = build(tmp_path / "one", rewarded, loaded, min_reward=least)
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 1000)  # of rows for a process at a time: one or two rows
    many = build(tmp_path / "many", rewarded, loaded, min_reward=least)
    assert 0 < len(one.rewards) < left + 5
    assert vars(one).keys() == vars(many).keys()
    for name in vars(one):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))


# ---- the cache ----

def edited(name, monkeypatch):
    """As if the code of `name`, a module, class or function, had been changed."""
    code_of = rows.code_of
    monkeypatch.setattr(rows, "code_of", lambda part: code_of(part) + "pass" * (part.__name__ == name))


def test_a_comment_is_not_code():
    def function():  # a comment
        return 1
    assert rows.code_of(function) == "def function():\n    return 1"


def test_the_arrays_are_kept_and_made_again_when_data_choices_or_code_change(
        loaded, rewarded, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "data.jsonl", read_rows(rewarded))
    builds, build_arrays = [], dataset.build

    def counted(*args):
        builds.append(1)
        build_arrays(*args)
    monkeypatch.setattr(dataset, "build", counted)
    build(tmp_path, data, loaded)
    build(tmp_path, data, loaded)
    assert len(builds) == 1
    edited("tokens", monkeypatch)
    build(tmp_path, data, loaded)
    edited("dataset", monkeypatch)
    build(tmp_path, data, loaded)
    assert len(builds) == 3
    build(tmp_path, data, loaded, num_candidates=2)
    assert len(builds) == 4
    write_rows(data, read_rows(rewarded)[:20])
    build(tmp_path, data, loaded)
    assert len(builds) == 5


def test_the_reference_log_probabilities_are_made_again_when_the_code_that_decides_them_changes(
        tiny, rewarded, tmp_path, monkeypatch):
    passes, all_logps = [], dataset.all_logps

    def counted(*args):
        passes.append(1)
        return all_logps(*args)
    monkeypatch.setattr(dataset, "all_logps", counted)
    flags = f"--model={tiny}", f"--data={rewarded}", f"--cache={tmp_path}/cache", "--batch_size=120"
    for i, (name, count) in enumerate(((None, 1), (None, 1), ("show", 1), ("Policy", 2), ("logits_of", 3))):
        if name:
            edited(name, monkeypatch)
        call("train.py", *flags, f"--out={tmp_path / str(i)}")
        assert len(passes) == count, name


def test_unknown_rewards_are_nan_and_never_zero(loaded, row, tmp_path):
    row |= {"ref_rewards": [0.1, None, 0.5, float("nan"), 0.9], "chosen_reward": None}
    path = write_rows(tmp_path / "d.jsonl", [row])
    data = build(tmp_path, path, loaded)
    np.testing.assert_allclose(data.rewards, [0.1, 0.5, 0.9])
    np.testing.assert_allclose(data.ref_rewards, [[0.1, np.nan, 0.5, np.nan, 0.9]])
    assert "40.0% of the reference rewards are unknown" in data.summary
    one = {"prompt": "q", "ref_completions": row["ref_completions"][:1], "ref_rewards": [0.5]}
    both = build(tmp_path, write_rows(tmp_path / "both.jsonl", [row, one]), loaded)
    assert "33.3% of the reference rewards are unknown" in both.summary  # not those that this row never had
    pair = build(tmp_path, path, loaded, "chosen_rejected")  # a loss that needs no rewards keeps them
    np.testing.assert_allclose(pair.rewards, [np.nan, 4])
    with pytest.raises(SystemExit):
        build(tmp_path, path, loaded, "chosen", needs_reward=True)


def test_every_rank_makes_as_many_forward_passes_for_the_reference_log_probabilities(
        loaded, rewarded, tmp_path, monkeypatch):
    """Also of pairs, which go through the model in two groups: with FSDP, a rank that makes more would wait.
    """
    model = loaded[1]
    policy, found, passes = Policy(model, length_groups=2), [], []
    data = build(tmp_path, write_rows(tmp_path / "d.jsonl", read_rows(rewarded)[:2]), loaded, "best_worst")
    whole = dataset.all_logps(policy, data, 1000, model.device)
    monkeypatch.setattr(dataset.dist, "all_reduce", lambda tensor: None)
    hook = backbone(model).register_forward_hook(lambda *args: passes.append(rank))
    for rank in range(3):
        monkeypatch.setattr(rows, "rank_and_world", lambda: (rank, 3))
        found.append(dataset.all_logps(policy, data, 1000, model.device))
    hook.remove()
    assert len(whole) == 4 and len({passes.count(rank) for rank in range(3)}) == 1
    np.testing.assert_allclose(sum(found), whole, rtol=1e-5)


# ---- micro-batches ----

@pytest.mark.parametrize("world", (1, 3))
@pytest.mark.parametrize("size", (1, 2))
def test_micro_batches_hold_every_term_once_within_the_budget(world, size):
    lens = np.random.default_rng(0).integers(5, 60, 40 * size)
    terms = np.arange(40 * size).reshape(40, size)
    found, counts = [], set()
    for rank in range(world):
        batches = list(dataset.micro_batches(lens, terms, 200, rank, world))
        counts.add(len(batches))
        for index, works in batches:
            assert len(index) == size or len(index) * lens[index].max() <= 200
            if works:
                found += index.tolist()
    assert sorted(found) == list(range(40 * size)) and len(counts) == 1  # every rank takes part as often
