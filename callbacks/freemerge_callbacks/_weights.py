"""Read the weights of a backbone in a user's LightningModule under any supported strategy.

A part (the backbone, the head) is named by the dotted path of the attribute that holds it (`backbone`,
`model.encoder`), or "" for the whole module. Its tensors are named relative to it, without the prefix of
`torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from freemerge.checkpoints import Checkpoint, expand, hash_tensors, open_checkpoint, save_checkpoint
from freemerge_callbacks._adapters import fused_weights, has_adapters, loaded, plain_names
from freemerge_callbacks._ranks import on_rank_zero

_COMPILED = "_orig_mod."  # the prefix that `torch.compile` adds to the names of a module's tensors


def is_dev_run(trainer: L.Trainer) -> bool:
    """Check whether the Trainer runs with `fast_dev_run`; Lightning's type annotations lack this attribute.

    Args:
        trainer: the Trainer.

    Returns:
        True for a trial run.
    """
    return bool(getattr(trainer, "fast_dev_run", False))


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The Trainer's callbacks; Lightning's type annotations lack this attribute.

    Args:
        trainer: the Trainer.

    Returns:
        The callbacks in their order.
    """
    return trainer.callbacks  # type: ignore[attr-defined]


def refuse_placeholders(strategy: Strategy, who: str) -> None:
    """Refuse DeepSpeed ZeRO-3, under which a module contains placeholders instead of weights.

    Args:
        strategy: the Trainer's strategy.
        who: name of the callback, for error messages.

    Raises:
        ValueError: if the strategy is DeepSpeed ZeRO-3.
    """
    if is_a(strategy, "DeepSpeedStrategy") and getattr(strategy, "zero_stage_3", False):
        raise ValueError(
            f"{who}: under DeepSpeed ZeRO-3 the module holds placeholders instead of weights; use stage 2, or FSDP, or "
            "merge afterwards: turn the checkpoint into one file (zero_to_fp32.py) and run `python -m freemerge merge`"
        )


def is_sharded(strategy: Strategy) -> bool:
    """Check whether a strategy shards the weights among the ranks.

    Args:
        strategy: the Trainer's strategy.

    Returns:
        True for FSDP and ModelParallelStrategy.
    """
    return is_a(strategy, "FSDPStrategy") or is_a(strategy, "ModelParallelStrategy")


def is_a(value: object, name: str) -> bool:
    """Check the class of an object by name, in `lightning` as well as `pytorch_lightning`.

    Args:
        value: any object.
        name: the class's name.

    Returns:
        True for an instance of the class or of a subclass.
    """
    return any(
        kind.__name__ == name and kind.__module__.startswith(("lightning.", "pytorch_lightning."))
        for kind in type(value).__mro__
    )


def get_part(module: nn.Module, path: str, who: str, argument: str = "backbone") -> nn.Module:
    """The submodule at a dotted path.

    Args:
        module: the module.
        path: for example `model.encoder`; "" for the module itself.
        who: name of the callback, for error messages.
        argument: the name of the argument that contains the path, for messages.

    Returns:
        The submodule.

    Raises:
        ValueError: if there is no such submodule; lists those that exist.
    """
    try:
        return module.get_submodule(path)
    except AttributeError:
        children = ", ".join(name for name, _ in module.named_children()) or "none"
        whole = f", or {argument}='' for the module itself" if argument == "backbone" else ""
        raise ValueError(
            f"{who}: {type(module).__name__} has no submodule '{path}'; name the attribute that holds the {argument} "
            f"with {argument}=... (its submodules: {children}){whole}"
        ) from None


def part_weights(trainer: L.Trainer, module: L.LightningModule, part: str, who: str) -> dict[str, Tensor]:
    """The tensors of a part of the module by name, with ties kept.

    Without sharding, the tensors share memory with the module. PEFT adapters in the part are fused into the weights,
    which keep the names that they have without adapters.

    Args:
        trainer: the Trainer; every rank must call this.
        module: the module.
        part: dotted path of the part.
        who: name of the callback, for error messages.

    Returns:
        Name relative to the part → tensor; complete on rank 0, possibly empty on other ranks.

    Raises:
        ValueError: if there is no such part, or its adapters are sharded.
    """
    if has_adapters(get_part(module, part, who)) and is_sharded(trainer.strategy):
        raise ValueError(
            f"{who}: '{part}' has PEFT adapters, which {type(trainer.strategy).__name__} shards, and sharded adapters "
            "cannot be fused into the weights; train with ddp, or save the adapter with save_pretrained and merge it "
            "afterwards: python -m freemerge merge"
        )
    return weights_of(module, part, whole_state(trainer, module))


