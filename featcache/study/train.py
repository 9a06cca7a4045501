"""`train`: choose and compare heads, all by one protocol.

1. Rows without a label are left out and counted.
2. The folds are made once (`featcache.store.splitting`) and every head sees the same ones. Where
the store's split column has a validation part, that is the one fold.
3. Each head's hyper-parameters and feature treatment are chosen by its score on the folds, on the
   training part only, and the winner is fitted again on all of that part.
4. Heads are ranked by cross-validation. The held-out images are scored once, after that, and take
   part in no choice.

The out-of-fold scores of the chosen setting give each head's accuracy with its interval and what
calibrates its probabilities. As the same folds chose the setting, that accuracy
flatters. Beside it stands the accuracy without what the choice adds, for each head and for the
best of all, which costs no fit, and how far each head is from the best, image by image
(`featcache.results.selection`). ``nested=True`` chooses anew inside
every fold, at `cv` times the cost. Intervals are over groups wherever the store has any.

**Memory.** Training copies parts of the features (folds, scaled rows): about three times the
array. Where that does not fit into `memory` (left out: most of what the machine has available),
the heads that can read the store in blocks do so, and the others take the part that fits.

**What an image may belong to**, and what is decided where two of these meet:

=======================  =========================================================================
group, split column      A group in a part that is trained on and in one that judges (validation,
                         test) is refused under ``group``. ``drop_crossing_groups`` leaves its
                         images out of training and counts them. Without ``group`` it is a note.
group, ``test_size``     Under ``group`` the hold-out is drawn from groups; without, from images,
                         and a note says that groups are on both sides.
group, ``nested``        The inner folds keep the groups that the outer ones keep.
split, ``test_size``     What is held out is drawn from all images; a note counts the images of the
                         test part that are trained on. The validation part stays the one fold.
split, ``nested``        The validation part judges; inner folds of the other images choose.
``test_size``, nested    Held-out images are in no fold, outer or inner.
views, any of these      The views of an image are one row, which nothing cuts.
=======================  =========================================================================

**The rest of the network** is a head as well, ``suffix`` (see `featcache.finetuning.search`):
trained on maps that the store keeps, under the same folds. It is never among "all", as it costs
minutes where the others cost seconds. Where both are asked for, it reads the maps and the others
the rest.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from featcache.errors import TrainingError
from featcache.finetuning.checkpoint import check_folder
from featcache.finetuning.search import SUFFIX, SuffixHead
from featcache.finetuning.settings import SuffixSettings
from featcache.heads.base import ClassWeight, FittedHead, check_fit
from featcache.heads.own import OwnHead, own_heads
from featcache.heads.rows import FeatureBlocks, TrainingRows, coded
from featcache.heads.search import COPIES, FoldScorer, HeadKind, Trial, search
from featcache.heads.table import HEADS
from featcache.predictor.file import CanaryRows, group_hashes
from featcache.predictor.inputs import InputTap, columns_of, source_taps
from featcache.predictor.measured import Quantiles
from featcache.predictor.predictor import Predictor
from featcache.predictor.typicality import Typicality
from featcache.results.evaluation import Evaluation, Figures, few_groups, with_own_groups
from featcache.results.intervals import Score
from featcache.results.leaderboard import Leaderboard, LeaderboardRow
from featcache.results.selection import corrected_accuracy, paired_differences
from featcache.store import splitting
from featcache.store.splitting import Fold
from featcache.store.store import FeatureStore
from featcache.study.evaluate import evaluate, out_of_fold
from featcache.study.options import TrainingOptions
from featcache.study.parts import (
    folds_of,
    rare_classes,
    remarks,
    untested,
    without_crossing,
    without_small,
)
from featcache.system.console import check_stopped, interruptible, progress_bar
from featcache.system.memory import available_memory, peak_memory
from featcache.system.tables import counted, first_names, in_order

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin

    from featcache.networks.backbone import Backbone

__all__ = ["head_names", "train"]

Scoring = str | Callable[..., float]

Progress = Callable[[int], object]

_CANARY_ROWS = 8  # kept where the store has no canary images
_TIMED_ROWS = 1000
_TIMED_BYTES = 8 << 20


def train(
    store: FeatureStore,
    test: FeatureStore | None = None,
    *,
    head: str | ClassifierMixin | Sequence[str | ClassifierMixin] = "linear",
    layers: str | Sequence[str] | None = None,
    cv: int = 5,
    sample_weight: npt.ArrayLike | None = None,
    scoring: Scoring | None = None,
    class_weight: ClassWeight = None,
    group: bool = False,
    drop_crossing_groups: bool = False,
    nested: bool = False,
    min_images: int = 1,
    memory: int | None = None,
    n_jobs: int = 1,
    random_state: int = 0,
    suffix: SuffixSettings | None = None,
    backbone: Backbone | None = None,
    checkpoints: str | Path | None = None,
    progress: bool | None = None,
) -> Predictor:
    """Choose a head's hyper-parameters by cross-validation and fit it on all rows of a store.

    Several heads are trained under the same folds and ranked by cross-validation; the first one is
    returned, with the comparison as its ``leaderboard``.

    Parameters
    ----------
    store : FeatureStore
        What to train on; several networks' features by `FeatureStore.join`.
    test : FeatureStore, optional
        Held-out images, scored once for each head. They take part in no choice.
    head : str, classifier, or list of them
        ``linear``, ``svm``, ``rbf-svm``, ``forest``, ``boosting``, ``knn`` (by cosine), ``mlp``,
        ``ridge``, or ``suffix``, the rest of the network; ``all`` is every one but the last. Or a
        classifier of scikit-learn's, also a Pipeline: it is cloned for each fit and has the
        parameters that you gave it; the predictor cannot be saved. Of several, the best by
        cross-validation.
    layers : str or list of str, optional
        Taps to use, side by side. None: all.
    cv : int
        Folds. A class of fewer images (under `group`: groups) is in fewer of them, a class of one
        in none: it is trained on, and not tested. Where all classes are so small, there are fewer
        folds.
    sample_weight : array of shape (n,), optional
        Weight of each row of `store`, 0 or more. It counts in all fits and in the calibration of
        probabilities; scores and accuracies count each image once, as scikit-learn's
        ``cross_validate`` does.
    scoring : str or callable, optional
        One of scikit-learn's scorers; what decides. None: accuracy, under class weights balanced
        accuracy. Of two classes, the second in sorted order is
        the positive one. See `featcache.heads.search.FoldScorer` for folds that lack a class.
    class_weight : "balanced" or dict of str to float, optional
        As in scikit-learn.
    group : bool
        Keep the images of a group in one fold, and out of training where they judge.
    drop_crossing_groups : bool
        Under `group`: leave images out of training whose group is among the validation or the
        held-out images too, instead of refusing them.
    nested : bool
        Choose anew inside every fold: an honest figure for `cv` times the time.
    min_images : int
        Leave out, and list, classes of fewer images, or under `group` of fewer groups, in `store`.
    memory : int, optional
        Bytes to stay under. None: what the machine has available.
    n_jobs : int
        Fits at a time of ``rbf-svm`` and ``boosting``, trees at a time of ``forest``; -1: one a
        core. The other heads use all cores for each fit.
    random_state : int
        Seed: the same call gives the same predictor.
    suffix : SuffixSettings, optional
        How the head ``suffix`` is trained: the first layer, epochs, learning rate ...
    backbone : Backbone, optional
        For the head ``suffix``: needed where the store's network is one's own, or has weights from
        a checkpoint.
    checkpoints : path, optional
        Folder that the head ``suffix`` writes to after every epoch, and resumes from: with one,
        SIGINT and SIGTERM become `Interrupted`.
    progress : bool, optional
        Show a progress bar on standard error; left out, in a terminal or a notebook.

    Returns
    -------
    Predictor
        With ``predictor.leaderboard``.

    Raises
    ------
    TrainingError
        Labels, classes, folds or a head that cannot be trained on; the message names the class
        and the count.
    Interrupted
        The head ``suffix`` was stopped by a signal; the same call goes on from its checkpoints.
    OutputError
        The folder of checkpoints holds something else, or cannot be written.
    CorruptStore, StoreError
        Features are not what was written, or a file was overwritten in place meanwhile.

    Examples
    --------
    >>> import featcache as fc
    >>> from sklearn.linear_model import LogisticRegression
    >>> images = fc.ImageSet.open("flowers").select(range(0, 80, 4))
    >>> store = fc.extract(images, fc.Backbone("resnet18", weights=None), "some.h5")
    >>> predictor = fc.train(store, head=LogisticRegression(C=10), cv=3)
    >>> predictor.leaderboard[0].head, predictor.leaderboard[0].params
    ('LogisticRegression', {'classifier': 'LogisticRegression(C=10)'})

    Small classes are no error, unless `min_images` leaves them out:

    >>> few = store.select(range(13))  # ten of the first class, three of the second
    >>> fc.train(few, head="ridge").leaderboard.notes[1]
    "1 class is in fewer than 5 folds, having fewer images: 'palace' (3)"
    """
    options = TrainingOptions(
        cv=cv,
        scoring=scoring,
        class_weight=class_weight,
        group=group,
        drop_crossing_groups=drop_crossing_groups,
        nested=nested,
        min_images=min_images,
        memory=memory,
        n_jobs=n_jobs,
        random_state=random_state,
    )
    names, own = heads_of(head)
    _check_arguments(store, names, suffix=suffix, backbone=backbone)
    asked, (store, test, small) = store, without_small(store, test, options)
    folder = None if checkpoints is None or SUFFIX not in names else Path(checkpoints)
    if folder is not None:
        check_folder(folder)
    kept = f"The finished epochs are kept in {folder}"
    with contextlib.nullcontext() if folder is None else interruptible(kept):
        data = TrainingData.of(store, test, layers, options)
        data = replace(data, own=own, weight=_weights_of(asked, data.store, sample_weight))
        if SUFFIX in names:
            data = data.with_suffix(
                suffix or SuffixSettings(),
                apart=layers is None,
                backbone=backbone,
                checkpoints=folder,
            )
        found = train_heads(data, names, test, progress=progress)
    for read in filter(None, (store, test)):
        read.checked_files()  # features that are mapped were read until now
    *rows, baseline = ranked(data, found)
    best: Predictor = found[0].predictor
    first = rows[0]
    best.leaderboard = Leaderboard(
        rows=tuple(rows),
        baseline=baseline,
        difference_of=options.difference_of,
        best_corrected=_corrected(data, [trial for one in found for trial in one.tried]),
        scoring=options.decides_name,
        n_fit=len(data.store),
        n_test=0 if first.held_out is None else first.held_out.images,
        n_unlabelled=splitting.n_unlabelled(store.labels),
        folds=data.folds_text,
        notes=(*small, *data.notes),
    )
    return best


def _check_arguments(store: FeatureStore, names: Sequence[str], **of_suffix: Any) -> None:
    """Refuse a path in place of a store, and what only the head ``suffix`` uses."""
    if not isinstance(store, FeatureStore):
        raise TrainingError(f"store is a FeatureStore: FeatureStore.open({str(store)!r})")
    given = [name for name, value in of_suffix.items() if value is not None]
    if given and SUFFIX not in names:
        raise TrainingError(
            f"{' and '.join(given)} goes with the head {SUFFIX!r}, which is not named."
        )


def _weights_of(
    store: FeatureStore, fit: FeatureStore, given: npt.ArrayLike | None
) -> npt.NDArray[np.float64] | None:
    """Return the weights of the rows of `store` that are trained on."""
    if given is None:
        return None
    weight = np.asarray(given, np.float64)
    if weight.shape != (len(store),):
        raise TrainingError(
            f"sample_weight has a number for each of the {len(store):,} rows of the store; its "
            f"shape is {weight.shape}."
        )
    order = np.argsort(store.rows, kind="stable")
    return weight[order[np.searchsorted(store.rows, fit.rows, sorter=order)]]


def train_heads(
    data: TrainingData,
    names: Sequence[str],
    test: FeatureStore | None,
    *,
    progress: bool | None,
) -> list[TrainedHead]:
    """Train each head, with a bar that moves with the fits."""
    if data.options.nested and not data.in_memory and names != [SUFFIX]:
        raise TrainingError(
            "nested cross-validation needs the features in memory, and training on "
            f"{tqdm.format_sizeof(data.size, 'B')} of them takes about {COPIES} times that: more "
            f"than the {tqdm.format_sizeof(data.memory, 'B')} of memory."
        )
    found = []

    def fitted(count: int) -> None:
        bar.update(count)
        check_stopped()

    with progress_bar(progress, unit=" fits", leave=False) as bar:
        for number, name in enumerate(names, 1):
            bar.set_description_str(f"{name} (head {number} of {len(names)})")
            found.append(_train_head(data.of_head(name), name, test, fitted))
    return found


def heads_of(head: Any) -> tuple[list[str], Mapping[str, Any]]:
    """Return the names of the heads to train, and those that are classifiers of the user's own."""
    named, own = own_heads(head)
    return [*(head_names(named) if named or not own else ()), *own], own


