"""The loss over answers alone, computed only where there is an answer. Torch lives here."""

from typing import Any

from trl import SFTTrainer


class AnswersOnlyTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the same loss at the price of the answers.

    Off the GPU, TRL 1.16 projects every position onto the vocabulary in float32 and then masks most of it away: for short
    answers to a small model that was 38 % of a step here. The model itself can be told which positions are wanted.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        from torch.nn.functional import cross_entropy

        targets = inputs["labels"][:, 1:]
        wanted = (targets != -100).any(dim=0).nonzero()[:, 0]  # columns in which some row has an answer
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**rest, logits_to_keep=wanted)
        summed = cross_entropy(outputs.logits.float().flatten(0, 1), targets[:, wanted].flatten(), reduction="sum")
        tokens = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = summed / tokens
        return (loss, outputs) if return_outputs else loss
