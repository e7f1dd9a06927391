from pathlib import Path

import pytest

from loadtests.errors import ScenarioError
from loadtests.inputs import load_inputs, read_weights
from tests.loadtests.factories import make_scenario


@pytest.mark.parametrize(
    ("name", "text"),
    [("w.csv", "adapter,weight\nsupport,3\nlegal,0.5\n"), ("w.json", '{"support": 3, "legal": 0.5}')],
)
def test_weights_are_read_from_csv_and_json(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_weights(tmp_path / name) == {"support": 3.0, "legal": 0.5}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("w.csv", "support,3\nlegal,1\n", "columns adapter,weight"),
        ("w.csv", "adapter,weight\nsupport,much\n", "much"),
        ("w.csv", "adapter,weight\nsupport,-1\n", "support: a weight is"),
        ("w.csv", "adapter,weight\nsupport,inf\n", "support: a weight is"),
        ("w.csv", "adapter,weight\nsupport\n", "columns adapter,weight"),
        ("w.csv", "", "holds no weights"),
        ("w.json", "[1]", "JSON object"),
        ("w.json", '{"support": null}', "JSON object"),
    ],
)
def test_what_gives_no_weights_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ScenarioError, match=said):
        read_weights(tmp_path / name)


def test_a_trace_that_ends_before_the_phase_begins_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    load = {"kind": "trace", "path": path, "format": "azure"}
    assert len(load_inputs(make_scenario(load=load)).traces["steady"]) == 1
    with pytest.raises(ScenarioError, match="no row for phase steady, which replays 1 s from 60 s on"):
        load_inputs(make_scenario(load={**load, "start_s": 60}))


def test_every_phase_with_a_trace_or_weights_of_its_own_gets_them(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": []}\n')
    (tmp_path / "w.json").write_text('{"support": 1}')
    phases = [
        {
            "name": "a",
            "duration_s": 1,
            "load": {"kind": "trace", "path": tmp_path / "t.jsonl", "format": "mooncake"},
        },
        {"name": "b", "duration_s": 1, "popularity": {"kind": "weights", "path": tmp_path / "w.json"}},
    ]
    inputs = load_inputs(make_scenario(phases=phases))
    assert list(inputs.traces) == ["a"]
    assert inputs.weights == {tmp_path / "w.json": {"support": 1.0}}
