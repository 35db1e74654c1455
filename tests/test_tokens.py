"""model.py: text to token ids. What is sampled from and trained is what plain transformers makes of the same
messages by the chat template, or the row is refused.
"""
import copy
import json
import shutil

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

import dataset
import model as model_py
import tokens
from conftest import call, ends_well, make_tokenizer, one_line_of_error, read_rows, refused, write_rows

ADDED = "<think>", "</think>", "<channel>", "<message>", "</answer>", "<return>"
USER = [{"role": "user", "content": "hi"}]


def assistant(content, **keys):
    return [{"role": "assistant", "content": content, **keys}]


def chat_tokenizer(answer, opening="''", end="<end>\n", special=()):
    """Bytes and ADDED tokens. Its template writes `answer` for an assistant's message, and `opening` at the
    end of a generation prompt. special: those of ADDED that are special tokens.
    """
    tokenizer = make_tokenizer(bos_token="<bos>", eos_token="<end>", pad_token="<end>")
    tokenizer.add_tokens([AddedToken(text, special=text in special, normalized=False) for text in ADDED])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{{ " + answer + " }}"
        "{% else %}{{ m.content }}{% endif %}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{{ " + opening + " }}{% endif %}")
    return tokenizer


# as many families do: thoughts in front of the answer, from a key of their own or out of the content
THINK = ("'<think>\n' ~ (m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip() "
         "if '</think>' in m.content else '')) ~ '\n</think>\n\n' ~ m.content.split('</think>')[-1].strip()")
PARTS = "m.content | map(attribute='text') | join"
TEMPLATES = {
    "plain": chat_tokenizer("m.content"),
    "trims": chat_tokenizer("m.content | trim"),
    "opens thoughts": chat_tokenizer(THINK, "'<think>\n'"),
    "closes thoughts": chat_tokenizer(THINK, "'<think>\n\n</think>\n\n' if enable_thinking is false else ''"),
    "drops thoughts": chat_tokenizer("m.content.split('</think>')[-1]", "'<think>\n'"),
    "drops thoughts in silence": chat_tokenizer("m.content.split('</think>')[-1]"),
    "channels": chat_tokenizer("'<channel>final<message>' ~ m.content ~ '<return>'", end=""),
    "two ends": chat_tokenizer("m.content ~ '</answer>'"),
    "no end": chat_tokenizer("'\n' ~ m.content", end=""),
    "a header after it": chat_tokenizer("m.content", end="<end>[assistant]"),
    "parts": chat_tokenizer(PARTS),
}
for_users = TEMPLATES["parts"].chat_template.replace("{{ m.content }}", "{{ " + PARTS + " }}")
TEMPLATES["parts"].chat_template = for_users
THOUGHTS = "<think>\nadd\n</think>\n\n4"
TRAINED = {  # (template, the answer, template_args): the text that is trained, or None where it is refused
    ("plain", "yes ", ""): "yes <end>",
    ("plain", "", ""): "<end>",
    ("plain", "a <end> b", ""): "a <end> b<end>",  # an end token in an answer does not cut it
    ("plain", THOUGHTS, ""): THOUGHTS + "<end>",
    ("trims", " yes ", ""): "yes<end>",
    ("opens thoughts", THOUGHTS, ""): "add\n</think>\n\n4<end>",
    ("opens thoughts", "4", ""): "\n</think>\n\n4<end>",
    ("closes thoughts", THOUGHTS, ""): THOUGHTS + "<end>",
    ("closes thoughts", "4", ""): "<think>\n\n</think>\n\n4<end>",
    ("closes thoughts", "4", "quiet"): "4<end>",
    ("closes thoughts", THOUGHTS, "quiet"): None,
    ("drops thoughts", "4", ""): None,
    ("drops thoughts", THOUGHTS, ""): None,
    ("drops thoughts in silence", "4", ""): "4<end>",
    ("drops thoughts in silence", THOUGHTS, ""): None,
    ("channels", "4", ""): "<channel>final<message>4<return>",
    ("two ends", "4", ""): "4</answer><end>",
    ("no end", "4", ""): "\n4<end>",  # the tokenizer's own is added
    ("a header after it", "4", ""): "4<end>",
    ("parts", "4", ""): "4<end>"}


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_what_is_trained_is_the_templates_own_text_after_the_prompt(case):
    """The same for a text, a message and a list of parts; the tokens are those of plain transformers."""
    (name, answer, quiet), expected = case, TRAINED[case]
    tokenizer, args = TEMPLATES[name], {"enable_thinking": False} if quiet else {}
    ends = [tokenizer.convert_tokens_to_ids("<return>" if name == "channels" else "<end>")]
    for form in (answer, assistant(answer), assistant([{"type": "text", "text": answer}])):
        if expected is None:
            with pytest.raises(ValueError, match="the chat template .* give prompt and answer as texts"):
                tokens.completion_ids(tokenizer, USER, form, ends, args)
            continue
        prompt = tokens.prompt_ids(tokenizer, USER, args)
        ids = tokens.completion_ids(tokenizer, USER, form, ends, args)
        assert tokenizer.decode(ids) == expected
        if name != "parts":
            plain = tokenizer.apply_chat_template(USER + assistant(answer), tokenize=False, **args)
            plain = tokenizer(plain, add_special_tokens=False).input_ids
            if name == "no end":
                plain += ends
            assert plain[:len(prompt + ids)] == prompt + ids


