"""Real storage servers for tests of shared studies, as fixtures; ``conftest.py`` makes them known."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_automl.search.trials import free_port


def missing(reason):
    if os.environ.get("REQUIRE_POSTGRES") == "1":
        pytest.fail(f"{reason}, and REQUIRE_POSTGRES is 1")
    pytest.skip(reason)


def postgres_program(name):
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, places), os.environ.get("PATH", "")]))


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server of its own; the URL of a database with a password."""
    initdb, pg_ctl = postgres_program("initdb"), postgres_program("pg_ctl")
    if initdb is None or pg_ctl is None:
        missing("PostgreSQL is not installed")
    if importlib.util.find_spec("psycopg") is None:
        missing("psycopg is not installed")
    # Short, as a socket's path has at most 107 characters, and reachable for another user, whom initdb demands of root.
    home = Path(f"/tmp/pg-{os.getpid()}")
    home.mkdir(mode=0o700)
    as_user = {}
    if os.geteuid() == 0:
        import pwd

        names = {entry.pw_name for entry in pwd.getpwall()}
        user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
        os.chown(home, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    run = {"check": True, "cwd": home, "stdout": subprocess.DEVNULL, **as_user}
    port = free_port()
    (home / "password").write_text("s3cr:t@")
    (home / "password").chmod(0o644)
    data = str(home / "data")
    try:
        subprocess.run(
            [initdb, "-D", data, "-U", "me", "-A", "scram-sha-256", "--pwfile=password", "-E", "UTF8", "-N"], **run
        )
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home} -c fsync=off"
        subprocess.run([pg_ctl, "-D", data, "-o", options, "-l", "log", "-w", "start"], **run)
        try:
            yield f"postgresql://me:s3cr%3At%40@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([pg_ctl, "-D", data, "-m", "immediate", "stop"], **run)
    finally:
        shutil.rmtree(home)


@pytest.fixture
def proxy(tmp_path):
    """A gRPC proxy in front of an SQLite file."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    port = free_port()
    code = (
        "import optuna, sys\n"
        "from pathlib import Path\n"
        "from lightning_automl.search.storages import open_storage\n"
        "storage, _ = open_storage(None, Path(sys.argv[1]))\n"
        "optuna.storages.run_grpc_proxy_server(storage, host='localhost', port=int(sys.argv[2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(port)], stderr=subprocess.DEVNULL)
    yield f"grpc://localhost:{port}"
    process.kill()
    process.wait()
