"""What a stage works from is changed, lost or wrong: the lock must say what ran."""

import json
import re
import shutil
import signal
from collections.abc import Callable

from benchmarks.faults.listing import fault
from benchmarks.faults.workspace import UnexpectedError, Workspace

Change = Callable[[], object]
Alter = Callable[[bytes], bytes | None]
CHANGED = r"error: .*was changed while it ran: .*"
ONE = ("dvc", "repro", "--single-item")


def change_in(workspace: Workspace, stage: str, change: Change, pattern: str) -> None:
    """Change something in the middle of a stage, which must end with a line about it."""
    before = (workspace.folder / "dvc.lock").read_text(encoding="utf-8")
    running = workspace.start(*ONE, stage)
    workspace.in_the_middle(running, stage)
    change()
    workspace.lost_work_s = 0.0  # its checkpoint stays
    workspace.told(workspace.finish(running), CHANGED + pattern)
    if (workspace.folder / "dvc.lock").read_text(encoding="utf-8") != before:
        raise UnexpectedError("dvc.lock records what did not run")


@fault("lock", before="distill")
def parameters_edited_while_training(workspace: Workspace) -> None:
    """distill.seed in params.yaml is edited while distill trains, and put back after it."""
    change_in(
        workspace, "distill", lambda: workspace.set_param("distill.seed", 7), "seed was 0, is 7"
    )
    workspace.set_param("distill.seed", 0)
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


@fault("lock", before="distill")
def parameters_edited_for_good_while_training(workspace: Workspace) -> None:
    """distill.seed is edited while distill trains, and stays: the next run trains with it."""
    change_in(
        workspace, "distill", lambda: workspace.set_param("distill.seed", 7), "seed was 0, is 7"
    )
    workspace.recovers(*ONE, "distill")
    if not re.search(r"seed: 7", (workspace.folder / "dvc.lock").read_text(encoding="utf-8")):
        raise UnexpectedError("dvc.lock does not have the new value")
    if workspace.run("dvc", "status", "distill").line("changed"):
        raise UnexpectedError("dvc status is not clean")
    workspace.stages = ()  # another seed, another guide


@fault("lock", before="halve")
def code_edited_while_training(workspace: Workspace) -> None:
    """A module of the library is edited while halve trains."""
    module = workspace.folder / "pnp_core/soap.py"
    text = module.read_text(encoding="utf-8")
    change_in(workspace, "halve", lambda: module.write_text(text + "# edited\n"), "soap.py")
    module.write_text(text)
    workspace.recovers(*ONE, "halve")
    workspace.stages = ("halve",)


@fault("lock", before="evaluate@tuned")
def reference_replaced_while_evaluating(workspace: Workspace) -> None:
    """The real images are replaced while a model is measured against them."""
    images = workspace.folder / "art/tuned.parquet"
    content = images.read_bytes()
    change_in(
        workspace,
        "evaluate@tuned",
        lambda: shutil.copy(workspace.folder / "art/main.parquet", images),
        "art/tuned.parquet has changed",
    )
    images.write_bytes(content)
    workspace.recovers(*ONE, "evaluate@tuned")
    workspace.stages = ("evaluate@tuned",)


@fault("lock", before="evaluate@tuned")
def commit_made_while_running(workspace: Workspace) -> None:
    """Somebody commits while `dvc repro` runs: lineage names the commit that it began with."""
    commit = workspace.git("rev-parse", "HEAD")
    running = workspace.start("dvc", "repro")
    workspace.in_the_middle(running, "evaluate@tuned")
    workspace.lost_work_s = 0.0
    workspace.git("commit", "--allow-empty", "--quiet", "--message", "other")
    if workspace.finish(running).exit_code != 0:
        raise UnexpectedError("the run fails")
    report = json.loads(
        (workspace.folder / "results/report/summary.json").read_text(encoding="utf-8")
    )
    if report["lineage"]["git_commit"] != commit:
        raise UnexpectedError(f"lineage names {report['lineage']['git_commit']}, not {commit}")
    workspace.said = "lineage names the commit that the run began with"


@fault("lock")
def lock_deleted(workspace: Workspace) -> None:
    """dvc.lock is deleted; what ran is known from DVC's run cache."""
    (workspace.folder / "dvc.lock").unlink()
    workspace.stages = ("prepare", "cache", "distill", "halve")
    workspace.recovers("dvc", "repro")


@fault("lock")
def file_in_the_dvc_cache_altered(workspace: Workspace) -> None:
    """A byte of a guide is altered in DVC's cache, and the guide itself is deleted."""
    guide = next((workspace.folder / "guides/bundle").rglob("*.safetensors"))
    content = guide.read_bytes()
    for cached in (workspace.folder / ".dvc/cache/files").rglob("*"):
        if cached.is_file() and cached.read_bytes() == content:
            cached.chmod(0o644)
            cached.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shutil.rmtree(workspace.folder / "guides/bundle")
    workspace.stages = ("halve",)
    done = workspace.recovers("dvc", "repro", "halve")
    workspace.said = done.line("corrupt|missing|Running stage") or "restored"


