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


class Postgres:
    """The server, which can be killed and started again; in a string, where it is.

    It refuses to run as root, and is then `nobody`'s.
    """

    def __init__(self, programs: Path) -> None:
        owner = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        self.folder, self._programs = Path(tempfile.mkdtemp(prefix="pnp-postgres-")), programs
        self._place = ("-h", "127.0.0.1", "-p", str(free_port()))
        self._as_owner = {"user": owner, "cwd": self.folder, "env": {"LC_ALL": "C.UTF-8"}}
        shutil.chown(self.folder, owner)
        options = ("--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8")
        initdb = self._command("initdb", f"--pgdata={self.folder}/data", *options)
        subprocess.run(initdb, check=True, capture_output=True, **self._as_owner)  # type: ignore[call-overload]  # of several kinds
        self.start()
        psql = self._command("psql", *self._place, "-q", "-U", "postgres", "-f", str(DATABASES))
        subprocess.run(psql, check=True)

    def __str__(self) -> str:
        return f"postgres@127.0.0.1:{self._place[-1]}"

    def _command(self, name: str, *arguments: str) -> list[str]:
        return [str(self._programs / name), *arguments]

    def start(self) -> None:
        command = self._command("postgres", "-D", f"{self.folder}/data", "-k", str(self.folder))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._server = subprocess.Popen([*command, *self._place], **quiet, **self._as_owner)  # type: ignore[call-overload]
        deadline = time.monotonic() + 60
        is_ready = self._command("pg_isready", *self._place)
        while subprocess.run(is_ready, capture_output=True).returncode:
            assert time.monotonic() < deadline and self._server.poll() is None
            time.sleep(0.2)

    def kill(self) -> None:
        """As when its machine goes away."""
        self._server.kill()
        self._server.wait()

    def stop(self) -> None:
        self._server.send_signal(signal.SIGINT)  # a fast shutdown, whoever is connected
        self._server.wait(timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server with the databases of `deploy/`."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    server = Postgres(programs[-1])
    yield server
    server.stop()
