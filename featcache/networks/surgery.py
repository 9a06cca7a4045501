"""Changing networks: freeze and unfreeze, replace the head, adapt the input, load in part.

Plain functions on any `torch.nn.Module`; they change the module that they are given. Layers and
parameters go by the names that `named_modules` and `named_parameters` give them.

Examples
--------
Fine-tune the last stage of a ResNet for 21 classes, with a tenth of the learning rate for what is
pretrained, and half of that for each block further down:

>>> import torchvision
>>> network = torchvision.models.resnet18()  # weights="IMAGENET1K_V1"
>>> replace_head(network, 21)
Linear(in_features=512, out_features=21, bias=True)
>>> freeze(network)
>>> unfreeze(network, "layer4", "fc")
>>> groups = parameter_groups(network, lr=1e-3, decay=0.5)
>>> [(group["name"], group["lr"]) for group in groups]
[('fc', 0.001), ('layer4', 0.0001)]
>>> optimizer = torch.optim.AdamW(groups)
>>> _ = train_mode(network)  # before each epoch; frozen BatchNorm layers stay as they are
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featcache.errors import BackboneError
from featcache.networks import checkpoints

__all__ = [
    "adapt_input",
    "blocks",
    "children",
    "freeze",
    "frozen",
    "head_name",
    "load_partial",
    "parameter_groups",
    "remove_head",
    "replace_head",
    "replace_layer",
    "train_mode",
    "trainable_parameters",
    "unfreeze",
    "unfreeze_gradually",
]

_ENOUGH_BLOCKS = 6
_NORMALISATION = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def freeze(module: nn.Module, *names: str) -> None:
    """Stop parameters from being trained.

    BatchNorm layers update their statistics in training mode all the same; use `train_mode`, which
    leaves frozen ones alone.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    *names : str
        Layers (with everything in them) or parameters; none means all.

    Raises
    ------
    BackboneError
        If there is no layer or parameter of that name.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> freeze(network)
    >>> unfreeze(network, "1.bias")
    >>> [tuple(parameter.shape) for parameter in trainable_parameters(network)]
    [(2,)]
    """
    for parameter in _parameters(module, names):
        parameter.requires_grad_(False)


def unfreeze(module: nn.Module, *names: str) -> None:
    """Allow parameters to be trained; see `freeze`."""
    for parameter in _parameters(module, names):
        parameter.requires_grad_(True)


@contextmanager
def frozen(module: nn.Module, *names: str) -> Iterator[nn.Module]:
    """Freeze parameters for the time of a ``with`` block; restore each of them afterwards.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    *names : str
        Layers or parameters; none means all.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> with frozen(network, "0"):
    ...     len(trainable_parameters(network))
    2
    >>> len(trainable_parameters(network))
    4
    """
    before = [(p, p.requires_grad) for p in _parameters(module, names)]
    freeze(module, *names)
    try:
        yield module
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient: what an optimiser should be given."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def train_mode(module: nn.Module) -> nn.Module:
    """Switch to training mode, except for BatchNorm layers without anything to train.

    In training mode a frozen BatchNorm layer would go on to follow the new images with its
    statistics, and what is frozen would not stay as it is.

    Parameters
    ----------
    module : torch.nn.Module
        The network.

    Returns
    -------
    torch.nn.Module
        The network that was given.
    """
    module.train()
    for part in module.modules():
        norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if norm and not trainable_parameters(part):
            part.eval()
    return module


def parameter_groups(
    module: nn.Module,
    lr: float,
    *,
    new: Sequence[str] | None = None,
    factor: float = 0.1,
    decay: float = 1.0,
    weight_decay: float | None = None,
    only_trainable: bool = True,
) -> list[dict[str, Any]]:
    """Group parameters for an optimiser, with smaller learning rates for pretrained layers.

    New layers get `lr`. The pretrained blocks below get ``lr * factor * decay ** k``, where k
    counts blocks from the top down, from 0 (Howard and Ruder 2018,
    https://arxiv.org/abs/1801.06146, use decay = 1 / 2.6).

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    lr : float
        Learning rate of the new layers.
    new : sequence of str, optional
        Names of the new layers; left out, the head.
    factor : float
        Learning rate of the topmost pretrained block, relative to `lr`.
    decay : float
        Ratio of learning rates from one block to the next below.
    weight_decay : float, optional
        Weight decay of weights; biases and the parameters of normalisation layers (all those with
        one axis) get none. Left out, the optimiser's own for all.
    only_trainable : bool
        Leave out what is frozen. With False it can be unfrozen later without a new optimiser.

    Returns
    -------
    list of dict
        With the keys "name", "params", "lr" and, where asked for, "weight_decay"; new layers first,
        then from the top down. Every parameter is in one group.
    """
    new = [head_name(module)] if new is None else list(new)
    taken: set[int] = set()
    groups = []
    rates = [(name, lr) for name in new]
    below = [name for name in blocks(module) if name not in new]
    rates += [(name, lr * factor * decay**k) for k, name in enumerate(below)]
    for name, rate in rates:
        parameters = [p for p in _parameters(module, [name]) if id(p) not in taken]
        taken.update(map(id, parameters))
        parameters = [p for p in parameters if p.requires_grad or not only_trainable]
        groups += _split_decay(name, parameters, rate, weight_decay)
    return groups


def _split_decay(
    name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float | None
) -> list[dict[str, Any]]:
    if weight_decay is None:
        groups = [{"name": name, "params": parameters, "lr": lr}]
    else:
        weights = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [
            {"name": name, "params": weights, "lr": lr, "weight_decay": weight_decay},
            {"name": f"{name} (no decay)", "params": others, "lr": lr, "weight_decay": 0.0},
        ]
    return [group for group in groups if group["params"]]


def children(module: nn.Module, name: str = "") -> list[str]:
    """Return the full names of the direct parts of a layer, in their order.

    Examples
    --------
    >>> children(nn.Sequential(nn.Sequential(nn.Linear(1, 2), nn.ReLU()), nn.Linear(2, 3)), "0")
    ['0.0', '0.1']
    """
    prefix = f"{name}." if name else ""
    return [f"{prefix}{child}" for child, _ in _layer(module, name).named_children()]


def blocks(module: nn.Module) -> list[str]:
    """Return the blocks of a network from the top down: the order in which to unfreeze.

    A block is a layer with parameters. Containers are opened, all of one level at a time, until
    there are at least six blocks: a ResNet's are its stages, a DenseNet's the modules of its
    ``features``, a transformer's its encoder blocks. Parameters that belong to no block (class
    token, position embedding) come last, by their own names.

    Parameters
    ----------
    module : torch.nn.Module
        The network.

    Returns
    -------
    list of str
        Every parameter lies in exactly one of them.
    """
    names = _with_parameters(module, [""])
    loose: list[str] = []
    while len(names) < _ENOUGH_BLOCKS:
        opened = [part for name in names for part in (children(module, name) or [name])]
        opened = _with_parameters(module, opened)
        loose += [own for name in names if name not in opened for own in _own(module, name)]
        if opened == names:
            break
        names = opened
    return [*reversed(names), *loose]


def _with_parameters(module: nn.Module, names: Iterable[str]) -> list[str]:
    return [name for name in names if any(True for _ in _layer(module, name).parameters())]


def _own(module: nn.Module, name: str) -> list[str]:
    """Name the parameters that belong to a layer itself and to none of its parts."""
    prefix = f"{name}." if name else ""
    return [f"{prefix}{own}" for own, _ in _layer(module, name).named_parameters(recurse=False)]


def unfreeze_gradually(
    module: nn.Module, epoch: int, *, every: int = 1, order: Sequence[str] | None = None
) -> list[str]:
    """Freeze all but the topmost blocks: one at first, one more every few epochs.

    What it does depends on `epoch` alone, so a resumed training needs no memory of it.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    epoch : int
        From 0.
    every : int
        Epochs from one step to the next.
    order : sequence of str, optional
        Layers in the order of unfreezing; left out, `blocks`. Layers that are not in it stay
        frozen.

    Returns
    -------
    list of str
        The layers that are now trained.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    >>> for epoch in range(4):
    ...     print(epoch, unfreeze_gradually(network, epoch, every=2))
    0 ['2']
    1 ['2']
    2 ['2', '1']
    3 ['2', '1']
    """
    if every < 1:
        raise ValueError(f"every counts epochs, from 1; got {every}")
    names = list(blocks(module) if order is None else order)[: 1 + epoch // every]
    freeze(module)
    unfreeze(module, *names)
    return names


def head_name(module: nn.Module) -> str:
    """Return the name of the layer that gives the classes.

    It is what the network's own ``get_classifier`` says (timm), else the last `Linear` or `Conv2d`
    in the order of registration.

    Raises
    ------
    BackboneError
        If the network has several heads, or none: a normalisation layer comes after the last
        `Linear` or `Conv2d`.
    """
    if callable(getattr(module, "get_classifier", None)):
        classifier = module.get_classifier()  # type: ignore[operator]
        named = [str(name) for name, part in module.named_modules() if part is classifier]
        if len(named) != 1 or isinstance(classifier, nn.Identity):
            raise BackboneError(
                f"{type(module).__name__} has no head or several. Name the layer: name='...'"
            )
        return named[0]
    order: list[tuple[str, nn.Module]] = list(module.named_modules())
    heads = [i for i, (_, part) in enumerate(order) if isinstance(part, (nn.Linear, nn.Conv2d))]
    if not heads or any(isinstance(part, _NORMALISATION) for _, part in order[heads[-1] + 1 :]):
        raise BackboneError(
            f"{type(module).__name__} has no head: its last Linear or Conv2d is followed by a "
            "normalisation layer, or there is none. Name the layer: name='...'"
        )
    return order[heads[-1]][0]


def replace_head(module: nn.Module, classes: int, *, name: str | None = None) -> nn.Module:
    """Replace the layer that gives the classes, whatever its name.

    Works for AlexNet, VGG, ResNet, SqueezeNet (whose last layer is a convolution), DenseNet,
    MobileNet, ViT, Swin, ConvNeXt and timm's networks. Auxiliary heads (GoogLeNet, Inception) are
    replaced as well.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    classes : int
        Number of classes.
    name : str, optional
        Name of the layer. Left out: `head_name`.

    Returns
    -------
    torch.nn.Module
        The new layer: of the old one's kind, on its device, with PyTorch's initial weights, and
        trainable.

    Raises
    ------
    BackboneError
        If the head cannot be found, or is neither `Linear` nor `Conv2d`.

    Examples
    --------
    >>> import torchvision
    >>> replace_head(torchvision.models.squeezenet1_1(), 21)
    Conv2d(512, 21, kernel_size=(1, 1), stride=(1, 1))
    """
    if classes < 1:
        raise ValueError(f"a head needs at least one class, got {classes}; see remove_head")
    name = head_name(module) if name is None else name
    old = _layer(module, name)
    if not isinstance(old, nn.Linear | nn.Conv2d):
        raise BackboneError(
            f"The layer {name!r} is a {type(old).__name__}. Only a Linear or a Conv2d can be made "
            "anew for another number of classes; use replace_layer"
        )
    outputs = len(old.weight)
    twins = [
        other
        for other, part in module.named_modules()
        if other.lower().startswith("aux")
        and isinstance(part, nn.Linear)
        and part.out_features == outputs
    ]
    for each in [name, *twins]:
        replace_layer(module, each, _like(_layer(module, each), classes))
    for part in module.modules():
        if getattr(part, "num_classes", None) == outputs:
            part.num_classes = classes  # type: ignore[assignment]
    return _layer(module, name)


def remove_head(module: nn.Module, *, name: str | None = None) -> str:
    """Replace the layer that gives the classes by nothing (`Identity`).

    Parameters
    ----------
    module : torch.nn.Module
        The network; it then returns what its head was given.
    name : str, optional
        Name of the layer. Left out: `head_name`.

    Returns
    -------
    str
        The name of the layer.
    """
    name = head_name(module) if name is None else name
    replace_layer(module, name, nn.Identity())
    return name


def replace_layer(module: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Replace a layer by another one.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    name : str
        Name of the layer; parts of a `Sequential` go by their number: ``"classifier.6"``.
    new : torch.nn.Module
        Layer to put there.

    Returns
    -------
    torch.nn.Module
        The old layer.

    Examples
    --------
    >>> network = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    >>> replace_layer(network, "1.1", nn.Linear(3, 10))
    Linear(in_features=3, out_features=2, bias=True)
    """
    old = _layer(module, name)
    if not name:
        raise BackboneError("The whole network cannot be replaced inside itself. Name a layer")
    module.set_submodule(name, new)
    return old


