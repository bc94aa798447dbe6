"""The report in a real browser, at the width of a desk and of a phone, in light and in dark mode."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browser_tab, find_browser
from tests.study.conftest import Write
from tests.study.fake_train import records, tomllib
from tests.study.fake_train import write as write_records
from titan_moe.config import to_toml
from titan_moe.study.grid import runs_of
from titan_moe.study.report.page import study_report
from titan_moe.study.runs import prepare
from titan_moe.study.spec import load_study

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed")

# Texts of one figure that lie on each other, by more than a pixel each way.
OVERLAPS = """
[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
  const boxes = texts.map(t => t.getBoundingClientRect());
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const a = boxes[i], b = boxes[j];
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    const slanted = t => /rotate\\((?!-?0\\))/.test(t.getAttribute('transform') || '');
    if (x > 1 && y > 2 && !slanted(texts[i]) && !slanted(texts[j]))
      found.push(svg.closest('figure').id + ': ' + texts[i].textContent + ' / ' + texts[j].textContent);
  }
  return found;
})
"""
OUTSIDE = """
[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(t => {
    const box = t.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
  }).map(t => svg.closest('figure').id + ': ' + t.textContent);
})
"""
SMALLEST = """
Math.min(...[...document.querySelectorAll('figure svg text')].filter(t => t.textContent.trim()).map(t =>
  parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a))
"""
# Contrast of text and of a figure's ink with the page, by the WCAG.
CONTRAST = """
(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126*r + 0.7152*g + 0.0722*b; };
  const back = light(getComputedStyle(document.body).backgroundColor);
  const ratio = c => { const l = light(c); return (Math.max(l, back) + 0.05) / (Math.min(l, back) + 0.05); };
  const probe = document.createElement('i');
  document.body.append(probe);
  const of = v => { probe.style.color = `var(--${v})`; return ratio(getComputedStyle(probe).color); };
  const text = Math.min(...['ink', 'soft', 'accent', 'good', 'bad', 'warn'].map(of));
  const series = Math.min(...[0,1,2,3,4,5,6,7].map(i => of('series-' + i)));
  const label = document.querySelector('figure svg text');
  return {text, series, label: ratio(getComputedStyle(label).fill)};
})()
"""


def make_page(write: Write) -> Path:
    """A report on two numeric axes: families of curves and heatmaps."""
    coeffs = {"key": "balancer.aux_loss.coeff", "values": [0, 0.0001, 0.001, 0.01, 0.1, 0.2, 0.4, 0.6]}
    lrs = {"key": "optimizer.expert.lr", "values": [1e-4, 5e-4], "label": "expert learning rate"}
    path = write(
        axes={"coeff": coeffs | {"label": "aux loss coefficient"}, "lr": lrs},
        study__seeds=[1, 2],
        study__report=["loss", "accuracy"],
    )
    return report_on(path)


def make_rows(write: Write) -> Path:
    """A report on named options with long names."""
    named = {
        "an auxiliary loss of 0.1 with a long name": {"balancer": {"aux_loss": {"coeff": 0.1}}},
        "loss-free": {"balancer": {"aux_loss": False, "loss_free": {"rate": 0.01}}},
        "no balancing at all": {"balancer": {"aux_loss": False}},
    }
    report = ["loss", "accuracy", "maxvio_global", "train_seconds"]
    path = write(axes={"method": {"options": named}}, study__report=report, study__seeds=[1, 2, 13])
    return report_on(path)


def report_on(path: str) -> Path:
    """Write the runs' records, of which seed 13 has but half, and the report."""
    study = load_study(path)
    runs = runs_of(study)
    for run in runs:
        prepare(run)
        config = tomllib.loads(to_toml(run.config))
        write_records(run.folder, records(config, 1, 4 if run.seed == 13 else 8))
    return study_report(study, runs).path


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_page, make_rows])
def test_a_report_can_be_read_on_every_screen(write: Write, tmp_path: Path, make: Any):
    page = make(write)
    lone = tmp_path / "lone.html"  # opens without anything beside it
    shutil.copy(page, lone)
    with browser_tab(tmp_path / "profile") as tab:
        for width in (1280, 375):
            for dark in (False, True):
                tab.show(lone, width=width, dark=dark)
                where = f"at {width} px, {'dark' if dark else 'light'}"
                assert tab.value("document.documentElement.scrollWidth") <= width, f"it scrolls sideways {where}"
                assert tab.value(OVERLAPS) == [], where
                assert tab.value(OUTSIDE) == [], where
                assert tab.value(SMALLEST) > 7.5, f"letters are too small {where}"
                contrast = tab.value(CONTRAST)
                assert contrast["text"] >= 4.5, where
                assert contrast["label"] >= 4.5, where
                assert contrast["series"] >= 3, where
        back = tab.value("getComputedStyle(document.body).backgroundColor")
        assert back != "rgb(255, 255, 255)", "dark mode is dark"
        assert tab.value("document.querySelectorAll('details[open]').length") == 0
        tab.value("document.querySelector('details summary').click()")
        assert "num_experts = 4" in tab.value("document.querySelector('details[open] pre').innerText")
        assert tab.value("performance.getEntriesByType('resource').length") == 0, "it loads something"
