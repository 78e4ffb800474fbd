"""A headless Chromium over its debugging protocol: enough to open a page, act and look."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["CHROMIUM", "Tab", "browser"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
"""The program, or None where there is none."""
_LIMIT_S = 60.0


class Tab:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.complaints: list[str] = []
        """What the console was told: exceptions, refused scripts, failed loads."""

    async def listen(self) -> None:
        """Take answers and events until the socket closes."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._waiting.pop(told["id"]).set_result(told)
            elif told["method"] == "Log.entryAdded":
                self.complaints.append(told["params"]["entry"]["text"])
            elif told["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["params"]["exceptionDetails"]))

    async def do(self, method: str, **parameters: Any) -> Any:
        """Return the result of a command."""
        number = next(self._ids)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        told = await self._waiting[number]
        assert "error" not in told, told
        return told["result"]

    async def open(self, address: str) -> None:
        """Go to an address and wait until the page is there."""
        await self.do("Page.navigate", url=address)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def js(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        told = await self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value."""
        while not (value := await self.js(expression)):  # noqa: ASYNC110 - it belongs to the page
            await asyncio.sleep(0.02)
        return value

    async def type(self, text: str) -> None:
        """Enter text where the focus is, as by a keyboard."""
        await self.do("Input.insertText", text=text)

    async def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key."""
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.do("Input.dispatchKeyEvent", type="keyDown", text=text, **facts)
        await self.do("Input.dispatchKeyEvent", type="keyUp", **facts)

    async def look(self, *, width: int, dark: bool = False, still: bool = False) -> None:
        """Set the width of the window, the colours and the motion a person prefers."""
        await self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=800, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        await self.do(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                {"name": "prefers-reduced-motion", "value": "reduce" if still else ""},
            ],
        )

    async def picture(self) -> bytes:
        """Return the whole page as PNG."""
        told = await self.do("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(told["data"])


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Tab]:
    """Run Chromium with a fresh profile in a folder and yield its tab; a minute at most."""
    assert CHROMIUM is not None
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with asyncio.timeout(_LIMIT_S):
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, "--headless=new", "--disable-gpu", "--disable-dev-shm-usage",
            "--remote-debugging-port=0", "--no-first-run", "--hide-scrollbars", *sandbox,
            f"--user-data-dir={folder}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            told = folder / "DevToolsActivePort"
            while not told.exists() or len(told.read_text().splitlines()) < 2:
                assert process.returncode is None
                await asyncio.sleep(0.02)
            port = told.read_text().splitlines()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    tabs = await answer.json()
                address = next(one for one in tabs if one["type"] == "page")["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    tab = Tab(socket)
                    listening = asyncio.create_task(tab.listen())
                    for domain in ("Page", "Runtime", "Log"):
                        await tab.do(f"{domain}.enable")
                    yield tab
                await listening
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
