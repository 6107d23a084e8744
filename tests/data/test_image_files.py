"""Image files: conversion of every image mode, folder layouts, and the errors for damaged files."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freemerge.data import ImageFolderSource, SourceSuite
from freemerge.data.errors import DataError, DataWarning
from freemerge.data.image_dataset import as_pixels
from freemerge.data.sources.image_files import check_files
from tests.configs import tiny_files


def truncate(path: Path, to: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * to)])


def big_images(folder: Path, suffix: str = ".png") -> Path:
    """Two classes of images that are large enough to be damaged in their middle."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            noise = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{number}{suffix}")
    return folder


# ---- files that cannot be read


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".bmp"])
def test_damaged_files_are_named_before_any_training(tmp_path, suffix: str) -> None:
    root = big_images(tmp_path / "a", suffix)
    source = ImageFolderSource(folder=str(root), image_size=8)
    assert len(source.build("a", 0).train) == 9  # 12, less 1 and 2
    truncate(root / "dog" / f"3{suffix}")
    (root / "cat" / f"0{suffix}").write_bytes(b"")
    (root / "cat" / f"1{suffix}").write_text("<html>404</html>")
    with pytest.raises(DataError) as caught:
        source.build("a", 0)
    said = str(caught.value)
    assert said.startswith("task 'a': 3 images are damaged, of 12 checked: ")
    assert f"{root}/cat/0{suffix} (empty)" in said
    assert f"{root}/cat/1{suffix} (cannot identify image file" in said
    assert f"{root}/dog/3{suffix} (" in said
    assert said.endswith("; replace or delete them")
    assert "\n" not in said


def test_bytes_after_the_end_marker_are_not_damage(tmp_path) -> None:
    root = big_images(tmp_path / "a", ".jpg")
    file = root / "cat" / "0.jpg"
    file.write_bytes(file.read_bytes() + bytes(range(100)))  # cameras append previews
    check_files("a", [file])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_damage_in_the_middle_of_a_file_is_one_line_from_any_worker(tmp_path, workers: int, loader: str) -> None:
    root = big_images(tmp_path / "a")
    source = ImageFolderSource(folder=str(root), image_size=8, val_fraction=0.4)
    data = SourceSuite({"a": source}, batch_size=1, eval_batch_size=2, num_workers=workers).for_task("a")
    batches = getattr(data, loader)()
    dataset = batches.dataset
    file = Path(dataset.name(int(dataset.indices[-1])))
    content = bytearray(file.read_bytes())
    content[1000:1400] = bytes(400)  # the end of the file is intact
    file.write_bytes(content)
    said, raised_in = fault_of(batches)
    assert said.startswith(f"{file}: cannot be read as an image (")
    assert said.endswith("); replace it or leave it out")
    assert "\n" not in said
    assert raised_in.startswith("freemerge.")  # the command line shows errors raised in freemerge in one line


def fault_of(batches) -> tuple[str, str]:
    """Message and module of the error. The error itself would keep the loader's workers alive."""
    try:
        list(batches)
    except DataError as error:
        frames = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
        return str(error), frames[-1]
    return "", ""


# ---- folders that are not classes


def test_files_of_operating_systems_and_notebooks_are_skipped(tmp_path) -> None:
    root = Path(tiny_files.write_image_folders(tmp_path / "a"))
    whole = ImageFolderSource(folder=str(root), image_size=8)
    identity, expected = whole.identity(), whole.build("a", 0)
    for name in (".ipynb_checkpoints", "red/.ipynb_checkpoints", "@eaDir", "__MACOSX"):
        (root / name).mkdir()
        shutil.copy(root / "blue" / "0.png", root / name / "0-checkpoint.png")
    (root / "violet").mkdir()  # without an image
    for name in ("Thumbs.db", "red/Thumbs.db", "red/.DS_Store", "red/._0.png"):
        (root / name).write_bytes(b"\0\5\26\7")
    assert whole.identity() == identity
    with pytest.warns(DataWarning) as warned:
        task = whole.build("a", 0)
    assert [str(each.message) for each in warned] == [
        f"task 'a': {root}: skipped: hidden folders (.ipynb_checkpoints, @eaDir, __MACOSX); "
        "class folders without an image (violet)"
    ]
    assert task.class_names == expected.class_names == ("blue", "green", "red")
    assert torch.equal(task.train.indices, expected.train.indices)


def test_files_of_other_types_are_skipped_with_a_warning(tmp_path) -> None:
    root = Path(tiny_files.write_image_folders(tmp_path / "a"))
    (root / "red" / "photo.heic").write_bytes(b"x")
    (root / "blue" / "notes.txt").write_text("x")
    shutil.copy(root / "blue" / "0.png", root / "loose.png")
    with pytest.warns(DataWarning, match=r"skipped: 1 images outside of class folders; files of other types"):
        ImageFolderSource(folder=str(root), image_size=8).build("a", 0)


