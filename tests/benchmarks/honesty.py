"""Whether figures are what they say: ``python tests/benchmarks/honesty.py [SECTION ...]``.

Every section simulates predictions or features whose truth is known, or takes data whose held-out
part is judged by scikit-learn's measures, and prints what the package says of them. Seeds are part
of the lines; the same versions print the same figures. ``--seeds`` shortens a run.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import norm
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic import FINGERPRINT, TAP

from featcache import Backbone, FeatureStore, ImageSet, features, train
from featcache.heads.base import FittedHead
from featcache.heads.calibration import Calibration, fit_temperature
from featcache.heads.rows import TrainingRows
from featcache.heads.search import SearchOptions, search
from featcache.heads.table import HEADS as HEAD_KINDS
from featcache.predictor.measured import Quantiles, in_set
from featcache.predictor.typicality import Typicality
from featcache.results.evaluation import Evaluation
from featcache.results.intervals import Score, rate_scores
from featcache.results.selection import paired_differences
from featcache.store.splitting import folds
from featcache.store.writer import FeatureWriter

DEMO = Path("out/elpv-mobilenet_v2.h5")  # what `make features` writes; without it, it is left out
HEADS = ("linear", "svm", "ridge", "knn", "rbf-svm")


class Rows:
    """Labels and groups of n images, as a store keeps them."""

    def __init__(self, y: Sequence[str], groups: Sequence[str] | None = None) -> None:
        names = {"ids": [f"{i:06d}.jpg" for i in range(len(y))], "labels": list(y)}
        if groups is not None:
            names["groups"] = list(groups)
        self.tables = {name: np.array(x, np.dtypes.StringDType()) for name, x in names.items()}


def store_of(
    folder: Path, X: np.ndarray, y: Sequence[str], groups: Sequence[str] | None = None
) -> FeatureStore:
    """Write features (n, d) and labels to a store, and open it."""
    rows, images = np.arange(len(y)), Rows(y, groups)
    path = folder / f"{len(list(folder.iterdir()))}.h5"
    hashes = np.random.default_rng(len(y)).integers(0, 256, (len(y), 32), dtype=np.uint8)
    shapes = {TAP: X.shape[1:]}
    with FeatureWriter.begin(path, images.tables, shapes, fingerprint=FINGERPRINT) as writer:
        writer.write(rows, {TAP: X}, sha256=hashes, size=rows + 100, stamp=rows)
        return writer.finish()


def covers(score: Score, truth: float) -> bool:
    """Whether an interval holds the truth."""
    return score.low is not None and score.low <= truth <= score.high


def said(name: str, scores: Sequence[Score], truth: float) -> None:
    """Print mean, coverage and width of scores of one kind."""
    held = np.mean([covers(one, truth) for one in scores])
    width = np.mean([one.high - one.low for one in scores])
    print(
        f"  {name:24} mean {np.mean(scores):.3f} (truth {truth:.3f})  "
        f"coverage {held:.3f}  width {width:.3f}",
        flush=True,
    )


def choice(seeds: int) -> None:
    """Labels of chance, exactly balanced: the best of many settings has .5."""
    print(f"\nthe best of five heads on labels of chance, n = 100, 64 columns, {seeds} seeds")
    rows: dict[str, list[Score]] = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        y = rng.permutation(np.repeat(["a", "b"], 50))
        X = rng.normal(size=(100, 64)).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            board = train(
                store_of(Path(folder), X, y), head=HEADS, random_state=seed, progress=False
            ).leaderboard
        for row in board:
            rows.setdefault(f"{row.head}, corrected", []).append(row.cv_corrected)
        rows.setdefault("best of all, corrected", []).append(board.best_corrected)
        rows.setdefault("best of all, as it is", []).append(board[0].cv.accuracy)
    for name, scores in rows.items():
        said(name, scores, 0.5)


def guessed(rng: np.random.Generator, y: np.ndarray, share: Any, k: int) -> np.ndarray:
    """Return right guesses with a probability, and otherwise another class."""
    return np.where(rng.random(len(y)) < share, y, (y + rng.integers(1, k, len(y))) % k)


def images(seeds: int) -> None:
    """Intervals over images, of classes of many sizes."""
    print(f"\nintervals over images, {seeds} seeds")
    cases = [
        ("998 + 2 images", [998, 2], [1.0, 0.8]),
        ("998 + 2 images", [998, 2], [0.99, 0.8]),
        ("200 + 4 images", [200, 4], [0.99, 0.7]),
        ("200 + 10 images", [200, 10], [0.99, 0.9]),
        ("200 + 20 images", [200, 20], [0.97, 0.85]),
        ("3 classes of 50", [50] * 3, [0.9] * 3),
        ("100 classes of 5", [5] * 100, [0.99] * 100),
        ("100 classes of 5", [5] * 100, [0.9] * 100),
        ("50 classes of 4", [4] * 50, [0.6] * 50),
        ("2 classes of 15", [15] * 2, [0.9] * 2),
        ("2 classes of 500", [500] * 2, [0.97] * 2),
        ("900 + 100 images", [900, 100], [0.97, 0.7]),
    ]
    for name, counts, recall in cases:
        rng, k = np.random.default_rng(0), len(counts)
        y = np.repeat(np.arange(k), counts)
        share = np.array(recall)
        found = [rate_scores(y, guessed(rng, y, share[y], k), k, None) for _ in range(seeds)]
        print(f" {name}, recall {sorted(set(recall))}")
        said("accuracy", [one[0] for one in found], float(share[y].mean()))
        said("balanced accuracy", [one[1] for one in found], float(share.mean()))
        if len(set(recall)) == 1:
            said("macro F1", [one[2] for one in found], recall[0])


def groups(seeds: int) -> None:
    """Intervals over groups that differ, of 5 to 59 images each."""
    print(f"\nintervals of accuracy over groups (beta-binomial), {seeds} seeds")
    for count in (5, 6, 8, 10, 20, 50):
        for mean, alike in ((0.5, 2.0), (0.8, 4.0), (0.9, 10.0), (0.95, 10.0), (0.98, 20.0)):
            rng, found = np.random.default_rng(count), []
            for _ in range(seeds):
                of = np.repeat(np.arange(count), rng.integers(5, 60, count))
                share = rng.beta(mean * alike, (1 - mean) * alike, count)[of]
                y = rng.integers(0, 2, len(of))
                found.append(rate_scores(y, guessed(rng, y, share, 2), 2, of)[0])
            said(f"{count} groups, spread {alike:g}", found, mean)


def pairs(seeds: int) -> None:
    """Eight heads that are equally good, and the best of them by chance: what is said of the rest.

    Which images are hard is the same for all heads in part; in groups, each head does better in
    some of them than in others.
    """
    print(f"\nall differences of eight equally good heads to the best, {seeds} seeds")
    cases = [(40, 0, 0.9), (100, 0, 0.85), (300, 0, 0.99), (1000, 0, 0.9)]
    cases += [(200, count, 0.85) for count in (5, 8, 20, 50)]
    for n, count, share in cases:
        for alike in (0.2, 0.8):
            for balanced in (False, True):
                rng, held, wide = np.random.default_rng(n + count), 0, []
                for _ in range(seeds):
                    y = (np.arange(n) % 10 == 0).astype(np.int64)
                    of = rng.integers(0, count, n) if count else None
                    ease = (rng.normal(size=(n, 1)) * alike**0.5) + (
                        rng.normal(size=(n, 8)) * (1 - alike) ** 0.5
                    )
                    if of is not None:
                        ease = (ease + rng.normal(size=(count, 8))[of]) / 2**0.5
                    right = ease < norm.ppf(share)
                    said = np.where(right, y[:, None], 1 - y[:, None]).T
                    worth = np.bincount(y)[y] if balanced else np.full(n, n)
                    best = ((said == y) / worth).sum(axis=1).argmax()
                    ranked = [said[best], *np.delete(said, best, axis=0)]
                    found = paired_differences(y, ranked, of, balanced=balanced)[1:]
                    held += all(covers(one, 0) for one in found)
                    wide += [one.high - one.low for one in found]
                print(
                    f"  {f'{count} groups' if count else 'no groups':9} {n:5} images, right "
                    f"{share}, alike {alike}, {'balanced ' * balanced}accuracy: all hold 0 in "
                    f"{held / seeds:.3f}, width {np.mean(wide):.3f}",
                    flush=True,
                )


def by(seeds: int) -> None:
    """Intervals of the values of a column, each by itself: values of few images have wide ones."""
    print(f"\nintervals of accuracy by the values of a column (evaluate --by), {seeds} seeds")
    for mean in (0.6, 0.9, 0.97):
        rng, sizes = np.random.default_rng(0), [5, 15, 40, 200]
        camera = np.repeat([str(n) for n in sizes], sizes)
        found: dict[str, list[Score]] = {value: [] for value in np.unique(camera)}
        for _ in range(seeds):
            y = rng.integers(0, 3, len(camera))
            sure = np.eye(3)[guessed(rng, y, mean, 3)]
            parts = Evaluation(np.arange(len(y)), y, sure, ("a", "b", "c"), columns={"n": camera})
            for value, part in parts.by["n"].items():
                found[value].append(part.accuracy)
        for n in sizes:
            said(f"{n} images", found[str(n)], mean)


def rivals() -> dict[str, Any]:
    """Return scikit-learn's counterpart of each head, its main parameter chosen by five folds."""
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegressionCV, RidgeClassifierCV
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.svm import SVC, LinearSVC

    Cs = 10.0 ** np.arange(-4, 3)
    plain = {
        "linear": LogisticRegressionCV(
            Cs=Cs, cv=5, max_iter=1000, l1_ratios=(0.0,), use_legacy_attributes=False
        ),
        "svm": GridSearchCV(LinearSVC(dual=False), {"C": Cs}, cv=5),
        "rbf-svm": GridSearchCV(SVC(), {"C": Cs[3:], "gamma": ["scale", 0.01, 0.1]}, cv=5),
        "forest": RandomForestClassifier(300, random_state=0),
        "boosting": HistGradientBoostingClassifier(random_state=0),
        "ridge": RidgeClassifierCV(10.0 ** np.arange(-3, 4)),
        "knn": GridSearchCV(KNeighborsClassifier(), {"n_neighbors": [1, 3, 5, 10, 20]}, cv=5),
        "mlp": MLPClassifier(256, max_iter=500, random_state=0),
    }
    return {name: make_pipeline(StandardScaler(), one) for name, one in plain.items()}


