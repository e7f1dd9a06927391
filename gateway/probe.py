"""The activation probe: does an adapter, on a real engine, do what its manifest says, or anything sane at all?

Judging is pure. Scoring asks the engine for the log-probabilities of fixed tokens (teacher-forced), of the base model first,
so that an engine that is itself damaged is never held against the adapter.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import orjson

from adapters.errors import Fault
from adapters.manifest import MANIFEST_FILE, Golden
from gateway.engines.protocol import Engine
from gateway.errors import EngineAnswerError, EngineStalledError, EngineUnavailableError
from gateway.settings import ProbeSettings

# For adapters without goldens: different enough that any trained adapter moves some of them.
PROMPTS = (
    "What is the capital of France? The capital of France is Paris, a city on the river Seine.",
    'Reply with JSON only: {"name": "Ada Lovelace", "born": 1815, "topics": ["mathematics", "poetry"]}',
    "Dear team, the quarterly profit rose by 12 percent to 3.4 million dollars, the company said on Tuesday.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # prints 5",
)
NOT_JSON = "JSON compliant"  # vLLM's 400 for NaN and infinite log-probabilities
MASKED = -9999.0  # what vLLM writes for minus infinity
# A trained rank-8 adapter measured 0.99 of its effect and a deviation of 0.19 of it; at half its scale 0.67 and 0.56.
SCALE_SLACK = 0.2  # how far from 1 the strength may be, beside what noise explains
EFFECT_SHARE = 0.45  # largest deviation, as a share of the trained effect
NOISE_FACTOR = 4.0  # of the base's own deviation: the adapter's arithmetic is noisier than the base's
MAX_GOLDEN_TOKENS = 1024  # prompt and answer: the engine holds a row of the vocabulary's size for each
LEAST_LOGPROB = -1e4

Logprobs = Sequence[float]


@dataclass(frozen=True)
class ProbeResult:
    """Ready when there is no fault. `numbers` is kept with the version."""

    faults: tuple[Fault, ...]
    numbers: dict[str, Any]


async def probe_adapter(
    engine: Engine,
    name: str,
    *,
    base_model: str,
    goldens: Sequence[Golden],
    settings: ProbeSettings,
    template: str | None = None,
    around: Callable[[str], AbstractAsyncContextManager[None]] = lambda model: nullcontext(),
) -> ProbeResult:
    """Ask the engine about the loaded adapter `name` and about its base, and judge the answers.

    template: the adapter's own chat template, where it does not use the base's. around: entered for each prompt, with the
    model that is asked.
    Raises EngineError when the engine cannot be asked, or answers nonsense for the base itself: no verdict on the adapter.
    """
    goldens = [golden for golden in goldens if _tokens(golden) <= MAX_GOLDEN_TOKENS][: settings.goldens]
    if template is not None:
        fault = await template_fault(engine, name, template, goldens, timeout_s=settings.timeout_s)
        if fault is not None:
            return ProbeResult((fault,), {})
    prompts: list[str | list[int]] = [
        golden.prompt_token_ids + golden.completion_token_ids for golden in goldens
    ] or list(PROMPTS)

    async def ask(model: str) -> list[list[float]]:
        scores = []
        for prompt in prompts:
            async with around(model):
                scores.append(await score(engine, model, prompt, timeout_s=settings.timeout_s))
        return scores

    try:
        base = await ask(base_model)
    except EngineAnswerError as exc:
        if not goldens or exc.status != 400:
            raise
        fix = "Keep goldens within the served context, with token ids of the base's own tokenizer."
        return ProbeResult((_fault("invalid_goldens", f"The engine cannot read a golden: {exc}", fix),), {})
    if not all(map(math.isfinite, _flat(base))):
        raise EngineUnavailableError(
            f"Engine '{engine.id}' answers nonsense for the base model; nothing can be probed."
        )
    adapter = await ask(name)
    if not goldens:
        return judge_effect(_flat(adapter), _flat(base), min_effect=settings.min_effect)
    cut = [len(golden.completion_token_ids) for golden in goldens]
    return judge_goldens(
        _flat([row[-n:] for row, n in zip(adapter, cut, strict=True)]),
        _flat([row[-n:] for row, n in zip(base, cut, strict=True)]),
        goldens,
        settings=settings,
    )


async def template_fault(
    engine: Engine, name: str, template: str, goldens: Sequence[Golden], *, timeout_s: float
) -> Fault | None:
    """What is wrong with an adapter's own chat template: the engine must render each golden as the trainer did.

    Raises EngineUnavailableError, EngineStalledError.
    """
    where = f"{MANIFEST_FILE}:serving.chat_template"
    conversations = [golden.messages for golden in goldens] or [[{"role": "user", "content": PROMPTS[0]}]]
    for number, messages in enumerate(conversations):
        body = {"model": name, "messages": messages, "chat_template": template}
        status, raw = await _ask(engine, "/tokenize", body, timeout_s=timeout_s)
        if status != 200:
            message = (
                f"The engine cannot render a conversation with the adapter's chat template: {_refusal(status, raw)}"
            )
            return Fault("invalid_template", message, where, "Try the template with transformers' apply_chat_template.")
        if goldens and orjson.loads(raw)["tokens"] != goldens[number].prompt_token_ids:
            message = (
                f"With the adapter's chat template golden {number + 1} becomes other tokens here than in training."
            )
            fix = "Train with this template (serving.chat_template), or leave it out to be served with the base's."
            return Fault("template_mismatch", message, where, fix)
    return None


def judge_effect(adapter: Logprobs, base: Logprobs, *, min_effect: float) -> ProbeResult:
    """Finite, and different from the base on the same engine: all that can be asked without goldens."""
    numbers: dict[str, Any] = {"method": "prompts", "tokens": len(adapter), "min_effect": min_effect}
    if (refused := _not_finite(adapter, numbers)) is not None:
        return refused
    effect = numbers["effect"] = _mean_difference(adapter, base)
    return ProbeResult(tuple(_effect_faults(effect, min_effect)), numbers)


def judge_goldens(
    served: Logprobs, served_base: Logprobs, goldens: Sequence[Golden], *, settings: ProbeSettings
) -> ProbeResult:
    """Compare what is served with what was trained, token by token over all goldens.

    The deviation is measured against the tolerance and against the trained effect itself, so that a weak adapter cannot be
    wrong within a tolerance made for strong ones; what the base alone deviates tells the noise. The strength of the effect is
    the least-squares s in served − served base ≈ s · (golden − golden base): 1 as trained, 0 without effect.
    """
    wanted = [value for golden in goldens for value in golden.logprobs]
    wanted_base = [value for golden in goldens for value in golden.base_logprobs]
    numbers: dict[str, Any] = {
        "method": "goldens",
        "goldens": len(goldens),
        "tokens": len(served),
        "tolerance": settings.tolerance,
    }
    counts = {len(served), len(served_base), len(wanted), len(wanted_base)}
    if len(counts) > 1 or not all(LEAST_LOGPROB < value <= 1e-3 for value in (*wanted, *wanted_base)):
        fault = _fault(
            "invalid_goldens",
            f"The goldens hold {len(wanted)} and {len(wanted_base)} log-probabilities for {len(served)} tokens, or some that "
            "are no log-probabilities.",
            "Export the adapter again with `lorikeet train`, which writes one log-probability per completion token.",
        )
        return ProbeResult((fault,), numbers)
    if (refused := _not_finite(served, numbers)) is not None:
        return refused
    effect = numbers["effect"] = _mean_difference(served, served_base)
    deviation = numbers["deviation"] = _mean_difference(served, wanted)
    numbers["deviation_from_base"] = _mean_difference(served, wanted_base)
    base_deviation = numbers["base_deviation"] = _mean_difference(served_base, wanted_base)
    trained_effect = numbers["trained_effect"] = _mean_difference(wanted, wanted_base)
    scale, error = effect_scale(
        [a - b for a, b in zip(served, served_base, strict=True)],
        [a - b for a, b in zip(wanted, wanted_base, strict=True)],
        noise=[a - b for a, b in zip(served_base, wanted_base, strict=True)],
    )
    numbers |= {"scale": scale, "scale_error": error if math.isfinite(error) else None}
    limit = min(settings.tolerance, max(EFFECT_SHARE * trained_effect, NOISE_FACTOR * base_deviation))
    if base_deviation > settings.tolerance:
        fault = _fault(
            "base_mismatch",
            f"The base model served here is not the one the goldens were made with: its log-probabilities differ by "
            f"{base_deviation:.3f} nats on average (at most {settings.tolerance:g}).",
            "Train on the served base model, or export the goldens again.",
        )
        return ProbeResult((fault,), numbers)
    faults = list(_effect_faults(effect, settings.min_effect))
    if not faults and abs(scale - 1) > SCALE_SLACK + NOISE_FACTOR * error:
        faults.append(
            _fault(
                "wrong_scale",
                f"As served the adapter has {scale:.2f} times the effect it was trained to have (within {SCALE_SLACK:g} "
                f"of 1 is accepted; mean deviation {deviation:.3f} nats).",
                "Check lora_alpha, r and use_rslora in adapter_config.json against the training run.",
            )
        )
    if deviation > limit:
        faults.append(
            _fault(
                "golden_mismatch",
                f"The engine's log-probabilities differ from the manifest's by {deviation:.3f} nats on average (at most "
                f"{limit:.3f} for a trained effect of {trained_effect:.3f}); from the base's by "
                f"{numbers['deviation_from_base']:.3f}.",
                "The weights are not the ones the goldens were made with, or the adapter's scale is wrong: export again.",
            )
        )
    return ProbeResult(tuple(faults), numbers)


def effect_scale(served: Logprobs, trained: Logprobs, *, noise: Logprobs) -> tuple[float, float]:
    """Least-squares factor s with served ≈ s · trained, and its standard error when each value is off by such noise.

    (1, inf) where nothing was trained: no factor can be told.
    """
    power = sum(value * value for value in trained)
    if not power:
        return 1.0, math.inf
    scale = sum(a * b for a, b in zip(served, trained, strict=True)) / power
    return scale, math.sqrt(sum(value * value for value in noise) / len(noise) / power)


async def score(
    engine: Engine, model: str, prompt: str | list[int], *, timeout_s: float, cache_salt: str | None = None
) -> list[float]:
    """Log-probability of every prompt token but the first; NaN throughout where the engine can only answer NaN.

    Asking for prompt log-probabilities makes the engine compute the prompt anew: nothing comes from its prefix cache.
    Raises EngineUnavailableError, EngineStalledError, EngineAnswerError.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    if cache_salt is not None:
        body["cache_salt"] = cache_salt
    status, raw = await _ask(engine, "/v1/completions", body, timeout_s=timeout_s)
    if status == 400 and NOT_JSON in raw.decode("utf-8", "replace"):
        return [math.nan]
    if status != 200:
        raise _refusal(status, raw)
    try:
        entries = orjson.loads(raw)["choices"][0]["prompt_logprobs"][1:]
        # One candidate a token was asked for, so each entry holds the prompt's own token and nothing else.
        values = [float(next(iter(entry.values()))["logprob"]) for entry in entries]
    except (orjson.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError, StopIteration) as exc:
        raise EngineUnavailableError(f"Engine '{engine.id}' gave no log-probabilities for a prompt.") from exc
    return [value if value > MASKED else math.nan for value in values]


