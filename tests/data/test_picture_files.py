"""Pictures of every mode and in every state: what they become, and what is said of those that cannot be read."""

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
from freemerge.data.pictures import as_pixels
from freemerge.data.sources.picture_files import check_files
from tests.configs import tiny_files


def truncate(path: Path, to: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * to)])


def big_pictures(folder: Path, suffix: str = ".png") -> Path:
    """Two classes of pictures that are large enough to be damaged in their middle."""
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
    root = big_pictures(tmp_path / "a", suffix)
    source = ImageFolderSource(folder=str(root), image_size=8)
    assert len(source.build("a", 0).train) == 9  # 12, less 1 and 2
    truncate(root / "dog" / f"3{suffix}")
    (root / "cat" / f"0{suffix}").write_bytes(b"")
    (root / "cat" / f"1{suffix}").write_text("<html>404</html>")
    with pytest.raises(DataError) as caught:
        source.build("a", 0)
    said = str(caught.value)
    assert said.startswith("task 'a': 3 pictures are damaged, of 12 looked at: ")
    assert f"{root}/cat/0{suffix} (empty)" in said
    assert f"{root}/cat/1{suffix} (cannot identify image file" in said
    assert f"{root}/dog/3{suffix} (" in said
    assert said.endswith("; replace or delete them")
    assert "\n" not in said


def test_a_whole_file_with_something_after_its_end_is_no_damage(tmp_path) -> None:
    root = big_pictures(tmp_path / "a", ".jpg")
    file = root / "cat" / "0.jpg"
    file.write_bytes(file.read_bytes() + bytes(range(100)))  # as cameras append previews
    check_files("a", [file])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_a_file_damaged_in_its_middle_is_one_line_from_any_worker(tmp_path, workers: int, loader: str) -> None:
    root = big_pictures(tmp_path / "a")
    source = ImageFolderSource(folder=str(root), image_size=8, val_fraction=0.4)
    data = SourceSuite({"a": source}, batch_size=1, eval_batch_size=2, num_workers=workers).for_task("a")
    batches = getattr(data, loader)()
    dataset = batches.dataset
    file = Path(dataset.name(int(dataset.indices[-1])))
    content = bytearray(file.read_bytes())
    content[1000:1400] = bytes(400)  # its end is as it was
    file.write_bytes(content)
    said, raised_in = fault_of(batches)
    assert said.startswith(f"{file}: cannot be read as a picture (")
    assert said.endswith("); replace it or leave it out")
    assert "\n" not in said
    assert raised_in.startswith("freemerge.")  # which the command line goes by


def fault_of(batches) -> tuple[str, str]:
    """Message and module of the error; the error itself would keep the workers of the loader alive."""
    try:
        list(batches)
    except DataError as error:
        frames = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
        return str(error), frames[-1]
    return "", ""


# ---- what is no class


def test_what_systems_and_notebooks_leave_behind_is_no_class(tmp_path) -> None:
    root = Path(tiny_files.write_picture_folders(tmp_path / "a"))
    whole = ImageFolderSource(folder=str(root), image_size=8)
    identity, expected = whole.identity(), whole.build("a", 0)
    for name in (".ipynb_checkpoints", "red/.ipynb_checkpoints", "@eaDir", "__MACOSX"):
        (root / name).mkdir()
        shutil.copy(root / "blue" / "0.png", root / name / "0-checkpoint.png")
    (root / "violet").mkdir()  # no picture of it yet
    for name in ("Thumbs.db", "red/Thumbs.db", "red/.DS_Store", "red/._0.png"):
        (root / name).write_bytes(b"\0\5\26\7")
    assert whole.identity() == identity
    with pytest.warns(DataWarning) as warned:
        task = whole.build("a", 0)
    assert [str(each.message) for each in warned] == [
        f"task 'a': {root}: left out: hidden folders (.ipynb_checkpoints, @eaDir, __MACOSX); "
        "class folders without a picture (violet)"
    ]
    assert task.class_names == expected.class_names == ("blue", "green", "red")
    assert torch.equal(task.train.indices, expected.train.indices)


def test_files_of_other_kinds_are_left_out_with_a_word(tmp_path) -> None:
    root = Path(tiny_files.write_picture_folders(tmp_path / "a"))
    (root / "red" / "photo.heic").write_bytes(b"x")
    (root / "blue" / "notes.txt").write_text("x")
    shutil.copy(root / "blue" / "0.png", root / "loose.png")
    with pytest.warns(DataWarning, match=r"left out: 1 pictures that are in no class folder; files of other kinds"):
        ImageFolderSource(folder=str(root), image_size=8).build("a", 0)


