"""The report of an analysis in a real browser: read at two widths, without JavaScript, by pointer and by keys."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.analyze.made_up import made_up
from tests.browser import Tab, browser_tab, check_readable, find_browser
from titan_moe.analyze.report import write_report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed")

# The least contrast of a coloured token with what is behind it, blended as the browser does.
TOKEN_CONTRAST = """
(() => {
  const parts = c => { const p = c.match(/[\\d.]+/g).map(Number), unit = c.startsWith('color(') ? 1 : 255;
    return [p[0] / unit, p[1] / unit, p[2] / unit, p[3] === undefined ? 1 : p[3]]; };
  const light = c => c.slice(0, 3).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const page = parts(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll('.prose i')].map(element => {
    const style = getComputedStyle(element), top = parts(style.backgroundColor), ink = light(parts(style.color));
    const back = light([0, 1, 2].map(i => top[i] * top[3] + page[i] * (1 - top[3])));
    return (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
  }));
})()
"""
POINT = """
((figure, x, y) => {
  const image = document.querySelector(`#${figure} image[id$='-map']`), box = image.getBoundingClientRect();
  image.dispatchEvent(new PointerEvent('pointermove',
    {clientX: box.left + box.width * x, clientY: box.top + box.height * y, bubbles: true}));
  return document.querySelector(`#${figure} output`).textContent;
})
"""
PICTURE = "document.querySelector(\"#layer-together image[id$='-map']\").getAttribute('xlink:href')"


@pytest.mark.parametrize("experts", [8, 64])
def test_it_can_be_read_on_every_screen(tmp_path: Path, experts: int):
    page = write_report(made_up(num_experts=experts, num_checkpoints=3), tmp_path)
    with browser_tab(tmp_path / "profile") as tab:
        for width in (1280, 390):
            for dark in (False, True):
                tab.show(page, width=width, dark=dark)
                check_readable(tab, width, dark)
                assert tab.value(TOKEN_CONTRAST) >= 4.5, f"tokens at {width} px, {'dark' if dark else 'light'}"
        assert tab.value("performance.getEntriesByType('resource').length") == 0, "it loads something"


def test_figures_need_no_javascript(tmp_path: Path):
    page = write_report(made_up(), tmp_path)
    with browser_tab(tmp_path / "profile") as tab:
        tab.send("Emulation.setScriptExecutionDisabled", value=True)
        tab.show(page, width=1280)
        visible = "[...document.querySelectorAll('{}')].filter(one => one.checkVisibility()).length"
        assert tab.value(visible.format("figure svg")) == tab.value("document.querySelectorAll('figure').length") > 20
        assert tab.value(visible.format(".prose i")) == 256
        assert tab.value(visible.format(".controls")) == 0, "a control that does nothing"
        assert "needs JavaScript" in tab.value("document.body.innerText")


def press(tab: Tab, element: str, *keys: str) -> None:
    for key in keys:
        tab.value(f"{element}.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}))")


def enter(tab: Tab, element: str, text: Any, event: str = "input") -> None:
    tab.value(
        f"(e => {{ e.value = '{text}'; e.dispatchEvent(new Event('{event}')) }})(document.getElementById('{element}'))"
    )


def pixels(tab: Tab) -> np.ndarray:
    from PIL import Image

    encoded = tab.value(PICTURE).split(",", 1)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")).astype(int)


def test_maps_tell_their_numbers_and_change_their_layer(tmp_path: Path):
    analysis = made_up()
    page = write_report(analysis, tmp_path)
    lift = analysis["layers"][0]["coactivation"]["lift"]
    load = analysis["layers"][1]["load"]
    with browser_tab(tmp_path / "profile") as tab:
        tab.send("Emulation.setScriptExecutionDisabled", value=True)
        tab.show(page, width=1280)
        still = pixels(tab)
        tab.send("Emulation.setScriptExecutionDisabled", value=False)
        tab.show(page, width=1280)
        drawn = pixels(tab)
        assert (drawn[..., 3] == still[..., 3]).all(), "cells without a number"
        assert np.abs(drawn - still)[drawn[..., 3] > 0].max() <= 12, "the page's colours are those of the figure"

        # By pointer: layer 2 is the second of three rows, expert 5 the sixth of eight columns.
        told = tab.value(f"{POINT}('load-all', 5.5 / 8, 1.5 / 3)")
        assert told == f"layer 2, expert 5: {float(f'{load[5] * 8 / sum(load):.3g}'):g} times the even share"
        # By keys, in another layer, whose picture is another one.
        enter(tab, "choose-layer", 0)
        assert tab.value("document.getElementById('chosen-layer').textContent") == "1"
        assert (pixels(tab) != drawn).any()
        press(tab, "document.querySelector('#layer-together svg')", *["ArrowRight"] * 3, "ArrowDown", "ArrowDown")
        told = tab.value("document.querySelector('#layer-together output').textContent")
        assert told == f"expert 2, expert 3: {float(f'{lift[2][3]:.3g}'):g} times chance"
        enter(tab, "choose-layer", 2)
        assert tab.value("document.getElementById('layer-flow').hidden"), "the last layer has no next one"


def test_tokens_are_searched_by_text_and_by_expert(tmp_path: Path):
    analysis = made_up()
    page = write_report(analysis, tmp_path)
    tops = [[top["text"] for top in tops] for layer in analysis["layers"] for tops in layer["top_tokens"]]
    token = next(text for texts in tops for text in texts if text.isalnum() and len(text) > 2)
    with browser_tab(tmp_path / "profile") as tab:
        tab.show(page, width=390)
        rows = "[...document.querySelectorAll('.expert')].filter(one => one.checkVisibility()).length"
        before = tab.value(rows)
        for query, wanted in {
            token: sum(any(token in text.lower() for text in texts) for texts in tops),
            "layer 2 expert 3": 1,
            "e4": 3,
            "not there at all": 0,
        }.items():
            enter(tab, "query", query)
            assert tab.value(rows) == wanted, query
        enter(tab, "query", "")
        assert tab.value(rows) == before


def test_the_text_shows_experts_and_weights(tmp_path: Path):
    analysis = made_up()
    page = write_report(analysis, tmp_path)
    first = analysis["sample"]["texts"][0]["sequences"][0]
    with browser_tab(tmp_path / "profile") as tab:
        tab.show(page, width=1280)
        enter(tab, "colour-layer", 2)
        enter(tab, "colour-choice", 1, "change")
        classes = tab.value("[...document.querySelectorAll('.prose i')].map(one => one.className)")
        assert classes[:128] == [f"c{experts[1]}" for experts in first["experts"][2]]

        # Arrow keys go from token to token, from before the first one.
        press(tab, "document.getElementById('prose')", *["ArrowRight"] * 4)
        about = tab.value("document.getElementById('about').innerText")
        for expert, weight in zip(first["experts"][2][3], first["weights"][2][3], strict=True):
            shown = [line for line in about.splitlines() if line.startswith(f"expert {expert}, weight ")]
            assert abs(float(shown[0].rsplit(" ", 1)[1]) - weight) <= 0.01
        assert " → ".join(str(layer[3][0]) for layer in first["experts"]) in about

        # One expert alone: its tokens are marked, all others pale.
        tab.value("document.querySelector('#legend [data-expert=\"3\"]').click()")
        lit = "[...document.querySelectorAll('.prose i')].map(one => one.classList.contains('lit'))"
        assert tab.value(lit)[:128] == [experts[1] == 3 for experts in first["experts"][2]]
