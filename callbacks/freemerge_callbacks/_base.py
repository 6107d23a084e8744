"""The base of a fit: a given checkpoint, or the weights that the module starts with.

- The start is kept in a hidden file, because a fit that is interrupted and resumed does not see it again.
- Its hash goes into the callback's state, so that a resumed fit takes no other file for it.
- The hash is that of the backbone with the base loaded, so a given checkpoint and a kept start can be compared.
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

_OF_TUNERS = (".lr_find_", ".scale_batch_size_")  # what LearningRateFinder and BatchSizeFinder write
_WAY_OUT = "give the pretrained model with base=..."


class FitBase:
    """What a fit's task vector is relative to.

    Args:
        given: path of the pretrained model; None for the weights that the module starts with.
        output: what the callback will write; the start is kept beside it.
        who: what messages begin with.

    Attributes:
        hash: of the backbone's weights with the base loaded; None until it is known.
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
        """The base, its tensors named as the backbone's."""
        base = open_base(self.path)
        return part_of(base, self._part) if self._part else base

    @property
    def is_folder(self) -> bool:
        """Whether the base is the folder of a model, whose other files belong to it."""
        return self.path.is_dir() and not self._part

    def find(self, trainer: L.Trainer, backbone: str, weights: Mapping[str, Tensor]) -> None:
        """Find out whether a given base is a checkpoint of the whole module; every rank must call this.

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
        """At the start of a fit: keep what it starts from.

        Args:
            trainer: the Trainer; every rank must call this.
            weights: the backbone's tensors.
            keep: whether the values will be needed again.
            digest: whether the hash of a given base is needed; it takes reading all of it.
        """
        if self.given is not None:
            if digest:
                self.hash = on_rank_zero(trainer, lambda: hash_base(self.open(), dtypes_of(weights)))
        elif not is_resumed(trainer):
            self.hash = on_rank_zero(trainer, lambda: self._keep(weights, keep))

    def resume(self, trainer: L.Trainer, *, keep: bool = True) -> None:
        """Once a checkpoint has been restored, if there is one: check that what was kept is still there.

        Raises:
            ValueError: on rank 0, it is gone, or holds something else.
        """
        if self.given is None and is_resumed(trainer):
            on_rank_zero(trainer, lambda: self._check(keep))

    def restore(self, hash: str | None) -> None:
        """Take over the hash from a callback's state."""
        if self.given is None:
            self.hash = hash

    def discard(self) -> None:
        """Remove the kept file; on rank 0."""
        self.kept.unlink(missing_ok=True)

    def _keep(self, weights: Mapping[str, Tensor], keep: bool) -> str:
        if keep:
            save_checkpoint(self.kept, weights)
        return hash_tensors(weights)

    def _check(self, keep: bool) -> None:
        if self.hash is None:
            raise ValueError(f"{self.who}: the checkpoint to resume from was saved without this callback; {_WAY_OUT}")
        if not keep:
            return
        if not self.kept.exists():
            raise ValueError(f"{self.who}: {self.kept}, what the resumed fit started from, is gone; {_WAY_OUT}")
        if hash_tensors(open_base(self.kept)) != self.hash:
            raise ValueError(f"{self.who}: {self.kept} is not what the resumed fit started from; {_WAY_OUT}")


def open_base(path: Path) -> Checkpoint:
    """A base by all names of its tensors, so that a merge ties in its result what is tied in the base."""
    return open_checkpoint(path).with_tied_names()


def part_inside(base: Checkpoint, part: str, names: Iterable[str]) -> str:
    """The part of the module that a base is to be cut to: `part` where it is a checkpoint of the module, else none.

    Args:
        base: the base as its file names it.
        part: dotted path of the backbone.
        names: the backbone's tensors, relative to it.
    """
    own = set(names)
    inside = part_of(base, part) if part else base
    return part if own.intersection(inside.names) and not own.intersection(base.names) else ""


def is_resumed(trainer: L.Trainer) -> bool:
    """Whether a fit goes on from a checkpoint. Lightning's tuners restore one of their own: the fit's start."""
    return trainer.ckpt_path is not None and not Path(str(trainer.ckpt_path)).name.startswith(_OF_TUNERS)


def open_finetuned(path: Path) -> Checkpoint:
    """A fine-tuned model; the callbacks have held it to their base already, before the training."""
    return open_checkpoint(path).without_metadata()


def dtypes_of(weights: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Name → dtype."""
    return {name: value.dtype for name, value in weights.items()}
