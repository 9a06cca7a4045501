"""The report in a real browser, opened from disk: no error, hover and click work, fits a phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featcache.report.data import write_report
from tests.reported import CLASSES, EVIL_ID, case

pytest.importorskip("bokeh", reason="pip install 'featcache[report]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="pip install 'featcache[dev]'")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="apt-get install chromium chromium-driver"
)

# The pixel of a point of the map, from the middle of its box.
PLACE = """
const view = [...Bokeh.index.roots][0];
const {x, y} = view.model.renderers[0].data_source.data;
const box = document.getElementById("map-plot").getBoundingClientRect();
const k = arguments[0];
return [view.frame.x_scale.compute(x[k]) - box.width / 2,
        view.frame.y_scale.compute(y[k]) - box.height / 2, x.length];
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = case(tmp_path_factory.mktemp("store"))
    path = tmp_path_factory.mktemp("page") / "report.html"
    made.report(path)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # containers run as root
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--window-size=1200,1000")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def shown(browser: Any, page: str) -> Iterator[Any]:
    """The page, loaded afresh; afterwards the console must be clean."""
    browser.get_log("browser")
    browser.get(page)
    WebDriverWait(browser, 60).until(
        lambda d: d.execute_script("return document.documentElement.dataset.map") == "ready"
    )
    yield browser
    assert [line for line in browser.get_log("browser") if line["level"] != "INFO"] == []
    assert browser.title == "featcache report"  # no name became a script


def find(browser: Any, selector: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, selector)


def to_point(browser: Any, k: int) -> ActionChains:
    plot = find(browser, "#map-plot")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    x, y, _ = browser.execute_script(PLACE, k)
    return ActionChains(browser).move_to_element_with_offset(plot, round(x), round(y))


def test_every_section_is_shown(shown: Any) -> None:
    names = ["Leaderboard", "Confusion matrix", "Classes", "Calibration", "Map"]
    names += ["Surest mistakes", "Suspicious labels", "Near-duplicates", "What was run"]
    assert [one.text for one in shown.find_elements(By.CSS_SELECTOR, "h2")] == names
    assert [one.text for one in shown.find_elements(By.CSS_SELECTOR, "nav a")] == names
    text = find(shown, "main").text
    assert "svm (C 10); 30 images to train on, 5 folds, 30 held out." in text
    assert "0.900 [0.880, 0.920]" in text
    notes = [one.text for one in shown.find_elements(By.CSS_SELECTOR, "#heads-notes p")]
    assert notes[0].startswith("accuracy of the best") and notes[1].startswith("features")
    assert notes[-3:] == ["as a whole", "svm was trained on <20> of 30 images.", "svm: few images"]
    assert re.search(r"featcache train .* --head svm --head linear\n", text)
    for name in CLASSES:
        assert name in text
    assert "30 images are left out" in find(shown, "header").text
    figures = [one.text for one in shown.find_elements(By.CSS_SELECTOR, "#figures dt")]
    assert figures[0] == "accuracy" and figures[-1] == "images"
    assert len(shown.find_elements(By.CSS_SELECTOR, "#calibration circle")) >= 2
    pictures = shown.find_elements(By.TAG_NAME, "img")
    assert len(pictures) >= 4
    assert all(one.get_attribute("alt") for one in pictures)
    assert all(one.get_property("naturalWidth") > 0 for one in pictures)


def test_an_evaluation_alone_is_a_page(browser: Any, tmp_path: Path) -> None:
    write_report(case(tmp_path).evaluation, tmp_path / "r.html")
    browser.get_log("browser")
    browser.get((tmp_path / "r.html").as_uri())
    heads = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "h2")]
    assert heads[0] == "Confusion matrix" and "Map" not in heads and "What was run" not in heads
    assert [line for line in browser.get_log("browser") if line["level"] != "INFO"] == []


def test_it_asks_for_nothing_beyond_the_file(shown: Any) -> None:
    entries = shown.execute_script(
        "return performance.getEntriesByType('resource').map((one) => one.name)"
    )
    assert [name for name in entries if not name.startswith(("data:", "blob:"))] == []


