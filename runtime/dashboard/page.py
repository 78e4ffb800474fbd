"""The page of the live view: one file, sent with a policy that lets it load nothing else.

The page holds no facts, so it needs no key; it asks the person for one and sends it with each
question for facts.
"""

from __future__ import annotations

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

from aiohttp import web

__all__ = ["PAGE_PATH", "UNCACHED", "page_headers", "page_routes", "page_text"]

PAGE_PATH = "/dashboard"
UNCACHED = {"cache-control": "no-store"}


@cache
def page_text() -> str:
    """Return the page."""
    return files(__package__).joinpath("page.html").read_text(encoding="utf-8")


@cache
def page_headers() -> dict[str, str]:
    """Return the headers of the page: only its own script and style run, and it asks only here."""
    rules = {
        "default-src": "'none'",
        "script-src": _hashes("script"),
        "style-src": _hashes("style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in rules.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        **UNCACHED,
    }


def _hashes(tag: str) -> str:
    """Return the sources of the policy that let the page's own elements of a kind in."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page_text(), re.DOTALL)
    digests = (b64encode(sha256(body.encode()).digest()).decode() for body in bodies)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


async def _page(_request: web.Request) -> web.Response:
    return web.Response(text=page_text(), content_type="text/html", headers=page_headers())


def page_routes() -> list[web.RouteDef]:
    """Return the page's route."""
    return [web.get(PAGE_PATH, _page)]
