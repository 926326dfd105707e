"""Where a study is kept: a file beside the runs by default, or one place that several processes and machines share.

    storage, shown = open_storage(None, Path("runs/digits-1"))                        # runs/digits-1/study.db
    storage, shown = open_storage("postgresql://me:secret@db.example/studies", here)  # shown with *** for secret

What a storage has to do for us is to let one process alone end a trial and one alone start a waiting one. PostgreSQL
and the other servers lock the trial's row. SQLite knows no such lock, so each of our transactions takes its write lock
from the start. A journal decides by the order of its lines.
"""

import contextlib
import errno
import fcntl
import importlib
import importlib.util
import logging
import os
import re
import sqlite3
import time
import warnings
import weakref
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from lightning_automl.rundir import DiskFullError, UserError, check_target

log = logging.getLogger(__name__)

#: Seconds that a transaction waits for others of the same SQLite file, and that a server has to answer within.
LOCK_SECONDS = 120
CONNECT_SECONDS = 10

_FORMS = "sqlite:///FILE, journal:FILE, postgresql://USER@HOST/DATABASE, grpc://HOST:PORT, or another URL of SQLAlchemy"
_SCHEMES = ("sqlite", "journal", "postgresql", "grpc", "mysql", "mariadb", "oracle", "mssql", "cockroachdb")
_JOURNAL_START = b'{"op_code":'
_NETWORK = re.compile(r"nfs|cifs|smb|9p$|ceph|lustre|gpfs|beegfs|glusterfs|fuse\.(sshfs|glusterfs|ceph)|afs")


def open_storage(url: str | None, directory: Path) -> tuple[BaseStorage, str]:
    """Open the storage of a study, and make it where it does not exist.

    Args:
        url: ``None`` for the SQLite file ``study.db`` in ``directory``; ``sqlite:///FILE`` (three slashes and a
            relative path, or four and an absolute one); ``journal:FILE``, ``journal:///FILE`` or a path that ends in
            ``.journal`` or ``.log`` for a journal on a local disk; ``postgresql://USER:PASSWORD@HOST/DATABASE``;
            ``grpc://HOST:PORT`` for a server of :func:`optuna.storages.run_grpc_proxy_server` (let it serve a storage
            that was opened here, if that is SQLite); or what else SQLAlchemy has a driver for.
        directory: Of the study; made when missing.

    Returns:
        The storage, and the URL to show and to hand to :func:`optuna.load_study`, in which ``***`` stands for a
        password.

    Raises:
        UserError: If the URL is of no known kind, a driver is missing, or what it leads to cannot be reached, written
            or understood. No password is in the sentence.
    """
    if url is None:
        return _open_sqlite(sqlalchemy.engine.make_url("sqlite://").set(database=str(directory.resolve() / "study.db")))
    scheme, separator, rest = url.partition(":")
    if scheme == "journal" and separator:
        return _open_journal(Path(re.sub(r"^//(?=/)", "", rest)))
    if re.match(r"[\w+]+://", url) is None:
        if Path(url).suffix in (".journal", ".log"):
            return _open_journal(Path(url))
        if Path(url).suffix in (".db", ".sqlite", ".sqlite3"):
            raise UserError(f"unknown storage {url!r}; for an SQLite file give sqlite:///{url}")
        raise UserError(f"unknown storage {url!r}; known: {_FORMS}")
    if scheme == "grpc":
        return _open_proxy(url)
    return _open_database(url)


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that ``path`` is on, as ``ext4`` or ``nfs4``; "" where the system does not tell."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    resolved = path.resolve()
    best = (-1, "")
    for line in lines:
        _, place, kind, *_ = line.split(" ")
        place = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), place)  # a blank is written \040
        if resolved.is_relative_to(place):
            best = max(best, (len(place), kind), key=lambda each: each[0])
    return best[1]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that a disk is full, ours or that of a server."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlalchemy.exc.DBAPIError | sqlite3.Error):
            if re.search(r"database or disk is full|No space left on device", str(error)):
                return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def allowing_experiments() -> Iterator[None]:
    """Without Optuna's remarks that what was asked for is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


@contextlib.contextmanager
def telling_full_disks() -> Iterator[None]:
    """Turn what a storage raises on a full disk into a :class:`~lightning_automl.rundir.DiskFullError`."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            errno.ENOSPC, "no space left for the study; free some and give the same command again, it goes on"
        ) from error


