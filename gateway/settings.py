"""Every setting an operator may turn: environment (LORIKEET_…) over `configs/gateway.yaml` over the defaults here."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from adapters.home import Home, home
from adapters.records import Limits
from adapters.wording import one_line

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MIB = 1024 * 1024


class WrongSettingError(Exception):
    """A setting that cannot be used. It is met before anything listens, so it never travels over HTTP."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class UploadSettings(_Section):
    """What an uploaded adapter may be before anybody looks inside."""

    max_bytes: int = Field(512 * MIB, gt=0, description="Largest upload accepted.")
    max_expanded_bytes: int = Field(1024 * MIB, gt=0, description="Largest sum of the files in an archive.")
    max_entries: int = Field(64, gt=0, description="Most files in an archive.")
    part_ttl_s: float = Field(3600, gt=0, description="Unfinished resumable uploads are dropped after this.")


class FileSettings(_Section):
    """What tenants may upload to train on."""

    max_bytes: int = Field(512 * MIB, gt=0, description="Largest file.")
    sweep_s: float = Field(60.0, gt=0, description="How often files that have expired are looked for.")


class RequestSettings(_Section):
    """What one generation may ask for."""

    max_body_bytes: int = Field(8 * MIB, gt=0, description="Largest request body.")
    default_max_tokens: int = Field(512, gt=0, description="Output cap when neither caller nor adapter names one.")
    max_choices: int = Field(32, gt=0, description="Largest `n`, times the prompts of a completion.")
    idle_s: float = Field(60.0, gt=0, description="Seconds without a byte from the engine before a stream is given up.")
    unread_s: float = Field(
        60.0,
        gt=0,
        description="Seconds a caller may leave its answer unread: it holds a place in the engine meanwhile.",
    )
    answer_s: float = Field(600.0, gt=0, description="Longest wait for an answer that is not streamed.")
    queue_s: float = Field(
        60.0, gt=0, description="Longest wait for an engine and a turn before the request is refused."
    )
    max_queue: int = Field(
        512, gt=0, description="Most requests waiting for a turn at one engine, all tenants together."
    )
    tenant_queue: int = Field(
        128, gt=0, description="Most of them of one tenant, so that no tenant's flood fills the queue for all."
    )
    patience_s: float = Field(
        3.0, gt=0, description="A request for a cold adapter that waited this long makes a busy LoRA slot drain for it."
    )
    spare_slots: int = Field(
        0,
        ge=0,
        description="LoRA slots kept for uploads that are tried. None: one drains for them where all are taken.",
    )


class LimitSettings(_Section):
    """What a tenant may use where no limit of its own was set, and how limits are kept. Empty: unlimited."""

    requests_per_minute: int | None = Field(None, gt=0, description="Generation requests of a tenant.")
    tokens_per_minute: int | None = Field(None, gt=0, description="Prompt and output tokens of a tenant.")
    max_in_flight: int = Field(64, gt=0, description="Requests a tenant may have open, at each gateway.")
    max_adapters: int | None = Field(None, gt=0, description="Adapters of a tenant.")
    max_stored_bytes: int | None = Field(None, gt=0, description="Sum of the versions and files a tenant keeps.")
    max_running_jobs: int | None = Field(1, gt=0, description="Fine-tuning jobs of a tenant that run at once.")
    max_queued_jobs: int | None = Field(20, gt=0, description="Fine-tuning jobs of a tenant that wait or are paused.")
    monthly_budget: float | None = Field(
        None, gt=0, description="What a tenant may spend in a month, in the currency of `usage.prices`."
    )
    observe_only: bool = Field(False, description="Refuse nothing; count and log what would have been refused.")
    redis_url: str | None = Field(
        None, description="redis://, rediss:// or unix:// location: all gateways then count together."
    )
    redis_timeout_s: float = Field(
        0.02,
        gt=0,
        description="Longest wait of a request for Redis. Until it answers again, each gateway counts for itself.",
    )
    gateways: int = Field(
        1, gt=0, description="Gateways that share the limits: each allows so many parts of them while Redis is away."
    )

    @property
    def of_tenants(self) -> Limits:
        """The defaults that hold across gateways."""
        return Limits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            max_adapters=self.max_adapters,
            max_stored_bytes=self.max_stored_bytes,
            max_running_jobs=self.max_running_jobs,
            max_queued_jobs=self.max_queued_jobs,
            monthly_budget=self.monthly_budget,
        )


