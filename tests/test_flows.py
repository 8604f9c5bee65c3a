"""The flows: in-process on a stub of a pipeline; on a server and a worker with the toy world."""

import asyncio
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import s3fs
from mlflow import MlflowClient
from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.events.clients import PrefectEventsClient
from prefect.events.worker import EventsWorker
from prefect.logging import handlers
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings
from ruamel.yaml import YAML

from components.cli import stop
from components.environment import FLOW_RUN_URL
from components.lineage import COMMIT
from components.params import load_params
from components.register import version_key
from flows import artifacts, distill, lost, process, room, sharing, stages, watching
from flows.__main__ import summary
from flows.artifacts import as_seen, version_page
from flows.process import StageFailed
from flows.sharing import check_remote
from flows.stages import look
from flows.start import begin
from pnp_core.files import write_json, write_text
from tests import stores
from tests.commands import dvc
from tests.stores import Server, free_port
from tests.toy import make_repository, toy_params, write_params

pytest_plugins = ["tests.postgres", "tests.stores", "tests.toy"]

ROOT = Path(__file__).parent.parent
STAGES = ("prepare", "cache", "distill", "halve", "evaluate@base", "evaluate@tuned", "register")
DVC = (sys.executable, "-m", "dvc")


def git(*arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


# In-process, on stages that only note their names


@pytest.fixture
def pipeline(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """A DVC repository whose stages note their names in `ran`; yields dvc.yaml's stages."""
    monkeypatch.chdir(tmp_path)
    params = SimpleNamespace(
        models={"base": None, "tuned": None},
        cluster=SimpleNamespace(wait_minutes=1, num_workers=0),
    )
    monkeypatch.setattr(distill, "begin", lambda: nullcontext(params))
    monkeypatch.setattr(distill, "check_files", lambda params: None)
    monkeypatch.setattr(distill, "check_start", lambda stage: None)
    git("init", "--quiet")
    dvc("init", "--quiet")

    def note(name: str, *, after: str | None, out: str) -> dict[str, Any]:
        write = f"mkdir -p {out} && echo {name} | tee {out}/table.md"
        return {"cmd": f"echo {name} >> ran && {write}", "outs": [out], "deps": [after or "data"]}

    (tmp_path / "data").write_text("data")
    (tmp_path / "params.yaml").write_text("models: {base: , tuned: }\n")
    stages: dict[str, Any] = {
        "prepare": note("prepare", after=None, out="p"),
        "cache": note("cache", after="p", out="c"),
        "distill": note("distill", after="c", out="d"),
        "halve": note("halve", after="d", out="h"),
        "evaluate": {
            "foreach": ["base", "tuned"],
            "do": note("evaluate@${item}", after="h", out="e-${item}"),
        },
        "register": note("register", after="e-base", out="results/report"),
    }
    write_stages(stages)
    yield stages


def write_stages(stages: dict[str, Any]) -> None:
    with open("dvc.yaml", "w") as file:
        YAML().dump({"stages": stages}, file)


def ran() -> list[str]:
    return Path("ran").read_text().split()


def test_the_flow_and_dvc_lead_to_the_same_result(pipeline: dict[str, Any]) -> None:
    distill.distill_flow()
    assert ran() == list(STAGES)
    assert "up to date" in dvc("status")

    distill.distill_flow()
    dvc("repro")
    assert ran() == list(STAGES), "nothing changed, so nothing runs again"


@pytest.mark.services
def test_a_git_worktree_that_shares_dvcs_cache_takes_over_what_was_made(
    pipeline: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dvc("repro")
    git("add", ".")
    git("rm", "--cached", "--quiet", "ran")
    git("commit", "--quiet", "--message", "result")
    other = tmp_path.with_name("another, with a space")
    git("worktree", "add", "--quiet", "--detach", str(other))
    monkeypatch.chdir(other)
    dvc("cache", "dir", "--local", str(tmp_path / ".dvc/cache"))
    distill.distill_flow()
    assert "up to date" in dvc("status") and Path("results/report/table.md").exists()
    assert not Path("ran").exists(), "no stage ran"


def test_what_is_changed_runs_with_what_depends_on_it_and_nothing_before(
    pipeline: dict[str, Any],
) -> None:
    dvc("repro")
    Path("ran").unlink()
    pipeline["halve"]["cmd"] += " && echo other > h/table.md"
    write_stages(pipeline)
    distill.distill_flow()
    # Both evaluations write what they wrote before, so `register` has nothing new.
    assert ran() == ["halve", "evaluate@base", "evaluate@tuned"]


@pytest.mark.services
def test_models_are_measured_side_by_side_on_a_gpu_each_and_a_failure_is_told(
    pipeline: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    monkeypatch.setattr(room.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(room, "SECONDS_BETWEEN_LOOKS", 0.1)
    others = {"base": "tuned", "tuned": "base"}
    pipeline["evaluate"] = {
        "foreach": others,
        "do": {
            # Each waits for the other: one after another, neither would end.
            "cmd": "echo $CUDA_VISIBLE_DEVICES > gpu-${key} && touch at-${key} && "
            "timeout 60 sh -c 'while test ! -e at-${item}; do sleep 0.1; done' && "
            "mkdir -p e-${key} && cp gpu-${key} e-${key}/gpu",
            "deps": ["h"],
            "outs": ["e-${key}"],
        },
    }
    write_stages(pipeline)
    dvc("repro", "halve")
    distill.distill_flow("evaluate")
    used = {Path(f"e-{name}/gpu").read_text().strip() for name in others}
    assert used == {"3", "7"}

    # Ray's workers share them out themselves.
    several = SimpleNamespace(
        models={"base": None, "tuned": None},
        cluster=SimpleNamespace(wait_minutes=1, num_workers=2),
    )
    monkeypatch.setattr(distill, "begin", lambda: nullcontext(several))
    pipeline["evaluate"]["do"]["cmd"] = (
        "mkdir -p e-${key} && echo $CUDA_VISIBLE_DEVICES > e-${key}/gpu"
    )
    write_stages(pipeline)
    distill.distill_flow("evaluate")
    assert {Path(f"e-{name}/gpu").read_text().strip() for name in others} == {"3,7"}

    pipeline["evaluate"]["do"]["cmd"] = "echo 'error: no such judge'; exit 1"
    write_stages(pipeline)
    with pytest.raises(StageFailed, match="no such judge"):
        distill.distill_flow("evaluate")


def test_on_a_server_the_flow_makes_the_limit_that_guards_the_gpus(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(room, "deployment", SimpleNamespace(id="of a worker"))
    monkeypatch.setattr(room.tempfile, "gettempdir", lambda: str(tmp_path))
    name = f"pnp-guide-gpu-{socket.gethostname()}"
    with room.room("a", 1, 1.0, print):
        with get_client(sync_client=True) as client:
            limit = client.read_global_concurrency_limit_by_name(name)
        assert (limit.limit, limit.active_slots) == (1, 1)
        with pytest.raises(StageFailed, match="are taken"), room.room("b", 1, 0.02, print):
            pass
    with room.room("b", 1, 1.0, print):
        pass


def test_a_flow_that_starts_at_a_later_stage_leaves_those_before_it(
    pipeline: dict[str, Any],
) -> None:
    dvc("repro")
    pipeline["prepare"]["cmd"] += " && true"
    pipeline["evaluate"]["do"]["cmd"] += " && true"
    write_stages(pipeline)
    Path("ran").unlink()
    distill.distill_flow("evaluate")
    assert ran() == ["evaluate@base", "evaluate@tuned"]


def test_without_the_teacher_cache_only_training_makes_it_anew(
    pipeline: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a clone after `dvc pull`: what DVC does not keep is not there."""
    monkeypatch.setattr(stages, "CACHE", Path("c"))
    only = ({"changed deps": {"c": "deleted"}}, {"changed outs": {"c": "deleted"}})
    monkeypatch.setattr(stages, "ONLY_THE_CACHE", only)
    dvc("repro")
    shutil.rmtree("c")
    pipeline["evaluate"]["do"]["cmd"] += " && true"
    write_stages(pipeline)
    Path("ran").unlink()
    distill.distill_flow()
    assert ran() == ["evaluate@base", "evaluate@tuned"]

    params = SimpleNamespace(cluster=SimpleNamespace(wait_minutes=1, num_workers=0))
    assert look(params, STAGES).lacks_cache  # type: ignore[arg-type]
    pipeline["halve"]["cmd"] += " && true"
    write_stages(pipeline)
    assert not look(params, STAGES).lacks_cache  # type: ignore[arg-type]


@pytest.mark.services
def test_a_flow_pushes_to_the_remote_and_says_what_to_commit(
    pipeline: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dvc("repro")
    distill.distill_flow("register")
    assert "git add dvc.lock && git commit" in caplog.text
    assert "dvc remote add" in caplog.text
    git("add", ".")
    git("commit", "--quiet", "--message", "result")
    caplog.clear()
    remote = tmp_path.with_name("remote")
    dvc("remote", "add", "--default", "team", str(remote))
    distill.distill_flow("register")
    assert list(remote.iterdir())
    assert "git commit" not in caplog.text, "nothing has changed"


def test_a_push_that_fails_is_tried_again_and_takes_neither_report_nor_experiment_with_it(
    pipeline: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    @contextmanager
    def experiment(*_: object) -> Iterator[str]:
        yield "a"
        done.append("saved")

    def refuse(name: str, *_: object) -> None:
        done.append(name)
        raise StageFailed(name, 255, ["ERROR: failed to push", "Having any troubles?"])

    dvc("remote", "add", "--default", "team", str(tmp_path / "remote"))
    monkeypatch.setattr(distill, "push", stages.push.with_options(retry_delay_seconds=0))
    monkeypatch.setattr(stages, "run", refuse)
    monkeypatch.setattr(distill, "experiment", experiment)
    monkeypatch.setattr(distill, "bring_up_to_date", lambda *_: done.append("made"))
    monkeypatch.setattr(distill, "publish_report", lambda *_: done.append("report"))
    with pytest.raises(
        StageFailed, match="push: failed to push.* is done.*dvc exp apply a, then dvc push --run"
    ):
        distill.distill_flow("register")
    assert done == ["made", "report", "push", "push", "push", "saved"]


@pytest.fixture
def dvc_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DVC repository; DVC is asked about its remotes in this process."""

    def called(command: list[str], **_: object) -> Any:
        said = dvc(*command[len(DVC) :], expected=255)
        return subprocess.CompletedProcess(command, 255, "", said)

    monkeypatch.chdir(tmp_path)
    dvc("init", "--quiet", "--no-scm")
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    monkeypatch.setattr(sharing, "subprocess", SimpleNamespace(run=called, **names))
    monkeypatch.setattr(sharing, "ask", lambda command: dvc(*command[len(DVC) :]).strip())


def test_a_bucket_of_dvcs_remote_that_is_not_there_is_told_at_the_start(
    dvc_here: None, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    remote = "[core]\nremote = team\n['remote \"team\"']\nurl = {}\nendpointurl = {}\n"
    write_text(Path(".dvc/config"), remote.format("s3://buckt/prefix", server))
    with pytest.raises(
        StageFailed, match="start: DVC's remote 'team', s3://buckt/prefix, .*bucket does not exist"
    ):
        check_remote()
    write_text(Path(".dvc/config"), remote.format(s3, server))
    assert check_remote() == "team", "a prefix is made by the push, and DVC's own settings count"


def test_keys_that_lack_and_a_remote_that_is_silent_are_told_at_the_start(
    dvc_here: None, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dvc("remote", "add", "--default", "team", s3)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    with pytest.raises(StageFailed, match="'team', s3://.*: Unable to locate credentials"):
        check_remote()

    def silent(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(sharing.subprocess, "run", silent)
    with pytest.raises(StageFailed, match="'team', s3://.* not answered in 60 seconds") as error:
        check_remote()
    assert error.value.may_pass


def test_a_folder_that_results_can_not_be_sent_to_is_told_at_the_start(
    dvc_here: None, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    remote = "[core]\nremote = team\n['remote \"team\"']\nurl = {}\n"
    for scheme in ("", "file://"):
        write_text(Path(".dvc/config"), remote.format(f"{scheme}{tmp_path}/new/folder"))
        assert check_remote() == "team" and not Path("new").exists()
        write_text(Path(".dvc/config"), remote.format(f"{scheme}{tmp_path}/file/folder"))
        with pytest.raises(StageFailed, match="'team', .*/file is a file.*core.remote ''"):
            check_remote()
    write_text(Path(".dvc/config"), "[core]\nremote = gone\n")
    with pytest.raises(StageFailed, match="no remote 'gone': dvc remote add gone URL"):
        check_remote()
    dvc("config", "--local", "core.remote", "")
    assert check_remote() is None, "as the message says"


def test_a_remote_that_dvc_cannot_tell_of_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dvc("init", "--quiet", "--no-scm")
    Path(".dvc/config").write_text("[core\n")
    with pytest.raises(StageFailed, match="dvc config --list"):
        check_remote()


# Locks


def test_another_run_in_the_checkout_is_named_and_waited_for(
    pipeline: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SECONDS_BETWEEN_TRIES", 0.2)
    pipeline["prepare"]["cmd"] += " && touch begun && while test ! -e go; do sleep 0.1; done"
    write_stages(pipeline)
    other = subprocess.Popen([*DVC, "repro", "prepare"])
    wait_until(Path("begun").exists)
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if "another run is at it" in line:
            Path("go").touch()

    process.repro("prepare", log)
    assert other.wait() == 0
    assert any(f"PID {other.pid}" in line and "of 10:00 at most" in line for line in lines)
    assert ran() == ["prepare"], "the other's result is taken"


def test_a_run_that_stays_busy_is_given_up_in_a_line_that_names_it(
    pipeline: dict[str, Any],
) -> None:
    pipeline["prepare"]["cmd"] += " && touch begun && sleep 60"
    write_stages(pipeline)
    other = subprocess.Popen([*DVC, "repro", "prepare"], start_new_session=True)
    try:
        wait_until(Path("begun").exists)
        with pytest.raises(StageFailed) as failed:
            process.repro("prepare", print, wait_minutes=0)
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.wait()
    assert re.fullmatch(
        rf"prepare: another run is at it \(PID {other.pid}: .*\): .*", str(failed.value)
    )


@pytest.mark.services
def test_a_dvc_lock_that_is_held_for_ever_is_named_and_given_up(
    pipeline: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SECONDS_UNTOLD", 0.0)
    hold = (
        "import time, zc.lockfile as z; a = z.LockFile('.dvc/tmp/lock'); print(1); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-uc", hold], stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"1\n"
    lines: list[str] = []
    try:
        with pytest.raises(StageFailed, match=f"lock is held by PID {holder.pid}: .*end it"):
            process.repro("prepare", lines.append, wait_minutes=0.03)
    finally:
        holder.kill()
        holder.wait()
    assert f"waiting for DVC's lock, which is held by PID {holder.pid}" in lines[0]
    process.repro("prepare", lines.append)


@pytest.mark.parametrize(
    "code",
    [
        "from flows.process import run; run('a', ['sleep', '{mark}'], print)",
        # as Prefect's server, which no signal to its parent reaches
        "import subprocess, time; from flows import guard; guard.start(); "
        "subprocess.Popen(['sleep', '{mark}'], start_new_session=True); time.sleep(60)",
    ],
    ids=["a stage", "a server"],
)
def test_what_a_killed_flow_had_started_ends_by_itself(code: str) -> None:
    mark = f"7{uuid.uuid4().int % 10**8}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    flow = subprocess.Popen([sys.executable, "-c", code.format(mark=mark)], env=environment)

    def alive() -> bool:
        processes = psutil.process_iter(["cmdline", "status"])
        return any(p.info["cmdline"] == ["sleep", mark] and is_running(p, mark) for p in processes)

    wait_until(alive)
    flow.kill()
    flow.wait()
    wait_until(lambda: not alive())


def wait_until(holds: Callable[[], bool], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_only_a_run_of_this_machine_and_checkout_whose_process_is_gone_is_lost() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = lost._here()
    dead = here | {"pnp.pid": gone.pid}
    reused = here | {"pnp.started": 1.0}  # another process has its number now
    for labels, expected in (
        (here, False),
        (dead, True),
        (reused, True),
        (dead | {"pnp.host": "elsewhere"}, False),
        (dead | {"pnp.checkout": "/elsewhere"}, False),
        ({}, False),
    ):
        run = SimpleNamespace(labels=labels)
        assert lost.is_lost(run) is expected  # type: ignore[arg-type]


# Before anything runs


def test_a_bucket_that_is_not_there_is_told_before_any_stage(world: Path, s3: str) -> None:
    write_params(world, toy_params() | {"storage": "s3://buckt/prefix"})
    with pytest.raises(StageFailed, match="start: storage: there is no bucket buckt"), begin():
        pass
    write_params(world, toy_params() | {"storage": s3})
    with pytest.raises(StageFailed, match="start: .* is no git repository.*git init"), begin():
        pass
    git("init", "--quiet")
    with begin() as params:
        assert params.storage == s3
        assert os.environ[COMMIT] == "none"
    assert COMMIT not in os.environ


def test_a_checkout_whose_dvc_does_without_git_may_be_outside_git(world: Path) -> None:
    dvc("init", "--quiet", "--no-scm")
    with begin():
        assert os.environ[COMMIT] == "none"


def test_no_password_reaches_a_log_or_what_mlflow_is_told_of_the_flow(
    world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    address = "https://ann:se/cr@et@prefect.example"
    git("init", "--quiet")
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__UI_URL", f"{address}/runs/1")
    with temporary_settings({PREFECT_API_URL: f"{address}/api"}), begin():
        assert os.environ[FLOW_RUN_URL] == "https://prefect.example/runs/1"
    lines: list[str] = []
    with pytest.raises(StageFailed) as failed:
        process.run("a", ["sh", "-c", f"echo 'error: no {address}'; exit 1"], lines.append)
    assert lines == ["error: no https://prefect.example"]
    assert str(failed.value) == "a: no https://prefect.example"
    with pytest.raises(SystemExit):
        stop(ValueError(f"no {address}"), exit_code=1)
    assert capfd.readouterr().err == "error: no https://prefect.example\n"


class Unsaid:
    """Has no words."""

    def __str__(self) -> str:
        raise LookupError("unsaid")


def test_no_password_of_prefects_own_address_is_in_its_log_which_begins_with_it(
    prefect_server: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    @flow(name="nothing")
    def nothing() -> None:
        get_run_logger().info("at %s", address)
        logging.getLogger("prefect.events.clients").warning("no way to %r", f"{address}/events")
        raise OSError(f"no {address}")

    address = "https://ann:se/cr@et@prefect.example"
    monkeypatch.setattr(handlers, "emit_api_log", lambda log: sent.append(log["message"]))
    with temporary_settings({PREFECT_UI_URL: address}), pytest.raises(OSError, match="no "):
        nothing()
    told = caplog.text
    assert "View at https://prefect.example/runs/flow-run/" in told
    assert "no way to 'https://prefect.example/events'" in told
    assert "OSError: no https://prefect.example\n" in told, "in the traceback"
    assert "at https://prefect.example" in sent
    assert not [text for text in (told, *sent) if "cr@et" in text]


@pytest.mark.parametrize("arguments", [({"b": 1},), ("a", "b"), (Unsaid(),)])
def test_a_log_line_that_can_not_be_told_stops_nothing_and_its_traceback_has_no_password(
    arguments: tuple[Any, ...],
) -> None:
    form = "%(a)s" if arguments[0] == {"b": 1} else "%s"
    try:
        raise OSError("no https://ann:se/cr@et@prefect.example")
    except OSError as error:
        record = logging.getLogger("any").makeRecord(
            "any", logging.ERROR, "a", 1, form, arguments, (OSError, error, error.__traceback__)
        )
    with pytest.raises(Exception, match=r"'a'|not all arguments|unsaid"):
        record.getMessage()
    assert str(record.exc_text).endswith("OSError: no https://prefect.example")


def test_a_server_that_is_not_there_is_told_within_seconds(world: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    done = subprocess.run(
        [sys.executable, "-m", "flows", "distill"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_API_URL": url},
        capture_output=True,
        text=True,
        timeout=60,  # most of it imports on a busy machine
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"no Prefect server answers at PREFECT_API_URL={url}" in line


AWAY = """
import atexit, sys
import httpx
from flows import __main__ as flows

def start(arguments, params):
    atexit.register(print, "Prefect tries again")  # as its log does, for minutes
    raise httpx.ConnectError("refused")

flows.start = start
flows.check_server = lambda: None
sys.argv = ["flows", "distill"]
flows.main()
"""


def test_a_server_that_went_away_is_told_in_one_line_and_not_waited_for_again(world: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", AWAY], capture_output=True, text=True, env=environment
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Prefect's server went away while this ran (refused)")
    assert (done.returncode, done.stdout) == (os.EX_TEMPFAIL, "")


def test_a_failed_stage_stops_the_flow_in_its_own_words(
    pipeline: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline["cache"]["cmd"] = "echo cache >> ran; echo 'error: no such base'; exit 1"
    write_stages(pipeline)
    with pytest.raises(StageFailed) as failed:
        distill.distill_flow()
    assert str(failed.value) == "cache: no such base"
    assert ran() == ["prepare", "cache"], "neither tried again nor gone past"
    assert "Traceback" not in caplog.text


@pytest.mark.timeout(60)  # it would wait for ever
def test_a_failure_is_raised_in_seconds_where_no_event_can_be_sent(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(self: PrefectEventsClient) -> None:
        await asyncio.sleep(1.0)  # the event is in the queue by then
        raise OSError("no websockets here")

    monkeypatch.setattr(PrefectEventsClient, "__aenter__", refused)
    monkeypatch.setattr(watching, "SECONDS_TO_SEND", 2.0)
    url = f"http://127.0.0.1:{free_port()}/api"
    EventsWorker.set_client_override(PrefectEventsClient, api_url=url)
    began = time.monotonic()
    try:
        with pytest.raises(StageFailed, match="no such base"), watching.saying_why():
            raise StageFailed("cache", 1, ["error: no such base"])
    finally:
        EventsWorker.set_client_override(None)
    assert 1.0 < time.monotonic() - began < 30.0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a", "error: no such base", "ERROR: failed to reproduce 'x'"], "no such base"),
        (["a", "ERROR: Permission denied: '/srv'"], "Permission denied: '/srv'"),
    ],
)
def test_a_failure_is_told_in_the_words_of_the_stage_or_else_of_dvc(
    lines: list[str], message: str
) -> None:
    assert str(StageFailed("x", 1, lines)) == f"x: {message}"


def test_only_what_was_killed_or_waits_for_something_outside_is_tried_again() -> None:
    assert [
        code for code in (1, 2, 3, 75, 137, -9, 255) if StageFailed("x", code, []).may_pass
    ] == [
        75,
        137,
        -9,
    ]


def test_a_killed_stage_is_started_again(
    pipeline: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill.cache, "retry_delay_seconds", [0, 0])
    once = "test -e once || { touch once; kill -KILL $$; }"
    pipeline["cache"]["cmd"] = f"{once}; {pipeline['cache']['cmd']}"
    write_stages(pipeline)
    distill.distill_flow()
    assert ran() == list(STAGES)


@pytest.mark.parametrize("deaf", [False, True], ids=["polite", "deaf"])
def test_a_cancel_leaves_nothing_running(
    deaf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ways = [(how, 1.0) for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)]
    monkeypatch.setattr(process, "WAYS_TO_STOP", ways)
    mark = f"7{uuid.uuid4().int % 10**8}"  # seconds: recognisable among all processes
    ignore = "trap '' INT TERM; " if deaf else ""

    def cancel(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run("a stage", ["sh", "-c", f"{ignore}sleep {mark} & echo started; wait"], cancel)
    alive = [p for p in psutil.process_iter(["cmdline", "status"]) if is_running(p, mark)]
    assert not alive


def is_running(running: psutil.Process, mark: str) -> bool:
    info = running.info
    return mark in (info["cmdline"] or []) and info["status"] != psutil.STATUS_ZOMBIE


def test_a_mistake_in_params_is_one_line(tmp_path: Path) -> None:
    params = toy_params()
    params["distill"]["learning_rat"] = params["distill"].pop("learning_rate")
    write_params(tmp_path, params)
    done = subprocess.run(
        [sys.executable, "-m", "flows", "distill"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "params.yaml" in done.stderr
    assert "distill.learning_rat" in done.stderr


# On a server and a worker, with the toy world


@pytest.fixture
def toy_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    repository = tmp_path / "repository"
    make_repository(repository)
    monkeypatch.chdir(repository)
    return repository


def test_the_page_of_a_version_has_no_password_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:secret@mlflow.example/x/")
    params = load_params(ROOT / "params.yaml")
    page, _ = version_page(params, "3")
    assert page.startswith("https://mlflow.example/x/#/models/pnp-guide/versions/3")
    assert "secret" not in summary(params)


def test_links_lead_to_where_a_browser_finds_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@mlflow:5000")
    monkeypatch.setenv("PNP_MLFLOW_UI_URL", "https://ann:secret@mlflow.example/x/")
    params = load_params(ROOT / "params.yaml")
    page, _ = version_page(params, "3")
    assert page.startswith("https://mlflow.example/x/#/models/pnp-guide/versions/3")
    run = "/#/experiments/1/runs/2"
    assert as_seen(f"http://mlflow:5000{run}", params) == f"https://mlflow.example/x{run}"
    elsewhere = f"http://mlflow:50001{run}"
    assert as_seen(elsewhere, params) == elsewhere


def test_a_report_that_goes_with_its_workspace_is_shown_by_its_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(Path("results/report/table.md"), "FID: one")
    write_text(Path("results/report/index.html"), "")
    shown: list[str] = []
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, **_: shown.append(text))
    params = load_params(ROOT / "params.yaml")
    artifacts.publish_report(params, print)
    artifacts.publish_report(params, print, "funny-gerbil")
    assert str(tmp_path / "results/report/index.html") in shown[0]
    assert str(tmp_path) not in shown[1] and "dvc exp apply funny-gerbil" in shown[1]


@pytest.mark.services
def test_the_version_that_is_told_is_the_reports_and_not_the_newest(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_params(place, toy_params())
    params = load_params(place / "params.yaml")
    report = {"lineage": {"data_hash": "a"}, "models": {"base": 1}, "registered": {"version": "7"}}
    write_json(place / "results/report/summary.json", report)
    write_text(place / "results/report/table.md", "FID: one")
    write_text(place / "guides/bundle/file", "weights")
    told: list[str] = []
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, **_: None)
    artifacts.publish_report(params, told.append)
    assert "are no version of pnp-guide" in told[0], "its 7 is of another registry"
    version = stores.register(0.5, tracking=params.tracking, key=version_key(report))
    assert stores.register(0.6, tracking=params.tracking) != version
    assert f"flows promote --version {version}" in summary(params)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
    assert "there is no folder" in summary(params) and "--version" not in summary(params)


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    """`command` in the background, stopped as a user would stop it."""
    with log.open("w") as file:
        started = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield
    finally:
        for patience_s in (20, 60):  # an idle Prefect worker now and then wants a second Ctrl-C
            started.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                started.wait(timeout=patience_s)
                break
        else:
            started.kill()
            pytest.fail(f"{command} does not stop")


Call = Callable[..., str]


class Servers(NamedTuple):
    """A server and a worker, with the deployments, and what is typed beside them."""

    call: Call  # fails with what the command printed
    run: list[str]  # a deployment, and follow it
    environment: dict[str, str]

    def stages(self) -> list[psutil.Process]:
        """The processes of the stage `distill` that were started here."""
        return [
            p
            for p in psutil.process_iter(["cmdline"])
            if "components.distill" in (p.info["cmdline"] or [])
            and environment_of(p).get("PNP_TEST") == self.environment["PNP_TEST"]
        ]


PREFECT = (sys.executable, "-m", "prefect")


@pytest.fixture
def team(postgres: str, s3: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What docs/deploying.md keeps state in: PostgreSQL, S3, and an MLflow server on both."""
    pytest.importorskip("psycopg2", reason="MLflow reaches PostgreSQL by psycopg2-binary")
    store = f"postgresql+psycopg2://{postgres}/mlflow"
    mlflow = Server(tmp_path, store=store, artifacts=f"{s3}/mlflow")
    mlflow.start()
    database = f"postgresql+asyncpg://{postgres}/prefect"
    yield {
        "MLFLOW_TRACKING_URI": mlflow.uri,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
    }
    mlflow.kill()


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> dict[str, str]:
    """Further variables of server and worker, by the fixture that a test names."""
    return request.getfixturevalue(request.param) if hasattr(request, "param") else {}


@pytest.fixture
def servers(settings: dict[str, str], toy_repository: Path, tmp_path: Path) -> Iterator[Servers]:
    """docs/server.md, steps 1 to 3; when they are stopped, nothing that was started is left."""
    port = free_port()
    mark = uuid.uuid4().hex  # inherited by all that this test starts
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PNP_GUIDE_HOME": str(toy_repository),
        "PNP_TEST": mark,
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        **settings,
    }

    def call(*command: str) -> str:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, " ".join(f"{command}: {done.stdout}".split())
        return done.stdout

    server = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    worker = [*PREFECT, "worker", "start", "--pool", "local"]
    with running(server, tmp_path / "server.log", environment):
        wait_for(f"http://127.0.0.1:{port}/api/health")
        call(*PREFECT, "work-pool", "create", "local", "--type", "process")
        call(*PREFECT, "--no-prompt", "deploy", "--all")
        with running(worker, tmp_path / "worker.log", environment):
            yield Servers(call, [*PREFECT, "deployment", "run", "--watch"], environment)
    left = [p.cmdline() for p in psutil.process_iter() if environment_of(p).get("PNP_TEST") == mark]
    assert not left


def git_status() -> str:
    command = ["git", "status", "--porcelain", "--untracked-files=no"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def experiments(call: Call) -> set[str]:
    return set(re.findall(r"\[(.+?)\]", call(*DVC, "exp", "list")))


@pytest.mark.services
@pytest.mark.timeout(1500)  # some twenty processes, which a busy machine takes its time over
@pytest.mark.parametrize("settings", ["team"], indirect=True)
def test_server_worker_and_command_line(
    servers: Servers, settings: dict[str, str], s3: str, tmp_path: Path
) -> None:
    """docs/server.md, step 4; the other door finds all done, and tells where things are."""
    call = servers.call
    call(*servers.run, "distill/local")
    assert "up to date" in dvc("status")
    call(*servers.run, "promote/local")
    champion = MlflowClient(settings["MLFLOW_TRACKING_URI"]).get_model_version_by_alias(
        "pnp-guide", "champion"
    )
    assert champion.version == "1"
    assert s3fs.S3FileSystem(skip_instance_cache=True).find(f"{s3}/mlflow"), "files are on S3"
    assert not list((tmp_path / "prefect").glob("*.db")), "runs are in PostgreSQL"
    assert not Path("mlflow.db").exists()

    for name in ("PREFECT_API_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL"):
        del servers.environment[name]
    told = call(sys.executable, "-m", "flows", "distill")
    assert "Stage 'register' didn't change, skipping" in told
    for page in ("results/report/index.html", "results/report/grid.png"):
        assert page in told and Path(page).exists()

    # And what it tells works.
    make = [sys.executable, "-m", "components.generate", "--model", "models/tuned"]
    call(*make, "red disc", "--out", "disc.png")
    assert Path("disc.png").exists()


@pytest.mark.services
@pytest.mark.timeout(1500)
def test_a_deployment_with_overrides_is_an_experiment_and_can_be_cancelled(
    servers: Servers,
) -> None:
    call = servers.call
    overrides = 'overrides=["distill.num_images=48"]'
    call(*servers.run, "distill/local", "--param", overrides)
    assert len(experiments(call)) == 1 and not git_status()
    assert not Path("guides").exists(), "the checkout has nothing of it"
    with sqlite3.connect("mlflow.db") as database:
        assert database.execute("SELECT COUNT(*) FROM model_versions").fetchone() == (1,)
    misspelt = ["--param", 'overrides=["distill.num_imagse=48"]']
    with pytest.raises(AssertionError, match="unknown key 'distill.num_imagse', did you mean"):
        call(*servers.run, "distill/local", *misspelt)

    long = 'overrides=["distill.num_images=2000000"]'
    told = call(*PREFECT, "deployment", "run", "distill/local", "--param", long)
    flow_run = re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", told)[0]
    trains = Path("runs/tracking")
    wait_until(lambda: bool(servers.stages() and list(trains.glob("distill-*.jsonl"))), seconds=300)
    call(*PREFECT, "flow-run", "cancel", flow_run)
    wait_until(lambda: not servers.stages(), seconds=60)
    wait_until(lambda: "CANCELLED" in call(*PREFECT, "flow-run", "inspect", flow_run), seconds=60)
    with sqlite3.connect("mlflow.db") as database:
        states = {row[0] for row in database.execute("SELECT status FROM runs")}
    assert "RUNNING" not in states


@pytest.mark.services
@pytest.mark.timeout(1500)
def test_one_more_fine_tune_and_the_champion_are_measured_without_an_edit(
    servers: Servers,
) -> None:
    call = servers.call
    call(*servers.run, "reevaluate/local")  # no champion: nothing to do
    call(*DVC, "repro")
    call(sys.executable, "-m", "components.promote")
    where = ["path=models/tuned", "reference=art/tuned.parquet", "name=another"]
    call(*servers.run, "evaluate-finetune/local", *(x for v in where for x in ("--param", v)))
    (name,) = experiments(call)
    assert "another:" in call("git", "show", f"refs/pnp-guide/{name}:params.yaml")
    assert not Path("results/evaluate/another").exists()
    call(*servers.run, "reevaluate/local")
    assert "up to date" in dvc("status") and not git_status(), "the checkout is as it was"


def wait_for(url: str, *, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def environment_of(running: psutil.Process) -> dict[str, str]:
    try:
        return running.environ()
    except psutil.Error:
        return {}
