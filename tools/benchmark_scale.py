"""Memory and time against model size: merges of 1, 2, 4 and 7 B parameters.

    python tools/benchmark_scale.py                              # 17 GB of disk at most; about half an hour
    python tools/benchmark_scale.py --sizes 1 2 --methods Ties
    python tools/benchmark_scale.py --small --repeat 1           # tries it out

The models are Llamas of width 4096 in bfloat16, base and two fine-tuned models. Only an embedding, one layer and a head
of each are on the disk (2.7 GB in all). A larger model has the same tensors again: its layers 1, 2, … are read, byte by
byte and as often as a method asks, from the files of layer 0 (`benchmarks/programs/merge_repeated.py`), so the inputs
come from the page cache. The output is complete: a folder of shards of up to 14 GB, removed after each run.

Whole processes, interleaved, medians; peak memory without page cache (`benchmarks/processes.py`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from benchmark_merge import IMPORT_TORCH, METHODS
from benchmarks.models import DEFAULT_FOLDER, llama, write_case
from benchmarks.processes import Job, confine, median, program, read_into_cache, remove, run_all
from benchmarks.tables import Results, machine, mib


def slope(sizes: list[float], values: list[float]) -> tuple[float, float]:
    """Least squares: the growth of `values` per unit of `sizes`, and the fraction of variance explained (r²)."""
    x, y = sum(sizes) / len(sizes), sum(values) / len(values)
    spread = sum((size - x) ** 2 for size in sizes)
    grows = sum((size - x) * (value - y) for size, value in zip(sizes, values, strict=True)) / spread
    left = sum((value - y - grows * (size - x)) ** 2 for size, value in zip(sizes, values, strict=True))
    whole = sum((value - y) ** 2 for value in values)
    return grows, 1 - left / whole if whole else 1.0


def main() -> None:
    """Write the layer, merge models of each size, print the table and the fits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 2, 4, 7], help="in B parameters")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["TaskArithmetic", "Ties", "PCB"])
    parser.add_argument("--repeat", type=int, default=1, help="runs of every line; the median counts")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="layers of width 256, and a thousandth of the sizes")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where models and outputs are kept")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    confine(arguments.cores)

    case = llama(2, layers=1, width=256, vocabulary=1000) if arguments.small else llama(2, layers=1, width=4096)
    around = llama(
        2, layers=0, width=case.shapes["model.norm.weight"][0], vocabulary=case.config["vocab_size"]
    ).parameters
    layer = case.parameters - around
    unit = 1e6 if arguments.small else 1e9
    layers = {size: max(1, round((size * unit - around) / layer)) for size in sorted(set(arguments.sizes))}
    parameters = {size: (around + count * layer) / unit for size, count in layers.items()}

    arguments.folder.mkdir(parents=True, exist_ok=True)
    needed = 2 * unit * max(parameters.values()) + 6 * case.parameters + 2e9
    free = shutil.disk_usage(arguments.folder).free
    if free < needed:
        raise SystemExit(
            f"error: {arguments.folder} has {free / 1e9:.0f} GB free, and {needed / 1e9:.0f} GB are needed"
        )
    inputs = write_case(case, arguments.folder)
    read_into_cache(inputs.files)
    output = arguments.folder / "scale"
    jobs = {"import torch": Job(IMPORT_TORCH)}
    for name in arguments.methods:
        for size, count in layers.items():
            job = {
                "base": str(inputs.base),
                "models": [str(path) for path in inputs.models],
                "layers": count,
                "method": METHODS[name][0],
                "output": str(output),
            }
            jobs[f"{name} {size:g}"] = Job(program("merge_repeated", json.dumps(job)), output)
    found = {name: median(runs) for name, runs in run_all(jobs, arguments.repeat).items()}
    remove(output)

    letter = "M" if arguments.small else "B"
    bare = found["import torch"]
    results = Results(
        "Merges of growing models: Llamas of one width, bfloat16, base + 2 models",
        ["", f"{letter} parameters", "wall s", "CPU s", f"s per {letter}", "peak MiB", "over import"],
    )
    results.add("import torch", "", f"{bare.wall:.2f}", f"{bare.cpu:.2f}", "", mib(bare.peak), "")
    for name in arguments.methods:
        runs = [found[f"{name} {size:g}"] for size in layers]
        for size, usage in zip(layers, runs, strict=True):
            each = (usage.wall - bare.wall) / parameters[size]
            results.add(
                name,
                f"{parameters[size]:.2f}",
                f"{usage.wall:.1f}",
                f"{usage.cpu:.1f}",
                f"{each:.2f}",
                mib(usage.peak),
                f"{(usage.peak - bare.peak) / case.largest:.2f}",
            )
        if len(runs) > 1:
            seconds, straight = slope(list(parameters.values()), [usage.wall for usage in runs])
            memory, _ = slope(list(parameters.values()), [usage.peak / 2**20 for usage in runs])
            results.notes.append(
                f"{name}: {seconds:.2f} s per {letter} parameters (r² {straight:.4f}); {memory:+.1f} MiB of memory per "
                f"{letter} parameters, whose inputs have {6 * unit / 2**20:,.0f} MiB."
            )
    results.notes += [
        f"{machine(arguments.cores)}, median of {arguments.repeat} interleaved runs. `over import` in units of the "
        f"largest tensor in float32 ({mib(case.largest)} MiB).",
    ]
    results.show(arguments.markdown)


if __name__ == "__main__":
    main()
