"""TRL's trainers where ours differ: rows come rendered, their order can be resumed, losses cost no more than they must."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOTrainer, SFTTrainer


def answers_loss(model: Any, inputs: dict[str, Any], tokens: Any) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """(mean negative log-likelihood of the labelled tokens, the model's output, how many of them were its first choice).

    inputs: input_ids, labels and attention_mask or position_ids, each [rows, length]; labels are -100 where nothing is
    learned. tokens: divides the sum, where gradients of several batches are accumulated; None: the batch's own count.
    """
    targets = inputs["labels"][:, 1:]
    wanted = (targets != -100).any(dim=0).nonzero()[:, 0]  # columns in which some row has an answer
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    # with a cache models no longer look at position_ids for where packed rows begin, and these would see each other
    outputs = model(**rest, logits_to_keep=wanted, use_cache=False)
    logits, chosen = outputs.logits, targets[:, wanted]
    summed = cross_entropy(logits.float().flatten(0, 1), chosen.flatten(), reduction="sum")
    right = (logits.detach().argmax(dim=-1) == chosen).sum()
    return summed / ((targets != -100).sum() if tokens is None else tokens), outputs, right


class LengthSampler(Sampler):  # type: ignore[misc]
    """Rows of about the same length together, shuffled by seed and epoch alone.

    That of transformers draws each epoch's order from torch's own generator, so that a run resumed in its second epoch went
    on with other rows.
    """

    def __init__(self, lengths: list[int], batch_rows: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_rows = batch_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_rows, generator=generator))


class LorikeetTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer without a model card in each checkpoint, and with an order of rows that can be resumed."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthSampler([len(ids) for ids in dataset["input_ids"]], together, self.args.data_seed)

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Transformers 5.19 sees the folder of the frozen copy and then loads nothing else: training began anew."""
        if "ref" not in getattr(self.model, "peft_config", {}):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        self.model.set_adapter("default")

    def create_model_card(self, *_: Any, **__: Any) -> None:
        return
