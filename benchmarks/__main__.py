"""Run the benchmarks, all or those named, then write the measures and the plots."""

from __future__ import annotations

import subprocess
import sys

from . import results

named = [name for name in sys.argv[1:] if name in results.NAMES]
options = [option for option in sys.argv[1:] if option not in named]

for script in (*(named or results.NAMES), "report", "measures"):
    print(f"\n== {script}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{script}", *options]

    if status := subprocess.run(command).returncode:
        sys.exit(status)
