"""The cost of routing and switching: a FREE model on mixed batches of many tasks, compared with one plain model.

    python tools/benchmark_free_model.py                           # the quickstart's ViT, 8 tasks, batch 256: a minute
    python tools/benchmark_free_model.py --shape vit-b32 --repeat 3
    python tools/benchmark_free_model.py --shape vit-b32 --device cuda --dtype float32 bfloat16

Weights and experts are random. The router runs, but each batch is divided evenly among the tasks. Every number is a
ratio within one run: plain and FREE passes alternate, and the median of their ratios is printed. `held` is the memory
of a model between passes; the changed weights that small models keep (`FreeModel.cache_bytes`) are listed separately.
`peak` compares the largest resident sets of two processes, which load a model and run a batch of 8, each without what
its imports take; on a GPU it is what torch has allocated there, with the batch itself.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.processes import high_water
from torch import Tensor, nn

from freemerge.experts import LowRankExpert, PackedExpert, extract, load_expert, save_expert
from freemerge.models import ConvRouter, EarlyRouter, FreeModel, TransformersBackbone, feature_width

SHAPES = {
    "quickstart": {
        "model_type": "vit", "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 384, "image_size": 32, "patch_size": 8, "num_channels": 1, "attn_implementation": "eager",
    },
    "vit-b32": {"model_type": "vit", "image_size": 224, "patch_size": 32},
}  # fmt: skip
KINDS = ("sparse", "low_rank")


def make_backbone(arguments: argparse.Namespace, dtype: str = "float32") -> TransformersBackbone:
    """A random ViT."""
    torch.manual_seed(0)
    return TransformersBackbone(config=SHAPES[arguments.shape], pooling="mean", dtype=dtype).eval()


def make_images(arguments: argparse.Namespace, backbone: TransformersBackbone, count: int) -> Tensor:
    """Random images (count, C, H, W)."""
    config = backbone.model.config
    return torch.randn(count, config.num_channels, config.image_size, config.image_size).to(backbone.model.dtype)


def write_experts(arguments: argparse.Namespace, folder: Path) -> None:
    """A random expert per task and kind: as many values, in int8, as density · parameters."""
    weights = make_backbone(arguments).weights()
    for kind in arguments.kinds:
        for index in range(arguments.tasks):
            generator = torch.Generator().manual_seed(index)
            if kind == "sparse":
                residual = {name: 1e-3 * torch.randn(t.shape, generator=generator) for name, t in weights.items()}
                expert = extract(residual, arguments.density)
            else:
                matrices = {name: tuple(t.shape) for name, t in weights.items() if t.dim() == 2}
                total = sum(tensor.numel() for tensor in weights.values())
                rank = max(1, round(arguments.density * total / sum(o + i for o, i in matrices.values())))
                left = {n: 0.01 * torch.randn(o, rank, generator=generator) for n, (o, _) in matrices.items()}
                right = {n: 0.01 * torch.randn(rank, i, generator=generator) for n, (_, i) in matrices.items()}
                expert = LowRankExpert(left, right, {}, matrices)
            save_expert(folder / kind / f"task{index}.safetensors", expert)


def make_model(arguments: argparse.Namespace, folder: Path, dtype: str) -> FreeModel:
    """A FREE model with the experts of a folder; its router runs, then assigns samples to the tasks in turn."""
    backbone = make_backbone(arguments, dtype)
    experts = {path.stem: PackedExpert(load_expert(path)) for path in sorted(folder.iterdir())}
    if arguments.router == "conv":
        router = ConvRouter(len(experts), backbone.model.config.num_channels)
    else:
        width = feature_width(make_images(arguments, backbone, 2), backbone, "embeddings")
        router = EarlyRouter(len(experts), "embeddings", width)
    heads = {task: nn.Linear(backbone.feature_dim, 10) for task in experts}
    model = FreeModel(backbone, heads, experts, router)
    if arguments.cache_bytes is not None:
        model.cache_bytes = arguments.cache_bytes
    if arguments.apart:
        model._one_pass = False
    model.to(arguments.device, backbone.model.dtype).eval()
    route = model.route

    def evenly(inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits, abstained = route(inputs)
        turns = torch.arange(len(inputs), device=inputs.device) % len(experts)
        return nn.functional.one_hot(turns, len(experts)).to(logits.dtype), abstained

    model.route = evenly
    return model


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


@torch.no_grad()
def throughput(arguments: argparse.Namespace, folder: Path, dtype: str) -> None:
    """Print ratios of throughput, and the memory held between passes."""
    model = make_model(arguments, folder, dtype)
    images = make_images(arguments, model.backbone, arguments.batch).to(arguments.device)
    head = model.heads["task0"]
    passes = {
        "mixed": lambda: model(images),
        "single": lambda: model(images, task="task0"),
        "router": lambda: FreeModel.route(model, images),
    }
    ratios: dict[str, list[float]] = {name: [] for name in passes}
    plain = []
    for index in range(arguments.repeat + 1):
        for name, run in passes.items():
            alone = seconds(lambda: head(model.backbone(images)), arguments.device)
            ratio = alone / seconds(run, arguments.device)
            if index:  # the first round warms up
                ratios[name].append(ratio)
                plain.append(alone)
    middle = {name: statistics.median(found) for name, found in ratios.items()}
    print(f"  a plain pass                 {1e3 * statistics.median(plain):6.1f} ms")
    print(f"  throughput of a mixed batch  {middle['mixed']:6.2f} × plain")
    print(f"  throughput of one task       {middle['single']:6.2f} × plain")
    print(f"  routing                      {100 / middle['router']:6.1f} % of a plain pass")
    backbone, router = (sum(t.nbytes for t in m.state_dict().values()) for m in (model.backbone, model.router))
    print(
        f"  memory held                  {1 + (model.expert_bytes + router) / backbone:6.3f} × plain "
        f"(experts {model.expert_bytes / 2**20:.2f} MiB, router {router / 2**20:.2f} MiB)"
    )
    print(f"  changed weights kept         {model.cached_bytes / 2**20:6.2f} MiB of {model.cache_bytes / 2**20:.0f}")


@torch.no_grad()
def peak(arguments: argparse.Namespace) -> None:
    """In a process of its own: print by how many MiB loading a model and running a batch of 8 raised the peak."""
    before = high_water()
    run_once(arguments, arguments.peak, arguments.dtype[0], 8)
    print(high_water() - before)


def run_once(arguments: argparse.Namespace, which: str, dtype: str, count: int) -> None:
    """Load a model, "plain" or with the experts of a folder, and run a batch."""
    plain = which == "plain"
    model = make_backbone(arguments, dtype).to(arguments.device) if plain else make_model(arguments, Path(which), dtype)
    images = make_images(arguments, model if plain else model.backbone, count).to(arguments.device)
    model(images)


@torch.no_grad()
def peaks(arguments: argparse.Namespace, folder: Path, dtype: str) -> list[float]:
    """MiB of a plain model and of one with the experts of a folder."""
    found = []
    for which in ("plain", str(folder)):
        if torch.device(arguments.device).type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run_once(arguments, which, dtype, arguments.batch)
            found.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        else:
            command = [sys.executable, *sys.argv, "--dtype", dtype, "--peak", which]
            found.append(float(subprocess.check_output(command, text=True).split()[-1]))
    return found


def main() -> None:
    """Measure the kinds of experts and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="quickstart")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--router", choices=["conv", "early"], default="early")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--apart", action="store_true", help="run low-rank experts group by group, not in one pass")
    parser.add_argument(
        "--cache_bytes", type=int, help="of changed weights kept between passes, instead of the default"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        peak(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_experts(arguments, Path(folder))
        for dtype in arguments.dtype:
            for kind in arguments.kinds:
                about = f"{arguments.tasks} {kind} experts, batch {arguments.batch}, {dtype}, {arguments.device}"
                print(f"{arguments.shape}, {about}")
                throughput(arguments, Path(folder) / kind, dtype)
                if arguments.shape == "quickstart":
                    continue  # below the resolution of a resident set
                plain, free = peaks(arguments, Path(folder) / kind, dtype)
                print(f"  peak memory                  {free / plain:6.3f} × plain ({plain:.0f} MiB)", flush=True)


if __name__ == "__main__":
    main()
