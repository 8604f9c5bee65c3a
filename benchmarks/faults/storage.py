"""`storage` on S3: misspelt, without keys, away for a while, expired."""

import time

from benchmarks.faults.listing import fault
from benchmarks.faults.proxy import KEYS, proxy_to, s3
from benchmarks.faults.workspace import UnexpectedError, Workspace

ONE = ("dvc", "repro", "--single-item")
STORAGE = "s3://bucket/prefix"
MOST_SECONDS = 60.0  # for what waiting can't mend; two minutes would pass with trying again


def refused(
    workspace: Workspace, storage: str, pattern: str, *, without: tuple[str, ...] = (), **keys: str
) -> None:
    """The stage cache is told to keep its shards where it can't."""
    workspace.set_param("storage", storage)
    # With wrong keys in `keys`, the server looks at keys once the bucket is there.
    checks = {"INITIAL_NO_AUTH_ACTION_COUNT": "3"} if "AWS_ACCESS_KEY_ID" in keys else {}
    with s3(workspace, **checks) as url:
        settings = {k: v for k, v in (KEYS | keys).items() if k not in without}
        began = time.monotonic()
        done = workspace.run(*ONE, "cache", AWS_ENDPOINT_URL=url, **settings)
        workspace.told(done, pattern)
        if time.monotonic() - began > MOST_SECONDS:
            raise UnexpectedError("tries again for minutes what can't be")
    workspace.set_param("storage", None)
    workspace.recovers(*ONE, "cache")
    workspace.stages = ("cache",)


@fault("storage", before="cache")
def bucket_misspelt(workspace: Workspace) -> None:
    """The bucket of `storage` is not there: it is not made."""
    refused(workspace, "s3://buckt/prefix", "error: storage: there is no bucket buckt")


@fault("storage", before="cache")
def bucket_name_impossible(workspace: Workspace) -> None:
    """The bucket has a name that none can have."""
    refused(workspace, "s3://my bucket/x", "error: storage: can't look at .*Invalid bucket name")


@fault("storage", before="cache")
def no_keys(workspace: Workspace) -> None:
    """There are no keys for S3."""
    without = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    refused(workspace, STORAGE, "error: storage: .*locate credentials", without=without)


@fault("storage", before="cache")
def half_of_the_keys(workspace: Workspace) -> None:
    """The secret key is missing."""
    without = ("AWS_SECRET_ACCESS_KEY",)
    refused(workspace, STORAGE, "error: storage: .*missing: AWS_SECRET_ACCESS_KEY", without=without)


@fault("storage", before="cache")
def wrong_keys(workspace: Workspace) -> None:
    """The server does not know the keys."""
    refused(workspace, STORAGE, "error: storage: .*", AWS_ACCESS_KEY_ID="somebody")


@fault("storage", before="cache")
def profile_that_is_not_there(workspace: Workspace) -> None:
    """AWS_PROFILE names no profile."""
    refused(workspace, STORAGE, "error: storage: .*nobody.* could not", AWS_PROFILE="nobody")


@fault("storage", before="cache")
def storage_of_an_unknown_kind(workspace: Workspace) -> None:
    """`storage` begins with s4://."""
    refused(workspace, "s4://bucket", "error: params.yaml: storage: s4://bucket: Protocol not")


@fault("storage", before="cache")
def storage_folder_not_mounted(workspace: Workspace) -> None:
    """`storage` is a folder that is not there: it is not made and filled."""
    place = workspace.folder / "mnt/shared"
    refused(workspace, str(place), "error: storage: there is no folder .*mnt/shared")
    if place.exists():
        raise UnexpectedError("the folder was made")


@fault("storage", before="cache")
def server_not_there(workspace: Workspace) -> None:
    """AWS_ENDPOINT_URL points at nothing: it may come back, so it is tried for two minutes."""
    workspace.set_param("storage", STORAGE)
    settings = KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = workspace.run(*ONE, "cache", **settings)
    workspace.told(done, "error: storage: could not look at s3://bucket/prefix in 123 seconds")
    workspace.set_param("storage", None)
    workspace.recovers(*ONE, "cache")
    workspace.stages = ("cache",)


SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
)


def goes_on(workspace: Workspace, status: int, body: bytes) -> None:
    """While the cache is built, the server answers every fourth request so; then it returns."""
    workspace.set_param("storage", STORAGE)
    with s3(workspace) as url, proxy_to(url) as proxy:
        proxy.answer = lambda *_: (
            (status, {"Retry-After": "1", "Content-Type": "application/xml"}, body)
            if len(proxy.seen) % 4 == 0
            else None
        )
        settings = KEYS | {"AWS_ENDPOINT_URL": proxy.url}
        done = workspace.run(*ONE, "cache", **settings)
        if done.exit_code != 0:
            raise UnexpectedError(f"does not go on: {done.output[-400:]}")
        proxy.answer = lambda *_: None
        done = workspace.recovers(*ONE, "distill", **settings)
    workspace.said = "goes on, and trains from there"
    workspace.stages = ("distill",)


@fault("storage", before="cache")
def throttled(workspace: Workspace) -> None:
    """The server answers 503 SlowDown with Retry-After now and then."""
    goes_on(workspace, 503, SLOW_DOWN)


@fault("storage", before="cache")
def server_errors_now_and_then(workspace: Workspace) -> None:
    """The server answers 500 now and then."""
    goes_on(workspace, 500, b"<Error><Code>InternalError</Code><Message>later</Message></Error>")


@fault("storage", before="cache")
def shard_expired(workspace: Workspace) -> None:
    """A shard is deleted in the bucket after the cache was built; the message names the remedy."""
    in_the_bucket(
        workspace, "fs.rm_file(shard)", "error: .*lacks pairs-base-00001.*components.cache"
    )


def in_the_bucket(workspace: Workspace, change: str, pattern: str) -> None:
    """Change a shard that lies in the bucket, and look at what follows.

    Args:
        workspace: a fresh one.
        change: Python that alters `shard`, a path of the s3fs file system `fs`.
        pattern: of a line that the next command is to say.
    """
    workspace.set_param("storage", STORAGE)
    with s3(workspace) as url:
        settings = KEYS | {"AWS_ENDPOINT_URL": url}
        workspace.recovers(*ONE, "cache", **settings)
        workspace.said = ""
        code = (
            "import s3fs; fs = s3fs.S3FileSystem(); "
            "shard = [n for n in fs.find('bucket') if 'pairs-base-00001' in n][0]; " + change
        )
        workspace.recovers("python", "-c", code, **settings)
        workspace.said = ""
        workspace.told(workspace.run(*ONE, "distill", **settings), pattern)
        workspace.recovers("python", "-m", "components.cache", **settings)
        workspace.recovers(*ONE, "distill", **settings)
    workspace.stages = ("distill",)


@fault("storage", before="cache")
def shard_altered_in_the_bucket(workspace: Workspace) -> None:
    """A byte of a shard is altered in the bucket: it is named and never trained on."""
    change = "c = fs.cat_file(shard); fs.pipe_file(shard, c[:-1] + bytes([c[-1] ^ 1]))"
    in_the_bucket(workspace, change, "error: .*pairs-base-00001.* is not what was written")
