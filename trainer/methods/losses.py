"""TRL's trainers where ours differ: rows come rendered, and the loss is computed where there is an answer. Torch lives here."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from trl import DPOTrainer, SFTTrainer


def answers_loss(model: Any, inputs: dict[str, Any], tokens: Any) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """(mean negative log-likelihood of the labelled tokens, the model's output, how many of them were its first choice).

    inputs: input_ids, labels and attention_mask or position_ids, each [rows, length]; labels are -100 where nothing is
    learned. tokens: divides the sum, where gradients of several batches are accumulated; None: the batch's own count.
    """
    targets = inputs["labels"][:, 1:]
    wanted = (targets != -100).any(dim=0).nonzero()[:, 0]  # columns in which some row has an answer
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    outputs = model(**rest, logits_to_keep=wanted)
    logits, chosen = outputs.logits, targets[:, wanted]
    summed = cross_entropy(logits.float().flatten(0, 1), chosen.flatten(), reduction="sum")
    right = (logits.detach().argmax(dim=-1) == chosen).sum()
    return summed / ((targets != -100).sum() if tokens is None else tokens), outputs, right


class LorikeetTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer without a model card in each checkpoint."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        return


class AnswersOnlyTrainer(LorikeetTrainer):
    """TRL's trainer with the same loss at the price of the answers.

    Off the GPU, TRL 1.16 projects every position onto the vocabulary in float32 and then masks most of it away: for short
    answers to a small model that was 38 % of a step here. The model itself can be told which positions are wanted.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs, right = answers_loss(model, inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, the gradients are averaged
        learned = (inputs["labels"][:, 1:] != -100).sum()
        gather = self.accelerator.gather_for_metrics
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append((gather(right).sum() / gather(learned).sum()).item())
        if mode == "train":
            seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else _count(inputs["input_ids"])
            self._total_train_tokens += gather(seen).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss


def _count(tokens: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens.numel(), device=tokens.device)


class PairsTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer for pairs that are rendered already, as serving renders them, without a card in each checkpoint."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        return