@pytest.mark.parametrize("name", ("plain", "opens thoughts", "closes thoughts"))
@pytest.mark.parametrize("key", ("reasoning_content", "thinking"))
def test_thoughts_in_a_key_of_their_own_are_written_or_refused(name, key):
    tokenizer, answer = TEMPLATES[name], assistant("4", **{key: "add up"})
    if name == "plain":
        with pytest.raises(ValueError, match=f"leaves out a part of its {key}"):
            tokens.completion_ids(tokenizer, USER, answer, [tokenizer.eos_token_id])
        return
    ids = tokens.completion_ids(tokenizer, USER, answer, [tokenizer.eos_token_id])
    opened = "" if name == "opens thoughts" else "<think>\n"
    assert tokenizer.decode(ids) == opened + "add up\n</think>\n\n4<end>"


@pytest.mark.parametrize("answer", (
    USER, assistant("a") + assistant("b"), assistant("a") + USER + assistant("b"), USER + assistant("a"), [],
    ["a"], [{"role": "assistant"}], assistant(None), assistant([{"type": "image"}]), assistant(["a"]),
    assistant(5)))
def test_an_answer_is_one_message_of_the_assistant(answer):
    with pytest.raises(ValueError, match="a list of one message of the assistant"):
        tokens.completion_ids(TEMPLATES["plain"], USER, answer, [257])


def test_a_system_prompt_that_only_the_last_user_turn_has_is_no_continuation():
    tokenizer = copy.deepcopy(TEMPLATES["plain"])  # as Mistral's
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "[{{ messages[0].content if loop.last }} {{ m.content }}]"
        "{% elif m.role == 'assistant' %}{{ m.content }}<end>{% endif %}{% endfor %}")
    chat = [{"role": "system", "content": "Be brief."}, *USER]
    with pytest.raises(ValueError, match="where the prompt goes on with 'Be brief"):
        tokens.completion_ids(tokenizer, chat, "yes", [257])


def test_a_last_message_of_the_assistant_is_continued():
    tokenizer, chat = TEMPLATES["trims"], USER + assistant("The answer is ")
    prompt = tokens.prompt_ids(tokenizer, chat)
    plain = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert tokenizer.decode(prompt) == plain == "[user]hi<end>\n[assistant]The answer is"
    for answer in (" 4", assistant(" 4"), assistant([{"type": "text", "text": " 4"}])):
        assert tokenizer.decode(tokens.completion_ids(tokenizer, chat, answer, [257])) == "  4<end>"


def write_model(tiny, folder, tokenizer, **config):
    """The tiny model with another tokenizer."""
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


# ---- rows ----

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
COLUMNS = {  # name: columns, and what plain transformers gets for them
    "tools": ({"tools": TOOLS}, {"tools": TOOLS}),
    "tools as text": ({"tools": json.dumps(TOOLS)}, {"tools": TOOLS}),
    "no tools": ({"tools": None}, {}),
    "arguments": ({"chat_template_kwargs": {"mood": "sad"}}, {"mood": "sad"}),
    "both": ({"tools": TOOLS, "chat_template_kwargs": {"mood": "sad"}}, {"tools": TOOLS, "mood": "sad"})}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_a_row_reach_its_chat_template(loaded, name):
    tokenizer = copy.deepcopy(TEMPLATES["plain"])
    tokenizer.chat_template = "{{ mood }}{{ tools | tojson if tools }}" + tokenizer.chat_template
    columns, args = COLUMNS[name]
    row = {"__at__": "x:1", "prompt": USER} | columns
    plain = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True, **args)
    assert tokenizer.decode(tokens.row_prompt_ids(tokenizer, Vocabulary(300), row)) == plain


class Vocabulary:
    """As much of a model as row_prompt_ids looks at."""

    def __init__(self, size):
        self.config = transformers.LlamaConfig(vocab_size=size)


