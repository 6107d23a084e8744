"""The backbone's weights in somebody else's LightningModule, whatever the strategy does with them.

A backbone is named by the dotted path of the attribute that holds it (`backbone`, `model.encoder`), "" for the whole
module. Its tensors are named relative to it, as `torch.compile` had never been there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

_COMPILED = "_orig_mod."  # what `torch.compile` puts into the names of a module's tensors


def refuse_placeholders(strategy: Strategy, who: str) -> None:
    """Raise a ValueError for DeepSpeed ZeRO-3, under which a module holds placeholders instead of weights."""
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        raise ValueError(
            f"{who}: under DeepSpeed ZeRO-3 the module holds placeholders instead of weights; use stage 2, or FSDP, or "
            "merge afterwards: turn the checkpoint into one file (zero_to_fp32.py) and run `python -m freemerge merge`"
        )


def is_sharded(strategy: Strategy) -> bool:
    """Whether each rank holds only its part of the weights."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def get_backbone(module: nn.Module, backbone: str, who: str) -> nn.Module:
    """The submodule at a dotted path.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    try:
        return module.get_submodule(backbone)
    except AttributeError:
        children = ", ".join(name for name, _ in module.named_children()) or "none"
        raise ValueError(
            f"{who}: {type(module).__name__} has no submodule '{backbone}'; name the attribute that holds the backbone "
            f"with backbone=... (its submodules: {children}), or backbone='' for the module itself"
        ) from None


def backbone_weights(trainer: L.Trainer, module: L.LightningModule, backbone: str, who: str) -> dict[str, Tensor]:
    """The backbone's tensors by name, tied ones tied; whole on rank 0, perhaps empty elsewhere.

    Every rank must call it. Without sharding the tensors share memory with the module.
    """
    get_backbone(module, backbone, who)
    state = _whole_state(trainer.strategy)
    if is_sharded(trainer.strategy):  # gathered tensors are tensors of their own
        tied = {name: first for name, first in _shared(module).items() if name in state and first in state}
        state |= {name: state[first] for name, first in tied.items()}
    return relative(state, backbone)


def relative(state: Mapping[str, Any], backbone: str) -> dict[str, Tensor]:
    """The tensors of a module's state dict that belong to its backbone, named relative to it."""
    prefix = f"{backbone}." if backbone else ""
    named = ((name.replace(_COMPILED, ""), value) for name, value in state.items())
    return {
        name[len(prefix) :]: value for name, value in named if name.startswith(prefix) and isinstance(value, Tensor)
    }


def find_prefix(module_names: Iterable[str], file_names: Iterable[str]) -> str | None:
    """The prefix under which a module has all tensors of a file; None if it has not.

    A file may name its tensors relative to something inside the backbone, as a Hugging Face folder does where the
    backbone wraps a model of that library.
    """
    known, wanted = set(module_names), list(file_names)
    ends = sorted((name for name in known if name.endswith(wanted[0])), key=len)
    prefixes = [name[: len(name) - len(wanted[0])] for name in ends]
    return next((prefix for prefix in prefixes if all(prefix + name in known for name in wanted)), None)


def _whole_state(strategy: Strategy) -> dict[str, Any]:
    if not is_sharded(strategy):
        return strategy.lightning_module_state_dict()
    # Not `lightning_module_state_dict`: by default it returns each rank's own shards (save_distributed_checkpoint).
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(strategy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _shared(module: nn.Module) -> dict[str, str]:
    """For each name of a tensor that has an earlier name too, that name."""
    first: dict[int, str] = {}
    shared = {}
    everything = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for name, value in everything:
        original = first.setdefault(id(value), name)
        if original != name:
            shared[name] = original
    return shared
