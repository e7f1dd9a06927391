"""What is left of a merged model in fewer bits: size, time, likeness to the checkpoint, and the task's own score.

    python -m benchmarks.quantize [ADAPTER --data DATASET_FOLDER]

ADAPTER is a trained adapter's folder (default: the one that benchmarks.forms has left), the
folder its data set. The adapter is merged; every scheme and type is made by `lorikeet quantize` and `lorikeet export gguf`,
which measure parity; then each is loaded by what will serve it, vLLM or llama.cpp, and asked the data set's evaluation rows.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adapters.environments import make_environment
from adapters.gguf_export import GGUF_TOOLS, TYPES
from adapters.home import home
from benchmarks.common import lorikeet, save

ANSWER_TOKENS = 8
ACCEPTED = "measured"
WAYS = {  # name -> arguments of `lorikeet quantize`; rows: calibrated on the training data
    "w8a8": ("w8a8", 0),
    "w8a8, GPTQ": ("w8a8", 64),
    "fp8": ("fp8", 0),
    "int8-weight-only": ("int8-weight-only", 0),
    "w4a16, GPTQ": ("w4a16", 64),
}


def questions(checkpoint: Path, data: Path, rows: int) -> tuple[list[list[int]], list[str]]:
    """Prompts in token ids and the answers wanted, of the first evaluation rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    prompts, wanted = [], []
    for line in (data / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:rows]:
        *asked, answer = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        wanted.append(answer["content"].strip())
    return prompts, wanted


def ask_vllm(checkpoint: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """In a process of its own: loaded by vLLM, asked greedily."""
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "benchmarks.quantize", "--vllm", str(checkpoint)]
    done = subprocess.run(
        command, env=environment, input=json.dumps(prompts), capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": " | ".join(done.stderr.strip().splitlines()[-3:])[-400:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def answer_in_vllm(checkpoint: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = json.load(sys.stdin)
    started = time.monotonic()
    engine = LLM(
        checkpoint, enforce_eager=True, max_model_len=2048, kv_cache_memory_bytes=128 << 20, disable_log_stats=True
    )
    loaded_s = time.monotonic() - started
    started = time.monotonic()
    answers = engine.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in prompts],
        SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS),
        use_tqdm=False,
    )
    found = [{"text": one.outputs[0].text, "stopped": one.outputs[0].finish_reason == "stop"} for one in answers]
    document = {"loaded_s": loaded_s, "asked_s": time.monotonic() - started, "answers": found}
    sys.stdout.write(json.dumps(document) + "\n")


def ask_llama_cpp(file: Path, prompts: list[list[int]], scratch: Path) -> dict[str, Any]:
    asked = {
        "model": str(file),
        "prompts": prompts,
        "max_tokens": ANSWER_TOKENS,
        "context": 2048,
        "threads": os.cpu_count(),
        "out": str(scratch / "answers.json"),
    }
    started = time.monotonic()
    make_environment(GGUF_TOOLS, home().tools).run("ask_gguf.py", [json.dumps(asked)])
    answers = json.loads((scratch / "answers.json").read_text(encoding="utf-8"))
    found = [{"text": one["text"], "stopped": one["finish_reason"] == "stop"} for one in answers]
    return {"asked_s": time.monotonic() - started, "answers": found}


def judged(answered: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
    """Exact match and stop rate in place of the answers."""
    answers = answered.pop("answers", None)
    if answers is None:
        return answered
    right = sum(one["text"].strip() == answer for one, answer in zip(answers, wanted, strict=True))
    return answered | {
        "rows": len(wanted),
        "exact_match": right / len(wanted),
        "stop_rate": sum(one["stopped"] for one in answers) / len(wanted),
    }


def table(forms: dict[str, Any]) -> Table:
    """As docs/benchmarks.md shows it."""
    shown = Table(title="KL in nats a token; stopped: greedy answers that end by themselves")
    for column in ("form", "MB", "made in", "KL goldens", "KL sample", "same first choice", "stopped", "exact match"):
        shown.add_column(column)
    for name, form in forms.items():
        rung = form.get("rung") or {}
        figures = [rung.get(where) or {} for where in ("goldens", "sample")]
        served = form.get("served", {})
        shown.add_row(
            name,
            f"{form['size_bytes'] / 1e6:.0f}",
            f"{form['took_s']:.0f} s" if "took_s" in form else "",
            *(f"{one['kl']:.1e}" if one else "" for one in figures),
            " / ".join(f"{one['top1']:.1%}" for one in figures if one),
            f"{served['stop_rate']:.0%}" if "stop_rate" in served else served.get("error", "")[:40],
            f"{served['exact_match']:.0%}" if "exact_match" in served else "",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", type=Path, default=home().root / "forms" / "trained")
    parser.add_argument("--data", type=Path, default=home().datasets / "reuters-r8")
    parser.add_argument("--rows", type=int, default=100, help="evaluation rows to ask")
    parser.add_argument(
        "--only", nargs="+", choices=[*WAYS, *TYPES], default=[*WAYS, *TYPES], help="of schemes and types"
    )
    parser.add_argument("--vllm", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.vllm:
        answer_in_vllm(asked.vllm)
        return
    console = Console()
    forms: dict[str, Any] = {}
    command = f"python -m benchmarks.quantize {asked.adapter.name} --data {asked.data.name} --rows {asked.rows}"
    if asked.only != [*WAYS, *TYPES]:
        command += f" --only {shlex.join(asked.only)}"

    def keep(name: str, form: dict[str, Any]) -> Path:
        """What was measured is kept at once: all of it takes an hour."""
        console.print(name, form["served"])
        forms[name] = form
        return save("quantize", {"command": command, "forms": forms})

    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        merged = scratch / "merged"
        lorikeet("merge", str(asked.adapter), "--out", str(merged))
        prompts, wanted = questions(merged, asked.data, asked.rows)
        size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
        path = keep("merged, bfloat16", {"size_bytes": size, "served": judged(ask_vllm(merged, prompts), wanted)})
        common = ["--adapter", str(asked.adapter), "--accept", ACCEPTED]
        for name, (scheme, rows) in WAYS.items():
            if name not in asked.only:
                continue
            out = scratch / name.replace(", ", "-")
            data = ["--data", str(asked.data), "--rows", str(rows)] if rows else []
            sample = [] if rows else ["--prompts", str(asked.data / "eval.jsonl")]
            made = lorikeet("quantize", str(merged), "--scheme", scheme, "--out", str(out), *data, *sample, *common)
            path = keep(name, _plain(made) | {"served": judged(ask_vllm(out, prompts), wanted)})
        for kind in TYPES:
            if kind not in asked.only:
                continue
            file = scratch / f"{kind}.gguf"
            sample = ["--prompts", str(asked.data / "eval.jsonl")]
            made = lorikeet("export", "gguf", str(merged), "--type", kind, "--out", str(file), *sample, *common)
            path = keep(
                f"GGUF {kind}", _plain(made) | {"served": judged(ask_llama_cpp(file, prompts, scratch), wanted)}
            )
            file.unlink()
    console.print(table(forms), f"Raw figures: {path}")


def _plain(made: dict[str, Any]) -> dict[str, Any]:
    """Without the places it lay at."""
    return {name: value for name, value in made.items() if name != "out"}


if __name__ == "__main__":
    main()
