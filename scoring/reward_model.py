"""A reward model as the reward of score.py: a sequence classifier with a `.score` output or one logit.

    python score.py --data=out/refs --out=out/rewarded --reward=model:PATH
"""
import itertools
import math

import torch
import transformers

import rows
from model import (context_length, get_device, get_dtype, keep_freed_memory, load_tokenizer, load_weights,
                   model_fingerprint)
from scoring.function import as_messages, load_function, text_of
from tokens import answered, chat_prompt, render

GROUP = 64  # batches whose completions are sorted by length together; a kill loses as many


def model_settings(args):
    path = args.reward.removeprefix("model:")
    settings = {"reward": args.reward, "files": model_fingerprint(path), "max_length": args.max_length,
                "dtype": args.dtype, "model_class": args.model_class}
    if args.model_class:
        _, code = load_function(args.model_class)
        settings["code"] = rows.fingerprint(code)
    return settings


class RewardModel:
    """A sequence classifier over the chat of prompt and completion. At every batch size it gives what the
    model's own forward gives for one sequence: where its pad token is its end token, as TRL's RewardTrainer
    saves it, the score at the last token that is not the end token.
    """

    def __init__(self, args):
        self.device = get_device()
        self.path = args.reward.removeprefix("model:")
        keep_freed_memory(self.device)
        self.tokenizer = load_tokenizer(self.path, args.trust_remote_code)
        kind = transformers.AutoModelForSequenceClassification
        if args.model_class:
            kind, _ = load_function(args.model_class)
        dtype = get_dtype(args.dtype, self.device)
        model = load_weights(kind, self.path, dtype=dtype, trust_remote_code=args.trust_remote_code)
        self.model = float32_head(model).to(self.device).eval()
        self.config = model.config.get_text_config()
        self.config.use_cache = False
        self.limit = min(args.max_length, context_length(model))
        for name, module in model.named_modules():
            # RoBERTa's positions begin after this index
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
                self.limit = min(self.limit, module.num_embeddings - module.padding_idx - 1)
        self.budget = args.batch_tokens or (16384 if self.device.type == "cuda" else 1024)
        self.pad = self.config.pad_token_id  # the model's forward looks for the last token that is not it
        self.pairs = self.tokenizer.sep_token is not None and not self.tokenizer.chat_template
        if self.pairs:
            print(f"{self.path}: an encoder without a chat template; reads prompt and completion as a pair")
        self.cut = 0  # completions whose end was not seen
        self.check()

    def check(self):
        """Refuse a model whose score of a sequence depends on the padding of its batch."""
        row = {"prompt": "Why?", "__at__": self.path}
        sequences = [self.tokens(row, "Because. " * n) for n in (1, 2, 4)]
        sequences = [sequence for sequence in sequences if sequence]
        try:
            alone = [self.scores([sequence])[0] for sequence in sequences]
            together = self.scores(sequences)
            difference = max(abs(one - other) for one, other in zip(alone, together))
        except Exception as error:  # whatever the code of a family raises
            rows.fail(f"{self.path}: a {self.config.model_type} model cannot score a text ({error}); "
                      "give another reward model")
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.3
        if not difference <= tolerance * max(map(abs, alone)):
            rows.fail(f"{self.path}: a {self.config.model_type} model reads the padding of a batch; give "
                      "another reward model")

    def tokens(self, row, completion):
        """What the model reads, cut at the end: a list of (token id, 1 in the second of two texts); None if
        nothing of the completion is in it.
        """
        prompt = row["prompt"]
        if self.tokenizer.chat_template:
            prompt, text = self.chat_texts(row, completion)
            found = self.tokenizer(text, add_special_tokens=False)
        elif not isinstance(prompt, str):
            rows.fail(f"{row['__at__']}: its prompt is a chat, and the tokenizer of {self.path} has no chat "
                      "template")
        elif self.pairs:
            found = self.tokenizer(prompt, text_of(completion))
        else:
            found = self.tokenizer(prompt + text_of(completion))
        ids = found["input_ids"]
        types = found.get("token_type_ids", [0] * len(ids))
        if len(ids) > self.limit:
            self.cut += 1
            before = self.tokenizer(prompt, add_special_tokens=False).input_ids
            if len(before) >= self.limit:
                return None
        return list(zip(ids, types))[:self.limit]

    def chat_texts(self, row, completion):
        """The prompt by the chat template, and prompt and completion."""
        prompt = row["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        try:
            answer, = as_messages(completion)
            return chat_prompt(self.tokenizer, prompt), render(self.tokenizer, answered(prompt, answer))
        except Exception as error:  # whatever a template raises
            rows.fail(f"{row['__at__']}: the chat template of {self.path} refuses the row ({error})")

    @torch.no_grad()
    def scores(self, batch):
        """One float for each list of `tokens` in the batch; None where the model gives NaN."""
        pad = self.pad
        if pad is None:  # one sequence is read to its end
            used = {i for tokens in batch for i, _ in tokens}
            pad = next(i for i in itertools.count() if i not in used)
            self.config.pad_token_id = self.model.config.pad_token_id = pad
        width = max(map(len, batch))
        padded = [tokens + [(pad, 0)] * (width - len(tokens)) for tokens in batch]
        ids, types = torch.tensor(padded).unbind(2)  # (batch, time)
        lengths = torch.tensor([len(tokens) for tokens in batch])
        mask = torch.arange(width) < lengths[:, None]
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if types.any():
            inputs["token_type_ids"] = types
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        output = self.model(**inputs)
        score = getattr(output, "score", None)
        if score is None:
            score = output.logits
        if score.numel() != len(batch):
            rows.fail(f"{self.path}: gives {score.numel() // len(batch)} numbers per completion; a reward "
                      "model gives one")
        values = score.float().flatten().tolist()
        return [None if math.isnan(value) else value for value in values]

    def score_all(self, sequences):
        """Scores of many lists of tokens, in batches of similar length."""
        scores = [None] * len(sequences)
        known = [i for i, tokens in enumerate(sequences) if tokens]
        # the longest first: if memory runs out, then at once
        order = sorted(known, key=lambda i: -len(sequences[i]))
        while order:
            longest = len(sequences[order[0]])
            size = max(1, self.budget // longest)
            batch, order = order[:size], order[size:]
            found = self.scores([sequences[i] for i in batch])
            for i, score in zip(batch, found):
                scores[i] = score
        return scores

    def __call__(self, todo):
        """Yield (row, rewards) of an iterable of (row, completions)."""
        self.cut = 0
        group, waiting = [], 0  # (row, its lists of tokens), and how many tokens these are together
        for row, completions in todo:
            sequences = [self.tokens(row, completion) for completion in completions]
            group.append((row, sequences))
            waiting += sum(len(tokens or ()) for tokens in sequences)
            if waiting >= GROUP * self.budget:
                yield from self.score_group(group)
                group, waiting = [], 0
        yield from self.score_group(group)
        if self.cut:
            print(f"the ends of {self.cut} completions were not seen, beyond {self.limit} tokens")

    def score_group(self, group):
        """Yield (row, rewards) of a list of (row, its lists of tokens)."""
        scores = iter(self.score_all([tokens for _, sequences in group for tokens in sequences]))
        for row, sequences in group:
            yield row, list(itertools.islice(scores, len(sequences)))


def float32_head(model):
    """A model that computes in float32 what follows its base model: scores of 8 bits tie with each other."""
    base = model.base_model
    if base is model:  # code of its own, which names no base model
        return model
    inside = set(base.parameters())
    for parameter in model.parameters():
        if parameter not in inside:
            parameter.data = parameter.data.float()

    def to_float32(module, inputs, output):
        for name, value in output.items():
            if torch.is_tensor(value):
                output[name] = value.float()
    base.register_forward_hook(to_float32)
    return model
