from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from featcache.errors import BackboneError, TapError
from featcache.networks.taps import ResolvedTap, Tap, Tapped
from featcache.networks.taps import resolve as resolve_traced
from featcache.networks.tracing import trace


def resolve(module: nn.Module, texts: list[str] | None, example: Tensor) -> list[ResolvedTap]:
    return resolve_traced(trace(module, example), texts)


def default_tap(module: nn.Module, example: Tensor) -> Tap:
    return resolve(module, None, example)[0].tap


class Toy(nn.Module):
    """A small convolutional network with the traps of large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.idle = nn.Linear(2, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        return self.fc(self.pool(x).flatten(1))


class Tokens(nn.Module):
    """A transformer in outline: patches, class token, blocks, head."""

    def __init__(self, class_token: bool = True, registers: int = 0) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.embed = nn.Flatten(2)
        self.swap = Swap()
        if class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        if registers:
            self.reg_token = nn.Parameter(torch.randn(1, registers, 8))
        self.block = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.swap(self.embed(self.patch(x)))
        front = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in front), x], 1)
        x = self.block(x)
        x = x + self.attention(x, x, x)[0]
        x = self.norm(x)
        return self.head(x[:, 0] if front else x.mean(1))


class Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class ChannelsLast(nn.Module):
    """Like Swin: maps are (n, h, w, c) inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.act = nn.GELU()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1))
        x = self.act(x)
        return self.conv(x.permute(0, 3, 1, 2))


@pytest.fixture
def toy() -> nn.Module:
    torch.manual_seed(0)
    return Toy().eval()


@pytest.fixture
def batch() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("avgpool", Tap("avgpool")),
        ("avgpool:input", Tap("avgpool", side="input")),
        ("layer4:mean", Tap("layer4", reduce="mean")),
        ("a.b#3:input:max", Tap("a.b", 3, "input", "max")),
        ("odd:name.x:output", Tap("odd:name.x", side="output")),
        ("odd:mean:map", Tap("odd:mean", reduce="map")),
        ("mean", Tap("mean")),
        (":output", Tap("", side="output")),
        ("x#y", Tap("x#y")),
        ("block#2#3", Tap("block#2", 3)),
    ],
)
def test_text_is_parsed_from_the_right_and_written_back(text: str, tap: Tap) -> None:
    assert Tap.parse(text) == tap
    assert Tap.parse(str(tap)) == tap


@pytest.mark.parametrize(("text", "hint"), [("", "LAYER"), (":mean", "LAYER"), ("a#0", "from 1")])
def test_malformed_text_is_refused(text: str, hint: str) -> None:
    with pytest.raises(TapError, match=hint):
        Tap.parse(text)


def test_two_spellings_of_a_tap_are_one(toy: nn.Module, batch: Tensor) -> None:
    texts = ["pool", "pool:output", "pool:mean", "pool:output:flatten", "pool#1", "pool:max"]
    (only,) = resolve(toy, texts, batch)
    assert str(only) == "pool:output:flatten"
    assert only.shape == (6,)


def test_reductions_of_a_map(toy: nn.Module, batch: Tensor) -> None:
    how = ["mean", "max", "flatten", "map"]
    taps = resolve(toy, [f"conv2:{h}" for h in how], batch)
    features = Tapped(toy, taps)(batch)
    x = toy.conv2(toy.conv1(batch).relu())
    expected = [x.mean((2, 3)), x.amax((2, 3)), x.flatten(1), x]
    for tap, value in zip(taps, expected, strict=True):
        assert tap.shape == value.shape[1:]
        torch.testing.assert_close(features[str(tap)], value)


def test_what_later_in_place_layers_write_does_not_reach_the_features(
    toy: nn.Module, batch: Tensor
) -> None:
    taps = resolve(toy, ["conv1:map", "conv1:flatten", "relu#1:input:map", "fc"], batch)
    features = Tapped(toy, taps)(batch)
    before_relu = toy.conv1(batch)
    assert (before_relu < 0).any()
    torch.testing.assert_close(features["conv1:output:map"], before_relu)
    torch.testing.assert_close(features["conv1:output:flatten"], before_relu.flatten(1))
    torch.testing.assert_close(features["relu#1:input:map"], before_relu)


def test_a_module_that_runs_twice_must_be_numbered(toy: nn.Module, batch: Tensor) -> None:
    with pytest.raises(TapError, match=r"runs 2 times.*relu#1 \(3, 4, 8, 8\).*relu#2 \(3, 6, 8, 8"):
        resolve(toy, ["relu"], batch)
    (tap,) = resolve(toy, ["relu#2:map"], batch)
    assert str(tap) == "relu#2:output:map"
    value = Tapped(toy, [tap])(batch)["relu#2:output:map"]
    torch.testing.assert_close(value, toy.conv2(toy.conv1(batch).relu()).relu())
    with pytest.raises(TapError, match="no run 3"):
        resolve(toy, ["relu#3"], batch)


