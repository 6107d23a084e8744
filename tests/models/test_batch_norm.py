"""Re-estimated batch norm: compared with sums over all data and with torch's own running statistics."""

import pytest
import torch
from torch import nn

from freemerge.models import batch_norms, reestimate_batch_norm

SCALE = torch.tensor([1.0, 3, 0.1]).view(3, 1, 1)
DATA = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * SCALE + 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first, second, third = nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.BatchNorm1d(16)
    return nn.Sequential(first, nn.Conv2d(3, 4, 3), nn.Dropout(0.5), second, nn.Flatten(), third)


@pytest.mark.parametrize("size", [50, 8])
def test_the_first_layer_has_the_exact_statistics_of_all_data(size: int) -> None:
    measured = reestimate_batch_norm(network(), [(batch, None) for batch in DATA.split(size)])
    variance, mean = torch.var_mean(DATA.double(), dim=(0, 2, 3))
    torch.testing.assert_close(measured["0.running_mean"].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(measured["0.running_var"].double(), variance, rtol=1e-5, atol=0)


def test_every_layer_has_torchs_statistics_of_one_batch() -> None:
    module = network()
    reference = network()
    reference[2].eval()
    for layer in batch_norms(reference).values():
        layer.momentum = None  # torch's cumulative average
    reference(DATA)
    measured = reestimate_batch_norm(module, [DATA])
    assert set(measured) == {f"{i}.running_{what}" for i in (0, 3, 5) for what in ("mean", "var")}
    for name, tensor in measured.items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_the_module_does_not_change() -> None:
    module = network()
    module[3].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(module, [DATA[:, :2]])
    reestimate_batch_norm(module, [DATA])
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert all(layer.track_running_stats for layer in batch_norms(module).values())
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_without_batch_norm_the_data_are_not_read() -> None:
    def never():
        raise AssertionError("read")
        yield

    assert reestimate_batch_norm(nn.Linear(2, 2), never()) == {}
    assert batch_norms(nn.BatchNorm1d(2, track_running_stats=False)) == {}


def test_no_data_is_an_error_and_max_batches_is_respected() -> None:
    with pytest.raises(ValueError, match="there are no data"):
        reestimate_batch_norm(network(), [])
    limited = reestimate_batch_norm(network(), list(DATA.split(10)), max_batches=2)
    torch.testing.assert_close(limited["0.running_mean"], DATA[:20].mean(dim=(0, 2, 3)))
