"""Features as files of other programs: ``.npz``, ``.npy``, ``.parquet``, ``.csv``.

Everything is written block by block, so a store larger than memory can be exported.
"""

from __future__ import annotations

import functools
import importlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from featcache.errors import MissingExtra, StoreError
from featcache.fingerprint import canonical_json
from featcache.store.store import FeatureStore
from featcache.system.files import STDOUT, csv_writer, is_table, replacing

__all__ = ["export_store"]


def export_store(
    store: FeatureStore,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    excel: bool = False,
) -> Path:
    """Write a store's rows to a file of another kind, chosen by the suffix.

    ============ ==================================================================================
    ``.npz``     one array a tap under the tap's name, as stored; ``ids``, ``labels``, ``groups``,
                 ``splits`` and kept columns (arrays of str) and ``fingerprints`` (JSON: a list
                 with the fingerprint of each joined store); read with ``numpy.load``
    ``.npy``     all taps side by side, (n, d) or (n, views, d) float32; rows in the store's order
    ``.parquet`` a row an image: ``id``, ``label``, ``group``, ``split``, kept columns, and a list
                 of float32 a tap (a list of lists if there are views); needs the extra ``parquet``
    ``.csv``     the same as columns ``TAP[0]``, ``TAP[1]``, ...; a row an image, or a row a view
    ============ ==================================================================================

    Parameters
    ----------
    store : FeatureStore
        What to write; also a selection or a join.
    path : path
        The file to make. A file of other features that was written by this function is replaced,
        another is not; of ``.npy``, which does not say who wrote it, only the very same bytes.
        ``-`` is CSV on standard output.
    force : bool
        Replace a file of any kind.
    excel : bool
        Of ``.csv``, for spreadsheets: see `featcache.system.files.csv_writer`.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    StoreError
        The suffix is of no kind above, or not ``.csv`` with `excel`.
    OutputError
        A file of another kind is there, or it cannot be written.
    MissingExtra
        ``.parquet`` without pyarrow.
    """
    target = Path(path)
    suffix = ".csv" if target == STDOUT else target.suffix
    if suffix not in _KINDS:
        raise StoreError(
            f"Cannot export to {target}: a name ending in {', '.join(_KINDS)} is needed."
        )
    if excel and suffix != ".csv":
        raise StoreError(f"Spreadsheets read .csv; {target} is to be {suffix}. Leave out --excel.")
    write, is_own = _KINDS[suffix]
    if excel:
        write = functools.partial(_write_csv, excel=True)
    what = f"a {suffix} file {'of these features' if suffix == '.npy' else 'of an export'}"
    own = functools.partial(is_own, store)
    with replacing(target, own, what, force=force, text=suffix == ".csv") as file:
        write(store, file)
    return target


def _tables(store: FeatureStore) -> dict[str, np.ndarray]:
    """Return what is known of each row, by the name of its column."""
    tables = {"id": store.ids, "label": store.labels}
    if store.groups is not None:
        tables["group"] = store.groups
    if store.splits is not None:
        tables["split"] = store.splits
    return {**tables, **store.columns, **tables}  # ours win


def _columns(store: FeatureStore, taps: Sequence[str]) -> list[str]:
    """Return a name for each feature of some taps."""
    return [f"{name}[{column}]" for name in taps for column in range(store.taps[name].width)]


def to_pandas(store: FeatureStore, layers: str | Sequence[str] | None) -> Any:
    """Return a store as a table of pandas; see `FeatureStore.to_pandas`."""
    try:
        pd: Any = importlib.import_module("pandas")
    except ImportError as error:
        raise MissingExtra("pandas", "pandas", "A table of pandas") from error
    names, views = store.resolve(layers), store.views
    ids, *tables = (
        pd.Series(np.repeat(table, views), name=name) for name, table in _tables(store).items()
    )
    known = {table.name: table.astype("category") for table in tables}
    if views > 1:
        known["view"] = np.tile(np.arange(views), len(store))
    X = store.matrix(names).reshape(len(ids), -1)
    features = pd.DataFrame(X, columns=_columns(store, names), copy=False)
    return pd.concat([pd.DataFrame(known), features], axis=1).set_index(pd.Index(ids, name="id"))


def _fingerprints(store: FeatureStore) -> str:
    """Return the fingerprints of the joined stores as a JSON list."""
    return canonical_json([one.to_dict() for one in store.fingerprints])


