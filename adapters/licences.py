"""Licences: what the terms of base, data and teacher models allow the result to be, and what it has to carry on. Pure.

An aid for people who decide, not legal advice. What is unsure is judged to be stricter: whether weights are an adaptation of
the data they were trained on is not settled, so share-alike, non-commercial and no-derivatives terms of data count.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Level = Literal["ok", "warn", "block"]
Kind = Literal["base", "data", "teacher"]
Term = Literal[
    "attribution",
    "notice",
    "name",
    "use-policy",
    "scale",
    "share-alike",
    "non-commercial",
    "no-derivatives",
    "output-use",
    "unknown",
    "conflict",
]
LEVELS: tuple[Level, ...] = ("ok", "warn", "block")

MEANING: Mapping[Term, str] = {
    "attribution": "name the source, its licence and what was changed",
    "notice": "show the notice the licence asks for where the model is made available",
    "name": "begin the model's name with the one the licence asks for",
    "use-policy": "pass the licence's rules on permitted use on to whoever uses the model",
    "scale": "a company beyond the licence's number of monthly users needs a licence of its own",
    "share-alike": "make the result available only under the same licence",
    "non-commercial": "no commercial use",
    "no-derivatives": "the result may not be given to others",
    "output-use": "its outputs may not be used to train other models",
    "unknown": "nobody has said which terms hold",
    "conflict": "these terms cannot be kept together",
}


@dataclass(frozen=True)
class Licence:
    """What matters of a licence here.

    terms bind whoever builds on the thing itself, output_terms whoever trains on what a model under it has written.
    """

    id: str
    terms: tuple[Term, ...]
    output_terms: tuple[Term, ...] = ()
    prefix: str = ""  # what a model's name has to begin with
    share_family: str = ""  # share-alike licences of one family can be kept together
    note: str = ""


def _plain(terms: tuple[Term, ...], ids: str, *, share_family: str = "") -> list[Licence]:
    return [Licence(id_, terms, share_family=share_family) for id_ in ids.split()]


_LLAMA: tuple[Term, ...] = ("attribution", "notice", "use-policy", "scale")
_SHARED_SOURCE: tuple[Term, ...] = ("attribution", "share-alike")
_RAIL: tuple[Term, ...] = ("attribution", "use-policy")

_CREATIVE_COMMONS: Mapping[str, tuple[Term, ...]] = {
    "BY": ("attribution",),
    "BY-SA": ("attribution", "share-alike"),
    "BY-NC": ("attribution", "non-commercial"),
    "BY-NC-SA": ("attribution", "non-commercial", "share-alike"),
    "BY-ND": ("attribution", "no-derivatives"),
    "BY-NC-ND": ("attribution", "non-commercial", "no-derivatives"),
}

KNOWN: tuple[Licence, ...] = (
    *_plain((), "CC0-1.0 Unlicense PDDL-1.0 0BSD MIT-0 CDLA-Permissive-1.0 CDLA-Permissive-2.0 WTFPL"),
    *_plain(
        ("attribution",), "MIT Apache-2.0 BSD-2-Clause BSD-3-Clause ISC BSL-1.0 Zlib PSF-2.0 ODC-By-1.0 ECL-2.0 AFL-3.0"
    ),
    *(
        Licence(f"CC-{parts}-{version}", terms, share_family=f"CC-{parts}" if "share-alike" in terms else "")
        for parts, terms in _CREATIVE_COMMONS.items()
        for version in ("1.0", "2.0", "2.5", "3.0", "4.0")
    ),
    *_plain(_SHARED_SOURCE, "GPL-2.0 GPL-3.0 AGPL-3.0 LGPL-2.1 LGPL-3.0 MPL-2.0 EUPL-1.2", share_family="GPL"),
    *_plain(_SHARED_SOURCE, "GFDL-1.3", share_family="GFDL"),
    *_plain(_SHARED_SOURCE, "ODbL-1.0", share_family="ODbL"),
    *_plain(_SHARED_SOURCE, "CDLA-Sharing-1.0", share_family="CDLA-Sharing"),
    Licence("LicenseRef-research-only", ("attribution", "non-commercial"), ("non-commercial",)),
    Licence("LicenseRef-proprietary", ("no-derivatives", "non-commercial"), ("output-use",)),
    # Models. Notices and names as their agreements have them; Llama: section 1.b, Gemma: section 3.1, Qwen: section 4.
    Licence("llama2", _LLAMA, ("output-use",), note="notice: Llama 2 is licensed under the LLAMA 2 Community License"),
    Licence("llama3", (*_LLAMA, "name"), ("output-use",), prefix="Llama 3", note="notice: Built with Meta Llama 3"),
    *(
        Licence(id_, (*_LLAMA, "name"), ("notice", "name"), prefix="Llama", note="notice: Built with Llama")
        for id_ in ("llama3.1", "llama3.2", "llama3.3", "llama4")
    ),
    Licence(
        "gemma",
        ("attribution", "notice", "use-policy"),
        ("notice", "use-policy"),  # a model trained on its outputs is a Model Derivative
        note="notice: Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
    Licence(
        "qwen", ("attribution", "notice", "scale"), ("notice",), note="notice: Built with Qwen, or Improved using Qwen"
    ),
    Licence("qwen-research", ("attribution", "notice", "non-commercial"), ("notice", "non-commercial")),
    Licence("mistral-research", ("attribution", "notice", "non-commercial"), ("non-commercial",)),
    Licence("mistral-non-production", ("attribution", "notice", "non-commercial"), ("non-commercial",)),
    *_plain(_RAIL, "openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m bigscience-bloom-rail-1.0"),
    Licence("deepseek", _RAIL, ("use-policy",)),
    Licence("falcon-llm", _RAIL),
    Licence("nvidia-open-model", ("attribution", "notice")),
    # Terms of served models, by which what they wrote is used.
    *(
        Licence(id_, (), ("output-use",), note="outputs may not be used to develop models that compete with theirs")
        for id_ in ("openai-terms", "anthropic-terms", "google-ai-terms", "cohere-terms", "xai-terms")
    ),
)

# Names people write. Keys are read like licences: without case, punctuation and words such as "license".
_ALIASES: Mapping[str, str] = {
    "public domain": "CC0-1.0",
    "cc0": "CC0-1.0",
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "asl 2.0": "Apache-2.0",
    "expat": "MIT",
    "bsd": "BSD-3-Clause",
    "bsd 3": "BSD-3-Clause",
    "odc-by": "ODC-By-1.0",
    "odbl": "ODbL-1.0",
    "gpl": "GPL-3.0",
    "agpl": "AGPL-3.0",
    "lgpl": "LGPL-3.0",
    "gfdl": "GFDL-1.3",
    **{f"cc-{parts}": f"CC-{parts}-4.0" for parts in _CREATIVE_COMMONS},
    **{
        f"creative commons {words} {version}{suffix}": f"CC-{parts}-{version}"
        for words, parts in (
            ("attribution", "BY"),
            ("attribution sharealike", "BY-SA"),
            ("attribution noncommercial", "BY-NC"),
            ("attribution noncommercial sharealike", "BY-NC-SA"),
        )
        for version in ("3.0", "4.0")
        for suffix in ("", " international")
    },
    **{f"meta llama {version}": f"llama{version}" for version in ("2", "3", "3.1", "3.2", "3.3", "4")},
    "mrl": "mistral-research",
    "mnpl": "mistral-non-production",
    "mistral ai research": "mistral-research",
    "mistral ai non-production": "mistral-non-production",
    "tongyi qianwen": "qwen",
    "tongyi qianwen research": "qwen-research",
    "research only": "LicenseRef-research-only",
    "non-commercial": "LicenseRef-research-only",
    "proprietary": "LicenseRef-proprietary",
    "all rights reserved": "LicenseRef-proprietary",
    "openai": "openai-terms",
    "openai terms of use": "openai-terms",
    "anthropic": "anthropic-terms",
    "gemini": "google-ai-terms",
    "openrail++": "openrail",
    "openrail-m": "openrail",
}

_FILLERS = re.compile(r"\b(the|licen[cs]ed?|community|agreement|version|v(?=\d)|or[- ]later|only|-?licenseref)\b")
_NOT_A_SIGN = re.compile(r"[^a-z0-9]+")
_REMARK = re.compile(r"\s*[,;:(\[]")
_RESTRICTED = re.compile(
    r"research[- ](only|purposes|use)|(for|only) research|non-?[ ]?commercial|no commercial", re.IGNORECASE
)
_EXCEPTIONS = re.compile(r"\b(except|excluding|exclud|other than|unless|parts? (are|is))", re.IGNORECASE)


def _key(text: str) -> str:
    """What is left once spelling is set aside: equal for `Apache License, Version 2.0` and `apache-2.0`."""
    lowered = text.casefold().replace("licenseref-", "")
    return _NOT_A_SIGN.sub("", _FILLERS.sub(" ", lowered))


_BY_KEY: dict[str, Licence] = {_key(licence.id): licence for licence in KNOWN}
_BY_KEY |= {_key(alias): _BY_KEY[_key(id_)] for alias, id_ in _ALIASES.items()}
_RESEARCH_ONLY = _BY_KEY[_key("research only")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Frozen):
    """One thing the result is made of."""

    name: str
    kind: Kind
    licence: str = Field(
        "unknown", description="SPDX id, a model licence's usual name, or free words; may hold AND, OR."
    )
    exceptions: Mapping[str, str] = Field(
        default_factory=dict, description="Parts of the source that came under other terms, by name."
    )


class LicencePolicy(_Frozen):
    """How grave each kind of term is. Defaults are those for training; PROMOTION is stricter."""

    unknown: Level = Field("warn", description="Terms that nobody stated, or that are not known here.")
    share_alike: Level = Field("warn", description="The result has to stay under the same licence.")
    non_commercial: Level = Field("warn", description="Commercial use is not allowed.")
    no_derivatives: Level = Field("warn", description="What is made of it may not be given to others.")
    output_use: Level = Field(
        "block", description="A teacher whose outputs may not be used to train: broken by training."
    )
    name: Level = Field("warn", description="The model's name has to begin in a way that it does not.")
    conflict: Level = Field("warn", description="Share-alike terms of two licences that cannot both be kept.")
    excepted: Mapping[str, str] = Field(
        default_factory=dict,
        description="Source -> reason why its terms are no hindrance here, such as a written permission. Its findings "
        "stay to be seen, as warnings.",
    )


TRAINING = LicencePolicy()
PROMOTION = LicencePolicy(unknown="block", non_commercial="block", no_derivatives="block", conflict="block")


class Finding(_Frozen):
    """One thing to know about one source."""

    source: str
    kind: Kind
    licence: str
    term: Term
    what: str
    level: Level
    excepted: str = Field("", description="The recorded reason why it does not block.")


class Carried(_Frozen):
    """One duty that the result passes on, with the sources it comes from."""

    term: Term
    what: str
    sources: tuple[str, ...] = Field(description="Each with its licence.")


class Verdict(_Frozen):
    """level: the gravest of the findings. terms: what whoever passes the result on has to keep."""

    level: Level
    findings: tuple[Finding, ...] = ()
    terms: tuple[Carried, ...] = ()

    @property
    def blocking(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "block")

    def lines(self) -> list[str]:
        """For people: a line for each finding, then one for each duty."""
        found = [
            f"{finding.level}: {finding.source} ({finding.licence}): {finding.what}"
            + (f" (excepted: {finding.excepted})" if finding.excepted else "")
            for finding in self.findings
        ]
        return found + [f"carry: {term.what} ({', '.join(term.sources)})" for term in self.terms]


@dataclass(frozen=True)
class Reading:
    """What a licence text says: every licence of `all_of` binds; of each inner tuple one may be chosen."""

    all_of: tuple[tuple[Licence, ...], ...]
    unknown: tuple[str, ...] = ()  # what of the text is not known here


def find_licence(text: str) -> Licence | None:
    """A single licence by SPDX id or usual name, None where it is not known."""
    return _BY_KEY.get(_key(text))


def read_licence(text: str) -> Reading:
    """SPDX expressions without brackets, usual names, or a known licence followed by a remark ("MIT, as published in …").

    A remark can only add: words for research or non-commercial use, and exceptions it does not name.
    """
    whole = find_licence(text)
    if whole is not None:
        return Reading(((whole,),))
    head = _REMARK.split(text.strip(), maxsplit=1)[0]
    all_of: list[tuple[Licence, ...]] = []
    unknown: list[str] = []
    for part in re.split(r"\s+and\s+|\s*&\s*|\s*\+\s+", head, flags=re.IGNORECASE):
        choices = [find_licence(choice) for choice in re.split(r"\s+or\s+|\s*/\s*", part, flags=re.IGNORECASE)]
        known = tuple(choice for choice in choices if choice is not None)
        if known:
            all_of.append(known)
        else:
            unknown.append(part.strip() or "not stated")
    if _RESTRICTED.search(text):
        all_of.append((_RESEARCH_ONLY,))
        unknown = []  # the words say what matters
    if _EXCEPTIONS.search(text):
        unknown.append("exceptions that are not named")
    return Reading(tuple(all_of), tuple(unknown))


def judge_licences(sources: Iterable[Source], policy: LicencePolicy = TRAINING, *, name: str | None = None) -> Verdict:
    """What the terms of all sources together mean for the result.

    name: the result's name, for licences that ask for a certain beginning; None: not decided yet.
    A source more never makes the verdict milder.
    """
    given = sorted(set(_with_parts(sources)), key=lambda source: (source.kind, source.name, source.licence))
    findings: list[Finding] = []
    carried: dict[tuple[Term, str], list[str]] = {}
    binding: list[tuple[_Part, Licence]] = []
    for part in given:
        reading = read_licence(part.licence)
        findings += [_finding(part, "unknown", policy, f"{MEANING['unknown']} ({what})") for what in reading.unknown]
        for choices in reading.all_of:
            licence = min(choices, key=lambda choice: _gravity(choice, part.kind, policy))
            binding.append((part, licence))
            for term in _terms(licence, part.kind):
                what = _what(licence, term)
                grave = _level(term, policy)
                if grave != "ok" and not (term == "name" and (name is None or _begins(name, licence.prefix))):
                    findings.append(_finding(part, term, policy, what))
                if term not in ("output-use", "unknown"):
                    carried.setdefault((term, what), []).append(f"{part.name}: {licence.id}")
    findings += _conflicts(binding, policy)
    level = max((finding.level for finding in findings), key=LEVELS.index, default="ok")
    terms = tuple(
        Carried(term=term, what=what, sources=tuple(dict.fromkeys(names))) for (term, what), names in carried.items()
    )
    return Verdict(level=level, findings=tuple(findings), terms=terms)


@dataclass(frozen=True)
class _Part:
    """A source, or a part of one that came under other terms."""

    name: str
    owner: str  # the source as a policy's exceptions name it
    kind: Kind
    licence: str


def _with_parts(sources: Iterable[Source]) -> Iterator[_Part]:
    for source in sources:
        yield _Part(source.name, source.name, source.kind, source.licence)
        for part, licence in source.exceptions.items():
            yield _Part(f"{source.name}/{part}", source.name, source.kind, licence)


def _terms(licence: Licence, kind: Kind) -> tuple[Term, ...]:
    if kind == "teacher":
        return licence.output_terms or tuple(term for term in licence.terms if term == "non-commercial")
    return licence.terms or (() if not licence.output_terms else ("output-use",))


def _what(licence: Licence, term: Term) -> str:
    if term == "name":
        return f"{MEANING[term]}: {licence.prefix}"
    return (
        f"{MEANING[term]}: {licence.note.removeprefix('notice: ')}"
        if term == "notice" and licence.note
        else MEANING[term]
    )


def _begins(name: str, prefix: str) -> bool:
    return _NOT_A_SIGN.sub("", name.casefold()).startswith(_NOT_A_SIGN.sub("", prefix.casefold()))


def _level(term: Term, policy: LicencePolicy) -> Level:
    found = getattr(policy, term.replace("-", "_"), "ok")
    return found if found in LEVELS else "ok"


def _gravity(licence: Licence, kind: Kind, policy: LicencePolicy) -> tuple[int, int, str]:
    terms = _terms(licence, kind)
    return (max((LEVELS.index(_level(term, policy)) for term in terms), default=0), len(terms), licence.id)


def _finding(part: _Part, term: Term, policy: LicencePolicy, what: str) -> Finding:
    level = _level(term, policy)
    reason = policy.excepted.get(part.owner) or policy.excepted.get(part.name) or ""
    return Finding(
        source=part.name,
        kind=part.kind,
        licence=part.licence,
        term=term,
        what=what,
        level="warn" if reason and level == "block" else level,
        excepted=reason,
    )


def _conflicts(binding: Sequence[tuple[_Part, Licence]], policy: LicencePolicy) -> Iterator[Finding]:
    """Two share-alike families, or share-alike that allows commerce beside terms that forbid it."""
    shared = [(part, licence) for part, licence in binding if part.kind != "teacher" and licence.share_family]
    for index, (part, licence) in enumerate(shared):
        for other, second in shared[index + 1 :]:
            if licence.share_family != second.share_family:
                yield _conflict(part, licence, other, second, policy)
        if "non-commercial" not in licence.terms:
            for other, second in binding:
                if "non-commercial" in _terms(second, other.kind) and not second.share_family:
                    yield _conflict(part, licence, other, second, policy)


def _conflict(part: _Part, licence: Licence, other: _Part, second: Licence, policy: LicencePolicy) -> Finding:
    excepted = next((each for each in (part, other) if each.owner in policy.excepted), part)
    what = f"{MEANING['conflict']}: {part.name} ({licence.id}) and {other.name} ({second.id})"
    return _finding(excepted, "conflict", policy, what)
