"""The rest of a network as a head: the cut, the training from the cache, the predictor."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.special import softmax
from sklearn.metrics import log_loss
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.models import VisionTransformer, get_model

import featcache as fc
from featcache.cli.main import main
from featcache.errors import (
    FeatcacheError,
    FingerprintMismatch,
    Interrupted,
    OutputError,
    PredictorError,
    TapError,
    TrainingError,
)
from featcache.extraction.extract import extract
from featcache.finetuning.checkpoint import Checkpoint
from featcache.finetuning.cutting import Suffix, check, cut
from featcache.finetuning.head import SuffixStep
from featcache.finetuning.search import SuffixHead, choose_tap
from featcache.finetuning.settings import SuffixSettings
from featcache.finetuning.training import (
    Finetuned,
    Maps,
    finetune,
    minibatches,
    scores_of,
)
from featcache.finetuning.training import rate as rate_of
from featcache.heads.calibration import fit_temperature
from featcache.heads.rows import FeatureBlocks, TrainingRows
from featcache.heads.search import SearchOptions, search
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.surgery import (
    parameter_groups,
    replace_head,
    train_mode,
    unfreeze,
)
from featcache.networks.taps import Tapped, resolve
from featcache.networks.tracing import trace
from featcache.pixels.preprocessing import Preprocessing
from featcache.pixels.views import Augmentation
from featcache.predictor.export import export_model
from featcache.predictor.predictor import Predictor
from featcache.store.store import FeatureStore
from featcache.study.run import train_files
from featcache.study.train import train
from featcache.system.console import interruptible
from tests.predictor_files import parts_of, rewritten
from tests.small import SIDE, Network, network

SHAPE = (3, SIDE, SIDE)
BODY = "body:input:map"
POOL = "pool:output:flatten"
FAST = SuffixSettings(epochs=2, batch_size=8, lr=1e-2)


class Unbiased(Network):
    """The network without a bias before a normalisation.

    Such a bias changes nothing and has no gradient but rounding errors; AdamW makes steps of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(8, 16, 3, bias=False)


class Residual(nn.Module):
    """A network with a path around its second convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.tail = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.block(x)
        return self.head(self.tail(x).mean((2, 3)))


class Sideways(Residual):
    """A network whose head also sees the images themselves."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.tail(self.block(self.stem(x).relu()))
        return self.head(maps.mean((2, 3)) + x.mean((1, 2, 3))[:, None])


def backbone(*layers: str, kind: type[nn.Module] | None = None) -> Backbone:
    module = network() if kind is None else network(kind)
    return Backbone(module, preprocessing=Preprocessing(resize=SIDE, crop=SIDE), layers=layers)


