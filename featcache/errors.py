"""Every error that featcache raises for a mistake, a bad input or a broken file.

::

    FeatcacheError
    ├── ImageSetError            images cannot be listed: empty folder, missing column, ids
    ├── DecodeError              one image cannot be read or decoded (recorded, not fatal)
    ├── BackboneError            a network cannot be had
    │   ├── UnknownBackbone      no network of that name (near names are given)
    │   ├── WeightsError         a checkpoint that is missing, damaged or does not fit
    │   └── TapError             no such layer, or a layer that cannot be tapped
    ├── StoreError               a feature file cannot be used
    │   ├── MissingStore         no file there
    │   ├── IncompleteStore      only a `.partial` file, or rows still pending
    │   ├── CorruptStore         not HDF5, truncated, or bytes that fail their checksum
    │   ├── FormatVersionError   written by another format version
    │   ├── StoreLocked          another process holds it
    │   ├── FingerprintMismatch  features of another network, tap or preprocessing
    │   └── MissingFeatures      images or taps that the store does not hold
    ├── ExtractionError          a run cannot start or did not end well
    │   ├── TooManyFailures      too many images failed; the good rows are kept
    │   ├── DiskFull             no room for the features; nothing was computed
    │   └── Interrupted          SIGINT or SIGTERM; everything committed, run again to resume
    ├── TrainingError            labels, classes or folds that cannot be trained on
    ├── PredictorError           a predictor file that cannot be used
    ├── OutputError              a file that cannot be written, or holds something else
    ├── SystemFault              the system refuses: a failing disk, too many open files
    ├── DeviceError              a device or precision that this machine does not have
    └── MissingExtra             an optional package is not installed (the message has the command)

Each message says what was expected, what came, where, and what to type next. The command line
prints it on standard error and exits with `exit_status`.
"""

from __future__ import annotations

import errno
import os
import re

_HELP = {
    errno.EMFILE: "Type: ulimit -n 65536, and run the same command again",
    errno.EIO: "The disk fails, or the network that it is on; copy what it holds elsewhere",
    errno.ENOSPC: "Make room and run the same command again",
    errno.ENOMEM: "Use less memory: --memory, or a smaller --batch-size",
}
_PASSING = {*_HELP, errno.ENFILE, errno.EACCES, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT}
_PASSING |= {errno.EINTR, errno.EDQUOT, errno.EROFS}


def explained(error: OSError) -> str:
    """Return what the system said and what helps, in one line without a full stop."""
    if error.errno == errno.ENOENT and error.filename is None:
        return "The folder that this command runs in is gone. Type: cd FOLDER"
    text = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
    return f"{text}. {_HELP[error.errno]}" if error.errno in _HELP else text


def of_system(error: Exception) -> OSError | None:
    """Return the system's error if it is why a file was not read; None: what is in it may be.

    libhdf5 has the number of such an error in its text alone.
    """
    found = re.search(r"\berrno = (\d+)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return OSError(number, "") if number in _PASSING else None


class FeatcacheError(Exception):
    """Base class: catch this to catch everything that featcache raises on purpose.

    Attributes
    ----------
    exit_status : int
        Exit status of the command line for this error: 1, or 75 for `Interrupted`.
    """

    exit_status = 1


class ImageSetError(FeatcacheError):
    """The images cannot be listed: an empty folder, a missing column, an id without a file."""


class DecodeError(FeatcacheError):
    """One image cannot be read or decoded; extraction records it as a failure.

    Parameters
    ----------
    stage : {"read", "decode", "system"}
        Where it failed; "system" is a fault of the machine that may pass, and is tried again.
    reason : str
        Why, in one line.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(stage, reason)
        self.stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


class BackboneError(FeatcacheError):
    """A network cannot be had, or cannot be used as a backbone."""


class UnknownBackbone(BackboneError):
    """There is no network of that name."""


class WeightsError(BackboneError):
    """A checkpoint that is missing, damaged, or does not fit the network."""


class TapError(BackboneError):
    """A tap that is not well-formed, names no layer, or names one that cannot be tapped."""


class StoreError(FeatcacheError):
    """A feature file cannot be used."""


class MissingStore(StoreError):
    """There is no feature file at that path."""


class IncompleteStore(StoreError):
    """An extraction into this file has not finished."""


class CorruptStore(StoreError):
    """The file is not HDF5, is truncated, or holds bytes that fail their checksum."""


class FormatVersionError(StoreError):
    """The file was written by another version of the file format."""


class StoreLocked(StoreError):
    """Another process is writing to this file."""


class FingerprintMismatch(StoreError):
    """The features come from another network, tap or preprocessing than is asked for."""


class MissingFeatures(StoreError):
    """Images or taps that the store does not hold."""


class ExtractionError(FeatcacheError):
    """An extraction cannot start, or did not end well."""


class TooManyFailures(ExtractionError):
    """More images failed than `max_failures` allows. The good rows are kept."""


class DiskFull(ExtractionError):
    """There is no room for the features; found before any forward pass."""


class Interrupted(ExtractionError):
    """SIGINT or SIGTERM came; everything computed is committed. Run again to resume."""

    exit_status = 75


class TrainingError(FeatcacheError):
    """Labels, classes or folds that no head can be trained on."""


class PredictorError(FeatcacheError):
    """A predictor file that is damaged, hostile, or of another format version."""


class OutputError(FeatcacheError):
    """A file that cannot be written, or that would replace one of another kind."""


class SystemFault(FeatcacheError):
    """The system refuses what was asked of it: a disk fails, too many files are open."""

    @classmethod
    def of(cls, error: OSError | MemoryError) -> SystemFault:
        """Return what to tell of an error of the system that nothing else has explained."""
        if isinstance(error, MemoryError):
            error = OSError(errno.ENOMEM, "")
        return cls(f"{error.filename}: {explained(error)}." if error.filename else explained(error))


class DeviceError(FeatcacheError):
    """A device or precision that this machine does not have."""


class MissingExtra(FeatcacheError):
    """An optional package is not installed.

    Parameters
    ----------
    package : str
        The package that could not be imported.
    extra : str
        featcache's extra that installs it.
    purpose : str
        What it is needed for, as the subject of a sentence: "Exporting to ONNX".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(package, extra, purpose)
        self.package = package
        self.extra = extra
        self.purpose = purpose

    def __str__(self) -> str:
        return (
            f"{self.purpose} needs the package {self.package!r}, which is not installed. "
            f"Type: pip install 'featcache[{self.extra}]'"
        )
