"""How networks run: settings, folding, packing, precision, padding, memory that runs out."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featcache.errors import DeviceError
from featcache.networks import faster, forward
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Runtime, Settings, select_device
from featcache.networks.taps import Tapped
from featcache.pixels.preprocessing import Preprocessing
from featcache.system.memory import reuse_memory
from tests.small import SIDE, TAP, Network, backbone, network


def pixels(n: int, seed: int = 0, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), dtype=np.uint8)


def reference(backbone: Backbone, batch: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        inputs = backbone.preprocessing.normalize(torch.from_numpy(batch))
        found = Tapped(backbone.module, backbone.points)(inputs)
    return {tap: value.numpy() for tap, value in found.items()}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# --- devices and settings -------------------------------------------------------------------------


def test_devices_are_found_by_name() -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:97", "meta", "cpu:first"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=name.split(":")[0]):
        select_device(name)


def test_a_precision_that_does_not_exist_is_refused() -> None:
    with pytest.raises(DeviceError, match="float64"):
        Runtime(backbone(), device="cpu", precision="float64")


def test_settings_survive_a_round_trip_and_refuse_those_of_another_version() -> None:
    settings = Runtime(backbone(), device="cpu", batch_size=4).settings
    assert Settings.from_dict(settings.to_dict()) == settings
    assert Settings.from_dict({**settings.to_dict(), "novelty": 1}) is None


def test_recorded_settings_are_used_again() -> None:
    recorded = Runtime(backbone(), device="cpu", batch_size=3, count=500).settings
    recorded = Settings.from_dict({**recorded.to_dict(), "folded": False, "threads": 1})
    again = Runtime(backbone(), device="cpu", settings=recorded, count=500).settings
    assert again == recorded


def test_recorded_settings_of_another_precision_are_not() -> None:
    recorded = Runtime(backbone(), device="cpu", batch_size=3).settings
    again = Runtime(backbone(), device="cpu", precision="bfloat16", settings=recorded).settings
    assert again.precision == "bfloat16"
    assert again.batch_size != 3


# --- the same features ----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["stem", "norm", "relu#2:max", "body:input", "pool", "head"])
def test_features_are_those_of_the_plain_network(layer: str) -> None:
    taken = backbone(layers=[layer])
    batch = pixels(5)
    found = Runtime(taken, device="cpu", batch_size=4)(batch)
    for tap, expected in reference(taken, batch).items():
        assert found[tap].dtype == np.float32
        assert error(found[tap], expected) < 1e-5


def test_the_backbones_own_network_is_not_touched() -> None:
    taken = backbone()
    before = {name: value.clone() for name, value in taken.module.state_dict().items()}
    strides = [value.stride() for value in taken.module.state_dict().values()]
    for precision in ("float32", "bfloat16"):
        Runtime(taken, device="cpu", precision=precision, batch_size=2)(pixels(2))
    after = taken.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [value.stride() for value in after.values()] == strides
    assert not any(part._forward_hooks for part in taken.module.modules())


def test_batch_normalisations_are_folded_but_not_where_a_tap_is() -> None:
    pairs, _ = faster.find_speed_ups(backbone())
    assert pairs == [("stem", "norm"), ("body", "norm2")]
    for layer, left in (("stem", "body"), ("norm2:input", "stem")):
        pairs, _ = faster.find_speed_ups(backbone(layers=[layer, "pool"]))
        assert [convolution for convolution, _ in pairs] == [left]


class Shared(nn.Module):
    """A convolution whose output is used before and after the normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.flatten(self.pool(self.norm(x) + x), 1)


def test_folding_that_would_change_features_is_given_up() -> None:
    taken = backbone(Shared)
    runtime = Runtime(taken, device="cpu", batch_size=4)
    assert not runtime.settings.folded
    batch = pixels(4)
    assert error(runtime(batch)[TAP], reference(taken, batch)[TAP]) < 1e-5


