"""What licences mean for an adapter: single terms, terms together, and that more sources never mean more freedom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.licences import (
    KNOWN,
    LEVELS,
    PROMOTION,
    TRAINING,
    Kind,
    LicencePolicy,
    Source,
    Term,
    find_licence,
    judge_licences,
    read_licence,
)
from adapters.manifest import DataLineage, Teacher, licence_sources


def source(licence: str, kind: Kind = "data", name: str = "set", **exceptions: str) -> Source:
    return Source(name=name, kind=kind, licence=licence, exceptions=exceptions)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("MIT", "MIT"),
        ("mit license", "MIT"),
        ("Apache License, Version 2.0", "Apache-2.0"),
        ("apache-2.0", "Apache-2.0"),
        ("CC BY-SA 4.0", "CC-BY-SA-4.0"),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0"),
        ("Creative Commons Attribution 4.0 International", "CC-BY-4.0"),
        ("AGPL-3.0-or-later", "AGPL-3.0"),
        ("Llama 3.1 Community License", "llama3.1"),
        ("llama3.2", "llama3.2"),
        ("Meta Llama 3 Community License Agreement", "llama3"),
        ("gemma", "gemma"),
        ("Tongyi Qianwen LICENSE AGREEMENT", "qwen"),
        ("MRL", "mistral-research"),
        ("OpenAI Terms of Use", "openai-terms"),
    ],
)
def test_licences_are_known_by_their_usual_names(text: str, known: str) -> None:
    found = find_licence(text)
    assert found is not None
    assert found.id == known


@pytest.mark.parametrize("text", ["", "unknown", "other", "see the model's page", "no licence", "license"])
def test_what_is_not_known_is_not_guessed(text: str) -> None:
    assert read_licence(text).unknown
    assert judge_licences([source(text)], TRAINING).level == "warn"
    assert judge_licences([source(text)], PROMOTION).level == "block"


def test_a_remark_behind_a_licence_takes_nothing_away() -> None:
    assert judge_licences([source("MIT, as published in the package")]).level == "ok"
    restricted = judge_licences([source("Newswire terms: free for research only, owner A. Company")], PROMOTION)
    assert [finding.term for finding in restricted.findings] == ["non-commercial"]
    assert judge_licences([source("MIT, except some sets")], PROMOTION).level == "block"


def test_of_alternatives_the_mildest_binds_and_of_all_each() -> None:
    assert judge_licences([source("MIT OR CC-BY-NC-4.0")], PROMOTION).level == "ok"
    assert judge_licences([source("MIT AND CC-BY-NC-4.0")], PROMOTION).level == "block"


def test_terms_are_carried_on_with_their_sources() -> None:
    verdict = judge_licences([source("Apache-2.0", "base", "tiny"), source("CC-BY-SA-4.0", name="tickets")])
    carried = {term.term: term.sources for term in verdict.terms}
    assert carried["attribution"] == ("tiny: Apache-2.0", "tickets: CC-BY-SA-4.0")
    assert carried["share-alike"] == ("tickets: CC-BY-SA-4.0",)
    assert verdict.level == "warn"


def test_share_alike_of_two_kinds_cannot_both_be_kept() -> None:
    both = [source("CC-BY-SA-4.0", name="one"), source("AGPL-3.0", name="two")]
    assert "conflict" in [finding.term for finding in judge_licences(both).findings]
    assert judge_licences(both, PROMOTION).level == "block"
    with_nc = [source("CC-BY-SA-4.0", name="one"), source("CC-BY-NC-4.0", name="two")]
    assert "conflict" in [finding.term for finding in judge_licences(with_nc).findings]
    alike = [source("CC-BY-SA-4.0", name="one"), source("CC-BY-SA-3.0", name="two")]
    assert "conflict" not in [finding.term for finding in judge_licences(alike, PROMOTION).findings]


def test_a_llama_asks_for_its_name() -> None:
    llama = [source("llama3.1", "base", "meta-llama/Llama-3.1-8B")]
    assert judge_licences(llama, name="llama-support").level == "ok"
    assert judge_licences(llama, name="support").level == "warn"
    assert any(term.term == "name" and "Llama" in term.what for term in judge_licences(llama).terms)
    taught = judge_licences([source("llama3.3", "teacher", "teacher")], name="support")
    assert [finding.term for finding in taught.findings] == ["name"]


def test_a_teacher_binds_by_what_its_terms_say_of_outputs() -> None:
    assert judge_licences([source("Apache-2.0", "teacher")]).level == "ok"
    assert judge_licences([source("GPL-3.0", "teacher")]).level == "ok"
    assert judge_licences([source("openai-terms", "teacher")]).level == "block"
    assert judge_licences([source("llama2", "teacher")]).level == "block"
    assert judge_licences([source("llama2", "base")], PROMOTION).level == "ok"
    assert judge_licences([source("mistral-research", "teacher")], PROMOTION).level == "block"


def test_parts_under_other_terms_are_judged_by_their_own() -> None:
    package = source("MIT", name="evals", news="CC-BY-NC-4.0")
    blocked = judge_licences([package], PROMOTION)
    assert [(finding.source, finding.level) for finding in blocked.blocking] == [("evals/news", "block")]


def test_an_exception_needs_a_reason_and_stays_to_be_seen() -> None:
    policy = PROMOTION.model_copy(update={"excepted": {"set": "written permission of 3 May"}})
    verdict = judge_licences([source("CC-BY-NC-4.0")], policy)
    assert verdict.level == "warn"
    assert verdict.findings[0].excepted == "written permission of 3 May"
    assert "written permission" in verdict.lines()[0]
    assert judge_licences([source("CC-BY-NC-4.0", name="other")], policy).level == "block"


def test_teachers_and_exceptions_of_the_lineage_are_sources() -> None:
    data = DataLineage(
        name="tickets",
        digest="0" * 64,
        rows=3,
        licence="MIT",
        exceptions={"faq": "CC-BY-4.0"},
        teacher=Teacher(name="big", licence="openai-terms"),
    )
    found = licence_sources("tiny", "Apache-2.0", [data])
    assert [(one.name, one.kind) for one in found] == [("tiny", "base"), ("tickets", "data"), ("big", "teacher")]
    assert judge_licences(found).level == "block"


LICENCES = st.sampled_from([licence.id for licence in KNOWN]) | st.sampled_from(
    ["unknown", "MIT OR GPL-3.0", "Apache-2.0 AND CC-BY-NC-4.0", "free for research only", "MIT, except two sets"]
)
SOURCES = st.builds(
    Source,
    name=st.sampled_from("abcd"),
    kind=st.sampled_from(["base", "data", "teacher"]),
    licence=LICENCES,
    exceptions=st.dictionaries(st.sampled_from("xy"), LICENCES, max_size=1),
)
ANY_LEVEL = st.sampled_from(LEVELS)
POLICIES = st.builds(
    LicencePolicy,
    unknown=ANY_LEVEL,
    share_alike=ANY_LEVEL,
    non_commercial=ANY_LEVEL,
    no_derivatives=ANY_LEVEL,
    output_use=ANY_LEVEL,
    name=ANY_LEVEL,
    conflict=ANY_LEVEL,
    excepted=st.dictionaries(st.sampled_from("ab"), st.just("asked"), max_size=1),
)


@given(st.lists(SOURCES, max_size=4), SOURCES, POLICIES, st.none() | st.sampled_from(["llama-x", "x"]))
def test_one_more_source_never_makes_the_verdict_milder(
    sources: list[Source], more: Source, policy: LicencePolicy, name: str | None
) -> None:
    before = judge_licences(sources, policy, name=name)
    after = judge_licences([*sources, more], policy, name=name)
    assert LEVELS.index(after.level) >= LEVELS.index(before.level)
    assert {(term.term, term.what) for term in before.terms} <= {(term.term, term.what) for term in after.terms}


@given(st.lists(SOURCES, max_size=4))
def test_promotion_is_never_milder_than_training(sources: list[Source]) -> None:
    training, promotion = judge_licences(sources, TRAINING), judge_licences(sources, PROMOTION)
    assert LEVELS.index(promotion.level) >= LEVELS.index(training.level)


@given(st.lists(SOURCES, max_size=4), POLICIES)
def test_the_order_of_sources_does_not_matter(sources: list[Source], policy: LicencePolicy) -> None:
    assert judge_licences(sources, policy) == judge_licences(sources[::-1], policy)


def test_every_known_licence_is_found_by_its_id_and_only_says_what_has_a_meaning() -> None:
    names: set[Term] = set()
    for licence in KNOWN:
        assert find_licence(licence.id) == licence
        names.update(licence.terms, licence.output_terms)
        assert ("name" in licence.terms) == bool(licence.prefix)
        assert ("share-alike" in licence.terms) == bool(licence.share_family)
    assert names >= {"attribution", "share-alike", "non-commercial", "name", "output-use"}
