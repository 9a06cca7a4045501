"""Write a head to bytes and read it back without running any code that the bytes bring.

Heads are written by `skops <https://skops.readthedocs.io>`_: a zip of one JSON tree
(``schema.json``) and one ``.npy`` file per array. They are read by the reader in this module,
which knows the few node kinds that heads consist of and nothing else. Reading with
``skops.io.load`` was measured and rejected: importing skops lists every estimator of
scikit-learn, which takes longer than all the rest of loading a predictor together, and its
default trust is wider than ours (any scikit-learn estimator, NumPy's and SciPy's functions).

What the reader promises, whatever the bytes are:

- *No code from the file.* A class is taken from `_TYPES`, by literal name; nothing else is
  imported, no function, method or constructor named in the file is called, and an attribute may
  not shadow what the class defines.
- *No bomb.* Members are stored, not deflated, so nothing grows when it is read, and an array's
  shape must account for exactly the bytes that are there.
- *No crash later.* Compiled code that trusts its input (trees, libsvm) gets indices and shapes
  that were checked against each other: children in range and after their parent, so that a walk
  ends; features in range; as many support vectors as counts say.
- *One error.* What is not a head raises `PredictorError`.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import PredictorError

Array = npt.NDArray[Any]

_PROTOCOLS = (0, 1, 2)  # skops writes 2; the nodes that we read are the same in all of them
_MAX_DEPTH = 60  # of the JSON tree; a pipeline of a forest is 14 deep
_MAX_HEADER = 10_000  # of a .npy; a literal much longer can exhaust the C stack of its parser
_SCALARS = (str, int, float, bool, type(None))

# Every class that a head may consist of. Reading never imports anything that is not named here.
_TYPES: dict[str, tuple[str, str]] = {
    f"{module}.{name}": (module, name)
    for module, names in {
        "featcache.heads.linear": "LinearClassifier",
        "featcache.heads.mlp": "MLP",
        "featcache.heads.neighbors": "CosineNeighbors",
        "featcache.heads.ridge": "Ridge",
        "featcache.finetuning.head": "SuffixClassifier",
        "featcache.heads.svm": "LinearSVM GaussianSVM",
        "featcache.heads.treatment": "SignedPower",
        "featcache.heads.trees": "BoostedTrees",
        "sklearn.pipeline": "Pipeline",
        "sklearn.preprocessing._data": "StandardScaler Normalizer PowerTransformer",
        "sklearn.preprocessing._label": "LabelEncoder LabelBinarizer",
        "sklearn.decomposition._pca": "PCA",
        "sklearn.kernel_approximation": "Nystroem",
        "sklearn.svm._classes": "SVC LinearSVC",
        "sklearn.linear_model._logistic": "LogisticRegression",
        "sklearn.linear_model._ridge": "RidgeClassifier RidgeClassifierCV",
        "sklearn.ensemble._forest": "RandomForestClassifier ExtraTreesClassifier",
        "sklearn.tree._classes": "DecisionTreeClassifier ExtraTreeClassifier",
    }.items()
    for name in names.split()
}


def dump(estimator: Any) -> bytes:
    """Write a fitted head; what is written is read back before it is returned.

    Parameters
    ----------
    estimator : estimator
        A fitted scikit-learn estimator or pipeline of the types that `load` reads.

    Returns
    -------
    bytes
        A skops file.

    Raises
    ------
    PredictorError
        The estimator holds a type that is not on the list, so no file of it could be read.
    """
    import skops.io

    _refuse_unknown_types(estimator, 0)
    try:
        data: bytes = skops.io.dumps(estimator, compression=zipfile.ZIP_STORED)
    except Exception as error:
        raise PredictorError(
            f"A {type(estimator).__name__} cannot be saved: {_one_line(error)}"
        ) from error
    load(data)
    return data


def _refuse_unknown_types(thing: Any, depth: int) -> None:
    """Refuse estimators that are not on the list before skops sees them.

    It is more than a better message: an object of scikit-learn-intelex aborts the process when
    skops takes it apart.
    """
    if depth > _MAX_DEPTH:
        raise PredictorError("The head cannot be saved: its objects are nested too deeply.")
    if isinstance(thing, list | tuple):
        items: Iterable[Any] = thing
    elif isinstance(thing, dict):
        items = thing.values()
    elif hasattr(thing, "get_params") or hasattr(thing, "fit"):
        name = f"{type(thing).__module__}.{type(thing).__qualname__}"
        if name not in _TYPES:
            raise PredictorError(
                f"The head cannot be saved: {name} is not among the types that predictors read."
            )
        items = vars(thing).values()
    else:
        items = ()
        root = type(thing).__module__.partition(".")[0]
        if root in ("sklearnex", "daal4py", "onedal"):
            raise PredictorError(f"The head cannot be saved: it holds a {type(thing)!r}.")
    for item in items:
        _refuse_unknown_types(item, depth + 1)


def load(data: bytes) -> Any:
    """Read a head that `dump` wrote.

    Raises
    ------
    PredictorError
        The bytes are not a head: damaged, hostile, or of a type that is not on the list.
    """
    members = unzip(data, "head.skops")
    try:
        schema = json.loads(_member(members, "schema.json", "head.skops"))
        protocol = schema.get("protocol") if isinstance(schema, dict) else None
        if protocol not in _PROTOCOLS or isinstance(protocol, bool):
            raise _Refused(
                f"skops protocol {protocol!r} is not one that this featcache reads {_PROTOCOLS}"
            )
        return _Reader(members).build(schema, 0)
    except PredictorError:
        raise
    except Exception as error:
        # Hostile bytes can make the parsing of anything raise anything (wrong types, huge
        # numbers, endless nesting); whatever it is, the file is not a head.
        raise PredictorError(f"The head in the predictor is damaged: {_one_line(error)}") from error


def unzip(data: bytes, what: str) -> dict[str, bytes]:
    """Read all members of a zip whose members are stored, not compressed.

    Parameters
    ----------
    data : bytes
        The zip.
    what : str
        What it is called in messages.

    Raises
    ------
    PredictorError
        Not a zip, damaged, compressed, encrypted, or with two members of one name.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if len(set(names)) != len(names):
                raise _Refused("two members have the same name")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise _Refused("a member is compressed; predictors are written uncompressed")
            if sum(info.file_size for info in infos) > len(data):
                raise _Refused("its members claim to be larger than the file")
            return {info.filename: archive.read(info) for info in infos}
    except Exception as error:
        raise PredictorError(f"{what} is not a readable zip: {_one_line(error)}") from error


