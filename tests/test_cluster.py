"""Waiting for Ray's workers is told, compared with what there is, and not for ever."""

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components import cluster, liveness, prepare, room
from components.cluster import run_tasks, run_training
from components.environment import quiet
from components.errors import MayPassError
from components.following import Report
from components.liveness import Head, Pulse
from components.params import Params, load_params
from components.room import Room
from tests import toy
from tests.stores import free_port

pytest_plugins = ["tests.toy"]
quiet()
ROOT = Path(__file__).parent.parent


def params_with(**section: Any) -> Params:
    values = toy.toy_params()
    values["cluster"] |= section
    toy.write_params(Path(), values)
    return load_params(Path("params.yaml"))


class Clock:
    """Time that passes only by waiting."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In an empty folder."""
    monkeypatch.chdir(tmp_path)
    clock = Clock()
    monkeypatch.setattr(room, "time", clock)
    monkeypatch.setattr(liveness, "time", clock)
    return clock


def cluster_of(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, *later: tuple[float, dict[str, float]]
) -> None:
    """A cluster that has these resources, all of them free, from these seconds on."""
    import ray

    def there() -> dict[str, float]:
        return [resources for since, resources in later if clock.now >= since][-1]

    monkeypatch.setattr(ray, "cluster_resources", there)
    monkeypatch.setattr(ray, "available_resources", there)
    autoscaler_of(monkeypatch, clock)


def autoscaler_of(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, *, seconds: float = math.inf
) -> dict[float, list[dict[str, float]]]:
    """Have what a cluster is asked for come after so many seconds.

    Returns what is asked for, by the time since when.
    """
    import ray
    import ray.util

    asked: dict[float, list[dict[str, float]]] = {}

    def ask(bundles: list[dict[str, float]]) -> Any:
        since = clock.now
        asked[since] = bundles
        return SimpleNamespace(ready=lambda: since, since=since)

    monkeypatch.setattr(ray.util, "placement_group", ask)
    monkeypatch.setattr(ray.util, "remove_placement_group", lambda group: asked.pop(group.since))
    monkeypatch.setattr(
        ray, "wait", lambda since, timeout: (since if clock.now >= since[0] + seconds else [], [])
    )
    return asked


def test_gpus_that_come_only_when_asked_for_are_asked_for_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the setting, the CPUs that are there would do."""
    cluster_of(monkeypatch, clock, (0, {"CPU": 8.0}))
    asked = autoscaler_of(monkeypatch, clock, seconds=70)
    room = Room(params_with(num_workers=2, wait_minutes=2, wait_for_gpus=True), "distill")
    sleep, seen = clock.sleep, []

    def look_and_sleep(seconds: float) -> None:
        seen.append([*asked.values()])
        sleep(seconds)

    monkeypatch.setattr(clock, "sleep", look_and_sleep)
    room.wait()
    assert clock.now == pytest.approx(70, abs=1) and room.has_gpu
    assert seen[-1] == [[{"CPU": 1.0, "GPU": 1.0}] * 2] and not asked, "nothing is held after it"
    told = capsys.readouterr().out
    assert "2 Ray workers need 2 GPUs, the cluster has 0, 0 of them free: waiting" in told


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"CPU": 8.0}, "none came: set it to false to compute on CPUs, "),
        ({"CPU": 8.0, "GPU": 1.0}, "too few came: lower cluster.num_workers, "),
    ],
)
def test_gpus_that_are_waited_for_in_vain_are_given_up_by_the_name_of_the_setting(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, there: dict[str, float], said: str
) -> None:
    cluster_of(monkeypatch, clock, (0, there))
    room = Room(params_with(num_workers=2, wait_minutes=2, wait_for_gpus=True), "distill")
    with pytest.raises(ValueError, match="2 Ray workers need 2 GPUs, the cluster has") as failed:
        room.wait()
    assert f"; waited 2:00: cluster.wait_for_gpus is true, and {said}" in str(failed.value)


def test_what_is_asked_of_a_cluster_that_does_not_get_it_is_asked_no_longer_when_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    cluster_of(monkeypatch, clock, (0, {"CPU": 1.0}))
    asked = autoscaler_of(monkeypatch, clock)
    with pytest.raises(ValueError, match="2 Ray workers need 2 CPUs"):
        Room(params_with(num_workers=2, wait_minutes=2), "distill").wait()
    assert clock.now == pytest.approx(120, abs=1) and not asked


def test_more_workers_than_there_is_room_for_are_given_up_after_the_limit(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster_of(monkeypatch, clock, (0, {"CPU": 4.0}))
    room = Room(params_with(num_workers=8, wait_minutes=2), "distill")
    with pytest.raises(ValueError) as failed:
        room.wait()
    need = "distill: 8 Ray workers need 8 CPUs, the cluster has 4, 4 of them free"
    assert str(failed.value).startswith(f"{need}; waited 2:00: lower cluster.num_workers")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{need}: waiting, 0:05 of 2:00 at most"
    assert len(lines) == 4, "one each half minute"


def test_nodes_that_come_late_are_waited_for(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    cluster_of(monkeypatch, clock, (0, {"CPU": 1.0}), (90, {"CPU": 2.0}))
    room = Room(params_with(num_workers=2, wait_minutes=2), "cache")
    room.wait()
    assert clock.now == pytest.approx(90, abs=1)


def test_whether_there_are_gpus_is_asked_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver, here without one, may be another machine."""
    cluster_of(monkeypatch, clock, (0, {"CPU": 64.0, "GPU": 4.0}))
    room = Room(params_with(num_workers=4), "distill")
    room.wait()
    assert room.has_gpu
    assert capsys.readouterr().out == "distill: Ray workers: 4, each with a GPU\n"
    with pytest.raises(ValueError, match="8 Ray workers need 8 GPUs, the cluster has 4"):
        Room(params_with(num_workers=8), "distill").wait()


