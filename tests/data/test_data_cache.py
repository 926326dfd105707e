"""Processes of these tests are forked from a server that has imported the package once."""

import errno
import fcntl
import gc
import json
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rich
import torch
from PIL import Image
from rich.console import Console

import lightning_automl.data.base as base
import lightning_automl.data.cache as cache_file
import lightning_automl.data.folder as folder_file
from lightning_automl.data import FolderDataModule
from lightning_automl.data.cache import available_memory, progress, readable_size
from lightning_automl.rundir import DiskFullError, UserError

IMAGES = 30
AT_ONCE = 4  # images that are decoded together
EACH_ONCE = Counter(f"{number:02}.png" for number in range(IMAGES))


@pytest.fixture
def folder(tmp_path):
    """Two classes of fifteen images of 6 x 8 pixels; one of them is there twice."""
    for number in range(IMAGES):
        write_image(tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number:02}.png", number)
    shutil.copy(tmp_path / "pets/cat/00.png", tmp_path / "pets/cat/02.png")
    return tmp_path / "pets"


def write_image(path, seed, dtype=np.uint8, side=(6, 8, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256 if dtype == np.uint8 else 4000, side).astype(dtype)
    Image.fromarray(pixels).save(path)


def write_table(path):
    """Half of the files, with other labels."""
    path.write_text("file,label\n" + "\n".join(f"cat/{number:02}.png,{number % 4}" for number in range(0, IMAGES, 2)))


@pytest.fixture
def deep_folder(tmp_path):
    """Grey images with 16 bits."""
    for number in range(IMAGES):
        write_image(tmp_path / "cells" / "ab"[number % 2] / f"{number:02}.png", number, np.uint16, (6, 8))
    return tmp_path / "cells"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(base, "_VALUES_AT_ONCE", AT_ONCE * 6 * 8 * 3)


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded in this process, in any order."""
    names = []
    original = folder_file.decode_or_error

    def count(file, size, channels):
        names.append(file.path.name)
        return original(file, size, channels)

    monkeypatch.setattr(folder_file, "decode_or_error", count)
    return names


def load(path, cache=None, kind=FolderDataModule, **settings):
    data = kind(str(path), cache=None if cache is None else str(cache), **settings)
    data.setup("fit")
    return data


def caches(place, suffix=".images"):
    return sorted(place.rglob(f"*{suffix}"))


def assert_same(one, other):
    for split in ("train", "val", "test"):
        for here, there in zip(one.eval_dataloader(split), other.eval_dataloader(split), strict=True):
            assert torch.equal(here[0], there[0])
            assert torch.equal(here[1], there[1])
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.std, other.std)
    assert one.leaks == other.leaks
    assert (one.window is None) == (other.window is None)
    assert one.window is None or torch.equal(one.window, other.window)


@pytest.mark.parametrize("settings", [{}, {"image_size": (4, 5)}, {"subset": 0.5}, {"fold": 1, "folds": 3}])
def test_a_cache_gives_what_memory_gives(folder, tmp_path, monkeypatch, settings):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    settings |= {"batch_size": 5, "base_augment": "crop_flip"}
    memory, disk = load(folder, **settings), load(folder, tmp_path / "c", **settings)
    assert_same(memory, disk)
    loaders = memory.train_dataloader(), disk.train_dataloader()
    for _ in range(2):
        for (images, labels), (others, other_labels) in zip(*loaders, strict=True):
            assert torch.equal(labels, other_labels)
            assert images.stride() == others.stride()
            torch.manual_seed(0)
            augmented = memory.augment(images)
            torch.manual_seed(0)
            assert torch.equal(augmented, disk.augment(others))


def test_one_image_of_a_cache_may_be_changed_without_changing_the_cache(folder, tmp_path):
    data = load(folder, tmp_path / "c")
    image, label = data.datasets["val"][0]
    before = image.clone()
    image.zero_()
    assert torch.equal(data.datasets["val"][0][0], before)
    assert label == data.contents.labels[data.split_rows["val"][0]]


def test_a_cache_is_made_once_and_named_after_its_folder(folder, tmp_path, decoded, caplog):
    with caplog.at_level(logging.INFO, "lightning_automl"):
        load(folder, tmp_path / "c")
        assert Counter(decoded) == EACH_ONCE
        (path,) = caches(tmp_path / "c")
        again = load(folder, tmp_path / "c", batch_size=3, fold=0)
    assert len(decoded) == IMAGES
    assert path.parent.name.startswith("pets-")
    assert path.name.startswith("6x8x3-")
    assert path.stat().st_size == IMAGES * (6 * 8 * 3 + 16 + 3 * 16)
    assert json.loads(path.with_suffix(".json").read_text())["path"] == str(folder)
    assert_same(again, load(folder, batch_size=3, fold=0))
    announced, done = caplog.messages[0], caplog.messages[1]
    assert announced.startswith(f"30 images of 6 x 8 pixels (6.24 kB) are decoded once into {path.parent}, where ")
    assert announced.endswith(" are free; asked for by --data.init_args.cache")
    assert done.startswith("30 images were decoded in ")
    assert f"(6.24 kB) were decoded before and are taken from {path}" in caplog.text


def change_content(folder):
    path = folder / "dog/07.png"
    before = path.stat()
    Image.fromarray(np.array(Image.open(path))[::-1]).save(path)
    os.truncate(path, max(before.st_size, path.stat().st_size))  # Pillow does not mind zeros at the end
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def change_size_alone(folder):
    path = folder / "dog/07.png"
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def add_file(folder):
    write_image(folder / "dog/99.png", 99)


def remove_file(folder):
    (folder / "cat/04.png").unlink()


def rename_file(folder):
    (folder / "cat/04.png").rename(folder / "cat/98.png")


@pytest.mark.parametrize("change", [change_content, change_size_alone, add_file, remove_file, rename_file])
def test_a_cache_is_made_anew_when_files_change(folder, tmp_path, decoded, change):
    small = load(folder, tmp_path / "c", image_size=3)
    before = load(folder, tmp_path / "c")
    images = before.datasets["train"].images.clone()
    decoded.clear()
    change(folder)
    after = load(folder, tmp_path / "c")
    assert len(decoded) == len(list(folder.rglob("*.png")))
    assert_same(after, load(folder))
    # who had opened the former ones keeps them
    assert len(caches(tmp_path / "c")) == 3
    assert torch.equal(before.datasets["train"].images, images)
    assert small.datasets["train"][0][0].shape == (3, 3, 3)
    del small, before
    gc.collect()
    load(folder, tmp_path / "c")
    assert len(caches(tmp_path / "c", "")) == 4  # images, json, lock and their folder: nothing out of date


class Cats(FolderDataModule):
    """Takes a part of the files: half of them, with other labels."""

    def _list_files(self):
        listed, _ = super()._list_files()
        cats = [entry for entry in listed if entry.label == "cat"]
        halves = [replace(entry, label="ab"[place % 2]) for place, entry in enumerate(cats)]
        return halves, ["a", "b"]


def test_two_lists_of_files_of_one_folder_keep_both_caches_while_they_are_in_use(folder, tmp_path, decoded):
    all_of_them, cats = load(folder, tmp_path / "c"), load(folder, tmp_path / "c", kind=Cats)
    assert len(caches(tmp_path / "c")) == 2
    decoded.clear()
    again = load(folder, tmp_path / "c"), load(folder, tmp_path / "c", kind=Cats)
    assert decoded == []
    assert_same(again[1], cats)
    del all_of_them, cats, again
    gc.collect()
    load(folder, tmp_path / "c", kind=Cats)
    assert len(caches(tmp_path / "c")) == 1


def can_be_deleted(path):
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_the_lock_of_a_cache_lasts_as_long_as_its_images(folder, tmp_path):
    data = load(folder, tmp_path / "c")
    images = data.datasets["train"].images[3:]
    del data
    gc.collect()
    (path,) = caches(tmp_path / "c")
    assert not can_be_deleted(path)
    del images
    assert can_be_deleted(path)


def delete_cache(path):
    shutil.rmtree(path.parent)


def make_cache_anew(path):
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize(("change", "decodes"), [(delete_cache, IMAGES), (make_cache_anew, 0)])
def test_a_cache_that_changes_on_the_way_to_its_lock_is_opened_again(
    folder, tmp_path, decoded, monkeypatch, change, decodes
):
    load(folder, tmp_path / "c")
    (path,) = caches(tmp_path / "c")
    lock = fcntl.flock
    changes = iter([path])

    def change_before(file, operation):
        if operation == fcntl.LOCK_SH:
            for place in changes:
                change(place)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", change_before)
    decoded.clear()
    data = load(folder, tmp_path / "c")
    assert next(changes, None) is None
    assert len(decoded) == decodes
    assert not can_be_deleted(path)
    assert_same(data, load(folder))


@pytest.fixture
def write_protected(monkeypatch, tmp_path):
    """Lets the place ``c`` be as on a read-only file system; permissions would not hold back the user root."""

    def refuse(name, writes):
        original = getattr(Path, name)

        def call(path, *arguments, **options):
            if path.is_relative_to(tmp_path / "c") and writes(path, *arguments):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return original(path, *arguments, **options)

        monkeypatch.setattr(Path, name, call)

    def protect():
        refuse("open", lambda path, mode="r", *_: set(mode) & set("wax+"))
        refuse("unlink", lambda path: True)
        refuse("mkdir", lambda path, *_: not path.exists())
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)

    return protect


def test_a_whole_cache_is_taken_from_a_place_that_cannot_be_written_to(folder, tmp_path, decoded, write_protected):
    load(folder, tmp_path / "c", image_size=3)
    gc.collect()
    change_content(folder)
    memory = load(folder)
    shutil.copytree(tmp_path / "c", tmp_path / "old")
    load(folder, tmp_path / "c")
    shutil.copytree(tmp_path / "old", tmp_path / "c", dirs_exist_ok=True)  # out of date
    for lock in caches(tmp_path / "c", ".lock"):
        lock.unlink()
    before = caches(tmp_path / "c", "")
    assert len(before) == 5
    decoded.clear()
    write_protected()
    assert_same(load(folder, tmp_path / "c"), memory)
    assert decoded == []
    assert caches(tmp_path / "c", "") == before
    with pytest.raises(
        UserError, match=r"^no cache can be made in .*pets-\w+ \(Permission denied\); give another place"
    ):
        load(folder, tmp_path / "c", image_size=4)


def without_locks(monkeypatch, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_unless_the_cache_is_whole(folder, tmp_path, monkeypatch, number):
    without_locks(monkeypatch, number)
    reason = re.escape(os.strerror(number))
    with pytest.raises(
        UserError, match=rf"^no cache can be made in .*pets-\w+ \({reason}\); give another place by --data"
    ):
        load(folder, tmp_path / "c")
    monkeypatch.undo()
    load(folder, tmp_path / "c")
    without_locks(monkeypatch, number)
    assert_same(load(folder, tmp_path / "c"), load(folder))


@pytest.mark.parametrize("first", [True, False])
def test_the_first_of_several_processes_decides_for_all_whether_images_fit(folder, tmp_path, monkeypatch, first):
    monkeypatch.setattr(folder_file, "available_memory", lambda: 0 if first else 2**40)
    data = FolderDataModule(str(folder))
    data.trainer = SimpleNamespace(
        num_devices=2,
        world_size=2,
        default_root_dir=str(tmp_path),
        strategy=SimpleNamespace(broadcast=lambda fits: first),
    )
    assert (data.image_cache() is None) == first


def break_file(path):
    path.write_bytes(path.read_bytes()[:-40])


def test_files_that_could_be_decoded_are_remembered_until_they_change(folder, tmp_path, decoded):
    break_file(folder / "dog/29.png")
    first = load(folder, tmp_path / "c", skip_broken=True)
    assert len(decoded) == IMAGES + IMAGES - 1  # a look at each, and the cache
    decoded.clear()
    again = load(folder, tmp_path / "c", skip_broken=True)
    assert decoded == ["29.png"]
    assert_same(again, first)
    change_content(folder)
    break_file(folder / "cat/04.png")
    decoded.clear()
    FolderDataModule(str(folder), cache=str(tmp_path / "c"), skip_broken=True)
    assert sorted(decoded) == ["04.png", "07.png", "29.png"]
    decoded.clear()
    FolderDataModule(str(folder), cache=str(tmp_path / "c"), skip_broken=True, channels=1)
    assert len(decoded) == IMAGES  # what can be read with the one number of channels may not with another


def test_a_memory_that_cannot_be_read_costs_only_time(folder, tmp_path, decoded):
    FolderDataModule(str(folder), cache=str(tmp_path / "c"), skip_broken=True)
    (memory,) = caches(tmp_path / "c", ".json")
    for content in ("[", "[]"):
        memory.write_text(content)
        decoded.clear()
        FolderDataModule(str(folder), cache=str(tmp_path / "c"), skip_broken=True)
        assert len(decoded) == IMAGES


def test_no_file_is_remembered_among_the_class_folders(folder):
    before = caches(folder, "")
    with pytest.raises(UserError, match="would be among the class folders"):
        FolderDataModule(str(folder), cache=str(folder / "new"), skip_broken=True)
    assert caches(folder, "") == before


def test_files_are_looked_at_in_the_size_and_channels_that_are_wanted(folder, monkeypatch):
    looks = []
    original = folder_file.decode_or_error
    monkeypatch.setattr(
        folder_file, "decode_or_error", lambda file, *wanted: looks.append(wanted) or original(file, *wanted)
    )
    FolderDataModule(str(folder), skip_broken=True, image_size=(4, 5), channels=1)
    assert looks == [((4, 5), 1)] * IMAGES


def test_a_place_holds_caches_of_several_folders_and_settings(folder, tmp_path, decoded):
    other = tmp_path / "other" / "pets"
    shutil.copytree(folder, other)
    write_table(folder.parent / "some.csv")
    calls = [
        lambda: load(folder, tmp_path / "c"),
        lambda: load(folder, tmp_path / "c", image_size=4),
        lambda: load(folder, tmp_path / "c", channels=1),
        lambda: load(folder, tmp_path / "c", labels=str(folder.parent / "some.csv")),
        lambda: load(other, tmp_path / "c"),
    ]
    for call in calls:
        call()
    assert len(caches(tmp_path / "c")) == 5
    decoded.clear()
    for call in calls:
        call()
    assert decoded == []


def test_a_file_that_breaks_is_told_as_in_memory_and_nothing_is_left(folder, tmp_path, decoded):
    broken = folder / "dog/29.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-40])
    message = r"^1 of 2 image files cannot be read: dog/29.png \(.*\); repair them, or set --data.init_args.skip_broken"
    for _ in range(2):
        decoded.clear()
        with pytest.raises(UserError, match=message):
            load(folder, tmp_path / "c")
        assert len(decoded) == IMAGES
        assert [path.suffix for path in caches(tmp_path / "c", "") if path.is_file()] == [".lock"]
    assert load(folder, tmp_path / "c", skip_broken=True).datasets["train"].images.shape[0] == IMAGES - 1
    broken.write_bytes(whole)
    assert_same(load(folder, tmp_path / "c"), load(folder))


def test_16_bit_images_are_kept_with_the_window_of_their_train_split(deep_folder, tmp_path, decoded):
    folds = [load(deep_folder, tmp_path / "c", fold=fold, folds=3) for fold in (0, 1)]
    assert not torch.equal(folds[0].window, folds[1].window)
    assert len(caches(tmp_path / "c")) == 2
    decoded.clear()
    again = [load(deep_folder, tmp_path / "c", fold=fold, folds=3) for fold in (0, 1)]
    assert decoded == []
    for fold in (0, 1):
        assert_same(again[fold], load(deep_folder, fold=fold, folds=3))
    del folds, again
    gc.collect()
    write_image(deep_folder / "a/00.png", 77, np.uint16, (6, 8))
    load(deep_folder, tmp_path / "c", fold=0, folds=3)
    assert len(caches(tmp_path / "c")) == 1  # those of the files as they were are out of date for all folds


class Interrupted(Exception):
    pass


def interrupt(path, place, calls):
    """Start to make a cache and end it when so many images were decoded; returns the partial file."""
    original = folder_file.decode_or_error
    left = iter(range(calls))

    def decode(*arguments):
        if next(left, None) is None:
            raise Interrupted
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_file, "decode_or_error", decode)
        with pytest.raises(Interrupted):
            load(path, place)
    (partial,) = caches(place, ".part")
    assert caches(place) == []
    return partial


@pytest.fixture
def interrupted(folder, tmp_path):
    """A partial file with the images of three chunks."""
    return interrupt(folder, tmp_path / "c", 3 * AT_ONCE)


def test_the_window_of_a_partial_file_is_not_measured_again(deep_folder, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(base, "_VALUES_AT_ONCE", AT_ONCE * 6 * 8)
    train = len(FolderDataModule(str(deep_folder)).split_rows["train"])
    interrupt(deep_folder, tmp_path / "c", train + 3 * AT_ONCE)
    decoded.clear()
    data = load(deep_folder, tmp_path / "c")
    assert len(decoded) == IMAGES - 3 * AT_ONCE
    assert_same(data, load(deep_folder))


def test_a_file_that_was_cut_off_is_made_anew(folder, tmp_path):
    load(folder, tmp_path / "c")
    (path,) = caches(tmp_path / "c")
    os.truncate(path, path.stat().st_size - 1)
    assert_same(load(folder, tmp_path / "c"), load(folder))


def test_what_was_decoded_is_not_decoded_again(folder, interrupted, tmp_path, decoded, caplog):
    with caplog.at_level(logging.INFO, "lightning_automl"):
        data = load(folder, tmp_path / "c")
    assert len(decoded) == IMAGES - 3 * AT_ONCE
    assert "12 of the 30 images were decoded before" in caplog.text
    assert_same(data, load(folder))
    assert caches(tmp_path / "c", ".part") + caches(tmp_path / "c", ".facts") == []


def tear_facts(partial):
    facts = partial.with_suffix(".facts")
    os.truncate(facts, facts.stat().st_size - 1)


def tear_pixels(partial):
    os.truncate(partial, partial.stat().st_size - 1)


def add_pixels(partial):
    with partial.open("ab") as file:
        file.write(b"more than the facts tell of")


def lose_a_page(partial):
    with partial.open("r+b") as file:
        file.seek(11 * 6 * 8 * 3 + 5)
        file.write(bytes(7))


@pytest.mark.parametrize(("damage", "left"), [(tear_facts, 11), (tear_pixels, 11), (add_pixels, 12), (lose_a_page, 11)])
def test_a_partial_file_is_believed_as_far_as_its_facts_agree(folder, interrupted, tmp_path, decoded, damage, left):
    damage(interrupted)
    data = load(folder, tmp_path / "c")
    assert len(decoded) == IMAGES - left
    assert_same(data, load(folder))


def test_a_partial_file_of_other_files_is_not_gone_on_with(folder, interrupted, tmp_path, decoded):
    change_content(folder)
    data = load(folder, tmp_path / "c")
    assert len(decoded) == IMAGES
    assert not interrupted.exists()
    assert_same(data, load(folder))


def test_a_disk_that_is_too_small_is_told_before_anything_is_decoded(folder, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(cache_file, "free_space", lambda path: 6239)
    message = (
        r"^the decoded images take 6.24 kB and .*/c/pets-\w+ has 6.24 kB free; free some, make "
        r"--data.init_args.image_size smaller, or give another place by --data.init_args.cache$"
    )
    with pytest.raises(UserError, match=message):
        load(folder, tmp_path / "c")
    assert decoded == []
    monkeypatch.setattr(cache_file, "free_space", lambda path: 6240)
    load(folder, tmp_path / "c")


def test_what_is_decoded_needs_no_space_again(folder, interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_file, "free_space", lambda path: 6240 - 12 * 6 * 8 * 3)
    load(folder, tmp_path / "c")


def test_a_disk_that_runs_full_can_be_gone_on_with(folder, tmp_path, decoded, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: full(descriptor) if caches(tmp_path, ".part") else None)
        with pytest.raises(DiskFullError, match=r"no space left for .*\.images; free some and give the same command"):
            load(folder, tmp_path / "c")
    assert caches(tmp_path / "c") == []
    decoded.clear()
    assert_same(load(folder, tmp_path / "c"), load(folder))
    assert len(decoded) == IMAGES  # those in memory


@pytest.mark.parametrize("inside", [".", "cat", "new/cache"])
def test_a_cache_among_the_class_folders_is_refused(folder, inside):
    with pytest.raises(UserError, match=r"the cache .* would be among the class folders of .*pets; give another place"):
        load(folder, folder / inside)


def test_a_cache_in_a_hidden_folder_or_beside_a_table_is_taken(folder):
    load(folder, folder / ".cache")
    write_table(folder / "labels.csv")
    load(folder, folder / "cache")
    assert len(caches(folder)) == 2
    load(folder, folder / "cache")


def test_a_place_that_is_a_file_is_refused(folder, tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(UserError, match=r"no cache can be made in .* \(.+\); give another place by --data"):
        load(folder, tmp_path / "c")


def test_an_empty_place_is_refused(folder):
    with pytest.raises(UserError, match="cache is empty; known: auto, the path of a folder, or null to keep"):
        FolderDataModule(str(folder), cache="")


def setup(folder, **settings):
    FolderDataModule(str(folder), **settings).setup("fit")


def test_images_stay_in_memory_if_they_take_less_than_half_of_it(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    size = IMAGES * 6 * 8 * 3
    monkeypatch.setattr(folder_file, "available_memory", lambda: 2 * size)
    with caplog.at_level(logging.INFO, "lightning_automl"):
        setup(folder)
        assert not (tmp_path / "cache").exists()
        assert caplog.messages[0] == (
            "30 images of 6 x 8 pixels (4.32 kB) are decoded into memory; 8.64 kB of memory are available"
        )
        monkeypatch.setattr(folder_file, "available_memory", lambda: 2 * size - 1)
        caplog.clear()
        setup(folder)
    assert len(caches(tmp_path / "cache")) == 1
    assert caplog.messages[0].endswith(
        "free; 8.64 kB of memory are available; --data.init_args.cache DIR would let several runs share them"
    )
    setup(folder, subset=0.5)
    assert len(caches(tmp_path / "cache")) == 1  # half of the train split fits
    shutil.rmtree(tmp_path / "cache")
    setup(folder, cache=None)
    assert not (tmp_path / "cache").exists()


def test_processes_of_a_machine_share_its_memory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(folder_file, "available_memory", lambda: 3 * IMAGES * 6 * 8 * 3)
    setup(folder)
    assert len(caches(tmp_path / "cache")) == 1


def write_tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {}, 8000 * 1024),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": "1"}, 8000 * 1024),
        (
            "0::/a/b\n",
            {
                **{"a/b/memory.max": "max", "a/b/memory.current": "1", "a/b/memory.stat": ""},
                **{"a/memory.max": "5000", "a/memory.current": "4000", "a/memory.stat": "anon 9\ninactive_file 700\n"},
            },
            1700,
        ),
        (  # in a container the path is that of the host, and the limit at the root
            "5:cpu:/x\n4:memory:/docker/x\n",
            {
                "memory/memory.limit_in_bytes": "6000",
                "memory/memory.usage_in_bytes": "5000",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 300\n",
            },
            1300,
        ),
    ],
)
def test_available_memory_is_what_kernel_and_groups_leave(tmp_path, groups, files, expected):
    meminfo = "MemTotal: 9000 kB\nMemAvailable:   8000 kB\n"
    write_tree(tmp_path / "proc", {"meminfo": meminfo, "self/cgroup": groups})
    write_tree(tmp_path / "cgroup", files)
    assert available_memory(tmp_path / "proc", tmp_path / "cgroup") == expected


def test_this_machine_has_some_memory():
    assert 2**20 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0 kB"), (512, "0.512 kB"), (6240, "6.24 kB"), (301e6, "301 MB"), (2.5e13, "25 TB")]
)
def test_sizes_are_told_with_three_digits(number, told):
    assert readable_size(number) == told


def test_progress_is_shown_on_a_terminal_alone(monkeypatch):
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    monkeypatch.setattr(rich, "get_console", lambda: console)
    monkeypatch.setattr(sys, "stderr", StringIO())
    with progress("decoding", 5) as advance:
        advance(3)
    assert shown.getvalue() == ""
    sys.stderr.isatty = lambda: True
    with progress("decoding", 5, done=1) as advance:
        advance(3)
    assert "decoding" in shown.getvalue()
    assert "4/5" in shown.getvalue()


def build(folder, place, decoded, delay, result):
    """In a process of its own: make or open a cache, slowly, and write down what was decoded and what came out."""
    base._VALUES_AT_ONCE = AT_ONCE * 6 * 8 * 3
    original = folder_file.decode_or_error

    def count(file, size, channels):
        with Path(decoded).open("a") as log:
            log.write(f"{file.path.name}\n")
        time.sleep(delay)
        return original(file, size, channels)

    folder_file.decode_or_error = count
    logging.basicConfig(filename=f"{result}.log", level=logging.INFO)
    data = load(folder, place)
    torch.save({"images": data.datasets["test"][torch.arange(6)][0], "mean": data.mean, "leaks": data.leaks}, result)


@pytest.fixture(scope="module")
def forks():
    """Starts processes in which the package is imported already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # a server with more threads cannot be forked safely
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lightning_automl.data"])
        yield context


@pytest.fixture
def start(forks, folder, tmp_path):
    """Start :func:`build` in a process; the name of the result says which one."""
    started = []

    def run(name, delay=0.0):
        process = forks.Process(
            target=build, args=(folder, tmp_path / "c", tmp_path / "decoded", delay, tmp_path / name)
        )
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


def wait_for(condition, process):
    while not condition():
        assert process.is_alive(), "the process ended too early"
        time.sleep(0.002)


def assert_result(path, folder):
    data, result = load(folder), torch.load(path)
    assert torch.equal(result["images"], data.datasets["test"][torch.arange(6)][0])
    assert torch.equal(result["mean"], data.mean)
    assert result["leaks"] == data.leaks


def test_processes_that_start_at_once_decode_each_file_once(start, folder, tmp_path):
    processes = [start(name, delay=0.01) for name in ("one", "two", "three")]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert Counter((tmp_path / "decoded").read_text().split()) == Counter(
        f"{number:02}.png" for number in range(IMAGES)
    )
    for name in ("one", "two", "three"):
        assert_result(tmp_path / name, folder)


def started_to_decode(tmp_path):
    return len(caches(tmp_path / "c", ".facts")) == 1 and caches(tmp_path / "c", ".facts")[0].stat().st_size >= 2 * 64


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(start, folder, tmp_path, decoded):
    first = start("one", delay=0.1)
    wait_for(lambda: started_to_decode(tmp_path), first)
    first.kill()
    first.join()
    assert caches(tmp_path / "c") == []
    before = len(decoded)
    data = load(folder, tmp_path / "c")
    assert 0 < len(decoded) - before <= IMAGES - AT_ONCE
    assert_same(data, load(folder))


def test_who_waits_for_a_killed_process_takes_over(start, folder, tmp_path):
    first = start("one", delay=0.2)
    wait_for(lambda: started_to_decode(tmp_path), first)
    second = start("two")
    log = tmp_path / "two.log"
    wait_for(lambda: log.exists() and f"waiting for process {first.pid}, which makes" in log.read_text(), second)
    assert first.is_alive()
    first.kill()
    second.join()
    assert second.exitcode == 0
    assert_result(tmp_path / "two", folder)
    assert "of the 30 images were decoded before" in log.read_text()
    # at most the chunks that were under way were decoded twice
    assert IMAGES <= len((tmp_path / "decoded").read_text().split()) <= IMAGES + 3 * AT_ONCE


def test_what_another_process_is_making_is_not_deleted_as_out_of_date(start, folder, tmp_path):
    first = start("one", delay=0.2)
    wait_for(lambda: started_to_decode(tmp_path), first)
    add_file(folder)
    load(folder, tmp_path / "c")
    assert first.is_alive()
    assert len(caches(tmp_path / "c", ".part")) == 1
    first.kill()
    first.join()
    load(folder, tmp_path / "c")
    assert caches(tmp_path / "c", ".part") == []


def test_who_waited_for_a_lock_that_was_deleted_takes_one_that_others_see(start, folder, tmp_path):
    load(folder, tmp_path / "c")
    (lock,) = caches(tmp_path / "c", ".lock")
    lock.with_suffix(".images").unlink()
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = start("two")
        log = tmp_path / "two.log"
        wait_for(lambda: log.exists() and "waiting for process" in log.read_text(), second)
        shutil.rmtree(lock.parent)
        lock.parent.mkdir()
    second.join()
    assert second.exitcode == 0
    assert_result(tmp_path / "two", folder)
    assert lock.read_text() == str(second.pid)


@pytest.fixture
def config(tmp_path):
    text = {
        "model": {
            "class_path": "ClassificationTask",
            "init_args": {"model": {"class_path": "TunableCNN", "init_args": {"filters": [4], "units": [4]}}},
        },
        "data": {"class_path": "FolderDataModule", "init_args": {"path": "pets", "image_size": 8, "batch_size": 8}},
        "trainer": {"max_epochs": 1, "precision": "32-true"},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(text))
    return tmp_path / "c.yaml"


def test_runs_share_the_cache_that_they_name(command, folder, tmp_path, config, decoded):
    keys = ("fit", "--config", config, "--data.init_args.cache", "shared")
    answer = command(*keys, "--dir=one")
    assert answer.status == 0, answer.err
    assert "30 images of 8 x 8 pixels (7.68 kB) are decoded once into shared/pets-" in answer.err
    assert len(decoded) == IMAGES
    for dir_ in ("--dir=two", "--dir=three"):
        answer = command(*keys, dir_)
        assert answer.status == 0, answer.err
        assert "were decoded before and are taken from shared/pets-" in answer.err
    assert len(decoded) == IMAGES
    metrics = [json.loads((tmp_path / name / "summary.json").read_text())["metrics"] for name in ("one", "two")]
    assert metrics[0] == metrics[1]
    assert command("fit", "--config", config, "--data.init_args.cache", "null", "--dir=four").status == 0
    assert json.loads((tmp_path / "four/summary.json").read_text())["metrics"] == metrics[0]
    assert len(decoded) == 2 * IMAGES


def test_a_run_that_does_not_fit_in_memory_keeps_a_cache_and_goes_on_with_it(
    command, folder, tmp_path, config, decoded, monkeypatch
):
    monkeypatch.setattr(folder_file, "available_memory", lambda: 1000)
    for epochs in (1, 2):
        answer = command("fit", "--config", config, "--dir=run", f"--trainer.max_epochs={epochs}")
        assert answer.status == 0, answer.err
    assert command("test", "--dir=run").status == 0
    assert len(decoded) == IMAGES
    assert len(caches(tmp_path / "run/cache")) == 1
    assert not (tmp_path / "cache").exists()


def weights(directory):
    return torch.load(directory / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_two_ranks_make_one_cache_and_end_like_two_ranks_in_memory(folder, tmp_path, config):
    command = [sys.executable, "-m", "lightning_automl", "fit", "--config", config]
    for cache in ("null", "shared"):
        keys = [
            f"--dir=run_{cache}",
            f"--data.init_args.cache={cache}",
            "--trainer.devices=2",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [*command, *keys], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
    assert len(caches(tmp_path / "shared")) == 1
    memory, disk = weights(tmp_path / "run_null"), weights(tmp_path / "run_shared")
    assert all(torch.equal(memory[name], disk[name]) for name in memory)