MESSAGES = {  # messages as datasets store them, and as plain transformers should get them
    "null keys": (USER[0] | {"tool_calls": None, "name": None}, USER[0]),
    "parts": (USER[0] | {"content": [{"type": "text", "text": "h", "image": None},
                                     {"type": "text", "text": "i"}]}, USER[0]),
    "a call beside null": ({"role": "assistant", "content": None, "tool_calls": CALL},
                           {"role": "assistant", "content": None, "tool_calls": CALL}),
    "a call alone": ({"role": "assistant", "tool_calls": CALL}, {"role": "assistant", "tool_calls": CALL})}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_as_datasets_store_them_are_those_of_plain_transformers(name):
    """Keys that Arrow fills with null, text parts, and calls of tools without content."""
    tokenizer, (stored, plain) = copy.deepcopy(TEMPLATES["plain"]), MESSAGES[name]
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{{ m.name if m.name is defined }}"
        "{{ m.tool_calls | tojson if m.tool_calls is defined }}<end>\n{% endfor %}")
    row = {"__at__": "x:1", "prompt": [*USER, stored, *USER]}
    expected = tokenizer.apply_chat_template([*USER, plain, *USER], tokenize=False)
    assert tokenizer.decode(tokens.row_prompt_ids(tokenizer, Vocabulary(300), row)) == expected
    if "call" in name:
        ids = tokens.completion_ids(tokenizer, USER, [stored], [tokenizer.eos_token_id])
        assert '"name": "add"' in tokenizer.decode(ids)
        with pytest.raises(ValueError, match="leaves out a part of its tool_calls|concatenate|None"):
            tokens.completion_ids(TEMPLATES["plain"], USER, [stored], [tokenizer.eos_token_id])


def test_a_template_of_parts_gets_parts():
    tokenizer = TEMPLATES["parts"]
    prompt = tokens.prompt_ids(tokenizer, USER)
    chat = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True) == "[user]hi<end>\n[assistant]"


@pytest.mark.parametrize("change, says", (
    ({"prompt": "hi", "chosen": USER + assistant("a")}, ("prompt is a text and chosen are", "chosen[-1:]")),
    ({"prompt": "hi", "completion": assistant("a")}, ("prompt is a text and completion are",)),
    ({"prompt": json.dumps(USER)}, ("a text that holds chat messages", "json.loads(prompt)")),
    ({"prompt": str(USER)}, ("a text that holds chat messages",)),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, ("lists of {type: text",)),
    ({"prompt": [{"from": "human", "value": "hi"}]}, ("{role, content} messages",)),
    ({"prompt": "hi \ud83d"}, ("cannot be turned into tokens", "surrogates")),
    ({"prompt": USER, "tools": ["hammer"]}, ("cannot be turned into tokens", "JSON schema")),
    ({"prompt": USER, "tools": "hammer"}, ("cannot be turned into tokens",)),
    ({"prompt": USER, "chat_template_kwargs": {"add_generation_prompt": False}}, ("add_generation_prompt",)),
    ({"prompt": assistant(None, tool_calls=CALL)}, ("cannot be turned into tokens",)),
    ({"prompt": "<return>"}, ("has the token 263", "vocabulary only 258", "resize"))))
def test_prompts_that_no_model_can_read_are_refused(capsys, change, says):
    one_line_of_error(capsys, ["x:1: ", *says], lambda: tokens.row_prompt_ids(
        TEMPLATES["plain"], Vocabulary(258), {"__at__": "x:1"} | change))


def test_answers_beyond_the_vocabulary_and_prompts_without_tokens(tiny, loaded, tmp_path, capsys):
    model = write_model(tiny, tmp_path / "model", TEMPLATES["plain"])
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "hi", "completion": "a<return>"}])
    refused(capsys, ["d.jsonl:1: completion has the token 263"], "train.py", f"--model={model}",
            f"--data={data}", f"--out={tmp_path / 'run'}", "--train_on=completion", "--loss=sft")
    tokenizer = copy.deepcopy(loaded[0])
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Strip()
    one_line_of_error(capsys, ["x:1: the tokenizer makes no tokens of the prompt"], lambda: (
        tokens.row_prompt_ids(tokenizer, loaded[1], {"__at__": "x:1", "prompt": " \n"})))


