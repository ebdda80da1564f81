"""Fail where pyright can't tell the type of a public name, or only by guessing.

How mail is sent has no public names, so that part need not annotate what is inferred.
"""

from __future__ import annotations

import json
import subprocess
import sys

COMMAND = ["pyright", "--verifytypes", "flask_apitask", "--ignoreexternal"]

process = subprocess.run(
    [*COMMAND, "--outputjson"], capture_output=True, text=True, timeout=300
)
symbols = json.loads(process.stdout)["typeCompleteness"]["symbols"]
public = [
    symbol for symbol in symbols if not symbol["name"].startswith("flask_apitask.mail")
]
incomplete = [
    f"{symbol['name']}: {diagnostic['message']}"
    for symbol in public
    for diagnostic in symbol["diagnostics"]
    if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]
]
print(f"{len(public)} public names, {len(incomplete)} without a known type")
sys.exit("\n".join(incomplete) if incomplete or not public else 0)
