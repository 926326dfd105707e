"""Decoded images on disk: one process makes the file, all map it, and a killed one is gone on from where it was.

In a place there is one folder for each set of image files, called after it, and in that two files for each setting::

    my_images-1f0c7a52/224x224x3-9d3b51c0a4e2f687.images    all pixels, uint8, then the facts of each image
    my_images-1f0c7a52/224x224x3-9d3b51c0a4e2f687.json      what they were made of, and the window of 16-bit images

The second number is of the files and changes with them. While the images are made they are in ``.part``, and the facts
of those that are whole in ``.facts``; only what is whole is renamed.
"""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_automl.data.measure import Facts, facts_type, measure
from lightning_automl.rundir import DiskFullError, UserError, read_json, write_json

log = logging.getLogger(__name__)

_BYTES_AT_ONCE = 2**24


class Decoded(NamedTuple):
    """All images of an index.

    Args:
        images: uint8 ``(images, height, width, channels)``; of a cache it must not be written to.
        facts: What was measured of each.
        window: What became 0 and 255, ``(channels, 2)``, or None for 8-bit images.
    """

    images: Tensor
    facts: Facts
    window: Tensor | None


class ImageCache:
    """Decoded images of one set of files and one setting, in a file.

    Args:
        folder: Where the caches of this set of files are; other runs may use it at the same time.
        files: Fingerprint of the files (see :func:`fingerprint`). What is in ``folder`` with another one is out of date
            and is deleted, unless someone has it open.
        shape: Images, height, width, channels.
        variant: Fingerprint of what else decides about the pixels.
        about: Plain values for whoever looks at the file.
        why: Why the images do not stay in memory, for the log.
    """

    def __init__(
        self,
        folder: Path,
        files: str,
        shape: tuple[int, int, int, int],
        variant: str = "",
        about: dict[str, Any] | None = None,
        why: str = "",
    ) -> None:
        self.folder = folder
        self.files = files
        self.shape = shape
        self.about = about or {}
        self.why = why
        _, height, width, channels = shape
        name = f"{height}x{width}x{channels}-{files}" + (f"-{variant}" if variant else "")
        self.path = folder / f"{name}.images"
        self._description = folder / f"{name}.json"
        self._lock = folder / f"{name}.lock"
        self._partial = folder / f"{name}.part"
        self._partial_facts = folder / f"{name}.facts"
        self._facts_type = facts_type(channels)
        self._image_bytes = height * width * channels
        self._bytes = shape[0] * (self._image_bytes + self._facts_type.itemsize)

    @property
    def whole(self) -> bool:
        """Whether all images are there."""
        return self._description.exists() and _size(self.path) == self._bytes

    def open(
        self,
        measure_window: Callable[[], Tensor | None],
        decode: Callable[[NDArray[np.int64], Tensor | None], Iterator[NDArray[np.uint8]]],
    ) -> Decoded:
        """Map the images; if they are not all there, make them first, or wait for the process that does.

        Images that are all there are mapped from a place that cannot be written to, too.

        Args:
            measure_window: Gives the window of 16-bit images.
            decode: Yields images ``(images, height, width, channels)`` of rows with a window, some rows at a time.

        Raises:
            UserError: If the place cannot be written to or has too little space, or ``decode`` cannot read a file.
            DiskFullError: If the space ran out on the way; the same call goes on from there.
        """
        self._announce()
        try:
            found = self._map()
            if found is not None:
                if os.access(self.folder, os.W_OK):
                    self._remove_stale()
                return found
            self._make_folder()
            with self._claimed():
                self._remove_stale()
                if not self.whole:
                    self._make(measure_window, decode)
                found = self._map()
                assert found is not None
                return found
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFullError(
                errno.ENOSPC, f"no space left for {self.path}; free some and give the same command again, it goes on"
            ) from error

    def _make_folder(self) -> None:
        reason = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
        if not reason and not os.access(self.folder, os.W_OK):
            reason = os.strerror(errno.EACCES)
        if reason:
            raise self._refused(reason)

    def _refused(self, reason: str) -> UserError:
        return UserError(
            f"no cache can be made in {self.folder} ({reason}); give another place by --data.init_args.cache"
        )

    def _announce(self) -> None:
        count, height, width, _ = self.shape
        what = f"{count} images of {height} x {width} pixels ({readable_size(self._bytes)})"
        if self.whole:
            log.info("%s were decoded before and are taken from %s", what, self.path)
        else:
            free = readable_size(free_space(self.folder))
            log.info("%s are decoded once into %s, where %s are free; %s", what, self.folder, free, self.why)

    def _make(
        self,
        measure_window: Callable[[], Tensor | None],
        decode: Callable[[NDArray[np.int64], Tensor | None], Iterator[NDArray[np.uint8]]],
    ) -> None:
        self._check_space()
        start = time.monotonic()
        count = self.shape[0]
        try:
            window = self._window() if self._description.exists() else measure_window()
            if not self._description.exists():
                values = None if window is None else window.tolist()
                write_json(self._description, {**self.about, "shape": self.shape, "window": values})
            done = self._count_done()
            if done:
                log.info("%d of the %d images were decoded before", done, count)
            with self._partial.open("ab") as pixels, self._partial_facts.open("a+b") as facts:
                pixels.truncate(done * self._image_bytes)
                facts.truncate(done * self._facts_type.itemsize)
                with progress("decoding", count, done) as advance:
                    for images in decode(np.arange(done, count), window):
                        pixels.write(images.data)
                        pixels.flush()
                        facts.write(measure(images).tobytes())  # only after the pixels: these now count as done
                        facts.flush()
                        advance(len(images))
                facts.seek(0)
                pixels.write(facts.read())
                pixels.flush()
                os.fsync(pixels.fileno())
        except UserError:
            self._remove_partial()  # a repaired file has another fingerprint, so that nobody would go on from here
            raise
        assert _size(self._partial) == self._bytes
        self._partial.replace(self.path)
        self._partial_facts.unlink()
        log.info("%d images were decoded in %.1f s", count - done, time.monotonic() - start)

    def _check_space(self) -> None:
        needed = self._bytes - _size(self._partial)
        free = free_space(self.folder)
        if needed > free:
            raise UserError(
                f"the decoded images take {readable_size(needed)} and {self.folder} has {readable_size(free)} free; "
                "free some, make --data.init_args.image_size smaller, or give another place by --data.init_args.cache"
            )

    def _count_done(self) -> int:
        """How many images of the partial file are as they were decoded.

        The facts were written after the pixels, which is enough for a killed process. After a power failure the file
        system may have kept the one and lost the other, so that the pixels are measured again; that costs less than to
        wait for the disk after every few images.
        """
        kind = self._facts_type
        count = min(_size(self._partial) // self._image_bytes, _size(self._partial_facts) // kind.itemsize)
        at_once = max(1, _BYTES_AT_ONCE // self._image_bytes)
        for first in range(0, count, at_once):
            number = min(at_once, count - first)
            images = np.fromfile(self._partial, np.uint8, number * self._image_bytes, offset=first * self._image_bytes)
            facts = np.fromfile(self._partial_facts, kind, number, offset=first * kind.itemsize)
            measured = measure(images.reshape(number, *self.shape[1:]))
            same = [bytes(one) == bytes(other) for one, other in zip(measured, facts, strict=True)]
            if not all(same):
                return first + same.index(False)
        return count

    def _map(self) -> Decoded | None:
        """The images, if all are there; nobody deletes them as long as they are mapped."""
        while self.whole:
            with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
                # Where locks are not known, nobody gets the one that is needed for deleting.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_SH)
                if _same(file, self.path):
                    return self._map_file(file)
        return None

    def _map_file(self, file: BinaryIO) -> Decoded:
        # The lock stays when the file is closed here: it ends with the last descriptor, and mmap keeps a copy of it.
        #
        # Read-only and shared: torch.from_file(shared=False) maps for writing too, which Linux refuses for files larger
        # than memory ("Cannot allocate memory"), and those are what this is for.
        pixels = np.memmap(file, np.uint8, mode="r", shape=self.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            images = torch.from_numpy(pixels)
        facts = np.fromfile(self.path, self._facts_type, offset=self.shape[0] * self._image_bytes)
        return Decoded(images, facts, self._window())

    def _window(self) -> Tensor | None:
        values = read_json(self._description)["window"]
        return None if values is None else torch.tensor(values, dtype=torch.float32)

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """Hold the lock of this cache; the kernel gives it back when this process ends, however it ends."""
        try:
            file = _lock(self._lock, self._wait)
        except OSError as error:  # some network file systems know no locks
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._refused(error.strerror or str(error)) from error
        assert file is not None
        with file:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _wait(self, file: TextIO) -> bool:
        file.seek(0)
        log.info("waiting for process %s, which makes %s", file.read() or "unknown", self.path)
        fcntl.flock(file, fcntl.LOCK_EX)
        return True

    def _remove_stale(self) -> None:
        """Delete what was made of the files as they were before, or of others, and is neither made nor used now."""
        for lock in self.folder.glob("*.lock"):
            if lock.stem.split("-")[1] != self.files:
                try:
                    deleted = _delete_unused(lock)
                except OSError as error:  # of another user, or gone by now
                    log.debug("%s is out of date and stays: %s", lock.with_suffix(".images"), error)
                else:
                    if deleted:
                        log.info("%s was out of date and is deleted", lock.with_suffix(".images"))

    def _remove_partial(self) -> None:
        for path in (self._partial, self._partial_facts, self._description):
            path.unlink(missing_ok=True)


def _delete_unused(lock: Path) -> bool:
    """Delete a cache, unless a process makes it (and has its lock) or has it mapped (and shares that of its images)."""
    claimed = _lock(lock, lambda _: False)
    if claimed is None:
        return False
    with contextlib.ExitStack() as held:
        held.enter_context(claimed)
        images = lock.with_suffix(".images")
        if images.exists():
            # for writing, without which NFS gives no exclusive lock
            file = held.enter_context(images.open("r+b"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        for suffix in (".images", ".json", ".part", ".facts", ".lock"):
            lock.with_suffix(suffix).unlink(missing_ok=True)
    return True


def _lock(path: Path, wait: Callable[[TextIO], bool]) -> TextIO | None:
    """The locked file; if another process has the lock, ``wait`` gets it or says no, and then it is None."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait(file):
                file.close()
                return None
        except OSError:
            file.close()
            raise
        # Who deleted it as out of date had the lock until now: then a new file is needed, which others see, too.
        if _same(file, path):
            return file
        file.close()


def _same(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that change with a value made of plain lists, numbers and text."""
    return blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def readable_size(number: float) -> str:
    """Bytes in kB, MB, GB or TB, three digits."""
    power = min(4, max(1, int(math.log10(max(1.0, number)) // 3)))
    return f"{number / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def free_space(path: Path) -> int:
    """Bytes that the file system of ``path`` has left; the path itself need not be there yet."""
    path = path.absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(there).free


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that may be taken without swapping: what the kernel can spare, and what the limits of the cgroups leave.

    Args:
        proc: Where the kernel tells about processes.
        cgroups: Where it tells about control groups, of either version.
    """
    if not (proc / "meminfo").exists():  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = re.search(r"MemAvailable:\s*(\d+) kB", (proc / "meminfo").read_text())
    assert found is not None
    bounds = [1024 * int(found[1])]
    own_groups = proc / "self/cgroup"
    for line in own_groups.read_text().splitlines() if own_groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif not controllers:
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        # In a container the path may be that of the host: then what counts is at the root.
        own = root / path.lstrip("/")
        bounds += [left for folder in (own, *own.parents) if (left := _left_in(folder, *names)) is not None]
    return max(0, min(bounds))


def _left_in(folder: Path, limit: str, usage: str, freeable: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        used = int((folder / usage).read_text())
        cached = re.search(rf"^{freeable} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(most) - used + (int(cached[1]) if cached else 0)


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar with the time left, if stderr is a terminal; call what is given with how many more are done."""
    if not shown or not sys.stderr.isatty():
        yield lambda number: None
        return
    from rich import get_console  # the one that messages and Lightning's own bar use
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=get_console(), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda number: bar.advance(task, number)
