"""A real PostgreSQL of its own, as Debian's package `postgresql` has it, on 127.0.0.1."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores import free_port

DATABASES = Path(__file__).parent.parent / "deploy/databases.sql"


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A server with the databases of `deploy/`; yields `postgres@127.0.0.1:port`.

    It refuses to run as root, and is then `nobody`'s.
    """
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    owner = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    folder, port = Path(tempfile.mkdtemp(prefix="pnp-postgres-")), str(free_port())
    shutil.chown(folder, owner)

    def command(name: str, *arguments: str) -> list[str]:
        return [str(programs[-1] / name), *arguments]

    as_owner = {"user": owner, "cwd": folder, "env": {"LC_ALL": "C.UTF-8"}}
    options = ("--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8")
    subprocess.run(
        command("initdb", f"--pgdata={folder}/data", *options),
        check=True,
        capture_output=True,
        **as_owner,  # type: ignore[call-overload]  # of several kinds
    )
    place = ("-h", "127.0.0.1", "-p", port)
    server = subprocess.Popen(
        command("postgres", "-D", f"{folder}/data", "-k", str(folder), *place),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **as_owner,  # type: ignore[call-overload]
    )
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(command("pg_isready", *place), capture_output=True).returncode:
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.2)
        subprocess.run(
            command("psql", *place, "-q", "-U", "postgres", "-f", str(DATABASES)), check=True
        )
        yield f"postgres@127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)  # a fast shutdown, whoever is connected
        server.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
