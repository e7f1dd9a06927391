"""The folder a build leaves: written beside its place, and moved there only when it is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from trainer.data.card import DATASET_FILE
from trainer.errors import ConfigError


def refuse_occupied(out: Path, *, force: bool) -> None:
    """Raises ConfigError where `out` holds something that a build may not replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / DATASET_FILE).is_file():
        raise ConfigError(f"{out} is there already, and is no data set built by this command. Choose another --out.")
    if not force:
        raise ConfigError(f"{out} holds a data set already. Replace it with --force, or choose another --out.")


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` for everything that is not whole yet; what killed builds left there is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    start = f".{out.name}.building-"
    for left in out.parent.glob(f"{start}*"):
        owner = left.name.removeprefix(start)
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    scratch = out.parent / f"{start}{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put_in_place(folder: Path, out: Path, scratch: Path) -> None:
    """Move the finished folder to `out`; what was there goes away with the scratch folder."""
    if out.exists():
        out.rename(scratch / "before")
    folder.rename(out)
