from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    ExtraTreesClassifier,
    RandomForestClassifier,
)
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, PowerTransformer, StandardScaler
from sklearn.svm import SVC, LinearSVC

from featcache.errors import PredictorError
from featcache.heads.linear import LinearClassifier
from featcache.heads.mlp import MLP
from featcache.heads.neighbors import CosineNeighbors
from featcache.heads.ridge import Ridge
from featcache.heads.search import logits
from featcache.heads.svm import GaussianSVM, LinearSVM
from featcache.heads.table import HEADS as HEAD_KINDS
from featcache.heads.treatment import SignedPower
from featcache.heads.trees import BoostedTrees
from featcache.predictor import persistence
from featcache.store.splitting import folds

Members = dict[str, bytes]


def data(n_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = np.arange(150) % n_classes
    X = rng.normal(size=(150, 6)) + codes[:, None]
    return X.astype(np.float32), np.array(["ant", "bee", "cod"])[codes]


def scores(head: Any, X: np.ndarray) -> np.ndarray:
    method = "decision_function" if hasattr(head, "decision_function") else "predict_proba"
    return np.asarray(getattr(head, method)(X))


HEADS: dict[str, Callable[[], Any]] = {
    "svc": lambda: make_pipeline(StandardScaler(), SVC(break_ties=True)),
    "svm": lambda: make_pipeline(Normalizer(), Nystroem(n_components=8), LinearSVC()),
    "linear": lambda: make_pipeline(
        PowerTransformer(), PCA(3), LogisticRegression(class_weight={"ant": 1.0, "bee": 2.0})
    ),
    "ridge": RidgeClassifier,
    "forest": lambda: RandomForestClassifier(5, n_jobs=2, random_state=0),
    "extra": lambda: ExtraTreesClassifier(5, random_state=0),
    "boosting": lambda: BoostedTrees(n_rounds=4, min_samples_leaf=3, engine="sklearn"),
    "own-linear": lambda: make_pipeline(SignedPower(), LinearClassifier()),
    "own-svm": lambda: LinearSVM(class_weight="balanced"),
    "own-rbf": lambda: make_pipeline(StandardScaler(), GaussianSVM(10.0)),
    "own-ridge": Ridge,
    "own-mlp": lambda: MLP(hidden=5, max_epochs=3),
    "own-neighbours": lambda: CosineNeighbors(5),
}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Return a file of each kind of head, trained on three classes."""
    X, y = data()
    return {name: persistence.dump(make().fit(X, y)) for name, make in HEADS.items()}


def members_of(file: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: Members, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def nodes_of(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every node of a schema."""
    if isinstance(node, dict):
        if "__loader__" in node:
            yield node
        for value in node.values():
            yield from nodes_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from nodes_of(value)


def edited(file: bytes, edit: Callable[[dict[str, Any], Members], None]) -> bytes:
    """Return the file with its schema and members changed in place by `edit`."""
    members = members_of(file)
    schema = json.loads(members["schema.json"])
    edit(schema, members)
    members["schema.json"] = json.dumps(schema).encode()
    return zipped(members)


def state_of(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the attributes of the first object of class `name`."""
    found = next(node for node in nodes_of(schema) if node["__class__"] == name)
    content: dict[str, Any] = found["content"]["content"]
    return content


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def change(members: Members, node: dict[str, Any], edit: Callable[[np.ndarray], Any]) -> None:
    """Change the array of a node."""
    array = np.load(io.BytesIO(members[node["file"]]))
    changed = edit(array)
    members[node["file"]] = npy(array if changed is None else changed)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_comes_back_as_it_was(name: str, n_classes: int) -> None:
    X, y = data(n_classes)
    head = HEADS[name]().fit(X, y)
    back = persistence.load(persistence.dump(head))
    assert type(back) is type(head)
    assert back.classes_.tolist() == head.classes_.tolist()
    assert back.n_features_in_ == 6
    np.testing.assert_array_equal(scores(back, X), scores(head, X))


def test_the_file_is_plain_skops(files: dict[str, bytes]) -> None:
    back = skops.io.loads(files["forest"], trusted=["sklearn.tree._tree.Tree"])
    X, _ = data()
    np.testing.assert_array_equal(scores(back, X), scores(persistence.load(files["forest"]), X))


@pytest.mark.parametrize("name", HEAD_KINDS)
def test_whatever_a_search_finds_can_be_kept(name: str) -> None:
    X, y = data()
    found = HEAD_KINDS[name].search(X, y, folds(y, cv=2))
    back = persistence.load(persistence.dump(found.estimator))
    np.testing.assert_array_equal(logits(back, X), logits(found.estimator, X))


def test_types_that_are_not_on_the_list_are_refused_when_saving() -> None:
    X, y = data()
    with pytest.raises(PredictorError, match="GaussianProcessClassifier is not among the types"):
        persistence.dump(GaussianProcessClassifier().fit(X[:30], y[:30]))


def test_objects_of_scikit_learn_intelex_never_reach_a_file() -> None:
    svm = pytest.importorskip("sklearnex.svm", reason="pip install 'featcache[fast]'")
    X, y = data()
    head = make_pipeline(StandardScaler(), svm.SVC().fit(X, y))
    with pytest.raises(PredictorError, match=r"sklearnex.* is not among the types"):
        persistence.dump(head)


def test_loading_imports_and_calls_nothing_that_the_file_names(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "hostile.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nclass StandardScaler: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    evil = [
        {"__class__": "StandardScaler", "__module__": "hostile", "__loader__": "ObjectNode"},
        {"__class__": "StandardScaler", "__module__": "hostile", "__loader__": "FunctionNode"},
        {"__class__": "StandardScaler", "__module__": "hostile", "__loader__": "TypeNode"},
        {"__class__": "StandardScaler", "__module__": "hostile", "__loader__": "TreeNode"},
        {"__class__": "system", "__module__": "os", "__loader__": "FunctionNode"},
        {
            "__class__": "methodcaller",
            "__module__": "operator",
            "__loader__": "OperatorFuncNode",
            "attrs": {"__class__": "tuple", "__loader__": "TupleNode", "content": []},
        },
        {
            "__class__": "StandardScaler",
            "__module__": "hostile",
            "__loader__": "ConstructorFromReduceNode",
            "content": {"__class__": "tuple", "__loader__": "TupleNode", "content": []},
        },
        {"__class__": "partial", "__module__": "functools", "__loader__": "PartialNode"},
        {"__class__": "SVC", "__module__": "sklearn.svm._classes", "__loader__": "MethodNode"},
        {"__loader__": "CachedNode", "__id__": 1},
    ]
    for node in evil:

        def put(schema: dict[str, Any], members: Members, node: Any = node) -> None:
            state_of(schema, "StandardScaler")["scale_"] = node

        with pytest.raises(PredictorError):
            persistence.load(edited(files["svc"], put))
    assert "hostile" not in sys.modules
    assert not mark.exists()


def test_an_attribute_may_not_hide_a_method(files: dict[str, bytes]) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        state_of(schema, "SVC")["_impl"] = {"__loader__": "JsonNode", "content": '"epsilon_svr"'}
        node = next(n for n in nodes_of(schema) if n["__class__"] == "SVC")
        node["content"]["key_types"]["content"].append({"__class__": "str"})

    with pytest.raises(PredictorError, match="may not have an attribute '_impl'"):
        persistence.load(edited(files["svc"], put))


def test_a_pipeline_may_not_bring_a_cache_folder(files: dict[str, bytes]) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        state_of(schema, "Pipeline")["memory"] = {"__loader__": "JsonNode", "content": '"/tmp/x"'}

    with pytest.raises(PredictorError, match="cache on disk"):
        persistence.load(edited(files["svc"], put))


def test_a_file_does_not_decide_how_many_threads_start(files: dict[str, bytes]) -> None:
    assert persistence.load(files["forest"]).n_jobs is None


TREE_EDITS: dict[str, Callable[[np.ndarray], Any]] = {
    "child does not exist": lambda nodes: nodes["right_child"].__setitem__(0, len(nodes)),
    "child is negative": lambda nodes: nodes["right_child"].__setitem__(0, -2),
    "child is its parent": lambda nodes: nodes["left_child"].__setitem__(1, 0),
    "child is itself": lambda nodes: nodes["left_child"].__setitem__(0, 0),
    "feature does not exist": lambda nodes: nodes["feature"].__setitem__(0, 6),
    "feature is negative": lambda nodes: nodes["feature"].__setitem__(0, -2),
    "nodes are missing": lambda nodes: nodes[:-1].copy(),
    "nodes are none": lambda nodes: nodes[:0].copy(),
    "nodes are numbers": lambda nodes: np.zeros(len(nodes)),
    "nodes are in a table": lambda nodes: nodes[None].copy(),
}


@pytest.mark.parametrize("kind", ["forest", "extra"])
@pytest.mark.parametrize("what", TREE_EDITS)
def test_a_broken_tree_is_refused(files: dict[str, bytes], kind: str, what: str) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        tree = next(n for n in nodes_of(schema) if n["__loader__"] == "TreeNode")
        change(members, tree["content"]["content"]["nodes"], TREE_EDITS[what])

    with pytest.raises(PredictorError, match="tree"):
        persistence.load(edited(files[kind], put))


@pytest.mark.parametrize(
    ("index", "value"), [(0, 2**40), (0, 7), (0, -1), (2, 2), (2, 2**62), (0, "6")]
)
def test_a_tree_of_another_size_is_refused(files: dict[str, bytes], index: int, value: Any) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        tree = next(n for n in nodes_of(schema) if n["__loader__"] == "TreeNode")
        tree["__reduce__"]["args"]["content"][index]["content"] = json.dumps(value)

    with pytest.raises(PredictorError, match="tree"):
        persistence.load(edited(files["forest"], put))


@pytest.mark.parametrize("count", [0, 10**6, -1, "3", None])
def test_a_tree_that_claims_more_nodes_is_refused(files: dict[str, bytes], count: Any) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        tree = next(n for n in nodes_of(schema) if n["__loader__"] == "TreeNode")
        tree["content"]["content"]["node_count"]["content"] = json.dumps(count)

    with pytest.raises(PredictorError, match="a tree's node count"):
        persistence.load(edited(files["forest"], put))


def test_a_tree_of_several_class_counts_is_refused(files: dict[str, bytes]) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        tree = next(n for n in nodes_of(schema) if n["__loader__"] == "TreeNode")
        change(members, tree["__reduce__"]["args"]["content"][1], lambda n: np.repeat(n, 3))

    with pytest.raises(PredictorError, match="a tree's classes"):
        persistence.load(edited(files["forest"], put))


@pytest.mark.parametrize("kind", ["forest", "tree"])
def test_a_tree_gets_as_many_features_as_it_splits_on(files: dict[str, bytes], kind: str) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        # What scikit-learn checks the width of X against, before compiled code trusts it.
        name = {"forest": "RandomForestClassifier", "tree": "DecisionTreeClassifier"}[kind]
        found = [n for n in nodes_of(schema) if n["__class__"] == name]
        content = next(n for n in found if "n_features_in_" in n["content"]["content"])
        content["content"]["content"]["n_features_in_"]["content"] = "2"

    with pytest.raises(PredictorError, match="a tree's number of features"):
        persistence.load(edited(files["forest"], put))


@pytest.mark.parametrize("kernel", ['"precomputed"', '"other"', "null"])
def test_an_svm_of_another_kernel_is_refused(files: dict[str, bytes], kernel: str) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        state_of(schema, "SVC")["kernel"]["content"] = kernel

    with pytest.raises(PredictorError, match="an SVM's kernel"):
        persistence.load(edited(files["svc"], put))


def test_a_tree_of_another_number_of_classes_is_refused(files: dict[str, bytes]) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        tree = next(n for n in nodes_of(schema) if n["__loader__"] == "TreeNode")
        change(members, tree["content"]["content"]["values"], lambda v: v[:, :, :2].copy())
        change(members, tree["__reduce__"]["args"]["content"][1], lambda n: n - 1)

    with pytest.raises(PredictorError, match="a tree's classes"):
        persistence.load(edited(files["forest"], put))


BOOSTING_EDITS: dict[str, tuple[str, Callable[[np.ndarray], Any]]] = {
    "child does not exist": ("right_", lambda a: a.__setitem__(0, len(a))),
    "child is negative": ("left_", lambda a: a.__setitem__(0, -1)),
    "child stands before": ("left_", lambda a: a.__setitem__(5, 0)),
    "half a leaf": ("left_", lambda a: a.__setitem__(slice(None), np.arange(len(a)))),
    "component does not exist": ("feature_", lambda a: a.__setitem__(0, 99)),
    "component is negative": ("feature_", lambda a: a.__setitem__(0, -1)),
    "root does not exist": ("roots_", lambda a: a + 10**6),
    "root is negative": ("roots_", lambda a: a.__setitem__((0, 0), -1)),
    "fewer thresholds": ("threshold_", lambda a: a[:-1].copy()),
    "fewer values": ("value_", lambda a: a[:-1].copy()),
    "fewer children": ("left_", lambda a: a[:-1].copy()),
    "children are numbers": ("right_", lambda a: a.astype(float)),
    "roots of one class": ("roots_", lambda a: a[:, :1].copy()),
    "roots in a row": ("roots_", lambda a: a.ravel()),
}


@pytest.mark.parametrize("what", BOOSTING_EDITS)
def test_a_broken_boosting_is_refused(files: dict[str, bytes], what: str) -> None:
    name, edit = BOOSTING_EDITS[what]

    def put(schema: dict[str, Any], members: Members) -> None:
        change(members, state_of(schema, "BoostedTrees")[name], edit)

    with pytest.raises(PredictorError, match="tree"):
        persistence.load(edited(files["boosting"], put))


SHAPE_EDITS: dict[str, tuple[str, str, str, Callable[[np.ndarray], Any]]] = {
    "fewer components": ("boosting", "BoostedTrees", "components_", lambda a: a[:, :3].copy()),
    "another mean": ("boosting", "BoostedTrees", "mean_", lambda a: a[:2].copy()),
    "a longer baseline": ("boosting", "BoostedTrees", "baseline_", lambda a: np.repeat(a, 2)),
    "texts": ("boosting", "BoostedTrees", "value_", lambda a: a.astype("U8")),
    "narrow weights": ("own-svm", "LinearSVM", "coef_", lambda a: a[:, :2].copy()),
    "one intercept": ("own-linear", "LinearClassifier", "intercept_", lambda a: a[:1].copy()),
    "a vector": ("own-ridge", "Ridge", "coef_", lambda a: a[0].copy()),
    "fewer vectors": ("own-rbf", "GaussianSVM", "support_vectors_", lambda a: a[:3].copy()),
    "narrow vectors": ("own-rbf", "GaussianSVM", "support_vectors_", lambda a: a[:, :2].copy()),
    "other coefficients": ("own-rbf", "GaussianSVM", "dual_coef_", lambda a: a[:1].copy()),
    "other counts": ("own-rbf", "GaussianSVM", "n_support_", lambda a: a * 1000),
    "negative counts": ("own-rbf", "GaussianSVM", "n_support_", lambda a: a * [-1, 1, 1]),
    "narrow neighbours": ("own-neighbours", "CosineNeighbors", "rows_", lambda a: a[:, :2].copy()),
    "no neighbours": ("own-neighbours", "CosineNeighbors", "rows_", lambda a: a[:0].copy()),
    "weights of none": ("own-neighbours", "CosineNeighbors", "weights_", lambda a: a * 0),
    "negative weights": ("own-neighbours", "CosineNeighbors", "weights_", lambda a: -a),
}


@pytest.mark.parametrize("what", SHAPE_EDITS)
def test_arrays_that_do_not_fit_are_refused(files: dict[str, bytes], what: str) -> None:
    file, kind, name, edit = SHAPE_EDITS[what]

    def put(schema: dict[str, Any], members: Members) -> None:
        change(members, state_of(schema, kind)[name], edit)

    with pytest.raises(PredictorError, match=r"damaged: (the|an|a) "):
        persistence.load(edited(files[file], put))


@pytest.mark.parametrize("number", range(4))
def test_layers_that_do_not_fit_are_refused(files: dict[str, bytes], number: int) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        state = state_of(schema, "MLP")
        layers = [*state["coefs_"]["content"], *state["intercepts_"]["content"]]
        change(members, layers[number], lambda array: array[:-1].copy())

    with pytest.raises(PredictorError, match="network's layers"):
        persistence.load(edited(files["own-mlp"], put))


SVC_EDITS: dict[str, tuple[str, Callable[[np.ndarray], Any]]] = {
    "counts beyond the vectors": ("_n_support", lambda n: n * 1000),
    "negative counts": ("_n_support", lambda n: n * [-1, 1, 1]),
    "fewer vectors": ("support_vectors_", lambda v: v[:3].copy()),
    "no vectors": ("support_vectors_", lambda v: v[:0].copy()),
    "narrower vectors": ("support_vectors_", lambda v: v[:, :2].copy()),
    "fewer coefficients": ("_dual_coef_", lambda c: c[:, :2].copy()),
    "fewer intercepts": ("_intercept_", lambda i: i[:1].copy()),
    "another dtype": ("_intercept_", lambda i: i.astype(np.float32)),
    "column order": ("support_vectors_", lambda v: np.asfortranarray(v)),
    "probabilities": ("_probA", lambda p: np.zeros(1)),
}


@pytest.mark.parametrize("what", SVC_EDITS)
def test_a_broken_svm_is_refused(files: dict[str, bytes], what: str) -> None:
    name, edit = SVC_EDITS[what]

    def put(schema: dict[str, Any], members: Members) -> None:
        change(members, state_of(schema, "SVC")[name], edit)

    with pytest.raises(PredictorError, match="an SVM's"):
        persistence.load(edited(files["svc"], put))


@pytest.mark.parametrize("codes", [10**9, -1, 3])
def test_a_neighbour_of_no_class_is_refused(files: dict[str, bytes], codes: int) -> None:
    def put(schema: dict[str, Any], members: Members) -> None:
        node = state_of(schema, "CosineNeighbors")["codes_"]
        change(members, node, lambda array: array.__setitem__(0, codes))

    with pytest.raises(PredictorError, match="a neighbour's class"):
        persistence.load(edited(files["own-neighbours"], put))


def test_a_zip_bomb_is_refused_before_it_is_inflated() -> None:
    bomb = zipped({"schema.json": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 60_000
    with pytest.raises(PredictorError, match="compressed"):
        persistence.load(bomb)


def test_members_larger_than_the_file_are_refused(files: dict[str, bytes]) -> None:
    file = bytearray(files["ridge"])
    entry = file.rfind(b"PK\x01\x02")
    file[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    with pytest.raises(PredictorError, match="larger than the file"):
        persistence.load(bytes(file))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("schema.json", "{}")
        archive.writestr("schema.json", "{}")
    with pytest.raises(PredictorError, match="same name"):
        persistence.load(buffer.getvalue())


@pytest.mark.parametrize(
    "schema",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"protocol": 2}',
        b'{"protocol": 99, "__loader__": "JsonNode", "content": "1"}',
        b'{"protocol": true, "__loader__": "JsonNode", "content": "1"}',
        b'{"protocol": 2, "__loader__": ["JsonNode"]}',
        b'{"protocol": 2, "__loader__": "JsonNode", "content": "[1]"}',
        b'{"protocol": 2, "__loader__": "JsonNode", "content": 5}',
        b'{"protocol": 2, "__loader__": "NdArrayNode", "type": "numpy", "file": "../x"}',
        b'{"protocol": 2, "__loader__": "ListNode", "content": {"a": 1}}',
        b"[" * 100_000,
        b'{"protocol": 2, "content": ' + b"9" * 10_000 + b"}",
    ],
)
def test_schemas_that_are_none(schema: bytes) -> None:
    with pytest.raises(PredictorError):
        persistence.load(zipped({"schema.json": schema}))


def test_a_tree_of_objects_without_end_is_refused() -> None:
    node: dict[str, Any] = {"__loader__": "ListNode", "content": []}
    schema = node
    for _ in range(200):
        schema = {"__loader__": "ListNode", "content": [schema]}
    with pytest.raises(PredictorError, match="too deep"):
        persistence.load(zipped({"schema.json": json.dumps(schema | {"protocol": 2}).encode()}))


@pytest.mark.parametrize("cut", [0, 1, 30, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(files: dict[str, bytes], cut: float) -> None:
    file = files["svc"]
    with pytest.raises(PredictorError):
        persistence.load(file[: int(cut * len(file)) if isinstance(cut, float) else cut])


def header(descr: str, shape: str) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        header("'<f8'", "(1000000000000,)"),
        header("'<f8'", "(3,)") + bytes(16),
        header("'<f8'", "(2,)") + bytes(24),
        header("'<f8'", "(-1, -1)") + bytes(8),
        header("'<f8'", "(True,)") + bytes(8),
        header("'<f8'", "(0, 9223372036854775807)") + bytes(8),
        header("'|O'", "(1,)") + bytes(8),
        header("'|V0'", "(100,)"),
        header("__import__('os').getpid()", "(1,)") + bytes(8),
        npy(np.zeros(3))[:-1],
    ],
)
def test_arrays_that_do_not_account_for_their_bytes(file: bytes) -> None:
    with pytest.raises(PredictorError, match=r"'x\.npy'"):
        persistence.read_npz(zipped({"x.npy": file}), "arrays.npz")


def test_arrays_come_back() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "names": np.array(["é", "b"]),
        "empty": np.zeros((0, 32), np.uint8),
        "one": np.float64(3.5),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    back = persistence.read_npz(buffer.getvalue(), "arrays.npz")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == np.asarray(array).dtype


def mutate(members: Members, rng: np.random.Generator) -> None:
    """Overwrite a few bytes of one member, or swap two arrays."""
    names = sorted(members)
    name = names[rng.integers(len(names))]
    content = bytearray(members[name])
    for _ in range(rng.integers(1, 9)):
        content[rng.integers(len(content))] = rng.choice([0, 1, 127, 128, 255, 48, 57])
    members[name] = bytes(content)
    if rng.random() < 0.3:
        one, two = rng.choice(names, 2)
        members[one], members[two] = members[two], members[one]


def survive(file: bytes, rounds: int, seed: int) -> int:
    """Load mutants and predict with those that load; return how many were refused."""
    rng = np.random.default_rng(seed)
    X, _ = data()
    refused = 0
    with np.errstate(all="ignore"):
        for _ in range(rounds):
            members = members_of(file)
            mutate(members, rng)
            try:
                head = persistence.load(zipped(members))
            except PredictorError:
                refused += 1
                continue
            try:
                scores(head, X)
            except Exception:  # the Predictor turns whatever a strange head raises into its error
                refused += 1
    return refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["svc", "forest", "boosting", "linear"])
def test_mutants_raise_or_predict_but_never_crash(files: dict[str, bytes], kind: str) -> None:
    assert survive(files[kind], 40, seed=1) > 0


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HEADS)
def test_thousands_of_mutants(files: dict[str, bytes], kind: str) -> None:
    assert survive(files[kind], 5000, seed=2) > 0
