"""What is damaged, away or not meant is told by its name, and never taken for nothing."""

import os
import re
import stat
import threading
import time
from contextlib import nullcontext
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    temporary_settings,
)
from ruamel.yaml import YAML

from components import fetch, mlflow_place
from components.errors import MayPassError
from components.lineage import lock_hash
from components.overrides import overridden
from components.params import ParamsError, load_params
from components.places import Tracking
from components.storage import Mirror
from components.tracking import delivery
from components.tracking.journal import Owner, owner
from flows import __main__ as flows
from flows import evaluate, room, start
from flows.artifacts import unwrapped
from flows.process import StageFailed
from pnp_core.files import read_json, write_json
from tests.evaluations import evaluation
from tests.toy import toy_params, write_params


@pytest.mark.parametrize("content", ["", '{"half": ', "\xff"])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "index.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"index.json is damaged \(.*\): bring it back, or"):
        read_json(path)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("cluster", "wait_minutes", float("inf"), "cluster.wait_minutes: should be a finite"),
        ("tracking", "experiment", "", "tracking.experiment: "),
        ("evaluate", "seed", 2**70, "evaluate.seed: should be less than"),
        ("evaluate", "grid_prompts", [date(2026, 1, 1)], "evaluate.grid_prompts[0]: 2026-01-01 is"),
    ],
)
def test_a_value_that_would_fail_hours_later_is_refused_by_its_key(
    tmp_path: Path, section: str, key: str, value: Any, said: str
) -> None:
    params = toy_params()
    params[section][key] = value
    write_params(tmp_path, params)
    with pytest.raises(ParamsError, match=re.escape(said)):
        load_params(tmp_path / "params.yaml")


def test_a_store_is_refused_by_the_name_of_who_named_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
    with pytest.raises(ValueError, match="^MLFLOW_TRACKING_URI 'sqlite"):
        mlflow_place.resolve(None)
    with pytest.raises(ValueError, match="^tracking.uri 'http://' names no server"):
        mlflow_place.resolve("http://")


def test_no_part_of_a_password_is_told() -> None:
    for address in ("http://host:5000/x", "postgresql://db/mlflow", "http://host?x=a"):
        scheme, _, rest = address.partition("://")
        passwords = ("secret", "se@cr@et", "se#cr?et", "se/cr/et", "1/se@c/r:et", "'se,cr\"et")
        passwords += ("se://cr@et", "://", "http://secret", "'se,cr://e=t://", "80://se@cret")
        users = [f"{user}:{word}@" for user in ("ann", "", "ann@team") for word in passwords]
        for who in (*users, "token@", "tok@en@"):
            said = mlflow_place.without_secrets(f"at {scheme}://{who}{rest}, not {address}")
            assert said == f"at {address}, not {address}"
    assert (
        mlflow_place.without_secrets("http://host?x=a@b s3://b/a@c")
        == "http://host?x=a@b s3://b/a@c"
    )
    several = (
        "['http://ann:a/b@one/x','postgresql://:c?d@two:1/y?z=1',http://three:5000/#/models/z]"
    )
    told = "['http://one/x','postgresql://two:1/y?z=1',http://three:5000/#/models/z]"
    assert mlflow_place.without_secrets(several) == told


@pytest.mark.parametrize(
    ("before", "name", "after"),
    [
        ("postgresql+psycopg://db:5432/mlflow?user=ann&", "password", "&sslmode=require"),
        ("postgresql://ann@db/mlflow?", "sslpassword", ""),
        ("mysql://db/mlflow?", "passwd", "#x"),
        ("https://team.blob.core.windows.net/guides?sv=2024&", "sig", "&se=2027"),
        ("https://bucket.s3.amazonaws.com/a?X-Amz-Date=1&", "X-Amz-Signature", "&x=1"),
        ("https://bucket.s3.amazonaws.com/a?", "X-Amz-Security-Token", ""),
        ("s3://bucket/a?", "aws_secret_access_key", ""),
        ("https://store.example/a?b=c&", "api-key", ""),
        ("https://store.example/a?b=c&", "client_secret", ""),
    ],
)
def test_a_secret_in_a_query_is_not_told(before: str, name: str, after: str) -> None:
    said = f"can't reach '{before}{name}=s%2Fe/c+r~et{after}': no route, {before}{name}=tail"
    bare = before.replace("ann@", "")
    told = f"can't reach '{bare}{name}=***{after}': no route, {bare}{name}=***"
    assert mlflow_place.without_secrets(said) == told


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:5000/#/experiments/1?orderByKey=start_time&design=a&tokenizer=b",
        "http://127.0.0.1:5000/#/models/toy@champion",
        "http://mlflow:5000/#/models/toy@champion",
        "http://localhost:5000/a:b@c?d=e@f",
        "http://[::1]:5000?at=a@b",
        "https://mlflow.example/models/toy@champion:1",
        "http://mlflow,http://mlflow/models/toy@champion",
    ],
)
def test_an_at_sign_behind_the_host_is_told(address: str) -> None:
    said = f"['{address}','postgresql+psycopg://ann:se@cret@db/mlflow'] and {address}"
    assert mlflow_place.without_secrets(said) == said.replace("ann:se@cret@", "")


