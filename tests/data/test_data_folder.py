import builtins
import logging
import os
import re
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from lightning_automl.data import FolderDataModule
from lightning_automl.rundir import UserError

RED = (250, 10, 20)


def draw(path, size=(6, 8), mode="RGB", value=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if value is None:
        value = tuple(np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 256, 3).tolist())
    Image.new("RGB", size[::-1], value).convert(mode).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten images of 6 x 8 pixels."""
    for label in ("cat", "dog"):
        for number in range(10):
            draw(tmp_path / label / f"{number}.png")
    return tmp_path


def load(path, **settings):
    data = FolderDataModule(path=str(path), **settings)
    data.setup("fit")
    return data


def image_of(data, name):
    """The image ``(channels, height, width)`` of a file, as it is in memory."""
    for split, rows in data.split_rows.items():
        for place, row in enumerate(rows):
            if data.contents.names[row] == name:
                return data.datasets[split][place][0]
    raise KeyError(name)


def test_one_folder_a_class(folder):
    data = load(folder)
    assert (data.class_names, data.channels, data.image_size) == (["cat", "dog"], 3, (6, 8))
    assert sum(len(dataset) for dataset in data.datasets.values()) == 20
    expected = torch.from_numpy(np.array(Image.open(folder / "dog" / "3.png"))).permute(2, 0, 1)
    assert torch.equal(image_of(data, "dog/3.png"), expected)


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders_above_class_folders_are_kept(tmp_path, val):
    for split, number in (("train", 6), (val, 3), ("test", 2)):
        for label in ("cat", "dog"):
            for image in range(number):
                draw(tmp_path / split / label / f"{image}.jpg")
    data = load(tmp_path)
    assert {split: len(rows) for split, rows in data.split_rows.items()} == {"train": 12, "val": 6, "test": 4}
    assert data.contents.names[data.split_rows["val"][0]].startswith(f"{val}/")


def test_a_table_with_groups_and_splits(folder):
    lines = ["file,label,group,split"]
    lines += [f"cat/{number}.png,cat,c{number // 2}," for number in range(8)]
    lines += [f"dog/{number}.png,dog,d{number // 2}," for number in range(8)]
    lines += ["cat/8.png,cat,c8,test", "dog/8.png,dog,d8,test"]
    (folder / "labels.csv").write_text("\n".join(lines))
    data = load(folder)
    assert [data.contents.names[row] for row in data.split_rows["test"]] == ["cat/8.png", "dog/8.png"]
    groups = {split: set(data.contents.groups[rows]) for split, rows in data.split_rows.items()}
    assert not groups["train"] & groups["val"]


def test_another_table_may_be_named_and_use_semicolons(folder):
    rows = [f"{label}/{number}.png;{label}s" for label in ("cat", "dog") for number in range(5)]
    (folder / "animals.csv").write_text("\ufefffile;label\n" + "\n".join(rows))
    assert load(folder, labels="animals.csv").class_names == ["cats", "dogs"]
    assert load(folder, labels=str(folder / "animals.csv")).class_names == ["cats", "dogs"]


def test_a_table_may_name_files_whose_names_are_not_utf_8(folder):
    name = os.fsdecode(b"cat/\xe9t\xe9.png")
    (folder / "cat/0.png").rename(folder / name)
    rows = [
        b"cat/\xe9t\xe9.png,cat",
        *(f"{label}/{n}.png,{label}".encode() for n in range(1, 9) for label in ("cat", "dog")),
    ]
    (folder / "labels.csv").write_bytes(b"file,label\n" + b"\n".join(rows))
    assert load(folder).contents.names[0] == name


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp", "a.tif", "a.tiff", "a.bmp", "a.gif"])
def test_every_file_type_is_read(folder, name):
    draw(folder / "cat" / name, value=RED)
    image = image_of(load(folder, channels=3), f"cat/{name}").float()
    assert (image - torch.tensor(RED)[:, None, None]).abs().max() < 8


@pytest.mark.parametrize(
    ("mode", "channels", "expected"),
    [
        ("P", 3, (255, 0, 0)),  # Pillow's web palette
        ("RGBA", 3, RED),
        ("RGBA", 4, (*RED, 255)),
        ("LA", 1, (83,)),  # 0.299 * 250 + 0.587 * 10 + 0.114 * 20
        ("LA", 2, (83, 255)),
        ("1", 1, (0, 255)),
        ("L", 3, (83, 83, 83)),
        ("RGB", 1, (83,)),
        ("RGB", 2, (83, 255)),
    ],
)
def test_modes_become_the_wanted_number_of_channels(folder, mode, channels, expected):
    draw(folder / "cat" / "a.png", mode=mode, value=RED)
    image = image_of(load(folder, channels=channels), "cat/a.png")
    assert len(image) == channels
    if mode == "1":
        assert set(image.unique().tolist()) <= set(expected)
    else:
        assert image[:, 0, 0].tolist() == list(expected)


def test_a_palette_with_transparency_is_read(folder):
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, *RED])
    image.save(folder / "cat" / "a.png", transparency=bytes([255, 100]))
    assert image_of(load(folder), "cat/a.png")[:, 0, 0].tolist() == list(RED)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_printing_and_video_colours_become_rgb(folder, mode):
    draw(folder / "cat" / "a.jpg" if mode == "YCbCr" else folder / "cat" / "a.tif", mode=mode, value=RED)
    image = image_of(load(folder), f"cat/a.{'jpg' if mode == 'YCbCr' else 'tif'}").float()
    assert (image[:, 0, 0] - torch.tensor(RED)).abs().max() < 8


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_exif_orientation_is_respected(folder, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    image = Image.new("RGB", (6, 8))
    image.paste(RED, (0, 0, 6, 4))  # upper half
    image.save(folder / "cat" / name, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
    shown = image_of(load(folder), f"cat/{name}")
    assert shown.shape == (3, 6, 8)
    assert shown[0, :, 5:].min() > 200  # right half
    assert shown[0, :, :3].max() < 50


def test_grey_images_with_16_bits_are_windowed(tmp_path):
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        for number in range(8):
            path = tmp_path / label / f"{number}.{'png' if number % 2 else 'tif'}"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(generator.integers(1000, 3000, (6, 8), dtype=np.uint16)).save(path)
    data = load(tmp_path)
    low, high = data.window[0].tolist()
    assert 1000 <= low < 1100
    assert 2900 < high <= 3000
    raw = np.array(Image.open(tmp_path / "a" / "3.png")).astype(float)
    expected = np.clip((raw - low) * 255 / (high - low), 0, 255)
    assert np.abs(image_of(data, "a/3.png")[0].numpy() - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 8, 5), {"photometric": "minisblack", "planarconfig": "contig"}),
        ((5, 6, 8), {"photometric": "minisblack", "planarconfig": "separate"}),
        ((5, 6, 8), {"photometric": "minisblack"}),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiff_with_many_channels(tmp_path, shape, options, dtype):
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(5):
            pixels = generator.integers(0, 256, shape).astype(dtype)
            tifffile.imwrite(tmp_path / label / f"{number}.tif", pixels, **options)
    data = load(tmp_path)
    assert (data.channels, data.image_size) == (5, (6, 8))
    assert (data.window is None) == (dtype == "uint8")
    raw = tifffile.imread(tmp_path / "b" / "2.tif").astype(float)
    raw = raw.transpose(2, 0, 1) if shape == (6, 8, 5) else raw
    if data.window is not None:
        low, high = data.window.numpy().T[:, :, None, None]
        raw = np.clip((raw - low) * 255 / (high - low), 0, 255)
    assert np.abs(image_of(data, "b/2.tif").numpy() - raw).max() <= 0.51


def test_many_channels_without_tifffile_name_the_command(tmp_path, monkeypatch):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        tifffile.imwrite(tmp_path / label / "0.tif", np.zeros((5, 6, 8), np.uint8), photometric="minisblack")
    imports = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "tifffile":
            raise ImportError(name)
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="needs tifffile; pip install tifffile"):
        load(tmp_path)


def test_images_are_resized_with_averaging(folder):
    image = Image.new("L", (80, 60))
    image.putdata([255 * (place % 2) for place in range(4800)])  # stripes of one pixel
    image.save(folder / "cat" / "stripes.png")
    data = load(folder, image_size=(6, 8), channels=1)
    assert (image_of(data, "cat/stripes.png")[0].float() - 127).abs().max() < 20
    assert load(folder, image_size=4, channels=1).image_size == (4, 4)


def test_a_large_jpeg_keeps_its_colours_when_made_smaller(folder):
    draw(folder / "cat" / "large.jpg", size=(600, 800), value=RED)
    image = image_of(load(folder, image_size=(6, 8)), "cat/large.jpg").float()
    assert (image - torch.tensor(RED)[:, None, None]).abs().max() < 8


def test_other_files_are_passed_over_and_counted(folder, caplog):
    (folder / "cat" / "notes.txt").write_text("x")
    (folder / "cat" / ".hidden.png").write_text("x")
    (folder / ".cache").mkdir()
    with caplog.at_level(logging.INFO, "lightning_automl.data.folder"):
        data = load(folder)
    assert data.class_names == ["cat", "dog"]
    assert "1 files in" in caplog.text


def test_broken_files_are_named_by_their_header(folder):
    (folder / "cat" / "0.png").write_bytes(b"")
    (folder / "dog" / "1.png").write_bytes(b"no image")
    message = (
        r"^2 of 20 image files cannot be read: cat/0.png \(the file is empty\), dog/1.png \(not an image of a known "
        r"type\); repair them, or set --data.init_args.skip_broken true to leave such files out$"
    )
    with pytest.raises(UserError, match=message):
        FolderDataModule(path=str(folder))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def test_broken_pixels_are_found_when_they_are_decoded(folder):
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "cat" / f"{number}.png")
        truncate(folder / "cat" / f"{number}.png")
    data = FolderDataModule(path=str(folder), test_fraction=0.1, val_fraction=0.1)
    with pytest.raises(UserError, match=r"image files cannot be read: cat/.*and . more; repair them"):
        data.setup("fit")


def test_broken_files_may_be_left_out(folder, caplog):
    (folder / "cat" / "0.png").write_bytes(b"")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(folder / "dog" / "1.png")
    truncate(folder / "dog" / "1.png")
    data = load(folder, skip_broken=True)
    assert sum(len(dataset) for dataset in data.datasets.values()) == 18
    assert "2 files that cannot be read are left out: cat/0.png (the file is empty), dog/1.png (" in caplog.text


@pytest.fixture
def odd_file(folder):
    """A TIFF file with five channels among files with three."""
    tifffile.imwrite(folder / "cat" / "odd.tif", np.zeros((5, 6, 8), np.uint8), photometric="minisblack")
    return folder / "cat" / "odd.tif"


def test_a_file_with_other_channels_is_named_and_may_be_left_out(folder, odd_file, caplog):
    told = r"cat/odd.tif \(it has 5 channels and 3 were asked for\)"
    with pytest.raises(UserError, match=rf"^1 of \d+ image files cannot be read: {told}; repair them, or set --data"):
        load(folder, channels=3)
    data = load(folder, channels=3, skip_broken=True)
    assert len(data.contents.names) == 20
    assert any(re.fullmatch(f"1 file that cannot be read is left out: {told}", line) for line in caplog.messages)


def test_all_files_broken_is_refused(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"none of the 20 image files in .* can be read: cat/0.png \(the file is empty\)"
    ):
        load(folder, skip_broken=True)


def test_mixed_sizes_are_refused_with_their_range(folder):
    draw(folder / "cat" / "small.png", size=(3, 4))
    draw(folder / "dog" / "large.png", size=(60, 80))
    message = (
        r"^the images differ in size, from 3 x 4 \(cat/small.png\) to 60 x 80 \(dog/large.png\) pixels; "
        r"set --data.init_args.image_size to resize them, for example to 64$"
    )
    with pytest.raises(UserError, match=message):
        load(folder)


def test_mixed_channels_are_refused_with_an_example_of_each(folder):
    draw(folder / "cat" / "a.png", mode="L")
    message = (
        r"^the images differ in their number of channels: 1 \(cat/a.png\), 3 \(cat/0.png\); "
        r"set --data.init_args.channels to 1 for grey or 3 for colour$"
    )
    with pytest.raises(UserError, match=message):
        load(folder)


def test_mixed_depths_are_refused(folder):
    Image.fromarray(np.zeros((6, 8), np.uint16)).save(folder / "cat" / "deep.png")
    with pytest.raises(UserError, match=r"cat/0.png has 8 bits a channel and cat/deep.png more; save all images"):
        load(folder, channels=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "channels is 0; known: 1, 2, 3, 4"),
        ({"channels": 7}, "cannot be read with 7 channels; known: 1, 2, 3, 4"),
        ({"image_size": 0}, r"image_size is \(0, 0\); it is height and width in pixels"),
        ({"labels": "nowhere.csv"}, "there is no table nowhere.csv, neither here nor in"),
    ],
)
def test_wrong_settings_are_refused(folder, settings, message):
    with pytest.raises(UserError, match=message):
        load(folder, **settings)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere; give the folder that holds the images"):
        load(tmp_path / "nowhere")


def test_an_empty_folder_is_refused_with_the_known_layouts(tmp_path):
    with pytest.raises(UserError, match="holds no folders; known layouts: one folder a class, train/ val/ test/ above"):
        load(tmp_path)


def test_a_class_folder_without_images_is_refused(folder):
    (folder / "bird").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*bird holds no images; known: .png"):
        load(folder)


def test_one_class_is_refused(tmp_path):
    draw(tmp_path / "cat" / "0.png")
    with pytest.raises(UserError, match="holds one class folder, 'cat'; a classifier needs at least two"):
        load(tmp_path)


def test_an_unknown_folder_beside_train_is_refused(folder):
    draw(folder / "train" / "cat" / "0.png")
    with pytest.raises(
        UserError, match="holds train/ and also cat/; known beside train/: val/, valid/, validation/, te"
    ):
        load(folder)


def test_split_folders_without_train_are_refused(tmp_path):
    draw(tmp_path / "test" / "cat" / "0.png")
    with pytest.raises(UserError, match="holds test/ but no train/; add it"):
        load(tmp_path)


def test_a_class_that_only_the_test_folder_has_is_refused(tmp_path):
    for split, labels in (("train", "ab"), ("test", "abc")):
        for label in labels:
            for number in range(3):
                draw(tmp_path / split / label / f"{number}.png")
    with pytest.raises(UserError, match="class 'c' has no image in the train split"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "has no column 'file'; it has nothing"),
        ("name,label\ncat/0.png,cat", "has no column 'file'; it has name, label"),
        ("file,class\ncat/0.png,cat", "has no column 'label'; it has file, class"),
        (
            "file,label\ncat/0.png,cat\ncat/1.png,\udce9t",
            r"line 3 of .* has a label that is not UTF-8, '\\udce9t'; save",
        ),
        ("file,label\n", "has no rows; give one a file"),
        ("file,label\ncat/0.png,\n", "line 2 of .* has no label"),
        ("file,label\ncat/0.png,cat\n,dog", "line 3 of .* has no file"),
        ("file,label\ncat/0.png,cat\ncat/99.png,dog", "1 of 2 files in .* do not exist in .*: cat/99.png"),
        ("file,label\ncat/0.png,cat\n./cat/0.png,dog", "has './cat/0.png' in line 2 and line 3; name it once"),
        (
            "file,label,split\ncat/0.png,cat,holdout",
            "unknown split 'holdout'; known: train, val, valid, validation, test",
        ),
        ("file,label\ncat/0.png,cat\ncat/1.png,cat", "has only one label, 'cat'; a classifier needs at least two"),
        ("file,label\nlabels.csv,cat", "labels.csv in .* is of no known image type; known: .png"),
    ],
)
def test_a_wrong_table_is_refused(folder, table, message):
    (folder / "labels.csv").write_text(table, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        load(folder)
