"""Become the engine, after asking the kernel for a SIGTERM at the gateway's death: python launch.py GATEWAY_PID COMMAND…

A script of its own, because code run between fork and exec of a process with threads may deadlock.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; survives exec


def main() -> None:
    gateway, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != gateway:  # it died before the call
            sys.exit("The gateway is gone; the engine is not started.")
    os.execv(command[0], command)  # noqa: S606  no shell is meant


if __name__ == "__main__":
    main()
