"""Errors and warnings about NPZ files of tasks."""

from __future__ import annotations

import numpy as np
import pytest

from freemerge.data import NpzSource
from freemerge.data.errors import DataError, DataWarning

GOOD = np.zeros((4, 8, 8, 3), np.uint8)
LABELS = np.array([0, 1, 0, 1])


def build(path, options: dict | None = None, **arrays):
    np.savez(path, **{"train_images": GOOD, "train_labels": LABELS, **arrays})
    return NpzSource(path=str(path), val_fraction=0.25, test_fraction=0.25, **(options or {})).build("a", 0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_images": np.zeros((4, 3, 8, 8), np.uint8)}, r"train_images is \(4, 3, 8, 8\): its channels come "
         r"first, expected \(N, H, W, C\): save train_images.transpose\(0, 2, 3, 1\)"),
        ({"val_images": np.zeros((4, 1, 8, 8), np.uint8), "val_labels": LABELS}, "val_images is .*channels come first"),
        ({"train_images": np.full((4, 8, 8), 0.5)}, r"got float64 \(4, 8, 8\): save \(images \* 255\)"),
        ({"train_images": np.full((4, 8, 8), np.nan)}, "got float64 .* with values that are not finite"),
        ({"train_images": np.full((4, 8, 8), 99.5)}, "got float64 .* from 99.5 to 99.5: save them as uint8"),
        ({"train_images": np.zeros((4, 8, 8), int)}, r"got int64 .*: save images.astype\(np.uint8\)"),
        ({"train_images": np.zeros((4, 8, 8), bool)}, r"got bool .*: save images.astype\(np.uint8\) \* 255"),
        ({"train_images": GOOD[:3]}, "there are 4 train_labels for 3 train_images"),
        ({"train_images": np.zeros((4, 0, 8), np.uint8)}, r"train_images is \(4, 0, 8\): its images are empty"),
        ({"train_images": np.array([GOOD[0], GOOD[1, 1:], 0, 0], dtype=object)}, "train_images is an array of Python "),
        ({"train_labels": np.array(["a", None, "b", "c"], dtype=object)}, "train_labels is an array of Python objects"),
        ({"train_labels": LABELS[:, None]}, r"must be integers \(N,\), got int64 \(4, 1\): save labels\[:, 0\]"),
        ({"train_labels": np.eye(4)}, r"got float64 \(4, 4\): save labels.argmax"),
        ({"train_labels": LABELS.astype(float)}, r"got float64 \(4,\): save labels.astype"),
        ({"train_labels": np.array([0, 1, np.nan, 1])}, "got float64 .*, where sample 2 has the label nan"),
        ({"train_labels": np.array(["cat", "dog"] * 2)}, "got <U3 .*: save names as class_names"),
        ({"train_labels": LABELS - 1}, "labels range from -1 to 0, but there are 1 classes; a label is a class index"),
        ({"train_labels": LABELS + 1, "class_names": ["a", "b"]}, "labels range from 1 to 2, but there are 2 classes; "
         "labels start at 0: save labels - 1"),
        ({"class_names": 3}, r"class_names must be names \(C,\), got int64 \(\)"),
        ({"train_images": GOOD[:0], "train_labels": LABELS[:0]}, "the file has no samples"),
        ({"test_images": GOOD[..., 0], "test_labels": LABELS}, "test_images have 1 channels, train_images 3: set"),
        ({"test_images": GOOD[:, :6], "test_labels": LABELS}, "test_images are 6×8, train_images 8×8: set image_size"),
    ],
)  # fmt: skip
def test_invalid_arrays_are_named(tmp_path, arrays: dict, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.npz: .*{message}") as caught:
        build(tmp_path / "a.npz", **arrays)
    assert "\n" not in str(caught.value)


def test_a_file_without_the_arrays_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", x_train=GOOD, y_train=LABELS)
    with pytest.raises(DataError, match="there is no array 'train_images'; its arrays: x_train, y_train"):
        NpzSource(path=str(tmp_path / "a.npz")).build("a", 0)
    np.save(tmp_path / "b.npz.npy", GOOD)
    (tmp_path / "b.npz.npy").rename(tmp_path / "b.npz")
    with pytest.raises(DataError, match="not an NPZ file but a single array"):
        NpzSource(path=str(tmp_path / "b.npz")).build("a", 0)


@pytest.mark.parametrize("part", ["begin", "middle", "end"])
def test_a_damaged_file_is_one_line(tmp_path, part: str) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, train_images=np.random.default_rng(0).integers(0, 99, (40, 8, 8), dtype=np.uint8),
                        train_labels=np.arange(40) % 2)  # fmt: skip
    content = bytearray(path.read_bytes())
    if part == "end":
        content = content[: len(content) - 60]
    else:
        content[:40] = bytes(40) if part == "begin" else content[:40]
        content[500:600] = bytes(100) if part == "middle" else content[500:600]
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a\.npz: (not an NPZ file|train_images cannot be read)") as caught:
        NpzSource(path=str(path)).build("a", 0)
    assert "\n" not in str(caught.value)


def test_an_alpha_channel_is_not_converted_to_a_colour(tmp_path) -> None:
    rgba = np.zeros((4, 8, 8, 4), np.uint8)
    with pytest.raises(DataError, match=r"have 4 channels, which cannot be converted to 3: train_images\[\.\.\., :3\]"):
        build(tmp_path / "a.npz", {"channels": 3}, train_images=rgba)
    assert build(tmp_path / "a.npz", train_images=rgba).train[0][0].shape == (4, 8, 8)


def test_labels_that_start_at_one_give_a_warning(tmp_path) -> None:
    with pytest.warns(DataWarning, match="labels range from 1 to 2, but labels start at 0: .*save labels - 1"):
        assert build(tmp_path / "a.npz", train_labels=LABELS + 1).num_classes == 3


def test_small_and_multispectral_images_do_not_look_channels_first(tmp_path) -> None:
    assert build(tmp_path / "a.npz", train_images=np.zeros((4, 3, 3, 200), np.uint8)).train[0][0].shape == (200, 3, 3)
    assert build(tmp_path / "b.npz", train_images=np.zeros((4, 3, 8), np.uint8)).train[0][0].shape == (1, 3, 8)
    named = build(tmp_path / "c.npz", class_names=["Äpfel", "梨"])
    assert named.class_names == ("Äpfel", "梨")