def read_npz(data: bytes, what: str) -> dict[str, Array]:
    """Read the arrays of an uncompressed ``.npz``, without pickle and without trusting shapes.

    Raises
    ------
    PredictorError
        Not such a file.
    """
    arrays = {}
    for name, member in unzip(data, what).items():
        try:
            arrays[name.removesuffix(".npy")] = read_npy(member)
        except Exception as error:
            raise PredictorError(f"{what}: array {name!r}: {_one_line(error)}") from error
    return arrays


def read_npy(data: bytes) -> Array:
    """Read one ``.npy``: an array on its own memory, of a dtype without Python objects.

    ``numpy.load`` allocates what the header claims before it looks for the bytes; here the
    header has to account for the bytes first.

    Raises
    ------
    ValueError
        Not such a file. Headers that are no Python literal raise what `ast.literal_eval` raises.
    """
    if data[:6] != b"\x93NUMPY" or len(data) < 12 or data[6] not in (1, 2, 3):
        raise ValueError("not in NumPy's format")
    wide = 2 if data[6] == 1 else 4
    start = 8 + wide + int.from_bytes(data[8 : 8 + wide], "little")
    if start > min(len(data), _MAX_HEADER):
        raise ValueError("the header is longer than the file, or than any of ours")
    header = ast.literal_eval(data[8 + wide : start].decode("utf-8"))
    shape, dtype = header["shape"], np.lib.format.descr_to_dtype(header["descr"])
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are not read")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"shape {shape!r}")
    count = 1
    for n in shape:
        count *= n
    if not dtype.itemsize or count * dtype.itemsize != len(data) - start:
        raise ValueError(f"shape {shape} of {dtype} does not account for {len(data) - start} bytes")
    # A copy, because readers may want to write, and compiled code wants aligned memory.
    flat: Array = np.frombuffer(data, dtype=dtype, offset=start).copy()
    return np.reshape(flat, shape, order="F" if header["fortran_order"] else "C")


class _Refused(ValueError):
    """The bytes are well-formed but not allowed."""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _member(members: Mapping[str, bytes], name: str, what: str) -> bytes:
    if name not in members:
        raise PredictorError(f"{what} has no member {name!r}.")
    return members[name]


