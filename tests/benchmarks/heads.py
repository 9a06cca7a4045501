"""How fast and how good the heads are beside scikit-learn's: ``python tests/benchmarks/heads.py``.

Features are synthetic (`synthetic.features`: 10,000 x 2,048, of 10 and 100 classes), and those of
``--store FILE.h5`` where one is given. Rivals run in the same process, on the same folds, right
after ours. A rival that would take an hour is timed on a part, which its line names, and the rest
is extrapolated: by folds, which cost the same each. What extrapolation leaves out (the rivals'
last fit on all rows) is in the rivals' favour.

The features' seed is 1: some defaults were chosen while looking at those of seed 0.

Every row is clock time in seconds and ``ratio = rival / ours``. ``--quick`` shrinks the data to
something that takes a minute and shows that the script works, not how fast anything is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from scipy.special import logsumexp
from sklearn.ensemble import (
    ExtraTreesClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from synthetic import FINGERPRINT, TAP, Images, features

from featcache.heads.linear import LinearClassifier, LinearHead, LinearSVMHead
from featcache.heads.rows import TrainingRows
from featcache.heads.search import SearchOptions, search
from featcache.heads.svm import GaussianSVM
from featcache.heads.table import HEADS
from featcache.heads.trees import BoostedTrees, ForestHead
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter

CS = tuple(10.0 ** np.arange(-5, 3))
SECTIONS = ("linear", "svm", "rbf-svm", "forest", "boosting", "components", "disk")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def say(*parts: str) -> None:
    print(*parts, flush=True)


def folds_of(y: np.ndarray, cv: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    split = StratifiedKFold(cv, shuffle=True, random_state=0)
    return list(split.split(np.zeros(len(y)), y))


# --- linear --------------------------------------------------------------------------------------


def objective(model: Any, Z: np.ndarray, y: np.ndarray, C: float) -> float:
    """Objective of a multinomial logistic regression on standardised features."""
    scores = Z @ model.coef_.T + model.intercept_
    if scores.shape[1] == 1:
        losses = np.logaddexp(0, -scores[:, 0] * np.where(y == np.unique(y)[1], 1, -1))
    else:
        codes = np.unique(y, return_inverse=True)[1]
        losses = logsumexp(scores, axis=1) - scores[np.arange(len(y)), codes]
    return float(C * losses.sum() + (model.coef_**2).sum() / 2)


def standardised(model: Any, scaler: StandardScaler) -> Any:
    """Return one of our linear models for features that the scaler has been over."""
    moved = type(model)()
    moved.coef_ = model.coef_ * scaler.scale_
    moved.intercept_ = model.intercept_ + model.coef_ @ scaler.mean_
    return moved


def linear(X: np.ndarray, y: np.ndarray, name: str, whole: bool) -> None:
    folds = folds_of(y)

    def ours() -> Any:
        rows = TrainingRows.check(X, y, folds, None)
        return search(LinearHead(treatments=("standard",), Cs=CS, refine=False), rows)

    seconds, found = timed(ours)
    scores = {one.params["C"]: one.score for one in found.trials}
    say(f"linear, {name}: 8 C x 5 folds + refit")
    at = found.params["C"]
    say(f"  featcache            {seconds:8.1f} s   accuracy {found.score:.4f} at C={at:g}")
    scaler = StandardScaler().fit(X)
    Z = scaler.transform(X).astype(np.float64)
    part = folds if whole else folds[:1]
    same = np.mean(found.fold_scores[: len(part)])
    # With many classes the rival's own tolerance ends its fits far from the minimum.
    for tol in (1e-4,) if whole else (1e-4, 1e-8):
        rival = LogisticRegressionCV(
            Cs=CS,
            cv=part,
            scoring="accuracy",
            l1_ratios=(0.0,),
            use_legacy_attributes=False,
            refit=whole,
            tol=tol,
            max_iter=100 if tol == 1e-4 else 2000,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            other, _ = timed(lambda one=rival: one.fit(Z, y))
        unfinished = sum(issubclass(w.category, ConvergenceWarning) for w in caught)
        table = np.asarray(rival.scores_).reshape(len(part), -1)
        total = other * len(folds) / len(part)
        what = "" if whole else f" (one fold: {other:.1f} s, times five, without its refit)"
        best = int(table.mean(axis=0).argmax())
        reached = table[:, best].mean()
        say(
            f"  LogisticRegressionCV {total:8.1f} s   accuracy {reached:.4f} at C={CS[best]:g}, "
            f"tol={tol:g}{what}"
        )
        say(
            f"  ratio {total / seconds:.1f}; ours on the same folds: {same:.4f}; "
            f"{unfinished} of the rival's fits stopped at max_iter"
        )
    # To one objective.
    tol = 1e-6 if whole else 1e-9
    for C in (at, 0.1) if whole else (0.01,):
        seconds, mine = timed(lambda C=C: LinearClassifier(C).fit(X, y))
        reference = LogisticRegression(C=C, tol=tol, max_iter=100_000 if whole else 2000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            other, _ = timed(lambda one=reference: one.fit(Z, y))
        gap = objective(standardised(mine, scaler), Z, y, C) / objective(reference, Z, y, C) - 1
        say(
            f"  one fit at C={C:g}: {seconds:.2f} s, LogisticRegression(tol={tol:g}) {other:.1f} "
            f"s, ratio {other / seconds:.1f}; objectives: {gap:+.1e}"
        )
    say("  accuracy by C: " + ", ".join(f"{C:g}: {score:.4f}" for C, score in scores.items()))


# --- svm -----------------------------------------------------------------------------------------


def hinge(model: Any, Z: np.ndarray, y: np.ndarray, C: float) -> float:
    """LinearSVC's objective, but for the intercept, which it penalises."""
    own = y[:, None] == (np.unique(y) if model.coef_.shape[0] > 1 else np.unique(y)[1:])
    slack = np.maximum(0, 1 - (Z @ model.coef_.T + model.intercept_) * np.where(own, 1, -1))
    size = (model.coef_**2).sum()
    return float(C * (slack**2).sum() + size / 2)