def test_hover_shows_the_image_and_a_click_keeps_it(shown: Any) -> None:
    to_point(shown, 5).perform()
    tip = find(shown, "#tip")
    WebDriverWait(shown, 20).until(lambda d: tip.is_displayed())
    assert EVIL_ID in tip.text
    assert any(name in tip.text for name in CLASSES)
    picture = tip.find_element(By.CSS_SELECTOR, ".tile")
    assert picture.value_of_css_property("background-image").startswith('url("blob:')
    said = tip.text
    ActionChains(shown).click().perform()
    picked = find(shown, "#picked")
    WebDriverWait(shown, 20).until(lambda d: picked.text)
    assert picked.text == said


def test_a_cell_of_the_matrix_shows_its_images(shown: Any) -> None:
    cells = shown.find_elements(By.CSS_SELECTOR, "#matrix td button")
    wrong = [cell for cell in cells if cell.text == "1"]
    assert len(wrong) == 2
    wrong[0].click()
    cards = shown.find_elements(By.CSS_SELECTOR, "#cell-images li")
    assert len(cards) == 1
    assert EVIL_ID in cards[0].text
    assert find(shown, "#cell-title").text.startswith("1 image of")
    assert cards[0].find_element(By.CSS_SELECTOR, ".tile").size["width"] > 50


def test_classes_are_put_in_another_order(shown: Any) -> None:
    def names() -> list[str]:
        heads = shown.find_elements(By.CSS_SELECTOR, "#matrix tbody th")
        return [head.get_attribute("title") for head in heads]

    assert names() == list(CLASSES)
    Select(find(shown, "#order")).select_by_value("recall")
    assert names() != list(CLASSES)
    assert sorted(names()) == sorted(CLASSES)


def test_tables_are_sorted_by_a_key_press(shown: Any) -> None:
    def recalls() -> list[float]:
        cells = shown.find_elements(By.CSS_SELECTOR, "#classes tbody tr td:nth-child(3)")
        return [float(cell.text) for cell in cells]

    button = find(shown, "#classes th:nth-child(3) button")
    button.send_keys(Keys.ENTER)
    assert recalls() == sorted(recalls(), reverse=True)
    assert find(shown, "#classes th:nth-child(3)").get_attribute("aria-sort") == "descending"
    button.send_keys(Keys.ENTER)
    assert recalls() == sorted(recalls())


def test_the_map_is_coloured_and_filtered(shown: Any) -> None:
    def points() -> int:
        return int(shown.execute_script(PLACE, 0)[2])

    assert points() == 60
    Select(find(shown, "#layout")).select_by_visible_text("t-SNE")
    Select(find(shown, "#colour")).select_by_visible_text("correctness")
    entries = shown.find_elements(By.CSS_SELECTOR, "#legend button")
    assert [entry.text for entry in entries] == ["right (28)", "wrong (2)", "not scored (30)"]
    entries[2].click()
    assert points() == 30
    assert entries[2].get_attribute("aria-pressed") == "false"


def test_an_image_is_found_without_a_pointer(shown: Any) -> None:
    find(shown, "#find").send_keys("00007", Keys.ENTER)
    assert "00007" in find(shown, "#picked").text


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_sticks_out(shown: Any, width: int) -> None:
    shown.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    try:
        assert shown.execute_script("return document.documentElement.scrollWidth") <= width
        plot = find(shown, "#map-plot").size
        assert 250 < plot["width"] <= width
        links = find(shown, "#links")
        needed = shown.execute_script("return arguments[0].scrollWidth", links)
        assert width < 600 or needed <= links.size["width"]  # a phone's are moved by a finger
    finally:
        shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_light_and_dark(shown: Any) -> None:
    def paper() -> str:
        return str(find(shown, "body").value_of_css_property("background-color"))

    light = paper()
    find(shown, "#theme").click()
    assert paper() != light
    find(shown, "#theme").click()
    assert paper() == light
