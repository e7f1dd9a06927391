"""Whose fine-tuning job is next: for any tenants, jobs and quotas."""

from hypothesis import given
from hypothesis import strategies as st

from adapters.job_turns import TenantLoad, WaitingJob, choose_job

TENANTS = ("acme", "globex", "initech")
loads = st.fixed_dictionaries(
    {
        tenant: st.builds(
            TenantLoad,
            running=st.integers(0, 4),
            last_start=st.floats(0, 100),
            weight=st.floats(0.5, 4),
            most=st.none() | st.integers(1, 4),
        )
        for tenant in TENANTS
    }
)
jobs = st.lists(
    st.builds(
        WaitingJob,
        id=st.uuids().map(str),
        tenant=st.sampled_from(TENANTS),
        created_at=st.floats(0, 100),
        began=st.booleans(),
    ),
    max_size=12,
)


@given(waiting=jobs, loads=loads)
def test_a_job_is_found_exactly_when_some_tenant_that_waits_has_room(
    waiting: list[WaitingJob], loads: dict[str, TenantLoad]
) -> None:
    room = {tenant for tenant, load in loads.items() if load.most is None or load.running < load.most}
    chosen = choose_job(waiting, loads)
    assert (chosen is not None) == any(job.tenant in room for job in waiting)
    if chosen is not None:
        assert chosen.tenant in room
        own = loads[chosen.tenant]
        others = [loads[job.tenant] for job in waiting if job.tenant in room]
        assert own.running / own.weight == min(load.running / load.weight for load in others)


@given(waiting=jobs)
def test_with_one_worker_nobody_waits_longer_than_a_round(waiting: list[WaitingJob]) -> None:
    last_start, left = dict.fromkeys(TENANTS, 0.0), list(waiting)
    order: list[str] = []
    for turn in range(len(waiting)):
        chosen = choose_job(left, {tenant: TenantLoad(last_start=last_start[tenant]) for tenant in TENANTS})
        assert chosen is not None
        waiting_tenants = {job.tenant for job in left}
        recent = order[-(len(waiting_tenants) - 1) :] if len(waiting_tenants) > 1 else []
        assert chosen.tenant not in recent
        order.append(chosen.tenant)
        last_start[chosen.tenant] = turn + 1.0
        left.remove(chosen)
