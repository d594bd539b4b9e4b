"""Latents that are read in a hurry: for tests of who reads which update, and of what becomes of it, not of how well it is read."""

from __future__ import annotations

import dataclasses

import pytest

from gidef import methods
from gidef.attack import latent
from gidef.runs import Run


def hasty(patch: pytest.MonkeyPatch, *, read: bool = False) -> None:
    """One short start of `unmix` and two iterations of the free search. read: whatever was found counts as read."""
    unmix = latent.unmix
    patch.setattr(latent, "unmix", lambda *given, **how: unmix(*given, **{**how, "starts": 1, "iterations": 2, "settling": 1}))
    patch.setattr(methods, "READING", 2)
    if read:
        patch.setattr(methods, "READ", 2.0)


def of_fewer(run: Run, count: int) -> Run:
    """The run with its first victims alone."""
    roles = dataclasses.replace(run.setting.roles, victims=run.setting.roles.victims[:count])
    return dataclasses.replace(run, setting=dataclasses.replace(run.setting, roles=roles))
