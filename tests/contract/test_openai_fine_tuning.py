"""Files, uploads and fine-tuning jobs with the official client. The worker's part is played by the tests."""

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from adapters.jobs import JobFailure, JobStatus, NewEvent
from adapters.names import TunedName
from adapters.registry import Scope
from tests.contract.conftest import Served
from tests.factories import make_adapter, zip_folder

pytestmark = pytest.mark.slow  # the official client against a whole gateway

SCOPES = frozenset({Scope.INFERENCE, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE, Scope.JOBS})


def chat_line(answer: str) -> bytes:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}
    return json.dumps(row).encode() + b"\n"


CHAT = b"".join(chat_line(answer) for answer in "abc")
PAIR = (
    json.dumps(
        {
            "input": {"messages": [{"role": "user", "content": "Hi"}]},
            "preferred_output": [{"role": "assistant", "content": "Hello"}],
            "non_preferred_output": [{"role": "assistant", "content": "What?"}],
        }
    ).encode()
    + b"\n"
)


async def client_of(served: Served, tenant: str = "acme", scopes: frozenset[Scope] = SCOPES) -> openai.AsyncOpenAI:
    key = await served.gateway.key(tenant, scopes)
    return openai.AsyncOpenAI(base_url=served.url, api_key=key, max_retries=0, timeout=30)


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with await client_of(served) as made:
        yield made


async def training_file(client: openai.AsyncOpenAI, content: bytes = CHAT) -> str:
    return (await client.files.create(file=("rows.jsonl", content), purpose="fine-tune")).id


def base_of(served: Served) -> str:
    return served.gateway.services.base.name


def strict(model: type[Any], value: Any) -> None:
    """The client builds its objects without looking; here they are looked at."""
    model.model_validate(value.to_dict(mode="json"), strict=False)


# Files


