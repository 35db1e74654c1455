"""generate_refs.py: tokens and completions follow the model's probabilities, in whatever batches they are
sampled; prompts; processes and kills; vLLM.
"""
import argparse
import json
import shutil
import signal
import sys

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import generate_refs
from conftest import call, make_tokenizer, read_rows, refused, start_ranks, start_until_finished, write_rows
from kv_cache import Cache, attend, only_causal
from model import load_model, load_tokenizer, sampling_dtype
from tokens import completion_ids, end_ids, prompt_ids

SETTINGS = {"num_refs": 1, "batch_size": 8, "seed": 0, "temperature": 1.0, "top_p": 1.0, "field": "samples"}


def arguments(**settings):
    return argparse.Namespace(**SETTINGS | settings)


def sample(model, prompts, limits, ends, **settings):
    """generate_refs.sample on prompts of token ids -> {position of the prompt: its completions}."""
    requests = [{"row": {"id": i}, "prompt": p, "limit": n} for i, (p, n) in enumerate(zip(prompts, limits))]
    sampled = generate_refs.sample(model, requests, arguments(**settings), ends)
    return {row["id"]: completions for row, completions in sampled}


def load(model, folder):
    """The random model, loaded as generate_refs.py loads one."""
    model.save_pretrained(folder)
    return load_model(folder, torch.float32, torch.device("cpu"))


def likeliest(probs, top_p):
    """probs (vocab,) with 0 after the token that crosses top_p, normalised."""
    order = probs.argsort(descending=True)
    kept = order[:int((probs[order].cumsum(0) < top_p).sum()) + 1]
    found = torch.zeros_like(probs).index_copy(0, kept, probs[kept])
    return found / found.sum()


def assert_sampled_from(counts, probs, n):
    """Chi-square, within five standard deviations; nothing impossible was drawn."""
    possible = probs > 0
    assert (counts[~possible] == 0).all()
    expected = probs[possible] * n
    freedom = int(possible.sum()) - 1
    assert ((counts[possible] - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("flag, stored, hardware, expected", (
    ("auto", "bfloat16", True, torch.bfloat16), ("auto", "bfloat16", False, torch.float32),
    ("auto", "float32", True, torch.float32), ("auto", None, True, torch.float32),
    ("float32", "bfloat16", True, torch.float32), ("bfloat16", "float32", False, torch.bfloat16)))
def test_the_dtype_that_a_cpu_samples_in(tmp_path, monkeypatch, flag, stored, hardware, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": hardware})
    transformers.LlamaConfig(dtype=stored).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert sampling_dtype(flag, torch.device("cpu"), config) == expected


# ---- the distribution ----

@pytest.mark.parametrize("temperature, top_p", ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9)))
def test_tokens_follow_the_exact_probabilities(temperature, top_p):
    torch.manual_seed(0)
    logits, n = torch.randn(20) * 2, 200_000
    exact = likeliest(torch.softmax(logits.double() / temperature, -1), top_p)
    args = arguments(temperature=temperature, top_p=top_p)
    tokens = generate_refs.sample_tokens(logits.expand(n, 20), torch.rand(n), args)
    assert_sampled_from(tokens.bincount(minlength=20), exact, n)


def test_top_p_of_a_vocabulary_beyond_the_likeliest_few():
    """A flat distribution over 5,000 tokens needs far more of them than are looked at first."""
    probs = torch.softmax(torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) / 10, -1)
    kept = generate_refs.keep_top_p(probs, 0.9)
    for ours, theirs in zip(kept, probs):
        torch.testing.assert_close(ours / ours.sum(), likeliest(theirs, 0.9))


