"""The report's page: HTML from what is to be shown. Every label and file name is escaped here."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import Any

from featcache.results.evaluation import Bin, Evaluation
from featcache.results.intervals import Score
from featcache.results.leaderboard import Leaderboard, LeaderboardRow

__all__ = ["GENERATOR", "Card", "Content", "Pair", "render"]

GENERATOR = '<meta name="generator" content="featcache">'


@dataclass(frozen=True)
class Card:
    """An image of a gallery.

    Attributes
    ----------
    id, label, predicted : str
        The image, its label, and what it was or might better be called; empty where unknown.
    probability : float
        Of `predicted` among mistakes, of `label` among suspects.
    picture : str or None
        WebP in base64.
    """

    id: str
    label: str
    predicted: str
    probability: float
    picture: str | None


@dataclass(frozen=True)
class Pair:
    """Two images that are nearly equal: an evaluated one, and one of the other side."""

    one: Card
    other: Card
    similarity: float


@dataclass
class Content:
    """All that the page shows, but for the columns that its script reads."""

    title: str
    version: str
    evaluation: Evaluation
    leaderboard: Leaderboard[Any] | None
    mistakes: list[Card]
    has_pictures: bool
    facts: list[tuple[str, str]]
    commands: Sequence[str]
    suspects: list[Card] = field(default_factory=list)
    suspects_note: str = ""
    pairs: list[Pair] = field(default_factory=list)
    pairs_note: str = ""
    maps: Sequence[str] = ()
    map_item: Mapping[str, Any] | None = None
    bokeh: Sequence[str] = ()


def render(content: Content, data: Mapping[str, Any]) -> str:
    """Return the page.

    Parameters
    ----------
    content : Content
        What is shown.
    data : mapping
        JSON values that the page's script reads.
    """
    sections = [(key, name, body) for key, name, make in _SECTIONS if (body := make(content))]
    scripts = [*content.bokeh, _asset("page.js")]
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
    blocks = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{name}</h2>{body}'
        "</section>"
        for key, name, body in sections
    )
    item = "" if content.map_item is None else _json_block("map-item", content.map_item)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{GENERATOR}\n"
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(content.title)}</title>\n<style>{_asset('page.css')}</style>\n"
        "</head>\n<body>\n"
        f'<header><div class="top"><h1>{escape(content.title)}</h1>'
        '<button type="button" class="plain" id="theme">Light / dark</button></div>'
        f"{_summary(content)}</header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>{blocks}\n'
        f"<footer>Made by featcache {escape(content.version)}.</footer></main>\n"
        '<div id="tip" class="card" aria-hidden="true" hidden></div>\n'
        f"{_json_block('data', data)}\n{item}\n"
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    """Return the text of a file beside this module."""
    return resources.files("featcache.report").joinpath("assets", name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Return the content policy: these very scripts, no network, no frames, no forms.

    Styles may be inline: Bokeh writes its own into the page, and a style cannot run anything.
    """
    hashes = " ".join(
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _json_block(name: str, value: Mapping[str, Any]) -> str:
    """Return data for a script. No text in it can end the block or start a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


# --- the sections ----------------------------------------------------------------------------


def _summary(content: Content) -> str:
    e = content.evaluation
    figures = [
        ("accuracy", f"{e.accuracy:.3f}", _interval(e.accuracy)),
        ("balanced accuracy", f"{e.balanced_accuracy:.3f}", _interval(e.balanced_accuracy)),
        ("macro F1", f"{e.macro_f1:.3f}", _interval(e.macro_f1)),
        *(
            (f"top-{k} accuracy", f"{value:.3f}", f"the label is among the {k} likeliest")
            for k, value in e.top_k.items()
            if k > 1
        ),
        ("log loss", f"{e.log_loss:.3f}", "natural logarithm"),
        ("calibration error", f"{e.ece:.3f}", "0 is perfect"),
        ("images", f"{len(e):,}", f"{len(e.mistakes):,} mistakes"),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{small}</small></dd></div>"
        for name, value, small in figures
    )
    unit = "images" if e.groups is None else "groups"
    notes = [f"Brackets are 95 % bootstrap intervals over {unit}.", *(f"{n}." for n in e.notes)]
    return (
        f'<div><dl class="figures">{cells}</dl>'
        f'<p class="quiet">{" ".join(escape(note) for note in notes)}</p></div>'
    )


def _interval(score: Score) -> str:
    return f"[{score.low:.3f}, {score.high:.3f}]"


def _leaderboard(content: Content) -> str:
    board = content.leaderboard
    if board is None:
        return ""
    held = board.n_test > 0
    scores = [row.cv.accuracy for row in board]
    scores += [row.held_out.accuracy for row in board if row.held_out is not None]
    low, high = min(score.low for score in scores), max(score.high for score in scores)
    other = board.scoring != "accuracy"
    header = ["head", *([f"CV {board.scoring}"] if other else []), "CV accuracy"]
    header += ["held-out accuracy", "balanced", "macro F1"] if held else []
    header += ["fit s", "predict µs"]
    rows = []
    for number, row in enumerate(board):
        cells = [f'<th scope="row">{escape(row.head)}</th>']
        if other:
            cells.append(f"<td>{row.cv_score:.4f}</td>")
        cells.append(f"<td>{row.cv.accuracy}</td>")
        if row.held_out is not None:
            balanced, f1 = row.held_out.balanced_accuracy, row.held_out.macro_f1
            cells.append(f"<td>{row.held_out.accuracy}</td>")
            cells += [f"<td>{balanced:.3f}</td>", f"<td>{f1:.3f}</td>"]
        cells.append(f"<td>{row.search_seconds + row.fit_seconds:.1f}</td>")
        cells.append(f"<td>{row.predict_us:.0f}</td>")
        cells.append(f"<td>{_whiskers(row, low, high)}</td>")
        rows.append(f"<tr{' class=best' if number == 0 else ''}>{''.join(cells)}</tr>")
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    best = board[0]
    params = ", ".join(f"{name} {value}" for name, value in best.params.items())
    counts = f"{board.n_fit:,} images to train on, {board.folds}, {board.n_test:,} held out."
    notes = [*board.notes, *(f"{head} was left out: {why}" for head, why in board.left_out.items())]
    return (
        f"<p>Best by cross-validation, never by the held-out images: <b>{escape(best.head)}</b>"
        f"{escape(f' ({params})' if params else '')}; {escape(counts)}</p>"
        f'<div class="wide" tabindex="0" role="group" aria-label="Leaderboard"><table>'
        f'<thead><tr>{heads}<th scope="col">{low:.2f} to {high:.2f}</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="quiet">In the last column: grey, cross-validation; blue, held-out images; '
        "the lines are 95 % intervals.</p>"
        + "".join(f'<p class="quiet">{escape(note)}</p>' for note in notes)
    )


def _whiskers(row: LeaderboardRow, low: float, high: float) -> str:
    """Return the accuracies of a row with their intervals, drawn."""
    span = max(high - low, 1e-9)

    def x(value: float) -> float:
        return 6 + 148 * (value - low) / span

    marks = [("cv", 7, row.cv.accuracy)]
    if row.held_out is not None:
        marks.append(("held", 17, row.held_out.accuracy))
    drawn = "".join(
        f'<g class="{kind}"><line x1="{x(score.low):.1f}" x2="{x(score.high):.1f}" y1="{y}" '
        f'y2="{y}" stroke-width="2"/><circle cx="{x(score):.1f}" cy="{y}" r="4"/></g>'
        for kind, y, score in marks
    )
    return f'<svg width="160" height="24" aria-hidden="true">{drawn}</svg>'


def _confusion(content: Content) -> str:
    e = content.evaluation
    off = [
        (int(e.confusion[i, j]), e.classes[i], e.classes[j])
        for i, j in zip(*e.confusion.nonzero(), strict=True)
        if i != j
    ]
    off.sort(key=lambda cell: -cell[0])
    worst = "".join(
        f"<li>{n:,} images of <b>{escape(a)}</b> predicted <b>{escape(b)}</b></li>"
        for n, a, b in off[:8]
    )
    often = f"<p>Most often confused:</p><ul>{worst}</ul>" if worst and len(e.classes) > 2 else ""
    return (
        "<p>Press a number to see its images. The shade is the share of the row.</p>"
        '<div class="row"><label>Order of the classes <select id="order">'
        '<option value="name">name</option><option value="errors">most mistakes</option>'
        '<option value="recall">lowest recall</option><option value="images">most images</option>'
        '</select></label></div><div id="matrix" class="wide matrix"></div>'
        '<p id="cell-title" aria-live="polite"></p>'
        f'<ul id="cell-images" class="cards"></ul>{often}'
    )


def _per_class(content: Content) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(s.label)}</th><td>{s.precision:.3f}</td>'
        f"<td>{s.recall:.3f}</td><td>{s.f1:.3f}</td>"
        f'<td data-value="{s.support}">{s.support:,}</td>'
        f'<td data-value="{s.predicted}">{s.predicted:,}</td></tr>'
        for s in content.evaluation.per_class
    )
    names = ("class", "precision", "recall", "F1", "images", "predicted")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<div class="wide" tabindex="0" role="group" aria-label="Scores of each class">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _reliability(content: Content) -> str:
    """Return the reliability diagram (Niculescu-Mizil and Caruana, ICML 2005) as a drawing."""
    bins = [one for one in content.evaluation.calibration if one.count]
    most = max(one.count for one in bins)
    bars = "".join(
        f'<rect class="bar" x="{_x(one.low):.1f}" width="{_x(one.high) - _x(one.low) - 1:.1f}" '
        f'y="{290 - 60 * one.count / most:.1f}" height="{60 * one.count / most:.1f}"/>'
        for one in bins
    )
    points = [(_x(one.confidence), _y(one.accuracy)) for one in bins]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{_bin(one)}</title></circle>'
        for (x, y), one in zip(points, bins, strict=True)
    )
    ticks = "".join(
        f'<line class="axis" x1="{_x(t)}" x2="{_x(t)}" y1="{_y(0)}" y2="{_y(1)}"/>'
        f'<line class="axis" x1="{_x(0)}" x2="{_x(1)}" y1="{_y(t)}" y2="{_y(t)}"/>'
        f'<text x="{_x(t)}" y="306" text-anchor="middle">{t:.1f}</text>'
        f'<text x="34" y="{_y(t) + 4}" text-anchor="end">{t:.1f}</text>'
        for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    )
    told = "; ".join(_bin(one) for one in bins)
    return (
        "<p>How often the predictor is right when it is so sure. On the dashed line, its "
        "probabilities can be taken at their word; below it, it is too sure of itself. "
        "Bars: how many images.</p>"
        f'<svg viewBox="0 0 320 330" width="100%" style="max-width: 28rem" role="img" '
        f'aria-label="Reliability diagram. {told}">{ticks}{bars}'
        f'<line class="dash" x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}"/>'
        f'<polyline class="line" points="{line}"/>{dots}'
        '<text x="175" y="324" text-anchor="middle">confidence</text>'
        '<text x="12" y="160" text-anchor="middle" transform="rotate(-90 12 160)">accuracy</text>'
        "</svg>"
    )


def _x(value: float) -> float:
    return 40 + 270 * value


def _y(value: float) -> float:
    return 290 - 270 * value


def _bin(one: Bin) -> str:
    return f"confidence {one.confidence:.2f}: accuracy {one.accuracy:.2f} of {one.count:,} images"


def _map(content: Content) -> str:
    if content.map_item is None:
        return ""
    names = "".join(f"<option>{escape(name)}</option>" for name in content.maps)
    return (
        "<p>Each point is an image; near points have similar features. Point at one to see it, "
        "press it to keep it beside the map.</p>"
        f'<div class="row"><label>Map <select id="layout">{names}</select></label>'
        '<label>Colour <select id="colour"><option>class</option><option>correctness</option>'
        "<option>split</option></select></label>"
        '<label>Find <input id="find" type="search" placeholder="part of a file name"></label>'
        "</div>"
        '<div class="map"><div id="map-plot" role="group" aria-label="Map of the images. '
        'Type a file name above to pick an image without a pointer."></div>'
        '<div><ul id="legend" class="legend" aria-label="Press to hide or show"></ul>'
        '<div id="picked" class="card" aria-live="polite"></div></div></div>'
    )


def _mistakes(content: Content) -> str:
    total = len(content.evaluation.mistakes)
    if not total:
        return "<p>None.</p>"
    told = f"The {len(content.mistakes)} surest of {total:,}."
    if not content.has_pictures:
        told += " Give the images to see them."
    return f"<p>{told}</p>" + _cards(
        content.mistakes, lambda card: f"{card.predicted} {card.probability:.3f}", "predicted "
    )


def _suspects(content: Content) -> str:
    return f"<p>{escape(content.suspects_note)}</p>" + _cards(
        content.suspects, lambda card: f"{card.predicted}?", "rather ", of_label=True
    )


def _duplicates(content: Content) -> str:
    pairs = "".join(
        f'<li class="pair">{_cards([pair.one, pair.other], None, "")}'
        f'<span class="quiet">similarity {pair.similarity:.3f}'
        f"{', <b>other label</b>' if pair.one.label != pair.other.label else ''}</span></li>"
        for pair in content.pairs
    )
    return f'<p>{escape(content.pairs_note)}</p><ul class="pairs">{pairs}</ul>'


def _cards(
    cards: Sequence[Card],
    second: Callable[[Card], str] | None,
    before: str,
    *,
    of_label: bool = False,
) -> str:
    """Return a gallery: picture, label, and what `second` says of it."""
    made = []
    for card in cards:
        line = "" if second is None else f"{before}{second(card)}"
        label = card.label or "no label"
        if of_label:
            label += f" {card.probability:.3f}"
        picture = ""
        if card.picture is not None:
            alt = escape(f"{card.id}: {label}" + (f", {line}" if line else ""))
            picture = f'<img src="data:image/webp;base64,{card.picture}" alt="{alt}">'
        said = f"<span>{escape(line)}</span>" if line else ""
        made.append(f"<li>{picture}<b>{escape(label)}</b>{said}<span>{escape(card.id)}</span></li>")
    return f'<ul class="cards">{"".join(made)}</ul>'


def _run(content: Content) -> str:
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in content.facts
    )
    lines = "\n".join(content.commands)
    again = f"<p>To repeat it:</p><pre>{escape(lines)}</pre>" if lines else ""
    return f'<dl class="facts">{facts}</dl>{again}' if facts or again else ""


_SECTIONS: tuple[tuple[str, str, Callable[[Content], str]], ...] = (
    ("leaderboard", "Leaderboard", _leaderboard),
    ("confusion", "Confusion matrix", _confusion),
    ("classes", "Classes", _per_class),
    ("calibration", "Calibration", _reliability),
    ("map", "Map", _map),
    ("mistakes", "Surest mistakes", _mistakes),
    ("labels", "Suspicious labels", _suspects),
    ("duplicates", "Near-duplicates", _duplicates),
    ("run", "What was run", _run),
)
