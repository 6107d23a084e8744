"""Six small tasks that need no download, for the first run, the tests and the benchmarks of this project.

All images are 32×32 grey, and a glance at one tells which task it belongs to, as a router needs:

- `digits`: handwritten digits (scikit-learn's), rotated and shifted.
- `letters`: capital letters; the fonts of the test set are in no other set.
- `scripts`: which of ten scripts four characters are from; the characters of the test set are in no other set.
- `typefaces`: which of eight typefaces two short words are set in; the words of the test set are in no other set.
- `textures`: which of nine photographs a crop is from; each set has its own regions of each photograph.
- `faces`: which way up a face is, or that it is none (scikit-image's excerpt of Labeled Faces in the Wild).

`pretraining()` is a larger task made of what no test or validation set uses: characters and regions, each a class of
its own. A backbone pretrained on it knows strokes and textures, but not the tasks.

Pictures come from the wheels of scikit-learn, scikit-image and matplotlib. Everything is determined by the seed.
"""

from __future__ import annotations

from typing import ClassVar

from freemerge.data import Task, TaskSuite
from freemerge.quickstart import glyph_tasks as glyphs
from freemerge.quickstart import picture_tasks as pictures
from freemerge.quickstart.glyphs import FONTS, font_path
from freemerge.quickstart.photographs import PHOTOGRAPHS, packaged_file
from freemerge.quickstart.pretraining import build_pretraining

_BUILDERS = {
    "digits": pictures.build_digits,
    "letters": glyphs.build_letters,
    "scripts": glyphs.build_scripts,
    "typefaces": glyphs.build_typefaces,
    "textures": pictures.build_textures,
    "faces": pictures.build_faces,
}


class QuickstartSuite(TaskSuite):
    """Six tasks of 32×32 grey images: digits, letters, scripts, typefaces, textures, faces.

    Args:
        tasks: Which tasks, in this order; None is all of them.
        batch_size: Images per training batch, of each task.
        eval_batch_size: Images per batch of validation, test and prediction.
        num_workers: Worker processes per loader. The data are in memory, so none is fastest.
        seed: Determines the data and the order of training.
        held_out: Tasks that are evaluated but neither fine-tuned on nor merged: out-of-domain.
        shared_heads: Groups of tasks with the same classes that share one head.
    """

    TASKS: ClassVar[tuple[str, ...]] = tuple(_BUILDERS)
    DATA_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        tasks: list[str] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        held_out: list[str] | None = None,
        shared_heads: list[list[str]] | None = None,
    ) -> None:
        super().__init__(tasks, batch_size, eval_batch_size, num_workers, seed, held_out, shared_heads)
        self._pretraining_task: Task | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (1, 32, 32)

    def prepare_data(self) -> None:
        """Checks that the installed packages ship the pictures and fonts, so that a fault shows before any work."""
        for font in FONTS:
            font_path(font)
        for package, folder, file, _ in PHOTOGRAPHS.values():
            packaged_file(package, folder, file)
        packaged_file("skimage", "data", "lfw_subset.npy")

    def build(self, name: str) -> Task:
        return _BUILDERS[name](self.seed)

    def pretraining(self) -> Task:
        """Characters and regions of photographs, each a class; built on first use."""
        if self._pretraining_task is None:
            self._pretraining_task = build_pretraining(self.seed)
        return self._pretraining_task
