"""Images a second and peak memory of `featcache.extract` beside what one would use otherwise.

Every contestant runs in a fresh process, on the same photographs, with random weights, to a file on
the disk, as its own documentation shows it:

- ``loop``: the plain loop. `DataLoader` over a folder, batches of 64, a forward hook that appends
  ``input[0][i].cpu().numpy()`` to a list, full forward passes, `np.save` at the end;
- ``img2vec``: img2vec-pytorch, one image at a time and in lists of 64;
- ``timm``: ``forward_features`` and pooling in a `DataLoader`, batches of 64;
- ``embetter``: its image encoder on timm's network.

Where one of them would download weights, it gets the same architecture with random ones. A rival
runs for `--seconds` at least a batch, as its speed does not depend on how many images follow; ours
runs over all of them. Its rate in the loop, from the first image to the last, and its rate from the
call to the finished file stand beside ``bare``: what the processor can do at all. That is the
torchvision network up to its pooled features and nothing else: folded, channels last, with the C
library told to keep its pages, in inference mode, on one batch of noise again and again.

``--against CHECKOUT`` runs another checkout of featcache beside this one, in turn.

Without ``--network``, or with ``--precision``, the demo's photographs follow: what a linear head
makes of MobileNetV2's features in each precision.

    python tests/benchmarks/extraction.py [--images 1000] [--network resnet50]... [--seconds 40]
    python tests/benchmarks/extraction.py --only bare --only featcache --against ../before

Needs: pip install scikit-image timm pandas
and:   pip install --no-deps img2vec-pytorch embetter diskcache
(in an environment of its own, or remove the package ``tests`` that embetter puts into
site-packages).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

PACKAGES = ("torch", "torchvision", "timm", "img2vec-pytorch", "embetter", "pillow", "numpy")
NETWORKS = ("resnet50", "mobilenet_v2", "vgg16", "vit_b_16")
LAYERS = {"resnet50": ["avgpool"], "vgg16": ["avgpool:mean"]}
IN_TIMM = {
    "resnet50": "resnet50",
    "mobilenet_v2": "mobilenetv2_100",
    "vgg16": "vgg16",
    "vit_b_16": "vit_base_patch16_224",
}
HOOKED = {"resnet50": "fc", "mobilenet_v2": "classifier", "vgg16": "avgpool", "vit_b_16": "heads"}
BATCH = 64
ROOT = Path(__file__).parents[2]

Speed = dict[str, Any]


# --- contestants, each in a process of its own ----------------------------------------------------


def measured(batches: Iterator[tuple[int, Any]], seconds: float, save: Callable[[], Any]) -> Speed:
    """Run until `seconds` are over or the images are."""
    started, count = time.perf_counter(), 0
    for size, _ in batches:
        count += size
        if time.perf_counter() - started > seconds:
            break
    save()
    return {"images": count, "seconds": time.perf_counter() - started}


def loop(folder: str, network: str, seconds: float, out: str) -> Speed:
    """Run the plain loop."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.models import get_model, get_model_weights

    model = get_model(network, weights=None).eval()
    transform = next(iter(get_model_weights(network))).transforms()
    loader = DataLoader(ImageFolder(folder, transform), batch_size=BATCH, num_workers=2)
    features: list[np.ndarray] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        for i in range(len(inputs[0])):
            features.append(inputs[0][i].cpu().numpy())

    model.get_submodule(HOOKED[network]).register_forward_hook(hook)

    def batches() -> Iterator[tuple[int, Any]]:
        with torch.no_grad():
            for images, _ in loader:
                yield len(images), model(images)

    return measured(batches(), seconds, lambda: np.save(out, np.stack(features)))


