"""A replay as one HTML file that needs nothing else: no network, no other file.

Owns how data gets into the page. The page itself is in the folder `page/`; what happened is in `replay.py`. Text in a
replay was written by a model: it enters the page as data only, scripts other than the page's own are forbidden there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from string import Template

from rl4dlm.files import write_text
from rl4dlm.tracking.replay import Replay

_FOLDER = Path(__file__).parent / "page"


def page_html(replay: Replay) -> str:
    """The page, as text."""
    parts = {name: (_FOLDER / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    style, script = parts["page.css"], parts["page.js"]
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    return Template(parts["page.html"]).substitute(policy=policy, style=style, script=script, data=_embedded(replay))


def write_page(path: str | os.PathLike[str], replay: Replay) -> None:
    """Writes the page; the file appears under its name only when it is complete."""
    write_text(path, page_html(replay))


def _embedded(replay: Replay) -> str:
    """JSON that no text in it can end: a `<` never appears as such."""
    data = json.dumps(replay.to_dict(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return data


def _hash(text: str) -> str:
    """How a content security policy names an inline element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
