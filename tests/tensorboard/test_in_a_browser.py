"""The real TensorBoard on real runs, seen by a real browser: it finds what a researcher would look for."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import pytest
from playwright.sync_api import Page, expect
from screenshots import PAGES, browser, photograph, tensorboard, visit

pytestmark = pytest.mark.exhaustive
expect.set_options(timeout=120_000)


@pytest.fixture(scope="module")
def address(runs: dict[str, Path]) -> Iterator[str]:
    with tensorboard(runs["base"].parents[1]) as found:
        yield found


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    try:
        with browser() as found:
            yield found
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def test_the_custom_scalars_lay_the_arms_over_each_other(page: Page, address: str) -> None:
    visit(page, address, "custom_scalars")
    for title in ("Loss", "Balance", "Drop", "Throughput"):
        expect(page.get_by_text(title, exact=True).first).to_be_visible()
    for title in ("validation loss", "max_vio in training", "dropped in training", "tokens per second"):
        chart = page.locator("tf-custom-scalar-multi-line-chart-card", has_text=title).first
        expect(chart.get_by_text("Matches (2)")).to_be_visible()
        # Of each of the two arms a line, and the same line smoothed.
        expect(chart.locator("path.line")).to_have_count(4)


def test_the_hparams_table_has_a_row_per_arm_with_options_and_results(page: Page, address: str) -> None:
    visit(page, address, "hparams")
    table = page.locator("tf-hparams-table-view")
    columns = ("arm", "causal", "num_experts", "options", "top_k", "validation loss", "dropped in training", "tokens/s")
    for text in (*columns, "BASE", "Switch", "in evaluation"):
        expect(table.get_by_text(text, exact=True).first).to_be_visible()
    expect(table.get_by_text("solver=transport").first).to_be_visible()
    # A box to tick for an option of a router that took no part.
    expect(page.get_by_text("router.temperature", exact=True).first).to_be_visible()


def test_there_is_a_histogram_of_each_arm_and_shown_layer(page: Page, address: str) -> None:
    visit(page, address, "histograms")
    for layer in ("layer_1", "layer_3", "layer_5", "layer_7"):
        expect(page.get_by_text(f"expert_load/final_pass/{layer}", exact=True).first).to_be_visible()
    expect(page.locator("vz-histogram-timeseries").nth(11)).to_be_visible()


def test_the_heatmaps_are_drawn(page: Page, address: str) -> None:
    visit(page, address, "images")
    for text in ("expert_load_over_time/layer_1", "max_vio_over_time"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()
    assert page.locator("tf-image-loader img").first.evaluate("image => image.naturalWidth") == 700


def test_certificate_and_ledger_are_tables(page: Page, address: str) -> None:
    visit(page, address, "text")
    rows = {"certificate": "corpus_fingerprint", "ledger": "active_parameters", "result": "batch_fingerprint"}
    for card, row in rows.items():
        if card != "certificate":  # the first is open
            page.get_by_text(card, exact=True).first.click()
        expect(page.get_by_role("cell", name=row, exact=True).first).to_be_visible()


def test_a_screenshot_of_each_page_is_saved(page: Page, address: str, tmp_path: Path) -> None:
    photograph(page, address, tmp_path)
    for name, (_, width, height) in PAGES.items():
        pixels = matplotlib.image.imread(tmp_path / f"tensorboard_{name}.png")
        assert pixels.shape[:2] == (height, width)
        assert pixels.std() > 0.05
