"""The rooms import only what they may (contracts in pyproject.toml)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_import_contracts_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_and_configuration_load_without_torch():
    for module in ("gidef.config", "gidef.main", "gidef.cli", "gidef.doctor"):
        done = subprocess.run([sys.executable, "-c", f"import {module}, sys; sys.exit('torch' in sys.modules)"], cwd=ROOT)
        assert done.returncode == 0, f"{module} imports torch"