def test_workers_without_tasks_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster_of(monkeypatch, clock, (0, {"CPU": 4.0}))
    room = Room(params_with(num_workers=8), "cache", most=3)
    room.wait()
    assert room.num_workers == 3 and not clock.now
    assert capsys.readouterr().out == "cache: Ray workers: 3, on CPUs: the cluster has no GPU\n"


def test_nodes_lost_meanwhile_are_told_and_their_return_is_noticed(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    both, one = {"CPU": 2.0}, {"CPU": 1.0}
    cluster_of(monkeypatch, clock, (0, both), (10, one), (40, both), (100, one))
    room = Room(params_with(num_workers=2, wait_minutes=1), "cache")
    room.wait()
    while clock.now < 150:
        room.tell_shortage(give_up=True)
        clock.now += 1
    told = capsys.readouterr().out
    assert "the cluster has 1, 1 of them free: waiting, 0:05 of 1:00 at most" in told
    clock.now = 161
    with pytest.raises(ValueError, match="waited 1:01"):
        room.tell_shortage(give_up=True)


def test_a_cluster_that_is_not_there_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{free_port()}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        began = time.monotonic()
        with pytest.raises(ValueError, match=f"no Ray cluster answers at RAY_ADDRESS={address}"):
            run_tasks(no_work, params_with(num_workers=1), [["a"]], print, name="cache")
        assert time.monotonic() - began < 30


@pytest.mark.parametrize("address", ["here", ":6379", "host:", "http://127.0.0.1:8265"])
def test_what_is_no_address_of_a_cluster_is_refused_by_its_name(
    world: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"^RAY_ADDRESS={address} is no address of a Ray cluster"):
        run_tasks(no_work, params_with(num_workers=1), [["a"]], print, name="cache")


def no_work(params: Params) -> Any:
    return lambda task: None


class Worker:
    """An actor that is asked by `ping`; the question itself is the answer."""

    def __init__(self) -> None:
        self.ping = self

    def options(self, **_: str) -> "Worker":
        return self

    def remote(self) -> "Worker":
        return self


def test_a_worker_that_is_silent_for_too_long_is_replaced_and_no_other(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    hung, well, starting = Worker(), Worker(), Worker()
    answer, killed = {well, hung}, list[Worker]()
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([x for x in asked if x in answer], []))
    monkeypatch.setattr(ray, "kill", lambda worker, no_restart: killed.append(worker))
    pulse = Pulse([well, hung, starting], 60, "cache")
    pulse.look()
    pulse.look()
    answer.remove(hung)
    while clock.now < 50:
        pulse.look()
        clock.now += 5
    pulse.forgive()  # nodes were lost, and it had no place to answer from
    while clock.now < 105:
        assert not killed
        pulse.look()
        clock.now += 5
    clock.now += 5
    pulse.look()
    assert killed == [hung]
    said = "cache: Ray worker 1 has not answered for 1:00: ended, and another takes its place\n"
    assert capsys.readouterr().out == said


def test_a_worker_that_hangs_before_it_has_answered_is_replaced_too(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    import ray

    hung, killed = Worker(), list[float]()
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([], asked))
    monkeypatch.setattr(ray, "kill", lambda worker, no_restart: killed.append(clock.now))
    pulse = Pulse([hung], 60, "cache")
    while clock.now <= 300:
        pulse.look()
        clock.now += 5
    assert killed == [120, 240], "a minute more than one that has answered"


def test_a_head_that_is_gone_may_come_back_for_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    import ray

    place = f"127.0.0.1:{free_port()}"
    here = type("Context", (), {"gcs_address": place})
    monkeypatch.setattr(ray, "get_runtime_context", here)
    head = Head("cache")
    assert not head.answers()
    clock.now = 9
    assert not head.answers()
    clock.now = 10
    with pytest.raises(MayPassError, match=f"cache: the head of the Ray cluster, {place}, went"):
        head.answers()


def test_ctrl_c_is_not_rays_to_handle() -> None:
    """It would end an interrupted stage without a word."""
    from ray.train.torch import TorchTrainer

    trainer = cluster.trainer_class()
    assert hasattr(TorchTrainer, "_register_sigint_handler"), "Ray has it by another name now"
    before = signal.getsignal(signal.SIGINT)
    trainer._register_sigint_handler(None, None)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("rank", "told"), [(0, ["distill: one", (16, {"loss": 0.5})]), (1, [])])
