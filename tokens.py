"""Text to token ids and back: prompts, chat templates, answers, end tokens.

Sampling, the reference pass, training and evaluation use the same functions, so all of them see the same
tokens.

    python -c 'from model import *; import tokens; print(tokens.prompt_ids(load_tokenizer("MODEL"), "hello"))'
"""
import contextlib
import functools
import json
import os
import re

import numpy as np
import torch

import rows

MARK = "Xq7"  # a text that no chat template writes by itself


def row_prompt_ids(tokenizer, model, row):
    """Token ids of a row's prompt: those that its completions were sampled after, as a chat template that
    writes the date makes others tomorrow; or else those of its text, or of its chat by the template.
    Refuses a prompt that this model and tokenizer cannot read.
    """
    at, sampled = row["__at__"], sampled_prompt(row)
    if sampled:
        ids, args = sampled["token_ids"], getattr(tokenizer, "template_args", {})
        if args and args != sampled["template_args"]:
            rows.fail(f"{at}: was sampled with --template_args='{json.dumps(sampled['template_args'])}'; "
                      "give the same, or none")
        if prompt_text(tokenizer, ids) != sampled["text"]:
            rows.fail(f"{at}: its prompt's token_ids are not its text in this model's tokenizer; use the "
                      "model that sampled its completions, or sample again")
    else:
        check_prompt(row)
        try:
            ids = prompt_ids(tokenizer, row["prompt"], template_args(row))
        except Exception as error:  # whatever a template raises
            rows.fail(f"{at}: the prompt cannot be turned into tokens ({error}); fix the row")
        if not ids:
            rows.fail(f"{at}: the tokenizer makes no tokens of the prompt; fix the row, or delete it")
    check_vocabulary(f"{at}: the prompt", model, ids)
    return ids


def sampled_prompt(row):
    """What the completions of a row were sampled after, {"text", "token_ids", "template_args"}, or None."""
    sampled = row.get("ref_completions") or row.get("samples")
    return row.get("made_by", {}).get("prompt") if sampled else None


def check_prompt(row):
    """Refuse a prompt that is neither text nor chat messages, or not of the kind of the row's answers."""
    at, prompt = row["__at__"], row["prompt"]
    if not prompt or not (isinstance(prompt, str) or is_chat(prompt)):
        rows.fail(f"{at}: prompt must be a text or a list of {{role, content}} messages, whose contents are "
                  "texts or lists of {type: text, text} parts, and not empty")
    if not isinstance(prompt, str):
        return
    if re.match(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:", prompt):
        rows.fail(f"{at}: prompt is a text that holds chat messages; write prompt = json.loads(prompt)")
    for name in ("completion", "chosen", "rejected"):
        if isinstance(row.get(name), list):
            rows.fail(f"{at}: prompt is a text and {name} are chat messages; write both in one way. Where "
                      f"{name} begins with the prompt: prompt = {name}[:-1], {name} = {name}[-1:]")


def check_vocabulary(what, model, ids):
    """Refuse token ids that the model has no embedding of."""
    size = model.config.get_text_config().vocab_size
    if max(ids) >= size:
        rows.fail(f"{what} has the token {max(ids)}, and the model's vocabulary only {size}; resize the "
                  "model to its tokenizer, or give the tokenizer that fits it")


def check_same_ids(tokenizer, other):
    """Refuse a reference model whose tokenizer (other) gives tokens other ids: it would read another text."""
    ids = other.get_vocab()
    if any(ids.get(token, i) != i for token, i in tokenizer.get_vocab().items()):
        rows.fail(f"{other.name_or_path}: its tokenizer gives tokens other ids than that of "
                  f"{tokenizer.name_or_path}; give the model that training started from")


def template_args(row):
    """What a row gives its chat template besides the messages: columns of TRL's formats, and what it was
    sampled with.
    """
    tools = row.get("tools")
    if isinstance(tools, str):  # as some datasets store them
        tools = json.loads(tools)
    args = (sampled_prompt(row) or {}).get("template_args", {})
    return args | ({"tools": tools} if tools else {}) | (row.get("chat_template_kwargs") or {})


def is_chat(value):
    """Whether a value is a list of chat messages, whose contents are texts, lists of parts that are texts, or
    nothing beside tool calls.
    """
    def is_part(part):
        return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)

    def is_message(message):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return False
        content = message.get("content")
        if content is None:
            return bool(message.get("tool_calls"))
        return isinstance(content, str) or (isinstance(content, list) and all(map(is_part, content)))
    return isinstance(value, list) and all(map(is_message, value))


