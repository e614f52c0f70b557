"""Database servers for tests: each on 127.0.0.1 in a folder of its own, and ended with the `with` block."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autotune.system.process import GuardedProcess
from tests.slurm_cluster import free_ports, program, wait_for

PASSWORD = "p4ss-word"  # of the user tuner
MARIADB = ["mariadbd", "mariadb-install-db", "mariadb"]
POSTGRESQL = Path("/usr/lib/postgresql")  # Debian's place: <version>/bin


def missing_databases() -> list[str]:
    return [name for name in MARIADB if not program(name)] + ([] if _postgresql() else ["postgres"])


@contextmanager
def mariadb(folder: Path) -> Iterator[str]:
    """A server with an empty database `tune`; yields its URL."""
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 characters
        data, socket, (port,) = folder / "mariadb", f"{short}/socket", free_ports(1)
        user = [f"--user={_user()}"]
        install = [str(program("mariadb-install-db")), "--no-defaults", *user, f"--datadir={data}"]
        done = subprocess.run([*install, "--auth-root-authentication-method=normal"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        serve = [str(program("mariadbd")), "--no-defaults", *user, f"--datadir={data}", f"--socket={socket}"]
        serve += [f"--port={port}", "--bind-address=127.0.0.1", f"--pid-file={data}/pid"]
        client = [str(program("mariadb")), "--no-defaults", f"--socket={socket}", "--user=root", "--execute"]
        made = f"CREATE DATABASE tune; GRANT ALL ON *.* TO tuner@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'"
        with GuardedProcess(serve, folder / "mariadb.log", {}, stop_timeout_s=10):
            wait_for(lambda: _succeeds([*client, "SELECT 1"]), "MariaDB")
            assert _succeeds([*client, made])
            yield f"mysql://tuner:{PASSWORD}@127.0.0.1:{port}/tune"


@contextmanager
def postgresql() -> Iterator[str]:
    """A server with an empty database `tune`; yields its URL. It does not run as root."""
    with tempfile.TemporaryDirectory() as short:
        folder, (port,) = Path(short), free_ports(1)
        (folder / "password").write_text(PASSWORD)
        as_user = []
        if os.getuid() == 0:
            as_user = ["runuser", "-u", "postgres", "--"]
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres")
        data, programs = str(folder / "data"), _postgresql()
        init = [f"{programs}/initdb", "-D", data, "-U", "tuner", "-A", "scram-sha-256", f"--pwfile={folder}/password"]
        done = subprocess.run([*as_user, *init], capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        serve = [f"{programs}/postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", short]
        url = f"postgresql://tuner:{PASSWORD}@127.0.0.1:{port}"
        with GuardedProcess([*as_user, *serve], folder / "postgresql.log", {}, stop_timeout_s=10):
            create = [f"{programs}/psql", f"{url}/postgres", "-c", "CREATE DATABASE tune"]
            wait_for(lambda: _succeeds(create), "PostgreSQL")
            yield f"{url}/tune"


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()


def _postgresql() -> Path | None:
    found = sorted(POSTGRESQL.glob("*/bin/postgres"))
    return found[-1].parent if found else None
