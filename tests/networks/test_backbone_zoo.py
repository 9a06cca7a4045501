"""The default tap of every network that torchvision has, and of some of timm's.

The networks are built without numbers, on PyTorch's meta device.
"""

from __future__ import annotations

import pytest
import torch

from featcache.errors import TapError
from featcache.networks.backbone import Backbone, backbones
from featcache.networks.families import Torchvision
from featcache.networks.surgery import blocks, head_name, replace_head
from featcache.networks.taps import Tapped

POOL = "avgpool:output:flatten"

#: Beginning of the name, default tap, for the longest beginning that fits.
DEFAULTS = {
    "alexnet": "avgpool:output:mean",
    "convnext": POOL,
    "densenet": "classifier:input:flatten",
    "efficientnet": POOL,
    "googlenet": POOL,
    "inception": POOL,
    "maxvit": "classifier.0:output:flatten",
    "mnasnet": "classifier.1:input:flatten",
    "mobilenet_v2": "classifier.1:input:flatten",
    "mobilenet_v3": POOL,
    "regnet": POOL,
    "resnet": POOL,
    "resnext": POOL,
    "shufflenet": "fc:input:flatten",
    "squeezenet": "classifier.1:input:mean",
    "swin": POOL,
    "vgg": "avgpool:output:mean",
    "vit": "heads.head:input:flatten",
    "wide_resnet": POOL,
}
#: One network of each family, and the width of its features.
WIDTHS = {
    "alexnet": 256,
    "convnext_tiny": 768,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "googlenet": 1024,
    "inception_v3": 2048,
    "maxvit_t": 512,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 576,
    "regnet_y_400mf": 440,
    "resnet50": 2048,
    "shufflenet_v2_x1_0": 1024,
    "squeezenet1_1": 512,
    "swin_t": 768,
    "vgg11": 512,
    "vit_b_16": 768,
}
TIMM = [
    "convnext_atto",
    "efficientnet_lite0",
    "ghostnet_050",
    "hardcorenas_a",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "poolformer_s12",
    "regnetx_002",
    "resnet10t",
    "semnasnet_075",
    "swin_s3_tiny_224",
    "vgg11",
    "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
]


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_default_tap_of_one_of_each_family(name: str) -> None:
    backbone = Backbone(name, weights=None)
    assert backbone.taps == [expected(name)]
    assert backbone.shapes == {expected(name): (WIDTHS[name],)}


@pytest.mark.campaign
@pytest.mark.parametrize("name", backbones())
def test_default_tap_head_and_blocks_of_every_torchvision_network(name: str) -> None:
    backbone = Backbone(name, weights=None)
    assert backbone.taps == [expected(name)]
    network = Torchvision(name, None).skeleton()
    assert network is not None
    names = blocks(network)
    own = dict(network.named_parameters())
    assert all(any(p == n or p.startswith(f"{n}.") for n in names) for p in own)
    assert head_name(network) in names
    replace_head(network.eval(), 21)
    example = torch.zeros((2, *backbone.preprocessing.output_shape), device="meta")
    assert network(example).shape == (2, 21)


@pytest.mark.campaign
@pytest.mark.parametrize("name", TIMM)
def test_default_tap_of_timms_networks_is_what_timm_calls_pre_logits(name: str) -> None:
    pytest.importorskip("timm")
    backbone = Backbone(f"timm/{name}", weights=None)
    torch.manual_seed(0)
    batch = torch.rand((2, *backbone.preprocessing.output_shape))
    network = backbone.module
    with torch.inference_mode():
        (ours,) = Tapped(network, backbone.points)(batch).values()
        timms = network.forward_head(network.forward_features(batch), pre_logits=True)
    torch.testing.assert_close(ours, timms.flatten(1), rtol=1e-5, atol=1e-5)


def test_timm_network_with_two_heads_asks_for_a_layer() -> None:
    pytest.importorskip("timm")
    backbone = Backbone("timm/deit_tiny_distilled_patch16_224", weights=None)
    with pytest.raises(TapError, match="several heads"):
        _ = backbone.taps
    named = Backbone("timm/deit_tiny_distilled_patch16_224", weights=None, layers=["norm"])
    assert named.shapes == {"norm:output:cls": (192,)}


def expected(name: str) -> str:
    fitting = [beginning for beginning in DEFAULTS if name.startswith(beginning)]
    return DEFAULTS[max(fitting, key=len)]
