"""The quickstart suite: determinism, disjoint splits, shapes and sizes."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from freemerge.data import QuickstartSuite, Task, TaskSuite
from freemerge.quickstart import pretraining as pretraining
from freemerge.quickstart.glyph_tasks import (
    SCRIPT_FONT,
    SCRIPTS,
    TEST_FONTS,
    TRAIN_FONTS,
    TYPEFACES,
    VAL_FONTS,
    script_characters,
    typeface_words,
)
from freemerge.quickstart.glyphs import FONTS, coverage, draw_glyph, draw_grid, draw_text, font_path, shape
from freemerge.quickstart.image_tasks import TEXTURES, face_parts, texture_rectangles
from freemerge.quickstart.photographs import PHOTOGRAPHS, cells, packaged_file, photograph

SPLITS = ("train", "val", "test")
CLASSES = {"digits": 10, "letters": 26, "scripts": 10, "typefaces": 8, "textures": 9, "faces": 5}


@pytest.fixture(scope="module")
def suite() -> QuickstartSuite:
    suite = QuickstartSuite()
    suite.prepare_data()
    suite.setup()
    return suite


@pytest.fixture(scope="module")
def everything(suite: QuickstartSuite) -> dict[str, Task]:
    return {name: suite.task(name) for name in suite.names} | {"pretraining": suite.pretraining()}


def disjoint(*parts) -> bool:
    return all(not set(a) & set(b) for a, b in itertools.combinations(parts, 2))


# ---- tasks


def test_tasks(suite: QuickstartSuite) -> None:
    assert isinstance(suite, TaskSuite)
    assert suite.image_shape == TaskSuite.image_shape.fget(suite)
    assert {name: suite.task(name).num_classes for name in suite.names} == CLASSES


def test_shapes_types_and_ranges(everything: dict[str, Task]) -> None:
    for name, task in everything.items():
        assert len(set(task.class_names)) == task.num_classes
        for split in SPLITS:
            data = getattr(task, split)
            assert data.images.shape == (len(data), 1, 32, 32)
            image, label = data[0]
            assert image.shape == (1, 32, 32)
            assert image.dtype == torch.float32
            assert label.dtype == torch.int64
            assert set(data.labels.tolist()) == set(range(task.num_classes)), (name, split)
            batch = data.__getitems__(range(len(data))).inputs
            assert batch.isfinite().all()
            assert -1.001 <= float(batch.min()) <= float(batch.max()) <= 2.334  # (0 − 0.3)/0.3 and (1 − 0.3)/0.3
            assert 0.02 < float(data.images.float().mean() / 255) < 0.6
        assert task.val.preprocessing.augment is None
        assert task.test.preprocessing.augment is None


def test_sizes(everything: dict[str, Task]) -> None:
    for name, task in everything.items():
        if name != "pretraining":
            assert 100 <= len(task.val) <= 300, name
            assert 300 <= len(task.test) <= 600, name
            assert 900 <= len(task.train) <= 2500, name
            # Balanced classes: the fraction of the most frequent class is the accuracy of a constant prediction.
            commonest = Counter(task.test.labels.tolist()).most_common(1)[0][1]
            assert commonest <= 1.25 * len(task.test) / task.num_classes, name
    task = everything["pretraining"]
    assert 150 <= task.num_classes <= 400
    assert 8_000 <= len(task.train) <= 15_000


# ---- determinism


@pytest.mark.parametrize("name", ["digits", "letters", "faces"])
def test_the_seed_determines_the_images(suite: QuickstartSuite, name: str) -> None:
    same, other = QuickstartSuite().task(name), QuickstartSuite(seed=1).task(name)
    for split in SPLITS:
        data = getattr(suite.task(name), split)
        assert torch.equal(data.images, getattr(same, split).images)
        assert torch.equal(data.labels, getattr(same, split).labels)
        assert not torch.equal(data.images, getattr(other, split).images)


def test_the_seed_draws_other_samples_from_the_same_splits() -> None:
    suites = [QuickstartSuite(["textures"], seed=seed).task("textures") for seed in (5, 6)]
    assert not torch.equal(suites[0].test.images, suites[1].test.images)
    assert texture_rectangles(5) == texture_rectangles(5) != texture_rectangles(6)
    for name in TEXTURES:
        parts = cells(name)
        for seed in (5, 6):
            for split, photographs in texture_rectangles(seed).items():
                for left, top, right, bottom in photographs[name]:
                    assert any(a <= left and b <= top and right <= c and bottom <= d for a, b, c, d in parts[split])


def test_building_neither_uses_nor_changes_the_global_generators() -> None:
    import random

    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        images = QuickstartSuite().task("scripts").test.images
        states.append((images, torch.rand(1).item(), random.random()))
    torch.manual_seed(1)
    random.seed(1)
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:] == (torch.rand(1).item(), random.random())


def test_fingerprint() -> None:
    fingerprint = QuickstartSuite().fingerprint()
    assert QuickstartSuite(batch_size=8, num_workers=2).fingerprint() == fingerprint
    assert QuickstartSuite(seed=1).fingerprint() != fingerprint


# ---- disjointness


def test_no_image_is_in_two_splits(everything: dict[str, Task]) -> None:
    seen: dict[bytes, tuple[str, str]] = {}
    for name, task in everything.items():
        for split in SPLITS:
            place = (name, split)
            for image in getattr(task, split).images.numpy():
                assert seen.setdefault(image.tobytes(), place) == place


def test_fonts_of_the_letters() -> None:
    assert disjoint(TRAIN_FONTS, VAL_FONTS, TEST_FONTS)
    assert {*TRAIN_FONTS, *VAL_FONTS, *TEST_FONTS} == set(FONTS)


def test_characters_of_the_scripts() -> None:
    dealt = script_characters()
    assert list(dealt) == list(SCRIPTS)
    looks = [shape(SCRIPT_FONT, c) for parts in dealt.values() for part in parts.values() for c in part]
    assert len(looks) == len(set(looks))  # the shapes differ, not only the code points
    assert b"" not in looks
    assert min(len(parts[split]) for parts in dealt.values() for split in SPLITS) >= 4


def test_words_of_the_typefaces() -> None:
    words = typeface_words()
    assert disjoint(*({word.lower() for word in part} for part in words.values()))
    assert min(map(len, words.values())) >= 400
    assert set(TYPEFACES) <= set(FONTS)


@pytest.mark.parametrize("seed", [0, 1])
def test_regions_of_the_textures(seed: int) -> None:
    places = texture_rectangles(seed)
    for name in TEXTURES:
        height, width = photograph(name).shape
        owner = torch.zeros(height, width, dtype=torch.uint8)
        for value, split in enumerate(SPLITS, start=1):
            for left, top, right, bottom in places[split][name]:
                assert right - left == bottom - top >= 30
                assert left >= 0
                assert top >= 0
                assert right <= width
                assert bottom <= height
                # Not even the pixels around it belong to another split.
                area = owner[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1]
                assert set(area.unique().tolist()) <= {0, value}, (name, split)
                owner[top:bottom, left:right] = value


def test_faces_and_their_mirror_images_stay_together(everything: dict[str, Task]) -> None:
    parts = face_parts(0)
    assert disjoint(*parts.values())
    assert sorted(i for part in parts.values() for i in part) == list(range(100))
    assert len(parts["test"]) >= 30  # of faces; there are as many of other things


@pytest.mark.parametrize("seed", [0, 1])
def test_pretraining_uses_nothing_held_out(seed: int) -> None:
    import random

    scripts, words = script_characters(), typeface_words()
    held_out = {shape(SCRIPT_FONT, c) for dealt in scripts.values() for c in dealt["val"] + dealt["test"]}
    sources = pretraining._glyph_sources(random.Random(seed))
    for name, source in sources.items():
        assert set(source.fonts) <= set(TRAIN_FONTS), name
        assert source.fonts, name
        if len(source.lines) > 1:
            assert set(source.lines) <= set(words["train"]), name
        else:
            looks = {shape(font, source.lines[0]) for font in source.fonts}
            assert b"" not in looks, name
            assert not looks & held_out, name
    for name, region in pretraining._regions().values():
        assert region in cells(name)["train"]


# ---- drawings and photographs


def test_glyphs_are_centred_and_fit() -> None:
    for character in "iWᐁ":
        picture = draw_glyph("DejaVu Sans", character)
        rows, columns = picture.any(1).nonzero()[0], picture.any(0).nonzero()[0]
        assert abs(rows[0] + rows[-1] - 63) <= 2
        assert abs(columns[0] + columns[-1] - 63) <= 2
        assert max(rows[-1] - rows[0], columns[-1] - columns[0]) <= 56
    assert not draw_glyph("DejaVu Sans", " ").any()
    assert shape("DejaVu Sans", " ") == b""
    assert shape("STIX", "ᐁ") == b""  # not covered


def test_a_grid_keeps_each_character_in_its_quarter() -> None:
    for position in range(4):
        characters = [" "] * 4
        characters[position] = "W"
        quarters = [q for half in np.split(draw_grid("DejaVu Sans", characters), 2) for q in np.split(half, 2, 1)]
        assert [bool(quarter.any()) for quarter in quarters] == [i == position for i in range(4)]


def test_text_has_one_band_per_line() -> None:
    ink = draw_text("DejaVu Sans", ("xx", "xx"), 26).any(1)
    assert (ink[1:] & ~ink[:-1]).sum() == 2


def test_every_font_has_the_alphabet_and_every_photograph_loads() -> None:
    for font in FONTS:
        assert {ord(c) for c in "AZaz"} <= coverage(font)
        assert font_path(font).is_file()
    for name in PHOTOGRAPHS:
        assert min(photograph(name).shape) >= 170


def test_missing_files_are_explained() -> None:
    with pytest.raises(FileNotFoundError, match="does not ship"):
        packaged_file("skimage", "data", "no_such_picture.png")
    with pytest.raises(FileNotFoundError, match=r"not installed, .*: pip install 'freemerge\[quickstart\]'"):
        packaged_file("no_such_package", "a")


def test_without_the_quickstart_extra_the_error_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    from freemerge.cli import main
    from freemerge.quickstart import photographs

    find = photographs.find_spec
    monkeypatch.setattr(photographs, "find_spec", lambda name: None if name == "skimage" else find(name))
    assert main(["fit", "--config", "configs/quickstart.yaml", "--run.folder", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "skimage is not installed" in said
    assert "pip install 'freemerge[quickstart]'" in said
    assert "Traceback" not in said


def test_every_cell_belongs_to_a_split() -> None:
    with pytest.raises(ValueError, match="25 cells"):
        cells("brick", counts=(1, 1, 1))


# ---- the whole suite


def test_tasks_are_easily_distinguished(suite: QuickstartSuite) -> None:
    """A nearest-mean classifier over a few plain statistics knows most tasks, so a router has an easy life."""

    def statistics(images: torch.Tensor) -> torch.Tensor:
        corners = images[..., :3, :3].mean((1, 2, 3))
        gradient = images.diff(dim=3).abs().mean((1, 2, 3))
        halves = torch.stack([part.mean((1, 2, 3)) for part in images[..., 9:23].chunk(3, dim=3)], 1)
        return torch.cat([corners[:, None], gradient[:, None], images.std((1, 2, 3))[:, None], halves], 1)

    data = suite.mixture(per_task=200)
    images, labels = next(iter(suite.mixture(per_task=200, batch_size=1200).train_dataloader()))
    x = statistics(images)
    mean, std = x.mean(0), x.std(0)
    centres = torch.stack([((x - mean) / std)[labels == k].mean(0) for k in range(6)])
    test, answers = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    guesses = torch.cdist((statistics(test) - mean) / std, centres).argmin(1)
    assert (guesses == answers).float().mean() > 0.75