def test_extreme_random_numbers_never_pick_an_impossible_token():
    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]]).expand(2, 4)
    tokens = generate_refs.sample_tokens(logits, torch.tensor([0.0, 1 - 2 ** -24]), arguments())
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("temperature, top_p", ((1.0, 1.0), (2.0, 0.8)))
def test_completions_follow_the_exact_probabilities(temperature, top_p, tmp_path):
    """Chi-square of 8,000 completions of two tokens against their exact probabilities."""
    torch.manual_seed(0)
    model = load(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None)), tmp_path)
    prompt, n = [1, 2, 3], 8000

    def next_token(ids):
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        return likeliest(torch.softmax(logits / temperature, -1), top_p)

    with torch.no_grad():
        second = torch.stack([next_token([*prompt, first]) for first in range(5)])
        exact = next_token(prompt)[:, None] * second
    assert (exact > 0).sum() > 8
    pairs = sample(model, [prompt, [4]], [2, 2], set(), num_refs=n, batch_size=256, temperature=temperature,
                   top_p=top_p)[0]
    counts = torch.tensor([5 * first + second for first, second in pairs]).bincount(minlength=25).view(5, 5)
    assert_sampled_from(counts, exact, n)


FAMILIES = {  # settings of a config, and whether its completions share their prompt (kv_cache.py)
    "Llama": ({}, True), "Qwen3": ({}, True), "GPT2": ({}, True), "Mistral": ({"sliding_window": 8}, False),
    "Gemma2": ({"sliding_window": 8}, False)}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_sampling_is_the_models_own(family, tmp_path, monkeypatch):
    """While completions end and others take their rows, prompts come and go, blocks of rows have columns of
    their own, columns run out, and windows slide.
    """
    monkeypatch.setattr(Cache, "BLOCK", 2)
    blocks = []
    attended = Cache.attended
    monkeypatch.setattr(Cache, "attended", lambda *given: blocks.append(attended(*given)) or blocks[-1])
    settings, shares = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        head_dim=16, num_key_value_heads=1, initializer_range=0.3, **settings)
    model = load(transformers.AutoModelForCausalLM.from_config(config), tmp_path).double()
    prompts = [torch.randint(99, (n,)).tolist() for n in (3, 12, 7, 30, 1, 9, 9, 21)]
    limits = [200, 40, 12, 5, 60, 1, 33, 20]
    ours = sample(model, prompts, limits, {7, 8}, temperature=0, batch_size=5, num_refs=2)
    assert model.shares_prompts == shares
    assert max(map(len, blocks)) == (3 if shares else 1)
    for i, (prompt, limit) in enumerate(zip(prompts, limits)):
        whole = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
            max_new_tokens=limit, eos_token_id=[7, 8], pad_token_id=0)
        theirs = whole[0, len(prompt):].tolist()
        assert ours[i] == [theirs, theirs]


def test_where_shared_prompts_come_out_wrong_they_are_copied(loaded, tmp_path, monkeypatch):
    """As when a version of torch no longer has the function that `attend` calls, or a family's scores are
    changed by an argument that `attend` does not know.
    """
    model = load(loaded[1], tmp_path)

    def wrong(module, query, key, value, *args, **kwargs):
        return 1.1 * attend(module, query, key, value, *args, **kwargs)[0], None
    for function in (wrong, None):
        monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "shared_prompts", function)
        generate_refs.check_sampler(model)
        assert not model.shares_prompts
    monkeypatch.undo()
    generate_refs.check_sampler(model)
    assert model.shares_prompts and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("argument", ("softcap", "s_aux", "sliding_window", "unheard_of"))
def test_attention_with_more_arguments_is_refused(argument):
    with pytest.raises(ValueError, match=argument):
        attend(None, None, None, None, None, position_ids=torch.zeros(1), **{argument: 1.0})
    with pytest.raises(ValueError, match="another kind of attention"):
        attend(None, None, None, None, torch.zeros(1))
    with pytest.raises(ValueError, match="less than all"):
        only_causal(mask_function=lambda *index: True)


def test_a_completion_does_not_depend_on_its_batch(loaded):
    tokenizer, model = loaded
    prompts = [prompt_ids(tokenizer, text) for text in ("a", "a", "hello there", "row xxxxxxx", "b")]
    limits, ends = [30, 30, 5, 30, 30], end_ids(model, tokenizer)
    together, few, alone = [
        sample(model, prompts, limits, ends, num_refs=3, batch_size=size) for size in (64, 4, 1)]
    assert together == few == alone and max(map(len, together[2])) <= 5
    completions = [tuple(ids) for five in together.values() for ids in five]
    assert len(set(completions)) == len(completions)  # equal prompts have random numbers of their own, too


