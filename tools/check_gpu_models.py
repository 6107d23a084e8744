"""Checks for `check_gpu.py`: merges and routed models on a device give the same results as on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from freemerge import merging
from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.experts import extract, extract_low_rank
from freemerge.inputs import select, to_device
from freemerge.models import EarlyRouter, FreeModel, TransformersBackbone, feature_width

JUMPING = 1e-5  # fraction of a tensor's entries
METHODS = [
    "TaskArithmetic(0.3)", "WeightAverage()", "FRMerging()", "FRMerging(coefficients='mean')",
    "FRMerging(HighPass(0.2))", "FRMerging(Butterworth(0.1))", "PCBMerging()", "PCBMerging(inter='pairwise')",
    "PCBMerging(scope='tensor')", "PCBMerging(filter=NyquistDisc())", "Ties()", "Ties(scope='tensor')", "Dare(Ties())",
    "Breadcrumbs()", "EMRMerging()", "TSVMerge()", "IsoC()",
]  # fmt: skip


def merge_checks(device: str, folder: Path) -> Iterator[tuple]:
    """Check that merges on a device equal those on the CPU, up to rounding.

    Args:
        device: "cuda".
        folder: for files.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (192, 2304), "square": (768, 768), "high": (3072, 768), "odd": (33, 65, 3), "bias": (768,)}
    # Larger than a GPU's chunks, and than the chunks that models in memory are partitioned into.
    shapes["vocabulary"] = (9000, 768)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base["half"], base["steps"] = base["square"].bfloat16(), torch.tensor(7)

    def finetuned(value: torch.Tensor) -> torch.Tensor:
        change = 0.02 * torch.randn(value.shape, generator=generator)
        return value + change.to(value.dtype) if value.is_floating_point() else value

    models = {label: {name: finetuned(value) for name, value in base.items()} for label in "abc"}
    everything = {"base": base, **models}
    paths = {label: folder / f"{label}.safetensors" for label in everything}
    for label, tensors in everything.items():
        save_checkpoint(paths[label], tensors)
    moved = {
        label: {name: value.to(device) for name, value in tensors.items()} for label, tensors in everything.items()
    }

    def merge(models: dict, method, **options):
        return merging.merge(models["base"], {label: models[label] for label in "abc"}, method, **options)

    def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        assert list(found) == list(expected), "other tensors"
        for name, value in expected.items():
            assert found[name].dtype == value.dtype, f"{name} has dtype {found[name].dtype}"
            if not value.is_floating_point():
                assert torch.equal(found[name].cpu(), value), f"{name} was not kept"
                continue
            change = (value.float() - base[name].float()).norm()  # only tensors that are merged
            differences = (found[name].cpu().float() - value.float()).abs().flatten().sort().values
            # Rounding may move an entry across a threshold, where some methods are discontinuous.
            error = differences[: max(1, round(len(differences) * (1 - JUMPING)))].norm() / change
            limit = 1e-4 if value.dtype == torch.float32 else 1e-2
            assert error < limit, f"{name} differs by {float(error):.1e} of what the merge changed"

    def same(method) -> None:
        on_cpu = merge(everything, method)
        compare(merge(everything, method, device=device), on_cpu)
        there = merge(moved, method)
        assert all(value.device.type == device for value in there.values()), "left the device"
        compare(there, on_cpu)
        output = folder / "merged.safetensors"
        merge(paths, method, device=device, output=output, overwrite=True)
        compare({name: load_checkpoint(output)[name] for name in on_cpu}, on_cpu)

    for text in METHODS:
        yield f"{text} on the GPU", lambda text=text: same(eval(text, vars(merging)))


def free_checks(device: str, narrow: bool) -> Iterator[tuple]:
    """Check that routed models on a device answer as on the CPU and leave their weights unchanged.

    Args:
        device: "cuda".
        narrow: whether to compute under autocast to bfloat16.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    tokens = torch.randint(5, 90, (45, 12)).sort(dim=1, descending=True).values
    texts = {"input_ids": tokens, "attention_mask": (tokens > 20).long()}
    configs = {
        "images": ({"model_type": "vit", "image_size": 32, "patch_size": 8, **shape}, torch.randn(45, 3, 32, 32)),
        "texts": ({"model_type": "bert", "vocab_size": 100, **shape}, texts),
    }

    def make(kind: str, config: dict, inputs, top_n: int) -> FreeModel:
        backbone = TransformersBackbone(config=config, pooling="mean").eval()
        noise = [{name: 0.02 * torch.randn(t.shape) for name, t in backbone.weights().items()} for _ in range(3)]
        some = [extract(one, 0.05) if kind == "sparse" else extract_low_rank(one, rank=2) for one in noise]
        experts = dict(zip("abc", some, strict=True))
        router = EarlyRouter(4, "embeddings", feature_width(inputs, backbone, "embeddings")).eval()
        heads = {task: nn.Linear(shape["hidden_size"], 5) for task in "abcd"}
        model = FreeModel(backbone, heads, experts, router, top_n=top_n).eval()
        with torch.no_grad():  # an untrained router would send all samples to one task
            router.head.weight *= 30
            router.head.bias -= model.route(inputs)[0].mean(0)
        return model

    @torch.no_grad()
    def same(kind: str, config: dict, inputs, top_n: int) -> None:
        on_cpu = make(kind, config, inputs, top_n)
        model = copy.deepcopy(on_cpu).to(device)
        before = {name: tensor.clone() for name, tensor in model.backbone.weights().items()}
        limit = 5e-2 if narrow else 1e-3
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            for count in (45, 45, 44, 45, 1, 7, 1, 45):
                some = select(inputs, slice(count))
                for task in (None, "a", "d"):
                    found = model(to_device(some, device), task=task)
                    # In a narrow dtype a sample may be routed to another task: compare it with that task's result.
                    groups = {task} if task else set(found.task_names)
                    for name in groups:
                        own = torch.tensor([each == name for each in found.task_names])
                        expected = on_cpu(some, task=name if top_n == 1 else task).logits
                        errors = (found.logits.cpu().float() - expected).norm(dim=1) / expected.norm(dim=1)
                        # A sample's mixture is rounded to sixteenths, possibly in the other direction.
                        near = errors[own].sort().values[: max(1, int(0.8 * own.sum()))] if top_n > 1 else errors[own]
                        assert near.max() < limit, f"{count} inputs, task {task}: differs by {float(near.max()):.1e}"
                    assert task or len(groups) > 1 or count < 44, f"all went to {groups}"
        for name, tensor in model.backbone.weights().items():
            assert torch.equal(tensor, before[name]), f"{name} did not come back"

    for kind in ("sparse", "low_rank"):
        for what, (config, inputs) in configs.items():
            for top_n in (1, 2):
                name = f"{kind} experts, {what}, top {top_n}"
                yield name, lambda args=(kind, config, inputs, top_n): same(*args)
