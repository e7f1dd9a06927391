"""Build a data set of up to a million rows: time and peak memory of `lorikeet data build`, and of what one would write first.

    python -m benchmarks.data_build                       # 10,000, 100,000 and 1,000,000 rows
    python -m benchmarks.data_build --rows 10000          # a quick look

The naive way (`naive`, below) does the same work in one process with everything in memory: lists, a set, datasketch's
MinHashLSH; the same rules, the same search for personal data, the same tokenizer. Both run as programs of their own; memory is
the sum of the proportional set sizes of all their processes, sampled.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import RESULTS, ROOT, save

SAMPLE_S = 0.5
EXACT_SHARE, NEAR_SHARE, PERSONAL_SHARE = 0.2, 0.15, 0.02
WORDS = 20_000


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Chat rows of 60 to 120 words: a fifth repeat an earlier one, 15 % change three words of one, 2 % name a person's data."""
    rng = random.Random(seed)  # noqa: S311
    letters = "bcdfghjklmnprstvw"
    vocabulary = [
        "".join(rng.choice(letters) + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(WORDS)
    ]
    earlier: list[tuple[str, str]] = []

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randint(least, most)))

    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            drawn = rng.random()
            if drawn < EXACT_SHARE and earlier:
                question, answer = rng.choice(earlier)
            elif drawn < EXACT_SHARE + NEAR_SHARE and earlier:
                question, answer = rng.choice(earlier)
                words = answer.split()
                for place in rng.sample(range(len(words)), 3):
                    words[place] = rng.choice(vocabulary)
                answer = " ".join(words)
            else:
                question, answer = text(20, 40) + "?", text(40, 80) + "."
                if drawn > 1 - PERSONAL_SHARE:
                    name, telephone = rng.choice(vocabulary), f"+1 415 555 {number % 10_000:04d}"
                    answer += f" Write to {name}{number}@example.com or call {telephone}."
            if len(earlier) < 50_000:
                earlier.append((question, answer))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def naive(path: Path, out: Path) -> dict[str, Any]:
    """The same steps as one would write them first."""
    from datasketch import MinHash, MinHashLSH

    from adapters.home import home
    from trainer.data.chat import row_fault
    from trainer.data.digests import plain
    from trainer.data.privacy import PersonalData
    from trainer.data.recipe import LengthConfig, PrivacyConfig, QualityConfig
    from trainer.data.rules import length_fault, quality_fault
    from trainer.plan import resolve_base
    from trainer.template import load_renderer

    personal = PersonalData(PrivacyConfig())
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    kept = []
    for row in rows:
        if row_fault(row) or length_fault(row, LengthConfig()) or quality_fault(row, QualityConfig()):
            continue
        texts = personal.clean([message["content"] for message in row["messages"]]).texts
        for message, cleaned in zip(row["messages"], texts, strict=True):
            message["content"] = cleaned
        kept.append(row)
    seen: set[str] = set()
    unique = []
    for row in kept:
        key = plain("\n".join(message["content"] for message in row["messages"]))
        if key not in seen:
            seen.add(key)
            unique.append((key, row))
    index = MinHashLSH(params=(16, 8), num_perm=128)
    sketches: dict[int, MinHash] = {}
    final = []
    for number, (key, row) in enumerate(unique):
        words = key.split()
        sketch = MinHash(128, seed=1)
        sketch.update_batch([" ".join(words[i : i + 3]).encode() for i in range(len(words) - 2)])
        if any(sketch.jaccard(sketches[other]) >= 0.8 for other in index.query(sketch)):
            continue
        index.insert(number, sketch)
        sketches[number] = sketch
        final.append(row)
    random.Random(0).shuffle(final)  # noqa: S311
    held_out = min(2000, len(final) // 10)
    renderer = load_renderer(resolve_base("smollm2-135m-instruct", home())[0])
    tokens = 0
    for first in range(0, len(final), 1000):
        texts = [renderer.text(row["messages"], prompt=False) for row in final[first : first + 1000]]
        tokens += sum(map(len, renderer.tokenizer(texts, add_special_tokens=False)["input_ids"]))
    out.mkdir()
    for name, part in (("eval", final[:held_out]), ("train", final[held_out:])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return {"kept": len(final), "tokens": tokens}


def watched(command: list[str]) -> dict[str, Any]:
    """Run to the end; time and memory of the whole process tree. Raises RuntimeError with its last words."""
    began, spent = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = 0
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said) as run,
    ):
        process = psutil.Process(run.pid)
        while run.poll() is None:
            looked = time.perf_counter()
            peak = max(peak, tree_bytes(process))
            time.sleep(max(SAMPLE_S, 20 * (time.perf_counter() - looked)))  # the kernel walks every page to tell
        seconds = time.perf_counter() - began
        answer = run.stdout.read() if run.stdout else b""
        if run.returncode:
            said.seek(0)
            raise RuntimeError(said.read()[-2000:].decode())
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime, 1),
        "peak_mib": round(peak / 2**20),
        "answer": json.loads(answer),
    }