class Residual(nn.Module):
    """One activation module at several places, one of them after writing into its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.late = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.relu(self.left(x))
        y -= self.right(x)
        z = self.late(self.right(self.relu(y)))
        return torch.flatten(self.pool(z + self.late(x)), 1)


@pytest.mark.parametrize("layer", ["pool", "relu#3:mean", "left:mean", "late#1:mean", "stem:map"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shared_activations_change_no_features(layer: str, precision: str) -> None:
    taken = backbone(Residual, layers=[layer])
    runtime = Runtime(taken, device="cpu", precision=precision, batch_size=4)
    batch = pixels(6)
    for tap, expected in reference(taken, batch).items():
        assert error(runtime(batch)[tap], expected) < (1e-5 if precision == "float32" else 0.02)


def test_what_lies_behind_the_last_tap_is_neither_run_nor_converted() -> None:
    taken = backbone()
    options = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "channels_last": True}
    copied = faster.faster_copy(taken, fold=[], pack=[], **options)
    kept = {id(p) for p in taken.module.parameters()}
    assert {id(p) for p in copied.head.parameters()} <= kept
    assert id(copied.stem.weight) not in kept


class Tokens(nn.Module):
    """A small transformer encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, stride=8)
        self.norm = nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Return whether this processor and this torch can multiply such matrices by oneDNN."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(8, 8, dtype=dtype))
    except (AttributeError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_matrix_products_by_onednn_give_the_same_features(
    packed: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "products_pay", lambda *_: packed)
    taken = backbone(Tokens, layers=["mlp.0:input:mean", "head:input"])
    runtime = Runtime(taken, device="cpu", precision=precision, batch_size=4)
    possible = onednn_multiplies(torch.float32 if precision == "float32" else torch.bfloat16)
    assert runtime.settings.packed_products == (packed and possible)
    batch = pixels(6)
    found = runtime(batch)
    for tap, expected in reference(taken, batch).items():
        assert error(found[tap], expected) < (1e-5 if precision == "float32" else 0.03)


def test_which_library_multiplies_follows_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = (197, 768, 3072), (8, 16, 16)
    monkeypatch.setattr(faster, "_cpu_vendor", lambda: "GenuineIntel")
    assert not faster.products_pay(large, 8, torch.float32)
    monkeypatch.setattr(faster, "_cpu_vendor", lambda: "AuthenticAMD")
    with_both = torch.backends.mkl.is_available() and onednn_multiplies(torch.float32)
    assert faster.products_pay(large, 8, torch.float32) == with_both
    assert not faster.products_pay(large, 8, torch.bfloat16)
    assert not faster.products_pay(small, 4, torch.float32)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(precision: str) -> None:
    taken = backbone()
    batch = pixels(8)
    found = Runtime(taken, device="cpu", precision=precision, batch_size=8)(batch)[TAP]
    expected = reference(taken, batch)[TAP]
    assert found.dtype == np.float32
    assert 0 < error(found, expected) < 0.01


class Mixed(nn.Module):
    """A network that makes float32 tensors itself, and so cannot be converted as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.float())
        return self.head(torch.flatten(self.pool(x), 1))


def test_a_network_that_mixes_types_runs_under_autocast() -> None:
    taken = backbone(Mixed)
    runtime = Runtime(taken, device="cpu", precision="bfloat16", batch_size=4)
    assert runtime.settings.autocast
    batch = pixels(4)
    assert error(runtime(batch)[TAP], reference(taken, batch)[TAP]) < 0.02


# --- batches --------------------------------------------------------------------------------------


def test_an_image_gives_the_same_bits_in_every_batch() -> None:
    taken = backbone()
    runtime = Runtime(taken, device="cpu", batch_size=4)
    batch = pixels(11)
    together = runtime(batch)[TAP]
    assert together.shape == (11, 16)
    alone = np.concatenate([runtime(batch[i : i + 1])[TAP] for i in range(11)])
    np.testing.assert_array_equal(together, alone)


def test_a_long_run_finds_out_whether_places_in_a_batch_matter() -> None:
    assert Runtime(backbone(), device="cpu", batch_size=4, count=4).settings.fixed_slots
    assert not Runtime(backbone(), device="cpu", batch_size=4, count=4000).settings.fixed_slots


class Uneven(Network):
    """Adds to every image a little that depends on its place in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.arange(len(x)).view(-1, 1, 1, 1) * 1e-3)


