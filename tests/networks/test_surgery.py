from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model

from featcache.errors import BackboneError, WeightsError
from featcache.extraction.extract import extract
from featcache.finetuning.settings import SuffixSettings
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.surgery import (
    adapt_input,
    blocks,
    children,
    freeze,
    frozen,
    head_name,
    load_partial,
    parameter_groups,
    remove_head,
    replace_head,
    replace_layer,
    train_mode,
    trainable_parameters,
    unfreeze,
    unfreeze_gradually,
)
from featcache.networks.taps import Tapped, resolve
from featcache.networks.tracing import trace
from featcache.pixels.preprocessing import Preprocessing
from featcache.pixels.views import Augmentation
from featcache.study.train import train
from tests.small import network as small_network

META = torch.device("meta")


def skeleton(name: str) -> nn.Module:
    """Build a network without numbers: shapes are enough to test names and counts."""
    with META:
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return get_model(name, weights=None, **options).eval()


def images(*shape: int) -> Tensor:
    return torch.zeros(shape, device=META)


class Small(nn.Module):
    """A stem with BatchNorm, a block, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.block = nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x).relu()).mean((2, 3)))


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


def trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_recipe_1_resnet101_freeze_all_train_a_new_last_layer_or_delete_it() -> None:
    network = skeleton("resnet101")
    freeze(network)
    assert not trainable_parameters(network)
    unfreeze(network, "fc")
    assert trained(network) == {"fc.weight", "fc.bias"}
    new = replace_head(network, 200)
    assert network.fc is new
    optimizer = torch.optim.SGD(trainable_parameters(network), lr=0.1)
    assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"]] == [(200, 2048), (200,)]
    assert network(images(2, 3, 64, 64)).shape == (2, 200)
    assert remove_head(network) == "fc"
    assert network(images(2, 3, 64, 64)).shape == (2, 2048)
    assert not trainable_parameters(network)


def test_recipe_2_vgg11_layers_by_name_and_the_output_of_each() -> None:
    torch.manual_seed(0)
    network = get_model("vgg11", weights=None).features.eval()
    image = torch.rand(1, 3, 32, 32)
    traced = trace(network, image)
    table = traced.layers()
    names = children(network)
    assert [row.name for row in table] == ["", *names]
    assert table[1].kind == "Conv2d"
    assert table[1].output_shape == (64, 32, 32)
    assert table[-1].output_shape == (512, 1, 1)
    with torch.no_grad():
        outputs = Tapped(network, resolve(traced, [f"{n}:map" for n in names]))(image)
        expected = image
        for name in names:
            layer = network.get_submodule(name)
            expected = layer(expected.clone())  # its ReLUs write into what they are given
            torch.testing.assert_close(outputs[f"{name}:output:map"], expected)


def test_recipe_3_vgg16_on_cifar10() -> None:
    network = skeleton("vgg16")
    replace_layer(network, "avgpool", nn.Identity())
    old = replace_layer(network, "classifier", nn.Linear(512, 10, device=META))
    assert isinstance(old, nn.Sequential)
    assert network.features(images(2, 3, 32, 32)).shape == (2, 512, 1, 1)
    assert network(images(2, 3, 32, 32)).shape == (2, 10)

    by_index = skeleton("vgg16")
    replace_layer(by_index, "classifier.6", nn.Linear(4096, 10, device=META))
    assert by_index(images(2, 3, 224, 224)).shape == (2, 10)

    with META:
        tail = nn.Sequential(nn.Linear(512, 100), nn.ReLU(), nn.Linear(100, 10))
    replace_layer(network, "classifier", tail)
    assert network(images(2, 3, 32, 32)).shape == (2, 10)
    assert head_name(network) == "classifier.2"


def test_recipe_4_alexnet_train_the_classifier_and_freeze_for_a_while() -> None:
    network = skeleton("alexnet")
    freeze(network, "features")
    assert all(name.startswith("classifier.") for name in trained(network))
    before = trained(network)
    with frozen(network, "classifier.6", "classifier.1.bias") as same:
        assert same is network
        assert before - trained(network) == {
            "classifier.6.weight",
            "classifier.6.bias",
            "classifier.1.bias",
        }
    assert trained(network) == before
    with pytest.raises(ZeroDivisionError), frozen(network):
        assert not trained(network)
        _ = 1 / 0
    assert trained(network) == before


def test_recipe_5_load_what_fits_and_say_what_was_left_out(tmp_path: Path, small: Small) -> None:
    other = Small()
    state = dict(other.state_dict())
    state["fc.weight"] = torch.zeros(7, 6)
    state["old.weight"] = torch.zeros(3)
    del state["block.bias"]
    bias = small.block.bias.detach().clone()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}},
               tmp_path / "c.pth")  # fmt: skip
    for checkpoint in (state, tmp_path / "c.pth", str(tmp_path / "c.pth")):
        report = load_partial(small, checkpoint)
        assert not report.complete
        assert report.missing == ("block.bias",)
        assert report.unexpected[0].endswith("old.weight")
        assert report.mismatched == (("fc.weight", (7, 6), (5, 6)),)
        assert "5 of 7" in str(report)  # parameters, buffers aside
        assert "fc.weight (7, 6) instead of (5, 6)" in str(report)
    torch.testing.assert_close(small.stem[0].weight, other.stem[0].weight)
    torch.testing.assert_close(small.block.bias, bias)
    assert load_partial(small, other.state_dict()).complete
    with pytest.raises(WeightsError, match="no checkpoint file"):
        load_partial(small, tmp_path / "missing.pth")


@pytest.mark.parametrize("rule", ["keep", "tile", "zero"])
def test_recipe_6_first_convolution_for_1_2_4_or_12_channels(rule: str) -> None:
    torch.manual_seed(0)
    network = get_model("resnet18", weights=None).eval()
    old = network.conv1.weight.detach().clone()
    new = {}
    for channels in (1, 2, 4, 12):
        network.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        network.conv1.weight.data.copy_(old)
        layer = adapt_input(network, channels, rule=rule)
        assert layer is network.conv1
        assert layer.in_channels == channels
        assert layer.weight.requires_grad
        assert network(torch.rand(1, channels, 32, 32)).shape == (1, 1000)
        new[channels] = layer.weight.detach()
    torch.testing.assert_close(new[1], old.sum(1, keepdim=True))
    torch.testing.assert_close(new[2], old[:, :2] * 1.5)
    if rule == "tile":
        torch.testing.assert_close(new[4], old[:, [0, 1, 2, 0]] * 0.75)
        torch.testing.assert_close(new[12].sum(1), old.sum(1))
    else:
        mean = old.mean(1) if rule == "keep" else torch.zeros_like(old[:, 0])
        assert torch.equal(new[4][:, :3], old)
        assert torch.equal(new[12][:, :3], old)
        torch.testing.assert_close(new[4][:, 3], mean)
        torch.testing.assert_close(new[12][:, 11], mean)


def test_recipe_6_a_grey_image_gives_what_it_gave_as_rgb() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    grey = torch.rand(2, 1, 8, 8)
    as_rgb = network(grey.expand(-1, 3, -1, -1))
    adapt_input(network, 1)
    torch.testing.assert_close(network(grey), as_rgb)


def test_recipe_6_images_with_that_many_channels_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 40, 40), dtype=np.uint8)
    Image.fromarray(np.ascontiguousarray(pixels[:4].transpose(1, 2, 0))).save(tmp_path / "rgba.png")
    pages = [Image.fromarray(page) for page in pixels]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    np.save(tmp_path / "bands.npy", pixels.transpose(1, 2, 0))
    for name, channels in (("rgba.png", 4), ("pages.tif", 12), ("bands.npy", 12)):
        preprocessing = Preprocessing(
            resize=40, crop=32, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels
        )
        image = torch.from_numpy(preprocessing((tmp_path / name).read_bytes()).copy())
        assert torch.equal(image, torch.from_numpy(pixels[:channels, 4:36, 4:36].copy()))
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        adapt_input(network, channels)
        assert network(preprocessing.normalize(image[None])).shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("alexnet", "classifier.6"),
        ("vgg11", "classifier.6"),
        ("resnet18", "fc"),
        ("squeezenet1_1", "classifier.1"),
        ("densenet121", "classifier"),
        ("mobilenet_v2", "classifier.1"),
        ("vit_b_32", "heads.head"),
        ("swin_t", "head"),
        ("convnext_tiny", "classifier.2"),
    ],
)
def test_recipe_7_last_layer_for_21_classes_whatever_its_name(name: str, head: str) -> None:
    network = skeleton(name)
    assert head_name(network) == head
    new = replace_head(network, 21)
    assert network.get_submodule(head) is new
    assert network(images(2, 3, 224, 224)).shape == (2, 21)


def test_recipe_7_new_layers_keep_kind_type_and_place_of_the_old(small: Small) -> None:
    small.double()
    small.fc = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    new = replace_head(small, 3)
    assert isinstance(new, nn.Linear)
    assert new.weight.dtype == torch.float64
    assert new.bias is None
    assert list(children(small)) == ["stem", "block", "fc"]


def test_recipe_7_timm_networks() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_resnet")
    replace_head(network, 21)
    assert network.num_classes == 21
    assert network.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 21)
    remove_head(network)
    with pytest.raises(BackboneError, match="no head or several"):
        head_name(network)
    two = timm.create_model("deit_tiny_distilled_patch16_224", device=META)
    with pytest.raises(BackboneError, match=r"name='\.\.\.'"):
        replace_head(two, 21)
    replace_head(two, 21, name="head")
    assert two.head.out_features == 21


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_recipe_7_auxiliary_heads_change_as_well(name: str) -> None:
    network = skeleton(name)
    replace_head(network, 21)
    network.train()
    outputs = network(images(2, 3, 299, 299))
    assert {tuple(output.shape) for output in outputs} == {(2, 21)}


def test_recipe_8_densenet121_unfrozen_from_the_top_down() -> None:
    network = skeleton("densenet121")
    freeze(network, *children(network, "features")[:5])
    assert not trainable_parameters(network.features.denseblock1)
    transition = network.features.transition1
    assert trainable_parameters(transition) == list(transition.parameters())
    assert 0 < len(trainable_parameters(network)) < len(list(network.parameters()))

    order = blocks(network)
    assert order[:4] == [
        "classifier",
        "features.norm5",
        "features.denseblock4",
        "features.transition3",
    ]
    assert order[-1] == "features.conv0"
    for epoch, steps in [(0, 1), (1, 1), (2, 2), (5, 3), (40, len(order))]:
        assert unfreeze_gradually(network, epoch, every=2) == order[:steps]
        expected = {n for n, _ in network.named_parameters()
                    if any(n.startswith(f"{name}.") for name in order[:steps])}  # fmt: skip
        assert trained(network) == expected
    assert unfreeze_gradually(network, 9, order=["classifier"]) == ["classifier"]
    assert trained(network) == {"classifier.weight", "classifier.bias"}


def test_recipe_9_csv_of_breeds_by_hand_and_from_the_cache(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["id,breed"]
    for k in range(60):
        breed = ("beagle", "collie", "whippet")[k % 3]
        pixels = rng.normal(90, 40, (40, 44, 3))
        pixels[..., k % 3] += 30
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{k:03d}.jpg")
        lines.append(f"{k:03d},{breed}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    images = ImageSet.from_csv(
        tmp_path / "labels.csv", tmp_path, label_column="breed", suffix=".jpg"
    )
    prepare = Preprocessing(resize=32, crop=32)
    augment = Augmentation(scale=(0.6, 1.0), views=3)
    pretrained = small_network()
    network = Backbone(pretrained, preprocessing=prepare, layers=["pool:input:map", "pool"])
    store = extract(
        images,
        network,
        tmp_path / "breeds.h5",
        augmentation=augment,
        workers=0,
        progress=False,
    )
    fit, validation = store.split(0.1, stratify=True, random_state=0)
    assert sorted(np.unique(validation.labels, return_counts=True)[1]) == [2, 2, 2]

    # By hand: nine epochs of augmented images through the whole frozen network.
    breeds = store.classes
    freeze(pretrained)
    head = replace_head(pretrained, len(breeds))
    optimizer = torch.optim.Adam(trainable_parameters(pretrained), lr=0.03)
    rows = {name: row for row, name in enumerate(images.ids)}
    truth = torch.tensor([breeds.index(label) for label in fit.labels])
    losses = []
    for epoch in range(9):
        train_mode(pretrained)
        drawn = dataclasses.replace(augment, views=epoch + 1)
        views = [prepare.views(images.read(rows[name]), drawn, name)[-1] for name in fit.ids]
        scores = pretrained(prepare.normalize(torch.from_numpy(np.stack(views))))
        loss = nn.functional.cross_entropy(scores, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and isinstance(head, nn.Linear)

    # From the cache of the pooling layer's input, and SVM and trees on what it pools.
    nine = SuffixSettings(first="head", epochs=9, lr=0.03, batch_size=16, patience=0)
    heads = ("suffix", "svm", "forest")
    given = {"suffix": {"suffix": nine, "backbone": network}}
    best = {head: train(fit, validation, head=head, cv=2, **given.get(head, {})) for head in heads}
    rows = [row for found in best.values() for row in found.leaderboard]
    assert all(row.held_out is not None and row.cv.accuracy > 0.6 for row in rows)
    suffix = best["suffix"].estimator.steps[0].suffix
    assert suffix.trained() == ["head.weight", "head.bias"]


def test_recipe_9_pretrained_layers_learn_ten_times_slower_than_new_ones(small: Small) -> None:
    groups = parameter_groups(small, 0.01, decay=0.5)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == pytest.approx({"fc": 0.01, "block": 0.001, "stem.1": 0.0005, "stem.0": 0.00025})
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for p in small.parameters()
    )
    freeze(small, "stem")
    assert [group["name"] for group in parameter_groups(small, 0.01)] == ["fc", "block"]
    every = parameter_groups(small, 0.01, only_trainable=False)
    assert sum(len(group["params"]) for group in every) == len(list(small.parameters()))
    named = parameter_groups(small, 0.01, new=["block", "fc"])
    assert {group["name"]: group["lr"] for group in named} == {"block": 0.01, "fc": 0.01}


def test_recipe_9_biases_and_norms_are_not_decayed(small: Small) -> None:
    groups = parameter_groups(small, 0.01, weight_decay=0.05)
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.05) for p in group["params"])
    optimizer = torch.optim.AdamW(groups)
    before = small.fc.weight.detach().clone()
    small(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(small.fc.weight, before)


def test_frozen_batchnorm_keeps_its_statistics_in_training(small: Small) -> None:
    norm = small.stem[1]
    freeze(small, "stem")
    assert train_mode(small) is small
    assert small.training
    small(torch.rand(4, 3, 8, 8))
    assert torch.equal(norm.running_mean, torch.zeros(4))
    unfreeze(small, "stem")
    train_mode(small)
    small(torch.rand(4, 3, 8, 8))
    assert not torch.equal(norm.running_mean, torch.zeros(4))


def test_unknown_names_come_with_near_ones(small: Small) -> None:
    for action in (freeze, unfreeze, lambda m, n: replace_layer(m, n, nn.Identity())):
        with pytest.raises(BackboneError, match="Near names: block"):
            action(small, "blocks")
    with pytest.raises(BackboneError, match="It has: stem, block, fc"):
        children(small, "zzz")
    with pytest.raises(BackboneError, match="inside itself"):
        replace_layer(small, "", nn.Identity())


def test_what_cannot_be_done_is_said(small: Small) -> None:
    headless = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(BackboneError, match="has no head"):
        replace_head(headless, 3)
    with pytest.raises(BackboneError, match="use replace_layer"):
        replace_head(small, 3, name="stem")
    with pytest.raises(BackboneError, match="no Conv2d"):
        adapt_input(nn.Sequential(nn.Linear(2, 2)), 4)
    with pytest.raises(BackboneError, match="without groups"):
        adapt_input(nn.Sequential(nn.Conv2d(4, 4, 1, groups=4)), 5)
    rescaling = skeleton("googlenet")
    rescaling.transform_input = True
    with pytest.raises(BackboneError, match=r"mean 0\.5"):
        adapt_input(rescaling, 4)
    for wrong in (lambda: replace_head(small, 0), lambda: adapt_input(small, 0),
                  lambda: adapt_input(small, 4, rule="copy"),
                  lambda: unfreeze_gradually(small, 1, every=0)):  # fmt: skip
        with pytest.raises(ValueError):
            wrong()


def test_parameters_of_no_layer_are_blocks_of_their_own() -> None:
    order = blocks(skeleton("vit_b_32"))
    assert order[0] == "heads.head"
    assert "encoder.layers.encoder_layer_11" in order
    assert order[-2:] == ["class_token", "encoder.pos_embedding"]