class _Reader:
    """Builds the objects of a skops tree, depth first, from the node kinds in `builders`."""

    def __init__(self, members: Mapping[str, bytes]) -> None:
        self.members = members
        self.arrays: dict[str, Array] = {}
        self.builders: dict[str, Callable[[dict[str, Any], int], Any]] = {
            "JsonNode": self._scalar,
            "ListNode": self._list,
            "TupleNode": self._tuple,
            "DictNode": self._dict,
            "NdArrayNode": self._array,
            "ObjectNode": self._object,
            "TreeNode": self._tree,
        }

    def build(self, node: Any, depth: int) -> Any:
        """Return the object that a node describes."""
        if depth > _MAX_DEPTH:
            raise _Refused("the tree of objects is too deep")
        if not isinstance(node, dict):
            raise _Refused(f"a node is a {type(node).__name__}, not a JSON object")
        loader = node["__loader__"]
        if loader not in self.builders:
            raise _Refused(f"a {loader!r} is not among the kinds of nodes that heads consist of")
        return self.builders[loader](node, depth + 1)

    def _scalar(self, node: dict[str, Any], depth: int) -> Any:
        value = json.loads(node["content"])
        if not isinstance(value, _SCALARS):
            raise _Refused(f"a JSON node holds a {type(value).__name__}")
        return value

    def _items(self, content: Any, depth: int) -> list[Any]:
        if not isinstance(content, list):
            raise _Refused("the content of a list is not a list")
        return [self.build(item, depth) for item in content]

    def _list(self, node: dict[str, Any], depth: int) -> list[Any]:
        return self._items(node["content"], depth)

    def _tuple(self, node: dict[str, Any], depth: int) -> tuple[Any, ...]:
        return tuple(self._items(node["content"], depth))

    def _dict(self, node: dict[str, Any], depth: int) -> dict[Any, Any]:
        convert: dict[str, Callable[[str], Any]] = {
            "str": str,
            "str_": str,
            "int": int,
            "float": float,
        }
        kinds = [kind["__class__"] for kind in node["key_types"]["content"]]
        content = node["content"]
        if len(kinds) != len(content):
            raise _Refused("a dictionary has other numbers of keys and key types")
        return {
            convert[kind](key): self.build(value, depth)
            for kind, (key, value) in zip(kinds, content.items(), strict=True)
        }

    def _array(self, node: dict[str, Any], depth: int) -> Any:
        if node["type"] != "numpy":
            raise _Refused("arrays of Python objects are not read")
        name = node["file"]
        if name not in self.arrays:
            self.arrays[name] = read_npy(_member(self.members, name, "head.skops"))
        array = self.arrays[name]
        # NumPy's scalars are written as arrays of no dimensions.
        return array if node["__class__"] == "ndarray" else array[()]

    def _object(self, node: dict[str, Any], depth: int) -> Any:
        name, module = node["__class__"], node["__module__"]
        known = _TYPES.get(f"{module}.{name}")
        if known is None:
            raise _Refused(f"{module}.{name} is not among the types that heads consist of")
        made = getattr(importlib.import_module(known[0]), known[1])
        state = self.build(node["content"], depth)
        if not isinstance(state, dict):
            raise _Refused(f"the state of a {name} is not a dictionary")
        state.pop("_sklearn_version", None)
        _check_attributes(made, state)
        if "n_jobs" in state:
            state["n_jobs"] = None  # a file does not decide how many processes start
        thing = object.__new__(made)
        thing.__dict__.update(state)
        _CHECKS.get(name, _no_check)(thing)
        return thing

    def _tree(self, node: dict[str, Any], depth: int) -> Any:
        from sklearn.tree._tree import Tree

        args = self.build(node["__reduce__"]["args"], depth)
        state = self.build(node["content"], depth)
        n_features, n_classes, n_outputs = args
        _check_tree(n_features, n_classes, n_outputs, state)
        tree = Tree(n_features, n_classes, n_outputs)
        tree.__setstate__(state)
        return tree


def _no_check(thing: Any) -> None:
    return None


def _check_attributes(made: type, state: Mapping[Any, Any]) -> None:
    """Refuse attributes that would hide a method or a setting of the class."""
    for name in state:
        if not isinstance(name, str) or not name.isidentifier() or hasattr(made, name):
            raise _Refused(f"{made.__name__} may not have an attribute {name!r}")


def _require(condition: Any, what: str) -> None:
    if not condition:
        raise _Refused(what)


