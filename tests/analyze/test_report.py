"""The report of an analysis: what it says, that nothing in it can do harm, and its bounds."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.analyze.made_up import NASTY, made_up
from titan_moe import theme
from titan_moe.analyze.figures import Map, heatmap, span
from titan_moe.analyze.report import offered_layers, write_report
from titan_moe.analyze.tables import tables

CASES: dict[str, dict[str, Any]] = {
    "several checkpoints": {"num_checkpoints": 3},
    "one layer, one text": {"num_layers": 1, "num_texts": 1, "num_experts": 2, "top_k": 1},
    "all experts chosen": {"num_experts": 4, "top_k": 4},
    "nothing measured": {"pruning": False, "outputs": False, "sample_tokens": 0},
    "many texts": {"num_texts": 14, "num_experts": 300, "num_layers": 2},
}
VOID = {"meta", "link", "br", "input", "img", "hr"}


class Document(HTMLParser):
    """Elements of a page by their name, ids, and texts by the path of the element that they are in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str, str]] = []  # element, its class, text
        self.feed(text)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open:
            tag, attributes = self.open[-1]
            self.texts.append((tag, attributes.get("class") or "", data))

    def inside(self, name: str, css: str | None = None) -> list[str]:
        return [text for tag, found, text in self.texts if tag == name and (css is None or found == css)]


def page_of(tmp_path: Path, analysis: dict[str, Any]) -> tuple[Document, dict[str, Any], str]:
    text = write_report(analysis, tmp_path).read_text(encoding="utf-8")
    document = Document(text)
    (data,) = [text for tag, _, text in document.texts if tag == "script" and text.startswith("{")]
    return document, json.loads(data), text


def bytes_of(text: str, kind: str = "u1") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_it_says_what_was_measured(tmp_path: Path):
    analysis = made_up(num_checkpoints=2)
    document, data, _ = page_of(tmp_path, analysis)
    # Each load over its even share, worked from the counts.
    for index, text in enumerate(analysis["texts"]):
        wanted = [
            count * 8 / sum(layer["load_by_text"][index])
            for layer in analysis["layers"]
            for count in layer["load_by_text"][index]
        ]
        assert data["maps"][f"load-text-{index}"]["values"] == pytest.approx(wanted, rel=5e-3), text
    assert data["maps"]["load-all"]["rows"] == ["1", "2", "3"]
    for index, layer in enumerate(analysis["layers"]):
        lift = [
            None if value is None else pytest.approx(value, rel=5e-3)
            for row in layer["coactivation"]["lift"]
            for value in (row or [None] * 8)
        ]
        assert data["choices"]["layer-together"]["layers"][index] == lift
    assert data["choices"]["layer-flow"]["layers"][-1] is None, "the last layer has no next one"

    # The words above the figures.
    tiles = dict(zip(document.inside("b"), document.inside("strong"), strict=False))
    assert tiles["dead experts"] == "1 of 24"
    busiest = sum(max(layer["load"]) * 8 / sum(layer["load"]) for layer in analysis["layers"]) / 3
    assert tiles["busiest expert"] == f"{busiest:.2f}x"
    (summary,) = document.inside("p", "best")
    # Dead experts are left out: a handful of tokens says little.
    excess = [
        (value, layer["layer"], expert)
        for layer in analysis["layers"]
        for expert, value in enumerate(layer["specialisation"]["excess"])
        if value is not None
    ]
    value, layer, expert = max(one for one in excess if one[1:] != (1, 1))
    assert summary.startswith("Dead: expert 1 of layer 1. ")
    assert f"The most specialised expert is {expert} of layer {layer} ({value:.2f} nats)" in summary


