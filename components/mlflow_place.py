"""Where MLflow keeps its state, by `params.yaml` or the environment; MLflow is not asked."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

DEFAULT = "sqlite:///mlflow.db"  # of the checkout
SERVERS = ("http", "https", "databricks")
DATABASE_SERVERS = ("postgresql", "mysql", "mssql")
# A host and its port for certain, so that an @ behind them is in no password: what no user is
# called, or any host of a page of MLflow's.
HOST = r"(?:localhost|\d+(?:\.\d+){3}|\[[\da-fA-F:.]+\]):\d{1,5}[/?#]|[^/?#\s:@]+:\d{1,5}/#/"
# Behind a blank, or before another URL with no blank before it, no password goes on. What else has
# a :// may be one.
SCHEMES = "|".join((*SERVERS, *DATABASE_SERVERS, "sqlite", "s3"))
ENDS = re.compile(rf"(?<=\s)|(?<=[,;|=<(\[{{'\"])(?=(?:{SCHEMES})(?:\+\w+)?://)")
# Where a container or bucket stands before the @, and no user.
PLACED = "".join(f"(?<!{s}://)" for s in ("abfs", "abfss", "az", "oci", "ocilake", "wasb", "wasbs"))
# A user, a colon, and all up to the last @ before one of ENDS; else a user alone.
SECRETS = re.compile(rf"(?<=://)(?:(?!{HOST})[^/?#\s:]*:\S*|{PLACED}[^/?#\s]+)@")
# What a URL's query has of the kind: of database drivers, presigned addresses, storage accounts.
SECRET_ARGUMENTS = re.compile(
    r"([?&](?:[\w.%-]{0,40}(?:password|passwd|token|secret|signature|credential"
    r"|(?:api|access|account|secret|private)[_-]?key(?:id)?)|pass|pwd|sig)=)[^&#\s'\"<>]+",
    re.IGNORECASE,
)


def checkout() -> Path:
    """The folder that the working directory's state belongs to.

    Inside a workspace that DVC makes for an experiment and deletes after it (`.dvc/tmp/exps/…`):
    the checkout that it was made of. Else the working directory.
    """
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return here


def resolve(uri: str | None) -> str:
    """The store's URI, with a database's path made absolute.

    `uri` is `tracking.uri`; without one, MLFLOW_TRACKING_URI or the database of the checkout.
    Raises ValueError if MLflow can't keep its state there, or would keep versions elsewhere.
    """
    store = _located(uri)
    registry = os.environ.get("MLFLOW_REGISTRY_URI", "")
    # Databricks has registries of its own, and their files are its matter.
    if registry.startswith("sqlite"):
        registry = _located(registry)
    is_apart = registry.rstrip("/") not in ("", store.rstrip("/"))
    if is_apart and not store.startswith("databricks"):
        raise ValueError(
            f"MLFLOW_REGISTRY_URI {without_secrets(registry)!r} is another store than that of the "
            f"runs, {without_secrets(store)!r}: a guide's versions are kept where its runs are. "
            "Unset it, or name one store for both as tracking.uri"
        )
    return store


def _located(uri: str | None) -> str:
    """Raises ValueError if MLflow can't keep its state there."""
    named = "tracking.uri" if uri else "MLFLOW_TRACKING_URI"
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT
    scheme = uri.split(":")[0].split("+")[0]
    if scheme in ("http", "https") and not urlsplit(uri).hostname:
        raise ValueError(
            f"{named} {without_secrets(uri)!r} names no server: write http://host:port"
        )
    if scheme in (*SERVERS, *DATABASE_SERVERS):
        return uri
    if scheme != "sqlite":
        raise ValueError(
            f"MLflow keeps nothing at {without_secrets(uri)!r}: give {named} a database, such as "
            "sqlite:////folder/mlflow.db, or a server, such as http://127.0.0.1:5000"
        )
    match = re.fullmatch(r"(sqlite[^:]*):///([^?]+)(\?.*)?", uri)
    if not match or match[2] == ":memory:":
        raise ValueError(
            f"{named} {without_secrets(uri)!r} names no file: write sqlite:///name.db, or four "
            "slashes before an absolute path"
        )
    path = (checkout() / match[2]).resolve()
    if "?" in str(path) or unquote(str(path)) != str(path):
        raise ValueError(
            f"{named} {uri!r} leads to {path}, and MLflow reads a ? or a % with two digits in a "
            "path as something else: rename that folder, or name a database elsewhere"
        )
    if not path.parent.is_dir():
        raise ValueError(
            f"{named} {uri!r}: there is no folder {path.parent}: make it, or correct the path"
        )
    return f"{match[1]}:///{path}{match[3] or ''}"


def without_secrets(text: str) -> str:
    """Without the `user:password@` of any URL in it, whatever signs but blanks a password has.

    Passwords, tokens, signatures and keys in a URL's query become `***`.

    Rather too much goes than too little: of `http://host:1/a@b`, the password may be `1/a`, unless
    HOST says that it can't.
    """
    bare = "".join(SECRETS.sub("", part) + rest for part, rest in _parts(text))
    return SECRET_ARGUMENTS.sub(r"\1***", bare)


def secrets_of(url: str) -> str:
    """The `user:password@` of a URL; empty without one."""
    return next((found[0] for part, _ in _parts(url) if (found := SECRETS.search(part))), "")


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """The text between ENDS, cut behind its last @: SECRETS looks there for none in vain.

    So what a line takes grows as the line does, not as its square.
    """
    if "@" not in text:
        yield "", text
        return
    for part in ENDS.split(text):
        end = part.rfind("@") + 1
        yield part[:end], part[end:]
