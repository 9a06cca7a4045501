"""The report as a file: what stands in it, what cannot get into it, how large it may become."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import MissingExtra, OutputError
from featcache.images.image_set import ImageSet
from featcache.report.data import write_report
from featcache.study.audit import Finding, Findings
from tests.labelled import make_store
from tests.reported import CLASSES, Case, case, evaluation

pytest.importorskip("bokeh", reason="pip install 'featcache[report]'")


class Page(HTMLParser):
    """Tags, the text of scripts, and what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.data: dict[str, Any] = {}
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes = self.tags[-1][1]
            if attributes.get("type") == "application/json":
                self.data[str(attributes["id"])] = json.loads(data)
            else:
                self.scripts.append(data)
        elif self._inside != "style":
            self.text += data

    @property
    def policy(self) -> dict[str, list[str]]:
        found = [a for t, a in self.tags if a.get("http-equiv") == "Content-Security-Policy"]
        rules = [rule.split() for rule in str(found[0]["content"]).split(";")]
        return {rule[0]: rule[1:] for rule in rules}

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(made: Case, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "report.html"
    made.report(path, title="Tulips & <others>")
    return Page(path.read_text())


def test_every_section_has_its_data(page: Page, made: Case) -> None:
    data = page.data["data"]
    assert data["leaderboard"] == json.loads(made.leaderboard.to_json())
    below = made.leaderboard.to_text().split("\n\n")[1].split("\n")
    assert below[0].startswith("best by cross-validation") and data["remarks"] == below[1:]
    assert "Tulips & <others>" in page.text
    assert data["evaluation"]["notes"] == ["30 images are left out"]
    assert any(line.startswith("featcache train") for line in data["commands"])
    assert len(data["mistakes"]["cards"]) == 2
    assert dict(data["facts"])["backbone"]


def test_every_metric_is_there(page: Page, made: Case) -> None:
    e, found = made.evaluation, page.data["data"]["evaluation"]
    assert {name: found[name] for name in e.figures.to_dict()} == e.figures.to_dict()
    assert found["top_k"]["2"] == e.top_k[2]
    assert found["mistakes"] == len(e.mistakes)
    assert sum(one["count"] for one in found["calibration"]) == len(e)
    assert [one["label"] for one in found["per_class"]] == list(e.classes)


def test_the_policy_allows_the_own_scripts_and_nothing_else(page: Page) -> None:
    hashes = {
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for text in page.scripts
    }
    assert set(page.policy["script-src"]) == hashes
    assert page.policy["default-src"] == ["'none'"]
    assert page.policy["img-src"] == ["data:", "blob:"]
    assert "connect-src" not in page.policy


def test_names_never_become_markup(page: Page) -> None:
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    assert not page.of("img")
    assert all("src" not in attributes for attributes in page.of("script"))
    assert not page.of("link") and not page.of("iframe")
    assert page.data["data"]["classes"] == list(CLASSES)


def test_the_script_knows_every_image(page: Page, made: Case) -> None:
    data = page.data["data"]
    assert sorted(data["ids"]) == sorted(made.store.ids)
    scored = {id for id, p in zip(data["ids"], data["predicted"], strict=True) if p >= 0}
    assert scored == set(made.evaluation.ids)
    wrong = {
        id
        for id, label, p in zip(data["ids"], data["label"], data["predicted"], strict=True)
        if p >= 0 and p != label
    }
    assert wrong == {one.id for one in made.evaluation.mistakes}
    for i, j, n in data["confusion"]:
        assert made.evaluation.confusion[i, j] == n
    assert list(data["maps"]) == ["PCA", "t-SNE"]
    assert all(len(axis) == 60 for axes in data["maps"].values() for axis in axes)
    parts = [data["splits"][code] for code in data["split"]]
    assert parts.count("held out") == parts.count("training") == 30
    assert min(data["tiles"]) == 0 and sorted(data["tiles"]) == list(range(60))


def test_near_duplicates_across_the_split_are_found(page: Page) -> None:
    found = page.data["data"]["duplicates"]
    assert re.match(r"[1-9]\d* of 30 evaluated images have a nearly equal one", found["note"])
    assert all(pair["similarity"] >= 0.95 for pair in found["pairs"])
    assert all(card["picture"] for pair in found["pairs"] for card in pair["cards"])


def test_of_an_audit_its_findings_are_shown(made: Case, tmp_path: Path) -> None:
    one = Finding("label", str(made.store.ids[1]), CLASSES[1], "", 0.0123, suggested="tulip")
    write_report(
        made.evaluation, tmp_path / "r.html", images=made.images, findings=Findings((one,), 60)
    )
    shown = Page((tmp_path / "r.html").read_text()).data["data"]["suspects"]
    assert shown["note"].startswith("1 of 60 images")
    (card,) = shown["cards"]
    assert card["label"] == f"{CLASSES[1]} 0.012" and card["second"] == "rather tulip?"


def test_an_evaluation_alone_is_enough(made: Case, tmp_path: Path) -> None:
    write_report(made.evaluation, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert "Surest mistakes" in page.text
    assert page.data["data"]["leaderboard"] is None and "maps" not in page.data["data"]
    assert all(card["picture"] is None for card in page.data["data"]["mistakes"]["cards"])
    assert len(page.scripts) == 1  # no map: no Bokeh


def test_images_that_cannot_be_read_go_without(made: Case, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for id in made.evaluation.ids[:3]:
        (folder / str(id).replace("/", "_")).write_bytes(b"not an image")
    broken = ImageSet.from_files(str(folder / "*"))
    write_report(made.evaluation, tmp_path / "r.html", images=broken)
    page = Page((tmp_path / "r.html").read_text())
    assert set(page.data["data"]["tiles"]) == {-1}


def test_a_report_is_replaced_and_nothing_else_is(made: Case, tmp_path: Path) -> None:
    write_report(made.evaluation, tmp_path / "r.html", title="one")
    write_report(made.evaluation, tmp_path / "r.html", title="two")
    assert "<title>two</title>" in (tmp_path / "r.html").read_text()
    (tmp_path / "mine.html").write_text("<p>my own page</p>")
    with pytest.raises(OutputError, match="not a report of featcache"):
        write_report(made.evaluation, tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>my own page</p>"


def test_without_bokeh_it_says_what_to_install(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh.plotting", None)
    with pytest.raises(MissingExtra, match=r"pip install 'featcache\[report\]'"):
        write_report(made.evaluation, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_20000_images_stay_under_15_mb(tmp_path: Path) -> None:
    """Noise, which compresses worst, under long names."""
    n = 20_500
    y = [CLASSES[i % 3] for i in range(n)]
    ids = [f"a rather long folder name/{i:06d} and a long file name.png" for i in range(n)]
    rng = np.random.default_rng(0)
    store = make_store(tmp_path / "s.h5", rng.normal(size=(n, 4)).astype(np.float32), y, ids=ids)
    pixels = rng.integers(0, 256, (n, 24, 24, 3), dtype=np.uint8)
    images = ImageSet.from_arrays(pixels, ids=ids)
    path = tmp_path / "r.html"
    write_report(evaluation(store), path, store=store, images=images, maps=("pca",))
    assert path.stat().st_size < 15_000_000
    data = Page(path.read_text()).data["data"]
    assert len(data["ids"]) == 20_000
    assert sum(tile >= 0 for tile in data["tiles"]) > 5_000