class JournalLock(JournalFileOpenLock):  # the base of Optuna's locks is private
    """A lock that the kernel frees when its owner dies, on the journal file itself; for local file systems only.

    Optuna's own locks are files: of 25 writers that were killed 11 left theirs behind, and everybody waited. Under the
    lock, a last line that was torn by a power cut or a full disk is cut off, since the next one would be appended to
    it, and no process could read the journal any more.

    Args:
        path: The journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def acquire(self) -> bool:
        """Wait for the lock, and mend the journal's end."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT)  # a file description of its own, so that threads wait too
        fcntl.flock(file, fcntl.LOCK_EX)
        self._file = file
        _cut_torn_line(file)
        return True

    def release(self) -> None:
        """Free the lock."""
        os.close(self._file)


def _cut_torn_line(file: int) -> None:
    size = os.fstat(file).st_size
    end = size
    while end and os.pread(file, 1, end - 1) != b"\n":
        start = max(0, end - 65536)
        end = start + os.pread(file, end - start, start).rfind(b"\n") + 1  # start itself when there is none
    if end < size:
        log.warning("cut %d bytes off the end of a journal: a line that was not written to its end", size - end)
        os.ftruncate(file, end)


def _open_journal(path: Path) -> tuple[BaseStorage, str]:
    if not path.name:
        raise UserError("the storage journal: has no path; give one as journal:study.journal")
    path = path.resolve()
    check_target(path)
    _warn_of_network(path, "a journal is locked by flock")
    try:
        with path.open("a+b") as file:
            file.seek(0)
            start = file.readline(65536)
        if not start.startswith(_JOURNAL_START[: len(start)]):
            raise UserError(f"{path} is not a journal of Optuna, and was left as it is; give another path")
        lock = JournalLock(path)
        lock.acquire()
        lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock)), f"journal://{path}"
    except OSError as error:
        raise UserError(f"the journal {path} cannot be used: {error.strerror or error}; give another path") from error
    except (ValueError, KeyError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the journal {path} is damaged ({error}); restore it or give another path") from error


def _open_proxy(url: str) -> tuple[BaseStorage, str]:
    for module in ("grpc", "google.protobuf"):
        if not _is_installed(module):
            raise UserError(f'grpc:// needs the package {module}; pip install "lightning-automl[grpc]"')
    grpc: Any = importlib.import_module("grpc")  # has no types
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 13000  # Optuna's own default
    except ValueError as error:
        raise UserError(f"the storage {_hidden(url)} is no address ({error}); give it as grpc://HOST:PORT") from error
    if host is None:
        raise UserError(f"the storage {_hidden(url)} names no host; give it as grpc://HOST:PORT")
    shown = f"grpc://{host}:{port}"
    with allowing_experiments():
        storage = GrpcStorageProxy(host=f"[{host}]" if ":" in host else host, port=port)
    try:
        storage.wait_server_ready(timeout=CONNECT_SECONDS)
        with contextlib.suppress(KeyError):
            storage.get_study_id_from_name("")
    except ConnectionError as error:
        storage.close()
        raise UserError(
            f"the storage {shown} does not answer; start optuna.storages.run_grpc_proxy_server there, "
            "or look at host and port"
        ) from error
    except grpc.RpcError as error:
        storage.close()
        raise UserError(f"the storage {shown} is not a proxy of Optuna ({error.code().name})") from error
    return storage, shown


def _open_database(url: str) -> tuple[BaseStorage, str]:
    try:
        parsed = sqlalchemy.engine.make_url(re.sub(r"^postgres(?=[+:])", "postgresql", url))
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise UserError(f"the storage {_hidden(url)} is not a URL; known: {_FORMS}") from error
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed)
    parsed = _with_driver(parsed)
    settings: dict[str, Any] = {"pool_pre_ping": True}  # a server may have been restarted since
    if parsed.get_backend_name() == "postgresql" and "connect_timeout" not in parsed.query:
        settings["connect_args"] = {"connect_timeout": CONNECT_SECONDS}
    return _connected(parsed, settings), _shown(parsed)


def _with_driver(url: sqlalchemy.engine.URL) -> sqlalchemy.engine.URL:
    """With PostgreSQL's driver named: SQLAlchemy takes psycopg2, also where only its successor is installed."""
    if url.drivername == "postgresql" and not _is_installed("psycopg2"):
        return url.set(drivername="postgresql+psycopg")
    return url


