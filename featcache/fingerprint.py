"""What decides the value of a feature, written down so that it can be compared.

Two features are comparable when the same network, with the same weights, read the same taps of
images prepared in the same way. `Fingerprint` holds exactly that; a store keeps it, and training,
evaluation and prediction refuse features whose fingerprint differs and print the difference field
by field. What does not change a value (workers, device, batch size) is not in it.

`RequestKey` is the cheap companion: what the user asked for, known without loading any weights. A
second run whose request equals the stored one has nothing to compute.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from featcache.errors import CorruptStore, FormatVersionError

__all__ = ["FORMAT_VERSION", "Fingerprint", "RequestKey", "canonical_json", "state_sha256"]

#: Version of the feature file's format. Another version is refused, never guessed at.
FORMAT_VERSION = 2


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


class _Record(Record):
    """JSON, digest and comparison of a frozen dataclass whose fields are JSON values."""

    def __post_init__(self) -> None:
        # Tuples inside dictionaries become lists now, not at the first round trip through a file.
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                object.__setattr__(self, field.name, json.loads(canonical_json(dict(value))))
            elif isinstance(value, list | tuple):
                object.__setattr__(self, field.name, tuple(value))

    def to_json(self) -> str:
        """Return the canonical JSON text; equal records give equal text."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the record that `to_json` wrote.

        Raises
        ------
        FormatVersionError
            It was written by another version of the file format.
        CorruptStore
            It is not the JSON of such a record.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise CorruptStore(f"The {cls.__name__.lower()} is not JSON: {error}") from error
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if not isinstance(values, dict):
            raise CorruptStore(f"The {cls.__name__.lower()} is not a JSON object: {text[:60]!r}")
        if values.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise FormatVersionError(
                f"It was written in format version {values['format_version']}; this featcache "
                f"reads version {FORMAT_VERSION}."
            )
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise CorruptStore(f"The {cls.__name__.lower()} has missing or unknown fields: {odd}")
        return cls(**values)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, as 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def diff(self, other: Self, names: tuple[str, str] = ("this", "other")) -> str:
        """Return what differs, one field a line, or an empty string.

        Parameters
        ----------
        other : same type
            What to compare with.
        names : (str, str)
            How the two sides are called in the text.

        Examples
        --------
        >>> a = RequestKey(source="torchvision", backbone="resnet18")
        >>> b = RequestKey(source="torchvision", backbone="resnet50")
        >>> print(a.diff(b, names=("stored", "asked for")))
        backbone: 'resnet18' (stored), 'resnet50' (asked for)
        """
        pairs = _differences("", json.loads(self.to_json()), json.loads(other.to_json()))
        return "\n".join(
            f"{name}: {mine!r} ({names[0]}), {theirs!r} ({names[1]})"
            for name, mine, theirs in pairs
        )


def _differences(name: str, mine: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs, inside dictionaries by dotted name."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys()):
            inner = f"{name}.{key}" if name else key
            yield from _differences(inner, mine.get(key), theirs.get(key))
    elif mine != theirs:
        yield name, mine, theirs


@dataclass(frozen=True, eq=True)
class Fingerprint(_Record):
    """Everything that decides the value of a feature.

    Parameters
    ----------
    source : {"torchvision", "timm", "callable", "module"}
        Where the network comes from.
    backbone : str
        Its name there.
    weights : str
        Pinned name (``"IMAGENET1K_V2"``, never ``"DEFAULT"``), file name, or ``"none"``.
    state_sha256 : str
        `state_sha256` of the network as loaded.
    taps : tuple of str
        Canonical taps, in the order of the columns.
    preprocessing : dict
        ``Preprocessing.to_dict()``.
    precision : {"float32", "bfloat16", "float16"}
        Of the forward pass.
    store_dtype : {"float32", "float16"}
        Of the stored features.
    augmentation : dict, optional
        ``Augmentation.to_dict()`` where views are stored.
    views : int
        Views stored of each image; 1 means that the features have no axis of views.
    partial : dict, optional
        Keys that a partly fitting checkpoint left out.
    format_version : int
        Version of the feature file's format.
    """

    source: str
    backbone: str
    weights: str
    state_sha256: str
    taps: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    precision: str = "float32"
    store_dtype: str = "float32"
    augmentation: Mapping[str, Any] | None = None
    views: int = 1
    partial: Mapping[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    __hash__ = _Record.__hash__

    def compatible(self, other: Fingerprint, ignore: tuple[str, ...] = ("store_dtype",)) -> bool:
        """Say whether features of both may be used together.

        Parameters
        ----------
        other : Fingerprint
            What to compare with.
        ignore : tuple of str
            Fields that may differ. By default the storage type: the same features, rounded.
        """
        same = {name: getattr(self, name) for name in ignore}
        return dataclasses.replace(other, **same) == self


@dataclass(frozen=True, eq=True)
class RequestKey(_Record):
    """What is asked for, known without loading weights: equal requests give equal features.

    Parameters
    ----------
    source, backbone : str
        As in `Fingerprint`.
    weights : str
        Pinned name, checkpoint path, or ``"none"``.
    checkpoint : dict, optional
        ``{"size": int, "mtime_ns": int}`` of the checkpoint file, where there is one.
    taps : tuple of str, optional
        As asked for; None = the default tap.
    preprocessing : dict, optional
        As asked for, for instance ``{"image_size": 160}``; None = that of the weights.
    partial : bool
        A partly fitting checkpoint is accepted.
    precision, store_dtype, augmentation, views, format_version
        As in `Fingerprint`.
    """

    source: str
    backbone: str
    weights: str = "auto"
    checkpoint: Mapping[str, Any] | None = None
    taps: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] | None = None
    partial: bool = False
    precision: str = "float32"
    store_dtype: str = "float32"
    augmentation: Mapping[str, Any] | None = None
    views: int = 1
    format_version: int = FORMAT_VERSION

    __hash__ = _Record.__hash__


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