def test_layers_that_never_run_or_are_unknown_are_refused(toy: nn.Module, batch: Tensor) -> None:
    with pytest.raises(TapError, match="never runs"):
        resolve(toy, ["idle"], batch)
    with pytest.raises(TapError, match="Near names: conv2, conv1"):
        resolve(toy, ["conv3"], batch)
    with pytest.raises(TapError, match=r"conv2 is there; 'foo' is not what may follow: .*:mean"):
        resolve(toy, ["conv2:foo"], batch)
    nested = nn.Sequential(toy)
    with pytest.raises(TapError, match=r"0\.fc"):
        resolve(nested, ["fc"], batch)


def test_reductions_that_do_not_fit_are_refused(toy: nn.Module, batch: Tensor) -> None:
    with pytest.raises(TapError, match="vector of 5 numbers"):
        resolve(toy, ["fc:mean"], batch)
    with pytest.raises(TapError, match="not tokens"):
        resolve(toy, ["conv1:cls"], batch)


class Odd(nn.Module):
    """Gives tuples, dicts, and rows that are not images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.pair = Pair()
        self.windows = Windows()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, _ = self.pair(self.conv(x))
        self.windows(a)
        return {"out": self.fc(a.mean((2, 3)))}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


class Windows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 4, 4)


def test_tuples_dicts_and_foreign_rows_are_refused_with_a_hint(batch: Tensor) -> None:
    odd = Odd().eval()
    with pytest.raises(TapError, match=r"a tuple of 2, not a tensor.*pair\.inner"):
        resolve(odd, ["pair"], batch)
    with pytest.raises(TapError, match="a dict with the keys out"):
        resolve(odd, [":output"], batch)
    with pytest.raises(TapError, match=r"first axis is not the images.*fc"):
        resolve(odd, ["windows"], batch)


def test_tokens_give_the_class_token_or_their_mean(batch: Tensor) -> None:
    net = Tokens().eval()
    taps = resolve(net, ["block", "block:patches", "block:mean", "block:max", "block:map"], batch)
    assert str(taps[0]) == "block:output:cls"
    features = Tapped(net, taps)(batch)
    x = features["block:output:map"]
    assert x.shape == (3, 5, 8)
    torch.testing.assert_close(features["block:output:cls"], x[:, 0])
    torch.testing.assert_close(features["block:output:patches"], x[:, 1:].mean(1))
    torch.testing.assert_close(features["block:output:mean"], x.mean(1))
    torch.testing.assert_close(features["block:output:max"], x.amax(1))


def test_register_tokens_are_no_patches(batch: Tensor) -> None:
    net = Tokens(registers=3).eval()
    taps = resolve(net, ["block:patches", "block:map"], batch)
    features = Tapped(net, taps)(batch)
    x = features["block:output:map"]
    assert x.shape == (3, 8, 8)
    torch.testing.assert_close(features["block:output:patches"], x[:, 4:].mean(1))


def test_without_a_class_token_tokens_are_averaged(batch: Tensor) -> None:
    net = Tokens(class_token=False).eval()
    (tap,) = resolve(net, ["block", "block:patches", "block:mean"], batch)
    assert str(tap) == "block:output:mean"
    with pytest.raises(TapError, match="hold no class token"):
        resolve(net, ["block:cls"], batch)


def test_before_the_class_token_is_put_in_front_there_is_none(batch: Tensor) -> None:
    (tap,) = resolve(Tokens().eval(), ["swap"], batch)
    assert str(tap) == "swap:output:mean"


def test_attention_that_gives_a_tuple_is_refused(batch: Tensor) -> None:
    with pytest.raises(TapError, match=r"tuple of 2.*norm"):
        resolve(Tokens().eval(), ["attention"], batch)


def test_channels_are_found_where_the_shape_does_not_tell() -> None:
    net = ChannelsLast().eval()
    x = torch.rand(2, 3, 8, 8)  # maps of 8 channels by 8 by 8
    taps = resolve(net, ["stem", "norm", "act", "act:input", "conv", "norm:map"], x)
    features = Tapped(net, taps)(x)
    inner = net.norm(net.stem(x).permute(0, 2, 3, 1))
    torch.testing.assert_close(features["norm:output:mean"], inner.mean((1, 2)))
    torch.testing.assert_close(features["act:input:mean"], inner.mean((1, 2)))
    torch.testing.assert_close(features["act:output:mean"], net.act(inner).mean((1, 2)))
    torch.testing.assert_close(features["stem:output:mean"], net.stem(x).mean((2, 3)))
    torch.testing.assert_close(features["norm:output:map"], inner)


def test_maps_whose_channels_cannot_be_told_ask_for_flatten_or_map() -> None:
    class Reshaped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).reshape(len(x), 4, 4, 4)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Reshaped())
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(TapError, match="1:output:flatten or 1:output:map"):
        resolve(net, ["1"], x)
    (tap,) = resolve(net, ["1:flatten"], x)
    assert tap.shape == (64,)


def test_the_network_stops_after_the_last_tap(toy: nn.Module, batch: Tensor) -> None:
    ran: list[str] = []
    toy.fc.register_forward_hook(lambda *_: ran.append("fc"))
    taps = resolve(toy, ["pool", "conv1:mean"], batch)
    ran.clear()
    features = Tapped(toy, taps)(batch)
    assert not ran
    assert list(features) == ["pool:output:flatten", "conv1:output:mean"]


def test_hooks_are_removed_even_after_an_error(toy: nn.Module, batch: Tensor) -> None:
    tapped = Tapped(toy, resolve(toy, ["pool", "fc:input"], batch))
    with pytest.raises(RuntimeError), tapped:
        tapped(torch.rand(2, 7, 8, 8))
    assert not _hooks(toy)
    with pytest.raises(BackboneError):
        trace(toy, torch.rand(2, 7, 8, 8))
    assert not _hooks(toy)
    tapped(batch)
    assert not _hooks(toy)
    with tapped:
        first = tapped(batch)
        second = tapped(batch)
    assert not _hooks(toy)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def _hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_a_layer_under_two_names_can_go_by_either(batch: Tensor) -> None:
    shared = nn.Conv2d(3, 3, 1)
    net = nn.Sequential()
    net.add_module("a", shared)
    net.add_module("b", shared)
    (tap,) = resolve(net, ["b#2:map"], batch)
    assert str(tap) == "a#2:output:map"
    value = Tapped(net, [tap])(batch)["a#2:output:map"]
    torch.testing.assert_close(value, shared(shared(batch)))


def test_a_tap_that_is_not_reached_is_an_error(batch: Tensor) -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if len(x) == 3 else x

    net = Moody().eval()
    tapped = Tapped(net, resolve(net, ["conv"], batch))
    with pytest.raises(TapError, match="conv:output:mean"):
        tapped(batch[:2])


def test_a_layer_called_with_keywords_can_be_tapped_at_its_input(batch: Tensor) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    net = Keywords().eval()
    tapped = Tapped(net, resolve(net, ["conv:input:map"], batch))
    torch.testing.assert_close(tapped(batch)["conv:input:map"], batch)


def test_means_of_half_precision_are_taken_in_float32(toy: nn.Module, batch: Tensor) -> None:
    taps = resolve(toy, ["conv1:mean"], batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert toy.conv1(batch).dtype == torch.bfloat16
        assert Tapped(toy, taps)(batch)["conv1:output:mean"].dtype == torch.float32


def test_compiled_capture_is_one_graph_and_stops_at_the_tap(toy: nn.Module, batch: Tensor) -> None:
    taps = resolve(toy, ["conv1:map", "relu#2", "pool:input"], batch)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.inference_mode(), Tapped(toy, taps) as tapped:
        expected = tapped(batch)
        compiled = torch.compile(tapped.capture, backend=backend, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(batch), expected)
    (graph,) = graphs
    calls = [str(node.target) for node in graph.graph.nodes]
    assert not any("linear" in call for call in calls)
    torch._dynamo.reset()


def test_default_is_the_last_pool_between_last_convolution_and_head(
    toy: nn.Module, batch: Tensor
) -> None:
    assert str(default_tap(toy, batch)) == "pool:output:flatten"


def test_default_without_such_a_pool_is_the_input_of_the_head(batch: Tensor) -> None:
    stem_pool = nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 2),
        nn.Softmax(1),
    )
    assert str(default_tap(stem_pool, batch)) == "4:input:flatten"
    squeeze = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert str(default_tap(squeeze, batch)) == "1:input:mean"


def test_default_of_a_network_without_a_head_is_its_output(batch: Tensor) -> None:
    headless = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    assert str(default_tap(headless, batch)) == ":output:flatten"
    features = Tapped(headless, resolve(headless, None, batch))(batch)
    torch.testing.assert_close(features[":output:flatten"], headless(batch))


def test_default_needs_one_classifier(toy: nn.Module, batch: Tensor) -> None:
    toy.get_classifier = lambda: toy.fc
    assert str(default_tap(toy, batch)) == "fc:input:flatten"
    toy.get_classifier = lambda: (toy.fc, toy.idle)
    with pytest.raises(TapError, match=r"several heads.*tuple of 2"):
        default_tap(toy, batch)
    with pytest.raises(TapError, match="no convolution and no Linear"):
        default_tap(nn.Sequential(nn.ReLU()), batch)


def test_costs_and_shapes_need_no_numbers() -> None:
    with torch.device("meta"):
        net = Toy().eval()
    calls = trace(net, torch.zeros(1, 3, 8, 8), flops=True).calls
    flops = {(call.layer, call.number): call.flops for call in calls}
    assert flops["conv1", 1] == 2 * 4 * 3 * 9 * 64
    assert flops["fc", 1] == 2 * 6 * 5
    assert flops["", 1] == flops["conv1", 1] + flops["conv2", 1] + flops["fc", 1]


def test_an_image_that_does_not_fit_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 2))
    with pytest.raises(BackboneError, match="3 x 9 x 9"):
        trace(net, torch.zeros(1, 3, 9, 9))