@fault("bad input", before="distill")
def parameter_misspelt(workspace: Workspace) -> None:
    """A key of params.yaml is misspelt."""
    text = (workspace.folder / "params.yaml").read_text(encoding="utf-8")
    (workspace.folder / "params.yaml").write_text(text.replace("halflife", "halflive", 1))
    workspace.told(workspace.run("python", "-m", "flows", "distill"), "unknown key 'distill.*mean")
    (workspace.folder / "params.yaml").write_text(text)
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


@fault("bad input", before="distill")
def base_is_a_hub_id(workspace: Workspace) -> None:
    """`base` names a model on a hub, which DVC can't version."""
    workspace.set_param("base", "someone/some-model")
    said = "base: someone/some-model is the name of a model on a hub"
    workspace.told(workspace.run("python", "-m", "flows", "distill"), said)
    workspace.set_param("base", "models/base")
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


@fault("bad input", before="cache")
def base_half_downloaded(workspace: Workspace) -> None:
    """The base's weights end in the middle."""
    weights = workspace.folder / "models/base/unet/diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    workspace.told(workspace.run("dvc", "repro"), "error: .*base: .*partly downloaded")
    weights.write_bytes(content)
    workspace.recovers("dvc", "repro", "distill")
    workspace.stages = ("cache", "distill")


@fault("bad input")
def model_with_a_capital_and_an_underscore(workspace: Workspace) -> None:
    """A fine-tune is called Dream_Shaper-8: a name as people have them."""
    row = {"path": "models/tuned", "reference": "art/tuned.parquet"}
    workspace.set_param("models.Dream_Shaper-8", row)
    workspace.recovers(*ONE, "evaluate@Dream_Shaper-8")


@fault("cache")
def shard_altered_by_one_byte(workspace: Workspace) -> None:
    """A byte of a teacher shard is altered on this disk."""
    damage(workspace, lambda content: content[:-1] + bytes([content[-1] ^ 1]))


@fault("cache")
def shard_truncated(workspace: Workspace) -> None:
    """A teacher shard ends in the middle."""
    damage(workspace, lambda content: content[: len(content) // 2])


@fault("cache")
def shard_deleted(workspace: Workspace) -> None:
    """A teacher shard is gone."""
    damage(workspace, lambda _: None)


def damage(workspace: Workspace, alter: Alter) -> None:
    """Replace a shard by what `alter` makes of its bytes, None for no shard, and train again.

    Raises UnexpectedError if it is not as it was after that.
    """
    shard = workspace.folder / "data/cache/pairs-base-00001.safetensors"
    content = shard.read_bytes()
    altered = alter(content)
    shard.unlink()
    if altered is not None:
        shard.write_bytes(altered)
    workspace.stages = ("cache", "distill")
    done = workspace.recovers("dvc", "repro", "distill")
    workspace.said = done.line("is not what was written") or done.line("shards are there") or ""
    if shard.read_bytes() != content:
        raise UnexpectedError("the shard is not made anew")


@fault("shared checkout", before="distill")
def two_runs_at_once(workspace: Workspace) -> None:
    """`dvc repro` is started a second time while it trains: one of them is refused."""
    first = workspace.start(*ONE, "distill")
    workspace.in_the_middle(first, "distill")
    workspace.lost_work_s = 0.0
    workspace.told(workspace.run(*ONE, "distill"), r"PID \d+\): .*dvc")
    if workspace.finish(first).exit_code != 0:
        raise UnexpectedError("the first fails")
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


@fault("shared checkout", before="evaluate@tuned")
def two_flows_at_once(workspace: Workspace) -> None:
    """A flow is started a second time while it measures: the second waits, and says for whom."""
    workspace.set_param("cluster.wait_minutes", 4)
    first = workspace.start("python", "-m", "flows", "distill")
    workspace.in_the_middle(first, "evaluate@tuned")
    workspace.lost_work_s = 0.0
    second = workspace.run("python", "-m", "flows", "distill")
    if workspace.finish(first).exit_code != 0 or second.exit_code != 0:
        raise UnexpectedError(f"one of them fails: {second.output[-300:]}")
    workspace.said = second.line("another run is at it") or "the second found all done"


@fault("shared checkout", before="register")
def dvc_lock_held_for_ever(workspace: Workspace) -> None:
    """A DVC that is stopped (SIGSTOP) holds the lock of the checkout."""
    hold = "import time, zc.lockfile as z; a = z.LockFile('.dvc/tmp/lock'); time.sleep(600)"
    holder = workspace.start("python", "-c", hold)
    path = workspace.folder / ".dvc/tmp/lock"
    holder.wait_for(lambda: str(holder.pid) in path.read_text(encoding="utf-8"), "lock")
    holder.signal(signal.SIGSTOP)
    told = "DVC's lock is held by PID"
    workspace.told(workspace.run("python", "-m", "flows", "distill", "--from", "register"), told)
    holder.signal(signal.SIGKILL)
    holder.end()
    workspace.recovers("dvc", "repro")
