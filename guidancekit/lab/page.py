"""Pieces of a page that is one file: nothing is fetched, nothing is run.

What takes text escapes it; what takes ``*html`` or gives HTML says so.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

THUMBNAIL = 192  # pixels: the longer side of a picture on a page
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, *parts: str) -> str:
    """A whole page of HTML `parts`."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def element(tag: str, text: str, kind: str = "") -> str:
    """An element that holds text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{html.escape(text)}</{tag}>"


def image(picture: Image.Image, alt: str) -> str:
    """An ``<img>`` with the picture inside, large ones reduced."""
    if max(picture.size) > THUMBNAIL:
        picture = picture.copy()
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.convert("RGB").save(file, format="PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "figures") -> str:
    """A table of texts; the first of each row is its heading."""
    top = "".join(element("th", each) for each in head)
    body = "".join(
        f"<tr>{element('th', first)}{''.join(element('td', each) for each in rest)}</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(pairs: dict[str, str]) -> str:
    """Names and values in a line."""
    items = (f"<div>{element('dt', k)}{element('dd', v)}</div>" for k, v in pairs.items() if v)
    return f'<dl class="facts">{"".join(items)}</dl>'