def test_what_a_tokenizer_puts_before_a_text_is_not_put_twice():
    """As ChatGLM's [gMASK]<sop>, in a prompt that its chat template has rendered; and no EOS after it."""
    tokenizer = make_tokenizer(bos_token="<a>", eos_token="<z>")
    tokenizer.add_tokens([AddedToken("<b>", special=True)])
    ids = tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<z>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<a> <b> $A <z>", special_tokens=list(zip(("<a>", "<b>", "<z>"), ids)))
    for text in ("hi", "<a><b>hi"):
        assert tokenizer.decode(tokens.prompt_ids(tokenizer, text)) == "<a><b>hi"
    assert tokenizer.decode(tokens.completion_ids(tokenizer, "hi", " <z>, you", ids[2:])) == " <z>, you<z>"


@pytest.mark.parametrize("kind, added", (("GPT2Tokenizer", {}), ("Qwen2Tokenizer", {"normalizer": "NFC"})))
def test_a_tokenizer_splits_as_its_own_tokenizer_json_says(tmp_path, capsys, kind, added):
    """Where a class of transformers splits otherwise: digits, here."""
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    content = json.loads(backend.to_str())
    content["model"]["merges"] = [["1", "2"]]
    content["model"]["vocab"]["12"] = len(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": kind}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a 12 b").ids
    assert model_py.load_tokenizer(tmp_path)("a 12 b").input_ids == own
    assert "not as its tokenizer.json says" in capsys.readouterr().out


# ---- end tokens ----

def test_the_token_that_the_template_writes_after_an_answer_ends_it(tiny, tmp_path, capsys):
    """Of a model whose end tokens it is not among, as Qwen's base models: said, sampled and trained so."""
    tokenizer = chat_tokenizer("m.content", end="<return>\n")
    model = model_py.load_model(write_model(tiny, tmp_path, tokenizer), "auto", "cpu")
    ends = tokens.end_ids(model, tokenizer)
    assert ends == [model.generation_config.eos_token_id, tokenizer.convert_tokens_to_ids("<return>")]
    assert "ends an answer with <return>, which" in capsys.readouterr().out
    assert tokenizer.decode(tokens.completion_ids(tokenizer, USER, "yes", ends)) == "yes<return>"
    for template in ("two ends", "no end", "plain"):
        assert tokens.end_ids(model, TEMPLATES[template]) == ends[:1]
    assert capsys.readouterr().out == ""


# ---- rows carry the prompt that they were sampled after ----

def test_rows_carry_their_prompt_into_later_stages_when_the_template_writes_another(tiny, tmp_path, capsys):
    """As one that writes the date does on the next day. Also what a row says of template_args."""
    today = chat_tokenizer("m.content")
    today.chat_template = "{{ mood }} on Monday" + today.chat_template
    model = write_model(tiny, tmp_path / "model", today)
    data = write_rows(tmp_path / "d.jsonl", [{"id": 0, "prompt": USER, "completion": "x"}])
    sampling = "--num_refs=2", "--max_new_tokens=4"
    call("generate_refs.py", f"--model={model}", f"--data={data}", f"--out={tmp_path / 'refs'}", *sampling,
         '--template_args={"mood": "glad"}')
    row, = read_rows(tmp_path / "refs")
    text = "glad on Monday[user]hi<end>\n[assistant]"
    ids = today(text, add_special_tokens=False).input_ids
    assert row["made_by"]["prompt"] == {"text": text, "token_ids": ids, "template_args": {"mood": "glad"}}

    tomorrow = copy.deepcopy(today)
    tomorrow.chat_template = today.chat_template.replace("Monday", "Tuesday, long after")
    tomorrow.save_pretrained(model)
    call("generate_refs.py", f"--model={model}", f"--data={tmp_path / 'refs'}",
         f"--out={tmp_path / 'samples'}", *sampling, "--field=samples")
    row, = read_rows(tmp_path / "samples")
    assert row["made_by"]["prompt"]["text"] == text
    rewarded = write_rows(tmp_path / "rewarded.jsonl", [
        row | {"ref_rewards": [0, 1], "sample_rewards": [0, 1], "reward": 0}])
    loaded = model_py.load_tokenizer(model), model_py.load_model(model, "auto", "cpu")
    for regime in ("refs", "samples", "completion"):
        choices = dataset.Choices(train_on=regime)
        data = dataset.load(rewarded, tmp_path / regime, str(model), *loaded, choices)
        assert loaded[0].decode(data.tokens[:data.prompt_lens[0]]) == text
    assert loaded[0].decode(data.tokens) == text + "x<end>"
    flags = f"--model={model}", f"--data={rewarded}", f"--out={tmp_path / 'run'}"
    refused(capsys, ["rewarded.jsonl:1", '{"mood": "glad"}', "give the same, or none"], "train.py", *flags,
            '--template_args={"mood": "sad"}')
    row["made_by"]["prompt"]["text"] = "what other token ids mean"
    write_rows(rewarded, [row | {"ref_rewards": [0, 1]}])
    refused(capsys, ["not its text in this model's tokenizer"], "train.py", *flags)
    del row["samples"], row["ref_completions"]  # without completions, a row is sampled from anew
    again = write_rows(tmp_path / "again.jsonl", [row])
    call("generate_refs.py", f"--model={model}", f"--data={again}", f"--out={tmp_path / 'again'}", *sampling)
    assert read_rows(tmp_path / "again")[0]["made_by"]["prompt"]["text"].startswith(" on Tuesday")


