from itertools import accumulate, combinations

from hypothesis import given
from hypothesis import strategies as st

from gateway.buckets import Ask, Buckets, Kind, wait_s

LIMITS = st.integers(1, 50)
GAPS_S = st.one_of(st.just(0.0), st.floats(0, 100))


def ask(amount: int = 1, *, limit: int = 10, kind: Kind = Kind.TOKENS, key: str = "acme") -> Ask:
    return Ask(f"{key}:{kind}", kind, limit, amount)


@given(limit=LIMITS, steps=st.lists(st.tuples(GAPS_S, st.integers(1, 20)), max_size=30))
def test_no_window_admits_more_than_a_minutes_worth_and_the_rate(limit: int, steps: list[tuple[float, int]]) -> None:
    buckets, taken = Buckets(), []
    for (_, amount), now_s in zip(steps, accumulate(gap for gap, _ in steps), strict=True):
        if buckets.reserve([ask(amount, limit=limit)], now_s).granted:
            taken.append((now_s, amount))
    for start, end in combinations(range(len(taken) + 1), 2):
        window = taken[start:end]
        span_s = window[-1][0] - window[0][0]
        assert sum(amount for _, amount in window) <= limit + span_s * limit / 60 + 1e-6


@given(limit=LIMITS, steps=st.lists(st.tuples(GAPS_S, st.integers(1, 50), st.integers(0, 200)), max_size=30))
def test_refunds_never_exceed_what_was_reserved_nor_debts_a_minutes_worth(
    limit: int, steps: list[tuple[float, int, int]]
) -> None:
    buckets, now_s, level = Buckets(), 0.0, float(limit)
    for gap_s, amount, used in steps:
        now_s += gap_s
        one = ask(amount, limit=limit)
        answer = buckets.reserve([one], now_s)
        (level,) = answer.levels
        assert -limit <= level <= limit
        if answer.granted:
            buckets.settle([one], [amount - used], now_s)
            (after,) = buckets.reserve([ask(0, limit=limit)], now_s).levels
            assert after <= level + amount + 1e-9
            assert -limit <= after <= limit


@given(
    steps=st.lists(
        st.tuples(GAPS_S, st.integers(0, 8), st.integers(0, 8), st.booleans()),
        max_size=30,
    )
)
def test_a_refusal_takes_nothing_from_any_bucket(steps: list[tuple[float, int, int, bool]]) -> None:
    buckets, now_s, held = Buckets(), 0.0, []
    for gap_s, first, second, settles in steps:
        now_s += gap_s
        asks = [
            ask(first, limit=9, key="tenant"),
            ask(second, limit=5, key="key"),
            ask(kind=Kind.OPEN, limit=3, key="tenant"),
        ]
        look = [ask(0, limit=one.limit, kind=one.kind, key=one.key.split(":")[0]) for one in asks]
        before = [buckets.reserve([one], now_s).levels[0] for one in look]
        answer = buckets.reserve(asks, now_s)
        after = [buckets.reserve([one], now_s).levels[0] for one in look]
        if answer.granted:
            held.append(asks)
            assert tuple(after) == answer.levels
            assert min(after[:2]) >= -1e-9
            assert after[2] <= 3
        else:
            assert after == before == list(answer.levels)
        if settles and held:
            buckets.settle(held.pop(), [0.0, 0.0, 0.0], now_s)
        assert buckets.open("tenant:open") == len(held)


@given(limit=LIMITS, used=st.integers(0, 100), amount=st.integers(1, 50))
def test_after_the_wait_that_is_told_there_is_enough(limit: int, used: int, amount: int) -> None:
    amount = min(amount, limit)
    buckets = Buckets()
    buckets.reserve([ask(min(used, limit), limit=limit)], 0.0)
    refused = buckets.reserve([ask(amount, limit=limit)], 0.0)
    if not refused.granted:
        told_s = wait_s(refused.levels[0], amount, limit)
        assert not buckets.reserve([ask(amount, limit=limit)], told_s * 0.99 - 1e-6).granted
        assert buckets.reserve([ask(amount, limit=limit)], told_s).granted


def test_a_limit_that_is_changed_holds_from_then_on() -> None:
    buckets = Buckets()
    assert buckets.reserve([ask(5, limit=10)], 0.0).levels == (5.0,)
    assert buckets.reserve([ask(1, limit=3)], 0.0).levels == (2.0,)
    assert not buckets.reserve([ask(3, limit=3)], 0.0).granted


def test_forgetting_full_buckets_changes_nothing() -> None:
    buckets = Buckets()
    buckets.reserve([ask(10)], 0.0)
    buckets.drop_full(119.0)
    assert buckets.reserve([ask(0)], 30.0).levels == (5.0,)
    buckets.drop_full(150.0)
    assert buckets.reserve([ask(0)], 150.0).levels == (10.0,)