def test_val_may_lack_a_class_but_not_have_another(tmp_path) -> None:
    for split in ("train", "Validation"):
        tiny_files.write_picture_folders(tmp_path / split, per_class=2)
    shutil.rmtree(tmp_path / "Validation" / "blue")
    with pytest.warns(DataWarning, match=r"Validation: no picture of blue"):
        task = ImageFolderSource(folder=str(tmp_path), image_size=8, mean=0.0, std=1.0).build("a", 0)
    assert len(task.val) == 4
    assert [int(label) for _, label in (task.val[0], task.val[2])] == [1, 2]  # green and red, as in train
    assert task.val[0][0].mean(dim=(1, 2)).argmax() == 1
    (tmp_path / "Validation" / "pink").mkdir()
    shutil.copy(tmp_path / "train" / "red" / "0.png", tmp_path / "Validation" / "pink")
    with pytest.raises(DataError, match="Validation: other classes than in train: blue, pink"):
        ImageFolderSource(folder=str(tmp_path), image_size=8).build("a", 0)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["test/cat", "test/dog", "other/cat"], r"there is a folder 'test' of folders, but none called 'train'"),
        (["cat"], r"there is one folder of pictures in it, 'cat'; expected one per class"),
        (["train/cat", "train/dog", "val"], r"val: there is no picture in it; expected one folder of pictures"),
        ([], r"there is no picture in it"),
    ],
)
def test_folders_that_are_arranged_otherwise(tmp_path, folders: list[str], message: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        if folder != "val":
            Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    with pytest.raises(DataError, match=message):
        ImageFolderSource(folder=str(tmp_path), image_size=8).build("a", 0)


def test_names_in_any_script_and_either_unicode_form(tmp_path) -> None:
    for split, accent in (("train", "caf\u00e9"), ("test", "cafe\u0301")):  # macOS packs the second form
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


def test_links_that_lead_nowhere_or_in_circles(tmp_path) -> None:
    root = Path(tiny_files.write_picture_folders(tmp_path / "a", per_class=4))
    elsewhere = Path(tiny_files.write_picture_folders(tmp_path / "b", per_class=4))
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
        picture = Image.fromarray(values.astype(np.uint16) * 257)
    elif mode in ("L", "LA", "1"):
        picture = Image.fromarray(values).convert(mode)
    else:
        picture = Image.fromarray(colour).convert(mode, palette=Image.Palette.ADAPTIVE)
    picture.save(path)
    return Image.open(path)


@pytest.mark.parametrize(
    ("mode", "suffix", "grey"),
    [("L", "png", True), ("LA", "png", True), ("I;16", "png", True), ("I;16", "tif", True), ("RGB", "png", False),
     ("RGBA", "png", False), ("P", "png", False), ("CMYK", "tif", False)],
)  # fmt: skip
def test_pictures_of_every_mode_become_what_the_model_takes(tmp_path, mode: str, suffix: str, grey: bool) -> None:
    picture = save(tmp_path / f"a.{suffix}", mode)
    assert picture.mode == mode
    values = torch.tensor([0, 60, 120, 250], dtype=torch.uint8)
    as_it_is = as_pixels(picture, None, None)
    assert as_it_is.shape == (1 if grey else 3, 4, 4)
    colour = as_pixels(picture, None, 3)
    expected = torch.stack([values, values, values] if grey else [values, 255 - values, values // 2])
    assert (colour[:, 0].int() - expected.int()).abs().max() <= 1
    assert as_pixels(picture, 2, 1).shape == (1, 2, 2)


def test_black_and_white_and_animations_and_palettes_with_transparency(tmp_path, recwarn) -> None:
    assert as_pixels(save(tmp_path / "a.png", "1"), None, 3).unique().tolist() == [0, 255]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as animation:
        assert as_pixels(animation, None, 3)[:, 0, 0].tolist() == [255, 0, 0]  # its first frame
    palette = Image.new("P", (2, 2))
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=bytes([0]))
    with Image.open(tmp_path / "p.png") as picture:
        assert as_pixels(picture, None, 3)[:, 0, 0].tolist() == [10, 20, 30]
    assert not [each for each in recwarn if "Palette" in str(each.message)]


def test_pictures_are_turned_upright(tmp_path) -> None:
    picture = Image.fromarray(np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # orientation: turn it clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as turned:
        assert as_pixels(turned, None, None).tolist() == [[[40, 10], [50, 20], [60, 30]]]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "floating-point numbers, whose range is unknown"),
        (Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)), "its pixels go from 70000 to 70000"),
        (torch.zeros(3, 2, 2), r"expected a picture: .* got float32 \(2, 2, 3\)"),
        (np.zeros((2, 2, 7), dtype=np.uint8), r"got uint8 \(2, 2, 7\)"),
        ("a.png", "got str 'a.png'"),
    ],
)
def test_what_is_no_picture_is_refused(picture, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_pixels(picture, None, 3)
