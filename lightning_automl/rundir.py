"""The run directory: atomic files, environment, summary and lock of a run, and the error that a user gets to read.

Everything that a command leaves is below one directory, as small text or safetensors files. A file is written beside
its target and renamed, so that after ``kill -9`` or on a full disk the target is the old one or the new one, never a
part of one.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TextIO

Status = Literal["finished", "pruned", "failed"]

#: Distributions whose versions decide whether a run can be repeated bit for bit.
PACKAGES = (
    *("lightning-automl", "lightning", "torch", "torchvision", "torchmetrics", "optuna"),
    *("numpy", "scikit-learn", "pillow"),
)


#: Keys that may differ when a run is continued. Those of ``GROWING`` may only grow.
CHANGEABLE = {
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.max_time",
    "test_after_fit",
    "data.init_args.cache",
}
GROWING = {"trainer.max_epochs", "trainer.max_steps"}


class UserError(ValueError):
    """A mistake in what the user gave: one sentence that says what was given, what is known and what to do.

    The command line prints the sentence on stderr and exits with status 2; from Python it is a ``ValueError``.
    """


class UnsupportedError(UserError, NotImplementedError):
    """What was asked for cannot be done with this module, layer or adapter; from Python also a NotImplementedError."""


class ToldError(RuntimeError):
    """A failure of the work itself whose sentence says all; nobody needs the traceback."""


class DisagreementError(ToldError):
    """An exported file does not give what the network gives; it was removed."""


class DiskFullError(OSError):
    """There was no space for a file of the run directory; what had been written before is whole."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, and rename it to ``path`` when the block ends well.

    Args:
        path: The file to make or to replace; its directory is made when missing.

    Yields:
        A path in the same directory, so that the rename is atomic on every POSIX file system.

    Raises:
        DiskFullError: If the block found no space left; the partial file is removed and ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.tmp")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if _is_disk_full(error):
            raise DiskFullError(
                errno.ENOSPC, f"no space left for {path}; free some and give the same command again, it goes on"
            ) from error
        raise


def _is_disk_full(error: BaseException) -> bool:
    # torch.save reports a failed write of its zip file as a RuntimeError, raised while the OSError is handled.
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def check_target(path: Path) -> None:
    """Raise a UserError if no file can be written at ``path``, before work is done for it."""
    reason = "it is a folder" if path.is_dir() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"no file can be written at {path}: {reason}; give another path")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")  # file names may be any bytes


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically; NaN and infinity, unknown to JSON, become ``null``."""
    write_text(path, json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file, or ``None`` when there is no such file.

    Raises:
        UserError: If it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or remove it") from error


def new_directory(name: str, root: Path = Path("runs")) -> Path:
    """Make and return the first free ``root/name-n``, n = 1, 2, …; safe when several processes ask at once."""
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        directory = root / f"{name}-{number}"
        try:
            directory.mkdir()
        except FileExistsError:
            number += 1
        else:
            return directory


def lock(directory: Path) -> TextIO:
    """Claim ``directory`` for this process until it ends, however it ends: the kernel gives the lock back.

    Returns:
        The open lock file; the claim lasts as long as the object lives.

    Raises:
        UserError: If another living process holds it, or the directory cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror or error}); give another --dir") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(f"{directory} is in use by process {owner}; wait until it ends or give another --dir") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def remove_partial_files(directory: Path) -> None:
    """Delete the partial files that killed processes left below ``directory``; those of living ones stay."""
    for path in directory.rglob(".*.tmp"):
        found = re.fullmatch(r"\..*\.(\d+)\.tmp", path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            path.unlink(missing_ok=True)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Turn nested dictionaries into one with dotted keys; lists are values."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ between two nested configurations, with the old and the new value."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def check_continuation(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a limit of a run has grown since it was started.

    Raises:
        UserError: If anything else differs, or a limit has shrunk; the first difference is shown.
    """
    changes = differences(before, now)
    for key, (old, new) in changes.items():
        if key in GROWING and _limit(new) < _limit(old):
            raise UserError(f"{directory} was started with {key}={old}, now it is {new}; limits can only grow")
        if key not in GROWING and not any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE):
            raise UserError(
                f"{directory} was started with {key}={old}, now it is {new}; "
                "give the former value to continue it, or another --dir to start anew"
            )
    return any(key in GROWING or key.startswith("trainer.max_time") for key in changes)


def _limit(value: int | None) -> float:
    return float("inf") if value is None or value < 0 else value


def index_digest(names: Iterable[str], labels: Iterable[int]) -> str:
    """32 hexadecimal digits that change when an image of a data set gets another name, label or place."""
    digest = blake2b(digest_size=16)
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{name}\0{label}\n".encode("utf-8", "surrogateescape"))  # file names may be any bytes
    return digest.hexdigest()


def environment(seed: int | None) -> dict[str, Any]:
    """What a run depends on besides its configuration: versions, hardware, commit, command and seed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": hardware(),
        "commit": commit(),
        "command": sys.argv,
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def hardware() -> dict[str, Any]:
    """Processor, its bf16 units, threads, memory in bytes and the names of the GPUs."""
    import torch  # what only reads a run directory does without

    capabilities = torch.cpu.get_capabilities()
    return {
        "platform": platform.platform(),
        "cpu": capabilities.get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_bf16": [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)],
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def commit() -> str | None:
    """The git commit of the source tree that the package runs from, with ``+`` when files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def summarise(
    directory: Path,
    command: str,
    status: Status,
    *,
    metrics: Mapping[str, float] | None = None,
    seconds: float = 0.0,
    opened: int = 0,
    artefacts: Mapping[str, str] | None = None,
    reason: str | None = None,
    forget: str | None = None,
) -> dict[str, Any]:
    """Write ``summary.json``, adding to what an earlier command or an interrupted try left there.

    Args:
        directory: The run directory.
        command: ``fit``, ``test`` …; one that evaluates leaves command, status and reason as they are, and those of a
            run that was killed are ``fit``, ``failed`` and "not finished".
        status: How the command ended.
        metrics: Values by name; they replace those of the same name.
        seconds: Wall time of this try, added to the former ones'.
        opened: How often this try evaluated on the test split, added likewise.
        artefacts: What was left, by kind; paths relative to ``directory``.
        reason: One sentence, for a failed run.
        forget: Beginning of the names of former metrics that do not hold any more.

    Returns:
        What was written.
    """
    old = read_json(directory / "summary.json") or {}
    if command in ("validate", "test", "predict"):  # what became of the run itself stays as it is
        command = old.get("command", "fit")
        status = old.get("status", "failed")
        reason = old.get("reason") if old else "not finished"
    kept = {name: value for name, value in old.get("metrics", {}).items() if not (forget and name.startswith(forget))}
    summary = {
        "command": command,
        "status": status,
        "metrics": {**kept, **(metrics or {})},
        "seconds": round(old.get("seconds", 0.0) + seconds, 3),
        "artefacts": {**old.get("artefacts", {}), **(artefacts or {})},
        "test_opened": old.get("test_opened", 0) + opened,
    }
    if reason is not None:
        summary["reason"] = reason
    write_json(directory / "summary.json", summary)
    return summary