def test_samples_of_a_policy_have_other_random_numbers_than_the_references(loaded):
    """Otherwise a policy near its reference model would repeat its references."""
    one, two = (arguments(field=field) for field in ("samples", "ref_completions"))
    assert generate_refs.random_key(one, 0, 0) != generate_refs.random_key(two, 0, 0)


# ---- token ids ----

def test_an_end_token_is_kept_only_where_it_was_sampled(loaded, rewarded):
    eos = loaded[0].eos_token_id
    reasons = set()
    for row in read_rows(rewarded):
        for c in row["ref_completions"]:
            reasons.add(c["finish_reason"])
            assert eos not in c["token_ids"][:-1]
            assert (c["token_ids"][-1] == eos) == (c["finish_reason"] == "stop")
            assert c["finish_reason"] == "stop" or len(c["token_ids"]) == 20
    assert "length" in reasons


def load_as_saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}")


def test_chat_goes_through_the_template_which_writes_its_own_bos(tmp_path):
    tokenizer = make_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer = load_as_saved(tokenizer, tmp_path)
    chat = [{"role": "user", "content": "hi"}]
    prompt = prompt_ids(tokenizer, chat)
    assert prompt[0] == bos and prompt.count(bos) == 1
    assert tokenizer.decode(prompt) == "<bos>[user]hi<eos>\n[assistant]"
    answer = completion_ids(tokenizer, chat, "yes", [eos])  # not the newline after the turn's end
    assert tokenizer.decode(answer) == "yes<eos>"
    assert completion_ids(tokenizer, chat, [{"role": "assistant", "content": "yes"}], [eos]) == answer


def test_text_never_begins_with_two_bos_and_a_prompt_never_ends_in_eos(tmp_path):
    """With a tokenizer that puts BOS before a text and EOS after it."""
    tokenizer = make_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)])
    tokenizer = load_as_saved(tokenizer, tmp_path)
    for text in ("hi", "<bos>hi"):
        start = prompt_ids(tokenizer, text)
        assert tokenizer.decode(start) == "<bos>hi"
    assert tokenizer.decode(completion_ids(tokenizer, text, " there", [eos])) == " there<eos>"


# ---- processes and kills ----