def tables(seeds: int) -> None:
    """Print accuracy and log loss of every head beside scikit-learn's, on the other half."""
    print("means over seeds: accuracy and log loss of featcache; of scikit-learn (without")
    print("probabilities: a sigmoid under five folds); difference of accuracies, standard error")
    for name, load in {
        "wine": load_wine,
        "cancer": load_breast_cancer,
        "digits": load_digits,
    }.items():
        X, y = load(return_X_y=True)
        X = X.astype(np.float32)
        for head, rival in rivals().items():
            figures = []
            for seed in range(seeds):
                A, B, a, b = train_test_split(X, y, test_size=0.5, stratify=y, random_state=seed)
                found = HEAD_KINDS[head].search(A, a, folds(a.astype(str), cv=5), random_state=seed)
                proba = found.calibration.proba(found.estimator.logits(B))
                if not hasattr(rival, "predict_proba"):
                    rival = CalibratedClassifierCV(rival, cv=5)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    theirs = rival.fit(A, a).predict_proba(B)
                for p in (proba, theirs):
                    p = np.clip(p, 1e-15, 1)
                    figures += [np.mean(p.argmax(axis=1) == b), log_loss(b, p / p.sum(1)[:, None])]
            rows = np.reshape(figures, (seeds, 4))
            off = rows[:, 0] - rows[:, 2]
            print(
                f"  {name:7} {head:9}" + "".join(f"{one:8.3f}" for one in rows.mean(axis=0)),
                f"  {off.mean():+.4f} +- {off.std(ddof=1) / seeds**0.5:.4f}",
                flush=True,
            )


