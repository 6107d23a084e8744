"""Time and memory of expert training: all summed weights at once (`functional_call`) or one layer at a time (ours).

    python tools/benchmark_expert_training.py            # ViT-B/32, batch 2: some minutes

For each line, a separate process trains random experts of a random ViT for a few steps. `memory` is the growth of the
largest resident set from the loaded backbone to the last step, in multiples of the backbone; `time` is the time per
step, in multiples of the first line's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmark_free_model import KINDS, make_backbone, make_images, write_experts
from benchmarks.processes import high_water
from torch import Tensor
from torch.func import functional_call

from freemerge.experts import Expert, load_expert, substituted

WAYS = ("at once", "by layer")


def step(backbone: torch.nn.Module, expert: Expert, images: Tensor, way: str) -> Tensor:
    """Features of merged + expert, differentiable in the expert's values."""
    if way == "by layer":
        with substituted(backbone.model, expert.shapes, expert.added):
            return backbone(images)
    own = dict(backbone.model.named_parameters())
    weights = {f"model.{name}": expert.added(name, own[name]) for name in expert.shapes}
    return functional_call(backbone, weights, (images,))


def train(arguments: argparse.Namespace) -> None:
    """In a process of its own: print MiB and seconds per step."""
    backbone = make_backbone(arguments).requires_grad_(False)
    expert = load_expert(arguments.expert)
    values = torch.nn.Parameter(expert.flat_values())
    optimizer = torch.optim.Adam([values])
    images = make_images(arguments, backbone, arguments.batch)
    before = high_water()
    times = []
    for _ in range(arguments.repeat + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        step(backbone, expert.with_values(values), images, arguments.way).square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    grown = high_water() - before
    size = sum(parameter.nbytes for parameter in backbone.parameters()) / 2**20
    print(grown / size, min(times[1:]))


def main() -> None:
    """Measure each kind of expert with each way of forming the weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="vit-b32")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--expert", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.expert:
        train(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_experts(argparse.Namespace(**vars(arguments), tasks=1, kinds=KINDS), Path(folder))
        first = None
        for kind in KINDS:
            for way in WAYS:
                own = ["--expert", str(Path(folder) / kind / "task0.safetensors"), "--way", way]
                output = subprocess.check_output([sys.executable, *sys.argv, *own], text=True)
                memory, seconds = map(float, output.split()[-2:])
                first = first or seconds
                print(f"{kind:9} {way:9} memory {memory:5.2f} × backbone, time {seconds / first:5.2f} ×", flush=True)


if __name__ == "__main__":
    main()