def timm(folder: str, network: str, seconds: float, out: str) -> Speed:
    """Run timm's forward_features in a DataLoader."""
    import timm
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    model = timm.create_model(IN_TIMM[network], pretrained=False, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    loader = DataLoader(ImageFolder(folder, transform), batch_size=BATCH, num_workers=2)
    features: list[np.ndarray] = []

    def batches() -> Iterator[tuple[int, Any]]:
        with torch.no_grad():
            for images, _ in loader:
                maps = model.forward_features(images)
                features.append(model.forward_head(maps, pre_logits=True).numpy())
                yield len(images), None

    return measured(batches(), seconds, lambda: np.save(out, np.concatenate(features)))


def embetter(folder: str, network: str, seconds: float, out: str) -> Speed:
    """Run embetter's ImageLoader and TimmEncoder, a hundred images a call."""
    import timm

    create = timm.create_model
    timm.create_model = lambda name, pretrained, **options: create(name, **options)
    from embetter.vision import ImageLoader, TimmEncoder

    encoder = TimmEncoder(IN_TIMM[network])
    encoder.model.eval()
    paths, features = files(folder), []

    def batches() -> Iterator[tuple[int, Any]]:
        for start in range(0, len(paths), 20):
            part = paths[start : start + 20]
            features.append(encoder.transform(ImageLoader().fit(part).transform(part)))
            yield len(part), None

    return measured(batches(), seconds, lambda: np.save(out, np.concatenate(features)))


def img2vec(folder: str, network: str, seconds: float, out: str, *, size: int = 1) -> Speed:
    """Run Img2Vec.get_vec on PIL images, one by one or in lists."""
    import img2vec_pytorch.img_to_vec as package
    from PIL import Image
    from torchvision.models import get_model

    setattr(package, network, lambda weights: get_model(network, weights=None))
    encoder = package.Img2Vec(model=network, layer_output_size=2048)
    paths, features = files(folder), []

    def batches() -> Iterator[tuple[int, Any]]:
        for start in range(0, len(paths), size):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + size]]
            features.append(encoder.get_vec(images[0] if size == 1 else images))
            yield len(images), None

    return measured(batches(), seconds, lambda: np.save(out, np.vstack(features)))


def bare(folder: str, network: str, seconds: float, out: str, *, precision: str) -> Speed:
    """Run the network alone, tuned by what torch and the C library offer everybody."""
    import ctypes

    import torch
    from torch.fx.experimental.optimization import fuse
    from torchvision.models import get_model

    library = ctypes.CDLL(None)
    library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    library.mallopt(-3, 2**31 - 1) or library.mallopt(-4, 0)  # M_MMAP_THRESHOLD, M_MMAP_MAX
    model = get_model(network, weights=None).eval()
    head = {"resnet50": "fc", "vit_b_16": "heads"}.get(network, "classifier")
    model.set_submodule(head, torch.nn.Identity())
    if network != "vit_b_16":
        model = fuse(model)
    dtype = getattr(torch, precision)
    model = model.to(dtype=dtype, memory_format=torch.channels_last)
    batch = torch.rand(8, 3, 224, 224, dtype=dtype).to(memory_format=torch.channels_last)
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            model(batch)
        while sum(times) < seconds:
            before = time.perf_counter()
            model(batch)
            times.append(time.perf_counter() - before)
    return {"images": len(batch), "seconds": float(np.median(times))}


def ours(folder: str, network: str, seconds: float, out: str, *, precision: str) -> Speed:
    """Run `featcache.extract`."""
    import featcache as fc

    # The first release had one constructor for each family of networks.
    backbone_of = getattr(fc.Backbone, "from_torchvision", fc.Backbone)
    backbone = backbone_of(network, weights=None, layers=LAYERS.get(network))
    _ = backbone.module  # as for the others: a network in memory is what is started from
    images = fc.ImageSet.from_folder(folder)
    started = time.perf_counter()
    store = fc.extract(
        images, backbone, f"{out}.h5", device="cpu", precision=precision, compile=False
    )
    spent = time.perf_counter() - started
    summary = store.extraction
    return {
        "images": len(images),
        "seconds": spent,
        "peak": peak(),
        "loop": len(images) / summary.seconds["loop"],
        "error": 0.0 if backbone_of != fc.Backbone else relative_error(store, backbone, images),
        "parts": summary.seconds,
        "bottleneck": summary.bottleneck,
        "settings": summary.settings,
    }


def relative_error(store: Any, backbone: Any, images: Any, count: int = 8) -> float:
    """Compare with the plainest hook loop: the largest difference over the largest feature."""
    import torch

    from featcache.networks.taps import Tapped

    worst = 0.0
    features = {tap: store.load(tap)[0] for tap in store.taps}
    for i in range(count):
        pixels = torch.from_numpy(backbone.preprocessing(images.read(i))[None])
        with torch.no_grad():
            plain = Tapped(backbone.module, backbone.points)(
                backbone.preprocessing.normalize(pixels)
            )
        for tap, value in plain.items():
            expected = value[0].numpy()
            difference = np.abs(features[tap][i] - expected).max() / np.abs(expected).max()
            worst = max(worst, float(difference))
    return worst


CONTESTANTS: dict[str, Callable[..., Speed]] = {
    "bare": lambda *args: bare(*args, precision="float32"),
    "bare, bfloat16": lambda *args: bare(*args, precision="bfloat16"),
    "loop": loop,
    "timm": timm,
    "embetter": embetter,
    "img2vec": img2vec,
    "img2vec, lists": lambda *args: img2vec(*args, size=BATCH),
    "featcache": lambda *args: ours(*args, precision="float32"),
    "featcache, bfloat16": lambda *args: ours(*args, precision="bfloat16"),
}