def balanced(seeds: int) -> None:
    """A class of 8.4 %, balanced weights: probabilities of other rows, beside scikit-learn's."""
    print("\nbalanced weights: mean probability of the rare class, log loss, calibration by class")
    for seed in range(seeds):
        X, y = make_classification(
            4000,
            20,
            n_informative=5,
            weights=[0.926],
            class_sep=0.6,
            flip_y=0.02,
            random_state=seed,
        )
        A, B, a, b = train_test_split(X.astype(np.float32), y, test_size=0.5, random_state=0)
        found = HEAD_KINDS["linear"].search(
            A, a, folds(a.astype(str), cv=5), class_weight="balanced"
        )
        logits = found.estimator.logits(B)
        one = Calibration(fit_temperature(found.logits, a), (0.0, 0.0))
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
        rival = CalibratedClassifierCV(model, method="sigmoid", cv=5).fit(A, a)
        print(f"  seed {seed}: {b.mean():.3f} are of the rare class")
        for name, proba in (
            ("one temperature", one.proba(logits)),
            ("as trained", found.calibration.proba(logits)),
            ("scikit-learn's sigmoid", rival.predict_proba(B)),
        ):
            got = Evaluation(np.arange(len(b)), b, proba, ("no", "yes"))
            print(
                f"    {name:24} {proba[:, 1].mean():.3f}  {got.log_loss:.3f}  "
                f"{got.classwise_ece:.3f}"
            )