def head_names(heads: str | Sequence[str]) -> list[str]:
    """Return the heads to train."""
    given = [heads] if isinstance(heads, str) else list(heads or ())
    known = [*HEADS, SUFFIX]
    every = f"Heads: {', '.join(known)}, or all."
    if not given:
        raise TrainingError(f"head={heads!r} names no head. {every}")
    given = [name for each in given for name in (list(HEADS) if each == "all" else [each])]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.6)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise TrainingError(f"There is no head {name!r}.{hint} {every}")
    return list(dict.fromkeys(given))


@dataclass(frozen=True)
class TrainingData:
    """Rows, folds and memory that all heads share."""

    store: FeatureStore
    layers: list[str]
    folds: list[Fold]
    folds_text: str
    groups: npt.NDArray[Any] | None  # which intervals are made over
    scorer: FoldScorer
    memory: int
    notes: tuple[str, ...]
    options: TrainingOptions
    suffix: SuffixHead | None = None
    own: Mapping[str, Any] = field(default_factory=dict)  # the user's classifiers, by name
    weight: npt.NDArray[np.float64] | None = None  # of each image

    @classmethod
    def of(
        cls,
        store: FeatureStore,
        test: FeatureStore | None,
        layers: str | Sequence[str] | None,
        options: TrainingOptions,
    ) -> TrainingData:
        labelled = store.labels != ""
        # Where no row has a label, the folds' own message says so.
        fit = store.select(labelled) if labelled.any() and not labelled.all() else store
        if options.group and fit.groups is None:
            raise TrainingError(
                f"{', '.join(store.paths)} has no groups. Extract with --group-column (nothing is "
                "computed again)."
            )
        weights = options.class_weight if isinstance(options.class_weight, Mapping) else {}
        if unknown := [name for name in weights if name not in fit.labels]:
            raise TrainingError(f"class_weight names {unknown[0]!r}, which is not a class.")
        _check_classes(fit, test)
        fit, crossing = without_crossing(fit, test, options)
        folds = splitting.validation_fold(fit.splits, fit.labels, sha256=fit.sha256)
        text, rare = "validation split", untested(fit, test, "held-out image")
        if folds is None:
            folds = folds_of(fit, options)
            text = f"{len(folds)} {'grouped ' * options.group}folds"
            rare = rare_classes(fit, folds, options) + rare
        own = with_own_groups(fit.groups)
        classes, codes = coded(fit.labels)
        scorer = FoldScorer(options.decides, codes, classes, folds)
        judging = None if own is None else own[np.concatenate([valid for _, valid in folds])]
        few = few_groups(judging, " by cross-validation")
        if test is not None and test.groups is not None:
            scored = with_own_groups(test.groups[test.labels != ""])
            few += few_groups(scored, " for the held-out images")
        chosen = set(fit.resolve(layers))
        columns = [name for name in fit.taps if name in chosen]
        notes = [warning for one in fit.fingerprints for warning in one.warnings]
        notes += rare + scorer.notes
        if not scorer.resampled:
            notes.append(
                "no accuracy is corrected for the choice: that takes scores of single images, or "
                f"of two or more folds, and {options.decides_name} gives one score of all images"
            )
        if options.nested:
            notes.append("corrected accuracies are of the search whose folds are not nested")
        several = "folds" in text and own is not None and len(np.unique(own)) < len(fit)
        if several and not options.group:
            notes.append(
                "images of one group may be in several folds, which flatters: give --group "
                "(library: group=True) to keep them together"
            )
        return cls(
            store=fit,
            layers=columns,
            folds=folds,
            folds_text=text.replace("folds", "nested folds") if options.nested else text,
            groups=own,
            scorer=scorer,
            memory=available_memory() if options.memory is None else options.memory,
            notes=(*notes, *crossing, *few, *remarks(fit, columns)),
            options=options,
        )

    def with_suffix(self, settings: SuffixSettings, *, apart: bool, **options: Any) -> TrainingData:
        """Return the task with what the rest of the network needs.

        The other heads then use the other taps, unless there are none or taps were named
        (`apart` is False).
        """
        groups = self.groups if self.options.group else None
        suffix = SuffixHead.of(
            self.store, layers=self.layers, settings=settings, groups=groups, **options
        )
        others = [name for name in self.layers if name != suffix.maps.tap]
        return replace(self, suffix=suffix, layers=others if apart and others else self.layers)

    def of_head(self, head: str) -> TrainingData:
        """Return the task with the taps that a head uses."""
        if head != SUFFIX or self.suffix is None:
            return self
        return replace(self, layers=[self.suffix.maps.tap])

    @property
    def size(self) -> int:
        """Bytes of the features as float32."""
        return len(self.store) * self.store.views * self.store.width(self.layers) * 4

    @property
    def features(self) -> str:
        """What a head is trained on, for people."""
        taps = []
        for (source, _), name in source_taps(self.store).items():
            files = [Path(path).name for path in self.store.parts[source].paths]
            where = f" of {first_names(files)}" if len(self.store.parts) > 1 else ""
            taps += [f"{name}{where}"] * (name in self.layers)
        return f"{' + '.join(taps)} ({self.store.width(self.layers):,} columns)"

    @property
    def in_memory(self) -> bool:
        """Whether they can be trained on in memory."""
        return self.size * COPIES <= self.memory

    @cached_property
    def X(self) -> Any:
        """Features in memory (mapped where possible), or read in blocks."""
        return self.store.matrix(self.layers) if self.in_memory else self.blocks

    @cached_property
    def typicality(self) -> Typicality | None:
        """How typical an image is of these, whichever head is trained on them."""
        rows = TrainingRows.check(self.X, self.store.labels, self.folds)
        return Typicality.of(rows, self.options.random_state)

    @property
    def blocks(self) -> FeatureBlocks:
        """Features that are read in blocks."""
        views = (self.store.views,) if self.store.views > 1 else ()
        shape = (len(self.store), *views, self.store.width(self.layers))
        return FeatureBlocks(shape, lambda rows: self.store.blocks(self.layers, rows))

    def search(self, head: str, progress: Progress) -> Any:
        options = replace(self.options, memory=self.memory, progress=progress)
        suffix = self.suffix if head == SUFFIX else None
        kind = self.kind(head, options) if suffix is None else replace(suffix, options=options)
        X = self.X if suffix is None else self.blocks  # it reads the store by itself
        return search(kind, TrainingRows.check(X, self.store.labels, self.folds, self.weight))

    def kind(self, head: str, options: TrainingOptions) -> HeadKind:
        """Return a head of featcache's or of the user's by its name."""
        if head in self.own:
            return OwnHead(options, self.own[head], head)
        return HEADS[head](options)


