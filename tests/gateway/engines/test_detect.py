from gateway.engines.detect import profile_for
from gateway.engines.profile import load_profile


def test_every_machine_gets_a_profile_that_exists() -> None:
    chosen = [profile_for(memory) for memory in (None, 23_028, 81_559)]
    assert chosen == ["cpu", "gpu-24gb", "gpu-80gb"]
    assert [load_profile(name).name for name in chosen] == chosen