def styles(seeds: int) -> None:
    """An RBF SVM on images of another style: the widest kernel within one standard error."""
    print("\nten classes in another style: width chosen, CV accuracy and accuracy there; by score")
    print("alone; logistic regression")
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        centres = 0.75 * (rng.normal(size=(10, 1, 10)) + rng.normal(size=(10, 2, 10)))
        W, style = rng.normal(size=(10, 48)) / 10**0.5, rng.normal(size=48)
        parts = []
        for n, shift in ((400, 0.0), (2000, 1.0)):
            y = np.arange(n) % 10
            hidden = centres[y, rng.integers(0, 2, n)] + 0.8 * rng.normal(size=(n, 10))
            noise = (0.3 + 0.5 * shift) * rng.normal(size=(n, 48))
            parts.append(((hidden @ W + noise + shift * style).astype(np.float32), y))
        (A, a), (B, b) = parts
        kind = HEAD_KINDS["rbf-svm"](SearchOptions(), treatments=("standard",))
        rows = TrainingRows.check(A, a, folds(a.astype(str), cv=5))
        found = search(kind, rows)
        best = max(found.trials, key=lambda one: one.score)
        rival = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        said = [
            f"{one.params['gamma']:4} {one.score:.3f} {(right == b).mean():.3f}"
            for one in (found.best, best)
            for right in (FittedHead(kind.fit(rows, one.params), rows.classes).logits(B).argmax(1),)
        ]
        print(f"  seed {seed}: {'   '.join(said)}   {rival.fit(A, a).score(B, b):.3f}")


