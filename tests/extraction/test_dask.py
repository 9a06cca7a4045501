"""One process, several devices, threads and Dask compute the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import folder

SCRIPT = """
import hashlib, json, os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import featcache as fc
from featcache.networks.backbone import Backbone

def run(name, **options):
    images = fc.ImageSet.open(sys.argv[1])
    backbone = Backbone("mobilenet_v2", image_size=64)
    store = fc.extract(images, backbone, name, device=options.pop("device", "cpu"), **options)
    print(hashlib.sha256(store.load()[0].tobytes()).hexdigest(), store.meta["settings"]["threads"])

def kill(name):
    while True:
        for lock in Path().glob(f"{name}.part-*.lock"):
            try:
                worker = json.loads(lock.read_text())["pid"]
            except (OSError, ValueError):
                continue
            os.kill(worker, signal.SIGKILL)
            print("killed", flush=True)
            return
        time.sleep(0.001)

if __name__ == "__main__":
    from distributed import Client, LocalCluster
    run("one.h5")
    run("two.h5", device=["cpu", "cpu"])
    with ThreadPoolExecutor(2) as threads:
        run("threads.h5", executor=threads, parts=3)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with Client(cluster) as client:
            threading.Thread(target=kill, args=["dask.h5"]).start()
            run("dask.h5", executor=client.get_executor(pure=False, retries=3), parts=20)
    print(*sorted(path.name for path in Path().glob("*.h5*")))
"""


def test_one_process_two_devices_threads_and_dask_give_the_same_bits(tmp_path: Path) -> None:
    """Of real weights, with as many threads as there are cores; a worker of Dask is killed."""
    pytest.importorskip("distributed", reason="pip install 'featcache[dask]'")
    root = folder(tmp_path / "images", 160)
    (tmp_path / "script.py").write_text(SCRIPT)
    alone = {name: x for name, x in os.environ.items() if name != "OMP_NUM_THREADS"}
    output = subprocess.run(
        [sys.executable, "script.py", str(root)],
        cwd=tmp_path,
        env={**alone, "OMP_WAIT_POLICY": "passive"},  # more threads than cores
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    *runs, files = output.splitlines()
    assert runs.count("killed") == 1
    assert len(runs) == 5
    assert len(set(runs) - {"killed"}) == 1
    assert files == "dask.h5 one.h5 threads.h5 two.h5"
