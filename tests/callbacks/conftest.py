import warnings

import pytest
import torch

from freemerge.checkpoints import save_checkpoint
from tests.callbacks.callbacks_project import make_backbone


@pytest.fixture(autouse=True)
def _quiet():
    warnings.filterwarnings("ignore", message=".*(many workers|Be aware that|smaller than the logging|LeafSpec).*")
    torch.manual_seed(0)


@pytest.fixture
def other(tmp_path):
    """Another task's finished backbone: the base plus a known task vector."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in make_backbone().state_dict().items()
    }
    save_checkpoint(tmp_path / "other.safetensors", tensors)
    return tmp_path / "other.safetensors"