def test_a_network_to_which_places_matter_is_found_out() -> None:
    assert Runtime(backbone(Uneven), device="cpu", batch_size=4, count=4000).settings.fixed_slots


def test_copies_block_where_nothing_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only CUDA has an event to wait for; an Apple GPU would hand out what is not there yet."""
    right, asked = Tensor.to, []

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        asked.append(options.get("non_blocking", False))
        return right(self, *args, **options)

    runtime = Runtime(backbone(), device="cpu", batch_size=4)
    assert runtime.settings.device == "cpu"
    monkeypatch.setattr(Tensor, "to", to)
    runtime(pixels(4))
    assert asked and not any(asked)


def test_a_batch_for_which_memory_runs_out_is_halved_and_tried_again() -> None:
    taken = backbone()
    runtime = Runtime(taken, device="cpu", batch_size=8)
    batch = pixels(8)
    expected = runtime(batch)[TAP]
    tapped, sizes = runtime._compute, []

    def scarce(inputs: Tensor) -> dict[str, Tensor]:
        sizes.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        assert tapped is not None
        return tapped(inputs)

    runtime._compute = scarce  # type: ignore[assignment]
    found = runtime(batch)[TAP]
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert runtime.settings.batch_size == 2
    assert error(found, expected) < 1e-5


def test_memory_that_does_not_suffice_for_one_image_is_an_error() -> None:
    runtime = Runtime(backbone(), device="cpu", batch_size=1)
    assert runtime.settings.batch_size == 1

    def none(inputs: Tensor) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    runtime._compute = none  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):
        runtime(pixels(1))


def test_torchs_own_settings_are_left_as_they_were() -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    settings = Runtime(backbone(), device="cpu", batch_size=2).settings
    other = Settings.from_dict({**settings.to_dict(), "threads": 2})
    Runtime(backbone(), device="cpu", settings=other)(pixels(2))
    assert torch.get_num_threads() == threads
    assert torch.get_float32_matmul_precision() == precision


def test_memory_is_kept_from_batch_to_batch() -> None:
    taken = Backbone(network(), preprocessing=Preprocessing(resize=192, crop=192), layers=["pool"])
    runtime = Runtime(taken, device="cpu", batch_size=16)
    batch = pixels(16, side=192)
    with reuse_memory() as tuned:
        for _ in range(2):
            runtime(batch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            runtime(batch)
        faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 3
    if tuned:  # glibc; a batch touches 11,000 pages of input and maps
        assert faults < 2000


# --- the same bits --------------------------------------------------------------------------------

PROCESS = """
import hashlib, json, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Runtime, Settings

recorded = Settings.from_dict(json.loads(sys.argv[1]))
backbone = Backbone("mobilenet_v2", weights=None, image_size=64)
runtime = Runtime(backbone, device="cpu", settings=recorded, count=100_000)
pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 64, 64), np.uint8)
with ThreadPoolExecutor(1) as pool:  # torch counts threads by the thread that asks
    (features,) = pool.submit(runtime, pixels).result().values()
print(json.dumps([runtime.settings.to_dict(), hashlib.sha256(features.tobytes()).hexdigest()]))
"""


def fresh_run(settings: dict[str, Any] | None = None, **environment: str) -> list[Any]:
    """Return the settings and the hash of the features of a run in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-c", PROCESS, json.dumps(settings or {})],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    result: list[Any] = json.loads(found.stdout)
    return result


@contextlib.contextmanager
def load() -> Iterator[None]:
    """Keep every core busy with something else."""
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_fresh_run_under_load_gives_the_same_bits() -> None:
    alone = fresh_run()
    with load():
        assert fresh_run() == alone


