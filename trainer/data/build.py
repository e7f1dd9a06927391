"""Build a data set: from sources to a folder with train.jsonl, eval.jsonl, rejected.jsonl, reports and dataset.json.

Row by row in several processes first (`refine`), then what takes all rows (`selection`), then the files are written, read back
and proven. Every row that is read ends in one of the three files.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np
import orjson
from numpy.typing import NDArray

from adapters.licences import Verdict
from trainer.data.account import Account
from trainer.data.accounting import Outcome, make_account
from trainer.data.card import (
    DATASET_FILE,
    EVAL_FILE,
    PAGE_FILE,
    REJECTED_FILE,
    REPORT_FILE,
    TRAIN_FILE,
    Dataset,
    PartCard,
    Receipt,
    file_sha256,
)
from trainer.data.chunks import chunks_of
from trainer.data.contamination import Benchmark, read_benchmark
from trainer.data.digests import boilerplate_of, said
from trainer.data.folder import put_in_place, refuse_occupied, scratch_folder
from trainer.data.groups import Kind, Neighbours
from trainer.data.origins import Fetch, Origin, benchmark_rows, find_origins, licence_verdict
from trainer.data.page import render_page
from trainer.data.pool import in_order
from trainer.data.production import Production, read_production
from trainer.data.proof import ReadPart, prove, read_part
from trainer.data.reading import read_file
from trainer.data.receipt import CHECKED, Rendering, mask_receipt_of
from trainer.data.recipe import BuildConfig
from trainer.data.refine import Refining, Rejection, column_types, refining, rejected_line, sample_values
from trainer.data.selection import Fate, Roles, Selection, select
from trainer.data.store import Ids, Mask, RowStore, shuffled
from trainer.data.tally import MOST_CLASSES, Tally
from trainer.errors import ConfigError, DataError, LicenceError, RowFault

ALONE_BYTES = 4_000_000  # of sources: below, starting processes takes longer than the work
FORM_ROWS = 1000  # rows of a source its form is learned from
SHOWN_CLASSES = 50  # more distinct answers than these are no classes, unless the configuration says so
CLASSED_SHARE = 0.9  # of rows that have a class, before classes are told of
TICK_ROWS = 10_000

Listener = Callable[[str, int, int], None]  # step, how far, of how much; 0 of 0 where that is unknown


def _silent(step: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Built:
    folder: Path
    account: Account


@dataclass(frozen=True)
class Base:
    """The base model that rows are rendered for."""

    name: str
    licence: str
    folder: Path


def build(
    config: BuildConfig,
    out: Path,
    *,
    relative_to: Path,
    fetch: Fetch,
    base: Base | None = None,
    force: bool = False,
    listen: Listener = _silent,
) -> Built:
    """Build into `out`, which must not exist or, with force, be an older build.

    relative_to: folder that the configuration's paths start from. The same configuration and files give the same bytes.
    Raises ConfigError, DataError, FetchError, LicenceError, TemplateError.
    """
    refuse_occupied(out, force=force)
    listen("finding sources", 0, 0)
    origins = find_origins(config, relative_to=relative_to, fetch=fetch)
    verdict = licence_verdict(origins, (base.name, base.licence) if base else None)
    if verdict.level == "block" and not config.allow_licence:
        raise LicenceError(
            "The licences do not allow this data set:\n  "
            + "\n  ".join(verdict.lines())
            + "\nLeave the source out, or record why it may be used: allow_licence: …"
        )
    listen("reading benchmarks", 0, 0)
    benchmarks = [
        read_benchmark(each.title, benchmark_rows(each, relative_to=relative_to, fetch=fetch))
        for each in config.decontaminate
    ]
    production = read_production(config, relative_to=relative_to)
    rendering = Rendering(base.name, base.folder, config.chat_template, config.system_prompt) if base else None
    with scratch_folder(out) as scratch:
        folder = scratch / "set"
        folder.mkdir()
        work = _Work(config, origins, tuple(benchmarks), production, rendering, folder, listen)
        with RowStore(scratch / "rows", column_types(config)) as store:
            account = work.run(store, verdict)
        (folder / REPORT_FILE).write_text(account.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / PAGE_FILE).write_text(render_page(account) + "\n", encoding="utf-8")
        (folder / DATASET_FILE).write_text(account.dataset.model_dump_json(indent=1) + "\n", encoding="utf-8")
        put_in_place(folder, out, scratch)
    return Built(out, account)


@dataclass(frozen=True)
class _Work:
    """One build, from origins to the account. `folder` gets the files."""

    config: BuildConfig
    origins: tuple[Origin, ...]
    benchmarks: tuple[Benchmark, ...]
    production: Production | None
    rendering: Rendering | None
    folder: Path
    listen: Listener

    def run(self, store: RowStore, verdict: Verdict) -> Account:
        size_bytes = sum(origin.size_bytes for origin in self.origins)
        processes = (self.config.processes or os.cpu_count() or 1) if size_bytes > ALONE_BYTES else 1
        self.listen("learning forms", 0, 0)
        forms = tuple(self._form(place) for place in range(len(self.origins)))
        with (self.folder / REJECTED_FILE).open("wb") as rejected:
            tally = self._refine(store, forms, rejected, processes, size_bytes)
            source: NDArray[np.uint16] = store.column("source")
            first_general = len(self.config.evaluation) + len(self.config.sources)
            roles = Roles(source < len(self.config.evaluation), source >= first_general)
            neighbours = Neighbours(store, lambda row: forms[source[row]], self.config.duplicates.similarity)
            class_names = self._class_names(tally, store.count)
            selection = select(
                self.config,
                store,
                roles,
                neighbours,
                classes=class_names,
                production=self.production.classes if self.production else None,
                tell=lambda step: self.listen(step, 0, 0),
            )
            self._write_rejected(store, selection, source, rejected, tally)
        train, held_out = selection.rows(Fate.TRAIN), selection.rows(Fate.EVAL)
        self._refuse_empty(train, held_out, tally)
        compared = neighbours.compared
        parts = [
            self._write_and_read(store, rows, name, processes)
            for rows, name in ((train, TRAIN_FILE), (held_out, EVAL_FILE))
        ]
        self.listen("proving", 0, 0)
        kinds: tuple[Kind, ...] = ("text",) if self.config.format == "text" else ("text", "prompt")
        proof = prove(
            *parts,
            trained=_mask(train, store.count),
            held_out=_mask(held_out, store.count),
            neighbours=neighbours,
            similarity=self.config.duplicates.similarity,
            kinds=kinds,
        )
        if not proof.holds:
            told = f"still holds what is evaluated, which is a fault of this program: {proof.model_dump_json()}"
            raise DataError(Path(TRAIN_FILE), [RowFault(0, told)])
        kept = Counter(source[np.concatenate([train, held_out])].tolist())
        return make_account(
            Outcome(
                config=self.config,
                origins=self.origins,
                kept=kept,
                benchmarks=self.benchmarks,
                production=self.production,
                verdict=verdict,
                tally=tally,
                roles=roles,
                selection=selection,
                train=train,
                held_out=held_out,
                chars=store.column("chars"),
                labels=store.column("label"),
                class_names=class_names,
                compared=compared,
                dataset=self._dataset(parts, kept),
                proof=proof,
            )
        )

    def _form(self, place: int) -> frozenset[int]:
        read = partial(read_file, piece_chars=self.config.length.max_chars)
        rows = ((row.line, row.data) for row in chain.from_iterable(map(read, self.origins[place].files)))
        values = sample_values(islice(rows, FORM_ROWS), self.config, place)
        return boilerplate_of([said(value) for value in values])

    def _refine(
        self, store: RowStore, forms: tuple[frozenset[int], ...], rejected: IO[bytes], processes: int, size_bytes: int
    ) -> Tally:
        tally = Tally()
        done_bytes = [0] * len(self.origins)
        know = Refining(self.config, forms, self.benchmarks)
        limit = self.config.length.max_chars
        chunks = chain.from_iterable(
            chunks_of(place, origin, piece_chars=limit) for place, origin in enumerate(self.origins)
        )
        for chunk, done in in_order(refining, know, chunks, processes=processes):
            tally.add(done)
            rejected.write(done.rejected)
            columns = {**done.columns, "label": tally.class_numbers(done.labels)}
            store.append(done.rows, done.sizes_bytes, columns)
            done_bytes[chunk.source] = chunk.read_bytes
            self.listen(f"reading {self.origins[chunk.source].config.title}", sum(done_bytes), size_bytes)
        store.flush()
        if not store.count:
            raise DataError(self.origins[0].files[0], [RowFault(0, tally.most_common())])
        return tally

    def _class_names(self, tally: Tally, rows: int) -> list[str]:
        """In the order of their numbers; none where answers are no classes. Raises ConfigError."""
        names = list(tally.classes)
        if self.config.balance is None:
            told = len(names) <= SHOWN_CLASSES and tally.unclassed <= (1 - CLASSED_SHARE) * rows
            return names if told else []
        if not names or len(names) >= MOST_CLASSES:
            found = f"{MOST_CLASSES} and more classes" if names else "no classes"
            raise ConfigError(f"balance: the rows have {found}. Name the field with the class as balance.label.")
        return names

    def _write_rejected(
        self, store: RowStore, selection: Selection, source: NDArray[np.uint16], rejected: IO[bytes], tally: Tally
    ) -> None:
        """Rows that fell when all were compared, after those that fell by themselves."""
        titles = [origin.config.title for origin in self.origins]
        lines = store.column("line")
        gone = np.flatnonzero(selection.fates > Fate.EVAL)
        for number, row in enumerate(gone.tolist()):
            twin = int(selection.twins[row])
            step, why = REJECTIONS[Fate(selection.fates[row])]
            tally.reasons[step, why] += 1
            shown = f"{why}: {titles[source[twin]]}:{lines[twin]}" if step in REPEATING else why
            rejected.write(
                rejected_line(int(lines[row]), titles[source[row]], Rejection(step, shown), store.value(row))
            )
            if number % TICK_ROWS == 0:
                self.listen("writing rejected rows", number, len(gone))

    def _refuse_empty(self, train: Ids, held_out: Ids, tally: Tally) -> None:
        if len(train) and len(held_out):
            return
        alike = "no row can be held out: too few are left, or all ask nearly the same. Give rows as `evaluation`"
        raise DataError(self.origins[0].files[0], [RowFault(0, tally.most_common() if not len(train) else alike)])

    def _write_and_read(self, store: RowStore, rows: Ids, name: str, processes: int) -> ReadPart:
        with (self.folder / name).open("wb") as file:
            for number, row in enumerate(shuffled(rows, self.config.seed).tolist()):
                file.write(store.line(row))
                if number % TICK_ROWS == 0:
                    self.listen(f"writing {name}", number, len(rows))

        def tell(done: int) -> None:
            self.listen(f"counting tokens of {name}", done, len(rows))

        return read_part(self.folder / name, self.rendering, processes=processes, tell=tell)

    def _dataset(self, parts: Sequence[ReadPart], kept: Counter[int]) -> Dataset:
        train, held_out = (
            PartCard(rows=part.rows, sha256=file_sha256(self.folder / name), tokens=part.tokens)
            for part, name in zip(parts, (TRAIN_FILE, EVAL_FILE), strict=True)
        )
        return Dataset(
            name=self.config.name,
            format=self.config.format,
            seed=self.config.seed,
            train=train,
            eval=held_out,
            sources=tuple(origin.card(kept[place]) for place, origin in enumerate(self.origins)),
            receipt=self._receipt(),
        )

    def _receipt(self) -> Receipt | None:
        if self.rendering is None or self.config.format == "text":
            return None
        self.listen("mask receipt", 0, 0)
        with (self.folder / TRAIN_FILE).open("rb") as lines:
            return mask_receipt_of(map(orjson.loads, islice(lines, CHECKED)), self.rendering)


REJECTIONS = {
    Fate.EXACT: ("exact duplicates", "says the same as another row"),
    Fate.NEAR: ("near duplicates", "says nearly the same as another row"),
    Fate.LEAK: ("leakage", "repeats an evaluation row, or asks nearly the same"),
    Fate.BALANCE: ("balance", "its class is more frequent than in production"),
    Fate.MIX: ("mix", "not drawn: enough general data without it"),
}
REPEATING = ("exact duplicates", "near duplicates", "leakage")  # steps whose reason names the other row


def _mask(rows: Ids, count: int) -> Mask:
    mask = np.zeros(count, dtype=np.bool_)
    mask[rows] = True
    return mask
