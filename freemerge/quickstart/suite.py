"""The quickstart suite: six small tasks without a download, for a first run, the tests and the benchmarks.

All images are 32×32 grey. Images of different tasks look clearly different, so that a router can distinguish them:

- `digits`: handwritten digits (scikit-learn's), rotated and shifted.
- `letters`: capital letters; the test set has fonts of its own.
- `scripts`: the script of four characters, one of ten; the test set has characters of its own.
- `typefaces`: the typeface of two short words, one of eight; the test set has words of its own.
- `textures`: the photograph that a crop comes from, one of nine; each split has regions of its own.
- `faces`: the orientation of a face, or not a face (scikit-image's subset of Labeled Faces in the Wild).

`pretraining()` is a larger task on data that no test or validation set uses: each character and region is a class. A
backbone pretrained on it has learnt strokes and textures, but not the tasks.

Images and fonts come from the wheels of scikit-learn, scikit-image and matplotlib. The seed determines everything.
"""

from __future__ import annotations

from typing import ClassVar

from freemerge.data import Task, TaskSuite
from freemerge.quickstart import glyph_tasks as glyphs
from freemerge.quickstart import image_tasks as images
from freemerge.quickstart.glyphs import FONTS, font_path
from freemerge.quickstart.photographs import PHOTOGRAPHS, packaged_file
from freemerge.quickstart.pretraining import build_pretraining

_BUILDERS = {
    "digits": images.build_digits,
    "letters": glyphs.build_letters,
    "scripts": glyphs.build_scripts,
    "typefaces": glyphs.build_typefaces,
    "textures": images.build_textures,
    "faces": images.build_faces,
}


class QuickstartSuite(TaskSuite):
    """Six tasks of 32×32 grey images: digits, letters, scripts, typefaces, textures, faces.

    Args:
        tasks: the selected tasks, in order; None selects all.
        batch_size: images per training batch of each task.
        eval_batch_size: images per batch of validation, test and prediction.
        num_workers: worker processes per loader; the data are in memory, so 0 is fastest.
        seed: seed of the data and of the training order.
        held_out: out-of-domain tasks: evaluated, but neither fine-tuned on nor merged.
        shared_heads: groups of tasks with the same classes that share one head.
    """

    TASKS: ClassVar[tuple[str, ...]] = tuple(_BUILDERS)
    DATA_VERSION: ClassVar[int] = 2

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
        """(channels, height, width) of every image."""
        return (1, 32, 32)

    def prepare_data(self) -> None:
        """Check that the installed packages contain the images and fonts.

        Raises:
            NotShipped: if a package or a file is missing.
        """
        for font in FONTS:
            font_path(font)
        for package, folder, file, _ in PHOTOGRAPHS.values():
            packaged_file(package, folder, file)
        packaged_file("skimage", "data", "lfw_subset.npy")

    def build(self, name: str) -> Task:
        """Build one task.

        Args:
            name: one of `TASKS`.

        Returns:
            The task.
        """
        return _BUILDERS[name](self.seed)

    def pretraining(self) -> Task:
        """The pretraining task: characters and regions of photographs, each a class; built on first use.

        Returns:
            The task.
        """
        if self._pretraining_task is None:
            self._pretraining_task = build_pretraining(self.seed)
        return self._pretraining_task