def svm(X: np.ndarray, y: np.ndarray, name: str, Cs: tuple[float, ...]) -> None:
    scaler = StandardScaler().fit(X)
    Z = scaler.transform(X).astype(np.float64)
    for C in Cs:
        model = LinearClassifier(C, loss="squared_hinge", tol=1e-5)
        seconds, _ = timed(lambda model=model: model.fit(X, y))
        rival = LinearSVC(C=C, dual=False, intercept_scaling=300.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            other, _ = timed(lambda rival=rival: rival.fit(Z, y))
        mine, theirs = hinge(standardised(model, scaler), Z, y, C), hinge(rival, Z, y, C)
        say(f"svm, {name}: one fit at C={C:g}")
        say(f"  featcache            {seconds:8.2f} s   objective {mine:.6g} (scaling included)")
        say(f"  LinearSVC            {other:8.2f} s   objective {theirs:.6g}")
        say(f"  ratio {other / seconds:.1f}; objectives: {mine / theirs - 1:+.1e}")
    rows = TrainingRows.check(X, y, folds_of(y), None)
    seconds, found = timed(
        lambda: search(LinearSVMHead(treatments=("standard",), Cs=CS[:6], refine=False), rows)
    )
    say(
        f"svm, {name}: search, 6 C x 5 folds + refit: {seconds:.1f} s, accuracy {found.score:.4f}; "
        f"LinearSVC would take {other * 31:.0f} s at the time of its last fit"
    )


# --- the others ----------------------------------------------------------------------------------


def kernel_svm(X: np.ndarray, y: np.ndarray, name: str) -> None:
    train, valid = folds_of(y)[0]
    Z = StandardScaler().fit(X[train]).transform(X)
    gamma = 1 / X.shape[1]
    ours = GaussianSVM(10.0)
    rivals = {"SVC": SVC(C=10.0, gamma=gamma, cache_size=500, break_ties=True)}
    if find_spec("sklearnex"):
        from sklearnex.svm import SVC as Accelerated

        rivals["scikit-learn-intelex"] = Accelerated(
            C=10.0, gamma=gamma, cache_size=500, break_ties=True
        )

    def work(model: Any) -> float:
        return float((model.fit(Z[train], y[train]).predict(Z[valid]) == y[valid]).mean())

    seconds, accuracy = timed(lambda: work(ours))
    say(f"rbf-svm, {name}: one fit on {len(train):,} rows, {len(valid):,} predicted")
    say(f"  featcache            {seconds:8.1f} s   accuracy {accuracy:.4f}")
    for title, rival in rivals.items():
        other, reached = timed(lambda rival=rival: work(rival))
        ratio = other / seconds
        say(f"  {title:20s} {other:8.1f} s   accuracy {reached:.4f}   ratio {ratio:.1f}")


def forest(X: np.ndarray, y: np.ndarray, name: str) -> None:
    """The same search, through `cross_val_predict`-like loops of scikit-learn's own forests."""
    folds = folds_of(y)[:2]
    rows = TrainingRows.check(X, y, folds, None)
    seconds, found = timed(lambda: search(ForestHead(SearchOptions(n_jobs=-1)), rows))

    def plain() -> float:
        scores = {}
        for kind in (RandomForestClassifier, ExtraTreesClassifier):
            for leaf in (1, 3):
                scores[kind, leaf] = np.mean(
                    [
                        kind(300, min_samples_leaf=leaf, random_state=0, n_jobs=-1)
                        .fit(X[train], y[train])
                        .score(X[valid], y[valid])
                        for train, valid in folds
                    ]
                )
        kind, leaf = max(scores, key=lambda key: scores[key])
        kind(300, min_samples_leaf=leaf, random_state=0, n_jobs=-1).fit(X, y)
        return float(max(scores.values()))

    other, reached = timed(plain)
    ratio = other / seconds
    say(f"forest, {name}: two kinds x two leaf sizes, 2 folds + refit, 300 trees")
    say(f"  featcache            {seconds:8.1f} s   accuracy {found.score:.4f}")
    say(f"  scikit-learn         {other:8.1f} s   accuracy {reached:.4f}   ratio {ratio:.1f}")


def boosting(X: np.ndarray, y: np.ndarray, name: str) -> None:
    train, valid = folds_of(y)[0]

    def work(model: Any) -> float:
        return float((model.fit(X[train], y[train]).predict(X[valid]) == y[valid]).mean())

    seconds, accuracy = timed(lambda: work(BoostedTrees()))
    other, reached = timed(lambda: work(HistGradientBoostingClassifier(random_state=0)))
    ratio = other / seconds
    say(f"boosting, {name}: one fit on {len(train):,} rows, defaults on both sides")
    say(f"  featcache            {seconds:8.1f} s   accuracy {accuracy:.4f}")
    say(f"  HistGradientBoosting {other:8.1f} s   accuracy {reached:.4f}   ratio {ratio:.1f}")


def components(X: np.ndarray, y: np.ndarray, name: str) -> None:
    """What whole searches gain by trying whitened principal components; on 3,000 rows."""
    X, y = X[:3000], y[:3000]
    say(f"components, the first {len(y):,} of {name}: best settings by 5 folds")
    for head in ("knn", "rbf-svm", "mlp", "forest"):
        seconds, found = timed(lambda head=head: HEADS[head].search(X, y, folds_of(y), n_jobs=-1))
        scores = {True: 0.0, False: 0.0}
        for one in found.trials:
            kind = "n_components" in one.params
            scores[kind] = max(scores[kind], one.score)
        say(
            f"  {head:8s} {seconds:6.1f} s   without {scores[False]:.4f}, on components "
            f"{scores[True]:.4f}; chosen: {dict(found.params)}"
        )


# --- larger than memory --------------------------------------------------------------------------

WIDTH = 1024
CLASSES = 4


def write_store(path: Path, n: int) -> None:
    """Write n rows x 1,024 of float16, the ReLU of a mixture as in `synthetic`."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(32, WIDTH)).astype(np.float32) / 6
    centres = 0.25 * rng.normal(size=(CLASSES, 32)).astype(np.float32)
    images = Images(n, CLASSES)
    with FeatureWriter.begin(
        path, images.tables, {TAP: (WIDTH,)}, fingerprint=FINGERPRINT
    ) as writer:
        for start in range(0, n, 8192):
            rows = np.arange(start, min(start + 8192, n))
            latent = centres[rows % CLASSES] + rng.normal(size=(len(rows), 32)).astype(np.float32)
            noise = 0.5 * rng.standard_normal((len(rows), WIDTH), dtype=np.float32)
            hidden = np.maximum(latent @ mixing + noise - 0.3, 0)
            names = rows.astype(np.uint8)[:, None].repeat(32, axis=1)
            writer.write(rows, {TAP: hidden.astype(np.float16)}, sha256=names)
        writer.finish()


def disk(sizes: tuple[int, ...]) -> None:
    say(
        f"linear from a store on disk, n x {WIDTH:,} float16, {CLASSES} classes: "
        "3 C x 5 folds + refit"
    )
    times = {}
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "large.h5"
            write_store(path, n)
            done = subprocess.run(
                [sys.executable, Path(__file__).with_name("from_disk.py"), str(path)],
                check=True,
                capture_output=True,
                text=True,
            )
        seconds, peak, before, score = map(float, done.stdout.split())
        times[n] = seconds
        say(
            f"  {n:9,} rows: {seconds:6.1f} s, {1e6 * seconds / n:6.1f} us a row; peak {peak:.0f} "
            f"MB, {before:.0f} MB before; accuracy {score:.4f}"
        )
    first, last = min(times), max(times)
    growth = (times[last] / times[first]) / (last / first)
    say(f"  time a row at {last:,} rows is {growth:.2f} of that at {first:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small data: shows that it works")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="run this part")
    parser.add_argument("--classes", type=int, action="append", help="default: 10 and 100")
    parser.add_argument("--random-state", type=int, default=1, help="of the synthetic features")
    parser.add_argument("--store", help="also on the features of this store")
    options = parser.parse_args()
    say(machine("featcache", "scikit-learn", "numpy", "scipy", "torch"))
    forced = {k: v for k, v in os.environ.items() if k.startswith(("OPENBLAS", "OMP", "MKL"))}
    say(f"torch threads {torch.get_num_threads()}; thread settings in the environment: {forced}")
    parts = options.only or SECTIONS
    n, d = (1200, 256) if options.quick else (10_000, 2_048)
    data = []
    for classes in options.classes or ([10] if options.quick else [10, 100]):
        X, y = features(n, d, classes, random_state=options.random_state)
        data.append((X, y, f"{n:,} x {d:,}, {classes} classes"))
    if options.store:
        store = FeatureStore.open(options.store)
        X = np.ascontiguousarray(store.matrix())
        y = np.asarray(store.labels)
        data.append((X, y, f"{X.shape[0]:,} x {X.shape[1]:,} of {Path(options.store).name}"))
    for X, y, name in data:
        many = len(np.unique(y)) > 20
        if "linear" in parts:
            linear(X, y, name, whole=not many)
        if "svm" in parts:
            svm(X, y, name, Cs=(1e-3,) if many else (1e-4, 1e-2))
        if "rbf-svm" in parts:
            kernel_svm(X, y, name)
        if "forest" in parts and not many:
            forest(X, y, name)
        if "boosting" in parts and not many:
            boosting(X, y, name)
        if "components" in parts and not many:
            components(X, y, name)
    if "disk" in parts:
        disk((8_000, 32_000) if options.quick else (250_000, 500_000, 1_000_000))


if __name__ == "__main__":
    main()