def halves(seeds: int) -> Iterator[tuple[str, np.ndarray, np.ndarray, list[np.ndarray]]]:
    """Yield name, features, labels and the halves that are trained on: digits, then the demo."""
    X, y = load_digits(return_X_y=True)
    sets = [("digits", X.astype(np.float32), y.astype(str))]
    if DEMO.exists():
        demo = FeatureStore.open(DEMO)
        sets.append(("demo", demo.matrix(), demo.labels))
    for name, X, y in sets:
        rngs = [np.random.default_rng(seed) for seed in range(seeds)]
        yield name, X, y, [rng.permutation(len(y))[: len(y) // 2] for rng in rngs]


def sets(seeds: int) -> None:
    """Sets of labels on the other half: share that holds the true label, and their size."""
    print(f"\nsets of labels (ridge), {seeds} random halves: coverage asked, found, mean size")
    for name, X, y, parts in halves(seeds):
        rows: dict[float, list[tuple[float, float]]] = {}
        for some in parts:
            rest = np.setdiff1d(np.arange(len(y)), some)
            found = HEAD_KINDS["ridge"].search(X[some], y[some], folds(y[some], cv=5))
            own = np.searchsorted(found.classes, y)
            proba = found.calibration.proba(found.logits)
            scores = Quantiles.of(1 - proba[np.arange(len(some)), own[some]])
            logits = found.estimator.logits(X[rest])
            proba = found.calibration.proba(logits)
            for coverage in (0.8, 0.9, 0.95, 0.99):
                held = in_set(scores, proba, coverage)
                held[np.arange(len(rest)), logits.argmax(axis=1)] = True
                right = held[np.arange(len(rest)), own[rest]].mean()
                rows.setdefault(coverage, []).append((right, held.sum(axis=1).mean()))
        for coverage, values in rows.items():
            print(f"  {name:7} {coverage:.2f}", *(f"{v:7.4f}" for v in np.mean(values, axis=0)))


def drawing(path: Path) -> Image.Image:
    """Return a photograph as a pencil would draw it: bright, but for its edges."""
    with Image.open(path) as image:
        grey = image.convert("L")
    blurred = ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(min(grey.size) / 60))
    light = np.asarray(grey, float) * 255 / np.maximum(255 - np.asarray(blurred, float), 1)
    return Image.fromarray(light.clip(0, 255).astype(np.uint8)).convert("RGB")


def unlike(seeds: int) -> None:
    """Typicality: the demo's photographs, other halves of them, and pencil drawings of them."""
    print(f"\ntypicality below .05: of other photographs, of drawings; {seeds} random halves")
    if not DEMO.exists():
        print("  (needs the demo: make features)")
        return
    import elpv_dataset

    root = Path(elpv_dataset.__file__).parent / "data" / "images"
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(root.iterdir())[::8]:
            drawing(file).save(Path(folder, file.name))
        drawn = features(ImageSet.open(folder), Backbone("mobilenet_v2"))
    *_, (_, X, y, parts) = halves(seeds)
    rows = []
    for some in parts:
        typical = Typicality.of(TrainingRows.check(X[some], y[some], folds(y[some], cv=5)))
        rest = np.setdiff1d(np.arange(len(y)), some)
        rows.append([(typical(each) < 0.05).mean() for each in (X[rest], drawn)])
    print("  ", *(f"{v:.3f}" for v in np.mean(rows, axis=0)))


SECTIONS = {
    "choice": choice,
    "images": images,
    "groups": groups,
    "pairs": pairs,
    "by": by,
    "tables": tables,
    "balanced": balanced,
    "styles": styles,
    "sets": sets,
    "unlike": unlike,
}
SEEDS = {
    "choice": 200,
    "images": 300,
    "groups": 1000,
    "pairs": 300,
    "by": 300,
    "tables": 2,
    "balanced": 4,
    "styles": 8,
    "sets": 50,
    "unlike": 20,
}


def main() -> None:
    """Run the sections that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", nargs="*", choices=[*SECTIONS, []], help="left out: all")
    parser.add_argument("--seeds", type=int, help="seeds of each section")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("numpy", "scipy", "scikit-learn", "torch"))
    for name in arguments.section or SECTIONS:
        SECTIONS[name](arguments.seeds or SEEDS[name])


if __name__ == "__main__":
    main()
