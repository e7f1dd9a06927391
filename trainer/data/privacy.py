"""Personal data in texts: found by Presidio's patterns and check digits, replaced by its kind. No network, no model.

Without a language model names of people and postal addresses are not found; the report says so. Presidio takes about 3 ms a
text, so it is asked only where a kind it looks for could be at all: `may_hold` never misses what it would find.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trainer.data.recipe import PrivacyConfig

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine
    from presidio_anonymizer import AnonymizerEngine

# what may stand between two digits of a telephone number, as phonenumbers has it
_BETWEEN = (
    r"[\s()\[\]./~+x\-\u2010-\u2015\u2212\u30fc\uff0d-\uff0f\u00ad\u200b\u2060\u3000"
    r"\uff08\uff09\uff3b\uff3d\u2053\u223c\uff5e]"
)
_MAY_HOLD = re.compile(
    r"@\w"  # e-mail
    rf"|\d(?:{_BETWEEN}{{0,4}}\d){{5}}"  # telephone, card, social security number
    r"|[A-Za-z]{2}\d{2}[ -]?[A-Za-z0-9]{4}"  # IBAN
    r"|\d\.\d{1,3}\.\d"  # IPv4
    r"|::|[0-9A-Fa-f]:[0-9A-Fa-f]{1,4}:"  # IPv6
)


_HAS_SIGNS = re.compile(r"[\d@:]")  # what all of them need: ten times faster on texts without


def may_hold(text: str) -> bool:
    """Could any of the known kinds be in this text?"""
    return _HAS_SIGNS.search(text) is not None and _MAY_HOLD.search(text) is not None


@dataclass(frozen=True)
class Cleaned:
    """Texts with what was found replaced, and how often each kind was."""

    texts: list[str]
    found: Counter[str]


class PersonalData:
    """Finds and replaces. Presidio is loaded when the first text could hold something."""

    def __init__(self, config: PrivacyConfig) -> None:
        self.config = config

    @cached_property
    def _anonymizer(self) -> "AnonymizerEngine":
        from presidio_anonymizer import AnonymizerEngine

        return AnonymizerEngine()  # type: ignore[no-untyped-call]

    @cached_property
    def _analyzer(self) -> "AnalyzerEngine":
        return build_analyzer(self.config)

    def clean(self, texts: Sequence[str]) -> Cleaned:
        found: Counter[str] = Counter()
        if self.config.action == "off" or not any(map(may_hold, texts)):
            return Cleaned(list(texts), found)
        return Cleaned([self._clean(text, found) if may_hold(text) else text for text in texts], found)

    def _clean(self, text: str, found: Counter[str]) -> str:
        hits = self._analyzer.analyze(
            text, language="en", entities=list(self.config.kinds), score_threshold=self.config.min_score
        )
        if not hits:
            return text
        # the anonymizer's own type of result has the analyzer's fields
        done = self._anonymizer.anonymize(text, hits)  # type: ignore[arg-type]
        found.update(item.entity_type for item in done.items)
        return done.text or ""


def build_analyzer(config: PrivacyConfig) -> "AnalyzerEngine":
    """Presidio over a blank spaCy pipeline, with the patterns of the wanted kinds only."""
    import spacy
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine
    from presidio_analyzer.predefined_recognizers import (
        CreditCardRecognizer,
        EmailRecognizer,
        IbanRecognizer,
        IpRecognizer,
        PhoneRecognizer,
        UsSsnRecognizer,
    )
    from tldextract import TLDExtract

    class BlankEngine(SpacyNlpEngine):
        """Tokens only, which is what the context words need."""

        def load(self) -> None:
            self.nlp = {"en": spacy.blank("en")}  # type: ignore[assignment]

    class OfflineEmailRecognizer(EmailRecognizer):
        """Presidio's asks for the newest list of public suffixes; the one in the package is enough."""

        suffixes = TLDExtract(suffix_list_urls=(), cache_dir=None)

        def validate_result(self, pattern_text: str) -> bool:
            return self.suffixes(pattern_text).fqdn != ""

    recognizers: Iterable[Any] = (
        OfflineEmailRecognizer(),
        PhoneRecognizer(supported_regions=config.regions),
        CreditCardRecognizer(),
        IbanRecognizer(),
        UsSsnRecognizer(),
        IpRecognizer(),
    )
    wanted = [each for each in recognizers if set(each.supported_entities) & set(config.kinds)]
    engine = BlankEngine()
    engine.load()
    registry = RecognizerRegistry(recognizers=wanted)
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])