def files(folder: str) -> list[str]:
    """Return the photographs' paths."""
    return sorted(str(path) for path in Path(folder).rglob("*.jpg"))


def peak() -> float:
    """Return the largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def precisions(folder: Path) -> None:
    """Train a linear head on the demo's features in each precision, on the same split and folds."""
    import featcache as fc

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from pipelines.demo import demo_images

    images = demo_images(folder)
    backbone = fc.Backbone("mobilenet_v2")
    features = {}
    for precision in ("float32", "bfloat16"):
        path = folder / f"{precision}.h5"
        store = fc.extract(images, backbone, path, device="cpu", precision=precision)
        fit, test = store.split(test_size=0.25, random_state=0)
        board = fc.train(fit, test, head=["linear"]).leaderboard
        row = board.rows[0]
        features[precision] = store.load()[0]
        print(
            f"demo, {precision:8s}  linear head: out of fold {row.cv.accuracy}, "
            f"held out {row.held_out.accuracy}",
            flush=True,
        )
    plain, rounded = features.values()
    error = np.linalg.norm(rounded - plain, axis=1) / np.linalg.norm(plain, axis=1)
    print(f"demo, relative error of a row: median {np.median(error):.2%}, worst {error.max():.2%}")


def computes_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 faster than float32."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# --- the run --------------------------------------------------------------------------------------


def contest(
    name: str, folder: Path, network: str, seconds: float, checkout: Path = ROOT
) -> Speed | None:
    """Run one contestant in a fresh process; None if it has no such network."""
    if name.startswith("img2vec") and network != "resnet50":
        return None  # it knows neither mobilenet_v2 nor vit_b_16, and means vgg16_bn by vgg16
    # Nobody gets settings from the environment that its user would have to know.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "OPENBLAS_", "MKL_"))}
    clean["PYTHONPATH"] = str(checkout.resolve())
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--contestant", name, "--folder", str(folder)]
        command += ["--network", network, "--seconds", str(seconds), "--out", f"{out}/features"]
        done = subprocess.run(command, env=clean, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        print(f"{network:14s} {name:22s} failed: {lines[-1]}", flush=True)
        return None
    result: Speed = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def show(network: str, name: str, result: Speed, best: float, limit: float) -> None:
    """Print one line."""
    speed = result["images"] / result["seconds"]
    line = f"{network:14s} {name:22s} {speed:7.1f} images/s  {result['peak']:6.0f} MB"
    if "loop" in result:
        line += f"  {speed / best:4.1f} x" if best else ""
        line += f"  in the loop {result['loop']:.1f}/s"
        line += f" = {result['loop'] / limit:.1%} of the bare pass" if limit else ""
        line += f"  error {result['error']:.1e}" if result["error"] else ""
    print(line, flush=True)


def main() -> None:
    """Run all contestants on all networks, interleaved, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--network", action="append", choices=NETWORKS)
    parser.add_argument("--only", action="append", choices=list(CONTESTANTS))
    parser.add_argument("--seconds", type=float, default=40.0, help="for each rival")
    parser.add_argument("--folder", type=Path, help="photographs that are there already")
    parser.add_argument("--precision", action="store_true", help="the demo in each precision only")
    parser.add_argument("--against", type=Path, help="another checkout of featcache")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        result = CONTESTANTS[options.contestant](
            str(options.folder), options.network[0], options.seconds, options.out
        )
        print(json.dumps({"peak": peak(), **result}))
        return
    described = machine(*PACKAGES)
    print(described, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        if options.precision:
            precisions(Path(temporary))
            return
        from photographs import make

        folder = make(options.folder or Path(temporary), options.images)
        results: dict[str, dict[str, Speed]] = {}
        for network in options.network or NETWORKS:
            best, limits = 0.0, {}
            for name in options.only or CONTESTANTS:
                if "bfloat16" in name and not computes_bfloat16():
                    continue
                checkouts = {name: ROOT}
                if options.against and name.startswith("featcache"):
                    checkouts |= {name.replace("featcache", options.against.name): options.against}
                for shown, checkout in checkouts.items():
                    result = contest(name, folder, network, options.seconds, checkout)
                    if result is None:
                        continue
                    rate = result["images"] / result["seconds"]
                    show(network, shown, result, best, limits.get("bfloat16" in name, 0.0))
                    results.setdefault(network, {})[shown] = result
                    if name.startswith("bare"):
                        limits["bfloat16" in name] = rate
                    elif checkouts.keys() == {name} and not name.startswith("featcache"):
                        best = max(best, rate)
        if not options.network:
            precisions(Path(temporary))
    if options.json:
        options.json.write_text(json.dumps({"machine": described, "results": results}, indent=1))


if __name__ == "__main__":
    main()