async def test_a_file_is_uploaded_listed_read_and_deleted(client: openai.AsyncOpenAI) -> None:
    made = await client.files.create(
        file=("rows.jsonl", CHAT), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (made.filename, made.bytes, made.purpose, made.status) == ("rows.jsonl", len(CHAT), "fine-tune", "processed")
    assert made.expires_at == made.created_at + 3600
    assert (await client.files.retrieve(made.id)) == made
    assert (await client.files.content(made.id)).content == CHAT
    assert (await client.files.wait_for_processing(made.id)).id == made.id
    other = await client.files.create(file=("notes.txt", b"x"), purpose="user_data")
    assert [file.id async for file in client.files.list(limit=1)] == [other.id, made.id]
    assert [file.id async for file in client.files.list(order="asc")] == [made.id, other.id]
    assert [file.id async for file in client.files.list(purpose="fine-tune")] == [made.id]
    assert (await client.files.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        await client.files.content(made.id)
    assert gone.value.code == "file_not_found"


async def test_a_line_that_cannot_be_trained_on_is_named(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        await training_file(client, CHAT + b'{"messages": [{"role": "user"}]}\n')
    assert (wrong.value.code, wrong.value.param) == ("invalid_file", "file")
    assert "Line 4: messages[0].content is no text" in wrong.value.message
    assert [file async for file in client.files.list()] == []


@pytest.mark.parametrize(
    ("name", "purpose", "seconds", "param"),
    [
        ("rows.csv", "fine-tune", 3600, "file"),
        ("rows.jsonl", "assistants", 3600, "purpose"),
        ("rows.jsonl", "fine-tune", 60, "expires_after.seconds"),
    ],
)
async def test_what_a_file_may_not_be_is_told_by_parameter(
    client: openai.AsyncOpenAI, name: str, purpose: Any, seconds: int, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.files.create(
            file=(name, CHAT), purpose=purpose, expires_after={"anchor": "created_at", "seconds": seconds}
        )
    assert wrong.value.param == param


async def test_files_and_jobs_of_another_tenant_do_not_exist(served: Served, client: openai.AsyncOpenAI) -> None:
    file = await training_file(client)
    job = await client.fine_tuning.jobs.create(model=base_of(served), training_file=file)
    async with await client_of(served, "globex") as stranger:
        assert [one async for one in stranger.files.list()] == []
        assert [one async for one in stranger.fine_tuning.jobs.list()] == []
        looks: list[Awaitable[Any]] = [
            stranger.files.retrieve(file),
            stranger.files.content(file),
            stranger.files.delete(file),
            stranger.fine_tuning.jobs.retrieve(job.id),
            stranger.fine_tuning.jobs.cancel(job.id),
            stranger.fine_tuning.jobs.pause(job.id),
            stranger.fine_tuning.jobs.list_events(job.id),
            stranger.fine_tuning.jobs.checkpoints.list(job.id),
        ]
        for look in looks:
            with pytest.raises(openai.NotFoundError):
                await look
        with pytest.raises(openai.BadRequestError) as foreign:
            await stranger.fine_tuning.jobs.create(model=base_of(served), training_file=file)
        assert (foreign.value.param, foreign.value.code) == ("training_file", "file_not_found")


async def test_without_the_scope_jobs_there_are_no_files_and_no_jobs(served: Served) -> None:
    async with await client_of(served, scopes=SCOPES - {Scope.JOBS}) as client:
        for refused in (
            training_file(client),
            client.uploads.create(bytes=1, filename="a.jsonl", mime_type="text/plain", purpose="fine-tune"),
            client.fine_tuning.jobs.list(),
        ):
            with pytest.raises(openai.PermissionDeniedError):
                await refused


async def test_stored_files_count_towards_the_tenants_bytes(served: Served, client: openai.AsyncOpenAI) -> None:
    async with served.gateway.operator() as operator:
        stored = sum(one.size_bytes for one in served.gateway.services.directory.snapshot.versions.values())
        path = "/v1/organization/projects/acme/rate_limits/rl-project"
        answer = await operator.post(path, json={"max_stored_bytes": stored + len(CHAT), "max_queued_jobs": 3})
        assert answer.json()["max_queued_jobs"] == 3
    await training_file(client)
    with pytest.raises(openai.ConflictError) as full:
        await training_file(client)
    assert full.value.code == "room_used_up"


# Uploads in parts


async def test_parts_become_a_file_in_the_order_that_is_asked_for(client: openai.AsyncOpenAI) -> None:
    upload = await client.uploads.create(
        bytes=len(CHAT), filename="rows.jsonl", mime_type="application/jsonl", purpose="fine-tune"
    )
    half = len(CHAT) // 2
    second = await client.uploads.parts.create(upload.id, data=CHAT[half:])
    first = await client.uploads.parts.create(upload.id, data=CHAT[:half])
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5="0" * 32)
    assert wrong.value.param == "md5"
    md5 = hashlib.md5(CHAT, usedforsecurity=False).hexdigest()
    done = await client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5=md5)
    assert done.status == "completed"
    assert done.file is not None
    assert (await client.files.content(done.file.id)).content == CHAT
    again = await client.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert again.file == done.file
    assert len([file async for file in client.files.list()]) == 1


async def test_the_clients_own_chunking_works_and_a_cancelled_upload_leaves_nothing(
    client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(CHAT)
    done = await client.uploads.upload_file_chunked(
        file=tmp_path / "rows.jsonl", mime_type="application/jsonl", purpose="fine-tune", part_size=50
    )
    assert done.file is not None
    upload = await client.uploads.create(
        bytes=5, filename="rows.jsonl", mime_type="application/jsonl", purpose="fine-tune"
    )
    assert (await client.uploads.cancel(upload.id)).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        await client.uploads.parts.create(upload.id, data=b"x")


# Jobs


async def test_a_job_has_every_field_the_client_knows(served: Served, client: openai.AsyncOpenAI) -> None:
    train, held_out = await training_file(client), await training_file(client, chat_line("d"))
    job = await client.fine_tuning.jobs.create(
        model=base_of(served),
        training_file=train,
        validation_file=held_out,
        suffix="Support",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
    )
    strict(FineTuningJob, job)
    assert (job.status, job.seed, job.metadata, job.organization_id) == ("queued", 7, {"team": "a"}, "acme")
    assert (job.training_file, job.validation_file, job.fine_tuned_model) == (train, held_out, None)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
    assert job.method is not None
    assert job.method.supervised is not None
    assert (await client.fine_tuning.jobs.retrieve(job.id)) == job
    audit = [entry.action for entry in served.gateway.services.registry.audit(1)]
    assert audit == ["job.create"]


async def test_preference_pairs_and_the_older_place_of_hyperparameters_are_accepted(
    served: Served, client: openai.AsyncOpenAI
) -> None:
    pairs = await training_file(client, PAIR)
    job = await client.fine_tuning.jobs.create(
        model="support", training_file=pairs, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
    )
    strict(FineTuningJob, job)
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.2
    older = await client.fine_tuning.jobs.create(
        model=base_of(served), training_file=await training_file(client), hyperparameters={"n_epochs": 3}
    )
    assert older.hyperparameters.n_epochs == 3


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "nobody"}, "model"),
        ({"training_file": "file-0"}, "training_file"),
        ({"validation_file": "file-0"}, "validation_file"),
        ({"suffix": "two words"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": "dpo"}}, "training_file"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}},
            "method.supervised.hyperparameters.n_epochs",
        ),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ],
)
async def test_what_a_job_may_not_ask_for_is_told_by_parameter(
    served: Served, client: openai.AsyncOpenAI, change: Any, param: str
) -> None:
    asked = {"model": base_of(served), "training_file": await training_file(client), **change}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as wrong:
        await client.fine_tuning.jobs.create(**asked)
    assert wrong.value.param is not None
    assert wrong.value.param.startswith(param)


