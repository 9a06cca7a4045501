"""How fluid the report's map is with 20,000 images: ``python tests/benchmarks/page.py``.

The page is opened in headless chromium from the disk. Measured are the seconds until its map is
ready, the milliseconds between frames while a pointer drags the map to and fro, and those from a
pointer's arrival over a point to the thumbnail beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

# Notes when each frame was drawn.
RECORD = """
window.frames_drawn = [];
function next(now) {
  window.frames_drawn.push(now);
  requestAnimationFrame(next);
}
requestAnimationFrame(next);
"""


def page(folder: Path, n: int) -> Path:
    """Write the report of a store of n images of noise."""
    from featcache.images.image_set import ImageSet
    from featcache.report.data import write_report
    from tests.labelled import make_store
    from tests.reported import CLASSES, evaluation

    labels = [CLASSES[i % len(CLASSES)] for i in range(n)]
    ids = [f"images/{i:06d}.png" for i in range(n)]
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, 4)).astype(np.float32)
    store = make_store(folder / "store.h5", features, labels, ids=ids)
    pixels = rng.integers(0, 256, (n, 24, 24, 3), dtype=np.uint8)
    images = ImageSet.from_arrays(pixels, ids=ids)
    path = folder / "report.html"
    write_report(evaluation(store), path, store=store, images=images, maps=("pca",))
    return path


def opened(profile: Path) -> Any:
    """Start the browser."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1200,1000")
    options.add_argument(f"--user-data-dir={profile}")
    return webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )


def main() -> None:
    """Measure, and print a line a figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = page(Path(temporary), options.images)
        driver = opened(Path(temporary) / "profile")
        try:
            measure(driver, path, options.images)
        finally:
            driver.quit()


def measure(driver: Any, path: Path, images: int) -> None:
    """Open the page and time it."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    from tests.report.test_browser import to_point

    started = time.perf_counter()
    driver.get(path.as_uri())
    WebDriverWait(driver, 120, poll_frequency=0.05).until(
        lambda d: d.execute_script("return document.documentElement.dataset.map") == "ready"
    )
    ready = time.perf_counter() - started
    version = driver.capabilities["browserVersion"]
    print(f"chromium {version}, {os.cpu_count()} cores, no GPU; {images:,} images")
    print(f"page of {path.stat().st_size / 1e6:.1f} MB; map ready after {ready:.1f} s")
    waits = []
    tip = driver.find_element(By.CSS_SELECTOR, "#tip")
    for k in range(0, 200, 20):
        to_point(driver, k).perform()
        started = time.perf_counter()
        WebDriverWait(driver, 20, poll_frequency=0.01).until(lambda _: tip.is_displayed())
        waits.append(time.perf_counter() - started)
    print(f"pointing at an image: {np.median(waits) * 1000:.0f} ms until it is shown (median)")
    drag = ActionChains(driver, duration=16)
    drag.move_to_element(driver.find_element(By.CSS_SELECTOR, "#map-plot")).click_and_hold()
    for k in range(100):
        drag.move_by_offset(4 if k % 50 < 25 else -4, 2)
    driver.execute_script(RECORD)
    drag.release().perform()
    gaps = np.diff(driver.execute_script("return window.frames_drawn"))
    print(
        f"dragging the map: {np.median(gaps):.0f} ms a frame (median), "
        f"{np.quantile(gaps, 0.95):.0f} ms (95 %), {len(gaps)} frames"
    )


if __name__ == "__main__":
    main()
