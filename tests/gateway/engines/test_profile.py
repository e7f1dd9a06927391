import argparse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.profile import (
    BASE_NAME,
    PROFILES,
    engine_arguments,
    engine_command,
    engine_environment,
    find_preloads,
    load_profile,
    on_own_device,
)
from gateway.errors import EngineStartError

NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml"))
MODEL, SOCKET = Path("/models/base"), Path("/run/engine-0.sock")


def test_there_is_a_profile_for_tests_for_the_cpu_and_for_two_sizes_of_gpu() -> None:
    assert NAMES == ["cpu", "gpu-24gb", "gpu-80gb", "test"]


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_keeps_more_adapters_in_memory_than_in_slots(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.host_adapters > profile.slots > 1


def test_a_profile_is_found_by_path_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((PROFILES / "test.yaml").read_text() + "name: other\n")
    assert load_profile(path).name == "other"


def test_an_unknown_profile_tells_which_there_are() -> None:
    with pytest.raises(EngineStartError, match="cpu, gpu-24gb"):
        load_profile("tpu")


@pytest.mark.parametrize("change", ["slots: 0", "host_adapters: 1", "max_rank: 7", "speed: 9", "][", "- 1"])
def test_a_wrong_profile_names_its_file(tmp_path: Path, change: str) -> None:
    path = tmp_path / "mine.yaml"
    text = (PROFILES / "test.yaml").read_text()
    key = change.split(":")[0]
    kept = "\n".join(line for line in text.splitlines() if not line.startswith(key + ":"))
    path.write_text(f"{kept}\n{change}\n")
    with pytest.raises(EngineStartError, match=r"mine\.yaml"):
        load_profile(path)


def test_the_command_serves_the_model_on_the_socket_and_on_no_port() -> None:
    command = engine_command(load_profile("cpu"), model=MODEL, socket=SOCKET, python="/venv/bin/python")
    assert command[:3] == ["/venv/bin/python", "-m", "vllm.entrypoints.launchers.api_server.entry"]
    assert command[command.index("--uds") + 1] == str(SOCKET)
    assert command[command.index("--max-loras") + 1] == "8"
    assert command[command.index("--max-cpu-loras") + 1] == "64"
    assert not {"--port", "--host", "--api-key"} & set(command)


def test_the_environment_holds_what_keeps_the_engine_safe() -> None:
    env = engine_environment(load_profile("cpu"), {"PATH": "/bin"}, preload=("libx.so",))
    assert env["PATH"] == "/bin"
    assert env["VLLM_PLUGINS"] == "lorikeet,lorikeet_fork"
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert env["VLLM_COMPUTE_NANS_IN_LOGITS"] == "1"
    assert (env["VLLM_ENABLE_V1_MULTIPROCESSING"], env["OMP_NUM_THREADS"]) == ("0", "1")
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["LD_PRELOAD"] == "libx.so"


@given(st.dictionaries(st.text("ABC_", min_size=1), st.text("abc")))
def test_neither_secrets_nor_stray_engine_settings_reach_the_engine(inherited: dict[str, str]) -> None:
    secrets = {
        "LORIKEET_ADMIN_KEY": "s",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "",
        "OPENAI_API_KEY": "s",
    }
    env = engine_environment(load_profile("test"), inherited | secrets)
    assert not secrets.keys() & env.keys()
    assert inherited.items() <= env.items()


def test_a_library_already_preloaded_stays() -> None:
    env = engine_environment(load_profile("cpu"), {"LD_PRELOAD": "liba.so"}, preload=("libb.so",))
    assert env["LD_PRELOAD"] == "libb.so:liba.so"


def test_a_library_the_machine_lacks_is_not_preloaded() -> None:
    profile = load_profile("cpu").model_copy(update={"preload": ("no_such_library_anywhere", "c")})
    assert [name.split(".")[0] for name in find_preloads(profile)] == ["libc"]


@pytest.fixture(scope="module")
def vllm_parser() -> argparse.ArgumentParser:
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: argparse.ArgumentParser = make_arg_parser(FlexibleArgumentParser())
    return parser


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of importing torch and vLLM
@pytest.mark.parametrize("name", NAMES)
def test_vllm_itself_accepts_every_profile(vllm_parser: argparse.ArgumentParser, name: str) -> None:
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    profile = load_profile(name)
    args = vllm_parser.parse_args(engine_arguments(profile, model=MODEL, socket=SOCKET))
    validate_parsed_serve_args(args)
    assert (args.model, args.uds, args.served_model_name) == (str(MODEL), str(SOCKET), [BASE_NAME])
    assert (args.max_loras, args.max_cpu_loras, args.max_lora_rank) == (
        profile.slots,
        profile.host_adapters,
        profile.max_rank,
    )
    assert args.max_num_seqs == profile.max_in_flight
    assert args.enable_lora


@pytest.mark.parametrize(("visible", "devices"), [(None, ["0", "1"]), ("", ["0", "1"]), ("3,5", ["3", "5"])])
def test_each_of_several_engines_has_a_device_of_its_own(visible: str | None, devices: list[str]) -> None:
    profile = load_profile("gpu-24gb")
    own = [on_own_device(profile, number, engines=2, visible=visible) for number in range(2)]
    assert [one.env["CUDA_VISIBLE_DEVICES"] for one in own] == devices


def test_a_single_engine_sees_what_the_gateway_sees() -> None:
    profile = load_profile("gpu-24gb")
    assert on_own_device(profile, 0, engines=1, visible="0,1") is profile


def test_more_engines_than_devices_are_refused() -> None:
    with pytest.raises(EngineStartError, match="2 engines"):
        on_own_device(load_profile("gpu-24gb"), 0, engines=2, visible="1")
