"""Everything that can go wrong with an adapter, as one tree. Only the gateway knows what each means in HTTP.

AdapterError
├── InvalidAdapterError      an upload that must not reach an engine; carries every fault found
├── ArchiveError             an archive that cannot be unpacked safely (a single fault, found before anything else)
├── NotFoundError
│   ├── AdapterNotFoundError     no such adapter, or not the caller's to see
│   ├── VersionNotFoundError
│   ├── TenantNotFoundError
│   ├── KeyNotFoundError
│   ├── DeploymentNotFoundError  the version has no engine of its own
│   ├── StoredFileNotFoundError  no such file of the tenant, or it has expired
│   └── JobNotFoundError         no such fine-tuning job of the tenant
├── InvalidNameError         a name outside the grammar of `adapters.names`
├── InvalidLimitError        a limit that its subject cannot have, or that is no limit
├── InvalidScopesError       a key with neither a tenant nor the scope admin, or with both
├── InvalidValueError        a value the database cannot hold, such as a NUL character
├── InvalidFileError         a file that cannot be trained on; carries the line
├── JobQuotaError            the tenant has as many jobs waiting as it may
├── ConflictError            the state of the registry forbids the change (name taken, no version to roll back to …)
│   └── RoomError                the tenant's adapters or stored bytes are used up
├── GateRefusedError         a promotion the policy does not allow; carries its reasons
├── BaseModelError           a base model folder that cannot be read, prepared or served
├── BlobError                stored bytes are missing or do not match their digest
├── MergeError               an adapter that cannot be merged
│   ├── ParityError          a merge whose result is not equal to base + adapter
│   └── QuantizeError        a checkpoint that cannot be quantized or exported
├── ToolError                a tool in an environment of its own could not be installed, or failed
└── DatabaseError            the registry's database is unreachable or at another schema
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Fault:
    """One thing wrong with an upload, said so that its owner can mend it."""

    code: str  # stable, snake_case, for programs
    message: str
    where: str  # file, tensor or configuration field
    fix: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class AdapterError(Exception):
    """Root of the tree. The message is written for the person who made the request."""


class InvalidAdapterError(AdapterError):
    """An adapter that must not reach an engine. `faults` holds every fault that was found, never only the first."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        shown = "; ".join(fault.message for fault in self.faults[:3])
        more = f" (and {len(self.faults) - 3} more)" if len(self.faults) > 3 else ""
        super().__init__(f"The adapter cannot be served: {shown}{more}")


class ArchiveError(InvalidAdapterError):
    """The archive cannot be unpacked safely, so nothing behind it was looked at."""

    def __init__(self, fault: Fault) -> None:
        super().__init__([fault])


class NotFoundError(AdapterError):
    """Something named does not exist, or may not be seen by whoever asks."""


class AdapterNotFoundError(NotFoundError):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"The model '{name}' does not exist or you do not have access to it.")


class VersionNotFoundError(NotFoundError):
    def __init__(self, name: str, version: int) -> None:
        super().__init__(f"'{name}' has no version {version}.")


class TenantNotFoundError(NotFoundError):
    def __init__(self, name: str) -> None:
        super().__init__(f"There is no tenant '{name}'. Create it with: lorikeet tenants create {name}")


class KeyNotFoundError(NotFoundError):
    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no API key '{key_id}'.")


class DeploymentNotFoundError(NotFoundError):
    def __init__(self, name: str, version: int) -> None:
        super().__init__(
            f"'{name}@{version}' has no engine of its own. Give it one with: lorikeet deploy {name}@{version} --merged"
        )


class StoredFileNotFoundError(NotFoundError):
    def __init__(self, file_id: str) -> None:
        super().__init__(f"There is no file '{file_id}', or it has expired.")


class JobNotFoundError(NotFoundError):
    def __init__(self, job_id: str) -> None:
        super().__init__(f"There is no job '{job_id}'.")


class InvalidFileError(AdapterError):
    """A file that cannot be trained on. line: the first wrong one, counted from 1; 0 for the file as a whole."""

    def __init__(self, line: int, fault: str) -> None:
        self.line = line
        super().__init__(f"Line {line}: {fault}" if line else fault)


class JobQuotaError(AdapterError):
    def __init__(self, tenant: str, most: int) -> None:
        super().__init__(
            f"The tenant '{tenant}' may have {most} jobs waiting, and has. Cancel one, or wait for one to start."
        )


class InvalidNameError(AdapterError):
    pass


class InvalidLimitError(AdapterError):
    pass


class InvalidScopesError(AdapterError):
    pass


class InvalidValueError(AdapterError):
    pass


class ConflictError(AdapterError):
    pass


class RoomError(ConflictError):
    """A tenant may not keep more."""


class GateRefusedError(AdapterError):
    """The promotion policy says no."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("Promotion refused: " + "; ".join(self.reasons))


class BaseModelError(AdapterError):
    pass


class BlobError(AdapterError):
    pass


class MergeError(AdapterError):
    pass


class ParityError(MergeError):
    pass


class QuantizeError(MergeError):
    pass


class ToolError(AdapterError):
    pass


class DatabaseError(AdapterError):
    pass
