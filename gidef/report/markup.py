"""HTML and SVG elements that escape what they are given, and images as data URIs."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import Any

import numpy as np

_VOID = ("br", "input", "img", "meta")


class Html(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Strings among the children and all values of attributes are escaped.

    Args: children: `Html`, other text or numbers, lists of these, or None, which is left out.
          attributes: `class_` is written `class`, `data_value` `data-value`; None and False leave one out, True writes its name alone.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None and value is not False}
    written = "".join(f" {key}" if value is True else f' {key}="{html.escape(str(value))}"' for key, value in given.items())
    return Html(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    """Children one after the other, escaped as in `tag`."""
    return Html("".join(_inner(child) for child in children))


def _inner(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, (list, tuple)):
        return join(*child)
    return html.escape(str(child), quote=False)


def json_script(identity: str, value: Any) -> Html:
    """A block of JSON that no text in it can end: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(value, allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return tag("script", Html(text), type="application/json", id=identity)


def png_uri(data: bytes) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_uri(pixels: np.ndarray, side: int) -> str:
    """An image (H, W, 3), float in [0, 1], as PNG in a data URI; averaged down to at most `side` pixels, never enlarged."""
    from PIL import Image

    picture = Image.fromarray(np.round(255 * pixels).astype(np.uint8))
    if max(picture.size) > side:
        scale = side / max(picture.size)
        picture = picture.resize(tuple(max(1, round(scale * length)) for length in picture.size), Image.Resampling.BOX)
    page = io.BytesIO()
    picture.save(page, "PNG", optimize=True)
    return png_uri(page.getvalue())
