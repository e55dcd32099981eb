"""The report as a browser shows it: headless Chromium, asked by its DevTools protocol."""

import asyncio
import json
import re
import shutil

import aiohttp
import pytest

from dynamo.replay.page import page
from tests.replay.workloads import outcome

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--remote-debugging-port=0", "--window-size=1280,900"),
]
START_S, ANSWER_S = 60.0, 30.0  # a browser's first start on a busy machine

LOOK = """
(() => {
  const box = element => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  return JSON.stringify({
    title: document.title,
    heading: document.querySelector("h1").textContent,
    rows: [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent),
    best: document.querySelectorAll("td.best").length,
    plots: [...document.querySelectorAll("svg")].map(svg => ({
      name: svg.getAttribute("aria-label"),
      box: box(svg),
      lines: [...svg.querySelectorAll("path")].map(path => ({
        box: box(path), length: path.getTotalLength(), colour: getComputedStyle(path).stroke})),
      labels: [...svg.querySelectorAll("text")].map(text => box(text)),
    })),
    width: document.documentElement.scrollWidth,
    room: document.documentElement.clientWidth,
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector(".plot text")).fill,
  });
})()
"""


class Tab:
    """One page of the browser."""

    def __init__(self, socket):
        self.socket, self.asked, self.requested, self.complaints, self.loaded = socket, 0, [], [], False

    async def ask(self, method, **params):
        """The answer to one command; what happens meanwhile is noted."""
        self.asked += 1
        await self.socket.send_json({"id": self.asked, "method": method, "params": params})
        while (message := await self.hear()).get("id") != self.asked:
            pass
        assert "error" not in message, message
        return message["result"]

    async def hear(self):
        """The next message."""
        message = await self.socket.receive_json(timeout=ANSWER_S)
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            case "Log.entryAdded" | "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.complaints.append(message["params"])
            case "Page.loadEventFired":
                self.loaded = True
        return message

    async def open(self, url):
        """Go there, and wait for the load event."""
        for domain in ("Page", "Network", "Log", "Runtime"):
            await self.ask(f"{domain}.enable")
        await self.ask("Page.navigate", url=url)
        while not self.loaded:
            await self.hear()

    async def look(self):
        """What is on the page, where."""
        result = await self.ask("Runtime.evaluate", expression=LOOK)
        return json.loads(result["result"]["value"])


async def port_of(browser):
    """Where the browser listens, as it says."""
    async for line in browser.stderr:
        if found := re.search(rb"DevTools listening on ws://127\.0\.0\.1:(\d+)/", line):
            return int(found[1])
    raise AssertionError("the browser ended before it listened")


async def seen(path, profile):
    """Open a file in a fresh browser. Returns the tab after it, with what was seen in the light and in the dark."""
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank", stderr=asyncio.subprocess.PIPE
    )
    try:
        port = await asyncio.wait_for(port_of(browser), START_S)
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{port}/json/list") as answer:
                target = next(one for one in await answer.json() if one["type"] == "page")
            async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                await tab.open(path.as_uri())
                light = await tab.look()
                dark_mode = [{"name": "prefers-color-scheme", "value": "dark"}]
                await tab.ask("Emulation.setEmulatedMedia", features=dark_mode)
                return tab, light, await tab.look()
    finally:
        browser.kill()
        await browser.wait()


def inside(inner, outer):
    """Whether one box is in another, but for a line's breadth."""
    return all(outer[i] - 2 <= inner[i] and inner[2 + i] <= outer[2 + i] + 2 for i in (0, 1))


async def test_a_browser_shows_the_report(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page([outcome(), outcome("marginal")], "Two & <two>"))
    tab, light, dark = await seen(path, tmp_path / "profile")

    assert tab.requested == [path.as_uri()]  # nothing else is fetched
    assert tab.complaints == []
    assert (light["title"], light["heading"]) == ("Two & <two>", "Two & <two>")
    assert light["rows"] == ["round-robin", "marginal"]
    assert light["best"] > 0
    assert light["width"] <= light["room"]
    names = [plot["name"] for plot in light["plots"]]
    assert names[:3] == ["Time to first token", "Time per output token", "Time to last token"]
    assert names.count("Requests at each worker") == 2
    for plot in light["plots"]:
        left, top, right, bottom = plot["box"]
        assert right - left > 300
        assert bottom - top > 150
        assert plot["lines"], plot["name"]
        assert all(line["length"] > 50 and inside(line["box"], plot["box"]) for line in plot["lines"])
        assert all(inside(label, plot["box"]) for label in plot["labels"])
        colours = [line["colour"] for line in plot["lines"]]
        assert len(set(colours)) == len(colours)
        assert "none" not in colours
    assert light["background"] != dark["background"]
    assert light["ink"] != dark["ink"]
