"""A classifier of scikit-learn's as a head, as it is: judged like the others, and never searched.

Its parameters are the user's. It lives in memory alone: a file of it would be a pickle, which runs
code when it is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import isclass
from typing import Any, NoReturn

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import has_fit_parameter

from featcache.errors import PredictorError, TrainingError
from featcache.heads.rows import TrainingRows
from featcache.heads.search import HeadKind, Params, Search, refitted
from featcache.heads.steps import Array, Step

_FLOOR = 1e-12  # of a probability before its logarithm


def own_heads(heads: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the names of heads among `heads`, and the user's own classifiers by their names.

    Raises
    ------
    TrainingError
        An estimator that is no classifier, or a class in place of one.
    """
    given = [heads] if isinstance(heads, str) or hasattr(heads, "fit") else list(heads or ())
    names = [one for one in given if not hasattr(one, "fit")]
    own: dict[str, Any] = {}
    for one in given:
        if isclass(one):
            raise TrainingError(f"A head is a classifier, not its class: {one.__name__}().")
        if not hasattr(one, "fit"):
            continue
        if not is_classifier(one):
            raise TrainingError(f"{_text(one)} is no classifier, and labels are classes.")
        name = type(one).__name__
        twice = sum(type(other).__name__ == name for other in own.values())
        own[f"{name} {twice + 1}" if twice else name] = one
    return names, own


def _text(classifier: Any) -> str:
    return " ".join(repr(classifier).split())


@dataclass(frozen=True, eq=False)
class Classified(Step):
    """Scores of a fitted classifier: decision values, or logarithms of probabilities.

    Attributes
    ----------
    classifier : estimator
        Fitted.
    classes : ndarray of shape (k,)
        Labels: the columns of the scores.
    """

    classifier: Any
    classes: Array
    kind = "classifier"

    def __call__(self, X: Array) -> Array:
        """Return scores (n, k)."""
        order = [list(self.classifier.classes_).index(label) for label in self.classes]
        if hasattr(self.classifier, "decision_function"):
            scores = np.asarray(self.classifier.decision_function(X))
            if scores.ndim == 1:  # of two classes, positive for the second
                scores = np.stack([-scores / 2, scores / 2], axis=1)
            if scores.shape[1] == len(order):  # not one a pair of classes
                return scores[:, order]
        if not hasattr(self.classifier, "predict_proba"):
            name = type(self.classifier).__name__
            raise TrainingError(
                f"{name} has no scores of the classes, neither decision_function nor "
                f"predict_proba, so that nothing can be calibrated. Give "
                f"CalibratedClassifierCV({name}(...)) in its place."
            )
        proba = np.asarray(self.classifier.predict_proba(X))[:, order]
        logs: Array = np.log(np.maximum(proba, _FLOOR))
        return logs

    @property
    def cells(self) -> int:
        """Numbers of a row on its way: its scores."""
        return len(self.classes)

    def arrays(self) -> NoReturn:
        """Refuse to be written to a file."""
        raise PredictorError(
            f"{_text(self.classifier)} cannot be saved: a predictor's file holds numbers alone, so "
            "that opening it runs no code. Keep the predictor with joblib.dump(predictor, "
            "'head.joblib'), to be opened only by who trusts that file, or train one of "
            "featcache's heads: linear, svm, forest ..."
        )


@dataclass(frozen=True)
class OwnHead(HeadKind):
    """A user's classifier, cloned for every fit.

    Attributes
    ----------
    classifier : estimator
        Not fitted; its parameters are used as they are.
    title : str
        Its name on the leaderboard.
    """

    classifier: Any = None
    title: str = ""

    @property
    def name(self) -> str:  # type: ignore[override]
        """What it is called."""
        return self.title

    def explore(self, rows: TrainingRows, search: Search) -> None:
        """Judge the classifier on the folds."""
        if self.options.class_weight is not None:
            raise TrainingError(
                f"class_weight is for featcache's heads: give it to {self.title} itself."
            )
        search.tried({"classifier": _text(self.classifier)}, refitted(self, {}, search))

    def fit(self, rows: TrainingRows, params: Params) -> list[Step]:
        """Fit a clone on all rows, with their weights where there are any."""
        fitted, weights = clone(self.classifier), {}
        if rows.weight is not None:
            last, name = fitted, ""
            while isinstance(last, Pipeline):
                step, last = last.steps[-1]
                name += f"{step}__"
            if not has_fit_parameter(last, "sample_weight"):
                raise TrainingError(
                    f"sample_weight is given, and {type(last).__name__} takes none in its fit. "
                    "Leave out the one or the other."
                )
            weights[f"{name}sample_weight"] = rows.weights()
        fitted.fit(rows.features(), rows.classes[rows.row_codes()], **weights)
        return [Classified(fitted, rows.classes)]
