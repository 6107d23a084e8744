"""The best weights of a fit, from the Trainer's ModelCheckpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from freemerge.checkpoints import Checkpoint, open_checkpoint
from freemerge_callbacks._weights import is_a, part_of


def check_weights(trainer: L.Trainer, weights: str, who: str) -> None:
    """Check the argument `weights` of a callback.

    Args:
        trainer: the Trainer.
        weights: the argument.
        who: name of the callback, for error messages.

    Raises:
        ValueError: if it is neither "last" nor "best", or no ModelCheckpoint tracks a best checkpoint.
    """
    if weights not in ("last", "best"):
        raise ValueError(f"{who}: `weights` must be 'last' or 'best', got {weights!r}")
    if weights == "best":
        best_checkpoint(trainer, who)


def best_checkpoint(trainer: L.Trainer, who: str) -> ModelCheckpoint:
    """Find the Trainer's first ModelCheckpoint that tracks a best checkpoint.

    Args:
        trainer: the Trainer.
        who: name of the callback, for error messages.

    Returns:
        The ModelCheckpoint.

    Raises:
        ValueError: if no ModelCheckpoint has a `monitor`.
    """
    found: list[Any] = [callback for callback in trainer.checkpoint_callbacks if is_a(callback, "ModelCheckpoint")]
    for callback in found:  # of the class by its name: of this Lightning or of pytorch_lightning
        if callback.monitor is not None and callback.save_top_k != 0:
            return callback
    raise ValueError(
        f"{who}: weights='best' needs a ModelCheckpoint with a `monitor` (and save_top_k ≠ 0) among the Trainer's "
        "callbacks; add one, or use weights='last'"
    )


def best_state(path: str, backbone: str, who: str) -> Checkpoint:
    """Open the state dict in a Lightning checkpoint, without executing pickled code.

    Args:
        path: a file, or a folder of shards; "" if ModelCheckpoint has saved none.
        backbone: dotted path of the backbone.
        who: name of the callback, for error messages.

    Returns:
        The checkpoint, with the module's names.

    Raises:
        ValueError: if no checkpoint was written, or it does not contain the backbone.
    """
    if not path:
        raise ValueError(f"{who}: weights='best', but ModelCheckpoint has saved nothing; was its metric logged?")
    state = open_checkpoint(path)
    if not part_of(state, backbone).names:
        raise ValueError(f"{who}: {path}: no tensor's name starts with '{backbone}.'")
    return state


def left_out(state: Checkpoint, module: nn.Module, backbone: str, who: str) -> list[str]:
    """The frozen tensors of a module that its checkpoint leaves out.

    Projects with a large frozen part often save only the trained tensors.

    Args:
        state: the checkpoint; every name in it is a name in the module.
        module: the module.
        backbone: dotted path of the backbone.
        who: name of the callback, for error messages.

    Returns:
        The names of the missing tensors.

    Raises:
        ValueError: if the checkpoint leaves out a trained tensor of the backbone.
    """
    prefix = f"{backbone}." if backbone else ""
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    missing = [name for name, value in module.state_dict().items() if isinstance(value, Tensor) and name not in state]
    if lost := [name for name in missing if name in trained and name.startswith(prefix)]:
        raise ValueError(
            f"{who}: {state.label} leaves out '{lost[0]}', which was trained; keep it in on_save_checkpoint, or use "
            "weights='last'"
        )
    return missing


def completed(state: Checkpoint, module: nn.Module, own: Mapping[str, Any], backbone: str, who: str) -> dict[str, Any]:
    """Complete a checkpoint with the frozen tensors that it leaves out; see `left_out`.

    Args:
        state: the checkpoint.
        module: the module.
        own: the module's state dict.
        backbone: dotted path of the backbone.
        who: name of the callback, for error messages.

    Returns:
        Name in the module → tensor.
    """
    return {**{name: own[name] for name in left_out(state, module, backbone, who)}, **state}
