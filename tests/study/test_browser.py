"""The report in a real browser, at the width of a desk and of a phone, in light and in dark mode."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browser_tab, check_readable, find_browser
from tests.study.conftest import Write
from tests.study.fake_train import records, tomllib
from tests.study.fake_train import write as write_records
from titan_moe.config import to_toml
from titan_moe.study.grid import runs_of
from titan_moe.study.report.page import study_report
from titan_moe.study.runs import prepare
from titan_moe.study.spec import load_study

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed")


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
                check_readable(tab, width, dark)
        back = tab.value("getComputedStyle(document.body).backgroundColor")
        assert back != "rgb(255, 255, 255)", "dark mode is dark"
        assert tab.value("document.querySelectorAll('details[open]').length") == 0
        tab.value("document.querySelector('details summary').click()")
        assert "num_experts = 4" in tab.value("document.querySelector('details[open] pre').innerText")
        assert tab.value("performance.getEntriesByType('resource').length") == 0, "it loads something"
