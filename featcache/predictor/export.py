"""`export_model`: network and head as one file for serving, ``.onnx`` or ``.pt2``.

The model's one input, ``images``, is a uint8 array (b, c, h, w) of decoded, resized and cropped
images; normalisation is inside, so that it cannot be done twice or differently. Its one output,
``probabilities``, has the shape (b, k); the label is the highest of their logarithms less
``calibration.bias``. Class names and the preprocessing that must come before
are written into the file (ONNX: ``metadata_props``, .pt2: the extra file ``featcache.json``).
"""

from __future__ import annotations

import importlib.util
import io
import json
import mmap
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy.special import softmax
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from featcache.errors import MissingExtra, PredictorError
from featcache.pixels.preprocessing import Preprocessing
from featcache.predictor.grafting import canary_logits, check_same
from featcache.system.defaults import library_defaults
from featcache.system.files import check_overwrite, replacing
from featcache.version import __version__

if TYPE_CHECKING:
    from featcache.predictor.predictor import Predictor

__all__ = ["METADATA", "export_model"]

METADATA = "featcache.json"
_KEY = "featcache"


@library_defaults()
def export_model(predictor: Predictor, path: str | Path, *, force: bool = False) -> None:
    """Write the whole network of a predictor to one file.

    Parameters
    ----------
    predictor : Predictor
        With a head made of layers, see `Predictor.to_torch`.
    path : path
        Ending in ``.onnx`` (for onnxruntime and others) or ``.pt2`` (for ``torch.export.load``).
        Replaced if it is such a model.
    force : bool
        Replace a file of any kind.

    Raises
    ------
    PredictorError
        Another ending, a head that is not made of layers, a network that cannot be exported, or
        one that then gives the canary images other probabilities than the predictor.
    OutputError
        The path holds something else, or cannot be written.
    MissingExtra
        A package that writes ONNX is not installed.
    """
    target = Path(path)
    if target.suffix not in (".onnx", ".pt2"):
        raise PredictorError(f"A model is exported to .onnx or .pt2, not to {target.name!r}.")
    if target.suffix == ".onnx":
        _require_onnx()
    what = "a model that featcache exported"
    check_overwrite(target, _is_model, what, force=force)
    grafted = predictor.to_torch()
    preprocessing = Preprocessing.from_dict(predictor.fingerprints[0].preprocessing)
    program = _program(_Served(grafted, preprocessing), preprocessing.output_shape)
    metadata = json.dumps(_metadata(predictor), ensure_ascii=False)
    pixels, logits = canary_logits(
        predictor._backbones(), predictor.columns, predictor.estimator, predictor.calibration
    )
    if target.suffix == ".pt2":
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={METADATA: metadata})
        found = program.module()(pixels).detach().numpy()
        content = buffer.getvalue()
    else:
        from onnxruntime import InferenceSession

        content = _onnx(program, metadata)
        session = InferenceSession(content, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"images": pixels.numpy()})
    check_same(found, softmax(logits, axis=1), f"the {target.suffix} file")
    with replacing(target, _is_model, what, force=force) as file:  # it may be there by now
        file.write(content)


class _Served(nn.Module):
    """A grafted network with the normalisation of its input inside."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities (b, k) for uint8 images (b, c, h, w)."""
        # The program is for rows of pixels that lie as the example's do; `Preprocessing` gives
        # images whose channels lie side by side. `contiguous` would be left out of the program.
        images = images.clone(memory_format=torch.contiguous_format)
        probabilities: Tensor = self.network(self.preprocessing.normalize(images))
        return probabilities


def _program(module: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
    """Export a module for any number of images, without what does not serve its output."""
    example = torch.zeros((2, *shape), dtype=torch.uint8)
    try:
        program = torch.export.export(
            module.eval(), (example,), dynamic_shapes={"images": {0: Dim("batch")}}
        )
        return _pruned(program.run_decompositions({}))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise PredictorError(
            f"torch.export cannot export this network: {' '.join(str(error).split())[:300]}"
        ) from error


def _pruned(program: ExportedProgram) -> ExportedProgram:
    """Drop the layers behind the last tap, and weights that nothing uses.

    They would be most of the file for networks with large classifiers.
    """
    program.graph.eliminate_dead_code()
    unused = [n for n in program.graph.nodes if n.op == "placeholder" and not n.users]
    names = {node.name for node in unused}
    for node in unused:
        program.graph.erase_node(node)
    specs = program.graph_signature.input_specs
    for spec in specs:
        if spec.arg.name in names and spec.target is not None:
            program.state_dict.pop(spec.target, None)
    specs[:] = [spec for spec in specs if spec.arg.name not in names]
    program.graph_module.recompile()
    program.validate()  # type: ignore[no-untyped-call]
    return program


def _metadata(predictor: Predictor) -> dict[str, Any]:
    """Return what a server must know."""
    return {
        "featcache": __version__,
        "classes": list(predictor.classes),
        "head": predictor.head,
        "calibration": asdict(predictor.calibration),
        "label": "argmax of log(probabilities) - calibration.bias; not always the most probable",
        "input": "images: uint8 (batch, channels, height, width), decoded, resized and cropped",
        "preprocessing": dict(predictor.fingerprints[0].preprocessing),
        "fingerprints": [one.to_dict() for one in predictor.fingerprints],
    }


def _require_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "export", "Writing ONNX")


def _onnx(program: ExportedProgram, metadata: str) -> bytes:
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities"],
        verbose=False,
    )
    if exported is None:
        raise PredictorError("torch.onnx.export returned nothing.")
    exported.model.metadata_props[_KEY] = metadata
    content: bytes = exported.model_proto.SerializeToString()
    return content


def _is_model(path: Path) -> bool:
    """Return whether a file is a model that `export_model` wrote."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(METADATA) for name in archive.namelist())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return path.suffix == ".onnx" and content.find(b'{"featcache": "') >= 0