def test_what_the_first_worker_of_a_group_prints_is_told_and_no_others(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, rank: int, told: list[Any]
) -> None:
    import ray
    import ray.train

    heard: list[Any] = []
    context = SimpleNamespace(get_world_rank=lambda: rank)
    reports = SimpleNamespace(add=SimpleNamespace(remote=heard.append))
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(cluster, "_settle", lambda place: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def work(params: Params, report: Report) -> None:
        print("distill:", "one", flush=True)
        report(16, {"loss": 0.5})

    place = {"place": Path(), "reports": reports}
    cluster._on_worker({"work": work, "params": params_with(num_workers=2), **place})
    assert heard == told


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["subprocess.Popen[bytes]"]:
    """The head of a cluster of one node with one CPU, which is where RAY_ADDRESS points."""
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    options = ["--num-cpus=1", f"--port={port}", "--include-dashboard=false"]
    options += ["--object-store-memory=100000000", f"--temp-dir=/tmp/ray-{port}"]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else only where a token lies at home
    started = subprocess.Popen(
        [*command, *options, "--node-ip-address=127.0.0.1"], start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        time.sleep(3)
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        started.wait(timeout=60)
        shutil.rmtree(f"/tmp/ray-{port}", ignore_errors=True)


@pytest.mark.services
def test_a_real_cluster_with_one_cpu_runs_one_worker_and_refuses_two(
    head: "subprocess.Popen[bytes]", world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.run(params_with())
    done: list[str] = []
    run_tasks(no_work, params_with(num_workers=1), [["a", "b"]], done.append, name="cache")
    assert sorted(done) == ["a", "b"]
    with pytest.raises(ValueError, match="cache: 2 Ray workers need 2 CPUs, the cluster has 1"):
        params = params_with(num_workers=2, wait_minutes=0.15)
        run_tasks(no_work, params, [["a", "b"]], done.append, name="cache")
    assert "waiting, 0:05 of 0:09 at most" in capsys.readouterr().out


JOIN = """
from pathlib import Path
from components.cluster import run_tasks
from components.params import load_params
run_tasks(lambda params: None, load_params(Path("params.yaml")), [["a"]], print, name="cache")
"""


@pytest.mark.services
def test_a_machine_that_is_no_node_of_the_cluster_is_told_how_to_become_one(
    head: "subprocess.Popen[bytes]", world: Path
) -> None:
    """As in another container: neither the head's processes nor its sockets are seen."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("only root can hide processes and a folder (unshare)")
    params_with(num_workers=1)
    address = os.environ["RAY_ADDRESS"]
    hide = f'mount -t tmpfs none /tmp/ray-{address.rpartition(":")[2]} && exec "$@"'
    alone = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", hide, "sh"]
    done = subprocess.run(
        [*alone, sys.executable, "-c", JOIN],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert f"no node of the Ray cluster at RAY_ADDRESS={address}, as" in done.stderr
    assert f"`ray start --address={address} --num-cpus=0`" in done.stderr


def stopping_once(params: Params) -> Callable[[str], None]:
    """Work whose task `b` stops its worker, as `kill -STOP` would, the first time."""

    def work(task: str) -> None:
        if task == "b" and not Path("stopped").exists():
            Path("stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    return work


@pytest.mark.services
def test_a_worker_that_hangs_is_replaced_and_its_task_done(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    params = params_with(num_workers=2, max_failures=1, wait_minutes=0.2)
    run_tasks(stopping_once, params, [["a", "b", "c", "d"]], done.append, name="cache")
    assert sorted(done) == ["a", "b", "c", "d"]
    # A minute more if it had not answered once before it stopped.
    assert re.search(r"has not answered for [01]:1\d: ended, and another", capsys.readouterr().out)


def train_and_stop_once(params: Params, report: Report) -> None:
    """Training of which rank 1 stops once, in the second step; all then begin again."""
    from pnp_core.train import rank_and_world

    rank, _ = rank_and_world()
    for step in range(4):
        time.sleep(1)
        report(step, {"loss": 0.0})
        if rank == 1 and step == 1 and not Path("stopped").exists():
            Path("stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)


def train(params: Params, work: Callable[[Params, Report], None]) -> list[int]:
    """The steps that are reported."""
    steps: list[int] = []
    run_training(work, params, lambda step, _: steps.append(step), name="distill")
    return steps


@pytest.mark.services
def test_a_training_worker_that_hangs_is_told_and_the_group_begins_again(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = train(params_with(num_workers=2, wait_minutes=0.2), train_and_stop_once)
    assert steps[-4:] == [0, 1, 2, 3] and len(steps) > 4
    assert "distill: Ray worker 1 has not answered for 0:12" in capsys.readouterr().out


@pytest.mark.services
def test_a_training_worker_that_hangs_too_often_is_named(world: Path) -> None:
    with pytest.raises(ValueError, match="distill: Ray worker 1 has not answered for 0:12, and "):
        train(params_with(num_workers=2, wait_minutes=0.2, max_failures=0), train_and_stop_once)


def for_ever(params: Params) -> Callable[[str], None]:
    return lambda task: begin_and_sleep()


def train_for_ever(params: Params, report: Report) -> None:
    begin_and_sleep()


def begin_and_sleep() -> None:
    Path("begun").touch()
    time.sleep(600)


HEAD_DIES = """
from pathlib import Path
from components.cluster import run_tasks, run_training
from components.params import load_params
from tests.test_cluster import for_ever, train_for_ever
params = load_params(Path("params.yaml"))
if {is_training}:
    run_training(train_for_ever, params, print, name="cache")
else:
    run_tasks(for_ever, params, [["a"]], print, name="cache")
"""


@pytest.mark.services
@pytest.mark.parametrize("is_training", [False, True])
def test_a_head_that_is_killed_is_told_within_seconds(
    head: "subprocess.Popen[bytes]", world: Path, is_training: bool
) -> None:
    """In a process of its own, as a stage is: Ray does not join a second cluster in one as well."""
    params_with(num_workers=1)
    log = Path("stderr")
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD_DIES.format(is_training=is_training)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        deadline = time.monotonic() + 240
        while not Path("begun").exists() and process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        time.sleep(5)
        os.killpg(head.pid, signal.SIGKILL)
        process.wait(timeout=50)
    finally:
        process.kill()
    said = log.read_text().splitlines()[-1]
    assert re.search("MayPassError: cache: the head of the Ray cluster, .*, went away", said)
