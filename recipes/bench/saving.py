"""The benchmarks' results on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gidef.report import Console


def save(content: dict[str, Any], path: Path, console: Console) -> None:
    """As JSON, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
    console.say(f"saved {path}")
