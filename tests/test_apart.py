"""Ray nodes that see nothing of the checkout: code comes by Ray, all else by way of S3."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
from safetensors.torch import load_file

from components import cache, distill, evaluate, halve, prepare, shipping
from components.cluster import _TaskWorker
from components.environment import quiet
from components.joining import joined
from components.params import Params, ParamsError, load_params
from components.paths import BUNDLE, CACHE, DISTILLED, EVALUATED, PREPARED, RUNS, SAMPLED
from components.shipping import Shipment, pack, unpack
from components.storage import Mirror
from tests import toy
from tests.stores import free_port

pytest_plugins = ["tests.toy"]
quiet()
WEIGHTS = "diffusion_pytorch_model.safetensors"


def params_with(storage: str | None, **section: Any) -> Params:
    values = toy.toy_params() | {"storage": storage}
    values["cluster"] |= section
    toy.write_params(Path(), values)
    return load_params(Path("params.yaml"))


def far(storage: str | None, **section: Any) -> Params:
    return params_with(storage, shared_folder=False, **section)


def test_without_a_shared_folder_storage_must_be_named(world: Path) -> None:
    with pytest.raises(ParamsError, match="shared_folder is false, and then `storage` must name"):
        far(None)


def packed(params: Params) -> Shipment:
    shipment = pack(
        params,
        [Path(params.base), Path("art/main.parquet")],
        stage="distill",
        kept=RUNS,
        made=DISTILLED,
    )
    assert shipment
    return shipment


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_worker_has_what_was_sent_and_the_driver_what_it_made(
    world: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(RUNS / "checkpoint.pt", "step 1")
    shipment = packed(far(s3, num_workers=1))
    sent = {path: Path(path).read_bytes() for path in shipment.inputs}
    assert "models/base/unet/config.json" in sent and "art/main.parquet" in sent

    node = tmp_path / "node"
    write(node / "models/base/of-another-checkout", "its own")
    home = node / shipment.home
    write(home / RUNS / "of-another-run.pt", "older")
    write(home / "models/base/of-another-run", "older")
    monkeypatch.chdir(node)
    shipment.unpack()
    shipment.resume(alone)
    assert Path.cwd() == home and (node / "models/base/of-another-checkout").exists()
    assert {path: Path(path).read_bytes() for path in shipment.inputs} == sent
    assert not Path("models/base/of-another-run").exists()
    assert [path.name for path in RUNS.iterdir()] == ["checkpoint.pt"]
    with sending(shipment):
        write(RUNS / "checkpoint.pt", "step 2")
        write(RUNS / "steps-16/guide", "16")
        write(DISTILLED / "guide", "weights")

    monkeypatch.chdir(world)
    shipment.bring()
    assert (RUNS / "checkpoint.pt").read_text() == "step 2"
    assert (RUNS / "steps-16/guide").read_text() == "16"
    assert (DISTILLED / "guide").read_text() == "weights"
    assert not s3fs.S3FileSystem().find(f"{s3}/work"), "nothing of the run is left there"


def alone() -> None:
    """What a worker waits for that has no others."""


def sending(shipment: Shipment, told: list[str] | None = None, limit_s: float = 60.0) -> Any:
    return shipment.sending(tell=([] if told is None else told).append, limit_s=limit_s)


@pytest.fixture
def nodes(
    world: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Shipment, Callable[[str], None]]:
    """A shipment, and what goes to the node of a name, where a worker starts."""
    shipment = packed(far(s3, num_workers=2))
    monkeypatch.setattr(shipping, "SECONDS_BETWEEN_LOOKS", 0.05)

    def start(name: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        shipment.unpack()
        shipment.resume(alone)

    return shipment, start


Nodes = tuple[Shipment, Callable[[str], None]]


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def forbid(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """From now on nothing may be written to `storage`."""

    def send(*_: Any) -> None:
        raise PermissionError("storage: may not write")

    monkeypatch.setattr("components.storage.Mirror.send", send)
    return monkeypatch


CHECKPOINT = RUNS / "checkpoint.pt"


def train_and_be_lost(shipment: Shipment, sent: str, unsent: str = "") -> None:
    """A worker's checkpoints, the last of which does not get away."""
    kept = shipment.mirror("kept")
    with (
        pytest.MonkeyPatch.context() as patch,
        suppress(ConnectionError),
        sending(shipment),
    ):
        write(CHECKPOINT, sent)
        until(lambda: kept.names() and kept.read(CHECKPOINT.name) == sent.encode())
        forbid(patch)
        if unsent:
            write(CHECKPOINT, unsent)
        raise ConnectionError


def test_a_worker_that_is_lost_costs_what_was_not_yet_sent(nodes: Nodes) -> None:
    shipment, start = nodes
    start("first")
    train_and_be_lost(shipment, "step 1")
    start("second")
    assert CHECKPOINT.read_text() == "step 1"