async def test_jobs_are_listed_page_by_page_and_by_metadata(served: Served, client: openai.AsyncOpenAI) -> None:
    file, ids = await training_file(client), []
    for metadata in ({"team": "a"}, {"team": "b"}, None):
        job = await client.fine_tuning.jobs.create(model=base_of(served), training_file=file, metadata=metadata)
        ids.append(job.id)
    jobs = client.fine_tuning.jobs
    assert [job.id async for job in jobs.list(limit=2)] == ids[::-1]
    assert [job.id async for job in jobs.list(metadata={"team": "b"})] == [ids[1]]
    assert [job.id async for job in jobs.list(extra_query={"metadata": "null"})] == [ids[2]]


async def test_a_job_is_paused_resumed_and_cancelled(served: Served, client: openai.AsyncOpenAI) -> None:
    jobs = client.fine_tuning.jobs
    job = await jobs.create(model=base_of(served), training_file=await training_file(client))
    paused = await jobs.pause(job.id)
    strict(FineTuningJob, paused)
    assert (paused.status, (paused.model_extra or {})["paused"]) == ("queued", True)
    assert ((await jobs.resume(job.id)).model_extra or {})["paused"] is False
    assert (await jobs.cancel(job.id)).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        await jobs.cancel(job.id)


async def test_a_repeated_creation_is_one_job(served: Served, client: openai.AsyncOpenAI) -> None:
    file = await training_file(client)
    ids = set()
    for _ in range(2):
        job = await client.fine_tuning.jobs.create(
            model=base_of(served), training_file=file, extra_headers={"Idempotency-Key": "once"}
        )
        ids.add(job.id)
    assert len(ids) == 1


async def test_a_tenant_with_too_many_jobs_waiting_is_told_not_to_retry(
    served: Served, client: openai.AsyncOpenAI
) -> None:
    async with served.gateway.operator() as operator:
        await operator.post("/v1/organization/projects/acme/rate_limits/rl-project", json={"max_queued_jobs": 1})
    file = await training_file(client)
    await client.fine_tuning.jobs.create(model=base_of(served), training_file=file)
    with pytest.raises(openai.RateLimitError) as full:
        await client.fine_tuning.jobs.create(model=base_of(served), training_file=file)
    assert full.value.code == "job_quota_exceeded"
    assert full.value.response.headers["x-should-retry"] == "false"


async def push(served: Served, folder: Path, tuned: TunedName, *, operator: bool = True) -> httpx.Response:
    """What a worker does with an adapter."""
    gateway = served.gateway
    client = gateway.operator(tuned.tenant) if operator else await gateway.client(tuned.tenant, SCOPES)
    async with client:
        return await client.post(
            "/v1/adapters?wait=true",
            data={"name": tuned.adapter, "model_name": str(tuned)},
            files={"file": ("a.zip", zip_folder(folder))},
        )


