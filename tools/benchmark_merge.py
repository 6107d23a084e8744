"""How long a merge takes and how much memory, against a plain streaming loop that reads, sums and writes.

    python tools/benchmark_merge.py                       # 0.1 B parameters, base + 4 models, bfloat16: about a minute
    python tools/benchmark_merge.py --layers 24 --width 1024 --models 8 --methods Ties PCBMerging

Every line is a process of its own, from its start to its end: imports, reads and the written checkpoint included. The
models are random and shaped like a Llama: an embedding, attention and MLP matrices, norms. `floor` is the least that
any merge has to do. Times are the best of `--repeat`; peak memory is the largest resident set, the bare `import torch`
being the first line.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = {
    "WeightAverage": "WeightAverage()",
    "TaskArithmetic": "TaskArithmetic(0.3)",
    "FRMerging": "FRMerging()",
    "FRMerging-uniform": "FRMerging(coefficients='uniform', scale=0.3)",
    "Ties": "Ties()",
    "Ties-tensor": "Ties(scope='tensor')",
    "PCBMerging": "PCBMerging()",
    "EMRMerging": "EMRMerging()",
    "Breadcrumbs": "Breadcrumbs()",
    "Dare-Ties": "Dare(Ties())",
    "IsoC": "IsoC()",
    "TSVMerge": "TSVMerge()",
}
SLOW = {"IsoC", "TSVMerge"}  # singular value decompositions: minutes

FLOOR = """
import json, struct, sys, torch
from safetensors import safe_open
output, base, *models = sys.argv[1:]
files = [safe_open(path, "pt") for path in (base, *models)]
names = list(files[0].keys())
with open(output, "wb") as out:
    header, offset = {}, 0
    for name in names:
        shape = files[0].get_slice(name).get_shape()
        size = torch.Size(shape).numel() * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    out.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        total = files[0].get_tensor(name).float()
        for file in files[1:]:
            total += file.get_tensor(name)
        out.write(memoryview((total / len(files)).bfloat16().view(torch.uint8).flatten().numpy()))
"""

OURS = """
import sys
from freemerge.merging import *
output, base, *models = sys.argv[1:]
merge(base, models, {method}, output=output, overwrite=True)
"""


def write_models(folder: Path, layers: int, width: int, vocabulary: int, models: int) -> list[str]:
    """Write a random base and fine-tuned models in bfloat16, and return their paths."""
    import torch

    from freemerge.checkpoints import save_checkpoint

    torch.manual_seed(0)
    shapes = {"embed.weight": (vocabulary, width)}
    for layer in range(layers):
        for name in "qkvo":
            shapes[f"layers.{layer}.attn.{name}.weight"] = (width, width)
        for name, shape in {"gate": (4 * width, width), "up": (4 * width, width), "down": (width, 4 * width)}.items():
            shapes[f"layers.{layer}.mlp.{name}.weight"] = shape
        shapes[f"layers.{layer}.norm.weight"] = (width,)
    base = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    paths = [str(folder / "base.safetensors")]
    save_checkpoint(paths[0], {name: tensor.bfloat16() for name, tensor in base.items()})
    for index in range(models):
        tuned = {name: (tensor + 0.002 * torch.randn_like(tensor)).bfloat16() for name, tensor in base.items()}
        paths.append(str(folder / f"model{index}.safetensors"))
        save_checkpoint(paths[-1], tuned)
    return paths


def measure(code: str, arguments: list[str], threads: int, repeat: int) -> tuple[float, float, float]:
    """Best wall seconds, their CPU seconds, and peak resident MiB of a process that runs `code`."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    best = (float("inf"), 0.0, 0.0)
    for _ in range(repeat):
        start = time.perf_counter()
        # The child of a child reports only itself: ru_maxrss of RUSAGE_CHILDREN is the largest of all so far.
        probe = (
            "import resource, subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True); "
            "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime, u.ru_maxrss / 1024)"
        )
        done = subprocess.run(
            [sys.executable, "-c", probe, code, *arguments], env=environment, check=True, capture_output=True, text=True
        )
        cpu, memory = map(float, done.stdout.split()[-2:])
        best = min(best, (time.perf_counter() - start, cpu, memory))
    return best


def main() -> None:
    """Write the models, run every method, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument(
        "--methods", nargs="*", default=[name for name in METHODS if name not in SLOW], choices=list(METHODS)
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--folder", default=None, help="where to put the models; default: a temporary folder")
    arguments = parser.parse_args()

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        paths = write_models(Path(folder), arguments.layers, arguments.width, arguments.vocabulary, arguments.models)
        size = os.path.getsize(paths[0]) / 2**20
        print(f"{size / 2 * 2**20 / 1e9:.2f} B parameters, {size:.0f} MiB each, base + {arguments.models}\n")
        print(f"{'':20} {'wall s':>8} {'CPU s':>8} {'× floor':>8} {'peak MiB':>9}")
        output = str(Path(folder) / "merged.safetensors")
        jobs = {"import torch": "import torch", "floor": FLOOR}
        jobs |= {name: OURS.format(method=METHODS[name]) for name in arguments.methods}
        floor = None
        for name, code in jobs.items():
            wall, cpu, memory = measure(code, [output, *paths], arguments.threads, arguments.repeat)
            floor = wall if name == "floor" else floor
            times = f"{wall / floor:8.1f}" if floor else " " * 8
            print(f"{name:20} {wall:8.2f} {cpu:8.2f} {times} {memory:9.0f}", flush=True)


if __name__ == "__main__":
    main()
