"""Two processes: the same file, bit for bit, and exact accuracies."""

import warnings

import torch
from callbacks_project import Plain, SaveResults, SaveWeights, make_backbone, make_loader, make_trainer
from freemerge_callbacks import MergeAtFitEnd, MultiTaskEvaluation
from torch import nn

from freemerge.checkpoints import load_checkpoint
from freemerge.merging import FRMerging, merge


def test_two_processes_merge_into_the_file_that_one_would_write(tmp_path, other):
    torch.manual_seed(1)
    heads = {"a": nn.Linear(8, 2), "b": nn.Linear(8, 3)}
    loaders = {"a": make_loader(0, 53, seed=4, batch_size=8), "b": make_loader(1, 5, seed=5, batch_size=8)}
    callbacks = [
        MergeAtFitEnd(FRMerging(), [str(other)], str(tmp_path / "two.safetensors")),
        MultiTaskEvaluation(loaders, heads=heads, every_n_epochs=1),
        SaveWeights(str(tmp_path / "trained.pt")),
        SaveResults(str(tmp_path)),
    ]
    trainer = make_trainer(tmp_path, *callbacks, strategy="ddp_spawn", devices=2, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Plain(), make_loader(0))

    trained = torch.load(tmp_path / "trained.pt", weights_only=True)
    base = make_backbone().state_dict()
    own = {name: trained[f"backbone.{name}"] for name in base}
    assert not torch.equal(own["0.weight"], base["0.weight"])
    merge(base, {"own": own, "other": other}, FRMerging(), output=tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()

    backbone = make_backbone()
    backbone.load_state_dict(load_checkpoint(tmp_path / "two.safetensors"))
    for rank in range(2):
        results = torch.load(tmp_path / f"results-{rank}.pt", weights_only=True)
        for task, loader in loaders.items():
            right = sum(int((heads[task](backbone(x)).argmax(1) == y).sum()) for x, y in loader)
            torch.testing.assert_close(results[task], right / len(loader.dataset), rtol=0, atol=1e-6)


def test_an_error_of_rank_zero_is_everybodys(tmp_path, other):
    """Not tested with processes: one that waits for the other would wait for half an hour."""
    from types import SimpleNamespace

    import pytest
    from freemerge_callbacks._ranks import on_rank_zero

    def fail():
        raise OSError("disk full")

    sent = []
    strategy = SimpleNamespace(broadcast=lambda value: sent.append(value) or value)
    with pytest.raises(OSError, match="disk full"):
        on_rank_zero(SimpleNamespace(is_global_zero=True, strategy=strategy), fail)
    strategy.broadcast = lambda value: sent[0]
    with pytest.raises(RuntimeError, match="rank 0 failed with OSError: disk full"):
        on_rank_zero(SimpleNamespace(is_global_zero=False, strategy=strategy), fail)
