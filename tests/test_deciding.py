"""Deciding about a champion: alone, with a reason, dry, and back again."""

import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components import promote
from components.params import Params
from components.promote import Options
from components.reevaluation import Reevaluated
from components.tracking import Decision, Registry, TrackingError, lock
from components.tracking.lock import DecisionLock
from tests.cases import few_of
from tests.evaluations import evaluation
from tests.stores import NAME, TOY, Calls, copy_checkout, folder_of, make_checkout, register
from tests.test_promote import champion, decide, params

pytest_plugins = ["tests.stores"]


def aliases() -> tuple[str | None, str | None]:
    """The champion and who was it before."""
    registry = Registry(TOY, NAME)
    return registry.champion(), registry.previous()


def verdicts() -> list[tuple[str, str, str | None]]:
    return [(d.verdict, d.candidate, d.champion) for d in Registry(TOY, NAME).decisions()]


def held(seconds: float = 0.0, **of: Any) -> DecisionLock:
    """A lock of this process, unopened."""
    return DecisionLock(Registry(TOY, NAME).store, NAME, wait_s=seconds, **of)


@pytest.fixture(scope="module")
def checkout_with_versions(fresh_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions") / "checkout"
    with pytest.MonkeyPatch.context() as patch:
        make_checkout(folder, fresh_database, patch)
        for fvu in (0.5, 0.4, 0.7):
            register(fvu)
        assert decide("1") == 0
    return folder


@pytest.fixture
def two_versions(place: Path, checkout_with_versions: Path) -> None:
    """Version 1 is champion, version 2 better and version 3 worse than it."""
    copy_checkout(checkout_with_versions, place)


# Options


def test_a_dry_run_says_all_and_changes_nothing(
    two_versions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = verdicts()
    capsys.readouterr()
    assert decide("3", dry_run=True) == 3
    told = capsys.readouterr()
    assert "FAILS  base: guidance_fvu.max_loss: 0.200 [" in told.out
    assert told.out.count("holds  base, 16 steps: ") == 6 and "refused: " in told.err
    assert decide("2", dry_run=True) == 0
    assert "version 2 would be champion (promoted), before: 1" in capsys.readouterr().out
    assert (aliases(), verdicts()) == (("1", None), before)


def test_what_is_forced_has_a_reason_that_is_kept(
    two_versions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decide("3") == 3
    assert decide("3", force=True, reason="the judge does not know this style") == 0
    forced = Registry(TOY, NAME).decisions()[-1]
    assert (forced.verdict, forced.why) == ("forced", "the judge does not know this style")
    assert forced.reasons == Registry(TOY, NAME).decisions()[-2].reasons
    assert aliases() == ("3", "1")
    capsys.readouterr()
    promote.print_log(params())
    assert "reason given: the judge does not know this style" in capsys.readouterr().out


def test_what_passes_is_promoted_and_not_forced(two_versions: None) -> None:
    assert decide("2", force=True, reason="be sure") == 0
    assert verdicts()[-1][0] == "promoted"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"force": True}, "--force needs --reason"),
        ({"force": True, "reason": "  "}, "--force needs --reason"),
        ({"rollback": True, "force": True, "reason": "x"}, "compares nothing"),
        ({"rollback": True, "reevaluate": True}, "compares nothing"),
    ],
)
def test_options_that_contradict_one_another_are_refused(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Options(**options)


def test_a_rollback_names_no_version(two_versions: None) -> None:
    with pytest.raises(ValueError, match="leave out --version"):
        promote.run(params(), "2", Options(rollback=True))


@pytest.mark.parametrize("commit", ["c0ffee-dirty", "none", "unknown"])
def test_what_no_commit_has_is_refused_unless_allowed(
    place: Path, commit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    register(commit=commit)
    assert decide("1") == 3 and champion() is None
    assert f"made by {commit}, which is no commit" in capsys.readouterr().err
    assert decide("1", allow_dirty=True) == 0 and champion() == "1"


def test_the_page_says_what_was_decided(two_versions: None, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert decide("3", page=page) == 3
    text = page.read_text()
    assert text.startswith("# pnp-guide version 3: refused\n\nIt does not become champion: ")
    assert "| base |  | `guidance_fvu.max_loss` | ≤ 0.03 | 0.200 |" in text
    assert Registry(TOY, NAME).decisions()[-1].text == text[:5000]
    assert decide("1", page=page) == 0 and "is the champion already" in page.read_text()


# Judged anew


@pytest.fixture
def anew(two_versions: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """What judging anew finds of each version's guidance_fvu, by another judge."""
    found = {"1": 0.6, "3": 0.3}

    def judged(name: str, version: str, bundle: Path, params: Params) -> Reevaluated:
        file = tmp_path / f"version-{version}.json"
        file.write_text("{}")
        result = evaluation(guidance_fvu=found[version], judge="new", judges_hash="new")
        return Reevaluated(evaluations={"base": result}, file=file)

    monkeypatch.setattr(promote, "reevaluate", judged)
    return found


def test_both_are_judged_anew_and_what_was_found_is_kept(anew: dict[str, float]) -> None:
    assert decide("3") == 3, "by what it was measured to be"
    assert decide("3", reevaluate=True) == 0 and aliases() == ("3", "1")
    registry = Registry(TOY, NAME)
    decision = registry.decisions()[-1]
    assert decision.values["candidate.base.guidance_fvu.most"] == 0.3
    assert decision.values["champion.base.guidance_fvu.most"] == 0.6
    client = registry.store.client
    experiment = client.get_experiment_by_name(f"{NAME}-decisions").experiment_id
    (run,) = client.search_runs(
        [experiment], order_by=["attributes.start_time DESC"], max_results=1
    )
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"version-1.json", "version-3.json", "rules.json"} <= kept


def test_a_champion_that_was_not_judged_anew_is_compared_with_nothing(
    anew: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deciding = Registry.deciding

    def after_another(registry: Registry, *, wait_s: float) -> Any:
        registry.store.client.set_registered_model_alias(NAME, "champion", "2")
        return deciding(registry, wait_s=wait_s)

    monkeypatch.setattr(Registry, "deciding", after_another)
    assert decide("3", reevaluate=True) == 1 and champion() == "2"
    assert "the champion is 2 now, and was another when they were judged" in capsys.readouterr().err


def test_a_champion_made_elsewhere_is_compared_with_when_it_is_judged_anew(
    anew: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    summary = folder_of("1") / "summary.json"
    summary.rename(summary.with_name("weights.safetensors"))
    assert decide("3") == 3 and "champion 1: usable: " in capsys.readouterr().err
    anew["3"] = 0.9
    assert decide("3", reevaluate=True) == 3, "it is worse"
    assert "usable" not in capsys.readouterr().err
    anew["3"] = 0.3
    assert decide("3", reevaluate=True) == 0 and aliases() == ("3", "1")


def test_who_is_champion_already_is_told_before_it_is_judged_anew(
    two_versions: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(promote, "reevaluate", None)  # would take hours
    assert decide("1", reevaluate=True) == 0
    assert "version 1 is the champion already" in capsys.readouterr().out


@pytest.mark.parametrize("alias_moves_to", ["2", None])
def test_who_was_champion_until_it_is_decided_is_not_judged_by_what_it_was(
    two_versions: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    alias_moves_to: str | None,
) -> None:
    deciding = Registry.deciding

    def after_another(registry: Registry, *, wait_s: float) -> Any:
        client = registry.store.client
        if alias_moves_to:
            client.set_registered_model_alias(NAME, "champion", alias_moves_to)
        else:
            client.delete_registered_model_alias(NAME, "champion")
        return deciding(registry, wait_s=wait_s)

    monkeypatch.setattr(Registry, "deciding", after_another)
    assert decide("1", reevaluate=True) == 1 and champion() == alias_moves_to
    assert f"the champion is {alias_moves_to or 'none'} now, and was" in capsys.readouterr().err


def test_a_page_that_can_not_be_written_is_told_before_anything_is_decided(
    two_versions: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in (tmp_path, Path("mlflow.db/page.md"), Path("/proc/page.md")):
        assert decide("2", page=page) == 1 and champion() == "1"
    told = capsys.readouterr().err
    assert "it is a folder; name a file" in told and "nothing can be written in /proc" in told


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--reason", "caf\udce9"], "--reason: it is not UTF-8 from character 4 on"),
        (["--version", str(2**63)], "--version: no version has the number"),
    ],
)
def test_an_option_that_no_store_takes_is_refused_before_it_is_asked(
    option: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["promote", *option])
    with pytest.raises(SystemExit):
        promote.parsed()
    assert message in capsys.readouterr().err


# Back again


def test_a_rollback_goes_to_the_champion_before_and_can_be_undone(
    two_versions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decide("2") == 0 and aliases() == ("2", "1")
    assert decide(rollback=True, reason="users complain") == 0
    assert aliases() == ("1", "2")
    assert verdicts()[-1] == ("rolled back", "1", "2")
    assert Registry(TOY, NAME).decisions()[-1].why == "users complain"
    assert "version 1 is now champion (rolled back), before: 2" in capsys.readouterr().out
    assert decide(rollback=True) == 0 and aliases() == ("2", "1")


def test_without_a_previous_champion_nothing_is_rolled_back(
    two_versions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = verdicts()
    assert decide(rollback=True) == 1
    said = capsys.readouterr().err
    assert "has no previous champion to go back to: the alias 'previous' is not set" in said
    assert len(said.splitlines()) == 1 and verdicts() == before


def test_a_previous_champion_whose_files_are_lost_is_not_gone_back_to(
    two_versions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decide("2") == 0
    folder = folder_of("1")
    folder.rename(folder.with_name("elsewhere"))
    assert decide(rollback=True) == 1
    assert "its files are lost" in capsys.readouterr().err and aliases() == ("2", "1")


@pytest.mark.parametrize("first", few_of(range(4), 0))
def test_a_rollback_happens_or_an_error_is_told_whichever_call_fails(
    two_versions: None, calls: Calls, first: int
) -> None:
    client = Registry(TOY, NAME).store.client

    def reset(fails_at: int | None = None) -> None:
        client.set_registered_model_alias(NAME, "champion", "2")
        client.set_registered_model_alias(NAME, "previous", "1")
        calls.reset(fails_at)

    reset()
    assert decide(rollback=True) == 0
    number = len(calls.names)
    for failing in range(first, number, 4):
        reset(failing)
        code = decide(rollback=True)
        calls.reset()
        assert "1" in aliases(), "who is gone back to has an alias all the time"
        assert (code, aliases()) in (
            (0, ("1", "2")),
            (1, ("2", "1")),
            (1, ("1", "1")),
            (1, ("1", "2")),
        )


def test_a_champion_whose_files_are_lost_can_be_replaced_by_force_alone(
    two_versions: None,
) -> None:
    folder = folder_of("1")
    folder.rename(folder.with_name("elsewhere"))
    assert decide("2") == 1 and champion() == "1"
    assert decide("2", force=True, reason="its files are gone") == 0 and champion() == "2"
    assert "its files are lost" in Registry(TOY, NAME).decisions()[-1].reasons[0]


def test_a_champion_that_was_deleted_is_not_taken_for_none(
    two_versions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decide("2") == 0
    client = Registry(TOY, NAME).store.client
    client.delete_model_version(NAME, "2")
    assert decide("3") == 3 and aliases() == (None, "1")
    assert "champion 2: usable: by the log it is champion" in capsys.readouterr().err
    assert decide(rollback=True) == 0 and aliases() == ("1", "1")
    client.delete_registered_model_alias(NAME, "champion")
    assert decide("3", force=True, reason="a new beginning") == 0 and champion() == "3"
    client.delete_registered_model_alias(NAME, "champion")
    assert decide("1") == 3 and decide("3") == 0, "by the log it is champion"


@pytest.mark.parametrize(
    "content",
    few_of(
        [
            *(None, "", "[]", '{"models": 1}', '{"models": {}, "lineage": 3}'),
            *('{"models": {"base": 1}}', '{"models": {"base": {"format": 2, "cells": [1]}}}'),
        ],
        *(None, '{"models": {"base": {"format": 2, "cells": [1]}}}'),
    ),
)
def test_a_version_that_does_not_say_what_it_was_measured_to_be_is_refused_and_recorded(
    two_versions: None, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = folder_of("2") / "summary.json"
    summary.with_name("weights.safetensors").touch()
    summary.unlink()
    if content is not None:
        summary.write_text(content)
    assert decide("2") == 3 and champion() == "1"
    assert "version 2: usable: " in capsys.readouterr().err
    assert verdicts()[-1] == ("refused", "2", "1")
    assert decide("2", force=True, reason="made elsewhere") == 0 and champion() == "2"
    assert decide("3") == 3 and "champion 2: usable: " in capsys.readouterr().err


def test_previous_stays_who_it_was_if_the_candidate_is_deleted_before_it_is_crowned(
    two_versions: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decide("2") == 0
    register(0.3)
    client = Registry(TOY, NAME).store.client
    decide_on = Registry.decide

    def after_a_deletion(self: Registry, *given: Any, **named: Any) -> None:
        client.delete_model_version(NAME, "4")
        decide_on(self, *given, **named)

    monkeypatch.setattr(Registry, "decide", after_a_deletion)
    assert decide("4") == 1 and aliases() == ("2", "1")
    assert "no usable version 4" in capsys.readouterr().err
    assert not Registry(TOY, NAME).decisions()[-1].is_done


def test_a_record_whose_tags_were_edited_hides_none_of_the_others(
    two_versions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in ("2", "3"):
        decide(version)
    registry = Registry(TOY, NAME)
    experiment = registry.store.client.get_experiment_by_name(f"{NAME}-decisions")
    assert experiment
    (oldest,) = registry.store.client.search_runs([experiment.experiment_id])[-1:]
    for tag in ("candidate", "champion", "commit"):
        registry.store.client.delete_tag(oldest.info.run_id, tag)
    promote.print_log(params())
    assert "version unknown promoted" in capsys.readouterr().out
    assert [d.candidate for d in registry.decisions()][1:] == ["2", "3"]


# Alone


def test_while_one_decides_another_waits_and_says_for_whom(
    two_versions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with held():
        assert decide("2") == 1
        said = capsys.readouterr().err
        assert "someone else is deciding on pnp-guide (" in said and "run the same command" in said
        assert aliases() == ("1", None)
    assert decide("2") == 0
    names = [model.name for model in Registry(TOY, NAME).store.client.search_registered_models()]
    assert names == [NAME], "no lock is left"


def test_a_lock_whose_process_is_gone_is_taken_over_at_once(two_versions: None) -> None:
    left = held()
    left.__enter__()
    left._alive.end(is_over=False)  # as when it was killed
    began = time.monotonic()
    assert decide("2") == 0
    assert time.monotonic() - began < 5


def test_a_lock_of_elsewhere_is_taken_over_when_it_has_expired(two_versions: None) -> None:
    left = held()
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr(lock, "owner", lambda: SimpleNamespace(place="b@b:/b"))
        elsewhere.setattr(lock, "LEASE_S", -lock.CLOCKS_DIFFER_S - 1)
        left.__enter__()
    with held(), pytest.raises(TrackingError, match="Nothing was changed: run the same command"):
        left.check()


def test_of_two_who_see_the_same_stale_lock_none_takes_the_others(two_versions: None) -> None:
    left = held()
    left.__enter__()
    left._alive.end(is_over=False)
    slow = held()
    seen = slow._read()
    assert seen and lock._is_stale(seen)
    with held() as quick:
        slow._take_away(seen)  # late: that lock is gone, and this one another's
        quick.check()
        with pytest.raises(TrackingError, match="someone else is deciding"):
            slow.__enter__()


def test_a_lock_that_was_taken_over_is_deleted_by_a_decision_a_day_later(
    two_versions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> list[str]:
        client = Registry(TOY, NAME).store.client
        return [model.name for model in client.search_registered_models()]

    left = held()
    left.__enter__()
    left._alive.end(is_over=False)
    assert decide("2") == 0
    assert len(names()) == 2, "whoever still thinks that it is there can't take another's"
    monkeypatch.setattr(lock, "SECONDS_KEPT", -2 * lock.LEASE_S)
    assert decide("3") == 3 and names() == [NAME]


@pytest.mark.parametrize("expires", ["soon", "", "9e99"])
def test_a_lock_whose_expiry_was_edited_expires_as_any_other(
    two_versions: None, expires: str
) -> None:
    left = held()
    left.__enter__()
    left._alive.end(is_over=True)
    registry = Registry(TOY, NAME)
    registry.store.client.set_registered_model_tag(left.name, lock.EXPIRES, expires)
    found = registry.store.client.get_registered_model(left.name)
    made = found.creation_timestamp / 1000
    assert 0 <= lock._expires(found) - made - lock.LEASE_S <= lock.CLOCKS_DIFFER_S
    with pytest.raises(TrackingError, match="someone else is deciding"):
        held().__enter__()


def test_a_lock_that_was_held_for_too_long_changes_nothing(
    two_versions: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "LEASE_S", lock.CLOCKS_DIFFER_S - 1)
    assert decide("2") == 1
    assert "deciding took longer than" in capsys.readouterr().err
    assert aliases() == ("1", None) and not Registry(TOY, NAME).decisions()[-1].is_done


def test_a_decision_without_the_lock_is_a_mistake_of_the_code(two_versions: None) -> None:
    with pytest.raises(AssertionError):
        Registry(TOY, NAME).decide(Decision(verdict="promoted", candidate="2", champion="1"))


def in_another_process(version: str, barrier: Any) -> None:
    barrier.wait()
    raise SystemExit(decide(version))


def test_of_two_decisions_at_once_the_second_knows_of_the_first(place: Path) -> None:
    for fvu in (0.5, 0.4, 0.3):
        register(fvu)
    assert decide("1") == 0
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=in_another_process, args=(v, barrier)) for v in ("2", "3")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    codes = [process.exitcode for process in both]
    if codes == [0, 0]:
        assert verdicts()[1:] == [("promoted", "2", "1"), ("promoted", "3", "2")]
    else:
        assert codes == [3, 0]
        assert verdicts()[1:] == [("promoted", "3", "1"), ("refused", "2", "3")]
    assert champion() == "3"