@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """(flags, the rows of an undisturbed run by id, its folder)."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = [{"id": f"r{i:02}", "prompt": "row " + "x" * (i % 5), "tag": i} for i in range(16)]
    data = write_rows(folder / "prompts.jsonl", prompts)
    flags = [f"--model={tiny}", f"--data={data}", "--num_refs=3", "--max_new_tokens=30", "--batch_size=6"]
    call("generate_refs.py", *flags, f"--out={folder / 'out'}")
    found = by_id(folder / "out")
    assert [row["tag"] for row in found] == list(range(16))
    assert all(len(row["ref_completions"]) == 3 for row in found)
    return flags, found, folder / "out"


def by_id(folder):
    return sorted(read_rows(folder), key=lambda row: row["id"])


def test_the_settings_are_written_beside_the_rows(whole):
    settings = json.loads((whole[2] / "settings.json").read_text())
    assert settings["num_refs"] == "3" and settings["dtype"] == "float32"  # not auto


def test_two_processes_share_the_rows(whole, tmp_path):
    ranks = start_ranks(2, "generate_refs.py", *whole[0], f"--out={tmp_path}")
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert len(list(tmp_path.glob("part-*.jsonl"))) == 2 and by_id(tmp_path) == whole[1]


def test_what_one_of_two_processes_began_one_alone_finishes(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    call("generate_refs.py", *whole[0], f"--out={tmp_path}")
    assert len(read_rows(tmp_path)) == 8
    monkeypatch.undo()
    call("generate_refs.py", *whole[0], f"--out={tmp_path}")
    assert by_id(tmp_path) == whole[1]


def test_a_run_killed_before_any_of_its_writes_has_the_same_rows(whole, tmp_path):
    """Of five prompts; those of a run do not depend on its others."""
    few = write_rows(tmp_path / "few.jsonl", read_rows(whole[2].parent / "prompts.jsonl")[:5])
    kills = start_until_finished("generate_refs.py", *whole[0], f"--data={few}", f"--out={tmp_path / 'out'}")
    assert kills >= 3 and by_id(tmp_path / "out") == whole[1][:5]


def test_a_run_killed_in_the_middle_of_a_line_has_the_same_rows(whole, tmp_path):
    shutil.copytree(whole[2], tmp_path, dirs_exist_ok=True)
    part = tmp_path / "part-00000.jsonl"
    part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[:9]) + b'{"id": "r15", "pro')
    call("generate_refs.py", *whole[0], f"--out={tmp_path}")
    assert by_id(tmp_path) == whole[1]


def test_told_to_stop_it_exits_with_75_and_continues(whole, tmp_path, monkeypatch):
    import rows
    append = rows.append

    def append_and_signal(file, row):
        append(file, row)
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(rows, "append", append_and_signal)
    with pytest.raises(SystemExit) as end:
        call("generate_refs.py", *whole[0], f"--out={tmp_path}")
    assert end.value.code == 75 and len(read_rows(tmp_path)) == 1
    monkeypatch.undo()
    call("generate_refs.py", *whole[0], f"--out={tmp_path}")
    assert by_id(tmp_path) == whole[1]


# ---- vLLM ----

VLLM = """
import dataclasses, sys, types, torch, transformers, generate_refs

sys.modules["vllm.platforms"] = types.SimpleNamespace(
    current_platform=types.SimpleNamespace(is_cpu=lambda: False))
sampling_params = types.SimpleNamespace(RequestOutputKind=types.SimpleNamespace(FINAL_ONLY=2))
__version__ = "0"

class SamplingParams:
    def __init__(self, *, temperature, top_p, max_tokens, seed, stop_token_ids, detokenize, output_kind):
        assert 0 <= seed < 2 ** 63
        self.__dict__.update(locals())

@dataclasses.dataclass
class EngineArgs:
    gpu_memory_utilization: float = 0.9

class LLM:
    def __init__(self, model, *, dtype, seed, trust_remote_code, max_num_seqs, max_model_len,
                 gpu_memory_utilization=0.9):
        if not gpu_memory_utilization < 1:
            raise ValueError("more than\\nthere is")
        assert dtype in ("float32", "bfloat16")
        self.model, self.most = transformers.AutoModelForCausalLM.from_pretrained(model), max_model_len
        self.llm_engine, self.renderer, self.waiting = self, self, []

    def render_cmpl(self, prompts):
        return prompts

    def add_request(self, name, prompt, params):
        self.waiting.append((name, prompt["prompt_token_ids"], params))

    def get_num_unfinished_requests(self):
        return len(self.waiting)

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):  # two end, the newest first
        return [self.one(*self.waiting.pop()) for _ in self.waiting[:2]]

    @torch.no_grad()
    def one(self, name, prompt, s):
        ids, random = [], torch.Generator().manual_seed(s.seed)
        while len(ids) < s.max_tokens and not (ids and ids[-1] in s.stop_token_ids):
            assert len(prompt) + len(ids) < self.most
            logits = self.model(torch.tensor([prompt + ids])).logits[:, -1]
            ids.append(generate_refs.sample_tokens(logits, torch.rand(1, generator=random), s).item())
        reason = "stop" if ids[-1] in s.stop_token_ids else "length"
        output = types.SimpleNamespace(token_ids=tuple(ids), finish_reason=reason)
        return types.SimpleNamespace(request_id=name, outputs=[output])
