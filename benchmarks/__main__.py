"""Run all benchmarks, each in a process of its own, then the plots and the measures."""

from __future__ import annotations

import subprocess
import sys

for script in ("dispatch", "load", "growth", "mail", "sizing", "report", "measures"):
    print(f"\n== {script}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{script}", *sys.argv[1:]]

    if status := subprocess.run(command).returncode:
        sys.exit(status)
