"""Which version answers to a name, and where a rollback goes. Pure: the registry stores what is decided here."""

from dataclasses import dataclass

from adapters.errors import ConflictError

KEPT_FORMER = 32  # how many rollbacks back a name remembers


@dataclass(frozen=True)
class Alias:
    """The production version of one name, and those that were it before (the latest last)."""

    production: int | None = None
    former: tuple[int, ...] = ()

    @property
    def previous(self) -> int | None:
        return self.former[-1] if self.former else None

    def promoted(self, version: int) -> "Alias":
        """Promoting what is in production already changes nothing, so that a retried request is harmless."""
        if version == self.production:
            return self
        former = self.former if self.production is None else (*self.former, self.production)
        return Alias(version, former[-KEPT_FORMER:])

    def rolled_back(self) -> "Alias":
        """Raises ConflictError when nothing was in production before."""
        if self.previous is None:
            raise ConflictError("There is no earlier production version to roll back to. Promote a version by number.")
        return Alias(self.previous, self.former[:-1])

    def without(self, version: int) -> "Alias":
        """The alias once `version` is gone, never with the same version twice in a row."""
        production = None if self.production == version else self.production
        kept: list[int] = []
        for earlier in self.former:
            if earlier != version and kept[-1:] != [earlier]:
                kept.append(earlier)
        if kept and kept[-1] == production:
            kept.pop()
        return Alias(production, tuple(kept))