def _like(layer: Any, classes: int) -> nn.Module:
    """Return a new layer of the old one's kind for another number of classes."""
    options: dict[str, Any] = {"bias": layer.bias is not None}
    options |= {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, classes, **options)
    same = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    options |= {name: getattr(layer, name) for name in same}
    return nn.Conv2d(layer.in_channels, classes, **options)


def adapt_input(
    module: nn.Module,
    channels: int,
    *,
    rule: Literal["keep", "tile", "zero"] = "keep",
    name: str | None = None,
) -> nn.Conv2d:
    """Make the first convolution take images with another number of channels.

    With the pretrained filters W_0 ... W_{m-1} for m channels (red, green, blue), the new ones for
    C channels are:

    - C = 1, any rule: the sum of all W_j. A grey image then gives what it gave as an RGB image with
      three equal channels.
    - 1 < C < m: (m / C) W_j.
    - C > m: W_j for the first m channels, unchanged, if `rule` is "keep" or "zero"; the channels
      that are new get the mean of the W_j ("keep"), or zeros ("zero": the network's outputs do not
      change until it is trained). With "tile" they are (m / C) W_{j mod m} for all channels, which
      keeps the size of the response; for many channels and a frozen network this is the rule to
      take.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    channels : int
        C.
    rule : {"keep", "tile", "zero"}
        See above.
    name : str, optional
        Name of the convolution. Left out: the first one registered.

    Returns
    -------
    torch.nn.Conv2d
        The convolution, changed in place.

    Raises
    ------
    BackboneError
        If there is no such convolution, it has groups, or the network rescales three channels
        itself.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> adapt_input(network, 4)
    Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    if channels < 1:
        raise ValueError(f"an image has at least one channel, got {channels}")
    if rule not in ("keep", "tile", "zero"):
        raise ValueError(f"rule is one of keep, tile, zero, not {rule!r}")
    if getattr(module, "transform_input", False):
        raise BackboneError(
            "This network rescales three channels itself. Set its transform_input to False, and "
            "normalise images with mean 0.5 and std 0.5, which is the same"
        )
    layer = _first_convolution(module, name)
    weight = _adapted(layer.weight.detach(), channels, rule).contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    layer.in_channels = channels
    return layer


def _first_convolution(module: nn.Module, name: str | None) -> nn.Conv2d:
    if name is None:
        convolutions = [n for n, part in module.named_modules() if isinstance(part, nn.Conv2d)]
        if not convolutions:
            raise BackboneError(f"{type(module).__name__} has no Conv2d to adapt")
        name = convolutions[0]
    layer = _layer(module, name)
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        raise BackboneError(f"The layer {name!r} is no Conv2d without groups, but: {layer}")
    return layer


def _adapted(weight: Tensor, channels: int, rule: str) -> Tensor:
    old = weight.shape[1]  # weight: (filters, old channels, height, width)
    if channels == 1:
        return weight.sum(1, keepdim=True)
    if channels < old or rule == "tile":
        tiled = weight[:, [j % old for j in range(channels)]]
        return tiled * (old / channels)
    extra = weight.mean(1, keepdim=True) if rule == "keep" else torch.zeros_like(weight[:, :1])
    return torch.cat([weight, extra.expand(-1, channels - old, -1, -1)], 1)


def load_partial(
    module: nn.Module, checkpoint: Mapping[str, Tensor] | str | Path
) -> checkpoints.PartialReport:
    """Load what fits of a checkpoint, by name and shape, and report what was left out.

    Parameters
    ----------
    module : torch.nn.Module
        The network; what the checkpoint does not have keeps its values.
    checkpoint : mapping of str to torch.Tensor, str or Path
        A ``state_dict``, or a file (``.pth``, ``.safetensors``) that holds one.

    Returns
    -------
    PartialReport
        Its text lists what is missing, unexpected and wrongly shaped.

    Raises
    ------
    WeightsError
        If the file cannot be read.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> state = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).state_dict()
    >>> print(load_partial(network, state))
    2 of 4 parameters loaded
    wrongly shaped: 1.weight (5, 3) instead of (2, 3), 1.bias (5,) instead of (2,)
    """
    if isinstance(checkpoint, (str, Path)):
        checkpoint = checkpoints.read_checkpoint(checkpoint)
    fitting, report = checkpoints.match(module, checkpoint)
    module.load_state_dict(fitting, strict=False)
    return report


def _layer(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise BackboneError(_no_such(module, name)) from None


def _parameters(module: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    own = dict(module.named_parameters(remove_duplicate=False))
    layers = dict(module.named_modules(remove_duplicate=False))
    found: list[nn.Parameter] = []
    for name in names or [""]:
        if name not in layers and name not in own:
            raise BackboneError(_no_such(module, name))
        found += layers[name].parameters() if name in layers else [own[name]]
    return found


def _no_such(module: nn.Module, name: str) -> str:
    names = [known for known, _ in module.named_modules() if known]
    names += [known for known, _ in module.named_parameters()]
    near = difflib.get_close_matches(name, names, n=4)
    hint = f"Near names: {', '.join(near)}" if near else f"It has: {', '.join(children(module))}"
    return f"{type(module).__name__} has no layer or parameter {name!r}. {hint}"