def _open_sqlite(url: sqlalchemy.engine.URL) -> tuple[BaseStorage, str]:
    if url.database in (None, "", ":memory:"):
        raise UserError("an SQLite storage in memory is seen by nobody else; leave storage out, or give sqlite:///FILE")
    assert url.database is not None
    path = Path(url.database)
    if not path.name.startswith("file:"):
        if sqlalchemy.engine.make_url(url.render_as_string()).database != url.database:
            # SQLAlchemy 2.0 takes what is behind a ? for the query.
            raise UserError(f"the path {path} cannot be written as a URL; give another one for the storage")
        check_target(path)
        _warn_of_network(path, "SQLite locks its file")
    storage = _connected(url, {"connect_args": {"timeout": LOCK_SECONDS}}, _lock_from_the_start)
    return storage, _shown(url)


def _connected(
    url: sqlalchemy.engine.URL, settings: dict[str, Any], prepare: Any = lambda engine: None, tries: int = 10
) -> BaseStorage:
    """The storage at a URL.

    Args:
        url: Of a database.
        settings: Keyword arguments of :func:`sqlalchemy.create_engine`.
        prepare: Called with the engine.
        tries: How often to try when another process makes the same tables at the same time.
    """
    # Optuna formats the text, to fill in {SCHEMA_VERSION}.
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    shown = _shown(url)
    while True:
        tries -= 1
        try:
            storage = RDBStorage(text, engine_kwargs=settings)
            break
        except ImportError as error:
            raise _missing_driver(url) from error
        except sqlalchemy.exc.NoSuchModuleError as error:
            name = url.drivername.partition("+")[0]
            near = get_close_matches(name, _SCHEMES, 1, 0.5) if name not in _SCHEMES else []
            hint = f"did you mean {near[0]}://? " if near else ""
            raise UserError(f"unknown kind of storage {url.drivername!r} in {shown}; {hint}known: {_FORMS}") from error
        except RuntimeError as error:  # tables of another version
            raise UserError(f"the storage {shown} cannot be used: {_sentence(error, url)}") from error
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if tries and re.search(r"already exists|duplicate key|UNIQUE constraint", f"{error} {error.__cause__}"):
                time.sleep(0.2)
                continue
            if is_disk_full(error):
                raise DiskFullError(errno.ENOSPC, f"no space left for {shown}; free some and try again") from error
            raise UserError(f"the storage {shown} cannot be used: {_sentence(error, url)}") from error
    prepare(storage.engine)
    weakref.finalize(storage, storage.engine.dispose)  # else drivers complain of connections that nobody closed
    return optuna.storages.get_storage(storage)  # with the cache of finished trials


def _lock_from_the_start(engine: sqlalchemy.engine.Engine) -> None:
    """Let each transaction begin with SQLite's write lock.

    Optuna reads whether a trial is still running and then writes that it has ended, and both happen in one transaction
    for servers that lock the row by ``SELECT … FOR UPDATE``. SQLite ignores that, and Python's driver begins a
    transaction at the first write only, so that two processes could both end one trial.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: sqlalchemy.engine.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # the connections that have made the tables


def _missing_driver(url: sqlalchemy.engine.URL) -> UserError:
    if url.get_backend_name() == "postgresql":
        return UserError('postgresql:// needs the package psycopg; pip install "lightning-automl[postgres]"')
    return UserError(f"{url.drivername}:// needs a driver that is not installed; install one that SQLAlchemy knows")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def _warn_of_network(path: Path, why: str) -> None:
    kind = file_system(path.parent)
    if _NETWORK.match(kind):
        log.warning(
            "%s is on a network file system (%s), and %s, which is not safe there; if several machines share the "
            "study, use postgresql:// or grpc://",
            path,
            kind,
            why,
        )


def _shown(url: sqlalchemy.engine.URL) -> str:
    return _hidden(url.render_as_string(hide_password=True))


def _hidden(url: str) -> str:
    """A URL without its password, also one that cannot be parsed."""
    url = re.sub(r"(://[^:/@?]*):.*@", r"\1:***@", url)
    return re.sub(r"(password=)[^&]*", r"\1***", url)


def _sentence(error: BaseException, url: sqlalchemy.engine.URL) -> str:
    """What a database says, in one line and without the password."""
    told: BaseException = error if isinstance(error, RuntimeError) else error.__cause__ or error
    told = getattr(told, "orig", None) or told
    text = re.sub(r"\s+", " ", str(told)).strip() or type(told).__name__
    for password in (url.password, unquote(url.password or ""), str(url.query.get("password", ""))):
        if password:
            text = text.replace(str(password), "***")
    return text[:300]
