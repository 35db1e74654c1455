"""`qrpo_loss` in another training loop: TRL's DPOTrainer with its loss replaced, in some 20 lines.

Reads rewarded rows with `chosen`, `rejected`, their rewards and `ref_rewards` (score.py's output; every row
has the same number of ref_rewards, and none is null). Saves a model. It needs TRL 1.16
(`pip install trl==1.16.0`), which the rest of this project does not:

    python examples/in_trl.py --model=MODEL --data=out/rewarded/part-00000.jsonl --out=out/in_trl

The README says what the loss needs when you copy it. TRL's log-probabilities (summed over completion tokens,
in float32) and its reference log-probabilities (computed once, before training) already meet these needs.
"""
import argparse
import sys
from pathlib import Path

import torch
import trl
from datasets import load_dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qrpo import qrpo_loss

REWARDS = "chosen_reward", "rejected_reward", "ref_rewards"


class QRPOTrainer(trl.DPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        collate = self.data_collator

        def with_rewards(examples):
            rewards = {key: torch.tensor([e[key] for e in examples]) for key in REWARDS if key in examples[0]}
            return collate(examples) | rewards
        self.data_collator = with_rewards

    def _set_signature_columns_if_needed(self):  # other columns are dropped before they reach the collator
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *REWARDS])]

    def _compute_loss(self, model, inputs, return_outputs):
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
                        use_cache=False, fused_lm_head=True)
        logps = outputs.log_probs.sum(1)  # (2 * pairs,): all chosen, then all rejected
        ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        rewards = torch.cat([inputs["chosen_reward"], inputs["rejected_reward"]])
        beta = torch.tensor([self.beta], device=logps.device)
        loss = qrpo_loss(beta, logps, ref_logps, rewards, inputs["ref_rewards"].repeat(2, 1)).mean()
        return (loss, outputs) if return_outputs else loss


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--data", required=True, help="JSONL of rewarded pairs")
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--beta", type=float, default=0.1, help="(default %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-6, help="(default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs a step (default %(default)s)")
    args = parser.parse_args()
    trainer = QRPOTrainer(args.model, train_dataset=load_dataset("json", data_files=args.data, split="train"),
                          args=trl.DPOConfig(args.out, beta=args.beta, learning_rate=args.learning_rate,
                                             logging_steps=1, num_train_epochs=1,
                                             per_device_train_batch_size=args.batch_size,
                                             precompute_ref_log_probs=True, bf16=False, report_to="none"))
    trainer.train()
    trainer.save_model(args.out)


if __name__ == "__main__":
    main()
