"""CPU time of the methods that decompose matrices, for one matrix of each shape of ViT-B.

    python tools/benchmark_matrices.py                        # one thread, eight models: about a minute
    python tools/benchmark_matrices.py --methods TSV --repeat 5

One matrix without files, processes and imports, in seconds of one thread: other processes disturb that little.
A ViT-B/32 has 48 matrices of 768 × 768, 12 of 3072 × 768 and 13 of 768 × 3072. The matrices are random with heavy
tails, so that their spectra fall slowly, which is the hardest case.
"""

from __future__ import annotations

import argparse
import time

import torch
from benchmark_merge import METHODS
from benchmarks.tables import Results

from freemerge import merging

SHAPES = {(768, 768): 48, (3072, 768): 12, (768, 3072): 13}  # shape → how many a ViT-B/32 has
NAMES = ("TSV", "IsoC", "IsoCTS", "ACE", "balanced", "WUDI")


def draw(shape: tuple[int, int], models: int) -> list[dict[str, torch.Tensor]]:
    """Task vectors of one matrix, normal × log-normal, each larger than the one before."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(models):
        tails = torch.randn(shape, generator=generator).mul_(0.7).exp_()
        found.append({"fc.weight": torch.randn(shape, generator=generator).mul_(tails).mul_(3e-4 * 1.3**index)})
    return found


def seconds(method: merging.MergeMethod, vectors: list[dict[str, torch.Tensor]], repeat: int) -> float:
    """The least CPU seconds of several merges."""
    least = float("inf")
    for _ in range(repeat):
        started = time.process_time()
        merging.merge_task_vectors(vectors, method)
        least = min(least, time.process_time() - started)
    return least


def main() -> None:
    """Measure every method on every shape, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES[:-1]))
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=2, help="merges of every matrix; the fastest counts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    headings = [f"{rows} × {columns}, s" for rows, columns in SHAPES]
    results = Results(f"CPU time of one matrix, {arguments.models} models", ["", *headings, "all of ViT-B/32, s"])
    drawn = {shape: draw(shape, arguments.models) for shape in SHAPES}
    for name in arguments.methods:
        method = eval(METHODS[name][0], vars(merging))
        found = {shape: seconds(method, drawn[shape], arguments.repeat) for shape in SHAPES}
        whole = sum(count * found[shape] for shape, count in SHAPES.items())
        results.add(name, *(f"{value:.2f}" for value in found.values()), f"{whole:.1f}")
    results.show(arguments.markdown)


if __name__ == "__main__":
    main()