def test_val_may_lack_a_class_but_not_have_another(tmp_path) -> None:
    for split in ("train", "Validation"):
        tiny_files.write_image_folders(tmp_path / split, per_class=2)
    shutil.rmtree(tmp_path / "Validation" / "blue")
    with pytest.warns(DataWarning, match=r"Validation: no image of blue"):
        task = ImageFolderSource(folder=str(tmp_path), image_size=8, mean=0.0, std=1.0).build("a", 0)
    assert len(task.val) == 4
    assert [int(label) for _, label in (task.val[0], task.val[2])] == [1, 2]  # green and red, as in train
    assert task.val[0][0].mean(dim=(1, 2)).argmax() == 1
    (tmp_path / "Validation" / "pink").mkdir()
    shutil.copy(tmp_path / "train" / "red" / "0.png", tmp_path / "Validation" / "pink")
    with pytest.raises(DataError, match="Validation: the classes differ from those of train: blue, pink"):
        ImageFolderSource(folder=str(tmp_path), image_size=8).build("a", 0)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["test/cat", "test/dog", "other/cat"], r"there is a folder 'test' with class folders, but no folder 'train'"),
        (["cat"], r"the only folder of images is 'cat'; expected one per class"),
        (["train/cat", "train/dog", "val"], r"val: the folder has no image; expected one folder of images"),
        ([], r"the folder has no image"),
    ],
)
def test_unexpected_folder_layouts_are_refused(tmp_path, folders: list[str], message: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        if folder != "val":
            Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    with pytest.raises(DataError, match=message):
        ImageFolderSource(folder=str(tmp_path), image_size=8).build("a", 0)


def test_names_in_any_script_and_either_unicode_form(tmp_path) -> None:
    for split, accent in (("train", "caf\u00e9"), ("test", "cafe\u0301")):  # macOS archives have the second form
        for name in (accent, "狗"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"bild ü {number}.png")
    source = ImageFolderSource(folder=str(tmp_path), image_size=8)
    assert source.build("a", 0).class_names == ("caf\u00e9", "狗")
    latin = tmp_path / "train" / "狗" / "caf\udce9.png"  # a name in latin-1
    Image.new("RGB", (8, 8)).save(latin)
    assert len(source.build("a", 0).train) == 10
    source.identity()


def test_broken_and_circular_links(tmp_path) -> None:
    root = Path(tiny_files.write_image_folders(tmp_path / "a", per_class=4))
    elsewhere = Path(tiny_files.write_image_folders(tmp_path / "b", per_class=4))
    source = ImageFolderSource(folder=str(root), image_size=8, train_size=99)
    (root / "red" / "circle").symlink_to(root)
    (root / "red" / "more").symlink_to(elsewhere / "red")
    task = source.build("a", 0)
    assert sum(len(part) for part in (task.train, task.val, task.test)) == 16
    (root / "red" / "nowhere.png").symlink_to(tmp_path / "gone.png")
    source.identity()
    with pytest.raises(DataError, match=r"red/nowhere\.png \(cannot be read: No such file or directory\)"):
        source.build("a", 0)


# ---- modes


def save(path: Path, mode: str) -> Image.Image:
    values = np.array([[0, 60, 120, 250]], dtype=np.uint8).repeat(4, 0)  # (4, 4)
    colour = np.stack([values, 255 - values, values // 2], axis=-1)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    elif mode in ("L", "LA", "1"):
        image = Image.fromarray(values).convert(mode)
    else:
        image = Image.fromarray(colour).convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(path)
    return Image.open(path)


@pytest.mark.parametrize(
    ("mode", "suffix", "grey"),
    [("L", "png", True), ("LA", "png", True), ("I;16", "png", True), ("I;16", "tif", True), ("RGB", "png", False),
     ("RGBA", "png", False), ("P", "png", False), ("CMYK", "tif", False)],
)  # fmt: skip
def test_every_image_mode_is_converted(tmp_path, mode: str, suffix: str, grey: bool) -> None:
    image = save(tmp_path / f"a.{suffix}", mode)
    assert image.mode == mode
    values = torch.tensor([0, 60, 120, 250], dtype=torch.uint8)
    unconverted = as_pixels(image, None, None)
    assert unconverted.shape == (1 if grey else 3, 4, 4)
    colour = as_pixels(image, None, 3)
    expected = torch.stack([values, values, values] if grey else [values, 255 - values, values // 2])
    assert (colour[:, 0].int() - expected.int()).abs().max() <= 1
    assert as_pixels(image, 2, 1).shape == (1, 2, 2)


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (223, 300), (28, 28), (251, 1000)])
def test_pixels_are_those_of_clips_processor(shape: tuple[int, int]) -> None:
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)  # its name before Pil
    coarse = np.random.default_rng(0).integers(0, 256, (shape[0] // 8, shape[1] // 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
    processor = kind(do_rescale=False, do_normalize=False)
    expected = torch.as_tensor(processor([image], return_tensors="np")["pixel_values"][0])
    assert torch.equal(as_pixels(image, 224, 3), expected.to(torch.uint8))


def test_bilevel_images_animations_and_transparent_palettes(tmp_path, recwarn) -> None:
    assert as_pixels(save(tmp_path / "a.png", "1"), None, 3).unique().tolist() == [0, 255]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as animation:
        assert as_pixels(animation, None, 3)[:, 0, 0].tolist() == [255, 0, 0]  # its first frame
    palette = Image.new("P", (2, 2))
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=bytes([0]))
    with Image.open(tmp_path / "p.png") as image:
        assert as_pixels(image, None, 3)[:, 0, 0].tolist() == [10, 20, 30]
    assert not [each for each in recwarn if "Palette" in str(each.message)]


def test_exif_orientation_is_applied(tmp_path) -> None:
    image = Image.fromarray(np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: rotate 90° clockwise
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as rotated:
        assert as_pixels(rotated, None, None).tolist() == [[[40, 10], [50, 20], [60, 30]]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "floating-point numbers of unknown range"),
        (Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)), "its pixels range from 70000 to 70000"),
        (torch.zeros(3, 2, 2), r"expected an image: .* got float32 \(2, 2, 3\)"),
        (np.zeros((2, 2, 7), dtype=np.uint8), r"got uint8 \(2, 2, 7\)"),
        ("a.png", "got str 'a.png'"),
    ],
)
def test_values_that_are_not_images_are_refused(image, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_pixels(image, None, 3)
