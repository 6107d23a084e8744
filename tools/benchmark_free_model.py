"""What routing and switching cost: a FREE model on mixed batches of many tasks, against one plain model on the same.

    python tools/benchmark_free_model.py                           # the quickstart's ViT, 8 tasks, batch 256: a minute
    python tools/benchmark_free_model.py --shape vit-b32 --repeat 3

Weights and experts are random; the router is made to deal each batch out evenly. Every figure is a ratio within one run:
plain and FREE passes alternate, and the median of their ratios counts. Memory is that of processes of their own at
batch 8, from the start of the model's life to the end of a pass, without what the imports alone take.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from freemerge.experts import Expert, extract, extract_low_rank, load_expert, save_expert
from freemerge.models import ConvRouter, EarlyRouter, FreeModel, TransformersBackbone, feature_width

SHAPES = {
    "quickstart": {
        "model_type": "vit", "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 384, "image_size": 32, "patch_size": 8, "num_channels": 1, "attn_implementation": "eager",
    },
    "vit-b32": {"model_type": "vit", "image_size": 224, "patch_size": 32},
}  # fmt: skip
KINDS = ("sparse", "low_rank")


def make_backbone(shape: str, dtype: torch.dtype) -> TransformersBackbone:
    """A random ViT."""
    torch.manual_seed(0)
    return TransformersBackbone(config=SHAPES[shape], pooling="mean").to(dtype).eval()


def make_expert(backbone: TransformersBackbone, kind: str, seed: int, density: float) -> Expert:
    """A random expert, its values as an int8 file has them."""
    generator = torch.Generator().manual_seed(seed)
    residual = {
        name: 1e-3 * torch.randn(tensor.shape, generator=generator) for name, tensor in backbone.weights().items()
    }
    if kind == "sparse":
        expert: Expert = extract(residual, density)
    else:  # random factors do: a decomposition of noise would take minutes
        expert = extract_low_rank({name: t[:, :1] @ t[:1] for name, t in residual.items() if t.dim() == 2}, rank=1)
        rank = max(1, round(2 * density * backbone.feature_dim / 2))
        left = {name: torch.randn(len(u), rank, generator=generator) * 1e-2 for name, u in expert.left.items()}
        right = {name: torch.randn(rank, v.shape[1], generator=generator) * 1e-2 for name, v in expert.right.items()}
        expert = type(expert)(left, right, {}, {name: expert.shapes[name] for name in left})
    path = Path(f"/tmp/benchmark_free_model_{kind}_{seed}.safetensors")
    try:
        return load_expert(save_expert(path, expert))
    finally:
        path.unlink(missing_ok=True)


def make_model(arguments: argparse.Namespace, kind: str) -> tuple[FreeModel, torch.Tensor]:
    """A FREE model of `--tasks` tasks, and a batch that its router deals out evenly."""
    backbone = make_backbone(arguments.shape, getattr(torch, arguments.dtype))
    config = backbone.model.config
    images = torch.randn(arguments.batch, config.num_channels, config.image_size, config.image_size)
    images = images.to(getattr(torch, arguments.dtype))
    tasks = [f"task{index}" for index in range(arguments.tasks)]
    experts = {
        task: make_expert(backbone, kind, seed, arguments.density) for seed, task in enumerate(tasks) if kind in KINDS
    }
    if arguments.router == "conv":
        router = ConvRouter(len(tasks), config.num_channels)
    else:
        router = EarlyRouter(len(tasks), "embeddings", feature_width(images[:2], backbone, "embeddings"))
    model = FreeModel(backbone, {task: nn.Linear(backbone.feature_dim, 10) for task in tasks}, experts, router)
    model = model.to(images.dtype).eval()
    route = model.route

    def even(inputs: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(route(inputs))  # the router runs, but it is not trained
        return logits.index_put(
            (torch.arange(len(inputs)), torch.arange(len(inputs)) % len(tasks)), logits.new_ones(())
        )

    model.route = even
    return model, images


@torch.no_grad()
def throughput(arguments: argparse.Namespace, kind: str) -> None:
    """Print ratios of throughput."""
    model, images = make_model(arguments, kind)
    head = model.heads["task0"]

    def seconds(run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    passes = {
        "mixed batch": lambda: model(images),
        "one task": lambda: model(images, task="task0"),
        "router alone": lambda: FreeModel.route(model, images),
    }
    ratios: dict[str, list[float]] = {name: [] for name in passes}
    for index in range(arguments.repeat + 1):
        for name, run in passes.items():
            plain = seconds(lambda: head(model.backbone(images)))
            ratio = plain / seconds(run)
            if index:  # the first round warms up
                ratios[name].append(ratio)
    mixed, single, router = (statistics.median(ratios[name]) for name in passes)
    print(
        f"{kind:9} throughput of a mixed batch {mixed:5.2f} × plain, of one task {single:5.2f} × plain; "
        f"routing costs {100 / router:4.1f} % of a plain pass",
        flush=True,
    )


@torch.no_grad()
def memory(arguments: argparse.Namespace) -> None:
    """In a process of its own: print the growth of the largest resident set, in MiB."""
    arguments.batch = 8
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if arguments.memory == "plain":
        backbone = make_backbone(arguments.shape, getattr(torch, arguments.dtype))
        config = backbone.model.config
        backbone(
            torch.randn(8, config.num_channels, config.image_size, config.image_size).to(
                next(backbone.parameters()).dtype
            )
        )
    else:
        model, images = make_model(arguments, arguments.memory)
        model(images)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Measure both kinds of experts and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="quickstart")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--router", choices=["conv", "early"], default="early")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    print(
        f"{arguments.shape}, {arguments.tasks} tasks, batch {arguments.batch}, {arguments.dtype}, {arguments.router} router"
    )
    for kind in arguments.kinds:
        throughput(arguments, kind)
        held(arguments, kind)


def held(arguments: argparse.Namespace, kind: str) -> None:
    """Print how many bytes the model holds between and during passes, against one plain model's."""
    model, images = make_model(argparse.Namespace(**{**vars(arguments), "batch": 8}), kind)
    backbone = sum(tensor.numel() * tensor.element_size() for tensor in model.backbone.state_dict().values())
    router = sum(tensor.numel() * tensor.element_size() for tensor in model.router.state_dict().values())
    print(
        f"{'':9} memory {1 + (model.expert_bytes + router) / backbone:5.3f} × one model between passes "
        f"(backbone {backbone / 2**20:.1f} MiB, {arguments.tasks} experts {model.expert_bytes / 2**20:.2f} MiB, "
        f"router {router / 2**20:.2f} MiB)",
        flush=True,
    )


if __name__ == "__main__":
    main()
