"""Resumable uploads on disk."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.home import Home
from gateway.errors import BodyTooLargeError, InvalidRequestError, UploadNotFoundError
from gateway.settings import UploadSettings
from gateway.uploads import MAX_OPEN, Upload, Uploads


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def uploads(tmp_path: Path, clock: Clock) -> Uploads:
    return Uploads(Home(tmp_path), UploadSettings(max_bytes=1000), clock=clock)


async def begin(uploads: Uploads, size_bytes: int, tenant: str = "acme") -> Upload:
    return await uploads.create(
        tenant, filename="adapter.zip", bytes=size_bytes, mime_type="application/zip", purpose="adapter"
    )


async def send(uploads: Uploads, upload: Upload, data: bytes) -> str:
    async with uploads.receiving(upload.tenant, upload.id) as folder:
        (folder / "data").write_bytes(data)
        return await uploads.add_part(upload.tenant, upload.id, folder / "data")


async def test_parts_come_together_in_the_order_that_is_asked_for(uploads: Uploads) -> None:
    upload = await begin(uploads, 6)
    second, first = await send(uploads, upload, b"def"), await send(uploads, upload, b"abc")
    md5 = hashlib.md5(b"abcdef", usedforsecurity=False).hexdigest()
    done = await uploads.complete("acme", upload.id, [first, second], md5=md5)
    assert done.status == "completed"
    assert (await uploads.file("acme", upload.id)).read_bytes() == b"abcdef"


@settings(max_examples=20)
@given(pieces=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8))
async def test_any_cut_gives_the_same_file(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    uploads = Uploads(Home(tmp_path_factory.mktemp("home")), UploadSettings())
    upload = await begin(uploads, sum(map(len, pieces)))
    ids = [await send(uploads, upload, piece) for piece in pieces]
    await uploads.complete("acme", upload.id, ids)
    assert (await uploads.file("acme", upload.id)).read_bytes() == b"".join(pieces)


async def test_an_upload_goes_on_after_a_restart(uploads: Uploads, tmp_path: Path, clock: Clock) -> None:
    upload = await begin(uploads, 6)
    first = await send(uploads, upload, b"abc")
    again = Uploads(Home(tmp_path), UploadSettings(), clock=clock)
    second = await send(again, upload, b"def")
    await again.complete("acme", upload.id, [first, second])
    assert (await again.file("acme", upload.id)).read_bytes() == b"abcdef"


async def test_completing_twice_is_completing_once(uploads: Uploads) -> None:
    upload = await begin(uploads, 3)
    part = await send(uploads, upload, b"abc")
    assert await uploads.complete("acme", upload.id, [part]) == await uploads.complete("acme", upload.id, [part])


@pytest.mark.parametrize("parts", [["part_" + "0" * 24], ["../../etc/passwd"], ["upload.json"], [""]])
async def test_unknown_parts_are_refused_whatever_their_name(uploads: Uploads, parts: list[str]) -> None:
    upload = await begin(uploads, 3)
    with pytest.raises(InvalidRequestError, match="no part"):
        await uploads.complete("acme", upload.id, parts)


async def test_a_sum_other_than_announced_and_a_wrong_md5_are_refused_and_can_be_mended(uploads: Uploads) -> None:
    upload = await begin(uploads, 6)
    first = await send(uploads, upload, b"abc")
    with pytest.raises(InvalidRequestError, match="3 bytes; 6"):
        await uploads.complete("acme", upload.id, [first])
    with pytest.raises(InvalidRequestError, match="md5"):
        await uploads.complete("acme", upload.id, [first, first], md5="0" * 32)
    assert (await uploads.complete("acme", upload.id, [first, first])).status == "completed"


async def test_limits_hold_before_anything_is_kept(uploads: Uploads) -> None:
    with pytest.raises(BodyTooLargeError):
        await begin(uploads, 1001)
    upload = await begin(uploads, 3)
    with pytest.raises(BodyTooLargeError):
        await send(uploads, upload, b"more than twice")


async def test_one_tenant_cannot_open_uploads_without_end(uploads: Uploads) -> None:
    for _ in range(MAX_OPEN):
        upload = await begin(uploads, 3)
    with pytest.raises(InvalidRequestError, match="Cancel one"):
        await begin(uploads, 3)
    await begin(uploads, 3, tenant="globex")
    await uploads.cancel("acme", upload.id)
    await begin(uploads, 3)


@pytest.mark.parametrize("upload_id", ["upload_" + "0" * 24, "../acme", "", "upload_../../x"])
async def test_unknown_uploads_are_not_found(uploads: Uploads, upload_id: str) -> None:
    with pytest.raises(UploadNotFoundError):
        await uploads.file("acme", upload_id)


async def test_another_tenants_upload_does_not_exist(uploads: Uploads) -> None:
    upload = await begin(uploads, 3)
    with pytest.raises(UploadNotFoundError):
        await uploads.cancel("globex", upload.id)


async def test_a_cancelled_and_an_expired_upload_leave_nothing(uploads: Uploads, tmp_path: Path, clock: Clock) -> None:
    cancelled, expired = await begin(uploads, 3), await begin(uploads, 3)
    await send(uploads, expired, b"abc")
    await uploads.cancel("acme", cancelled.id)
    clock.now_s += 3601
    with pytest.raises(UploadNotFoundError):
        await uploads.complete("acme", expired.id, [])
    uploads.sweep()
    assert list((tmp_path / "uploads").iterdir()) == []


async def test_an_unfinished_upload_is_no_file(uploads: Uploads) -> None:
    upload = await begin(uploads, 3)
    with pytest.raises(InvalidRequestError, match="not complete"):
        await uploads.file("acme", upload.id)


async def test_a_folder_that_goes_while_it_is_swept_ends_no_sweep(
    uploads: Uploads, tmp_path: Path, clock: Clock
) -> None:
    upload = await begin(uploads, 3)
    (tmp_path / "uploads" / "upload_gone").symlink_to(tmp_path / "nowhere")  # listed, but not there
    clock.now_s += 1e6
    uploads.sweep()
    assert not (tmp_path / "uploads" / upload.id).exists()