def test_all_go_on_from_a_later_checkpoint_of_the_node_that_sent_the_last(nodes: Nodes) -> None:
    shipment, start = nodes
    start("first")
    train_and_be_lost(shipment, "step 1", "step 2")
    there = []
    shipment.resume(lambda: there.append(shipment.mirror("kept").read(CHECKPOINT.name)))
    assert there == [b"step 2"], "before any worker takes what is there"
    assert CHECKPOINT.read_text() == "step 2"
    start("second")
    assert CHECKPOINT.read_text() == "step 2"


def test_the_workers_of_a_node_send_its_checkpoints_once(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipment, start = nodes
    start("first")
    train_and_be_lost(shipment, "step 1", "step 2")
    sent: list[str] = []
    real = Mirror.send
    monkeypatch.setattr(
        Mirror, "send", lambda self, path, name: (sent.append(name), real(self, path, name))
    )
    for _ in range(3):
        shipment.resume(lambda: None)
    assert sent.count(CHECKPOINT.name) == 1
    assert CHECKPOINT.read_text() == "step 2"


def test_checkpoints_of_a_node_that_others_have_gone_beyond_are_replaced(nodes: Nodes) -> None:
    shipment, start = nodes
    start("first")
    train_and_be_lost(shipment, "step 1", "step 2, unsent")
    there = CHECKPOINT.absolute()
    with pytest.MonkeyPatch.context() as patch:  # it does not come back at first
        patch.setattr(Shipment, "_is_writer", lambda _: False)
        start("second")
    assert CHECKPOINT.read_text() == "step 1"
    train_and_be_lost(shipment, "step 3")
    assert there.read_text() == "step 2, unsent"
    start("first")
    assert CHECKPOINT.read_text() == "step 3"


def test_what_could_not_be_sent_is_told_and_sent_later(nodes: Nodes) -> None:
    shipment, start = nodes
    start("first")
    told: list[str] = []
    with sending(shipment, told) as check:
        with pytest.MonkeyPatch.context() as patch:
            forbid(patch)
            write(CHECKPOINT, "step 1")
            until(lambda: told)
            check()
        until(lambda: len(told) == 2)
        assert shipment.mirror("kept").read(CHECKPOINT.name) == b"step 1"
        write(DISTILLED / "guide", "weights")
    assert told == [
        f"{RUNS}: could not send checkpoints, trying again: storage: may not write",
        f"{RUNS}: checkpoints are sent again",
    ]


def test_training_is_stopped_if_nothing_can_be_sent_for_the_limit(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipment, start = nodes
    start("first")
    told: list[str] = []
    with (
        pytest.raises(OSError, match=r"sent for 0:00, cluster.wait_minutes: storage: may not"),
        sending(shipment, told, limit_s=0.2) as check,
    ):
        forbid(monkeypatch)
        write(CHECKPOINT, "step 1")
        until(lambda: told)
        time.sleep(0.3)
        check()


def test_a_place_that_may_not_be_written_is_told_before_training(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipment, start = nodes
    start("first")
    forbid(monkeypatch)
    with pytest.raises(PermissionError, match="may not write"), sending(shipment):
        pytest.fail("trained")


def test_configs_beside_a_single_file_travel_with_it(world: Path, s3: str) -> None:
    write(Path("models/one.safetensors"), "weights")
    write(Path("models/one/model_index.json"), "{}")
    shipment = pack(far(s3, num_workers=1), [Path("models/one.safetensors")], stage="cache")
    assert shipment
    assert set(shipment.inputs) == {"models/one.safetensors", "models/one/model_index.json"}


def test_files_in_a_linked_folder_travel_and_a_folder_without_any_is_refused(
    world: Path, s3: str
) -> None:
    params = far(s3, num_workers=1)
    write(world.parent / "anime/unet/config.json", "{}")
    (world / "companions/anime").symlink_to(world.parent / "anime")
    shipment = pack(params, [Path(params.companions)], stage="cache")
    assert shipment and "companions/anime/unet/config.json" in shipment.inputs
    shutil.rmtree(world / "companions")
    (world / "companions").mkdir()  # to train on the base alone
    assert pack(params, [Path(params.companions)], stage="cache")
    (world / "models/none").mkdir()
    with pytest.raises(ValueError, match="models/none has no files"):
        pack(params, [Path("models/none")], stage="cache")


def test_what_another_worker_is_writing_does_not_come_back(tmp_path: Path) -> None:
    worker = object.__new__(_TaskWorker)
    worker._returns = tmp_path
    write(tmp_path / "key/made.parquet", "whole")
    write(tmp_path / "key/.other.parquet.01234567.new/other.parquet", "half")
    assert set(worker._made()) == {tmp_path / "key/made.parquet"}


def test_a_worker_answers_before_it_has_fetched_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[Path] = []
    monkeypatch.setattr("components.cluster._settle", settled.append)
    done: list[tuple[str, list[Path]]] = []
    params: Any = None
    worker = _TaskWorker(lambda _: lambda task: done.append((task, [*settled])), params, tmp_path)
    worker.ping()
    assert not settled
    for task in ("one", "two"):
        worker.do(task)
    assert done == [("one", [tmp_path]), ("two", [tmp_path])], "once, and before the first task"


def test_a_file_is_sent_once_for_everybody(
    world: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(far(s3, num_workers=1))
    monkeypatch.setattr("components.storage.Mirror.send", lambda *_: pytest.fail("sent again"))
    packed(far(s3, num_workers=1))


def test_what_lies_outside_of_the_folder_is_refused_by_name(world: Path, s3: str) -> None:
    shutil.copy("art/main.parquet", world.parent / "away.parquet")
    with pytest.raises(ValueError, match=r"away.parquet lies outside of this folder"):
        pack(far(s3, num_workers=1), [world.parent / "away.parquet"], stage="cache")


def node(hidden: Path, folder: Path, *options: str) -> "subprocess.Popen[bytes]":
    """A Ray node that finds `hidden` empty, started in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
    ray += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    # Ports that two nodes of one machine would both have.
    ray += ["--min-worker-port=0", "--max-worker-port=0"]
    ray += [f"--dashboard-agent-listen-port={free_port()}"]
    hide = 'mount -t tmpfs none "$0" && exec "$@"'
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", hide, str(hidden), *ray],
        cwd=folder,
        env=environment | {"RAY_AUTH_MODE": "disabled"},
        start_new_session=True,
    )


@pytest.fixture
def cluster(world: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head without CPUs and a node with two, neither of which sees the world; its address."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("only root can hide a folder from a node (unshare --mount)")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    elsewhere, port = tmp_path / "elsewhere", free_port()
    elsewhere.mkdir()
    address, temporary = f"127.0.0.1:{port}", f"/tmp/ray-{port}"
    head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    nodes = [node(world, elsewhere, *head, f"--temp-dir={temporary}")]
    try:
        time.sleep(10)
        nodes.append(node(world, elsewhere, f"--address={address}", "--num-cpus=2"))
        time.sleep(5)
        yield address
    finally:
        for started in nodes:
            os.killpg(started.pid, signal.SIGTERM)
            started.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.services
@pytest.mark.timeout(900)
def test_nodes_that_see_nothing_make_the_same_cache_guides_and_images(
    cluster: str, world: Path, s3: str
) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def images() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in SAMPLED.rglob("*.parquet")}

    alone = params_with(None)
    prepare.run(alone)
    for stage in (cache, distill, halve):
        stage.run(alone)
    shards = {name: content for name, content in files(CACHE).items() if name != "index.json"}
    guides = [DISTILLED, *sorted(path for path in BUNDLE.iterdir() if path.is_dir())]
    weights = {path: load_file(path / WEIGHTS) for path in guides}
    for folder in (CACHE, DISTILLED, BUNDLE, RUNS):
        shutil.rmtree(folder)

    there = far(s3, num_workers=2, address=cluster, wait_minutes=2)
    cache.run(there)
    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    sent = {
        f"{Path(x).name.partition('.')[0]}.safetensors": bucket.cat_file(x)
        for x in bucket.glob(f"{s3}/cache/*/*.safetensors")
    }
    assert sent == shards and files(CACHE).keys() == {"index.json"}
    for stage in (distill, halve):
        stage.run(there)
    for path, tensors in weights.items():
        found = load_file(path / WEIGHTS)
        assert found.keys() == tensors.keys()
        # sums of other parts of the batch end in other last bits, which steps of an even size make
        # larger in a few weights
        ours, theirs = (
            torch.cat([one[name].flatten() for name in tensors]) for one in (tensors, found)
        )
        distance = (ours - theirs).abs()
        assert distance.max() < 2e-2 and distance.norm() < 5e-3 * ours.norm()
    evaluate.run(params_with(None), "tuned")  # by the guide that was just made
    sampled = images()
    for folder in (SAMPLED, EVALUATED):
        shutil.rmtree(folder)
    evaluate.run(far(s3, num_workers=2, address=cluster, wait_minutes=2), "tuned")
    assert images() == sampled
    assert not list(SAMPLED.rglob(".*"))
    assert PREPARED.exists() and not bucket.find(f"{s3}/work")

    import ray

    def where_code_is() -> tuple[str, bool]:  # in here, it travels by value: nodes have no tests
        import components

        return str(components.__file__), Path("params.yaml").exists()

    with joined(there, sees_folder=False):
        code, has_params = ray.get(ray.remote(where_code_is).remote())
    assert "/runtime_resources/working_dir_files/" in code and not has_params


@pytest.mark.parametrize("name", ["../outside", "/outside", "in/../../outside"])
def test_what_was_sent_is_not_unpacked_out_of_its_folder(tmp_path: Path, name: str) -> None:
    packed, folder = tmp_path / "packed.tar", tmp_path / "folder"
    with tarfile.open(packed, "w") as tar:
        tar.addfile(tarfile.TarInfo("good"))
        tar.addfile(tarfile.TarInfo(name))
    folder.mkdir()
    with tarfile.open(packed) as tar, pytest.raises(ValueError, match="outside is not a file"):
        unpack(tar, folder)
    assert not list(folder.iterdir())