def images(each: int = 16) -> ImageSet:
    """Return images of three colours, with much noise."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["blue", "green", "red"], each)
    pixels = rng.normal(90, 45, (len(labels), SIDE, SIDE, 3))
    for k, name in enumerate(labels):
        pixels[k, ..., ["red", "green", "blue"].index(name)] += 30
    return ImageSet.from_arrays(pixels.clip(0, 255).astype(np.uint8), labels.tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("suffix")


@pytest.fixture(scope="module")
def store(folder: Path) -> FeatureStore:
    return extract(images(), backbone(BODY, "pool"), folder / "a.h5", workers=0, progress=False)


@pytest.fixture(scope="module")
def predictor(store: FeatureStore) -> Predictor:
    return train(store, head="suffix", cv=2, suffix=FAST, backbone=backbone(BODY, "pool"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_program_that_computes_no_gradients_trains_the_same(
    mode: type, store: FeatureStore, predictor: Predictor
) -> None:
    given = backbone(BODY, "pool")
    with mode(), torch.device("meta"):
        found = train(store, head="suffix", cv=2, suffix=FAST, backbone=given)
    assert found.leaderboard[0].cv_score == predictor.leaderboard[0].cv_score


def codes_of(store: FeatureStore) -> np.ndarray:
    return np.unique(store.labels, return_inverse=True)[1].astype(np.int64)


def tune(store: FeatureStore, settings: SuffixSettings, **options: Any) -> Finetuned:
    """Train on all rows but the first nine, which say when to stop."""
    rows = np.random.default_rng(0).permutation(len(store))
    suffix = cut(network(), BODY, SHAPE)
    maps, codes = Maps(store, BODY), codes_of(store)
    return finetune(suffix, 3, maps, codes, rows[9:], rows[:9], settings, **options)


def calibrated_loss(scores: np.ndarray, codes: np.ndarray) -> float:
    values = scores.astype(np.float64)
    return float(
        log_loss(codes, softmax(values / fit_temperature(values, codes), axis=1), labels=[0, 1, 2])
    )


# --- the cut -----------------------------------------------------------------------------------


def assert_cuts(module: nn.Module, tap: str, shape: tuple[int, ...]) -> Suffix:
    """Assert that the network behind a tap gives on its features what the whole one gives."""
    suffix = cut(module, tap, shape)
    check(module, suffix)
    batch = torch.rand(3, *shape)
    with torch.inference_mode():
        features = Tapped(module, resolve(trace(module, batch), [tap]))(batch)[suffix.tap]
        torch.testing.assert_close(suffix(features), module(batch), rtol=1e-4, atol=1e-5)
    return suffix


@pytest.mark.parametrize(
    "tap", [BODY, "body:output:map", "norm2:output:map", "pool:map", "head:input"]
)
def test_the_suffix_gives_what_the_whole_network_gives(tap: str) -> None:
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    suffix = assert_cuts(module, tap, SHAPE)
    names = [name for name, _ in suffix.network.named_parameters()]
    assert not any(name.startswith(("stem", "norm.")) for name in names)
    assert set(names) <= before.keys()
    torch.testing.assert_close(module.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "tap"),
    [
        ("resnet18", "layer4:input:map"),
        ("mobilenet_v2", "features.17:input:map"),
        ("densenet121", "features.denseblock4:input:map"),
        ("squeezenet1_1", "features.10:input:map"),
    ],
)
def test_networks_of_torchvision(name: str, tap: str) -> None:
    torch.manual_seed(0)
    suffix = assert_cuts(get_model(name, weights=None).eval(), tap, (3, 96, 96))
    assert suffix.head in suffix.order


def test_transformers() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
    nn.init.normal_(vit.heads.head.weight)
    suffix = assert_cuts(vit.eval(), "encoder.layers.encoder_layer_2:input:map", (3, 32, 32))
    assert not any("class_token" in name or "_0." in name for name in suffix.trained())


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("name", "tap"),
    [
        ("vgg11", "features.15:input:map"),
        ("alexnet", "features.8:input:map"),
        ("vit_b_32", "encoder.layers.encoder_layer_11:input:map"),
        ("swin_t", "features.7:input:map"),
        ("convnext_tiny", "features.7:input:map"),
        ("efficientnet_b0", "features.7:input:map"),
        ("maxvit_t", "blocks.3:input:map"),
        ("googlenet", "inception5a:input:map"),
        ("timm/vit_tiny_patch16_224", "blocks.11:input:map"),
        ("timm/swin_tiny_patch4_window7_224", "layers.3:input:map"),
        ("timm/mixer_s32_224", "blocks.7:input:map"),
    ],
)
def test_more_networks(name: str, tap: str) -> None:
    torch.manual_seed(0)
    if name.startswith("timm/"):
        module = pytest.importorskip("timm").create_model(name.removeprefix("timm/"))
    else:
        options = {"init_weights": False} if name == "googlenet" else {}
        module = get_model(name, weights=None, **options)
    assert_cuts(module.eval(), tap, (3, 224, 224))


@pytest.mark.parametrize(
    ("tap", "hint"),
    [
        ("block.0:output:map", "--layer block:input:map"),
        ("block:output:map", "--layer block:input:map"),
    ],
)
def test_a_path_around_the_cut_is_refused(tap: str, hint: str) -> None:
    module = network(Residual)
    with pytest.raises(TapError, match="path around") as error:
        check(module, cut(module, tap, SHAPE))
    # x + block(x): what goes into the block goes around it as well, outside of any layer.
    assert hint not in str(error.value)
    assert "Cut between two blocks" in str(error.value)
    check(module, cut(module, "tail:input:map", SHAPE))


def test_the_refusal_names_the_block_to_cut_at() -> None:
    module = get_model("resnet18", weights=None).eval()
    with pytest.raises(TapError, match=r"--layer layer4\.1:input:map"):
        check(module, cut(module, "layer4.1.conv2:input:map", (3, 64, 64)))


def test_a_head_that_sees_the_images_is_refused() -> None:
    module = network(Sideways)
    with pytest.raises(TapError, match="path around"):
        check(module, cut(module, "tail:input:map", SHAPE))


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("body:input:mean", "--layer body:input:map"),
        ("pool", "--layer pool:output:map"),
        ("relu#1:output:map", "runs 2 times"),
        ("head:output", "Nothing can be trained behind"),
    ],
)
def test_taps_that_a_network_cannot_be_cut_at(tap: str, message: str) -> None:
    with pytest.raises(TapError, match=message):
        cut(network(), tap, SHAPE)


# --- which tap ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "first", "expected"),
    [
        (["stem:output:map", BODY, POOL], "body", BODY),
        (["stem:output:map", BODY, POOL], "norm2", BODY),
        (["stem:output:map", BODY, "body:output:map"], "norm2", "body:output:map"),
        (["stem:output:map", BODY], "norm", "stem:output:map"),
        ([BODY, POOL], None, BODY),
        (["head:input:flatten"], "head", "head:input:flatten"),
    ],
)
def test_the_last_tap_before_the_first_trained_layer_is_taken(
    folder: Path, layers: list[str], first: str | None, expected: str
) -> None:
    path = folder / f"{abs(hash((*layers, first)))}.h5"
    made = extract(images(2), backbone(*layers), path, workers=0, progress=False)
    module = network()
    traced = trace(module, torch.zeros(2, *SHAPE))
    assert choose_tap(made, list(made.taps), module, traced, first) == expected


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"first": "stem"}, TrainingError, r"featcache extract IMAGES .*--layer stem:input:map"),
        ({"first": "nothing"}, TapError, "no layer 'nothing'"),
        ({"epochs": 0}, TrainingError, "epochs counts from 1"),
        ({"schedule": "steps"}, TrainingError, "one-cycle or cosine"),
        ({"validation": 1.0}, TrainingError, "validation"),
    ],
)
def test_what_cannot_be_trained_is_said(
    store: FeatureStore, settings: dict[str, Any], error: type[FeatcacheError], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(store, head="suffix", suffix=SuffixSettings(**settings), backbone=backbone(BODY))


def test_a_store_without_maps_says_what_to_type(folder: Path) -> None:
    made = extract(images(6), backbone("pool"), folder / "pool.h5", workers=0, progress=False)
    with pytest.raises(TrainingError, match="--layer LAYER:input:map"):
        train(made, head="suffix", backbone=backbone("pool"))


def test_another_network_is_refused(store: FeatureStore) -> None:
    other = Backbone(
        network(seed=1), preprocessing=Preprocessing(resize=SIDE, crop=SIDE), layers=[BODY, "pool"]
    )
    with pytest.raises(FingerprintMismatch):
        train(store, head="suffix", backbone=other)


# --- reading -----------------------------------------------------------------------------------


def test_rows_are_read_in_any_order(store: FeatureStore) -> None:
    whole = store.load(BODY)[0]
    rows = np.array([7, 3, 3, 40, 12])
    np.testing.assert_array_equal(store.select(rows).load(BODY)[0], whole[rows])
    part = store.select(np.arange(47, 20, -2))
    np.testing.assert_array_equal(part.select([2, 0]).load(BODY)[0], whole[[43, 47]])
    with pytest.raises(IndexError):
        part.select([14])


def test_each_epoch_deals_all_rows_once_in_another_order() -> None:
    rows = np.arange(100, 121)
    first, second = (list(minibatches(rows, 8, (0, epoch))) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [7, 7, 7]
    assert all((np.diff(batch) > 0).all() for batch in first)
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == rows.tolist()
    assert [b.tolist() for b in first] != [b.tolist() for b in second]


# --- training ----------------------------------------------------------------------------------


def test_the_same_updates_as_inside_the_whole_frozen_network(folder: Path) -> None:
    """Twenty steps from the cache, and twenty through all layers: the same weights."""
    store = extract(
        images(), backbone(BODY, kind=Unbiased), folder / "same.h5", workers=0, progress=False
    )
    settings = SuffixSettings(first="body", epochs=4, batch_size=8, patience=0)
    codes, rows = codes_of(store), np.arange(40)
    valid = np.arange(40, 48)
    suffix = cut(network(Unbiased), BODY, SHAPE)
    inside = network(Unbiased).requires_grad_(False)
    tuned = finetune(suffix, 3, Maps(store, BODY), codes, rows, valid, settings)

    torch.manual_seed(0)
    replace_head(inside, 3)
    start = cut(network(Unbiased), BODY, SHAPE)
    fresh = finetune(
        start, 3, Maps(store, BODY), codes, rows, valid, SuffixSettings(epochs=1, lr=1e-30)
    )
    inside.head.load_state_dict(fresh.suffix.classifier.state_dict())  # the same new layer
    unfreeze(inside, "body", "norm2", "head")
    groups = parameter_groups(inside, settings.lr, factor=0.1, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    highest = [group["lr"] for group in optimizer.param_groups]
    prepare = Preprocessing(resize=SIDE, crop=SIDE)
    listed = images()
    pixels = torch.stack([torch.from_numpy(prepare(listed.read(i))) for i in range(len(listed))])
    best, at_best = np.inf, {}
    step = 0
    for epoch in range(4):
        train_mode(inside)
        for batch in minibatches(rows, 8, (0, epoch)):
            for group, top in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = top * rate_of(settings.schedule, step, 20)
            scores = inside(prepare.normalize(pixels[batch]))
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, torch.from_numpy(codes[batch])).backward()
            optimizer.step()
            step += 1
        inside.eval()
        with torch.no_grad():
            scores = inside(prepare.normalize(pixels[valid])).numpy()
        loss = calibrated_loss(scores, codes[valid])
        assert loss == pytest.approx(tuned.history[epoch].validation_loss, abs=1e-4)
        if loss < best:
            best, at_best = loss, {k: v.clone() for k, v in inside.state_dict().items()}
    assert step == 20
    own = tuned.suffix.network.state_dict()
    assert {"body.weight", "norm2.running_mean", "head.bias"} <= own.keys()
    for name, value in own.items():
        torch.testing.assert_close(value, at_best[name], rtol=0, atol=1e-4)


def changed(tuned: Finetuned) -> set[str]:
    """Name the layers that a training changed, statistics included."""
    before = network().state_dict()
    after = tuned.suffix.network.state_dict()
    return {
        name.partition(".")[0]
        for name, value in after.items()
        if value.shape != before[name].shape or not torch.equal(value, before[name])
    }


def test_layers_between_the_cut_and_the_first_trained_one_stay(store: FeatureStore) -> None:
    assert changed(tune(store, FAST)) == {"body", "norm2", "head"}
    assert changed(tune(store, SuffixSettings(first="norm2", epochs=1))) == {"norm2", "head"}
    assert changed(tune(store, SuffixSettings(first="head", epochs=1))) == {"head"}


def test_unfreezing_step_by_step_down_to_the_first_layer(store: FeatureStore) -> None:
    for epochs, expected in [(2, {"head"}), (3, {"norm2", "head"}), (5, {"body", "norm2", "head"})]:
        settings = SuffixSettings(epochs=epochs, unfreeze_every=2, lr=1e-2, patience=0)
        tuned = tune(store, settings)
        assert changed(tuned) <= expected
        if tuned.best == epochs:
            assert changed(tuned) == expected
    gentle = SuffixSettings(epochs=4, unfreeze_every=1, first="norm2")
    assert changed(tune(store, gentle)) <= {"norm2", "head"}


def test_the_best_weights_are_kept_and_patience_ends_the_training(store: FeatureStore) -> None:
    tuned = tune(store, SuffixSettings(epochs=40, batch_size=8, lr=0.3, factor=1.0, patience=3))
    losses = [epoch.validation_loss for epoch in tuned.history]
    assert tuned.best == int(np.argmin(losses)) + 1
    assert len(losses) == tuned.best + 3 < 40
    rows = np.random.default_rng(0).permutation(len(store))[:9]
    with torch.inference_mode():
        scores = tuned.suffix(Maps(store, BODY).read(rows)).numpy()
    loss = calibrated_loss(scores, codes_of(store)[rows])
    assert loss == pytest.approx(min(losses), rel=1e-4)


def test_without_validation_images_all_are_trained_on_to_the_last_epoch(
    store: FeatureStore, tmp_path: Path
) -> None:
    settings = SuffixSettings(epochs=3, batch_size=8, patience=1, validation=0)
    suffix, rows = cut(network(), BODY, SHAPE), np.arange(len(store))
    tuned = finetune(suffix, 3, Maps(store, BODY), codes_of(store), rows, rows[:0], settings)
    assert tuned.best == len(tuned.history) == 3
    assert np.isnan(tuned.history[0].validation_loss)
    predictor = train(store, head="suffix", cv=2, suffix=settings, backbone=backbone(BODY))
    assert predictor.params["best_epoch"] == 3
    predictor.save(tmp_path / "a.featcache")
    assert Predictor.load(tmp_path / "a.featcache").params == predictor.params
    state = tuned.suffix.network.state_dict()
    for name, value in predictor.estimator.steps[0].suffix.network.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_rates_end_near_zero(schedule: str) -> None:
    rates = [rate_of(schedule, step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.01
    assert int(np.argmax(rates)) == (25 if schedule == "one-cycle" else 0)


def test_a_loss_that_is_not_finite_is_said(store: FeatureStore) -> None:
    with pytest.raises(TrainingError, match="smaller learning rate"):
        tune(store, SuffixSettings(epochs=3, lr=1e30, factor=1.0))


class Stop(Exception):
    """Ends a training in the middle, as a kill would."""


def test_a_resumed_training_gives_the_weights_of_an_uninterrupted_one(
    store: FeatureStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = SuffixSettings(epochs=5, batch_size=8, lr=1e-2)
    expected = tune(store, settings)
    checkpoint = Checkpoint(tmp_path / "run" / "final.pt", "this")
    steps = 0
    last = 13  # in the middle of the third epoch

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == last:
            raise Stop

    hook = register_optimizer_step_post_hook(count)
    request.addfinalizer(hook.remove)
    with pytest.raises(Stop):
        tune(store, settings, checkpoint=checkpoint)
    state = checkpoint.read()
    assert state is not None and len(state["history"]) == 2
    steps, last = 0, -1
    resumed = tune(store, settings, checkpoint=checkpoint)
    assert steps == 5 * 5 - 2 * 5
    assert resumed.history == expected.history
    torch.testing.assert_close(
        resumed.suffix.network.state_dict(), expected.suffix.network.state_dict(), rtol=0, atol=0
    )
    steps = 0
    again = tune(store, settings, checkpoint=checkpoint)
    assert not steps and again.history == expected.history


def test_a_damaged_or_foreign_checkpoint_counts_as_none(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "a.pt", "this")
    assert checkpoint.read() is None
    checkpoint.write({"best": 3})
    assert checkpoint.read() == {"best": 3}
    assert Checkpoint(checkpoint.path, "that").read() is None
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-40])
    assert checkpoint.read() is None
    torch.save({"format": Path("no plain data")}, checkpoint.path)
    assert checkpoint.read() is None


def test_a_flipped_bit_anywhere_in_a_checkpoint_counts_as_none(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "a.pt", "this")
    checkpoint.write({"tensors": {"weight": torch.arange(9.0)}, "best": 3})
    content = checkpoint.path.read_bytes()
    silent = []
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        checkpoint.path.write_bytes(damaged)
        if checkpoint.read() is not None:
            silent.append(position)
    assert silent == []


def test_a_signal_waits_until_the_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "a.pt", "this")
    save = torch.save

    def interrupted(content: Any, file: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(Interrupted, match="SIGTERM"), interruptible():
        checkpoint.write({"best": 3})
        raise AssertionError("went on")
    assert checkpoint.read() == {"best": 3}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_the_same_call_resumes(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    options = {"head": "suffix", "cv": 2, "suffix": FAST, "backbone": backbone(BODY, "pool")}
    expected = train(store, **options)
    write = Checkpoint.write
    written: list[str] = []

    def interrupting(self: Checkpoint, state: Any) -> None:
        write(self, state)
        written.append(self.path.name)
        if len(written) == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(Checkpoint, "write", interrupting)
    with pytest.raises(Interrupted, match="same command again"):
        train(store, **options, checkpoints=tmp_path / "run")
    resumed = train(store, **options, checkpoints=tmp_path / "run")
    assert written == ["fold-1.pt"] * 2 + ["fold-2.pt"] * 2 + ["final.pt"] * 2
    np.testing.assert_array_equal(resumed.predict_proba_of(store), expected.predict_proba_of(store))


def test_a_command_stopped_by_a_signal_resumes_to_the_same_weights(tmp_path: Path) -> None:
    network_ = Backbone("tests.small:own", layers=[BODY])
    extract(images(), network_, tmp_path / "a.h5", workers=0, progress=False)
    command = ["train", str(tmp_path / "a.h5"), "--head", "suffix", "--cv", "2", "--device", "cpu"]
    command += ["--backbone", "tests.small:own", "--epochs", "60", "--patience", "0"]
    whole, target = tmp_path / "whole.featcache", tmp_path / "a.featcache"
    assert CliRunner().invoke(main, [*command, "-o", str(whole)]).exit_code == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "featcache.cli", *command, "-o", str(target)],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    first = tmp_path / "a.featcache.checkpoints" / "fold-1.pt"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert message.count("\n") == 1 and "Stopped by SIGTERM." in message
    assert f"{first.parent}: run the same command again" in message
    assert first.exists() and not target.exists()
    assert CliRunner().invoke(main, [*command, "-o", str(target)]).exit_code == 0
    assert not first.parent.exists()
    made, expected = Predictor.load(target), Predictor.load(whole)
    for name, value in expected.estimator.steps[0].arrays().items():
        np.testing.assert_array_equal(made.estimator.steps[0].arrays()[name], value)
    assert made.calibration == expected.calibration


def test_seeds_decide(store: FeatureStore) -> None:
    once, twice = tune(store, FAST), tune(store, FAST)
    assert once.history == twice.history
    assert tune(store, FAST, random_state=1).history != once.history


def test_features_are_read_a_minibatch_at_a_time(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0
    load = FeatureStore.load

    def loading(self: FeatureStore, *args: Any, **options: Any) -> Any:
        nonlocal largest
        largest = max(largest, len(self))
        return load(self, *args, **options)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the whole array was asked for")

    monkeypatch.setattr(FeatureStore, "load", loading)
    monkeypatch.setattr(FeatureStore, "matrix", refused)
    tune(store, FAST)
    train(store, head="suffix", cv=2, suffix=FAST, backbone=backbone(BODY), layers=[BODY])
    assert 0 < largest <= 24  # of a fold, to be scored; of a training, 8


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_as_the_cpu_does(store: FeatureStore) -> None:
    slow = tune(store, SuffixSettings(epochs=2, batch_size=8, device="cpu"))
    fast = tune(store, SuffixSettings(epochs=2, batch_size=8, device="cuda"))
    assert fast.suffix.classifier.weight.device.type == "cpu"
    for one, other in zip(slow.history, fast.history, strict=True):
        assert one.validation_loss == pytest.approx(other.validation_loss, abs=0.1)


# --- views -------------------------------------------------------------------------------------


def test_views_are_drawn_in_training_and_averaged_in_prediction(folder: Path) -> None:
    network_ = backbone(BODY)
    made = extract(
        images(),
        network_,
        folder / "views.h5",
        augmentation=Augmentation(scale=(0.6, 1.0), views=3),
        store_dtype="float16",
        workers=0,
        progress=False,
    )
    predictor = train(made, head="suffix", cv=2, suffix=FAST, backbone=network_)
    X = made.matrix([BODY])
    assert X.shape == (48, 3, 8 * 15 * 15)
    scores = np.mean([predictor.estimator.logits(X[:, k]) for k in range(3)], axis=0)
    np.testing.assert_array_equal(
        predictor.predict_features(X), np.array(predictor.classes)[scores.argmax(axis=1)]
    )
    view = Maps(made, BODY).read(np.array([4, 9]), np.array([2, 0]))
    np.testing.assert_array_equal(view[1].numpy(), made.load(BODY, dtype="float16")[0][9, 0])


# --- as a predictor ----------------------------------------------------------------------------


def test_it_is_compared_with_the_other_heads_under_the_same_folds(store: FeatureStore) -> None:
    fit, test = store.split(0.25)
    best = train(
        fit, test, head=["linear", "suffix"], cv=2, suffix=FAST, backbone=backbone(BODY, "pool")
    )
    board = best.leaderboard
    rows = {row.head: row for row in board.rows}
    assert rows.keys() == {"linear", "suffix"}
    assert rows["suffix"].params["from"] == "body"
    assert 0 <= rows["suffix"].cv.accuracy <= 1 and rows["suffix"].held_out is not None
    assert [c.tap for c in best.columns] == [{"linear": POOL, "suffix": BODY}[best.head]]
    assert f"features of suffix: {rows['suffix'].features}" in str(board)
    assert rows["suffix"].features.startswith(f"{BODY} (")
    assert f"features of linear: {POOL} (" in str(board)
    assert best.calibration.temperature > 0
    assert "suffix" not in fc.train(fit, head=["knn"], layers=["pool"], cv=2).leaderboard.to_text()


def test_scores_while_training_are_those_that_the_head_gives(
    predictor: Predictor, store: FeatureStore
) -> None:
    head, rows = predictor.estimator.steps[0], np.arange(len(store))
    while_training = scores_of(head.suffix, Maps(store, BODY), rows, torch.device("cpu"))
    np.testing.assert_array_equal(head(store.matrix([BODY])), while_training)
    assert head(np.zeros((0, 8 * 15 * 15))).shape == (0, 3)


def test_saved_loaded_and_used_on_images_and_stores(
    predictor: Predictor, store: FeatureStore, tmp_path: Path
) -> None:
    expected = predictor.predict_proba_of(store)
    predictor.save(tmp_path / "a.featcache")
    loaded = Predictor.load(tmp_path / "a.featcache")
    with pytest.raises(PredictorError, match="was given as a module"):
        loaded.predict_proba_of(store)
    loaded.attach(backbone(BODY))
    np.testing.assert_allclose(loaded.predict_proba_of(store), expected, atol=1e-6)
    loaded = Predictor.load(tmp_path / "a.featcache")
    found = loaded.attach(backbone(BODY)).predict(images(), top_k=3)
    proba = [dict(one.top)[name] for one in found for name in predictor.classes]
    np.testing.assert_allclose(np.reshape(proba, (48, 3)), expected, atol=1e-4)
    assert [step["kind"] for step in parts_of(tmp_path / "a.featcache")[0]["steps"]] == ["suffix"]


def test_as_a_network_and_exported(
    predictor: Predictor, store: FeatureStore, tmp_path: Path
) -> None:
    grafted = predictor.attach(backbone(BODY)).to_torch()
    listed, prepare = images(), Preprocessing(resize=SIDE, crop=SIDE)
    pixels = torch.stack([torch.from_numpy(prepare(listed.read(i))) for i in range(5)])
    with torch.inference_mode():
        found = grafted(prepare.normalize(pixels)).numpy()
    np.testing.assert_allclose(found, predictor.predict_proba_of(store)[:5], atol=1e-5)
    trainable = {name for name, p in grafted.named_parameters() if p.requires_grad}
    assert trainable and all(name.startswith("head.") for name in trainable)
    export_model(predictor.attach(backbone(BODY)), tmp_path / "a.pt2")
    program = torch.export.load(tmp_path / "a.pt2").module()
    np.testing.assert_allclose(program(pixels).detach().numpy(), found, atol=1e-5)


def test_it_needs_the_code_of_its_network(predictor: Predictor, store: FeatureStore) -> None:
    head = predictor.estimator.steps[0]
    loaded = SuffixStep.of(head.arrays(), **head.values())
    assert not loaded.is_bound
    with pytest.raises(PredictorError, match="has not been given one"):
        loaded(store.matrix([BODY]))
    with pytest.raises(PredictorError, match="does not fit the network"):
        loaded.bind(network(Residual), SHAPE)
    loaded.bind(network(seed=3), SHAPE)
    np.testing.assert_array_equal(loaded(store.matrix([BODY])), head(store.matrix([BODY])))


SUFFIX_EDITS: dict[str, Any] = {
    "shape of another size": {"shape": [8, 15, 14]},
    "shape of texts": {"shape": "abc"},
    "shape of nothing": {"shape": [0, 15, 15]},
    "tap a number": {"tap": 3},
    "head a list": {"head": []},
    "outputs of another number": {"outputs": 4},
    "outputs without end": {"outputs": 10**12},
    "something else": {"path": "/etc"},
}


@pytest.mark.parametrize("what", SUFFIX_EDITS)
def test_a_hostile_suffix_is_refused(predictor: Predictor, tmp_path: Path, what: str) -> None:
    predictor.save(tmp_path / "a")

    def change(text: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        text["steps"][0].update(SUFFIX_EDITS[what])

    with pytest.raises(PredictorError):
        Predictor.load(rewritten(tmp_path / "a", tmp_path / "b", change))


def test_the_last_layer_alone_is_trained_on_its_own_input(folder: Path) -> None:
    network_ = backbone("head:input")
    made = extract(images(), network_, folder / "head.h5", workers=0, progress=False)
    predictor = train(made, head="suffix", cv=2, suffix=FAST, backbone=network_)
    assert predictor.estimator.steps[0].suffix.trained() == ["head.weight", "head.bias"]
    state = predictor.estimator.steps[0].state
    scores = made.matrix() @ state["head.weight"].T + state["head.bias"]
    np.testing.assert_allclose(predictor.estimator.logits(made.matrix()), scores, atol=1e-5)
    head = predictor.estimator.steps[0]
    loaded = SuffixStep.of(head.arrays(), **head.values()).bind(network(), SHAPE)
    np.testing.assert_allclose(loaded(made.matrix()), scores, atol=1e-5)


def test_class_weights_and_groups_are_heeded(store: FeatureStore) -> None:
    groups = np.repeat(np.arange(24), 2).astype(str)
    head = SuffixHead.of(
        store,
        layers=list(store.taps),
        settings=FAST,
        groups=groups,
        backbone=backbone(BODY, "pool"),
    )
    folds = [(np.arange(0, 48, 2), np.arange(1, 48, 2))]
    blocks = FeatureBlocks.of(store.matrix([BODY]))
    rows = TrainingRows.check(blocks, store.labels, folds)
    plain = search(head, rows)
    weighted = search(replace(head, options=SearchOptions(class_weight={"red": 50.0})), rows)
    assert np.isnan(plain.logits[::2]).all() and not np.isnan(plain.logits[1::2]).any()
    red = [softmax(found.logits[1::2], axis=1)[:, 2].mean() for found in (plain, weighted)]
    assert red[1] > red[0]


def test_the_study_keeps_checkpoints_only_until_it_is_saved(
    store: FeatureStore, tmp_path: Path
) -> None:
    target = tmp_path / "a.featcache"
    options = {"head": ["suffix"], "cv": 2, "suffix": FAST, "backbone": backbone(BODY, "pool")}
    train_files(store.paths, target, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.featcache"]
    # a run that was killed after it had saved leaves them, and what it was writing
    Checkpoint(tmp_path / "a.featcache.checkpoints" / "final.pt", "a request").write({})
    (tmp_path / "a.featcache.checkpoints" / f".final.pt.{16 * '0'}.tmp").touch()
    assert train_files(store.paths, target, **options).up_to_date
    assert [path.name for path in tmp_path.iterdir()] == ["a.featcache"]
    for length in (0, 9):  # a power cut left of it so many bytes
        folder = tmp_path / "a.featcache.checkpoints"
        folder.mkdir()
        (folder / "final.pt").write_bytes(b"featcache-checkpoint-2"[:length])
        other = {**options, "suffix": SuffixSettings(epochs=1 + (length > 0))}
        assert not train_files(store.paths, target, **other).up_to_date
        assert [path.name for path in tmp_path.iterdir()] == ["a.featcache"]


@pytest.mark.parametrize("name", ["final.pt", "fold-1.pt", "fold-best.pt", "notes.txt"])
def test_files_of_the_user_beside_checkpoints_are_left(
    store: FeatureStore, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "a.featcache"
    foreign = tmp_path / "a.featcache.checkpoints" / name
    foreign.parent.mkdir()
    torch.save({"format": "mine", "state": {}}, foreign)
    before = foreign.read_bytes()
    train_files(store.paths, target, head="ridge", cv=2)
    assert foreign.read_bytes() == before
    with pytest.raises(OutputError, match=f"holds {name}, which is no checkpoint of featcache"):
        train_files(
            store.paths, target, head="suffix", cv=2, suffix=FAST, backbone=backbone(BODY, "pool")
        )
    assert foreign.read_bytes() == before
    assert list(foreign.parent.iterdir()) == [foreign]
