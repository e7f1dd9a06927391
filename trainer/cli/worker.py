"""`lorikeet worker`: train what was asked for over the API."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from adapters.home import home
from trainer.cli.common import DEFAULT_PORT, HELP, JsonOption, out, print_json

worker_app = typer.Typer(add_completion=False, context_settings=HELP)
FACTS = ("job", "tenant", "attempt", "status", "reason")


class WithFacts(logging.Formatter):
    """The line, and what it is about."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        facts = [f"{name}={vars(record)[name]}" for name in FACTS if name in vars(record)]
        return " ".join([super().formatMessage(record), *facts])


@worker_app.command()
def worker(
    once: Annotated[bool, typer.Option("--once", help="End when no job waits any more.")] = False,
    gateway: Annotated[
        str | None,
        typer.Option(
            envvar="LORIKEET_URL",
            show_default="this machine's",
            help="The gateway that serves what is trained.",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="An operator's key. Default: the one a gateway on this machine wrote, then LORIKEET_API_KEY.",
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(envvar="LORIKEET_BASE", help="Base model, as the gateway has it. Jobs for others are left.")
    ] = "smollm2-135m-instruct",
    engine_profile: Annotated[
        str, typer.Option(envvar="LORIKEET_ENGINE", help="Engine profile that is to serve what is trained.")
    ] = "auto",
    recipes: Annotated[
        Path | None,
        typer.Option(help="How jobs are trained, and what `auto` means.", show_default="configs/jobs.yaml"),
    ] = None,
    max_running_jobs: Annotated[
        int,
        typer.Option(
            envvar="LORIKEET_LIMITS__MAX_RUNNING_JOBS", min=1, help="Of tenants without a limit of their own."
        ),
    ] = 1,
    lease_s: Annotated[
        float, typer.Option(min=1, help="A worker that is silent for so long has lost its job to the next.")
    ] = 60,
    poll_s: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks for a job.")] = 2,
    max_attempts: Annotated[
        int, typer.Option(min=1, help="Workers that a job may outlive without getting any further.")
    ] = 5,
    as_json: JsonOption = False,
) -> None:
    """Train the fine-tuning jobs of the API, one after another, and bring the results to the gateway.

    Runs where the gateway's data folder is (LORIKEET_HOME, or LORIKEET_DATABASE_URL and LORIKEET_BLOB_URL); start as many as
    the machine has room for. Ctrl-C or SIGTERM: ends at the next checkpoint, the second time at once. However it ends, the
    next worker goes on from the last checkpoint.
    """
    from adapters.blobs import BlobStore
    from adapters.database import open_database
    from adapters.files import Files, open_file_blobs
    from adapters.jobs import Jobs
    from adapters.records import Limits
    from adapters.registry import Registry
    from trainer.plan import resolve_base
    from trainer.publishing import Publisher
    from trainer.recipe import RECIPES
    from trainer.running_job import Services, WorkerSettings
    from trainer.worker import Worker, follow_signals

    handler = logging.StreamHandler()
    handler.setFormatter(WithFacts("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    place = home().create()
    url = gateway or f"http://127.0.0.1:{os.environ.get('LORIKEET_PORT', DEFAULT_PORT)}"
    database = open_database(os.environ.get("LORIKEET_DATABASE_URL") or f"sqlite:///{place.database}")
    location: str | Path = os.environ.get("LORIKEET_BLOB_URL") or place.blobs
    services = Services(
        home=place,
        registry=Registry(database, secret=b""),
        jobs=Jobs(
            database,
            default_limits=Limits(max_running_jobs=max_running_jobs),
            lease_s=lease_s,
            max_attempts=max_attempts,
        ),
        files=Files(database, open_file_blobs(location)),
        blobs=BlobStore.open(location),
        publisher=Publisher(url, lambda: key or place.operator_key_for(url) or os.environ.get("LORIKEET_API_KEY")),
    )
    folder, _ = resolve_base(base, place)
    settings = WorkerSettings(base=base, engine=engine_profile, recipes=recipes or RECIPES, poll_s=poll_s)
    working = Worker(services, settings, folder)
    follow_signals(working)
    ended = working.run(once=once)
    if as_json:
        print_json({"worker": working.id, "ended": ended})
    else:
        out.print(f"{ended} jobs brought to an end.", highlight=False)
