"""`lorikeet eval`: what a served adapter is worth."""

import asyncio
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from adapters.home import home
from trainer.cli.common import (
    DEFAULT_PORT,
    HELP,
    JsonOption,
    SetOption,
    err,
    fetch_known,
    operator_key,
    out,
    print_json,
    spinner,
)
from trainer.cli.sheet import sheet_app
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from adapters.evaluations import JudgeCalibration
    from trainer.evaluation.client import ChatClient
    from trainer.evaluation.compare import Evaluation, Subject
    from trainer.evaluation.config import EvalConfig
    from trainer.evaluation.judge import JudgeConfig
    from trainer.evaluation.judging import Judgement
    from trainer.evaluation.probes import ProbeResult
    from trainer.evaluation.served import Pinned

RUN = "run"


class DefaultGroup(TyperGroup):
    """`lorikeet eval CONFIG --model M` is `lorikeet eval run CONFIG --model M`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in HELP["help_option_names"]:
            args = [RUN, *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(cls=DefaultGroup, add_completion=False, no_args_is_help=True, context_settings=HELP)
eval_app.add_typer(sheet_app, name="sheet")

UrlOption = Annotated[str | None, typer.Option(envvar="LORIKEET_URL", help="The gateway. Default: this machine's.")]
KeyOption = Annotated[str | None, typer.Option(envvar="LORIKEET_API_KEY", help="Default: this machine's operator key.")]
TenantOption = Annotated[
    str | None, typer.Option(help="Act for this tenant, with an operator's key. Default: the only one there is.")
]


@dataclass(frozen=True)
class Access:
    """Which gateway, and who asks."""

    url: str
    key: str
    tenant: str | None

    def client(self, timeout_s: float) -> "ChatClient":
        from trainer.evaluation.client import ChatClient

        return ChatClient(self.url, self.key, tenant=self.tenant, timeout_s=timeout_s)


def access(url: str | None, key: str | None, tenant: str | None) -> Access:
    """Raises ConfigError where there is no key."""
    address = url or f"http://127.0.0.1:{os.environ.get('LORIKEET_PORT') or DEFAULT_PORT}"
    if key is None:
        from adapters.stored import only_tenant

        key, tenant = operator_key(address), tenant or only_tenant()
    return Access(address, key, tenant)


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:>22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err
    )


@eval_app.callback()
def evaluation() -> None:
    """Score a served adapter against its base, plain and few-shot: lorikeet eval CONFIG --model NAME

    The words before CONFIG may be left out: `lorikeet eval reuters-topics --model topics` is `lorikeet eval run …`, whose
    options `lorikeet eval run --help` tells.
    """


@eval_app.command(RUN)
def evaluate(
    config: Annotated[str, typer.Argument(help="YAML file, or a shipped name such as reuters-topics.")],
    model: Annotated[
        str, typer.Option(help="As it is served: support, support@2, or a checkpoint's name while a job runs.")
    ],
    against: Annotated[
        str,
        typer.Option(help="Baselines, by commas: base, few-shot, predecessor (found in the registry), or support@1."),
    ] = "base,few-shot",
    predecessor: Annotated[str | None, typer.Option(help="Another version to compare with: support@1.")] = None,
    base: Annotated[str | None, typer.Option(help="The base's served name. Default: the adapter's own.")] = None,
    probes: Annotated[
        str | None,
        typer.Option(help="What it may have broken, by commas: golden, forgetting, adversarial, harmful …; or none."),
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness on local data: mmlu, hellaswag, gsm8k.")
    ] = None,
    harness_python: Annotated[
        str, typer.Option(help="The Python that has lm-eval installed.", show_default=False)
    ] = sys.executable,
    judge: Annotated[
        Path | None, typer.Option(help="YAML of a judging model (url, model, rubric, prices); costs money.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What `lorikeet eval calibrate` wrote; without it the judge does not gate.")
    ] = None,
    attach: Annotated[
        bool, typer.Option("--attach", help="Store the scores with the served version, and ask the gate.")
    ] = False,
    url: UrlOption = None,
    key: KeyOption = None,
    tenant: TenantOption = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Fewer or more rows than the configuration says.")] = None,
    overrides: SetOption = None,
    manifest: Annotated[
        Path | None, typer.Option("--write-manifest", metavar="FOLDER", help="Adapter folder to write the scores into.")
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", help="JSON of every answer; the page goes beside it. Default: LORIKEET_HOME/runs/eval-NAME-TIME/."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a served adapter against its base, plain and few-shot, through the gateway.

    The same rows and the same server for all, so what is judged is what users get; every figure has its interval, and the
    difference to each rival is tested for chance, row by row. Leaves report.html, report.json and a sheet of answers to read.
    """
    from trainer.config import find_config, load_config
    from trainer.evaluation import report
    from trainer.evaluation.compare import load_rows, parse_rivals
    from trainer.evaluation.config import EvalConfig
    from trainer.evaluation.page import render_page
    from trainer.evaluation.sheet import choose_entries, write_sheet

    rivals = parse_rivals(against)
    who = access(url, key, tenant)
    path = find_config(config, "eval")
    settings = load_config(path, EvalConfig, [*(overrides or ()), *([f"rows={rows}"] if rows else [])])
    schema = settings.schema_for(path.parent)
    judging, calibrated = load_judge(settings, judge, calibration)
    wanted = settings.probes if probes is None else [] if probes == "none" else names_in(probes)
    with spinner() as tell:

        def fetch(name: str) -> Path:
            return fetch_known(name, tell)

        chosen, examples = load_rows(settings, relative_to=path.parent, fetch=fetch)
        from trainer.evaluation.probes import load_probe

        asked = [load_probe(name, relative_to=path.parent, fetch=fetch) for name in wanted]
        tasks = harness_tasks(names_in(harness or ""), fetch)

    async def run() -> tuple[report.Findings, "Pinned | None"]:
        from trainer.evaluation.compare import evaluate, subjects_for
        from trainer.evaluation.served import find_predecessor, pin

        with progress_bar() as bar:
            async with who.client(settings.timeout_s) as client:
                pinned = await pin(client, model) if attach else None
                served = pinned.model if pinned else model
                before = predecessor or rivals.predecessor
                if before == "":
                    before = await find_predecessor(client, served)
                subjects = await subjects_for(
                    client,
                    served,
                    base=base,
                    predecessor=before,
                    examples=examples if rivals.few_shot else [],
                    plain=rivals.base,
                )
                bars = {one.name: bar.add_task(one.name, total=len(chosen)) for one in subjects}
                found = await evaluate(
                    settings, client, subjects, chosen, schema=schema, advance=lambda name: bar.advance(bars[name])
                )
                broken = await ask_probes(client, asked, subjects, found, base=base, bar=bar)
                judgement = await ask_judge(judging, found, bar) if judging else None
        broken += await asyncio.to_thread(ask_harness, tasks, subjects, who, settings, harness_python)
        return report.Findings(found, tuple(broken), judgement, calibrated), pinned

    findings, pinned = asyncio.run(run())
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = home().runs / f"eval-{settings.name}-{stamp}"
    written = report.write_document(findings, out_file or folder / "report.json")
    document = report.read_document(written)
    if manifest is not None:
        report.add_to_manifest(findings, manifest)
    gate = asyncio.run(attach_findings(who, pinned, findings, written)) if pinned else None
    verdict = report.verdict(findings.evaluation)
    page = written.with_suffix(".html")
    page.write_text(render_page(document, verdict=verdict, gate=gate), encoding="utf-8")
    sheet: Path | None = None
    if settings.sheet and out_file is None:
        sheet = write_sheet(choose_entries(document, settings.sheet, seed=settings.seed), folder)
    if as_json:
        files = {"file": str(written), "page": str(page), "sheet": str(sheet) if sheet else None}
        print_json(document | files | ({"gate": gate, "version": pinned.model} if pinned else {}))
        return
    tell_findings(findings, verdict)
    if gate is not None and pinned is not None:
        tell_gate(gate, pinned.model)
    out.print(f"Report:  {page}\nAnswers: {written}", soft_wrap=True, highlight=False)
    if sheet is not None:
        out.print(f"To read: {sheet}", soft_wrap=True, highlight=False)


