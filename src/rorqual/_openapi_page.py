"""An OpenAPI schema as one plain page, for `serve` and for the edge. No script, nothing from elsewhere: it works
offline."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["documentation_page"]

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
code, pre {{ font: 14px/1.4 ui-monospace, monospace }} pre {{ overflow-x: auto; background: #8881; padding: 1rem }}
section {{ border-top: 1px solid #8884; padding: .5rem 0 }} b {{ display: inline-block; min-width: 4rem }}
</style></head><body><h1>{title}</h1><p>The schema itself: <a href="openapi.json">openapi.json</a></p>
{sections}<h2>Objects</h2>
{objects}</body></html>
"""


def documentation_page(schema: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI schema."""
    sections = [
        _operation(method.upper(), path, operation)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    objects = [
        f'<section id="{html.escape(name)}">{_details(name, value)}</section>'
        for name, value in schema.get("components", {}).get("schemas", {}).items()
    ]
    title = html.escape(f"{schema['info']['title']} {schema['info']['version']}")
    return PAGE.format(title=title, sections="\n".join(sections), objects="\n".join(objects))


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    text = html.escape(operation.get("description", operation.get("summary", "")))
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    name = str(body.get("$ref", "")).rpartition("/")[2]
    link = f'<p>Body: <a href="#{html.escape(name)}">{html.escape(name)}</a></p>' if name else ""
    return f"<section><b>{method}</b> <code>{html.escape(path)}</code><p>{text}</p>{link}</section>"


def _details(name: str, value: Any) -> str:
    text = html.escape(json.dumps(value, indent=2, ensure_ascii=False))
    return f"<details><summary><code>{html.escape(name)}</code></summary><pre>{text}</pre></details>"