def _is_index(value: Any, end: int) -> bool:
    """Whether every item of an integer array lies in [0, end)."""
    array = np.asarray(value)
    return bool(array.dtype.kind in "iu" and np.all((array >= 0) & (array < end)))


def _check_tree(n_features: Any, n_classes: Any, n_outputs: Any, state: Any) -> None:
    """Check what becomes a compiled decision tree of scikit-learn.

    scikit-learn itself compares shapes and dtypes of nodes and values with the sizes given here.
    """
    from sklearn.tree._tree import NODE_DTYPE

    _require(type(n_features) is int and 0 < n_features < 2**31, "a tree's number of features")
    _require(type(n_outputs) is int and n_outputs == 1, "a tree with several outputs")
    _require(np.shape(n_classes) == (1,) and _is_index(n_classes, 2**31), "a tree's classes")
    nodes = state["nodes"]
    _require(isinstance(nodes, np.ndarray) and nodes.dtype == NODE_DTYPE, "a tree's nodes")
    n = len(nodes)
    count = state["node_count"]
    _require(type(count) is int and count == n > 0, "a tree's node count")
    inner = np.flatnonzero(nodes["left_child"] != -1)
    _check_children(inner, nodes["left_child"][inner], nodes["right_child"][inner], n)
    _require(_is_index(nodes["feature"][inner], n_features), "a tree splits on no known feature")


def _check_children(inner: Array, left: Array, right: Array, n: int) -> None:
    """Check that children exist and stand after their parent, so that every walk ends."""
    for child in (left, right):
        _require(_is_index(child, n), "a tree's child does not exist")
        _require(np.all(child.astype(np.int64) > inner), "a tree's child stands before its parent")


def _check_boosting(model: Any) -> None:
    """Check boosted trees in arrays: walking them ends, and looks at the row's own columns."""
    n = len(model.feature_)
    itself = np.arange(n)
    left, right = model.left_, model.right_
    for array in (model.threshold_, model.value_, left, right):
        _require(np.shape(array) == (n,), "the shape of the boosted trees")
    inner = itself[(left != itself) | (right != itself)]
    _check_children(inner, left[inner], right[inner], n)
    _require(_is_index(model.feature_, len(model.components_)), "a tree splits on no component")
    _require(_is_index(model.roots_, n), "a tree's root does not exist")
    k = _outputs(model)
    _require(np.ndim(model.roots_) == 2 and model.roots_.shape[1] == k, "the boosted trees' rounds")
    _check_numbers(
        model,
        mean_=(model.n_features_in_,),
        components_=(len(model.components_), model.n_features_in_),
        baseline_=(k,),
        threshold_=(n,),
        value_=(n,),
    )


def _outputs(model: Any) -> int:
    """Return how many scores a model gives: one for two classes."""
    classes = len(model.classes_)
    return 1 if classes == 2 else classes


def _check_numbers(model: Any, **shapes: tuple[int, ...]) -> None:
    """Check that attributes are arrays of floats of these shapes."""
    for name, shape in shapes.items():
        array = getattr(model, name)
        _require(
            isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.shape == shape,
            f"the shape of a {type(model).__name__}'s {name}: expected {shape}",
        )


def _check_linear(model: Any) -> None:
    k = _outputs(model)
    _check_numbers(model, coef_=(k, model.n_features_in_), intercept_=(k,))