@eval_app.command("attach")
def attach_report(
    report_file: Annotated[Path, typer.Argument(metavar="REPORT", help="report.json that `lorikeet eval` wrote.")],
    model: Annotated[str | None, typer.Option(help="NAME@VERSION. Default: the report's.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store the scores of an earlier evaluation with the served version they are of, and ask the gate."""
    from adapters.evaluations import Evaluation
    from adapters.names import parse_reference
    from trainer.evaluation.report import digest_of, read_document, scores_from
    from trainer.evaluation.served import attach, pin

    document = read_document(report_file)
    named = model or document["model"]
    reference = parse_reference(named)
    if reference is None or reference.version is None:
        raise ConfigError(
            f"The report is of '{named}', which may be another version by now. Say which: --model NAME@VERSION"
        )

    async def run() -> dict[str, Any]:
        async with access(url, key, tenant).client(60.0) as client:
            pinned = await pin(client, named)
            evaluation = Evaluation(
                model=pinned.model,
                digest=pinned.digest,
                scores=scores_from(document),
                report_sha256=digest_of(report_file),
            )
            return await attach(client, pinned, evaluation)

    gate = asyncio.run(run())
    if as_json:
        print_json(gate)
    else:
        tell_gate(gate, named)


@eval_app.command("calibrate")
def calibrate_judge(
    judge: Annotated[Path, typer.Argument(help="YAML of the judging model.")],
    labels: Annotated[
        Path,
        typer.Argument(help="JSONL: messages, and first, second, human; or given, human; or a marked sheet."),
    ],
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Default: LORIKEET_HOME/judges/MODEL-RUBRIC.json.")
    ] = None,
    policy_file: Annotated[
        Path | None, typer.Option("--policy", help="Whose bar it has to reach. Default: configs/promotion.yaml.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Does a judging model judge as people do? It may gate only if so. Exit code 1 where it may not."""
    from adapters.promotion import judge_faults, load_policy
    from trainer.config import CONFIGS, load_config
    from trainer.evaluation.judge import JudgeConfig
    from trainer.evaluation.judging import calibrate, read_labels

    settings = load_config(judge, JudgeConfig)
    rows = read_labels(labels)
    policy = load_policy(policy_file or CONFIGS / "promotion.yaml").judge

    async def run() -> tuple[Any, list[tuple[str, str]], Any]:
        with progress_bar() as bar:
            bar_task = bar.add_task("judging", total=sum(2 if row.second is not None else 1 for row in rows))
            async with judge_client(settings) as client:
                asked = open_judge(settings, client)
                found, compared = await calibrate(asked, rows, lambda: bar.advance(bar_task))
                return found, compared, asked.spent

    found, compared, spent = asyncio.run(run())
    faults = judge_faults(found, policy)
    rubric = found.rubric_sha256[:8]
    path = out_file or home().root / "judges" / f"{settings.model.replace('/', '-')}-{rubric}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if as_json:
        counts = [{"human": one, "judge": other} for one, other in compared]
        print_json(
            found.model_dump() | {"may_gate": not faults, "faults": faults, "compared": counts, "file": str(path)}
        )
    else:
        out.print(
            f"{found.judge} and people agree in {100 * found.agreement:.1f} % of {found.labels} judgements "
            f"(kappa {found.kappa:.2f}); the order decided in {100 * found.position_flips:.1f} % of the pairs."
        )
        out.print(f"Cost {spent.cost:.4f} for {spent.asked} requests; {spent.kept} answers were known.")
        for fault in faults:
            out.print(f"[red]It may not gate:[/red] {escape(fault)}.", soft_wrap=True)
        out.print(f"Calibration: {path}", soft_wrap=True, highlight=False)
    if faults:
        raise typer.Exit(1)


def names_in(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def load_judge(
    settings: "EvalConfig", file: Path | None, calibration: Path | None
) -> tuple["JudgeConfig | None", "JudgeCalibration | None"]:
    """Raises ConfigError, EvaluationError where they do not belong together."""
    from adapters.evaluations import JudgeCalibration
    from trainer.config import load_config
    from trainer.evaluation.judge import JudgeConfig
    from trainer.evaluation.judging import fitting

    judging = load_config(file, JudgeConfig) if file is not None else settings.judge
    if calibration is None:
        return judging, None
    if judging is None:
        raise ConfigError("--calibration is of a judge: name one with --judge.")
    try:
        found = JudgeCalibration.model_validate_json(calibration.read_bytes())
    except ValueError as exc:
        raise ConfigError(f"{calibration} is no calibration. Make one: lorikeet eval calibrate") from exc
    return judging, fitting(found, judging)


def judge_client(settings: "JudgeConfig") -> "ChatClient":
    from trainer.evaluation.client import ChatClient

    return ChatClient(settings.url, settings.key(), timeout_s=settings.timeout_s)


def open_judge(settings: "JudgeConfig", client: "ChatClient") -> Any:
    from trainer.evaluation.judge import Judge

    return Judge(settings, client, home().root / "judges" / "answers.jsonl")


async def ask_probes(
    client: "ChatClient",
    asked: list[Any],
    subjects: "list[Subject]",
    found: "Evaluation",
    *,
    base: str | None,
    bar: Progress,
) -> "list[ProbeResult]":
    from trainer.errors import EvaluationError
    from trainer.evaluation.probes import run_probe

    if asked and not any(subject.name == "base" for subject in subjects):
        raise EvaluationError("A probe compares with the base: name it in --against, or leave --probes out.")
    results = []
    for probe, rows in asked:
        task: TaskID = bar.add_task(probe.name, total=None)
        results.append(
            await run_probe(probe, rows, client, subjects, found, step=lambda task=task: bar.advance(task))  # type: ignore[misc]
        )
        bar.update(task, total=bar.tasks[task].completed)
    return results


async def ask_judge(settings: "JudgeConfig", found: "Evaluation", bar: Progress) -> "Judgement":
    from trainer.evaluation.judging import judge_evaluation, requests_needed

    task = bar.add_task("judge", total=requests_needed(settings, found))
    async with judge_client(settings) as client:
        return await judge_evaluation(open_judge(settings, client), found, lambda: bar.advance(task))


def harness_tasks(names: list[str], fetch: Any) -> list[Any]:
    """Raises ConfigError for what is no data set of questions."""
    from trainer.data.catalog import load_dataset_spec
    from trainer.data.chat import read_rows
    from trainer.evaluation.harness import HarnessTask

    found = []
    for name in names:
        if load_dataset_spec(name).converter not in ("mmlu", "hellaswag", "gsm8k"):
            raise ConfigError(f"'{name}' has no questions with short answers. There are: mmlu, hellaswag, gsm8k.")
        number = name == "gsm8k"
        rows = read_rows(fetch(name) / "eval.jsonl")[:200]
        found.append(HarnessTask(name, rows, "number" if number else "letter", 256 if number else 16))
    return found


def ask_harness(
    tasks: list[Any], subjects: "list[Subject]", who: Access, settings: "EvalConfig", python: str
) -> "list[ProbeResult]":
    from trainer.evaluation.harness import as_probe, run_harness

    if not tasks:
        return []
    right = {
        subject.name: run_harness(
            tasks,
            url=who.url,
            key=who.key,
            model=subject.model,
            tenant=who.tenant,
            concurrency=settings.concurrency,
            python=python,
        )
        for subject in subjects
        if not subject.examples
    }
    return [as_probe(task.name, {name: found[task.name] for name, found in right.items()}) for task in tasks]


async def attach_findings(who: Access, pinned: "Pinned", findings: Any, written: Path) -> dict[str, Any]:
    from adapters.evaluations import Evaluation
    from trainer.evaluation.report import digest_of
    from trainer.evaluation.served import attach

    evaluation = Evaluation(
        model=pinned.model,
        digest=pinned.digest,
        scores=findings.scores(),
        judge=findings.calibration,
        report_sha256=digest_of(written),
    )
    async with who.client(60.0) as client:
        return await attach(client, pinned, evaluation)


def tell_findings(findings: Any, verdict: str) -> None:
    from trainer.evaluation import report

    out.print(report.samples_table(findings.evaluation))
    out.print(report.metrics_table(findings.evaluation))
    if findings.probes:
        out.print(report.probes_table(findings.probes))
    for probe in findings.probes:
        if probe.red:
            out.print(f"[red]Red:[/red] {probe.name}: more than 5 % lost against the base, and not by chance.")
    if findings.judgement is not None and findings.judgement.win_rate is not None:
        rate, spent = findings.judgement.win_rate, findings.judgement.spent
        out.print(
            f"The judge prefers it in {100 * rate.value:.0f} % of the pairs ({100 * rate.low:.0f}…{100 * rate.high:.0f}); "
            f"cost {spent.cost:.4f} for {spent.asked} requests, {spent.kept} answers were known.",
            soft_wrap=True,
        )
    out.print(verdict, soft_wrap=True)


def tell_gate(gate: dict[str, Any], model: str) -> None:
    if gate["allowed"]:
        out.print(f"[green]The gate lets {model} pass:[/green] lorikeet promote {model}", soft_wrap=True)
    else:
        out.print(f"[red]The gate refuses {model}:[/red]")
        for reason in gate["reasons"]:
            out.print(f"  {escape(reason)}", soft_wrap=True, highlight=False)
