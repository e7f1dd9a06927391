"""Names: what a tenant or an adapter may be called, and how a version is written and sent to the engine."""

import re
from dataclasses import dataclass

from adapters.errors import InvalidNameError

NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
_REFERENCE = re.compile(r"(?:(?P<tenant>[^/@]+)/)?(?P<name>[^/@]+)(?:@(?P<version>[1-9][0-9]{0,8}))?")

_TUNED = re.compile(
    r"ft:(?P<base>[^:]+):(?P<tenant>[^:]+):(?P<suffix>[^:]*):(?P<id>[a-z0-9]{8})(?::ckpt-step-(?P<step>[1-9][0-9]{0,8}))?"
)


def check_name(name: str, *, what: str = "adapter") -> str:
    """The name itself. Raises InvalidNameError when it is outside the grammar."""
    if not NAME.fullmatch(name) or ".." in name:
        raise InvalidNameError(
            f"'{name}' is not a valid {what} name: use 1 to 63 lower-case letters, digits, '.', '_' or '-', "
            "beginning and ending with a letter or digit."
        )
    return name


@dataclass(frozen=True)
class Reference:
    """What a caller wrote as `model`: an adapter, maybe another tenant's, maybe one version of it."""

    name: str
    tenant: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        owner = f"{self.tenant}/" if self.tenant else ""
        return f"{owner}{self.name}" + (f"@{self.version}" if self.version else "")


def parse_reference(text: str) -> Reference | None:
    """`support`, `support@3`, `acme/support`, `acme/support@3`; None for anything else, which no adapter can be called."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        return None
    tenant, name, version = match["tenant"], match["name"], match["version"]
    if not NAME.fullmatch(name) or (tenant is not None and not NAME.fullmatch(tenant)):
        return None
    return Reference(name, tenant, int(version) if version else None)


@dataclass(frozen=True)
class TunedName:
    """What a fine-tuning job's result, or one of its checkpoints, is called: `ft:<base>:<tenant>:<suffix>:<id>`.

    The form is OpenAI's; a checkpoint's ends with `:ckpt-step-<step>`. It names one version for good.
    """

    base: str  # the base model's slug
    tenant: str
    suffix: str  # empty where the job has none
    id: str  # eight letters and digits of the job's own id
    step: int | None = None  # of a checkpoint

    def __str__(self) -> str:
        checkpoint = f":ckpt-step-{self.step}" if self.step is not None else ""
        return f"ft:{self.base}:{self.tenant}:{self.suffix}:{self.id}{checkpoint}"

    @classmethod
    def of_job(cls, job_id: str, *, base: str, tenant: str, suffix: str, step: int | None = None) -> "TunedName":
        """job_id: `ftjob-` and hex digits."""
        return cls(base, tenant, suffix, job_id.removeprefix("ftjob-")[:8], step)

    @property
    def adapter(self) -> str:
        """The adapter whose versions the job's results are: its suffix, so that an alias may move to them."""
        return self.suffix or f"ft-{self.id}"


def parse_tuned_name(text: str) -> TunedName | None:
    match = _TUNED.fullmatch(text)
    if match is None:
        return None
    base, tenant, suffix = match["base"], match["tenant"], match["suffix"]
    if not all(NAME.fullmatch(part) for part in (base, tenant, suffix or tenant)):
        return None
    return TunedName(base, tenant, suffix, match["id"], int(match["step"]) if match["step"] else None)


def engine_name(tenant: str, name: str, version: int, digest: str) -> str:
    """The name one version has inside every engine, never used twice: `acme/support@3-9f2c41d0`.

    digest: hex sha256 of the version's content.
    """
    return f"{tenant}/{name}@{version}-{digest[:8]}"
