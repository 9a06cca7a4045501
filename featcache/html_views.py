"""What a notebook shows of a store, an evaluation and a predictor: small tables, all escaped.

Standing below those modules, so that their ``_repr_html_`` can call it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featcache.evaluation import Evaluation
    from featcache.predictor import Predictor
    from featcache.store import FeatureStore

__all__ = ["evaluation_html", "predictor_html", "store_html", "table"]

_CLASSES = 20  # rows of a table of classes


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table.

    Parameters
    ----------
    header : list of str
        Names of the columns.
    rows : list of list of str
        Texts; the first of each row names it.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><th>{escape(first)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def store_html(store: FeatureStore) -> str:
    """Return images, classes, taps and networks of a store."""
    facts = store.describe()
    counts = list(facts["classes"].items())
    classes = ", ".join(f"{name or '(no label)'} {n:,}" for name, n in counts[:_CLASSES])
    if len(counts) > _CLASSES:
        classes += f", and {len(counts) - _CLASSES:,} more"
    rows = [
        ("images", f"{len(store):,}"),
        ("classes", classes),
        *(
            ("tap", f"{name} {tuple(tap['shape'])} {tap['dtype']}")
            for name, tap in facts["taps"].items()
        ),
        *(
            ("backbone", f"{one.source}/{one.backbone} {one.weights}, {one.digest[:16]}")
            for one in store.fingerprints
        ),
        ("size", f"{facts['bytes'] / 1e6:,.1f} MB"),
        ("failures", f"{len(facts['failures']):,}"),
    ]
    return table([", ".join(store.paths), ""], rows)


def evaluation_html(evaluation: Evaluation) -> str:
    """Return the figures of an evaluation with their intervals, and the classes' scores."""

    def line(name: str, value: float, ends: tuple[float, float]) -> tuple[str, str, str]:
        return name, f"{value:.3f}", f"{ends[0]:.3f} to {ends[1]:.3f}"

    e = evaluation
    figures = [
        line("accuracy", e.accuracy, e.accuracy_interval),
        line("balanced accuracy", e.balanced_accuracy, e.balanced_accuracy_interval),
        line("macro F1", e.macro_f1, e.macro_f1_interval),
        ("log loss", f"{e.log_loss:.3f}", ""),
        ("calibration error", f"{e.ece:.3f}", ""),
    ]
    worst = sorted(e.per_class, key=lambda score: score.f1)[:_CLASSES]
    shown = e.per_class if len(e.per_class) <= _CLASSES else worst
    classes = [
        (s.label, f"{s.precision:.3f}", f"{s.recall:.3f}", f"{s.f1:.3f}", f"{s.support:,}")
        for s in shown
    ]
    return (
        table([f"{len(e):,} images", "", "95 % interval"], figures)
        + table(["class", "precision", "recall", "F1", "images"], classes)
        + "".join(f"<p>{escape(note)}</p>" for note in e.notes)
    )


def predictor_html(predictor: Predictor) -> str:
    """Return head, parameters, networks and classes of a predictor."""
    names = ", ".join(predictor.classes[:_CLASSES])
    if len(predictor.classes) > _CLASSES:
        names += f", and {len(predictor.classes) - _CLASSES:,} more"
    rows = [
        ("parameters", ", ".join(f"{k} {v}" for k, v in predictor.params.items())),
        *(
            ("backbone", f"{one.source}/{one.backbone} {one.weights}: {', '.join(one.taps)}")
            for one in predictor.fingerprints
        ),
        ("classes", names),
        ("trained on", f"{len(predictor.train_sha256):,} images"),
    ]
    return table([predictor.head, ""], rows)