def test_slots_and_tokens_without_experts_are_told_of_each_layer(tmp_path: Path):
    analysis = made_up()
    document, _, _ = page_of(tmp_path, analysis)
    head, cells = document.inside("th"), document.inside("td")
    width = len(head) - head.index("MaxVio") + 1
    assert head[-3:] == ["experts a token", "unused slots", "tokens without expert"]
    rows = [cells[-width * n :][:width] for n in (3, 2, 1)]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[-3:] for row in rows] == [["2.00", "0", "0"], ["2.00", "1,000", "10"], ["2.00", "2,000", "20"]]
    page = tables(analysis)
    assert "| experts a token | unused slots | tokens without expert |\n" in page
    for ending in (" | 2 | 0 | 0 |\n", " | 2 | 1,000 | 10 |\n", " | 2 | 2,000 | 20 |\n"):
        assert ending in page


def test_a_layer_without_a_margin_says_why(tmp_path: Path):
    analysis = made_up()
    assert "No margin" not in page_of(tmp_path, analysis)[2] + tables(analysis)
    for layer, reason in ((0, "no token has an expert"), (2, "no token has an expert"), (1, "other")):
        analysis["layers"][layer] |= {"margin": None, "margin_missing": reason}
    for text in (page_of(tmp_path, analysis)[2], tables(analysis)):
        assert "No margin in layers 1, 3: no token has an expert." in text
        assert "No margin in layer 2: other." in text


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ([0.00231, 0.00198, -0.00004, 0.0], ["0.00231", "0.00198", "-0.00004", "0.00000"]),
        ([1.0, 0.25], ["1.00", "0.25"]),
    ],
)
def test_cells_of_small_numbers_are_told_apart(losses: list[float], wanted: list[str]):
    scale = span(np.array(losses), "loss", signed=True, least=1e-6)
    names = [str(expert) for expert in range(len(losses))]
    with theme.style():
        figure = heatmap(Map(np.array([losses]), scale, "layer", ["0"], "expert", names))
    assert [text.get_text() for text in figure.axes[0].texts] == wanted


def test_tokens_are_coloured_by_their_experts(tmp_path: Path):
    analysis = made_up(top_k=3)
    document, data, _ = page_of(tmp_path, analysis)
    sample, first = data["sample"], data["first"]
    sequences = [sequence for text in analysis["sample"]["texts"] for sequence in text["sequences"]]
    experts_LTK = np.concatenate([np.array(one["experts"]) for one in sequences], 1)
    weights_LTK = np.concatenate([np.array(one["weights"]) for one in sequences], 1)
    assert (bytes_of(sample["experts"]).reshape(experts_LTK.shape) == experts_LTK).all()
    weights = bytes_of(sample["weights"]).reshape(experts_LTK.shape) * sample["weightStep"]
    assert np.abs(weights - weights_LTK).max() <= sample["weightStep"] / 2 + 1e-9
    colours = [attributes.get("class") for tag, attributes in document.elements if tag == "i"]
    assert colours == [f"c{expert}" for expert in experts_LTK[first, :, 0]], "eight experts have a colour each"


def test_more_experts_than_colours_are_ranked_by_use(tmp_path: Path):
    analysis = made_up(num_experts=300, num_layers=1)
    document, data, _ = page_of(tmp_path, analysis)
    experts_T = bytes_of(data["sample"]["experts"], "<u2").reshape(-1, 2)[:, 0]
    counts = np.bincount(experts_T, minlength=300)
    order = sorted(range(300), key=lambda expert: (-counts[expert], expert))
    elements = [attributes for tag, attributes in document.elements if tag == "i"]
    for attributes, expert in zip(elements, experts_T, strict=True):
        rank = order.index(expert)
        assert attributes["class"] == (f"c{rank}" if rank < 8 else "o")
        if rank >= 8:
            assert attributes["style"] == f"--h:{round(rank * 137.508) % 360}"


def test_a_slot_without_an_expert_has_no_colour(tmp_path: Path):
    analysis = made_up()
    sequence = analysis["sample"]["texts"][0]["sequences"][0]
    for layer in sequence["experts"]:
        layer[0] = [-1, -1]
    document, data, _ = page_of(tmp_path, analysis)
    assert "class" not in next(attributes for tag, attributes in document.elements if tag == "i")
    assert bytes_of(data["sample"]["experts"])[0] == 255


