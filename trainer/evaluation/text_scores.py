"""How near a text comes to the one wanted: ROUGE over words, BERTScore over a model's embeddings."""

from collections.abc import Sequence
from pathlib import Path

from trainer.errors import EvaluationError

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(wanted: Sequence[str], given: Sequence[str]) -> list[dict[str, float]]:
    """F-measure of each pair (Lin 2004), words stemmed; rouge_l comes first, since it decides."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = [scorer.score(want, give) for want, give in zip(wanted, given, strict=True)]
    return [
        {"rouge_l": score["rougeL"].fmeasure, "rouge_1": score["rouge1"].fmeasure, "rouge_2": score["rouge2"].fmeasure}
        for score in found
    ]


def bertscore(wanted: Sequence[str], given: Sequence[str], *, model: str, layers: int | None) -> list[float]:
    """F1 of each pair (Zhang et al. 2020), cut to 0…1. model: a folder, or a name that is in the local cache.

    Raises EvaluationError when the package or the model is missing.
    """
    try:
        from bert_score import BERTScorer
    except ModuleNotFoundError as exc:
        raise EvaluationError(
            "BERTScore needs the package bert-score: pip install 'lorikeet[bertscore]', or leave bertscore out of `metrics`."
        ) from exc
    if Path(model).is_dir() and layers is None:
        raise EvaluationError(f"Say with `bertscore_layers` which layer of {model} to compare; the last is its number.")
    try:
        scorer = BERTScorer(model_type=model, num_layers=layers, device="cpu", batch_size=16)
    except (OSError, KeyError, ValueError) as exc:
        raise EvaluationError(
            f"BERTScore's model {model} is not on this machine. Give a folder that holds one as `bertscore_model`."
        ) from exc
    _, _, f1 = scorer.score(list(given), list(wanted))
    return [min(max(float(value), 0.0), 1.0) for value in f1]