def content_text(content):
    """The text of a message's content: a text, a list of parts, or None beside tool calls."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


@functools.cache
def content_forms(tokenizer, template):
    """The forms of content that a chat template writes: str, list (of parts), or both."""
    forms = set()
    for content in (MARK, [{"type": "text", "text": MARK}]):
        with contextlib.suppress(Exception):  # whatever a template raises
            text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            if MARK in text and not re.search(f"text['\"]: ?['\"]{MARK}", text):  # not the list as it is
                forms.add(type(content))
    return forms or {str}


def render(tokenizer, messages, args=None, **position):
    """The text of chat messages by the tokenizer's chat template, which gets them as they are, but: no
    keys that are null, as Arrow fills them in; and contents in a form that it takes.

    args: what else it gets. position: add_generation_prompt or continue_final_message.
    """
    if not tokenizer.chat_template:
        rows.fail(f"{tokenizer.name_or_path}: the prompts are chat messages but this tokenizer has no chat "
                  "template; use prompts of text")
    forms, chat = content_forms(tokenizer, str(tokenizer.chat_template)), []
    for message in messages:
        content = message.get("content")
        message = {key: value for key, value in message.items() if value is not None or key == "content"}
        if isinstance(content, list):
            parts = [{"type": "text", "text": part["text"]} for part in content]
            message["content"] = parts if list in forms else content_text(content)
        elif isinstance(content, str) and str not in forms:
            message["content"] = [{"type": "text", "text": content}]
        chat.append(message)
    args = getattr(tokenizer, "template_args", {}) | (args or {})
    text = tokenizer.apply_chat_template(chat, tokenize=False, **args, **position)
    has_null = None in [message.get("content", "") for message in chat]
    if has_null and "None" in text and "None" not in json.dumps(chat):
        raise ValueError("the chat template writes None for a content of null; make it an empty text")
    return text


def chat_prompt(tokenizer, prompt, args=None):
    """The text of a chat that a completion follows. A last message of the assistant is continued."""
    continued = prompt[-1]["role"] == "assistant"
    return render(tokenizer, prompt, args, add_generation_prompt=not continued,
                  continue_final_message=continued)


def answered(prompt, answer):
    """A chat with the message that answers it, which continues a last message of the assistant."""
    *before, last = prompt
    if last["role"] != "assistant":
        return [*prompt, answer]
    content = content_text(last.get("content")) + content_text(answer.get("content"))
    return [*before, last | answer | {"content": content}]


REMEDY = "change --template_args, or give prompt and answer as texts, as the model should read them"


def chat_answer(tokenizer, prompt, completion, args=None):
    """The text of a chat prompt, and the template's own of the prompt and its answer. ValueError where this
    does not continue that, or lacks what the answer says.
    """
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not is_chat(completion) or [message["role"] for message in completion] != ["assistant"]:
        raise ValueError("it must be a text, or a list of one message of the assistant; of a whole "
                         "conversation, keep the last")
    before = chat_prompt(tokenizer, prompt, args)
    chat = answered(prompt, completion[0])
    whole = render(tokenizer, chat, args, add_generation_prompt=False)
    if not whole.startswith(before):
        same = len(os.path.commonprefix([before, whole]))
        raise ValueError(f"the chat template writes {whole[same:same + 30]!r} with the answer, where the "
                         f"prompt goes on with {before[same:same + 30]!r}: {REMEDY}")
    for name, text in said(chat[-1]):
        if "".join(text.split()) not in "".join(whole.split()):
            raise ValueError(f"the chat template leaves out a part of its {name}: {REMEDY}")
    return before, whole


def said(message):
    """(name, text) of what an answer holds and a chat template must write."""
    for name in ("content", "reasoning_content", "reasoning", "thinking"):
        yield name, content_text(message.get(name))
    for call in message.get("tool_calls") or []:
        yield "tool_calls", call.get("function", call)["name"]


@functools.cache
def turn_end(tokenizer, template):
    """The token ids that a chat template writes after an answer."""
    chat = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
    try:
        text = render(tokenizer, chat)
        return chat_ids(tokenizer, text[text.rindex(MARK) + len(MARK):])
    except Exception:  # whatever a template raises, or it does not write the answer
        return []


def text_ids(tokenizer, text):
    """Ids of a text that is not a chat: after those that the tokenizer puts before every text, such as a BOS,
    never twice; and without what it puts after every text, such as an EOS.
    """
    ids = chat_ids(tokenizer, text)
    whole = tokenizer(text).input_ids
    places = range(len(whole) + 1)
    before = next(whole[:n] for n in places if whole[n:n + len(ids)] == ids)
    return ids if ids[:len(before)] == before else before + ids


def chat_ids(tokenizer, text):
    """Ids of a text that a chat template wrote, with a BOS if it wants one."""
    text.encode()  # half a surrogate pair is an error, which the tokenizer does not explain
    return tokenizer(text, add_special_tokens=False).input_ids


def prompt_ids(tokenizer, prompt, args=None):
    """Token ids that the completion follows. args: what the chat template gets besides the messages."""
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    return chat_ids(tokenizer, chat_prompt(tokenizer, prompt, args))


def completion_ids(tokenizer, prompt, completion, ends, args=None):
    """Token ids of a dataset's own completion, which is a whole answer, so it ends in an end token (one
    of `ends`). Of a chat, what the template writes after the prompt. Sampled completions never come here:
    they keep the ids that were sampled.
    """
    if isinstance(prompt, str):
        before, whole, ids_of, after = prompt, prompt + completion, text_ids, []
    else:
        before, whole = chat_answer(tokenizer, prompt, completion, args)
        ids_of, after = chat_ids, turn_end(tokenizer, str(tokenizer.chat_template))
        while after and after[0] not in ends:
            after = after[1:]  # from the token on that ends a turn
    start, ids = ids_of(tokenizer, before), ids_of(tokenizer, whole)
    if ids[:len(start)] == start:
        ids = ids[len(start):]
    else:  # a token would straddle the border; the model never samples one that does
        ids = ids_within(tokenizer, whole[len(before):])
    if after and ids[-len(after):] == after:
        ids = ids[:len(ids) - len(after) + 1]
    if ids and ids[-1] in ends:
        return ids
    if after:
        raise ValueError(f"the chat template ends it with {whole[-20:]!r}, and not as other answers")
    return ids + [ends[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id]


def ids_within(tokenizer, text):
    """Ids of a text in the midst of another: a SentencePiece tokenizer marks only the start of a whole
    text as a word's.
    """
    anchor = tokenizer("\n", add_special_tokens=False).input_ids
    ids = tokenizer("\n" + text, add_special_tokens=False).input_ids
    if ids[:len(anchor)] == anchor:
        return ids[len(anchor):]
    return tokenizer(text, add_special_tokens=False).input_ids


def end_ids(model, tokenizer):
    """Token ids that end a completion: the generation config's (one or a list), the tokenizer's eos, and
    what the chat template writes after an answer.
    """
    ids = (model.generation_config or model.config).eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    ends = {*ids, tokenizer.eos_token_id} - {None}
    after = turn_end(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else []
    added = [i for i in after if i in tokenizer.added_tokens_decoder and tokenizer.decode([i]).strip()]
    if added and ends.isdisjoint(added):
        rows.say_once(f"{tokenizer.name_or_path}: WARNING: its chat template ends an answer with "
                      f"{tokenizer.decode(added[:1])}, which generation_config.json does not name as "
                      "eos_token_id; here it ends completions")
        ends.add(added[0])
    if not ends:
        rows.fail(f"{tokenizer.name_or_path}: neither generation_config nor tokenizer names an end token; "
                  "set eos_token_id")
    return sorted(ends)


def prompt_text(tokenizer, ids):
    """The text of a prompt's token ids, with its special tokens."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def decode(tokenizer, prompt, ids, ends=(), keep_special=False):
    """The text of token ids sampled after those of a prompt, without the end token and, unless they are to
    be kept, other special tokens. Decoded together and cut, as a SentencePiece tokenizer drops the space
    that a text begins with.
    """
    flags = {"skip_special_tokens": not keep_special, "clean_up_tokenization_spaces": False}
    if len(ids) and ids[-1] in ends:
        ids = ids[:-1]
    # as arrays: of a list, transformers looks at every id first, in Python
    prompt = np.array(prompt, np.int64)
    ids = np.array(ids, np.int64)
    before = tokenizer.decode(prompt, **flags)
    whole = tokenizer.decode(np.append(prompt, ids), **flags)
    return whole[len(before):] if whole.startswith(before) else tokenizer.decode(ids, **flags)


def pad(sequences, device):
    """Lists (or arrays) of token ids -> (batch, time), right-padded with 0."""
    tensors = [torch.as_tensor(np.asarray(s, np.int64)) for s in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)