def test_texts_of_others_stay_text(tmp_path: Path):
    analysis = made_up(vocab=len(NASTY) + 3, num_checkpoints=2)
    document, _, text = page_of(tmp_path, analysis)
    names = {tag for tag, _ in document.elements}
    assert not names & {"img", "u", "iframe", "object", "link", "base"}
    assert [tag for tag, _ in document.elements].count("script") == 2
    assert not [name for _, attributes in document.elements for name in attributes if name.startswith("on")]
    assert not set(text) & {"\x00", "\x1b", "\u202e"}, "control characters are shown"
    # All tokens of the sample stand as they are, but for those that can't be shown.
    shown = {"\n": "⏎\n", "\x00": "␀", "\x1b": "␛", "\r": "␍", "\u202e": "\\u202e", "\udcff": "\\udcff"}
    raw = "".join(token for one in analysis["sample"]["texts"] for part in one["sequences"] for token in part["tokens"])
    wanted = re.sub("|".join(map(re.escape, shown)), lambda found: shown[found[0]], raw)
    assert "".join(document.inside("i")) == wanted


def test_it_needs_nothing_else(tmp_path: Path):
    document, _, text = page_of(tmp_path, made_up(num_checkpoints=2))
    policies = [a["content"] for tag, a in document.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0].startswith("default-src 'none';")
    for tag, attributes in document.elements:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert not re.search(r"url\((?!#)", text)


@pytest.mark.parametrize("case", CASES)
def test_every_analysis_has_a_report(tmp_path: Path, case: str):
    analysis = made_up(**CASES[case])
    document, data, text = page_of(tmp_path, analysis)
    ids = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    linked = [str(a["href"])[1:] for tag, a in document.elements if tag == "a"]
    assert set(linked) <= set(ids)
    assert ("training" in linked) == (analysis["over_training"] is not None)
    assert ("pruning" in linked) == (analysis["pruning"] is not None)
    assert ("text" in linked) == (data["sample"] is not None)
    assert ("layer-flow" in ids) == (len(analysis["layers"]) > 1)
    assert ("layer-together" in ids) == (analysis["model"]["top_k"] > 1)
    assert ("margin" in ids) == (analysis["layers"][0]["margin"] is not None)
    assert "nan" not in text.lower().replace("nance", "") or not re.search(r">[^<]*\bnan\b", text), "no NaN in sight"
    assert set(data["maps"]) | set(data["choices"]) <= set(ids)


def test_a_large_model_has_a_page_that_a_browser_opens(tmp_path: Path):
    big = made_up(24, 128, 8, num_texts=4, num_checkpoints=4, num_tokens=2048, vocab=500, sample_tokens=2048)
    document, data, text = page_of(tmp_path, big)
    assert len(text) < 9e6
    assert data["offered"] == list(range(24))
    assert isinstance(data["choices"]["layer-weight_similarity"]["layers"][3], str)
    values = [
        [None if i == j else one for j, one in enumerate(row)]
        for i, row in enumerate(big["layers"][3]["weight_similarity"])
    ]
    found, scale = (
        bytes_of(data["choices"]["layer-weight_similarity"]["layers"][3]),
        data["choices"]["layer-weight_similarity"],
    )
    step = (scale["high"] - scale["low"]) / 254
    for level, value in zip(found.tolist(), [one for row in values for one in row], strict=True):
        assert (level == 255) == (value is None)
        assert value is None or math.isclose(scale["low"] + step * level, value, abs_tol=step * 0.51)
    shown = len([1 for tag, _ in document.elements if tag == "i"])
    assert shown * 24 * 8 <= 300_000
    assert f"The first {shown:,} of 2,048 tokens are shown." in " ".join(" ".join(document.inside("p", "soft")).split())


def test_layers_to_choose_from_are_bounded():
    larger = {"layers": [None] * 58, "model": {"num_experts": 256}}
    assert offered_layers(larger, 33) == [3, 13, 23, 33, 43, 53], "every tenth, with the one that is shown first"
