"""The two commands where there is neither environment nor data: a clone, `make up`, again, `make down`, `make up` once more.

    python -m benchmarks.fresh

Uses port 8087 and folders that are gone afterwards; packages come from pip's index or its cache, as on any machine.
"""

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks.common import ROOT, save

PORT = 8087


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        clone, seconds = Path(folder) / "lorikeet", {}
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        own = {"LORIKEET_HOME": str(Path(folder) / "home"), "LORIKEET_PORT": str(PORT)}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LORIKEET_")} | own
        for name, target in (("first_up", "up"), ("up_while_it_runs", "up"), ("down", "down"), ("prepared_up", "up")):
            began = time.perf_counter()
            subprocess.run(["make", target], cwd=clone, env=environment, check=True)
            seconds[name] = round(time.perf_counter() - began, 1)
        subprocess.run(["make", "down"], cwd=clone, env=environment, check=True)
    path = save("fresh", {"command": "python -m benchmarks.fresh", "seconds": seconds})
    Console().print(seconds, f"Raw figures: {path}")


if __name__ == "__main__":
    main()
