"""Several processes for one run."""

from pathlib import Path

from trainer.launch import launch_command, own_arguments


def test_every_process_is_told_the_same_run() -> None:
    told = own_arguments("smoke", ["a=1", "b=2"], Path("/r"), Path("/o"), resume=True)
    assert told == ["train", "smoke", "--into", "/r", "--set", "a=1", "--set", "b=2", "--out", "/o", "--resume"]
    assert own_arguments("smoke", (), Path("/r"), None, resume=False) == ["train", "smoke", "--into", "/r"]


def test_processes_share_gpus_or_the_cpu() -> None:
    on_gpus = launch_command(["train", "smoke"], 4, gpus=4, port=1234)
    on_cpu = launch_command(["train", "smoke"], 2, gpus=0, port=1234)
    assert "--multi_gpu" in on_gpus
    assert on_gpus[on_gpus.index("--num_processes") + 1] == "4"
    assert on_cpu[on_cpu.index("--nproc_per_node") + 1] == "2"
    assert on_gpus[-4:] == on_cpu[-4:] == ["--module", "lorikeet", "train", "smoke"]
