"""A page from rows: complete, self-contained, honest about what it is and what is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from app.report import build, figures, rows, tables
from tests.app.report.made_rows import REFUSED, metric, part, task_metrics


class Reader(HTMLParser):
    """Collects text and headings, and fails on tags that do not close in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input", "path", "use", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.texts.append(data.strip())


def page(*parts: rows.Part) -> str:
    return build(rows.Page(name="demo", made_at="2026-01-01 00:00 UTC", parts=parts, versions={"Lachesis": "0.1.0"}))


def text_of(html: str) -> str:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return re.sub(r"\s+", " ", " ".join(reader.texts))


@pytest.mark.parametrize(("estimable", "refused"), [(1, 0), (0, 3), (12, 5)])
def test_a_page_is_well_formed_and_fetches_nothing_for_one_no_and_many_tasks(estimable: int, refused: int) -> None:
    html = page(part(estimable, refused))
    text = text_of(html)
    assert "<script" not in html and "<img" not in html and "<link" not in html and "@import" not in html
    assert "http" not in html.replace("http://www.w3.org", "") and "url(" not in html.replace("url(#", "")
    assert f"{estimable} of {estimable + refused} judged tasks can be estimated" in text
    assert ("No task can be estimated" in text) == (estimable == 0)
    assert "nan" not in re.findall(r"[a-z]+", text.lower()) and "None" not in text


def test_the_same_rows_write_the_same_bytes() -> None:
    assert page(part(2, 1)) == page(part(2, 1))


def test_what_cannot_be_estimated_stands_with_counts_and_reason() -> None:
    text = text_of(page(part(1, 1)))
    assert "Task z0 12 4 140 too few events: 4 held out, 20 needed" in text
    refused = tables.refusals(part(1, 1))
    assert [(r.title, r.held_out_events, r.reason) for r in refused] == [("Task z0", 4, REFUSED)]


def test_the_table_has_every_model_the_difference_and_the_optimum() -> None:
    (table,) = tables.tables(part(2))
    assert [c.title for c in table.alone.columns] == [
        "mean and SD of the voxels", "age + sex", "tiny-untrained", "tiny-tte", "tiny-tte − tiny-untrained",
        "true hazard, as far as the image shows it", "true hazard",
    ]  # fmt: skip
    assert [c.title for c in table.beside.columns] == [
        "age + sex", "tiny-tte + age + sex", "tiny-tte + age + sex − age + sex",
    ]  # fmt: skip
    assert [name for name, _ in table.rows] == ["Task a0", "Task a1", "mean over tasks"]
    text = text_of(page(part(2)))
    assert "0.650 0.610 to 0.690" in text and "+0.100 +0.060 to +0.140" in text
    assert "closes 50 % of the gap to what the image could show" in text


def test_simulated_and_real_stand_apart_and_each_section_says_which() -> None:
    html = page(part(1), part(1, flags=["arbitrary_pairing", "shared_volumes"], label_set="real"))
    sections = html.split("<section>")[1:3]
    for section, badge, other in zip(
        sections, ("simulated", "not an evaluation"), ("not an evaluation", "simulated"), strict=True
    ):
        headings = re.findall(r"<h[23]>.*?</h[23]>", section)
        assert len(headings) >= 6 and all(f">{badge}</span>" in h and f">{other}</span>" not in h for h in headings)
    assert "real is not an evaluation: scans were paired with persons arbitrarily" in text_of(html)


def test_small_groups_and_small_numbers_at_risk_are_hidden() -> None:
    html, made_panels = page(part(1)), part(1).panels[0]
    figure = next(svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if "calibration" in svg[:400])
    labels = re.findall(r">([^<>]+)</text>", figure)
    assert "&lt;11" in labels and "12" in labels and "7" not in labels
    panel = made_panels.calibrations[0]
    without = replace(made_panels, calibrations=[replace(panel, points=[p for p in panel.points if p.n >= 11])])
    assert figures.task(made_panels) == figures.task(without)  # the group of nine is not drawn


def test_flags_marks_and_a_metric_that_no_task_allows_are_explained() -> None:
    marked = [metric("a0", 0.6, metric="auroc", horizon_days=365, flags=["few_events", "untuned"])]
    beyond = [metric("a0", None, metric="auroc", horizon_days=3650, reason="horizon_beyond_follow_up: 3650 days")]
    given = part(1)
    text = text_of(page(part(1, metrics=[*given.metrics, *marked, *beyond])))
    assert "0.600†‡" in text and "† fewer than 50 events" in text
    assert "AUROC at 3,650 days, Cox head: not estimable for any task (horizon beyond follow up: 3650 days)" in text


def test_every_page_says_what_it_does_not_claim_and_a_page_about_nothing_says_so() -> None:
    text = text_of(page())
    assert "No label set has been evaluated yet" in text
    for claim in (
        "No prognostic finding",
        "does not reproduce",
        "one training seed",
        "Not a medical device",
        "No cause",
    ):
        assert claim in text


def test_names_are_escaped() -> None:
    html = page(part(1, label_set="<b>bold</b> & co"))
    assert "<b>bold" not in html and "&lt;b&gt;bold" in html
    text_of(html)


def test_the_summary_has_one_row_each_in_an_order_that_jsonb_keeps() -> None:
    lines = tables.summary(part(2))
    assert [line["inputs"] for line in lines] == [
        "image, tiny-untrained", "image, tiny-tte", "difference, tiny-tte − tiny-untrained", "voxels: mean and SD",
        "age + sex", "true hazard, as far as the image shows", "true hazard",
    ]  # fmt: skip
    for line in lines:
        assert list(line) == sorted(line, key=lambda key: (len(key), key))
    nothing = tables.summary(part(0, 2))
    assert {line["mean C"] for line in nothing} == {"not estimable"} and {
        line["95 % interval"] for line in nothing
    } == {"-"}


def test_numbers_have_a_true_minus_and_no_negative_zero() -> None:
    assert [tables.number(x, signed=True) for x in (0.1234, -0.1236, -0.0001)] == ["+0.123", "−0.124", "0.000"]
    assert tables.number(-0.0001) == "0.000"


def test_a_difference_is_decided_only_where_its_interval_leaves_zero_out() -> None:
    rows_ = task_metrics("a0", 0.6)
    decided = {tables.column(row).title: tables.cell(row).decided for row in rows_}
    assert decided["tiny-tte − tiny-untrained"] == "above" and decided["tiny-tte"] == ""
    low = metric("a0", -0.02, reference_checkpoint_id=1, reference="x", ci_low=-0.05, ci_high=0.01)
    assert tables.cell(low).decided == ""
    assert tables.cell({**low, "ci_high": -0.01}).decided == "below"
