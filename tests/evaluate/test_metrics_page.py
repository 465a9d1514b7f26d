"""docs/metrics.md has every metric, with what it reads and which way its figures are better."""

import re
from pathlib import Path

import pytest

from sbv2_jax.evaluate.metrics import METRICS

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
ROWS = {name: cells for name, *cells in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.M)}


def test_the_page_has_every_metric():
    assert list(ROWS) == list(METRICS)
    assert all(name == metric.name for name, metric in METRICS.items())
    figures = [figure for metric in METRICS.values() for figure in metric.better]
    assert len(set(figures)) == len(figures), "a report has a figure of each name"


@pytest.mark.parametrize("name", METRICS)
def test_a_row_says_what_the_metric_reads_and_what_is_better(name):
    metric = METRICS[name]
    figures, reads, source = ROWS[name]
    assert reads.replace(";", ",").split(", ") == [*metric.reads, *metric.takes]
    for way in ("higher", "lower"):
        named = re.findall(rf"([^()]*) \({way}\)", figures)
        found = {figure for part in named for figure in re.findall(r"`(\w+)`", part)}
        assert found == {figure for figure, better in metric.better.items() if better == way}
    for setting, value in re.findall(r"\b(k) = (\d+)", source):
        assert getattr(metric, setting) == int(value)
