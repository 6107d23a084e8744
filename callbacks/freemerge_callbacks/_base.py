"""The base of a fit: a given checkpoint, or the weights that the module starts with.

- The initial weights are saved in a hidden file, because a resumed fit no longer has them in the module.
- Their hash is part of the callback's state, so a resumed fit notices if the file was replaced.
- The hash covers the backbone with the base loaded, so a given checkpoint and saved initial weights compare equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint, expand, hash_base, hash_tensors, open_checkpoint, save_checkpoint
from freemerge_callbacks._ranks import on_rank_zero
from freemerge_callbacks._weights import part_of

_TUNER_FILES = (".lr_find_", ".scale_batch_size_")  # written by LearningRateFinder and BatchSizeFinder
_ADVICE = "pass the pretrained model as base=..."


class FitBase:
    """The base that a fit's task vector is computed from.

    Args:
        given: path of the pretrained model; None for the module's initial weights.
        output: the file that the callback will write; the initial weights are saved beside it.
        who: name of the callback, for error messages.

    Attributes:
        hash: hash of the backbone's weights with the base loaded; None until it is known.
    """

    def __init__(self, given: str | None, output: Path, who: str) -> None:
        self.given = None if given is None else expand(given).absolute()
        self.kept = output.with_name(f".{output.stem}.base.safetensors")  # hidden: no glob finds it
        self.who = who
        self.hash: str | None = None
        self._part = ""

    @property
    def path(self) -> Path:
        """The file that holds the base."""
        return self.given or self.kept

    def open(self) -> Checkpoint:
        """Open the base.

        Returns:
            The checkpoint, with its tensors under the backbone's names.
        """
        base = open_base(self.path)
        return part_of(base, self._part) if self._part else base

    @property
    def is_folder(self) -> bool:
        """Whether the base is a model folder, which also holds a configuration and a tokenizer."""
        return self.path.is_dir() and not self._part

    def find(self, trainer: L.Trainer, backbone: str, weights: Mapping[str, Tensor]) -> None:
        """Detect whether a given base is a checkpoint of the whole module; every rank must call this.

        Args:
            trainer: the Trainer.
            backbone: dotted path of the backbone.
            weights: the backbone's tensors.
        """
        self._part = ""
        given = self.given
        if given is not None:
            self._part = on_rank_zero(trainer, lambda: part_inside(open_base(given), backbone, weights))

    def begin(
        self, trainer: L.Trainer, weights: Mapping[str, Tensor], *, keep: bool = True, digest: bool = True
    ) -> None:
        """Save and hash the initial weights at the start of a fit, or hash the given base.

        Args:
            trainer: the Trainer; every rank must call this.
            weights: the backbone's tensors.
            keep: whether the initial values will be needed again.
            digest: whether the hash of a given base is needed; computing it reads the whole base.
        """
        if self.given is not None:
            if digest:
                self.hash = on_rank_zero(trainer, lambda: hash_base(self.open(), dtypes_of(weights)))
        elif not is_resumed(trainer):
            self.hash = on_rank_zero(trainer, lambda: self._keep(weights, keep))

    def resume(self, trainer: L.Trainer, *, keep: bool = True) -> None:
        """Check, in a resumed fit, that the saved initial weights are unchanged; call it after the restore.

        Args:
            trainer: the Trainer; every rank must call this.
            keep: whether the initial values will be needed again.

        Raises:
            ValueError: on rank 0, if the file is missing or has other weights.
        """
        if self.given is None and is_resumed(trainer):
            on_rank_zero(trainer, lambda: self._check(keep))

    def restore(self, hash: str | None) -> None:
        """Set the hash from a callback's saved state.

        Args:
            hash: the saved hash.
        """
        if self.given is None:
            self.hash = hash

    def discard(self) -> None:
        """Remove the file with the initial weights; call it on rank 0."""
        self.kept.unlink(missing_ok=True)

    def _keep(self, weights: Mapping[str, Tensor], keep: bool) -> str:
        if keep:
            save_checkpoint(self.kept, weights)
        return hash_tensors(weights)

    def _check(self, keep: bool) -> None:
        if self.hash is None:
            raise ValueError(f"{self.who}: the checkpoint to resume from was saved without this callback; {_ADVICE}")
        if not keep:
            return
        if not self.kept.exists():
            raise ValueError(f"{self.who}: {self.kept} is missing: it held the fit's initial weights; {_ADVICE}")
        if hash_tensors(open_base(self.kept)) != self.hash:
            raise ValueError(f"{self.who}: {self.kept} does not hold the fit's initial weights; {_ADVICE}")


def open_base(path: Path) -> Checkpoint:
    """Open a base with all names of its tied tensors, so that the merged result ties the same tensors.

    Args:
        path: any file or folder that `open_checkpoint` reads.

    Returns:
        The checkpoint.
    """
    return open_checkpoint(path).with_tied_names()


def part_inside(base: Checkpoint, part: str, names: Iterable[str]) -> str:
    """The prefix of the backbone's tensors in a base.

    Args:
        base: the base, with the names in its file.
        part: dotted path of the backbone.
        names: names of the backbone's tensors, relative to it.

    Returns:
        `part` if the base is a checkpoint of the whole module, else "".
    """
    own = set(names)
    inside = part_of(base, part) if part else base
    return part if own.intersection(inside.names) and not own.intersection(base.names) else ""


def is_resumed(trainer: L.Trainer) -> bool:
    """Check whether a fit resumes from a checkpoint.

    Args:
        trainer: the Trainer.

    Returns:
        True if it does. A checkpoint that a Lightning tuner restores marks the start of a fit, not a resumed one.
    """
    return trainer.ckpt_path is not None and not Path(str(trainer.ckpt_path)).name.startswith(_TUNER_FILES)


def open_finetuned(path: Path) -> Checkpoint:
    """Open a fine-tuned model without its record; the callbacks compared its base with theirs before training.

    Args:
        path: any file or folder that `open_checkpoint` reads.

    Returns:
        The checkpoint.
    """
    return open_checkpoint(path).without_metadata()


def dtypes_of(weights: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The dtypes of tensors.

    Args:
        weights: name → tensor.

    Returns:
        Name → dtype.
    """
    return {name: value.dtype for name, value in weights.items()}
