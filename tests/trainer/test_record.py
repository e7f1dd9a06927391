"""metrics.jsonl and the plot of a run."""

from pathlib import Path

from trainer.methods.record import Metrics, MetricsFile, draw_losses, read_metrics


def test_what_came_after_the_checkpoint_is_forgotten_when_a_stage_is_gone_on_with(tmp_path: Path) -> None:
    first, second = MetricsFile(tmp_path, 1), MetricsFile(tmp_path, 2)
    for step in (1, 2, 3):
        first.add(Metrics(1, step, step * 2.0, loss=1.0 / step))
    for step in (1, 2):
        second.add(Metrics(2, step, step * 3.0, loss=0.1))
    with first.path.open("a") as file:
        file.write('{"stage": 2, "st')  # the process was killed here
    assert second.begin(1) == 3.0
    assert [(each.stage, each.step) for each in read_metrics(first.path)] == [(1, 1), (1, 2), (1, 3), (2, 1)]
    assert second.begin(0) == 0.0


def test_losses_of_all_stages_are_drawn(tmp_path: Path) -> None:
    metrics = [Metrics(1, 1, 1, loss=2.0), Metrics(1, 1, 1, eval_loss=1.5), Metrics(2, 1, 1, loss=float("nan"))]
    draw_losses(metrics, tmp_path / "loss.svg")
    drawn = (tmp_path / "loss.svg").read_text()
    assert "<svg" in drawn
    draw_losses(metrics, tmp_path / "again.svg")
    assert len((tmp_path / "again.svg").read_text()) == len(drawn)
