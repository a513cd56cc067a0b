"""Photographs TensorBoard: ``python screenshots.py RUNS FOLDER`` writes FOLDER/tensorboard_<page>.png for each page."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 300  # seconds that a page may take on a busy machine
# The pages: what is there when a page is drawn, and how much of it is photographed, in pixels.
PAGES = {
    "custom_scalars": ("tf-custom-scalar-multi-line-chart-card path.line >> nth=-1", 1500, 1600),
    "hparams": ("tf-hparams-table-view >> text=tokens/s", 2240, 640),
    "histograms": ("vz-histogram-timeseries path >> nth=0", 1440, 1080),
    "images": ("tf-image-loader img >> nth=0", 1440, 1080),
    "text": ("tf-text-loader table >> nth=0", 1440, 1080),
}


def main(runs: Path, folder: Path) -> int:
    """Opens TensorBoard in a browser without a window."""
    with tensorboard(runs) as address, browser() as page:
        photograph(page, address, folder)
    return 0


def photograph(page: Page, address: str, folder: Path) -> None:
    """Saves what every page shows."""
    for name in PAGES:
        visit(page, address, name)
        if name == "custom_scalars":
            # All that was measured, as it was measured.
            page.locator("tf-smoothing-input input").fill("0")
            page.get_by_text("Ignore outliers in chart scaling").click()
        page.wait_for_timeout(2000)  # what moves comes to rest
        page.screenshot(path=folder / f"tensorboard_{name}.png")


@contextmanager
def tensorboard(runs: Path) -> Iterator[str]:
    """The address of a TensorBoard that has read what is under ``runs``."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"at (http://\S+)", line) for line in process.stderr)), None)
        if found is None:
            raise RuntimeError(f"TensorBoard ended with exit code {process.wait()}")
        folders = {str(path.parent.relative_to(runs)) for path in runs.rglob("events.out.tfevents.*")}
        until = time.monotonic() + PATIENCE
        while True:
            with urlopen(f"{found[1]}data/runs") as answer:
                if folders <= set(json.load(answer)):
                    break
            if time.monotonic() > until:
                raise TimeoutError(f"TensorBoard has not read {runs} in {PATIENCE} s")
            time.sleep(0.5)
        yield found[1]
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def browser() -> Iterator[Page]:
    """A page of Chromium.

    Raises:
        FileNotFoundError: there is none on the PATH.
    """
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise FileNotFoundError("no Chromium on the PATH: `apt-get install chromium` as root would do")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, timeout=1000 * PATIENCE)
        page = chromium.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        yield page
        chromium.close()


def visit(page: Page, address: str, name: str) -> None:
    """Opens a page of TensorBoard and waits until it is drawn."""
    drawn, width, height = PAGES[name]
    page.set_viewport_size({"width": width, "height": height})
    page.goto(f"{address}#{name}")
    # Not visible, as a line without a slope has no height.
    page.locator(drawn).wait_for(state="attached")


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