def _check_classes(fit: FeatureStore, test: FeatureStore | None) -> None:
    """Refuse held-out images of a class that nothing is trained on, before anything is."""
    if test is None:
        return
    unknown = in_order(set(test.classes) - set(fit.classes))
    if unknown:
        count = int(np.isin(test.labels, unknown).sum())
        raise TrainingError(
            f"{counted(count, 'held-out image has', 'held-out images have')} labels that no image "
            f"to train on has: {first_names([*map(repr, unknown)], 5)}. Train on images of "
            "these classes too, or leave them out of the test."
        )


# --- one head ----------------------------------------------------------------------------------


@dataclass(eq=False)
class TrainedHead:
    """One head: its row, its trials without their logits, and what was predicted out of fold.

    `predicted` (n,) is -1 where no fold judges; `baseline` has the same images scored.
    """

    row: LeaderboardRow
    predictor: Any
    tried: list[Trial]
    predicted: npt.NDArray[np.int64]
    baseline: LeaderboardRow


def ranked(data: TrainingData, found: list[TrainedHead]) -> list[LeaderboardRow]:
    """Sort heads, the best first; return their rows and the baseline with the differences."""
    # Scores that differ by rounding are equal.
    found.sort(key=lambda one: (-round(one.row.cv_score, 9), one.row.cv.log_loss))
    rows, predicted = [one.row for one in found], [one.predicted for one in found]
    common = int(np.bincount(data.scorer.codes).argmax())
    rows.append(found[0].baseline)
    predicted.append(np.where(predicted[0] < 0, -1, common))
    balanced = data.options.balances
    off = paired_differences(data.scorer.codes, predicted, data.groups, balanced=balanced)
    return [replace(row, difference=one) for row, one in zip(rows, off, strict=True)]


