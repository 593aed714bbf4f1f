"""A notebook as a page: its cells, and what they printed and drew when it was last run."""

from __future__ import annotations

import base64
import json
from pathlib import Path

SHOWN = {"image/png": "png", "image/jpeg": "jpg"}


def pages(file: Path) -> dict[str, str | bytes]:
    """Place on the site -> the page and its pictures."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    found: dict[str, str | bytes] = {}
    parts: list[str] = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            kind = next((kind for kind in SHOWN if kind in data), None)
            if kind is not None:
                name = f"{file.stem}-{len(found)}.{SHOWN[kind]}"
                found[f"notebooks/{name}"] = base64.b64decode("".join(data[kind]))
                parts.append(f"![]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    note = f"This page is `docs/notebooks/{file.name}`, which a checkout holds and runs offline."
    return {f"notebooks/{file.stem}.md": "\n\n".join([*parts, note]) + "\n", **found}
