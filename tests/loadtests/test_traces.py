import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.errors import ScenarioError
from loadtests.loads import TraceLoad
from loadtests.traces import TraceRow, read_trace, replay

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-17 00:00:00.0000000,879,55
"""
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,1,2\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
)
BURSTGPT_SESSIONS = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log
19440161.5,,2,ChatGPT,36,0,36,API log
"""
MOONCAKE = """\
{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 46, 47]}
{"timestamp": 27482, "input_length": 100, "output_length": 5, "hash_ids": [7]}
"""


@pytest.mark.parametrize(
    ("format", "text", "rows"),
    [
        ("azure", AZURE, [TraceRow(0, 374, 44), TraceRow(4.314579, 396, 109), TraceRow(20653.31941, 879, 55)]),
        ("azure", AZURE_2024, [TraceRow(0, 2162, 5), TraceRow(0.99007, 1, 2)]),
        ("burstgpt", BURSTGPT, [TraceRow(0, 472, 18)]),
        ("burstgpt", BURSTGPT_SESSIONS, [TraceRow(0, 906, 446, "1722ac82"), TraceRow(51.5, 36, 0)]),
        ("mooncake", MOONCAKE, [TraceRow(0, 6758, 500, "46", (0, 46, 47)), TraceRow(24.482, 100, 5, "7", (7,))]),
    ],
)
def test_each_format_is_read_as_it_is_published(format: str, text: str, rows: list[TraceRow], tmp_path: Path) -> None:  # noqa: A002
    path = tmp_path / "trace"
    path.write_text(text)
    found = list(read_trace(path, format))
    assert [row.at_s for row in found] == pytest.approx([row.at_s for row in rows], abs=1e-5)
    assert [(r.prompt_tokens, r.output_tokens, r.session, r.blocks) for r in found] == [
        (r.prompt_tokens, r.output_tokens, r.session, r.blocks) for r in rows
    ]


@pytest.mark.parametrize(
    ("format", "text", "said"),
    [
        ("azure", "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,3\n", "line 2: .*GeneratedTokens"),
        ("azure", AZURE + "yesterday,1,2\n", "line 5: .*yesterday"),
        ("azure", AZURE + "2023-11-16 18:15:47,1,2\n", "line 5: .*earlier"),
        ("azure", AZURE + "2023-11-18 18:15:47,-1,2\n", "line 5: "),
        ("azure", AZURE + "2023-11-18 18:15:47\n", "line 5: "),
        ("burstgpt", AZURE, "line 2: .*Request tokens"),
        ("burstgpt", BURSTGPT + "nan,ChatGPT,1,1,2,API log\n", "line 3: "),
        ("mooncake", MOONCAKE + "\n[1]\n", "line 4: "),
        ("mooncake", MOONCAKE + "{", "line 3: "),
    ],
)
def test_what_is_no_row_is_refused_with_its_line(format: str, text: str, said: str, tmp_path: Path) -> None:  # noqa: A002
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=said):
        list(read_trace(path, format))


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="cannot be read"):
        list(read_trace(tmp_path / "none.csv", "azure"))


def load(**fields: float) -> TraceLoad:
    return TraceLoad.model_validate({"kind": "trace", "path": "t", "format": "azure", **fields})


@given(
    instants=st.lists(st.floats(0, 1000), min_size=1).map(sorted),
    speed=st.floats(0.1, 50),
    start_s=st.floats(0, 500, allow_subnormal=False),
    duration_s=st.floats(0.1, 200),
)
def test_instants_are_scaled_and_cut_to_the_phase(
    instants: list[float], speed: float, start_s: float, duration_s: float
) -> None:
    replayed = replay([TraceRow(at_s, 1, 1) for at_s in instants], load(speed=speed, start_s=start_s), duration_s)
    wanted = [(at_s - start_s) / speed for at_s in instants if at_s >= start_s]
    assert [row.at_s for row in replayed] == [at_s for at_s in wanted if at_s < duration_s]


def test_no_more_of_a_trace_is_read_than_the_phase_needs(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"input_length": 1, "output_length": 1, "hash_ids": []}
    lines = [json.dumps({"timestamp": second * 1000, **row}) for second in range(10)]
    path.write_text("\n".join([*lines, "this is never looked at"]))
    replayed = replay(read_trace(path, "mooncake"), load(speed=2.0, start_s=2.0), 3.0)
    assert [row.at_s for row in replayed] == [0, 0.5, 1, 1.5, 2, 2.5]
