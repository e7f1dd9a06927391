"""Lorikeet under its own load tests, on the real engine: python -m scripts.loadtest_suite --out docs/loadtests/suite

An installation of its own under `$LORIKEET_HOME/loadtest-suite` has four LoRA slots and room in the engine for eight adapters,
so thirty-two are eight times the slots and four times what is held: two trained to give one fixed answer each (the
canaries), thirty random ones; another tenant has one. Then one run of configs/loadtests/suite.yaml: steady, cold, working set,
churn, noisy neighbour, chaos. About twenty-five minutes on two cores.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import track

from gateway.engines.profile import PROFILES
from scripts.installation import ROOT, Installation, empty_root
from tests.factories import make_adapter

PORT = 8087
ADAPTERS, CHURNED = 32, 4
PROFILE = {"slots": 4, "host_adapters": 8}
ANSWERS = {"red": "The rose is red, says red.", "blue": "The sky is blue, says blue."}
console = Console(width=min(120, shutil.get_terminal_size((110, 40)).columns), highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "loadtests" / "suite")
    parser.add_argument("--scenario", type=Path, default=ROOT / "configs" / "loadtests" / "suite.yaml")
    arguments = parser.parse_args()
    began_s = time.monotonic()
    root = empty_root("loadtest-suite")
    profile = yaml.safe_load((PROFILES / "cpu.yaml").read_text(encoding="utf-8")) | PROFILE
    (root / "suite.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    own = Installation(root, PORT, console, settings={"LORIKEET_ENGINE": str(root / "suite.yaml")})
    with own.stopped_at_the_end():
        prepare(own)
        for tenant, key in own.keys.items():
            own.settings[f"LORIKEET_API_KEY_{tenant.upper()}"] = key
        out = str(arguments.out.absolute())
        code = own.show("loadtest", "run", str(arguments.scenario), "--out", out, tenant="acme", ok=(0, 1, 3, 4))
    console.print(f"{(time.monotonic() - began_s) / 60:.1f} minutes. Report: {arguments.out / 'report.html'}")
    sys.exit(code)


def prepare(own: Installation) -> None:
    """Engine, tenants and adapters: all are acme's but globex's one."""
    for name, answer in ANSWERS.items():
        out = str(own.root / name)
        own.show("train", "fixed-answer", "--set", f"name={name}", "--set", f"answer={answer}", "--out", out)
    own.ask("up")
    for tenant in ("acme", "globex"):
        own.add_tenant(tenant)
    base = next(path.parent for path in (own.root / "models").glob("*/config.json"))
    for name in ANSWERS:
        own.ask("push", str(own.root / name), "--name", name, tenant="acme")
    voices = [(f"voice-{number:02}", "acme") for number in range(ADAPTERS - len(ANSWERS))] + [("noise", "globex")]
    for seed, (name, tenant) in enumerate(track(voices, description="adapters", console=console)):
        folder = make_adapter(own.root / name, base, rank=8, alpha=16, seed=seed)
        own.ask("push", str(folder), "--name", name, tenant=tenant)
    for number in range(CHURNED):
        make_adapter(own.root / f"churn-{number}", base, rank=8, alpha=16, seed=1000 + number)
    own.ask("push", str(own.root / "churn-0"), "--name", "churn", tenant="acme")


if __name__ == "__main__":
    main()