def _train_head(
    data: TrainingData, head: str, test: FeatureStore | None, progress: Progress
) -> TrainedHead:
    """Search, fit and score one head."""
    with peak_memory() as peak:
        found = data.search(head, progress)
    tried = [replace(one, logits=None) for one in found.trials]
    logits, proba, score = found.logits, found.calibration.proba(found.logits), found.score
    if data.options.nested and head != SUFFIX:  # the folds of a suffix choose nothing
        logits, proba, score = _nested(data, head, progress)
    judged = out_of_fold(data.store, found.classes, logits, proba, data.groups)
    known = ~np.isnan(logits).any(axis=1)
    if head != SUFFIX:  # whose features are large, and whose network is not loaded for it
        # Class weights give accuracy up for the rare classes, more or less of it from fit to fit.
        balanced = data.options.class_weight is not None
        figure = judged.balanced_accuracy if balanced else judged.accuracy
        low = float(figure) if figure.low is None else figure.low
        check_fit(found.estimator, data.X, data.store.labels, known, low, balanced=balanced)
    predictor = _predictor(data, found, judged)
    held_out = None if test is None else evaluate(predictor, test, other_groups=True)
    row = LeaderboardRow(
        head=head,
        params=dict(found.params),
        features=data.features,
        cv_score=score,
        cv=judged.figures,
        cv_corrected=_corrected(data, tried),
        held_out=None if held_out is None else held_out.figures,
        search_seconds=found.search_seconds,
        fit_seconds=found.fit_seconds,
        predict_us=_predict_us(data, predictor),
        peak_mb=peak() / 1e6,
        candidates=tuple(one.to_dict() for one in found.trials),
        notes=found.notes + judged.moved + (() if held_out is None else held_out.notes),
    )
    predictor.metrics = {
        "out_of_fold": judged.summary(),
        "held_out": None if held_out is None else held_out.summary(),
    }
    predicted = np.full(len(known), -1)
    predicted[known] = judged.y_pred
    return TrainedHead(row, predictor, tried, predicted, _baseline(data, row, judged, held_out))


