"""Files that tenants upload to train on: looked at line by line, then kept."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from adapters.files import Files, StoredFile
from adapters.peft_format import file_digest
from adapters.training_files import check_training_file
from gateway.errors import InvalidRequestError

logger = logging.getLogger(__name__)

FINE_TUNE = "fine-tune"
PURPOSES = (FINE_TUNE, "evals", "user_data")  # of OpenAI's, what something here is done with
CHECKS = 2  # at a time: each parses its whole file
MAX_NAME = 255
EXPIRES_S = (3600, 30 * 86400)  # shortest and longest life that may be asked for; OpenAI's


@dataclass(frozen=True)
class NewFile:
    """What its owner says of a file."""

    filename: str
    purpose: str
    expires_after_s: int | None = None

    def checked(self) -> "NewFile":
        """Itself. Raises InvalidRequestError."""
        if self.purpose not in PURPOSES:
            raise InvalidRequestError(
                f"'{self.purpose}' is no purpose that is served here. There are: {', '.join(PURPOSES)}.",
                param="purpose",
            )
        if not 0 < len(self.filename) <= MAX_NAME:
            raise InvalidRequestError(f"The file needs a name of 1 to {MAX_NAME} characters.", param="file")
        if self.purpose == FINE_TUNE and not self.filename.endswith(".jsonl"):
            raise InvalidRequestError(
                f"'{self.filename}' is no .jsonl file, which is what can be trained on.",
                param="file",
                code="invalid_file",
            )
        if self.expires_after_s is not None and not EXPIRES_S[0] <= self.expires_after_s <= EXPIRES_S[1]:
            raise InvalidRequestError(
                f"A file may expire {EXPIRES_S[0]:,} to {EXPIRES_S[1]:,} seconds after it was created.",
                param="expires_after.seconds",
            )
        return self


class Intake:
    """The way in for files, and their end."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._checking = asyncio.Semaphore(CHECKS)

    async def keep(self, tenant: str, path: Path, new: NewFile, *, actor: str) -> StoredFile:
        """Check the file and store it. Raises InvalidFileError with the line, RoomError, BlobError."""
        async with self._checking:
            facts = await asyncio.to_thread(check_training_file, path) if new.purpose == FINE_TUNE else None
            digest = await asyncio.to_thread(file_digest, path)

        def create() -> StoredFile:
            return self.files.create(
                tenant,
                path,
                filename=new.filename,
                purpose=new.purpose,
                digest=digest,
                facts=facts,
                expires_after_s=new.expires_after_s,
                actor=actor,
            )

        return await asyncio.to_thread(create)

    async def file(self, tenant: str, file_id: str) -> StoredFile:
        """Raises StoredFileNotFoundError."""
        return await asyncio.to_thread(self.files.file, file_id, tenant=tenant)

    async def run(self, every_s: float) -> None:
        """Delete what has expired, for ever."""
        while True:
            try:
                await asyncio.to_thread(self.files.sweep)
            except Exception:
                logger.exception("expired files stay")
            await asyncio.sleep(every_s)