def _write_npz(store: FeatureStore, file: IO[bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, table in _tables(store).items():
            several = name if name in store.columns else f"{name}s"
            _write_member(archive, several, table.shape, table.dtype, iter([table]))
        text = np.array(_fingerprints(store))
        _write_member(archive, "fingerprints", text.shape, text.dtype, iter([text]))
        for name, info in store.taps.items():
            shape = (len(store), *info.shape)
            blocks = (block for _, block in store.blocks(name, dtype=None))
            _write_member(archive, name, shape, info.dtype, blocks)


def _write_member(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    blocks: Iterator[np.ndarray],
) -> None:
    """Write one array into an ``.npz`` archive, block by block."""
    # The date of a ZipInfo is fixed: the same features give the same file.
    info = zipfile.ZipInfo(f"{name}.npy")
    with archive.open(info, "w", force_zip64=True) as member:
        _write_header(member, shape, dtype)
        for block in blocks:
            member.write(np.ascontiguousarray(block).tobytes())


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    description = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": description, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _npy_shape(store: FeatureStore) -> tuple[int, ...]:
    return (len(store), *([store.views] if store.views > 1 else []), store.width())


def _write_npy(store: FeatureStore, file: IO[bytes]) -> None:
    _write_header(file, _npy_shape(store), np.dtype("<f4"))
    for _, block in store.blocks():
        file.write(np.ascontiguousarray(block, "<f4").data)


def _write_csv(store: FeatureStore, file: IO[str], excel: bool = False) -> None:
    views = store.views
    tables = {name: table.tolist() for name, table in _tables(store).items()}
    writerow = csv_writer(file, excel=excel)
    writerow([*tables, *(["view"] if views > 1 else []), *_columns(store, list(store.taps))])
    for part, block in store.blocks():
        # numpy writes the shortest text that reads back as the same float32
        values = block.reshape(-1, block.shape[-1]).astype(str).tolist()
        for k, row in enumerate(values):
            image, view = part.start + k // views, k % views
            known = [table[image] for table in tables.values()]
            writerow(known, [*([view] if views > 1 else []), *row])


def _write_parquet(store: FeatureStore, file: IO[bytes]) -> None:
    pa, pq = _pyarrow()
    tables = _tables(store)
    fields = [(name, pa.string()) for name in tables]
    for name, info in store.taps.items():
        values = pa.list_(pa.float32(), info.width)
        fields.append((name, pa.list_(values, info.views) if info.views > 1 else values))
    schema = pa.schema(fields, metadata={"featcache": _fingerprints(store)})
    with pq.ParquetWriter(file, schema) as writer:
        for part, block in store.blocks():
            arrays = [pa.array(table[part].tolist(), pa.string()) for table in tables.values()]
            first = 0
            for info in store.taps.values():
                column = np.ascontiguousarray(block[..., first : first + info.width]).reshape(-1)
                array = pa.FixedSizeListArray.from_arrays(pa.array(column), info.width)
                if info.views > 1:
                    array = pa.FixedSizeListArray.from_arrays(array, info.views)
                arrays.append(array)
                first += info.width
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet", "Exporting to Parquet") from error


# --- what was written here before ----------------------------------------------------------------


def _are_columns(names: Sequence[str], needed: set[str], others: set[str]) -> bool:
    """Return whether columns are those of tables, and taps: only these have a colon."""
    known = {name for name in names if ":" not in name}
    return len(known) < len(names) and needed <= known <= needed | others


def _is_npz(store: FeatureStore, path: Path) -> bool:
    others = {"groups", "splits", *store.columns}
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    return _are_columns(names, {"ids", "labels", "fingerprints"}, others)


def _is_npy(store: FeatureStore, path: Path) -> bool:
    """Return whether a file has the very bytes that are going to be written."""
    found = np.load(path, mmap_mode="r")
    whole = path.stat().st_size == found.offset + found.nbytes
    return (
        whole
        and (found.shape, found.dtype) == (_npy_shape(store), np.dtype("<f4"))
        and all(found[part].tobytes() == block.tobytes() for part, block in store.blocks())
    )


def _is_csv(store: FeatureStore, path: Path) -> bool:
    others = {"group", "split", "view", *store.columns}
    number = r"-?(\d+(\.\d+)?(e[+-]\d+)?|nan|inf)"
    return is_table(
        path,
        lambda names: _are_columns(names, {"id", "label"}, others),
        {"view": r"\d+", r".*:.*": number},
    )


def _is_parquet(store: FeatureStore, path: Path) -> bool:
    schema = _pyarrow()[1].read_schema(path)
    ours = b"featcache" in (schema.metadata or {})
    others = {"group", "split", *store.columns}
    return ours and _are_columns(schema.names, {"id", "label"}, others)


_KINDS: dict[
    str, tuple[Callable[[FeatureStore, IO[Any]], None], Callable[[FeatureStore, Path], bool]]
] = {
    ".npz": (_write_npz, _is_npz),
    ".npy": (_write_npy, _is_npy),
    ".parquet": (_write_parquet, _is_parquet),
    ".csv": (_write_csv, _is_csv),
}
