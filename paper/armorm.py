"""ArmoRM, the paper's reward model (arXiv 2406.12845), loaded without its own code, which imports what
transformers 5 no longer has:

    python score.py --data=out/refs --out=out/rewarded --reward=model:RLHFlow/ArmoRM-Llama3-8B-v0.1 \
        --model_class=paper/armorm.py:ArmoRM

The score is a mixture of 19 attributes of the answer, each linear in the last token's state, whose
weights a small network computes from the state at the end of the prompt. The names are those of the
checkpoint.
"""
from types import SimpleNamespace

import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel

# "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n" in Llama 3's tokens. The gate reads the
# state at the first of them, the end of the turn before the last answer.
ANSWER = torch.tensor([128009, 128006, 78191, 128007, 271])


class Gating(nn.Module):
    """Weights of the attributes, (batch, objectives), from the state of the prompt, (batch, dim)."""

    def __init__(self, dim, objectives, hidden, depth, temperature):
        super().__init__()
        sizes = [dim] + [hidden] * depth + [objectives]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature

    def forward(self, state):
        for layer in self.layers[:-1]:
            state = layer(state).relu()
        return (self.layers[-1](state) / self.temperature).softmax(1) * self.logit_scale


class ArmoRM(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        objectives = getattr(config, "num_objectives", 19)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.zeros(objectives, objectives))
        self.gating = Gating(config.hidden_size, objectives, getattr(config, "gating_hidden_dim", 1024),
                             getattr(config, "gating_n_hidden", 3), getattr(config, "gating_temperature", 10))
        self.post_init()

    def forward(self, input_ids, attention_mask):
        """input_ids, attention_mask (batch, time), right-padded -> an object with `score` (batch,), NaN
        without ANSWER.
        """
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        rows = torch.arange(len(input_ids), device=hidden.device)
        rewards = self.regression_layer(hidden[rows, attention_mask.sum(1) - 1])  # (batch, objectives)
        windows = input_ids.unfold(1, len(ANSWER), 1)                             # (batch, places, 5)
        found = (windows == ANSWER.to(input_ids.device)).all(2)                   # (batch, places)
        places = torch.arange(1, found.shape[1] + 1, device=hidden.device)
        last = (found * places).argmax(1)  # place of the last answer's header
        weights = self.gating(hidden[rows, last])
        score = (weights * (rewards @ self.reward_transform_matrix)).sum(1)
        return SimpleNamespace(score=score.where(found.any(1), torch.nan))