async def test_a_job_is_followed_to_a_model_that_answers(
    served: Served, client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    gateway, jobs = served.gateway, client.fine_tuning.jobs
    services = gateway.services
    job = await jobs.create(model=base_of(served), training_file=await training_file(client), suffix="topics")
    claimed = services.jobs.claim("worker")
    assert claimed is not None
    assert claimed.base == services.base.fingerprint.weights_digest
    services.jobs.report(job.id, "worker", progress={"phase": "validating"})
    assert (await jobs.retrieve(job.id)).status == "validating_files"
    steps = [NewEvent(f"step:{n}", f"Step {n}/4: loss=1.0", data={"step": n, "train_loss": 1.0}) for n in range(1, 5)]
    resolved = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
    services.jobs.report(job.id, "worker", progress={"phase": "training", "hyperparameters": resolved}, events=steps)
    running = await jobs.retrieve(job.id)
    strict(FineTuningJob, running)
    assert (running.status, running.hyperparameters.n_epochs) == ("running", 3)
    events = [event async for event in jobs.list_events(job.id, limit=2)]
    for event in events:
        strict(FineTuningJobEvent, event)
    assert [event.message for event in events][:2] == ["Step 4/4: loss=1.0", "Step 3/4: loss=1.0"]
    assert len(events) == 5

    name = TunedName.of_job(job.id, base=services.base.slug, tenant="acme", suffix="topics")
    checkpoint = TunedName.of_job(job.id, base=services.base.slug, tenant="acme", suffix="topics", step=2)
    early = make_adapter(tmp_path / "early", gateway.base, seed=1)
    assert (await push(served, early, checkpoint)).status_code == 201
    services.jobs.add_checkpoint(job.id, "worker", 2, model=str(checkpoint), metrics={"step": 2, "train_loss": 1.0})
    (listed,) = [one async for one in jobs.checkpoints.list(job.id)]
    strict(FineTuningJobCheckpoint, listed)
    assert (listed.fine_tuned_model_checkpoint, listed.step_number) == (str(checkpoint), 2)
    await answers(client, str(checkpoint))
    assert await model_ids(client) == [base_of(served), "support"]  # called by name alone, and not in production
    with pytest.raises(openai.NotFoundError):
        await answers(client, "topics")

    done = make_adapter(tmp_path / "done", gateway.base, seed=2)
    for status in (201, 200):  # a worker that was killed before it could say so pushes again
        assert (await push(served, done, name)).status_code == status
    services.jobs.finish(
        job.id, "worker", JobStatus.SUCCEEDED, result={"model": str(name), "trained_tokens": 99, "files": []}
    )
    finished = await jobs.retrieve(job.id)
    strict(FineTuningJob, finished)
    assert (finished.status, finished.fine_tuned_model, finished.trained_tokens) == ("succeeded", str(name), 99)
    assert await model_ids(client) == [base_of(served), "support", "topics", str(name)]
    await answers(client, str(name))
    await answers(client, "topics")
    assert (await client.models.retrieve(str(name))).id == str(name)
    async with await client_of(served, "globex") as stranger:
        with pytest.raises(openai.NotFoundError):
            await answers(stranger, str(name))
    assert (await client.models.delete(str(name))).deleted
    with pytest.raises(openai.NotFoundError):
        await answers(client, str(name))
    await answers(client, str(checkpoint))


async def answers(client: openai.AsyncOpenAI, model: str) -> None:
    answer = await client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}])
    assert answer.model == model
    assert answer.choices[0].message.content


async def model_ids(client: openai.AsyncOpenAI) -> list[str]:
    return [model.id async for model in client.models.list()]


async def test_only_workers_give_a_version_such_a_name(served: Served, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", served.gateway.base, seed=3)
    tuned = TunedName("tiny-llama", "acme", "topics", "01234567")
    assert (await push(served, folder, tuned, operator=False)).status_code == 403
    async with served.gateway.operator("acme") as operator:
        for name in ("ft:tiny-llama:globex:topics:01234567", "ft:tiny-llama:acme:other:01234567", "topics@3"):
            answer = await operator.post(
                "/v1/adapters",
                data={"name": "topics", "model_name": name},
                files={"file": ("a.zip", zip_folder(folder))},
            )
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model_name")


async def test_a_failed_job_tells_code_parameter_and_line(served: Served, client: openai.AsyncOpenAI) -> None:
    job = await client.fine_tuning.jobs.create(model=base_of(served), training_file=await training_file(client))
    jobs = served.gateway.services.jobs
    jobs.claim("worker")
    failure = JobFailure("invalid_training_file", "Line 2: too long", param="training_file", line=2)
    jobs.finish(job.id, "worker", JobStatus.FAILED, failure=failure)
    failed = await client.fine_tuning.jobs.retrieve(job.id)
    strict(FineTuningJob, failed)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.param, (failed.error.model_extra or {})["line"]) == (
        "invalid_training_file",
        "training_file",
        2,
    )
    events = [event async for event in client.fine_tuning.jobs.list_events(job.id)]
    assert (events[0].level, events[0].message) == ("error", "The job failed: Line 2: too long")