def tree_bytes(process: psutil.Process) -> int:
    """Memory of a process and its children, pages they share counted once."""
    total = 0
    for each in (process, *children(process)):
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def measure_ours(rows: int, data: Path, folder: Path) -> dict[str, Any]:
    config = folder / "build.yaml"
    config.write_text(f"name: rows-{rows}\nsources:\n  - {{path: {data}, licence: CC0-1.0}}\n", encoding="utf-8")
    command = [sys.executable, "-m", "lorikeet", "data", "build", str(config), "--out", str(folder / "ours"), "--json"]
    ran = watched(command)
    told = ran.pop("answer")
    parts = told["dataset"]["train"], told["dataset"]["eval"]
    return ran | {
        "kept": sum(part["rows"] for part in parts),
        "tokens": sum(part["tokens"] for part in parts),
        "duplicates": {kind: told["duplicates"][kind] for kind in ("exact", "near")},
    }


def measure_naive(rows: int, data: Path, folder: Path) -> dict[str, Any]:
    ran = watched([sys.executable, "-m", "benchmarks.data_build", "--naive", str(data), str(folder / "naive")])
    told: dict[str, Any] = ran.pop("answer")
    return ran | told


def measure(rows: int, ways: Sequence[str], seed: int) -> dict[str, Any]:
    """Both ways read the same file. The raw figures of one size."""
    with tempfile.TemporaryDirectory(prefix="lorikeet-data-") as name:
        data = Path(name) / "rows.jsonl"
        write_rows(data, rows, seed)
        found: dict[str, Any] = {"rows": rows, "file_mb": round(data.stat().st_size / 1e6)}
        for way in ways:
            found[way] = WAYS[way](rows, data, Path(name))
            found[way]["rows_per_s"] = round(rows / found[way]["seconds"])
    return found


WAYS = {"ours": measure_ours, "naive": measure_naive}


def known_sizes(seed: int) -> dict[int, dict[str, Any]]:
    """What was measured with this seed before, by rows."""
    path = RESULTS / "data_build.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {each["rows"]: each for each in before.get("sizes", [])} if before.get("seed") == seed else {}


def with_ratios(found: dict[str, Any]) -> dict[str, Any]:
    if not WAYS.keys() <= found.keys():
        return found
    ours, other = found["ours"], found["naive"]
    return found | {
        "seconds_ours_to_naive": round(ours["seconds"] / other["seconds"], 3),
        "memory_ours_to_naive": round(ours["peak_mib"] / other["peak_mib"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--ways", choices=list(WAYS), nargs="+", default=list(WAYS), help="Other figures are kept.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--naive", type=Path, nargs=2, metavar=("FILE", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.naive:
        sys.stdout.write(json.dumps(naive(*given.naive)))
        return
    for rows in given.rows:
        sizes = known_sizes(given.seed)
        sizes[rows] = with_ratios(sizes.get(rows, {}) | measure(rows, given.ways, given.seed))
        save("data_build", {"seed": given.seed, "sizes": [sizes[each] for each in sorted(sizes)]})


if __name__ == "__main__":
    main()
