"""What decides the value of a feature, written down so that it can be compared.

Two features are comparable when the same network, with the same weights, read the same taps of
images prepared in the same way. `Fingerprint` holds exactly that; a store keeps it, and training,
evaluation and prediction refuse features whose fingerprint differs and print the difference field
by field. What does not change a value (workers, device, batch size) is not in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

from featcache.errors import CorruptStore, FormatVersionError, TapError
from featcache.system.tables import first_names

__all__ = ["FORMAT_VERSION", "Fingerprint", "Tap", "canonical_json", "differences", "state_sha256"]

Side = Literal["input", "output"]
SIDES: tuple[str, ...] = ("input", "output")
REDUCTIONS: tuple[str, ...] = ("mean", "max", "flatten", "map", "cls", "patches")
GRAMMAR = "LAYER[#K][:input|:output][:mean|:max|:flatten|:map|:cls|:patches]"

#: Version of the feature file's format. Another version is refused, never guessed at.
FORMAT_VERSION = 4

# Types of a fingerprint's fields in JSON that are not str.
_FIELD_TYPES: dict[str, Any] = {
    "taps": list | tuple,
    "preprocessing": dict,
    "augmentation": dict | None,
    "checkpoint": dict | None,
    "untrained": str | None,
    "varying": bool,
    "format_version": int,
}


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys and no spaces: equal values give equal text.

    Raises
    ------
    TypeError, ValueError
        For what JSON cannot hold, NaN and infinities included.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


class Record:
    """A frozen dataclass whose fields are JSON values, to and from a dictionary."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `to_dict` gave.

        Raises
        ------
        ValueError
            If a field is unknown or a value is impossible.
        """
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            name = cls.__name__.lower()
            article = "an" if name[0] in "aeiou" else "a"
            raise ValueError(f"unknown fields of {article} {name}: {', '.join(unknown)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True, eq=True)
class Fingerprint(Record):
    """Everything that decides the value of a feature.

    Parameters
    ----------
    source : {"torchvision", "timm", "callable", "module"}
        Family of the network.
    backbone : str
        Name of the network in its family.
    weights : str
        Published name (``"IMAGENET1K_V2"``, never ``"DEFAULT"``), file name, or ``"none"``. It is
        shown, and not compared: `state_sha256` tells the weights.
    state_sha256 : str
        `state_sha256` of the network as loaded.
    taps : tuple of str
        Canonical taps, in the order of the columns.
    preprocessing : dict
        ``Preprocessing.to_dict()``.
    precision : {"float32", "bfloat16", "float16"}
        Type of the forward pass.
    store_dtype : {"float32", "float16"}
        Type of the stored features.
    augmentation : dict, optional
        ``Augmentation.to_dict()`` where augmented views are stored.
    checkpoint : dict, optional
        What of a weights file was loaded; shown, and not compared.
    untrained : str, optional
        Why the network counts as untrained, in a sentence; shown, and not compared.
    varying : bool
        Whether features were accepted that are no function of the image alone.
    format_version : int
        Version of the feature file's format.
    """

    source: str
    backbone: str
    weights: str = field(compare=False)
    state_sha256: str
    taps: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    precision: str = "float32"
    store_dtype: str = "float32"
    augmentation: Mapping[str, Any] | None = None
    checkpoint: Mapping[str, Any] | None = field(default=None, compare=False)
    untrained: str | None = field(default=None, compare=False)
    varying: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        # Tuples inside dictionaries become lists now, not at the first round trip through a file.
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Mapping):
                object.__setattr__(self, each.name, json.loads(canonical_json(dict(value))))
            elif isinstance(value, list | tuple):
                object.__setattr__(self, each.name, tuple(value))

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return the fingerprint that `to_dict` gave.

        Raises
        ------
        FormatVersionError
            It was written by another version of the file format.
        CorruptStore
            These are not the fields of a fingerprint.
        """
        if not isinstance(values, dict):
            raise CorruptStore(f"The fingerprint is not a JSON object: {values!r:.60}")
        if values.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise FormatVersionError(
                f"It was written in format version {values['format_version']}; this featcache "
                f"reads version {FORMAT_VERSION}."
            )
        odd = values.keys() ^ {each.name for each in dataclasses.fields(cls)}
        if odd:
            raise CorruptStore(
                f"The fingerprint has missing or unknown fields: {', '.join(sorted(odd))}"
            )
        kinds = {name: _FIELD_TYPES.get(name, str) for name in values}
        wrong = [name for name, kind in kinds.items() if not isinstance(values[name], kind)]
        if not wrong:
            dtypes, views = ("float32", "float16"), (values["augmentation"] or {}).get("views", 1)
            right = {
                "taps": values["taps"] and all(isinstance(tap, str) for tap in values["taps"]),
                "store_dtype": values["store_dtype"] in dtypes,
                "augmentation": isinstance(views, int) and views > 0,
            }
            wrong = [name for name, fits in right.items() if not fits]
        if wrong:
            raise CorruptStore(f"The fingerprint's {wrong[0]} cannot be {values[wrong[0]]!r:.60}")
        return cls(**values)

    def to_json(self) -> str:
        """Return the canonical JSON text, which `from_json` reads."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the fingerprint that `to_json` wrote; errors as for `from_dict`."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise CorruptStore(f"The fingerprint is not JSON: {error}") from error
        return cls.from_dict(values)

    @property
    def compared(self) -> dict[str, Any]:
        """The fields that are compared, as JSON values."""
        shown = {each.name for each in dataclasses.fields(self) if not each.compare}
        return {name: value for name, value in self.to_dict().items() if name not in shown}

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of what is compared, as 64 hexadecimal digits."""
        return hashlib.sha256(canonical_json(self.compared).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def warnings(self) -> list[str]:
        """Sentences on what is wrong with the weights."""
        random = (self.checkpoint or {}).get("random")
        left = f"{self.weights} leaves layers of {self.backbone} before the tap at random"
        found = [f"{left}: {first_names(random)}"] if random else []
        return found + ([self.untrained] if self.untrained else [])

    @property
    def title(self) -> str:
        """Network, weights, precision and the start of the digest, in one line."""
        name = f"{self.source}/{self.backbone} {self.weights}, {self.precision}"
        return f"{name}, fingerprint {self.digest[:16]}"

    @property
    def notes(self) -> list[str]:
        """Sentences on the weights: what of a file was loaded, and `warnings`."""
        made = self.checkpoint
        loaded = made and f"{made.get('loaded')} of {made.get('parameters')} parameters"
        where = f"of {self.backbone} were loaded from {self.weights}"
        return ([f"{loaded} {where}"] if loaded else []) + self.warnings

    @property
    def views(self) -> int:
        """Views stored of each image; 1 means that the features have no axis of views."""
        views: int = (self.augmentation or {}).get("views", 1)
        return views

    def diff(self, other: Fingerprint, names: tuple[str, str] = ("this", "other")) -> str:
        """Return what differs, one field a line, or an empty string.

        Parameters
        ----------
        other : Fingerprint
            Fingerprint to compare with.
        names : (str, str)
            Names of the two sides in the text.

        Examples
        --------
        >>> fields = {"weights": "none", "state_sha256": "", "taps": (), "preprocessing": {}}
        >>> a = Fingerprint(source="torchvision", backbone="resnet18", **fields)
        >>> b = Fingerprint(source="torchvision", backbone="resnet50", **fields)
        >>> print(a.diff(b, names=("stored", "asked for")))
        backbone: 'resnet18' (stored), 'resnet50' (asked for)
        """
        if self.state_sha256 == other.state_sha256:
            return differences(self.compared, other.compared, names)
        return differences(self.to_dict(), other.to_dict(), names)


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Return what differs between JSON values as `Fingerprint.diff` does."""
    return "\n".join(
        f"{name}: {one!r} ({names[0]}), {other!r} ({names[1]})"
        for name, one, other in _differences("", mine, theirs)
    )


def _differences(name: str, mine: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs, inside dictionaries by dotted name."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys()):
            inner = f"{name}.{key}" if name else key
            yield from _differences(inner, mine.get(key), theirs.get(key))
    elif mine != theirs:
        yield name, mine, theirs


@dataclass(frozen=True)
class Tap:
    """One point of a network where features are read.

    Parameters
    ----------
    layer : str
        Name of the module; empty for the whole network.
    call : int, optional
        Number of the run of a module that runs several times, from 1.
    side : {"input", "output"}, optional
        Side of the module. Left out: the output.
    reduce : {"mean", "max", "flatten", "map", "cls", "patches"}, optional
        Reduction. Left out: chosen by the shape of what the layer gives.
    """

    layer: str
    call: int | None = None
    side: Side | None = None
    reduce: str | None = None

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Read the text form; suffixes are taken from the right, names may hold dots and colons.

        Parameters
        ----------
        text : str
            ``LAYER[#K][:SIDE][:REDUCTION]``.

        Returns
        -------
        Tap
            Tap with None for what is not written.

        Raises
        ------
        TapError
            If the text is empty, or ``#K`` counts from 0.
        """
        rest, reduce = _split_suffix(text, REDUCTIONS)
        rest, side = _split_suffix(rest, SIDES)
        match = re.fullmatch(r"(.*)#(\d+)", rest, flags=re.DOTALL)
        layer, call = (match[1], int(match[2])) if match else (rest, None)
        if call == 0:
            raise TapError(f"{text!r}: runs of a layer are counted from 1. Write {layer}#1")
        if not layer and side is None:
            raise TapError(f"{text!r} names no layer. A tap is written {GRAMMAR}")
        return cls(layer, call, cast("Side | None", side), reduce)

    def __str__(self) -> str:
        call = "" if self.call is None else f"#{self.call}"
        suffixes = [suffix for suffix in (self.side, self.reduce) if suffix is not None]
        return ":".join([f"{self.layer}{call}", *suffixes])

    def fits(self, name: str) -> bool:
        """Return whether a canonical name may be this tap, by all that is written here."""
        other = Tap.parse(name)
        return (
            self.layer == other.layer
            and (self.call or 1) == (other.call or 1)
            and self.side in (None, other.side)
            and self.reduce in (None, other.reduce)
        )


def _split_suffix(text: str, suffixes: Sequence[str]) -> tuple[str, str | None]:
    head, colon, tail = text.rpartition(":")
    return (head, tail) if colon and tail in suffixes else (text, None)


def state_sha256(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 over a ``state_dict``: name, dtype, shape and bytes, sorted by name.

    Parameters
    ----------
    state : mapping of str to torch.Tensor
        On any device; other values (``_extra_state``) enter by their JSON or ``repr``.

    Returns
    -------
    str
        64 hexadecimal digits. The same weights give the same digits on every machine.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, torch.Tensor):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            if tensor.numel():  # as bytes: numpy has no bfloat16
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name}\0{value!r}\0".encode())
    return digest.hexdigest()