def weights_of(module: nn.Module, part: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a part in a state dict of the module, with PEFT adapters fused in.

    Args:
        module: the module, for its adapters' settings; it is not changed.
        part: dotted path of the part.
        state: name in the module's state dict → tensor, from any step of the fit.

    Returns:
        Name relative to the part → tensor.
    """
    body = module.get_submodule(part)
    if not has_adapters(body):
        return relative(state, part)
    with loaded(module, {name: value for name, value in state.items() if isinstance(value, Tensor)}):
        return {_plain(name): value for name, value in fused_weights(body).items()}


def save_base(module: nn.Module, path: str | Path, backbone: str = "backbone") -> Path:
    """Save a module's initial weights as the base of later merges and previews.

        save_base(module, "base.safetensors")  # before the fit
        MergePreview(method, base="base.safetensors", …)

    Args:
        module: the module, before training.
        path: the `.safetensors` file to write. A file with the same weights is not written again.
        backbone: dotted path of the module's attribute that holds the backbone; "" for the module itself.

    Returns:
        The file's path.

    Raises:
        ValueError: there is no such submodule, or the file exists and holds other weights.
    """
    path = expand(path)
    get_part(module, backbone, "save_base")
    weights = weights_of(module, backbone, module.state_dict())
    if path.exists():
        if hash_tensors(open_checkpoint(path)) != hash_tensors(weights):
            raise ValueError(f"save_base: {path} holds other weights; choose another path, or remove the file")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, weights)
    return path


@contextmanager
def final_weights(
    trainer: L.Trainer, module: L.LightningModule, part: str, who: str, file: Path
) -> Iterator[Mapping[str, Tensor] | Path]:
    """Give every rank the same tensors of a part of the module; every rank must enter and leave.

    Args:
        trainer: the Trainer.
        module: the module.
        part: dotted path of the part.
        who: name of the callback, for error messages.
        file: the temporary file that rank 0 writes if the strategy shards the weights.

    Yields:
        The tensors by name, or the file if the strategy shards them.
    """
    weights = part_weights(trainer, module, part, who)
    if trainer.world_size == 1:
        yield weights
    elif is_sharded(trainer.strategy):
        with while_in_file(trainer, lambda: weights, file):
            yield file
    else:
        # Parameters are equal on all ranks. Buffers (batch-norm statistics) differ, so rank 0's are broadcast.
        body = module.get_submodule(part)
        buffers = {name for name, _ in body.named_buffers(remove_duplicate=False)}
        names = plain_names(body) if has_adapters(body) else dict(zip(map(_plain, buffers), buffers, strict=True))
        own = {name: weights[name].cpu() for name, full in names.items() if full in buffers and name in weights}
        yield weights | trainer.strategy.broadcast(own)


@contextmanager
def while_in_file(trainer: L.Trainer, weights: Callable[[], Mapping[str, Tensor]], file: Path) -> Iterator[Path]:
    """Write rank 0's weights to a file that exists inside the block; every rank must enter and leave.

    Args:
        trainer: the Trainer.
        weights: returns the tensors by name; called on rank 0.
        file: the file.

    Yields:
        The file.
    """
    on_rank_zero(trainer, lambda: save_checkpoint(file, weights()))
    try:
        yield file
    finally:
        if trainer.is_global_zero:
            file.unlink(missing_ok=True)


def whole_state(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """The module's state dict, gathered from all ranks if it is sharded; see `part_weights`.

    Args:
        trainer: the Trainer; every rank must call this.
        module: the module.

    Returns:
        Name → value; complete on rank 0.
    """
    if not is_sharded(trainer.strategy):
        return trainer.strategy.lightning_module_state_dict()
    # Not `lightning_module_state_dict`: by default it returns each rank's own shards (save_distributed_checkpoint).
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    assert trainer.strategy.model is not None  # a fit has set the strategy up
    state = get_model_state_dict(trainer.strategy.model, options=options)
    # Gathered tensors are separate copies, even where the module ties them.
    tied = {name: first for name, first in _shared(module).items() if name in state and first in state}
    return state | {name: state[first] for name, first in tied.items()}


def relative(state: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    """The tensors of one part in a module's state dict.

    Args:
        state: the state dict.
        part: dotted path of the part.

    Returns:
        Name relative to the part, without the prefix of `torch.compile` → tensor.
    """
    prefix = f"{part}." if part else ""
    named = ((_plain(name), value) for name, value in state.items())
    return {
        name[len(prefix) :]: value for name, value in named if name.startswith(prefix) and isinstance(value, Tensor)
    }


def part_of(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """The tensors of one part in a checkpoint of the module; see `relative`.

    Args:
        checkpoint: the checkpoint.
        part: dotted path of the part.

    Returns:
        A checkpoint of the part.
    """
    prefix = f"{part}." if part else ""
    names = {name: _plain(name) for name in (*checkpoint.names, *checkpoint.tied)}
    return checkpoint.renamed({n: plain[len(prefix) :] for n, plain in names.items() if plain.startswith(prefix)})


def in_memory(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read a model's tensors, with ties kept; tensors that are already in memory are not copied.

    Args:
        checkpoint: the model.

    Returns:
        Every name → tensor.
    """
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names if name not in checkpoint.tied}
    return tensors | {name: tensors[first] for name, first in checkpoint.tied.items()}


def _plain(name: str) -> str:
    """A tensor's name without the prefix of `torch.compile`."""
    return name.replace(_COMPILED, "")


def _shared(module: nn.Module) -> dict[str, str]:
    """Later name of a tied tensor → its first name."""
    first: dict[int, str] = {}
    shared = {}
    everything = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for name, value in everything:
        original = first.setdefault(id(value), name)
        if original != name:
            shared[name] = original
    return shared
