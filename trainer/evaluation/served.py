"""The registry as an evaluation sees it, over HTTP: which version a name stands for, and where a result is attached."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from adapters.evaluations import Evaluation
from adapters.names import parse_reference
from trainer.errors import EvaluationError
from trainer.evaluation.client import ChatClient


@dataclass(frozen=True)
class Pinned:
    """One version of an own adapter."""

    name: str
    version: int
    digest: str

    @property
    def model(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def path(self) -> str:
        return f"/v1/adapters/{quote(self.name, safe='')}/versions/{self.version}"


async def pin(client: ChatClient, model: str) -> Pinned:
    """The version a name stands for now, so that all rows are answered by the same. Raises EvaluationError."""
    reference = parse_reference(model)
    if reference is None:
        raise EvaluationError(
            f"'{model}' is no adapter of the registry; a result can be attached to NAME@VERSION only."
        )
    version = reference.version
    if version is None:
        version = (await client.get(f"/v1/adapters/{quote(reference.name, safe='')}"))["production"]
        if version is None:
            raise EvaluationError(f"Nothing is in production under '{model}'. Name a version: {model}@1")
    found = await client.get(f"/v1/adapters/{quote(reference.name, safe='')}/versions/{version}")
    return Pinned(reference.name, int(version), str(found["digest"]))


async def find_predecessor(client: ChatClient, model: str) -> str:
    """What is in production where the model is another version; what was before where it is in production itself.

    Raises EvaluationError where there is none.
    """
    pinned = await pin(client, model)
    adapter = await client.get(f"/v1/adapters/{quote(pinned.name, safe='')}")
    before = adapter["production"] if adapter["production"] != pinned.version else adapter["previous"]
    if before is None:
        raise EvaluationError(f"'{model}' has no predecessor. Leave it out of --against.")
    return f"{pinned.name}@{before}"


async def attach(client: ChatClient, pinned: Pinned, evaluation: Evaluation) -> dict[str, Any]:
    """Store the evaluation with the version; answers with what the gate says of it now. Raises EvaluationError."""
    await client.post(f"{pinned.path}/evaluations", evaluation.model_dump(mode="json", exclude_none=True))
    return dict(await client.get(f"{pinned.path}/gate"))
