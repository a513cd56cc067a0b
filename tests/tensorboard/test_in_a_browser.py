"""The real TensorBoard on real runs, seen by a real browser: it finds what a researcher would look for."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import pytest
from playwright.sync_api import Page, expect

from experiments.screenshots import PAGES, browser, photograph, tensorboard, visit

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
        expect(page.get_by_role("heading", name=title).or_(page.get_by_text(title, exact=True)).first).to_be_visible()
    chart = page.locator("tf-custom-scalar-multi-line-chart-card", has_text="validation loss").first
    # A line per arm.
    expect(chart.locator("g.scatter-plot, path.line")).not_to_have_count(0)


def test_the_hparams_table_has_a_row_per_arm_with_options_and_results(page: Page, address: str) -> None:
    visit(page, address, "hparams")
    table = page.locator("tf-hparams-table-view")
    for text in (
        "arm",
        "causal",
        "num_experts",
        "options",
        "top_k",
        "validation loss",
        "dropped in training",
        "tokens/s",
    ):
        expect(table.get_by_text(text, exact=True).first).to_be_visible()
    for text in ("BASE", "Switch", "solver=transport", "in evaluation"):
        expect(table.get_by_text(text).first).to_be_visible()


def test_there_are_histograms_of_the_load_of_experts(page: Page, address: str) -> None:
    visit(page, address, "histograms")
    expect(page.get_by_text("expert_load/train_step/layer_1").first).to_be_visible()


def test_the_heatmaps_are_drawn(page: Page, address: str) -> None:
    visit(page, address, "images")
    expect(page.get_by_text("expert_load_over_time/layer_1").first).to_be_visible()


def test_certificate_and_ledger_are_tables(page: Page, address: str) -> None:
    visit(page, address, "text")
    for text in ("corpus_fingerprint", "active_parameters", "batch_fingerprint"):
        expect(page.get_by_text(text).first).to_be_visible()


def test_a_screenshot_of_each_page_is_saved(page: Page, address: str, tmp_path: Path) -> None:
    photograph(page, address, tmp_path)
    for name, (_, width, height) in PAGES.items():
        pixels = matplotlib.image.imread(tmp_path / f"tensorboard_{name}.png")
        assert pixels.shape[:2] == (height, width)
        assert pixels.std() > 0.05