def _baseline(
    data: TrainingData, row: LeaderboardRow, judged: Evaluation, held_out: Evaluation | None
) -> LeaderboardRow:
    """Return what calling every image by the commonest class gives, on the images of a row."""
    counts = np.bincount(data.scorer.codes)
    shares = counts / counts.sum()

    def called(evaluation: Evaluation) -> Figures:
        proba = np.broadcast_to(shares, evaluation.proba.shape)
        predicted = np.full(len(evaluation), counts.argmax())
        return replace(evaluation, proba=proba, predicted=predicted).figures

    proba = np.broadcast_to(shares, (len(data.store), len(shares)))
    return replace(
        row,
        head="baseline",
        params={"label": str(data.scorer.classes[counts.argmax()])},
        features="",
        cv=called(judged),
        cv_score=float(np.nan_to_num(data.scorer(proba, proba)[0])),
        cv_corrected=None,
        held_out=None if held_out is None else called(held_out),
        search_seconds=0.0,
        fit_seconds=0.0,
        predict_us=0.0,
        peak_mb=0.0,
        notes=(),
        candidates=(),
    )


def _corrected(data: TrainingData, tried: Sequence[Trial]) -> Score | None:
    """Return the accuracy of the best of the settings that are scored on the most images.

    None where what chooses gives one score of all images.
    """
    scorer, by_fold = data.scorer, None
    if not scorer.resampled:
        return None
    judged = [one.predicted >= 0 for one in tried]
    known = max(judged, key=np.count_nonzero)
    whole = [one for one, of in zip(tried, judged, strict=True) if (of == known).all()]
    if not scorer.of_images:
        scores = np.array([one.fold_scores for one in whole]).T[scorer.counted]  # (folds, m)
        fold = np.full(len(known), -1)
        for number, valid in enumerate(itertools.compress(scorer.folds, scorer.counted)):
            fold[valid] = number
        known &= fold >= 0
        by_fold = fold[known], np.nan_to_num(scores, nan=-1e9)  # NaN is never best
    return corrected_accuracy(
        scorer.codes[known],
        [one.predicted[known] for one in whole],
        None if data.groups is None else data.groups[known],
        balanced=scorer.scoring == "balanced_accuracy",
        by_fold=by_fold,
    )


