"""`fastft plan`: plan a config, print it, write the config that fits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastft.config import Config, validate
from fastft.errors import FastftError
from fastft.files import write_text
from fastft.plan import report
from fastft.plan.hardware import parse_bytes
from fastft.plan.planner import apply, planner


def run(config: Config, arguments: argparse.Namespace) -> int:
    """Exit code 0 where the config fits, or where --out has been given one that does; 1 where it does not."""
    if arguments.gpus < 1:
        raise FastftError(f"--gpus {arguments.gpus}: expected 1 or more")
    if arguments.gpu == "auto" and not arguments.out:
        raise FastftError("--gpu auto writes a config that fits this machine: name the file with --out FILE")
    memory, host_memory = (
        value and parse_bytes(value, option)
        for value, option in ((arguments.memory, "--memory"), (arguments.host_memory, "--host-memory"))
    )
    prepared, source = planner(config, arguments.gpu, gpus=arguments.gpus, memory=memory, host_memory=host_memory)
    plan = prepared.plan()
    suggestion, chosen = None, config
    if not plan.fits:
        found = prepared.cheapest()
        if found:
            change, other = found
            chosen = apply(config, change)
            suggestion = {"change": change, "total_bytes": other.total_bytes, "step_time_s": other.step_time_s}
    rows = [] if plan.fits else report.alternatives(prepared, plan)
    if arguments.json:
        print(json.dumps(report.as_values(plan, source, rows, suggestion), indent=2))
    else:
        report.show(plan, source, rows, suggestion)
    fits = plan.fits or suggestion is not None
    if arguments.out:
        if not fits:
            raise FastftError(f"--out {arguments.out}: not written; no change that the planner knows makes it fit")
        text = validate(chosen.plain()).dump()
        write_text(Path(arguments.out), f"# fastft train --cfg {arguments.out}\n{text}")
        if not arguments.json:
            print(f"config     {arguments.out}")
        return 0
    return 0 if plan.fits else 1