class MetricsSettings(_Section):
    """What Prometheus is told, and who may ask."""

    key: SecretStr | None = Field(
        None,
        description="Bearer token for /metrics and /metrics/engines, beside operators' keys. Without it anybody may read them "
        "while the gateway listens on this machine only, and nobody but operators when it listens on more.",
    )
    max_adapters: int = Field(
        50, gt=0, description="Adapters with series of their own; later ones share the label `_other`."
    )
    max_tenants: int = Field(200, gt=0, description="The same of tenants.")
    engine_s: float = Field(2.0, gt=0, description="Longest wait for an engine's own metrics.")


class ResidencySettings(_Section):
    """How adapters come into and leave an engine."""

    retire_grace_s: float = Field(
        5.0, ge=0, description="An unused version that is no longer production is freed after this."
    )
    sweep_s: float = Field(2.0, gt=0, description="How often versions to free are looked for.")
    reconcile_s: float = Field(30.0, gt=0, description="How often the engine's own list is compared with ours.")
    stall_share: float = Field(
        0.2, gt=0, le=1, description="Largest share of time loads may stop the running streams; loads are paced to it."
    )


class FailureSettings(_Section):
    """What happens when an engine, or the gateway itself, goes away."""

    failovers: int = Field(
        1,
        ge=0,
        description="Engines that may end with a request in them, less one, before it is given up: it may be the cause.",
    )
    breaker_failures: int = Field(
        5, gt=0, description="Failures in a row after which an engine is not asked for a while."
    )
    breaker_open_s: float = Field(5.0, gt=0, description="That while, before one request at a time tries it again.")
    proof_s: float = Field(
        60.0,
        gt=0,
        description="Ready means that an engine gave an answer, the canary's or a caller's, at most so long ago.",
    )
    drain_s: float = Field(
        30.0, ge=0, description="Seconds that running answers get to end when the gateway is stopped."
    )


class CanarySettings(_Section):
    """The base-model prompt whose log-probabilities say whether the engine is sane."""

    interval_s: float = Field(15.0, gt=0, description="Seconds between two looks.")
    tolerance: float = Field(0.5, gt=0, description="Largest mean difference of log-probabilities, in nats.")
    failures: int = Field(2, gt=0, description="Failures in a row that restart the engine.")


class ProbeSettings(_Section):
    """The activation probe: replayed goldens, or default prompts for adapters without a manifest."""

    tolerance: float = Field(
        0.25,
        gt=0,
        description="Largest mean difference from the manifest's log-probabilities, in nats: bfloat16 serving against the "
        "trainer's arithmetic measures about 0.01 to 0.05, a halved scale several tenths.",
    )
    min_effect: float = Field(
        0.005,
        gt=0,
        description="Smallest mean difference from the base's log-probabilities, in nats, that counts as effect.",
    )
    goldens: int = Field(8, gt=0, description="Most goldens replayed.")
    timeout_s: float = Field(60.0, gt=0, description="Longest wait for the engine's answer to one prompt.")
    stall_share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="Largest share of time a probe may take of an engine that serves; 1: without a pause.",
    )


class Price(_Section):
    """Of a million tokens, in `usage.currency`."""

    input: float = Field(0.0, ge=0, description="Of the prompt.")
    cached: float | None = Field(None, ge=0, description="Of the prompt, found in the cache; None: as `input`.")
    output: float = Field(0.0, ge=0, description="Of the answer.")


