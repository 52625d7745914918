"""The name of this machine's processor."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Name, family and model of the processor: on a virtual machine the name alone may not identify it."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    # Reversed, so that the first processor's lines are the ones that stay.
    values = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in values.items()}
    family = f" family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    return facts.get("model name", platform.machine()) + family
