"""The model that a folder's `config.json` describes: its modules, and the place of each stored tensor in them.

transformers loads files whose names, and even whose tensors, differ from the model's: a file may hold a layer's experts
separately where the module has one stacked tensor. The model is built without memory (on torch's meta device), and
transformers' own conversion, run on it, shows of which of its tensors each tensor of a file is a view. transformers is
imported only when a model is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from freemerge.checkpoints.json_files import read_object
from freemerge.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"

_MOST_LAYERS = 4096  # bound on the number of layers of any part of a model
# Settings of computation and storage: they would require packages that reading names does not need.
_NOT_BUILT = ("quantization_config", "attn_implementation", "_attn_implementation", "_experts_implementation")


class Place(NamedTuple):
    """The place of a stored tensor in a model: a view of one of the model's tensors."""

    tensor: str  # the tensor's name in the model
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, values: Tensor) -> Tensor:
        """The view of the model's contiguous tensor."""
        return values.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class Architecture:
    """A model without values.

    Args:
        path: path of its `config.json`, for messages.
        model: the model, on the meta device.
        places: the name in a file, as the installed transformers saves it → its place.
    """

    path: Path
    model: PreTrainedModel
    places: Mapping[str, Place] = field(repr=False)

    def locate(self, names: Iterable[str]) -> dict[str, Place]:
        """The places of stored tensors in the model; names of older files are recognized, unknown names are left out.

        Args:
            names: names of tensors in files.
        """
        found: dict[str, Place] = {}
        for name in names:
            if name in self.places:
                found[name] = self.places[name]
            elif (own := name if name in self.tensors else self._rename(name)) is not None:
                found[name] = _whole(own, self.tensors[own])
        return found

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors, without values."""
        return dict(self.model.state_dict())

    def _rename(self, name: str) -> str | None:
        """The model's name of a tensor that an older file names differently, as transformers resolves it."""
        if self._renamings is None:
            return None
        from transformers.core_model_loading import rename_source_key

        prefix = getattr(self.model, "base_model_prefix", "")
        renamed, _ = rename_source_key(name, self._renamings, [], prefix, self.tensors)
        return renamed if renamed in self.tensors else None

    @cached_property
    def _renamings(self) -> list[Any] | None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming
        except ImportError:  # before version 5, files used the names of modules
            return None
        return [one for one in get_model_conversion_mapping(self.model) if isinstance(one, WeightRenaming)]


def read_architecture(folder: Path | None) -> Architecture | None:
    """The model of a folder; None if there is no `config.json` or transformers does not know the model.

    Raises:
        CheckpointError: the configuration is damaged.
    """
    if folder is None or not (folder / CONFIG).is_file():
        return None
    path = folder / CONFIG
    settings = read_object(path)
    if settings.get("auto_map"):  # custom code, which uses the names of its modules
        return None
    _check_sizes(path, settings)
    kind = _find_class(settings)
    if kind is None:
        return None
    try:
        from transformers import CONFIG_MAPPING

        plain = {key: value for key, value in settings.items() if key not in _NOT_BUILT}
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(plain)
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # each of several hundred models raises different errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{path}: transformers cannot build a {kind.__name__} from it ({type(error).__name__}: {reason}); download "
            "it again"
        ) from None
    return Architecture(path, model, _find_places(model))


def _find_class(settings: Mapping[str, Any]) -> type[PreTrainedModel] | None:
    """The class with this name in transformers."""
    import transformers

    names, model_type = settings.get("architectures"), settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        return None
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _check_sizes(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse models that would take too long to build."""
    for key, value in settings.items():
        if isinstance(value, dict):
            _check_sizes(path, value)
        counts = any(word in key for word in ("layers", "blocks", "depth", "num_experts", "num_local_experts"))
        if counts and isinstance(value, int) and value > _MOST_LAYERS:
            raise CheckpointError(f"{path}: {key} is {value}, expected at most {_MOST_LAYERS}; download it again")


class _Views(TorchFunctionMode):
    """Skip copies that only make a view contiguous, so that the view can be found."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.contiguous, Tensor.clone, torch.clone):
            return args[0]
        return function(*args, **(kwargs or {}))


def _find_places(model: PreTrainedModel) -> dict[str, Place]:
    """The tensors that transformers would save of a model, name → place; only views of a single tensor are included."""
    tensors = dict(model.state_dict())
    owners: dict[int, str] = {}
    for name, tensor in tensors.items():
        owners.setdefault(_storage(tensor), name)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {name: _whole(name, tensor) for name, tensor in tensors.items()}
    with _Views():
        saved = revert_weight_conversion(model, dict(tensors))
    return {
        name: Place(owners[_storage(tensor)], tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
        for name, tensor in saved.items()
        if _storage(tensor) in owners
    }


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _whole(name: str, tensor: Tensor) -> Place:
    return Place(name, tuple(tensor.shape), tuple(tensor.stride()), 0)
