import json
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import draw_images
from PIL import Image

from lightning_automl.auto.facts import Facts
from lightning_automl.auto.image_folder import choose_size
from lightning_automl.auto.look import look
from lightning_automl.auto.notes import notes_of
from lightning_automl.data import FolderDataModule, ImageDataModule
from lightning_automl.image_files import ImageFile, decode_or_error, read_header
from lightning_automl.rundir import UserError


def draw(path, size=(20, 20), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(zlib.crc32(f"{path.parent.name}/{path.name}".encode()))
    Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes, ten images of 20 x 20 grey pixels each."""
    for label in ("cat", "dog"):
        for number in range(10):
            draw(tmp_path / "images" / label / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def see(tmp_path):
    return lambda data, budget=180, **settings: look(str(data), tmp_path / "auto", budget=budget, **settings)


def write_npz(path, groups=None, **labels):
    """Random images; ``train=[0, 1, …]`` are the labels of a split."""
    generator = np.random.default_rng(0)
    arrays = {f"{split}_labels": np.array(own) for split, own in labels.items()}
    arrays |= {
        f"{split}_images": generator.integers(0, 256, (len(own), 8, 8), np.uint8) for split, own in labels.items()
    }
    np.savez(path, **arrays, **{f"{split}_groups": np.array(own) for split, own in (groups or {}).items()})
    return path


# What there is


def test_the_digits(see):
    facts = see("digits")
    assert (facts.images, facts.num_classes, facts.channels, facts.image_size) == (1797, 10, 1, [8, 8])
    assert [facts.number(split) for split in ("train", "val", "test")] == [1222, 216, 359]
    assert facts.counts["train"][0] + facts.counts["val"][0] + facts.counts["test"][0] == 178
    assert (facts.folds, facts.search_folds, facts.comparison_folds) == (5, [0, 1, 2], [3, 4])
    assert (facts.exact_duplicate_count, facts.near_duplicate_count, facts.broken) == (0, 0, [])
    assert (facts.modality, facts.flips, facts.official_splits) == ("natural", True, [])
    assert facts.data == {"class_path": "lightning_automl.data.DigitsDataModule", "init_args": {}}
    assert len(facts.notes) == 1
    assert facts.notes[0].startswith("No groups were given: intervals assume independent images.")


def test_what_is_seen_is_plain_json_and_comes_back(see):
    facts = see("digits")
    assert Facts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts
    with pytest.raises(UserError, match=r"look.json has no units; remove it"):
        Facts.from_dict({key: value for key, value in facts.to_dict().items() if key != "units"})


def test_the_same_is_seen_twice(see, folder):
    assert see(folder) == see(folder)


def test_a_folder_of_mixed_sizes_and_modes_with_broken_files(tmp_path, see):
    folder = draw_images(tmp_path / "images", 24)
    facts = see(folder)
    assert (facts.images, facts.channels) == (48, 3)
    assert facts.broken == [
        ["light/cut.png", "image file is truncated"],
        ["light/empty.jpg", "the file is empty"],
        ["light/text.png", "not an image of a known type"],
    ]
    sizes = [read_header(path).size for path in folder.glob("*/[0-9]*")]
    areas = [height * width for height, width in sizes]
    assert np.prod(facts.sizes["smallest"]) == min(areas)
    assert np.prod(facts.sizes["largest"]) == max(areas)
    assert facts.sizes["median"] == [int(side) for side in np.median(sizes, axis=0)]
    shorter = np.median([min(size) for size in [*sizes, read_header(folder / "light/cut.png").size]])
    assert facts.image_size == [int(shorter)] * 2 == [28, 28]
    assert facts.notes[0].startswith(
        "3 files that cannot be read are left out: light/cut.png (image file is truncated);"
    )


def counting(monkeypatch):
    """The files that are decoded from now on."""
    decoded = []

    def count(file, *arguments):
        decoded.append(file.path.name)
        return decode_or_error(file, *arguments)

    monkeypatch.setattr("lightning_automl.data.folder.decode_or_error", count)
    return decoded


def test_the_data_module_that_is_named_can_be_made_and_takes_the_decoded_images(tmp_path, see, monkeypatch):
    facts = see(draw_images(tmp_path / "images", 24))
    decoded = counting(monkeypatch)
    arguments = {**facts.data["init_args"], "image_size": tuple(facts.data["init_args"]["image_size"])}
    data = FolderDataModule(**arguments, fold=0, folds=facts.folds)
    assert sum(map(len, (data.dataset("train"), data.dataset("val"), data.dataset("test")))) == facts.images
    assert decoded == ["cut.png"]  # might be mended by now
    assert arguments["cache"] == str(tmp_path / "auto" / "cache")
    assert Path(arguments["path"]).is_absolute()


def test_whole_files_are_decoded_once(folder, see, monkeypatch):
    decoded = counting(monkeypatch)
    assert see(folder).data["init_args"]["skip_broken"] is False
    assert sorted(decoded) == sorted(2 * [f"{number}.png" for number in range(10)])


def test_a_file_whose_header_alone_is_whole_is_left_out(folder, see):
    whole = (folder / "cat/0.png").read_bytes()
    (folder / "cat/cut.png").write_bytes(whole[: len(whole) // 2])
    facts = see(folder)
    assert facts.broken == [["cat/cut.png", "image file is truncated"]]
    assert facts.data["init_args"]["skip_broken"] is True
    assert facts.images == 20


def test_grey_and_colour_become_colour_and_grey_stays_grey(folder, see):
    assert see(folder).channels == 1
    draw(folder / "cat" / "colour.png", mode="RGB")
    assert see(folder).channels == 3


def test_a_table_brings_groups_and_splits(folder, see):
    lines = ["file,label,group,split"]
    for label in ("cat", "dog"):
        lines += [f"{label}/{number}.png,{label},{label}{number // 2},{'test' * (number > 7)}" for number in range(10)]
    (folder / "labels.csv").write_text("\n".join(lines))
    facts = see(folder)
    assert (facts.groups, facts.unit, facts.units, facts.official_splits) == (10, "group", [4, 4], ["test"])
    assert (facts.folds, facts.search_folds, facts.comparison_folds) == (4, [0, 1, 2], [3])
    assert "The 20 images are of 10 groups; no group is in two splits or folds." in facts.notes
    assert "The test split that the data bring is kept; val is cut off from train." in facts.notes
    told = next(note for note in facts.notes if "conclusive" in note)
    assert told.startswith("The test split has fewer than 10 groups of 'cat' (1 group) and 'dog' (1 group):")


def test_the_modality_decides_about_flips(see):
    facts = see("digits", modality="radiograph")
    assert (facts.modality, facts.flips, facts.space["operations"]["rotate"]) == ("radiograph", False, 10)


def test_an_own_space_is_read_from_a_file(tmp_path, see):
    space = tmp_path / "knee.yaml"
    space.write_text("{extends: radiograph, operations: {horizontal_flip: true}}")
    assert (see("digits", modality=str(space)).modality, see("digits", modality=str(space)).flips) == ("knee", True)


def test_equal_and_nearly_equal_images_of_two_splits_are_told(tmp_path, see):
    generator = np.random.default_rng(0)
    images = {
        split: generator.integers(0, 256, (count, 8, 8), np.uint8) for split, count in (("train", 40), ("val", 20))
    }
    images["test"] = images["train"][:20].copy()
    images["test"][1:, 0, 0] ^= 1  # the first is equal, the others nearly
    labels = {f"{split}_labels": np.arange(len(own)) % 2 for split, own in images.items()}
    np.savez(tmp_path / "a.npz", **{f"{split}_images": own for split, own in images.items()}, **labels)
    facts = see(tmp_path / "a.npz")
    assert (facts.exact_duplicates, facts.exact_duplicate_count) == ([["train[0]", "test[0]"]], 1)
    assert facts.near_duplicates == [[f"train[{row}]", f"test[{row}]"] for row in range(1, 20)]
    assert facts.near_duplicate_count == 19
    assert any(note.startswith("1 image of val or test equals one of another split (tr") for note in facts.notes)
    assert any(note.startswith("19 images of val or test look nearly like one of ano") for note in facts.notes)


# The size of images in a folder


def files(*sizes):
    return [ImageFile(Path("a.png"), size) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "budget", "size"),
    [
        ([(28, 28)] * 5, 1, [28, 28]),  # all of one small size: whatever the budget
        ([(64, 96)] * 5, 1, [64, 96]),
        ([(64, 97)] * 5, 1e9, [64, 64]),
        ([(500, 300)] * 5, 1e9, [224, 224]),
        ([(200, 300), (150, 400), (90, 90)], 1e9, [128, 128]),  # shorter sides 200, 150, 90: median 150
        ([(20, 30), (24, 40), (26, 90)], 1e9, [24, 24]),
        ([(500, 300)] * 100, 100 * 96**2 / 4000, [96, 96]),  # just affordable
        ([(500, 300)] * 100, 100 * 96**2 / 4000 - 1, [64, 64]),
        ([(500, 300)] * 100, 1, [32, 32]),  # never less
    ],
)
def test_the_size_follows_the_images_and_the_budget(sizes, budget, size):
    assert choose_size(files(*sizes), budget) == size


def test_a_gpu_affords_larger_images():
    assert choose_size(files(*[(500, 300)] * 1000), 180, gpu=False) == [32, 32]
    assert choose_size(files(*[(500, 300)] * 1000), 180, gpu=True) == [96, 96]


def test_the_size_that_is_given_wins(folder, see):
    assert see(folder, image_size=12).image_size == [12, 12]


# Folds


@pytest.mark.parametrize(
    ("images", "folds", "search", "comparison"),
    [
        (2, 2, [0], [1]),
        (3, 3, [0, 1], [2]),
        (4, 4, [0, 1, 2], [3]),
        (5, 5, [0, 1, 2], [3, 4]),
        (9, 5, [0, 1, 2], [3, 4]),
    ],
)
def test_the_rarest_class_decides_about_the_folds(tmp_path, see, images, folds, search, comparison):
    rare = [1] * (images - 1)
    path = write_npz(tmp_path / "a.npz", train=[0] * 20 + rare, val=[0] * 5 + [1], test=[0, 1])
    facts = see(path)
    assert facts.units == [25, images]
    assert (facts.folds, facts.search_folds, facts.comparison_folds) == (folds, search, comparison)


def test_folds_are_fewer_where_groups_cannot_be_cut(tmp_path, see):
    # Besides group 4 two groups never hold all of the three classes, so that there are no three such parts.
    holds = {1: (0, 2), 2: (0, 1), 3: (1, 2), 4: (0, 1, 2)}
    labels = [label for own in holds.values() for label in own]
    groups = [group for group, own in holds.items() for _ in own]
    split = {"train": [index for index, group in enumerate(groups) if group != 4], "val": [6, 7, 8]}
    path = write_npz(
        tmp_path / "a.npz",
        **{name: [labels[index] for index in rows] for name, rows in split.items()},
        test=[0, 1, 2],
        groups={**{name: [groups[index] for index in rows] for name, rows in split.items()}, "test": [9, 9, 9]},
    )
    facts = see(path)
    assert (facts.units, facts.folds) == ([3, 3, 3], 2)
    with pytest.raises(UserError, match="folds is 3, and 2 is the largest number that is possible: the groups outside"):
        see(path, folds=3)


def test_the_number_of_folds_that_is_given_wins(see):
    facts = see("digits", folds=8)
    assert (facts.folds, facts.search_folds, facts.comparison_folds) == (8, [0, 1, 2, 3, 4, 5], [6, 7])


# A YAML file with a data module


def test_a_yaml_file_names_a_data_module(tmp_path, see, make_npz, monkeypatch):
    (tmp_path / "here").mkdir()
    make_npz(tmp_path / "here" / "a.npz", counts=(30, 12, 12))
    (tmp_path / "here" / "data.yaml").write_text(
        "data: {class_path: ArraysDataModule, init_args: "
        "{path: a.npz, batch_size: 7, base_augment: crop, split_seed: 3}}"
    )
    facts = see(tmp_path / "here" / "data.yaml")
    assert facts.data == {
        "class_path": "lightning_automl.data.ArraysDataModule",
        "init_args": {"path": str(tmp_path / "here" / "a.npz"), "split_seed": 3},
    }
    assert "base_augment and batch_size of the data module are not followed: every arm has its own." in facts.notes


def test_a_folder_in_a_yaml_file_keeps_what_is_given(tmp_path, see, folder):
    (tmp_path / "data.yaml").write_text(
        f"{{class_path: FolderDataModule, init_args: {{path: {folder}, channels: 3, image_size: 10}}}}"
    )
    facts = see(tmp_path / "data.yaml")
    assert (facts.channels, facts.image_size) == (3, [10, 10])


class NoiseDataModule(ImageDataModule):
    """The example of ``ImageDataModule``."""

    def __init__(self, images: int = 100, **kwargs):
        self.pixels = np.random.default_rng(0).integers(0, 256, (images, 1, 8, 8), dtype=np.uint8)
        super().__init__(**kwargs)

    def index(self):
        from lightning_automl.data import Index

        labels = np.arange(len(self.pixels)) % 2
        names = [f"noise[{row}]" for row in range(len(labels))]
        return Index(labels, ["a", "b"], channels=1, image_size=(8, 8), names=names)

    def read(self, rows):
        return self.pixels[rows]


def test_a_data_module_of_ones_own(tmp_path, see):
    (tmp_path / "data.yaml").write_text(f"{{class_path: {__name__}.NoiseDataModule, init_args: {{images: 60}}}}")
    facts = see(tmp_path / "data.yaml")
    assert facts.data == {"class_path": f"{__name__}.NoiseDataModule", "init_args": {"images": 60}}
    assert facts.images == 60


# Refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", r"data.yaml cannot be read as YAML \("),
        ("[1, 2]", "data.yaml names no data module; it needs class_path and init_args"),
        ("{data: {init_args: {}}}", "data.yaml names no data module; it needs class_path and init_args"),
        ("{class_path: DigitsDataModule, init_args: 3}", "init_args in .*data.yaml are 3; they are a mapping of names"),
        ("{class_path: DigitDataModule}", "unknown class for data: 'DigitDataModule'"),
        ("{class_path: DigitsDataModule, init_args: {sides: 3}}", "unknown argument of DigitsDataModule: 'sides'"),
        ("{class_path: FolderDataModule}", "missing: path of FolderDataModule"),
        ("{class_path: ArraysDataModule, init_args: {path: gone.npz}}", "there is no file gone.npz"),
        ("{class_path: DigitsDataModule, init_args: {subset: 2}}", "subset is 2.0; it must be above 0"),
        (
            "{class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}",
            "BoringDataModule is no ImageDataModule, so that it can be cut into no folds",
        ),
    ],
)
def test_a_yaml_file_that_names_no_data_module_is_refused(tmp_path, see, content, message):
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        see(tmp_path / "data.yaml")


def test_a_path_that_is_not_there_is_refused(see):
    with pytest.raises(UserError, match="there is no folder or file nowhere; DATA is digits, a folder with one sub-f"):
        see("nowhere")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.zip", "a.zip is a file of another kind; DATA is digits"),
        ("labels.csv", "another kind; give the folder .* inst"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, see, name, message):
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=message):
        see(tmp_path / name)


def test_an_unknown_modality_is_refused_with_the_known_ones(see):
    with pytest.raises(
        UserError, match=r"is called 'mri' .* known: natural, radiograph, histology, dermoscopy; or give"
    ):
        see("digits", modality="mri")


def test_an_empty_folder_is_refused(tmp_path, see):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="images holds no folders; known layouts: one folder a class"):
        see(tmp_path / "images")


def test_a_single_class_is_refused(tmp_path, see):
    draw(tmp_path / "images" / "cat" / "0.png")
    with pytest.raises(UserError, match="holds one class folder, 'cat'; a classifier needs at least two"):
        see(tmp_path / "images")
    with pytest.raises(UserError, match="there is only one class, '0'; a classifier needs at least two"):
        see(write_npz(tmp_path / "a.npz", train=[0] * 9, val=[0], test=[0]))


def test_a_class_without_images_is_refused(folder, see):
    (folder / "fox").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*fox holds no images"):
        see(folder)


def test_a_class_with_too_few_images_is_refused(folder, see):
    for number in range(2):
        draw(folder / "fox" / f"{number}.png")
    with pytest.raises(UserError, match="class 'fox' has 2 images, too few to be in train, val and test; add images"):
        see(folder)


def test_a_class_that_one_split_lacks_is_refused(tmp_path, see):
    with pytest.raises(UserError, match="class '1' has no image in the test split; every split needs images of every"):
        see(write_npz(tmp_path / "a.npz", train=[0, 1] * 5, val=[0, 1], test=[0, 0]))


def test_more_folds_than_images_are_refused_with_the_largest_number(folder, see):
    with pytest.raises(
        UserError,
        match="folds is 9, and 8 is the largest number that is possible: class 'cat' has 8 images outside the test "
        "split; give 8",
    ):
        see(folder, folds=9)
    with pytest.raises(UserError, match="folds is 1; it must be at least 2, or left out"):
        see(folder, folds=1)


def test_groups_that_cover_one_class_only_are_refused(folder, see):
    lines = [f"{label}/{number}.png,{label},{label}" for label in ("cat", "dog") for number in range(10)]
    (folder / "labels.csv").write_text("\n".join(["file,label,group", *lines]))
    with pytest.raises(UserError, match="class 'cat' has 1 group, too few to be in train, val and test; add groups"):
        see(folder)


def test_a_group_in_two_splits_is_refused(tmp_path, see):
    groups = {"train": [1, 2, 3, 4], "val": [5, 6], "test": [1, 7]}
    with pytest.raises(UserError, match="group '1' is in the train split and in the test split"):
        see(write_npz(tmp_path / "a.npz", train=[0, 1, 0, 1], val=[0, 1], test=[0, 1], groups=groups))


def test_a_majority_of_unreadable_files_is_refused(folder, see):
    for number in range(9):
        (folder / "cat" / f"{number}.png").write_bytes(b"no image")
    for number in range(2):
        whole = (folder / "dog" / f"{number}.png").read_bytes()
        (folder / "dog" / f"{number}.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"class 'cat' has 1 image, too few .*; 9 files cannot be read: cat/0.png \(not a"
    ):
        see(folder)
    for number in range(10, 13):
        draw(folder / "cat" / f"{number}.png")
    for number in range(2, 5):
        whole = (folder / "dog" / f"{number}.png").read_bytes()
        (folder / "dog" / f"{number}.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"14 of 23 image files .* cannot be read: cat/0.png .* and 11 more; that is most"
    ):
        see(folder)


def test_channels_that_do_not_fit_together_are_refused(folder, see):
    pixels = np.zeros((20, 20, 5), np.uint8)
    tifffile.imwrite(folder / "cat" / "five.tif", pixels, photometric="minisblack", planarconfig="contig")
    with pytest.raises(
        UserError, match=r"differ in their number of channels: 1 \(cat/0.png\), 5 \(cat/five.tif\); save"
    ):
        see(folder)


def test_8_and_16_bits_do_not_fit_together(folder, see):
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(folder / "cat" / "deep.png")
    with pytest.raises(UserError, match=r"has 8 bits a channel and cat/deep\.png more"):
        see(folder)


def test_a_full_disk_is_told_before_anything_is_decoded(folder, see, monkeypatch):
    monkeypatch.setattr("lightning_automl.data.cache.free_space", lambda path: 7999)
    with pytest.raises(
        UserError, match=r"the 20 images of .* take 8 kB at 20 x 20 pixels, and .*auto has 8 kB free; free"
    ):
        see(folder)


def test_a_directory_among_the_images_is_refused(folder):
    with pytest.raises(UserError, match=r"auto lies among the images of .*; give another --dir"):
        look(str(folder), folder / "auto", budget=60)


def test_images_that_are_no_files_keep_their_size(see):
    with pytest.raises(
        UserError, match="image_size is 16 and the images of digits have 8 x 8 pixels; only image files"
    ):
        see("digits", image_size=16)
    assert see("digits", image_size=8).image_size == [8, 8]


# What a person reads


@pytest.fixture
def facts(see):
    return replace(see("digits"), class_names=["a", "b"], units=[100, 100], counts={"train": [80, 80]}, imbalance=1.0)


def test_a_few_images_are_told(facts):
    few = replace(facts, units=[100, 19])
    assert "Class 'b' has only 19 images outside the test split: what is chosen on so few is uncertain." in notes_of(
        few, [20, 20]
    )
    assert len(notes_of(replace(facts, units=[100, 20]), [20, 20])) == 1


def test_imbalance_is_told(facts):
    told = notes_of(replace(facts, counts={"train": [40, 100]}, imbalance=2.5), [20, 20])
    assert "Class 'b' has 2.5 times as many train images as 'a': accuracy alone says little about the rare one." in told


def test_a_test_split_that_proves_nothing_is_told(facts):
    (told,) = notes_of(facts, [10, 9])[1:]
    assert (
        told
        == "The test split has fewer than 10 images of 'b' (9 images): what it says about this class is not conclusive."
    )


def test_groups_of_one_image_each_are_no_groups(facts):
    (told,) = notes_of(replace(facts, groups=facts.images), [20, 20])
    assert told == "Every image is a group of its own: intervals assume independent images."


def test_that_nothing_was_compared_is_told(facts):
    assert notes_of(facts, [20, 20], compared=False)[-1].startswith("There are too many images to look for nearly equ")
    assert notes_of(replace(facts, deep=True), [20, 20])[-1].startswith(
        "The images have more than 8 bits; they are windowed"
    )


def test_importing_it_imports_neither_torch_nor_lightning():
    code = "import sys, lightning_automl.auto.look; print({'torch', 'lightning'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