def test_recorded_settings_give_the_same_bits_whatever_the_environment_says() -> None:
    settings, digest = fresh_run(OMP_NUM_THREADS="2")
    assert settings["threads"] == 2
    assert fresh_run(settings, OMP_NUM_THREADS="1") == [settings, digest]


THREADS = """
import os
os.environ["OMP_NUM_THREADS"] = "1"  # as an engine does for its workers, before torch is imported
from featcache.networks.forward import default_threads
print(default_threads())
"""


def test_threads_are_those_of_the_user_and_not_an_engines() -> None:
    def printed(code: str, **started: str) -> int:
        environment = {name: x for name, x in os.environ.items() if name != "OMP_NUM_THREADS"}
        command = [sys.executable, "-c", code]
        return int(subprocess.check_output(command, env=environment | started, text=True))

    assert printed(THREADS) == printed("import torch; print(torch.get_num_threads())")
    assert printed(THREADS, OMP_NUM_THREADS="1") == 1


@pytest.mark.parametrize("count", [5, 10**6])
def test_no_clock_has_a_say(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> float:
        raise AssertionError("the clock was read")

    for clock in ("perf_counter", "monotonic", "process_time", "thread_time"):
        monkeypatch.setattr(time, clock, refuse)
    settings = Runtime(backbone(Tokens, layers=["head:input"]), device="cpu", count=count).settings
    assert settings.batch_size == min(count, 8)
    assert not settings.compiled


def test_compilation_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    asked = Runtime(backbone(), device="cpu", compile=True).settings
    assert asked.compiled
    assert not Runtime(backbone(), device="cpu", count=10**6).settings.compiled
    assert Runtime(backbone(), device="cpu", settings=asked).settings.compiled
    assert not Runtime(backbone(), device="cpu", settings=asked, compile=False).settings.compiled


def test_a_network_that_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_compiler(function: Any, **_: Any) -> Any:
        def fail(batch: Tensor) -> Any:
            raise RuntimeError("no C++ compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", without_compiler)
    taken = backbone()
    runtime = Runtime(taken, device="cpu", batch_size=4, compile=True)
    assert not runtime.settings.compiled
    batch = pixels(4)
    assert error(runtime(batch)[TAP], reference(taken, batch)[TAP]) < 1e-5


def test_a_compiled_network_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: lambda x: {tap: 2 * v for tap, v in f(x).items()}
    )
    taken = backbone()
    runtime = Runtime(taken, device="cpu", batch_size=4, compile=True)
    assert not runtime.settings.compiled
    batch = pixels(4)
    assert error(runtime(batch)[TAP], reference(taken, batch)[TAP]) < 1e-5


@pytest.mark.campaign
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_features_are_the_same(precision: str) -> None:
    taken = backbone(layers=["relu#1:mean", "pool"])
    options: Any = {"device": "cpu", "precision": precision, "batch_size": 4, "compile": True}
    runtime = Runtime(taken, **options)
    assert runtime.settings.compiled
    batch = pixels(9)
    found = runtime(batch)
    for tap, expected in reference(taken, batch).items():
        assert error(found[tap], expected) < (1e-5 if precision == "float32" else 0.01)
    again = Runtime(taken, device="cpu", precision=precision, settings=runtime.settings)
    assert again.settings == runtime.settings
    for tap, value in again(batch).items():
        np.testing.assert_array_equal(value, found[tap])


# --- CUDA -----------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_cuda_gives_the_features_of_the_cpu(precision: str) -> None:
    taken = backbone()
    runtime = Runtime(taken, device="cuda", precision=precision, batch_size=4)
    batch = pixels(10)
    pending = runtime.submit(torch.from_numpy(batch).pin_memory())
    found = pending.result()[TAP]
    assert error(found, reference(taken, batch)[TAP]) < (1e-4 if precision == "float32" else 0.02)
    np.testing.assert_array_equal(found, runtime(batch)[TAP])
