"""A headless Chromium that a test drives: opens a page, runs its script, takes pictures."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """One tab, over Chromium's DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.complaints: list[str] = []
        """What the browser's console said of errors."""

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("method") == "Log.entryAdded":
                entry = message["params"]["entry"]
                if entry["level"] == "error":
                    self.complaints.append(entry["text"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        found = await self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, condition: str, limit_s: float = 180) -> None:
        """Wait until an expression of the page is true."""
        async with asyncio.timeout(limit_s):
            while not await self.run(condition):
                await asyncio.sleep(0.1)

    async def picture(self, path: Path, scheme: str) -> None:
        """A screenshot under a colour scheme, light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self.send("Emulation.setEmulatedMedia", features=[feature])
        found = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


@asynccontextmanager
async def opened(url: str, folder: Path, size: str = "1200,1500") -> AsyncIterator[Page]:
    """The page at an address, in a browser that is ended with the block."""
    process = await asyncio.create_subprocess_exec(
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
        "--remote-allow-origins=*",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={size}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(180):
            while not (found := re.search(rb"ws://([\d.]+:\d+)/", await process.stderr.readline())):
                pass
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{found[1].decode()}/json/list") as reply:
                tabs = await reply.json()
            (tab,) = [tab for tab in tabs if tab["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                await page.send("Log.enable")
                await page.send("Page.enable")
                await page.send("Page.navigate", url=url)
                await page.until("document.readyState === 'complete'")
                yield page
    finally:
        process.kill()
        await process.wait()