async def _ask(engine: Engine, path: str, body: Mapping[str, Any], *, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of the engine's answer."""
    try:
        async with asyncio.timeout(timeout_s), engine.open(path, orjson.dumps(body)) as response:
            return response.status, await response.read()
    except TimeoutError as exc:
        raise EngineStalledError(timeout_s) from exc


def _refusal(status: int, raw: bytes) -> Exception:
    try:
        message = str(orjson.loads(raw)["error"]["message"])
    except (orjson.JSONDecodeError, LookupError, TypeError):
        message = raw[:200].decode("utf-8", "replace")
    return EngineUnavailableError(message) if status >= 500 else EngineAnswerError(status, message)


def _tokens(golden: Golden) -> int:
    return len(golden.prompt_token_ids) + len(golden.completion_token_ids)


def _flat(rows: Sequence[Logprobs]) -> list[float]:
    return [value for row in rows for value in row]


def _mean_difference(a: Logprobs, b: Logprobs) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a) if a else 0.0


def _not_finite(served: Logprobs, numbers: dict[str, Any]) -> ProbeResult | None:
    broken = sum(not math.isfinite(value) for value in served)
    if not broken:
        return None
    fault = Fault(
        "not_finite",
        f"With this adapter the engine answers log-probabilities that are not numbers ({broken} of {len(served)}).",
        "adapter_model.safetensors",
        "The weights overflow when served: lower the learning rate or lora_alpha, train again, and look at the losses.",
    )
    return ProbeResult((fault,), numbers | {"not_finite": broken})


def _effect_faults(effect: float, min_effect: float) -> list[Fault]:
    if effect >= min_effect:
        return []
    return [
        Fault(
            "no_effect",
            f"The adapter changes nothing: its log-probabilities differ from the base model's by {effect:.5f} nats on "
            f"average (at least {min_effect:g}).",
            "adapter_model.safetensors",
            "Train longer or at a higher learning rate, and check that lora_B is not still at its initial zeros.",
        )
    ]


def _fault(code: str, message: str, fix: str) -> Fault:
    return Fault(code, message, f"{MANIFEST_FILE}:goldens", fix)