# ---- sampling ----

def test_prompts_beyond_max_length_are_dropped_and_counted(tiny, tmp_path, capsys):
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "q" * n} for n in (3, 64, 9, 10, 90)])
    flags = f"--model={tiny}", f"--data={data}", "--num_refs=2", "--max_new_tokens=20"
    refused(capsys, ["d.jsonl:2", "context holds 64", "--max_length=64"], "generate_refs.py", *flags,
            f"--out={tmp_path / 'refused'}")
    assert not (tmp_path / "refused").exists()
    for _ in range(2):  # also when it is run again
        call("generate_refs.py", *flags, f"--out={tmp_path / 'out'}", "--max_length=10")
        assert "3 rows dropped, whose prompts have 10 tokens or more" in capsys.readouterr().out
        table = read_rows(tmp_path / "out")
        assert sorted(row["id"] for row in table) == [0, 2]
        for row in table:
            for completion in row["ref_completions"]:
                assert len(row["made_by"]["prompt"]["token_ids"]) + len(completion["token_ids"]) <= 10
    refused(capsys, ["--max_length"], "generate_refs.py", *flags, "--out=no", "--max_length=-1")


@pytest.mark.parametrize("special", ((), ("<think>", "</think>")))
def test_texts_keep_special_tokens_on_request_and_never_the_end_token(special):
    tokenizer = chat_tokenizer("m.content", special=special)
    end = tokenizer.convert_tokens_to_ids("<end>")
    prompt, ids = tokens.prompt_ids(tokenizer, USER), tokenizer("<think>a</think> 4").input_ids + [end]
    kept = tokens.decode(tokenizer, prompt, ids, [end], keep_special=True)
    assert kept == "<think>a</think> 4"
    assert tokens.decode(tokenizer, prompt, ids, [end]) == ("a 4" if special else kept)


def test_the_flag_keeps_special_tokens_and_without_it_their_loss_is_said(tiny, tmp_path, capsys):
    """The model's samples often hold <bos>."""
    data = write_rows(tmp_path / "d.jsonl", [{"id": 0, "prompt": "q"}])
    for flags in ((), ("--keep_special_tokens",)):
        out = tmp_path / f"out{len(flags)}"
        call("generate_refs.py", f"--model={tiny}", f"--data={data}", f"--out={out}", "--num_refs=64", *flags,
             "--max_new_tokens=20")
        row, = read_rows(out)
        held = [c for c in row["ref_completions"] if 256 in c["token_ids"]]
        shown = [c for c in held if "<bos>" in c["text"]]
        assert len(held) >= 3 and shown == (held if flags else [])
        said = f"{len(held)} hold special tokens" in capsys.readouterr().out
        assert said == (not flags)
        rewarded = write_rows(tmp_path / "rewarded.jsonl", [row | {"ref_rewards": [*range(64)]}])
        ends_well("train.py", f"--model={tiny}", f"--data={rewarded}", "--out=run", "--dry_run")


@pytest.mark.parametrize("text, accepted", (
    (" ab", True), ("ab", True), ("ab\n", True), (" ab<eos>", True), ("b", False), ("", False)))
def test_texts_of_other_samplers_must_be_those_of_their_token_ids(loaded, tmp_path, capsys, text, accepted):
    """Rows made elsewhere, with the token ids: their text may lack the space that it begins with."""
    tokenizer, model = loaded
    ids = tokenizer(" ab").input_ids + [tokenizer.eos_token_id]
    data = write_rows(tmp_path / "d.jsonl", [{
        "prompt": "p", "ref_completions": [{"text": text, "token_ids": ids}], "ref_rewards": [1]}])

    def build():
        return dataset.load(data, tmp_path / "cache", model.name_or_path, tokenizer, model, dataset.Choices())
    if accepted:
        assert build().tokens[-4:].tolist() == ids
    else:
        one_line_of_error(capsys, ["d.jsonl:1", "not their text in this model's tokenizer"], build)
