"""Environments of their own: made whole or not at all, once for all who ask, and what runs there ends with its caller."""

import sys
import threading
from pathlib import Path

import pytest

from adapters import environments
from adapters.environments import Environment, Tool, make_environment, tqdm_step
from adapters.errors import ToolError

Steps = list[tuple[str, int, int]]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pins and scripts instead of the package's own."""
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.setattr(environments, "FILES", folder)
    return folder


def here(files: Path, script: str) -> Environment:
    """This Python as a tool's, with a script to run."""
    (files / "script.py").write_text(script)
    (files / "bin").mkdir()
    (files / "bin" / "python").symlink_to(sys.executable)
    return Environment(Tool("own"), files)


def test_progress_is_told_apart_from_what_a_library_prints(files: Path) -> None:
    steps: Steps = []
    script = """import sys
print("loading")
print('@lorikeet ["saving", 1, 3]')
sys.stderr.write("Writing:  45%|####\\rWriting: 100%|####\\n")
"""
    here(files, script).run("script.py", [], lambda *step: steps.append(step))
    assert sorted(steps) == [("Writing", 45, 100), ("Writing", 100, 100), ("saving", 1, 3)]


def test_a_failing_script_is_told_of_with_its_last_lines(files: Path) -> None:
    own = here(files, "for i in range(40): print('line', i)\nraise SystemExit('no tokenizer')")
    with pytest.raises(ToolError, match=r"(?s)own \(script.py\) ended with code 1:.*line 39\nno tokenizer") as caught:
        own.run("script.py", [])
    assert "line 3\n" not in str(caught.value)


def test_a_script_ends_when_its_caller_is_interrupted(files: Path, tmp_path: Path) -> None:
    script = f"""import os, time
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
print('@lorikeet ["started", 0, 0]', flush=True)
time.sleep(60)
"""

    def interrupt(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here(files, script).run("script.py", [], interrupt)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_a_script_sees_none_of_the_callers_packages(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with pytest.raises(ToolError, match="No module named 'adapters'"):
        here(files, "import adapters").run("script.py", [])


@pytest.mark.slow
def test_an_environment_is_made_once_and_again_when_its_pins_change(files: Path, tmp_path: Path) -> None:
    (files / "own.txt").write_text("# nothing\n")
    tools = tmp_path / "tools"
    made: list[Environment] = []
    threads = [threading.Thread(target=lambda: made.append(make_environment(Tool("own"), tools))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0].folder == made[1].folder
    (files / "hello.py").write_text("print('@lorikeet [\"hello\", 1, 1]')")
    steps: Steps = []
    made[0].run("hello.py", [], lambda *step: steps.append(step))
    assert steps == [("hello", 1, 1)]
    (files / "own.txt").write_text("# nothing else\n")
    assert make_environment(Tool("own"), tools).folder != made[0].folder


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_leaves_nothing(files: Path, tmp_path: Path) -> None:
    (files / "own.txt").write_text("./no-such-file.whl\n")
    tools = tmp_path / "tools"
    with pytest.raises(ToolError, match=r"(?s)The environment for own ended with code 1:.*no-such-file"):
        make_environment(Tool("own"), tools)
    assert [path.name for path in tools.iterdir()] == [".own.lock"]


def test_what_a_killed_maker_left_is_swept(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "own.txt").write_text("")
    tools = tmp_path / "tools"
    (tools / ".own-killed").mkdir(parents=True)

    def install(environment: Environment, report: object) -> None:
        environment.folder.mkdir()

    monkeypatch.setattr(environments, "_install", install)
    environment = make_environment(Tool("own"), tools)
    assert sorted(path.name for path in tools.iterdir()) == [".own.lock", environment.folder.name]


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("Writing:  45%|####      | 1/2", ("Writing", 45, 100)),
        ("(3/31): Calibrating: 100%|###", ("(3/31): Calibrating", 100, 100)),
        ("INFO: 45% done", None),
    ],
)
def test_bars_of_tqdm_are_read(line: str, step: tuple[str, int, int] | None) -> None:
    assert tqdm_step(line) == step


@pytest.mark.parametrize("name", ["gguf", "llmcompressor"])
def test_every_tool_is_pinned_to_the_last_package(name: str) -> None:
    packages = Tool(name).packages
    assert len(packages) > 20
    assert all(line.count("==") == 1 and "+" not in line and "/" not in line for line in packages)
