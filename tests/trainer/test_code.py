"""Programs that models wrote, run in a fence."""

import pytest

from trainer.evaluation.code import Fence, no_network, pass_at_1, passes, program_in

ADD = "def add(a, b):\n    return a + b"
TESTS = "assert add(1, 2) == 3"
FENCE = Fence(timeout_s=5.0)


def test_a_program_is_read_out_of_an_answer() -> None:
    assert program_in(f"Sure:\n```python\n{ADD}\n```\nDone.").strip() == ADD
    assert program_in(ADD) == ADD
    assert program_in(f"```\n{ADD}").strip() == ADD


def test_right_programs_pass_and_wrong_ones_do_not() -> None:
    answers = [f"```python\n{ADD}\n```", "def add(a, b):\n    return a - b", "I would add them."]
    assert pass_at_1(answers, [TESTS] * 3, FENCE) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "block = bytearray(1 << 30)",
        "open('big', 'wb').write(b'x' * (4 << 20))",
        "import os; assert 'LORIKEET_API_KEY' in os.environ",
    ],
    ids=["endless", "memory", "disk", "environment"],
)
def test_a_program_is_kept_from_what_it_should_not_have(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_API_KEY", "lk-secret")
    assert not passes(program, "", Fence(timeout_s=0.5, memory_bytes=256 << 20))


def test_a_program_has_no_network_where_the_system_lets_us_take_it() -> None:
    if not no_network():
        pytest.skip("this system lets nobody take the network away")
    listen = "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\n"
    assert not passes(listen + "socket.create_connection(s.getsockname(), 1)", "", FENCE)
    assert passes(listen, "", FENCE)
