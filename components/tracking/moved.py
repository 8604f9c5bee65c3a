"""Files of an SQLite store lie beside its database, wherever that is.

MLflow writes absolute paths into its database. When a checkout is moved or copied, they point to
where it was: at nothing, or into another checkout. MLflow has no way to change them but its tables.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

ARTIFACTS = "mlartifacts"
# Tables and columns with paths of things that were written, and what identifies a row.
WRITTEN = {
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
}


def bring_artifacts_along(database: Path) -> None:
    """Let the paths in `database` name the folder beside it.

    New files of our experiments go there. What was written before is looked for there only if it
    is there: a database that was shared in another way keeps what lies elsewhere.
    """
    if not database.exists() or database.stat().st_size == 0:
        return
    here = database.parent / ARTIFACTS
    with closing(sqlite3.connect(database, timeout=20)) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        if "experiments" not in tables:
            return
        changes = []
        rows = connection.execute("SELECT experiment_id, artifact_location FROM experiments")
        for key, place in rows:
            if place and place != str(here) and place.startswith("/") and _is_ours(place):
                changes.append(("experiments", "artifact_location", str(here), key))
        for table, column in WRITTEN:
            if table not in tables:
                continue
            for key, place in connection.execute(f"SELECT rowid, {column} FROM {table}"):
                if moved := _moved(place, here):
                    changes.append((table, column, moved, key))
        with connection:  # one transaction
            for table, column, place, key in changes:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? WHERE {_key(table)} = ?", (place, key)
                )


def _key(table: str) -> str:
    return "experiment_id" if table == "experiments" else "rowid"


def _is_ours(place: str) -> bool:
    return Path(place).name == ARTIFACTS


def _moved(place: str | None, here: Path) -> str | None:
    """Where beside the database `place` is now; None if it is there already, or not here."""
    before, found, below = (place or "").partition(f"/{ARTIFACTS}/")
    if not found or not before.startswith("/") or before == str(here.parent):
        return None
    return str(here / below) if (here / below).exists() else None
