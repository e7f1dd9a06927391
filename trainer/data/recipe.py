"""What to build a data set from and how: the configuration of `lorikeet data build`."""

from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trainer.data.card import DataFormat, Part, TeacherCard

RowFormat = Literal["chat", "sharegpt", "alpaca", "prompt-completion", "preference", "text"]

# What Presidio's patterns find without a language model. Names of people are not among them.
PersonalKind = Literal["EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "US_SSN", "IP_ADDRESS"]
KINDS: tuple[PersonalKind, ...] = get_args(PersonalKind)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceConfig(_Frozen):
    """Rows of one origin: a file, a folder or a pattern of files, or a data set known by name."""

    name: str = Field("", description="As reports call it. Default: the file's or the data set's name.")
    path: Path | None = Field(None, description="File, folder or glob pattern; relative to the configuration file.")
    dataset: str | None = Field(None, description="Instead of a path: a name that `lorikeet data list` shows.")
    part: Part = Field("train", description="Which part of a known data set.")
    format: RowFormat | Literal["auto"] = Field("auto", description="auto: recognised row by row.")
    licence: str | None = Field(None, description="Terms, best as SPDX id. A known data set brings its own.")
    exceptions: dict[str, str] = Field(default_factory=dict, description="Parts under other terms: part -> licence.")
    teacher: TeacherCard | None = Field(None, description="The model that wrote the answers, and its licence.")
    system: str | None = Field(None, description="System message for rows that bring none.")
    limit: int | None = Field(None, gt=0, description="Read no more than so many rows.")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either `path` or `dataset`")
        return self

    @property
    def title(self) -> str:
        return self.name or self.dataset or (self.path.name if self.path else "")


class LengthConfig(_Frozen):
    """Characters of the last answer; of chosen and rejected alike; of a text."""

    min_chars: int = Field(20, ge=1, description="A task of one-word labels needs 1.")
    max_chars: int = Field(8000, ge=1, description="Longer texts are cut at paragraph ends instead.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_chars < self.min_chars:
            raise ValueError("max_chars is less than min_chars")
        return self


class QualityConfig(_Frozen):
    """Rules a row has to pass. A share of 1 or a count of 0 switches its rule off."""

    max_repetition: float = Field(0.8, gt=0, le=1, description="Share of words of an answer that came before in it.")
    min_letters: float = Field(0.25, ge=0, le=1, description="Share of letters and digits in what an answer shows.")
    max_broken_chars: int = Field(0, ge=0, description="Replacement characters and mangled UTF-8 a row may hold.")
    refuse_echo: bool = Field(True, description="An answer that only repeats the last message.")
    refuse_phrases: tuple[str, ...] = Field(
        ("lorem ipsum", "as an ai language model"),
        description="An answer with one of these is refused; case is ignored.",
    )


class PrivacyConfig(_Frozen):
    """Personal data, found by pattern and check digit. Names of people and addresses are not found."""

    action: Literal["redact", "reject", "off"] = Field(
        "redact", description="redact: replaced by its kind, such as <EMAIL_ADDRESS>."
    )
    kinds: tuple[PersonalKind, ...] = Field(KINDS, min_length=1)
    regions: tuple[str, ...] = Field(
        ("US", "GB", "DE", "FR", "IN", "BR"), description="Countries whose national telephone numbers are known."
    )
    min_score: float = Field(0.4, ge=0, le=1, description="Presidio's confidence from which on a finding counts.")

    @field_validator("action", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        """YAML reads a bare off as false."""
        return "off" if value is False else value


class DuplicateConfig(_Frozen):
    exact: bool = Field(True, description="Drop rows equal but for case, spaces and punctuation.")
    near: bool = Field(True, description="Drop near duplicates too; else they only stay on one side of the split.")
    similarity: float = Field(
        0.8, ge=0.5, le=1, description="Jaccard similarity of three-word shingles from which on two rows are near."
    )


class BenchmarkConfig(_Frozen):
    """Questions the adapter will be judged by: no training row may hold them."""

    name: str = ""
    path: Path | None = Field(None, description="JSONL, JSON, CSV, parquet or text; every text in a row counts.")
    dataset: str | None = None
    part: Part = "eval"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either `path` or `dataset`")
        return self

    @property
    def title(self) -> str:
        return self.name or self.dataset or (self.path.name if self.path else "")


class BalanceConfig(_Frozen):
    """The training rows against production: classes, and lengths where rows of production are given."""

    label: str | None = Field(None, description="Field of the source rows with the class. Default: the answer.")
    production: dict[str, float] | Path = Field(
        description="Class -> share or count in production; or a file of production's rows, in any format read here."
    )
    tolerance: float = Field(0.1, ge=0, le=1, description="Total variation distance that passes without a warning.")
    action: Literal["warn", "resample"] = Field(
        "warn", description="resample: rows of classes that are too frequent are left out by seed."
    )

    @model_validator(mode="after")
    def _a_distribution(self) -> Self:
        given = self.production
        if isinstance(given, dict) and (any(share < 0 for share in given.values()) or sum(given.values()) <= 0):
            raise ValueError("production: shares must not be negative, and not all zero")
        return self


class AgreementConfig(_Frozen):
    """How far annotators agreed."""

    fields: tuple[str, ...] = Field(min_length=2, description="Fields of the source rows, one for each annotator.")
    warn_below: float = Field(0.9, ge=0, le=1, description="Raw agreement of any two of them.")


class GeneralConfig(_Frozen):
    """General data mixed in, against forgetting."""

    share: float = Field(gt=0, lt=1, description="Of the training rows. 0.1 to 0.3 is usual.")
    sources: tuple[SourceConfig, ...] = Field(min_length=1)


class SplitConfig(_Frozen):
    """How much is held out. Rows with the same or nearly the same prompt never stand on both sides."""

    eval_share: float = Field(0.1, gt=0, lt=1)
    eval_rows: int = Field(2000, gt=0, description="No more than so many.")


class BuildConfig(_Frozen):
    """One data set."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    format: DataFormat = "chat"
    seed: int = 0
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    evaluation: tuple[SourceConfig, ...] = Field(
        (), description="Rows held out by their publisher; else a part of the sources is, by seed."
    )
    general: GeneralConfig | None = None
    length: LengthConfig = LengthConfig()
    quality: QualityConfig = QualityConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    decontaminate: tuple[BenchmarkConfig, ...] = ()
    balance: BalanceConfig | None = None
    agreement: AgreementConfig | None = None
    split: SplitConfig = SplitConfig()
    base: str | None = Field(
        "smollm2-135m-instruct",
        description="Base model whose template renders the rows: token counts, mask receipt. null: none of these.",
    )
    chat_template: str | None = Field(None, description="Template served instead of the base's.")
    system_prompt: str | None = Field(None, description="As serving.system_prompt of the training: for the receipt.")
    allow_licence: str | None = Field(None, description="Why the data may be used though its licences block it.")
    processes: int | None = Field(None, ge=1, description="Default: one for each core.")

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Held-out rows first, so that of two equal rows the training row goes; general rows last."""
        return (*self.evaluation, *self.sources, *(self.general.sources if self.general else ()))
