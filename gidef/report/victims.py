"""The attacked images of a run, one by one: the record's numbers beside the contact sheets' saved images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gidef.report.record import Line


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """The images of a contact sheet. columns: title → images (N, C, H, W);  rows: label of each, ending in "#<number of the image>"."""

    checkpoint: str
    columns: dict[str, np.ndarray]
    captions: dict[str, Sequence[str] | None]
    rows: Sequence[str]

    @classmethod
    def load(cls, path: Path) -> Sheet:
        """Of a `reconstructions-<checkpoint>.safetensors`. Raises: InputError if it is damaged."""
        from gidef.checkpoint import load_file  # torch, which a report without pictures does not need

        tensors, meta = load_file(path)
        columns = {title: tensors[f"{number:03d}"].numpy() for number, title in enumerate(meta["titles"])}
        captions = dict(zip(meta["titles"], meta["captions"], strict=True))
        return cls(checkpoint=path.stem.removeprefix("reconstructions-"), columns=columns, captions=captions, rows=meta["row_labels"])


@dataclass(slots=True, kw_only=True)
class Seen:
    """What one attack made of a victim. psnr_db, ssim: of the first seed;  seeds: PSNR of each;  failure: its status and message where it failed."""

    checkpoint: str
    defence: str
    attack: str
    image: np.ndarray | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    failure: str = ""
    seeds: list[float] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Victim:
    """An attacked image. guesses: (name, image, PSNR as text) of what needs no gradient."""

    number: int
    label: str
    client: int | None = None
    private: np.ndarray | None = None
    guesses: list[tuple[str, np.ndarray, str]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def strongest(self, apart: set[str]) -> Seen | None:
        """Where it was seen best, attacks of these names and those that failed left out."""
        known = [seen for seen in self.seen if seen.psnr_db is not None and not seen.failure and seen.attack not in apart]
        return max(known, key=lambda seen: seen.psnr_db, default=None)


def victims_of(lines: Sequence[Line], sheets: Sequence[Sheet]) -> list[Victim]:
    """Victims in the order of the first sheet (most leaked first), then those that only the record knows."""
    found: dict[int, Victim] = {}
    images: dict[tuple[int, str, str], np.ndarray] = {}
    for sheet in sheets:
        for place, label in enumerate(sheet.rows):
            number = int(label.rpartition("#")[2])
            victim = found.setdefault(number, Victim(number=number, label=label))
            for title, pictures in sheet.columns.items():
                if title == "private":
                    victim.private = pictures[place]
                elif title.startswith("no gradient:\n"):
                    name, captions = title.partition("\n")[2], sheet.captions[title]
                    if name not in [known for known, _, _ in victim.guesses]:
                        victim.guesses.append((name, pictures[place], captions[place] if captions else ""))
                else:
                    images[number, sheet.checkpoint, title] = pictures[place]
    cells: dict[tuple[int, str, str, str], Seen] = {}
    for line in lines:
        if line["kind"] == "attack":
            _add(line, found, images, cells)
    return list(found.values())


def _add(line: Line, found: dict[int, Victim], images: dict[tuple[int, str, str], np.ndarray], cells: dict[tuple[int, str, str, str], Seen]) -> None:
    """One line of the record: the first seed makes the entry, the others add their PSNR."""
    number, checkpoint, defence, attack = line["victim"], line["checkpoint"], line["defence"], line["attack"]
    victim = found.setdefault(number, Victim(number=number, label=f"image #{number}"))
    victim.client = line.get("client") if victim.client is None else victim.client
    seen = cells.get((number, checkpoint, defence, attack))
    if seen is None:
        failure = "" if line.get("status", "ok") == "ok" else _failure(line)
        image = images.get((number, checkpoint, f"{defence}:\n{attack}"))
        seen = Seen(checkpoint=checkpoint, defence=defence, attack=attack, image=image, psnr_db=line.get("psnr_db"), ssim=line.get("ssim"), failure=failure)
        cells[number, checkpoint, defence, attack] = seen
        victim.seen.append(seen)
    if line.get("psnr_db") is not None:
        seen.seeds.append(line["psnr_db"])


def _failure(line: dict[str, Any]) -> str:
    return f"{line['status']}: {line['error']}" if line.get("error") else line["status"]