@pytest.mark.parametrize("text", ["tcp://a:1|", "://:", "tcp://a:1,http://b/", "://", "://a"])
def test_a_long_line_is_searched_for_passwords_at_once(text: str) -> None:
    line = "an@" + text * (200_000 // len(text))
    began = time.process_time()
    assert mlflow_place.without_secrets(f"{line},s3://ann:secret@x") == f"{line},s3://x"
    assert mlflow_place.without_secrets(line) == line
    for part in ("?key", "?token", "&secret_access_"):
        line = part * (200_000 // len(part))
        assert mlflow_place.without_secrets(line) == line
    assert time.process_time() - began < 2.0


def test_a_registry_apart_from_the_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "https://ann:secret@registry.example")
    with pytest.raises(ValueError, match="^MLFLOW_REGISTRY_URI .*another store.* Unset") as error:
        mlflow_place.resolve("http://mlflow:5000")
    assert "secret" not in str(error.value)
    assert mlflow_place.resolve("databricks") == "databricks"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///mlflow.db")
    mlflow_place.resolve("sqlite:///mlflow.db")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://mlflow:5000/")
    assert mlflow_place.resolve("http://mlflow:5000") == "http://mlflow:5000"


@pytest.mark.parametrize("path", ["models/one #2", "123", "a: b", "yes"])
def test_a_fine_tune_is_measured_by_its_path_whatever_yaml_makes_of_it(
    tmp_path: Path, path: str
) -> None:
    write_params(tmp_path, toy_params())
    values = {"path": path, "reference": path}
    text = overridden(tmp_path / "params.yaml", evaluate.row_of("other", values))
    assert YAML(typ="safe").load(text)["models"]["other"] == values


def test_two_models_that_differ_after_a_dot_have_rows_of_their_own() -> None:
    names = ("anything-v3.0", "anything-v3.5", "v1.5.safetensors", "v1.safetensors")
    found = [evaluate.name_of(f"models/{name}") for name in names]
    assert found == ["anything-v3-0", "anything-v3-5", "v1-5", "v1"]
    for name in found:
        evaluate.row_of(name, {})


def test_a_champion_that_was_made_elsewhere_has_no_numbers_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate.registered() == {}
    write_json(evaluate.BUNDLE / evaluate.SUMMARY, {"models": {"base": {"of": "another format"}}})
    assert evaluate.registered() == {}
    known = evaluation("base")
    known.save(tmp_path)
    written = read_json(tmp_path / "evaluation.json")
    write_json(evaluate.BUNDLE / evaluate.SUMMARY, {"models": {"base": written}})
    assert evaluate.registered() == {"base": known}


def test_numbers_of_a_champion_that_was_measured_otherwise_do_not_stand_beside_todays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[tuple[list[dict[str, str]], str]] = []
    monkeypatch.setattr(
        evaluate,
        "create_table_artifact",
        lambda rows, *, key, description: shown.append((rows, description)),
    )
    evaluation("base").save(tmp_path)
    for before in (evaluation("base"), evaluation("base", judges_hash="another"), None):
        evaluate.compare("base", before, tmp_path)
    (alike, _), (unlike, why), (new, _) = shown
    assert [row["registered"] for row in alike] == [row["now"] for row in alike]
    for rows in (unlike, new):
        assert {row["registered"] for row in rows} == {""}
        assert [row["now"] for row in rows] == [row["now"] for row in alike]
    assert "the judges differ" in why and "the judges differ" in capsys.readouterr().out


def test_a_fine_tune_is_refused_a_name_that_no_row_can_have() -> None:
    with pytest.raises(ParamsError, match="name: 'sd1.5' can't be a name here: letters, digits"):
        evaluate.row_of("sd1.5", {})


@pytest.mark.parametrize("lock", ["", "<<<<<<< ours\nstages: {}\n=======\n", "schema: '2.0'\n"])
def test_a_lock_in_the_middle_of_a_merge_is_named(tmp_path: Path, lock: str) -> None:
    path = tmp_path / "dvc.lock"
    path.write_text(lock)
    with pytest.raises(ValueError, match="dvc.lock can't be read: resolve its conflicts"):
        lock_hash(path)


@pytest.mark.parametrize("here", [".", "models", "models/base/model_index.json"])
def test_fetching_a_guide_replaces_no_other_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_params(Path(), toy_params())
    write_json(Path("models/base/model_index.json"), {})
    with pytest.raises(ValueError, match="it holds no guide, and would be replaced"):
        fetch.run(load_params(Path("params.yaml")), "champion", Path(here))


class BehindALogin(BaseHTTPRequestHandler):
    """A server whose proxy shows a page to whoever lacks a header."""

    def do_GET(self) -> None:
        kind = "application/json" if self.headers["X-Pass"] == "word" else "text/html"
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize(("headers", "is_refused"), [({}, True), ({"X-Pass": "word"}, False)])
def test_prefects_api_is_asked_as_prefect_is_set_and_a_page_is_not_taken_for_it(
    headers: dict[str, str], is_refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BehindALogin) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        settings = {PREFECT_API_URL: url, PREFECT_CLIENT_CUSTOM_HEADERS: headers}
        with (
            temporary_settings(settings),
            pytest.raises(SystemExit) if is_refused else nullcontext(),
        ):
            flows.check_server()
        server.shutdown()
    told = capsys.readouterr().err
    assert ("is a page, not Prefect's API: does /api lack?" in told) is is_refused


@pytest.mark.parametrize(
    ("status", "said"), [(401, "does not let us in (401)"), (None, "went away")]
)
def test_a_server_that_lets_nobody_in_is_not_said_to_have_gone(
    status: int | None, said: str
) -> None:
    request = httpx.Request("GET", "http://127.0.0.1:4200/api/flows")
    if status is None:
        error: httpx.HTTPError = httpx.ConnectError("refused", request=request)
    else:
        answer = httpx.Response(status, request=request)
        error = httpx.HTTPStatusError("no", request=request, response=answer)
    assert said in flows.why_not(error)


def test_a_gpu_is_guarded_for_all_users_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's lock can be opened, though not written."""
    monkeypatch.setattr(room.tempfile, "gettempdir", lambda: str(tmp_path))
    before = os.umask(0o077)
    try:
        held = room._lock("0")
    finally:
        os.umask(before)
    assert held is not None
    (lock,) = tmp_path.iterdir()
    assert stat.S_IMODE(lock.stat().st_mode) == 0o644
    assert room._lock("0") is None
    os.close(held)
    again = room._lock("0")
    assert again is not None
    os.close(again)


@pytest.mark.parametrize("stage", start.READS)
def test_a_flow_that_starts_in_the_middle_says_what_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: start.Stage
) -> None:
    monkeypatch.chdir(tmp_path)
    *there, last = start.READS[stage]
    for path in there:
        path.mkdir(parents=True)
    with pytest.raises(StageFailed, match=rf"^{stage}: there is no {last}: bring it \(dvc pull\)"):
        start.check_start(stage)
    last.mkdir(parents=True)
    start.check_start(stage)