def _nested(
    data: TrainingData, head: str, progress: Progress
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """Search inside every fold's training part: the folds' logits, probabilities, and score.

    Varma and Simon, Bias in error estimation when using cross-validation for model selection
    (BMC Bioinformatics 7:91, 2006): what chose the parameters may not also judge them.
    """
    logits, proba = np.full((2, len(data.store), len(data.scorer.classes)), np.nan)
    for train, valid in data.folds:
        inner = folds_of(data.store.select(train), data.options)
        weight = None if data.weight is None else data.weight[train]
        rows = TrainingRows.check(data.X[train], data.store.labels[train], inner, weight)
        options = replace(data.options, memory=None, progress=progress)
        found = search(data.kind(head, options), rows)
        logits[valid] = found.estimator.logits(data.X[valid])
        proba[valid] = found.calibration.proba(logits[valid])
    return logits, proba, data.scorer(logits, proba)[0]


def _predictor(data: TrainingData, found: Any, judged: Evaluation) -> Predictor:
    """Wrap a found head with all that it needs to be used later."""
    of_truth = judged.proba[np.arange(len(judged)), judged.y_true]
    store = data.store
    columns = columns_of(store, data.layers)
    used = sorted({column.source for column in columns})
    fingerprints = [
        replace(
            store.fingerprints[source],
            taps=tuple(column.tap for column in columns if column.source == source),
        )
        for source in used
    ]
    return Predictor(
        estimator=found.estimator,
        head=found.head,
        params=dict(found.params),
        classes=tuple(found.classes.tolist()),
        calibration=found.calibration,
        columns=tuple(replace(column, source=used.index(column.source)) for column in columns),
        fingerprints=tuple(fingerprints),
        train_sha256=store.sha256,
        train_groups=group_hashes(store.groups),
        canaries=_canaries(data, found.estimator, columns),
        label_scores=Quantiles.of(1 - of_truth),
        typicality=None if found.head == SUFFIX else data.typicality,
    )


def _canaries(data: TrainingData, head: FittedHead, columns: Sequence[InputTap]) -> CanaryRows:
    """Return the features of the store's canary images, or some training rows, with scores."""
    found = [data.store.parts[column.source].canaries for column in columns]
    first = found[0]
    kept = [one for one in found if one and first and one.features and one.images == first.images]
    if len(kept) == len(columns):
        parts = [one.features[c.tap] for one, c in zip(kept, columns, strict=True)]
        x = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
        names, images = tuple(kept[0].names), tuple(kept[0].images)
    else:
        names, images = (), ()
        _, block = next(iter(data.store.blocks(data.layers, _CANARY_ROWS)))
        x = block[:, 0] if block.ndim == 3 else block
    x = np.array(x, dtype=np.float32, order="C")
    return CanaryRows(x, head.logits(x), names, images)


def _predict_us(data: TrainingData, predictor: Predictor) -> float:
    """Time predictions of one block of rows: microseconds an image, the better of two runs."""
    rows = max(1, min(_TIMED_ROWS, _TIMED_BYTES // (4 * data.store.width(data.layers))))
    _, block = next(iter(data.store.blocks(data.layers, rows)))
    seconds = min(timeit.repeat(lambda: predictor.predict_proba(block), number=1, repeat=2))
    return seconds / len(block) * 1e6