def _check_gaussian_svm(model: Any) -> None:
    """Check that support vectors, counts and coefficients fit each other."""
    k, m = len(model.classes_), len(model.support_vectors_)
    _check_numbers(
        model,
        support_vectors_=(m, model.n_features_in_),
        dual_coef_=(k - 1, m),
        intercept_=(k * (k - 1) // 2,),
    )
    counts = model.n_support_
    _require(np.shape(counts) == (k,) and _is_index(counts, m + 1), "an SVM's support counts")
    _require(int(counts.sum()) == m == len(model.support_), "an SVM's support counts")


def _check_network(model: Any) -> None:
    """Check that the two layers of a network fit each other, its classes and its columns."""
    for parts in (model.coefs_, model.intercepts_):
        _require(isinstance(parts, list) and len(parts) == 2, "a network of two layers")
        for part in parts:
            _require(isinstance(part, np.ndarray) and part.dtype.kind == "f", "a network's weights")
    width, k = len(model.coefs_[0]), len(model.classes_)
    shapes = [part.shape for part in (*model.coefs_, *model.intercepts_)]
    wanted = [(width, model.n_features_in_), (k, width), (width,), (k,)]
    _require(shapes == wanted, f"the shapes of a network's layers: {shapes}, expected {wanted}")


def _check_forest(model: Any) -> None:
    """Check that the trees take the forest's features, which they will not check themselves."""
    for tree in model.estimators_:
        _require(tree.tree_.n_features == model.n_features_in_, "a tree's number of features")
        _require(int(tree.tree_.n_classes[0]) == len(model.classes_), "a tree's classes")


def _check_decision_tree(model: Any) -> None:
    if hasattr(model, "tree_"):  # a forest keeps an unfitted pattern of its trees
        _require(model.tree_.n_features == model.n_features_in_, "a tree's number of features")


def _check_svc(model: Any) -> None:
    """Check the arrays that libsvm reads without looking at their lengths."""
    k, d = len(model.classes_), model.n_features_in_
    vectors, counts = model.support_vectors_, model._n_support
    m = len(model.support_)
    pairs = k * (k - 1) // 2
    # A precomputed kernel would be looked up by row numbers that nobody checks.
    _require(model.kernel in ("rbf", "linear", "poly", "sigmoid"), "an SVM's kernel")
    arrays: Iterable[tuple[str, Any, Any, tuple[int, ...]]] = (
        ("support vectors", vectors, np.float64, (m, d)),
        ("support", model.support_, np.int32, (m,)),
        ("support counts", counts, np.int32, (k,)),
        ("dual coefficients", model._dual_coef_, np.float64, (k - 1, m)),
        ("intercepts", model._intercept_, np.float64, (pairs,)),
        # libsvm would read k (k - 1) / 2 values of each, were there one.
        ("probabilities", model._probA, np.float64, (0,)),
        ("probabilities", model._probB, np.float64, (0,)),
    )
    for name, array, dtype, shape in arrays:
        _require(
            isinstance(array, np.ndarray)
            and array.dtype == dtype
            and array.shape == shape
            and array.flags.c_contiguous,
            f"an SVM's {name}",
        )
    _require(_is_index(counts, m + 1) and int(counts.sum()) == m, "an SVM's support counts")


def _check_neighbours(model: Any) -> None:
    """Check that the neighbours' classes exist: counting their votes makes room for the largest."""
    _require(_is_index(model.codes_, len(model.classes_)), "a neighbour's class")
    n, k = len(model.rows_), len(model.classes_)
    _require(n > 0 and model.codes_.shape == (n,), "the number of neighbours")
    _check_numbers(model, rows_=(n, model.n_features_in_), weights_=(n,), factors_=(k,))
    # How many neighbours to look at follows from the smallest weight.
    _require(np.all(model.weights_ > 0), "a neighbour's weight")


def _check_suffix(model: Any) -> None:
    """Check that the weights of a network's end are arrays, and those that were saved.

    What they are arrays of is compared with the network's layers when the head is bound to one.
    """
    from featcache.finetuning.head import state_digest

    state = model.state_
    _require(isinstance(state, dict) and state, "a network's weights")
    for name, array in state.items():
        _require(isinstance(name, str) and isinstance(array, np.ndarray), "a network's weights")
        _require(array.dtype.kind in "fiub", "the type of a network's weights")
    _require(state_digest(state) == model.sha256_, "weights that do not match their SHA-256")
    _require(isinstance(model.tap_, str) and isinstance(model.head_, str), "where a network is cut")
    shape = model.shape_
    _require(
        isinstance(shape, tuple) and all(type(n) is int and 0 < n < 2**31 for n in shape),
        "the shape of a network's features",
    )
    _require(model.n_features_in_ == math.prod(shape), "a network's number of features")


def _check_pipeline(model: Any) -> None:
    _require(model.memory is None, "a pipeline with a cache on disk, which would be unpickled")


_CHECKS: dict[str, Callable[[Any], None]] = {
    "CosineNeighbors": _check_neighbours,
    "Pipeline": _check_pipeline,
    "SuffixClassifier": _check_suffix,
    "SVC": _check_svc,
    "RandomForestClassifier": _check_forest,
    "ExtraTreesClassifier": _check_forest,
    "DecisionTreeClassifier": _check_decision_tree,
    "ExtraTreeClassifier": _check_decision_tree,
    "BoostedTrees": _check_boosting,
    "GaussianSVM": _check_gaussian_svm,
    "LinearClassifier": _check_linear,
    "LinearSVM": _check_linear,
    "MLP": _check_network,
    "Ridge": _check_linear,
}
