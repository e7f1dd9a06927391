"""The loss over answers alone, computed only where there is an answer. Torch lives here."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from trl import SFTTrainer


def answers_loss(model: Any, inputs: dict[str, Any], tokens: Any) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """(mean negative log-likelihood of the labelled tokens, the model's output, how many of them were its first choice).

    inputs: input_ids, attention_mask, labels, each [rows, length]; labels are -100 where nothing is learned.
    tokens: divides the sum, where gradients of several batches are accumulated; None: the batch's own count.
    """
    targets = inputs["labels"][:, 1:]
    wanted = (targets != -100).any(dim=0).nonzero()[:, 0]  # columns in which some row has an answer
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    outputs = model(**rest, logits_to_keep=wanted)
    logits, chosen = outputs.logits, targets[:, wanted]
    summed = cross_entropy(logits.float().flatten(0, 1), chosen.flatten(), reduction="sum")
    right = (logits.detach().argmax(dim=-1) == chosen).sum()
    return summed / ((targets != -100).sum() if tokens is None else tokens), outputs, right


class AnswersOnlyTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the same loss at the price of the answers.

    Off the GPU, TRL 1.16 projects every position onto the vocabulary in float32 and then masks most of it away: for short
    answers to a small model that was 38 % of a step here. The model itself can be told which positions are wanted.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs, right = answers_loss(model, inputs, num_items_in_batch)
        learned = (inputs["labels"][:, 1:] != -100).sum()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append((right / learned).item())
        return (loss, outputs) if return_outputs else loss
