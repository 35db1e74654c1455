"""Models: loading a causal LM and its tokenizer, turning prompts and completions into token ids, and log-probabilities.

The same functions serve sampling, the reference pass, training and evaluation, so that all of them see the same tokens.

    python -c 'import models; print(models.prompt_ids(models.load_tokenizer("data/minicode/model"), "hello"))'
"""
import ctypes
import hashlib
import os
import platform

import numpy as np
import torch
import transformers

import qrpo
import rows

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def device():
    """This process's own GPU under torchrun, the first GPU, or the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    if platform.libc_ver()[0] == "glibc":  # keep what is freed: every step wants the same large tensors, page by page
        libc, M_MMAP_MAX, M_TRIM_THRESHOLD = ctypes.CDLL(None), -4, -1
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
    return torch.device("cpu")


def pick_dtype(name, device):
    """--dtype: auto is bfloat16 on a GPU and float32 on a CPU."""
    return getattr(torch, name) if name != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32


def _load(kind, path, **kwargs):
    try:
        return kind.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        rows.fail(f"{path}: no {kind.__name__.replace('AutoModelFor', '').replace('Auto', '')} can be loaded from it "
                  f"({reason}); give a Hugging Face folder, or a hub name that this machine can reach")


def load_tokenizer(path, trust_remote_code=False):
    return _load(transformers.AutoTokenizer, path, trust_remote_code=trust_remote_code)


def load_model(path, dtype, device, trust_remote_code=False):
    """The causal LM of a Hugging Face folder, in evaluation mode: it has no dropout here, in training either."""
    config = _load(transformers.AutoConfig, path, trust_remote_code=trust_remote_code)
    model = _load(transformers.AutoModelForCausalLM, path, dtype=dtype, trust_remote_code=trust_remote_code)
    model.stored_dtype = config.dtype or torch.float32  # what its checkpoint is in, and its trained ones will be
    return model.to(device).eval()


MODEL_FILES = ("model", "pytorch_model", "config", "generation_config", "tokenizer", "special_tokens", "added_tokens",
               "vocab", "merges", "chat_template")  # how the names of a model's files begin


def identity(path):
    """What tells one model and tokenizer from another, copied or not: names, sizes, and the first and last MiB of its
    files (training changes all of the weights). A hub name is its own.
    """
    if not os.path.isdir(path):
        return path
    found = []
    for entry in os.scandir(path):
        if entry.is_file() and entry.name.startswith(MODEL_FILES):
            with open(entry.path, "rb") as file:
                digest, size = hashlib.sha256(file.read(1 << 20)), entry.stat().st_size
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read())
            found.append((entry.name, size, digest.hexdigest()))
    return sorted(found)


def load_reward_model(path, dtype, device, trust_remote_code=False):
    kind = transformers.AutoModelForSequenceClassification
    model = _load(kind, path, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.to(device).eval()


def context_length(model):
    """Tokens that the model can attend to, prompt and completion together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def end_ids(model, tokenizer):
    """Token ids that end a completion: the generation config's (one or a list) and the tokenizer's eos."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None}) or rows.fail(
        f"{tokenizer.name_or_path}: neither generation_config nor tokenizer name an end token; set eos_token_id")


def row_prompt_ids(tokenizer, row):
    """Token ids of a row's prompt (`prompt_ids`); refuses what is neither text nor chat messages."""
    prompt = row["prompt"]
    if not (prompt and (isinstance(prompt, str) or _is_chat(prompt))):
        rows.fail(f"{row['__at__']}: prompt must be a string or a list of {{role, content}} messages, and not empty")
    try:
        return prompt_ids(tokenizer, prompt)
    except Exception as error:  # whatever a template raises
        rows.fail(f"{row['__at__']}: the prompt cannot be turned into tokens ({error}); mend the row")


def _is_chat(value):
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)


def _render(tokenizer, messages, **kwargs):
    if not tokenizer.chat_template:
        rows.fail("the prompts are chat messages but the model's tokenizer has no chat template; use string prompts")
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def _text_ids(tokenizer, text):
    """Ids of a text that is no chat: with the BOS that the tokenizer gives, never two, and no EOS at its end."""
    ids = tokenizer(text).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the text brought its own
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == eos and not text.endswith(tokenizer.eos_token):  # some tokenizers close every text
        ids = ids[:-1]
    return ids