"""


@pytest.fixture
def vllm(tiny, tmp_path, monkeypatch):
    """The flags of a run with the stand-in."""
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": "row " + "x" * (i % 3), "tag": i} for i in range(6)])
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "vllm.py").write_text(VLLM)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield f"--model={tiny}", f"--data={data}", "--num_refs=8", "--max_new_tokens=9", "--engine=vllm"
    sys.modules.pop("vllm", None)


def test_vllm_rows_say_in_which_dtype_they_were_sampled(vllm, tmp_path):
    for dtype, recorded in (("auto", "bfloat16"), ("float32", "float32")):
        call("generate_refs.py", *vllm, f"--out={tmp_path / dtype}", f"--dtype={dtype}", "--num_refs=1")
        assert read_rows(tmp_path / dtype)[0]["made_by"]["ref_completions"]["dtype"] == recorded


def test_vllm_that_is_not_installed_is_said(tiny, tmp_path, capsys, monkeypatch):
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": "row"}])
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(capsys, ["vLLM is not installed"], "generate_refs.py", f"--model={tiny}", f"--data={data}",
            f"--out={tmp_path / 'out'}", "--engine=vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, says", (
    ({"gpu_memory_utilisation": 0.5}, "unexpected keyword argument 'gpu_memory_utilisation'"),
    ({"gpu_memory_utilization": 1}, "does not start: more than there is")))
def test_vllm_options_that_it_does_not_take_are_refused(vllm, tmp_path, capsys, options, says):
    refused(capsys, [says], "generate_refs.py", *vllm, f"--out={tmp_path / 'out'}",
            f"--engine_options={json.dumps(options)}")
    assert not read_rows(tmp_path / "out")


def test_vllm_options_without_vllm_are_refused(vllm, tmp_path, capsys):
    refused(capsys, ["--engine_options"], "generate_refs.py", *vllm[:-1], f"--out={tmp_path / 'out'}",
            """--engine_options={"gpu_memory_utilization": 0.5}""")


def test_vllm_rows_are_kept_when_the_engine_dies(vllm, tmp_path, monkeypatch):
    call("generate_refs.py", *vllm, f"--out={tmp_path / 'whole'}")
    import vllm as engine
    step, steps = engine.LLM.step, []

    def dies(self):
        steps.append(1)
        if len(steps) == 14:  # 28 of 48 completions
            raise RuntimeError("dead")
        return step(self)
    monkeypatch.setattr(engine.LLM, "step", dies)
    with pytest.raises(RuntimeError, match="dead"):
        call("generate_refs.py", *vllm, f"--out={tmp_path / 'out'}", "--batch_size=4")
    assert len(read_rows(tmp_path / "out")) >= 2
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path / "modules")
    call("generate_refs.py", *vllm, f"--out={tmp_path / 'out'}",  # with less memory, it may go on
         """--engine_options={"gpu_memory_utilization": 0.5}""")
    assert by_id(tmp_path / "out") == by_id(tmp_path / "whole")


def test_vllm_writes_rows_as_the_sampler_does_alone_or_shared_and_after_a_kill(vllm, loaded, tmp_path):
    """With a stand-in for the part of vLLM's interface that is used; test_vllm.py has the real one."""
    call("generate_refs.py", *vllm, f"--out={tmp_path / 'out'}")
    part = tmp_path / "out" / "part-00000.jsonl"
    whole = by_id(part.parent)
    part.write_bytes(b"\n".join(part.read_bytes().split(b"\n")[:3])[:-9])  # as a kill leaves it
    call("generate_refs.py", *vllm, f"--out={tmp_path / 'out'}")
    assert by_id(part.parent) == whole
    ranks = start_ranks(2, "generate_refs.py", *vllm, f"--out={tmp_path / 'two'}")
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert by_id(tmp_path / "two") == whole
    eos = loaded[0].eos_token_id
    for row in whole:
        assert len({tuple(c["token_ids"]) for c in row["ref_completions"]}) == 8 and row["tag"] == row["id"]
        for c in row["ref_completions"]:
            assert (c["finish_reason"] == "stop") == (c["token_ids"][-1] == eos)
            assert c["text"] == loaded[0].decode(c["token_ids"], skip_special_tokens=True)
