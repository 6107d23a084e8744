"""The base of a fit: a given checkpoint, or the weights that the module starts with.

- The start is kept in a hidden file, because a fit that is interrupted and resumed does not see it again.
- Its hash goes into the callback's state, so that a resumed fit takes no other file for it.
- The hash is that of the backbone with the base loaded, so a given checkpoint and a kept start can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from freemerge.checkpoints import Checkpoint, hash_tensors, open_checkpoint, save_checkpoint
from freemerge.checkpoints.base_hashes import hash_base
from freemerge.checkpoints.places import expand
from freemerge_callbacks._ranks import on_rank_zero

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
        self.given = None if given is None else expand(given)
        self.kept = output.with_name(f".{output.stem}.base.safetensors")  # hidden: no glob finds it
        self.who = who
        self.hash: str | None = None

    @property
    def path(self) -> Path:
        """The file that holds the base."""
        return self.given or self.kept

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
                self.hash = on_rank_zero(trainer, lambda: hash_base(open_base(self.given), dtypes_of(weights)))
        elif trainer.ckpt_path is None:
            self.hash = on_rank_zero(trainer, lambda: self._keep(weights, keep))

    def resume(self, trainer: L.Trainer, *, keep: bool = True) -> None:
        """Once a checkpoint has been restored, if there is one: check that what was kept is still there.

        Raises:
            ValueError: on rank 0, it is gone, or holds something else.
        """
        if self.given is None and trainer.ckpt_path is not None:
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


def open_finetuned(path: Path) -> Checkpoint:
    """A fine-tuned model; the callbacks have held it to their base already, before the training."""
    return open_checkpoint(path).without_metadata()


def dtypes_of(weights: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Name → dtype."""
    return {name: value.dtype for name, value in weights.items()}