def test_what_a_checkout_began_is_its_own_though_its_identity_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracking = Tracking(uri=None, experiment="toy")
    journal = delivery.begin(tracking, "distill", params={}, key="key")
    before = owner()
    (tmp_path / "runs/tracking/checkout.json").write_text("")
    now = owner()
    assert now.id != before.id and delivery._is_mine(journal, now)
    elsewhere = Owner(now.id, now.user, f"{now.place}-copy")
    assert not delivery._is_mine(journal, elsewhere)


def test_a_paragraph_is_one_line_on_prefects_page() -> None:
    text = "| a |\n|---|\n| 1 |\n\nFID: one\nand two.\n\nMore.\n"
    assert unwrapped(text) == "| a |\n|---|\n| 1 |\n\nFID: one and two.\n\nMore."


def test_cuda_visible_devices_may_say_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert room.gpus() == []


@pytest.mark.parametrize("storage", ["s3://", "s3:///x", "memory://x", "http://127.0.0.1:9/x"])
def test_storage_that_keeps_nothing_is_refused(storage: str) -> None:
    """Where a shard has been sent, its local copy is deleted."""
    with pytest.raises(ValueError, match=f"storage: {storage} is no place where files are kept"):
        Mirror(storage)


def test_keys_in_the_name_of_a_bucket_are_refused_and_not_printed() -> None:
    with pytest.raises(ValueError, match="storage has a user in it") as refused:
        Mirror("s3://ann:secret/+@bucket/prefix")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "storage",
    [
        "abfs://team@account.dfs.core.windows.net/prefix",
        "abfss://team@account.dfs.core.windows.net/prefix",
        "az://team@account.dfs.core.windows.net/prefix",
        "oci://team@namespace/prefix",
    ],
)
def test_a_container_before_an_at_sign_is_no_user(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SimpleNamespace(protocol=storage.partition(":")[0])  # else a package that is not here
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda _: (files, "team/prefix"))
    url = Mirror(storage, "cache").url
    assert mlflow_place.without_secrets(f"at {url}") == f"at {storage}/cache"
    secret = storage.replace("team@", "team:se@cret@")
    with pytest.raises(ValueError, match="storage has a user in it"):
        Mirror(secret)
    assert mlflow_place.without_secrets(secret) == storage.replace("team@", "")


def test_a_file_is_no_folder_to_keep_shards_in(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file is a file: name a folder"):
        Mirror(str(tmp_path / "file")).check()


def test_storage_that_is_away_as_a_flow_begins_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise MayPassError("storage: could not look")

    monkeypatch.chdir(tmp_path)
    write_params(Path(), toy_params() | {"storage": str(tmp_path)})
    monkeypatch.setattr(start.Mirror, "check", away)
    with (
        pytest.raises(StageFailed, match="start: storage: could not look") as failed,
        start.begin(),
    ):
        pass
    assert failed.value.exit_code == os.EX_TEMPFAIL and failed.value.may_pass