def prompt_ids(tokenizer, prompt):
    """Token ids that the completion follows. A chat template writes its own BOS, if it wants one."""
    if isinstance(prompt, str):
        return _text_ids(tokenizer, prompt)
    return tokenizer(_render(tokenizer, prompt, add_generation_prompt=True), add_special_tokens=False).input_ids


def completion_ids(tokenizer, prompt, start, completion, ends):
    """Token ids of a dataset's own completion; start is its prompt's (`prompt_ids`). It is a whole answer, so it ends
    in an end token (one of `ends`).

    Sampled completions never come here: they keep the ids that were sampled.
    """
    if isinstance(prompt, str):
        before, whole, ids = prompt, prompt + completion, _text_ids(tokenizer, prompt + completion)
    else:
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        before, whole = _render(tokenizer, prompt, add_generation_prompt=True), _render(tokenizer, prompt + answer)
        if not whole.startswith(before):
            raise ValueError("the chat template does not render the answer right after the generation prompt")
        ids = tokenizer(whole, add_special_tokens=False).input_ids
    if ids[:len(start)] == start:
        ids = ids[len(start):]
    else:  # a token would straddle the border; the model never samples one that does
        ids = tokenizer(whole[len(before):], add_special_tokens=False).input_ids
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    if end is not None:  # what a template writes after the turn's end is not the model's to say
        return ids[:end + 1]
    return ids + [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends[0]]


def output_layer(model):
    """A function from last hidden states (n, dim) to logits (n, vocab), with the scaling and capping of its family."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden):
        out = head(hidden) * scale if scale != 1 else head(hidden)
        return torch.tanh(out / cap) * cap if cap else out
    return logits


class Policy(torch.nn.Module):
    """The model with log pi(completion | prompt), float32 (batch,), as its forward: what DDP wraps.

    tokens: (batch, time), right-padded with anything; no attention mask, as the padding comes after everything that a
    causal model can look at. prompt_lens, lens: (batch,). parts: in so many groups of similar length do they go through
    the model; with 2, pairs waste less on padding (a quarter of all positions where the lengths within them differ).
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, prompt_lens, lens, parts=1):
        order, states = lens.argsort(descending=True, stable=True), []
        for part in order.chunk(parts):
            x = tokens[part, :lens[part[0]]]
            hidden = self.model.base_model(input_ids=x, use_cache=False).last_hidden_state  # (part, its time, dim)
            states.append(torch.nn.functional.pad(hidden, (0, 0, 0, tokens.shape[1] - x.shape[1])))
        hidden = torch.cat(states)[order.argsort()]  # (batch, time, dim)
        return qrpo.completion_logps(hidden, tokens, prompt_lens, lens, output_layer(self.model))


def shard(policy, dtype):
    """The policy with its parameters, and so gradients and optimizer states, cut over all ranks (FSDP2)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    precision = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32)
    blocks = set(policy.model._no_split_modules or ())
    for module in policy.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mp_policy=precision)
    # cut again after every forward, so that whoever asks for parameters (optimizer, checkpoint) gets this rank's
    return fully_shard(policy, mp_policy=precision, reshard_after_forward=True)


def flops_per_token(model, length):
    """Floating-point operations of training on one token of a sequence of that many: 6 a weight that multiplies (an
    input embedding does not), and attention's 6 * layers * heads * head_dim * length (half of the square, causal).
    """
    config = model.config.get_text_config()
    weights = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    return 6 * (weights + config.num_hidden_layers * config.hidden_size * length)


def peak_flops(device):
    """bfloat16 operations a second that the GPU's maker states (dense), or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
    return next((peak for part, peak in peaks.items() if part in name), None)


def pad(sequences, device):
    """Lists (or arrays) of token ids -> (batch, time) right-padded with 0."""
    tensors = [torch.as_tensor(np.asarray(s, np.int64)) for s in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)
