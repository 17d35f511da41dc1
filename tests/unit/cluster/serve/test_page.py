"""The page for people, in Chromium: asked as a person does."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from cluster.serve.keys import read_keys
from cluster.serve.service import Engines
from tests.browser import CHROMIUM, opened
from tests.fakes import ScriptedPolicy
from tests.serving import scripted_engines, serve_config, serving

PAGE = Path(__file__).resolve().parents[4] / "cluster" / "serve" / "page.html"
SCHEMES = ("light", "dark")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (deploy/test_tools.sh)")


def test_page_asks_nothing_of_other_sites() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]", text)
    assert "innerHTML" not in text and "eval(" not in text


async def test_problem_is_answered_with_thinking_box_and_tree_light_and_dark(
    tmp_path: Path,
) -> None:
    import matplotlib.image

    async with serving() as (url, _), opened(url, tmp_path) as page:
        await page.until("document.querySelector('#model').options.length > 3")
        await page.run("$('problem').value = '3'; $('model').value = 'rstar-mcts-16'")
        await page.run("$('go').click()")
        await page.until("!$('found').hidden && $('go').textContent === 'Think'")
        assert await page.run("$('box').textContent") in ("3", "4")
        assert "step 1" in await page.run("$('thinking').textContent")
        assert "print(" in await page.run("document.querySelector('#answer pre').textContent")
        assert await page.run("document.querySelector('#answer pre.output').textContent") == "3"
        facts = await page.run("$('facts').textContent")
        assert re.search(r"mcts · 16 rollouts · .* s · ended: trajectories · [\d,]+ tokens", facts)
        assert await page.run("new URL($('tree').src).pathname.startsWith('/trees/')")
        await asyncio.sleep(1.0)  # for what the tree's own script does to this page
        assert await page.run("scrollY") == 0
        pictures = {scheme: tmp_path / f"{scheme}.png" for scheme in SCHEMES}
        for scheme, path in pictures.items():
            await page.picture(path, scheme)
        assert page.complaints == []
    shade = {s: matplotlib.image.imread(p)[5, 5, :3].mean() for s, p in pictures.items()}
    assert shade["light"] > 0.8 > 0.3 > shade["dark"]


async def test_what_a_model_writes_is_shown_as_text_and_never_run(tmp_path: Path) -> None:
    evil = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    engines = scripted_engines()
    script = {
        "<end_of_output>\n": [f"<answer>{evil} \\boxed{{{evil}}}<end_of_answer>"],
        "": [f"print('{evil}')\n<end_of_code>"],
    }
    own = Engines(policy=ScriptedPolicy(script), preference=None, sandbox=engines.sandbox)
    config = serve_config(ppm=None)
    async with serving(own, config=config) as (url, _), opened(url, tmp_path) as page:
        await page.until("document.querySelector('#model').options.length > 3")
        await page.run("$('problem').value = '3'; ask()")
        assert "onerror" in await page.run("$('box').textContent")
        assert "onerror" in await page.run("$('answer').textContent")
        assert await page.run("document.querySelectorAll('img').length") == 0
        assert await page.run("document.title") == "rstar: think about a problem"


async def test_page_asks_for_a_key_stops_a_search_and_tells_an_error(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-0123456789abcdef\n")
    engines = scripted_engines(gate=asyncio.Event())
    async with (
        serving(engines, keys=read_keys(file)) as (url, server),
        opened(url, tmp_path) as page,
    ):
        await page.until("!$('keyed').hidden")
        await page.run("$('key').value = 'sk-0123456789abcdef'; models()")
        await page.until("document.querySelector('#model').options.length > 3")
        await page.run("$('problem').value = '3'; $('go').click()")
        await page.until("$('go').textContent === 'Stop'")
        while not server.service.standing.running:
            await asyncio.sleep(0.05)
        await page.run("$('go').click()")
        await page.until("$('state').textContent === 'stopped'")
        async with asyncio.timeout(30):
            while server.service.standing.running:
                await asyncio.sleep(0.01)
        await page.run("$('seed').value = '-1'; ask()")
        assert "seed: Input should be greater" in await page.run("$('error').textContent")
        assert await page.run("$('failed').hidden") is False