class UsageSettings(_Section):
    """The ledger of generation requests, and what tokens cost."""

    flush_s: float = Field(0.5, gt=0, description="Rows are on disk after this, and outlive a kill.")
    refresh_s: float = Field(
        10.0, gt=0, description="How often what was spent this month is read again: other gateways' share is as old."
    )
    keep_days: float | None = Field(
        90.0, ge=1, description="Rows of single requests are deleted after this; totals never. None: kept."
    )
    memory_rows: int = Field(
        50_000, gt=0, description="Rows kept in memory while the disk takes none; the oldest beyond it are lost."
    )
    currency: str = Field("usd", pattern="^[a-z]{3}$", description="Of every price and cost.")
    prices: Price = Field(Price(), description="What tokens cost. A change holds for requests from then on.")
    adapter_prices: dict[str, Price] = Field(
        {}, description="Prices of single models, by `owner/adapter` or the base model's name, in place of `prices`."
    )


class Settings(BaseSettings):
    """LORIKEET_REQUESTS__MAX_QUEUE=64 sets requests.max_queue. Raises WrongSettingError, naming every wrong one."""

    model_config = SettingsConfigDict(
        env_prefix="LORIKEET_",
        env_nested_delimiter="__",
        env_ignore_empty=True,  # `LORIKEET_HOME= lorikeet …` must not mean the current folder
        frozen=True,
        extra="ignore",
        yaml_file=CONFIGS / "gateway.yaml",
    )

    data: Path = Field(
        default_factory=lambda: home().root, validation_alias="LORIKEET_HOME", description="The data folder."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes any that is free.")
    base: str = Field("smollm2-135m-instruct", description="Base model: a file of configs/bases, a path, or a hub id.")
    engine: str = Field("auto", description="Engine profile: a file of configs/engines, a path, or `auto`.")
    engines: int = Field(1, gt=0, description="Engines of that profile; on GPUs each has a device of its own.")
    database_url: str | None = Field(None, description="SQLAlchemy URL; SQLite in the data folder when empty.")
    blob_url: str | None = Field(
        None, description="s3://, gs:// or az:// location; a folder in the data folder when empty."
    )
    promotion_policy: Path = Field(
        CONFIGS / "promotion.yaml", description="When a version may go into production; see adapters/promotion.py."
    )
    refresh_s: float = Field(0.25, gt=0, description="How often the registry's change counter is read.")
    traces_endpoint: str | None = Field(
        None,
        pattern="^https?://",
        description="OpenTelemetry collector, OTLP over HTTP: http://host:4318. OTEL_EXPORTER_OTLP_ENDPOINT when empty; where "
        "neither is set nothing is traced.",
    )
    log_level: str = Field(
        "INFO", pattern="(?i)^(debug|info|warning|error|critical)$", description="What is logged: this and graver."
    )
    uploads: UploadSettings = UploadSettings()
    files: FileSettings = FileSettings()
    requests: RequestSettings = RequestSettings()
    limits: LimitSettings = LimitSettings()
    residency: ResidencySettings = ResidencySettings()
    failure: FailureSettings = FailureSettings()
    canary: CanarySettings = CanarySettings()
    probe: ProbeSettings = ProbeSettings()
    usage: UsageSettings = UsageSettings()
    metrics: MetricsSettings = MetricsSettings()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except (ValidationError, SettingsError, yaml.YAMLError) as exc:
            raise WrongSettingError(
                f"A setting cannot be used: {one_line(exc)}. Look at LORIKEET_… in the environment and at "
                f"{CONFIGS / 'gateway.yaml'}."
            ) from exc

    @property
    def home(self) -> Home:
        return Home(self.data.expanduser().absolute())

    @property
    def registry_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home.database}"

    @property
    def blob_location(self) -> str | Path:
        return self.blob_url or self.home.blobs

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)
