"""FR- and PCB-Merging against the arithmetic of their released implementations.

    python tools/benchmark_papers.py                        # ViT-B/32, eight models: needs 20 GB of memory
    python tools/benchmark_papers.py --models 4             # half of it
    python tools/benchmark_papers.py --large                # ViT-L/14, where `import torch` no longer counts: 70 GB
    python tools/benchmark_papers.py --large --layers 4     # its first layers: the same matrices, 12 GB
    python tools/benchmark_papers.py --small --repeat 1     # tries it out

The other side is a plain implementation of that arithmetic, written for this benchmark
(`benchmarks/programs/plain_papers.py`): full complex transforms of every task vector for FR, full sorts of the stacked
task vectors for PCB, all in memory. Both sides are whole processes that read the same files and write the same file;
runs are interleaved and medians taken; peak memory is without page cache (`benchmarks/processes.py`). The results
are compared: `difference` is the largest between the two merged models, `of` the largest change of the base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmark_merge import METHODS, merge_job, python
from benchmarks.compare import compare
from benchmarks.models import DEFAULT_FOLDER, small, vit, vit_large, write_case
from benchmarks.processes import Job, confine, median, program, read_into_cache, remove, run_all
from benchmarks.tables import Results, machine, met, mib

PAIRS = {  # our method → (the plain implementation, required speed-up)
    "FR, align": ("fr-align", 10.0),
    "FR, uniform": ("fr-uniform", 10.0),
    "PCB": ("pcb", 20.0),
}
MEMORY = 10.0  # required ratio of the plain implementation's peak memory to ours


def main() -> None:
    """Run both sides of every pair, compare their outputs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--large", action="store_true", help="ViT-L/14 instead of ViT-B/32")
    parser.add_argument("--layers", type=int, default=24, help="of ViT-L/14")
    parser.add_argument("--repeat", type=int, default=3, help="runs of every line; the median counts")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="tiny models of the same names")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the models are kept, 3.2 GB")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    confine(arguments.cores)

    case = vit_large(arguments.models, layers=arguments.layers) if arguments.large else vit(arguments.models)
    case = small(case) if arguments.small else case
    inputs = write_case(case, arguments.folder)
    read_into_cache(inputs.files)
    outputs = {
        (name, side): arguments.folder / f"{side}-{index}.safetensors"
        for index, name in enumerate(arguments.methods)
        for side in ("plain", "ours")
    }
    jobs = {}
    for name in arguments.methods:
        plain, ours = outputs[name, "plain"], outputs[name, "ours"]
        jobs[f"{name}, released arithmetic"] = Job(
            program("plain_papers", plain, PAIRS[name][0], inputs.base, *inputs.models), plain
        )
        jobs[name] = Job(python(merge_job(inputs, METHODS[name][0], ours)), ours)
    found = {name: median(runs) for name, runs in run_all(jobs, arguments.repeat).items()}

    results = Results(
        f"{case.title}: {case.parameters / 1e6:.0f} M parameters, base + {case.models} models",
        [
            "",
            "wall s",
            "CPU s",
            "faster",
            "limit",
            "kept",
            "peak MiB",
            "less memory",
            "limit",
            "kept",
            "difference",
            "of",
        ],
    )
    for name in arguments.methods:
        theirs, ours = found[f"{name}, released arithmetic"], found[name]
        results.add(f"{name}, released arithmetic", f"{theirs.wall:.2f}", f"{theirs.cpu:.2f}", *[""] * 3,
                    mib(theirs.peak), *[""] * 5)  # fmt: skip
        faster, less = theirs.wall / ours.wall, theirs.peak / ours.peak
        difference = compare(inputs.base, outputs[name, "plain"], outputs[name, "ours"])
        results.add(
            name,
            f"{ours.wall:.2f}",
            f"{ours.cpu:.2f}",
            f"{faster:.1f} ×",
            *met(faster, PAIRS[name][1], at_least=True),
            mib(ours.peak),
            f"{less:.1f} ×",
            *met(less, MEMORY, at_least=True),
            f"{difference.largest:.1e}",
            f"{difference.change:.1e}",
        )
    results.notes = [
        f"{machine(arguments.cores)}, median of {arguments.repeat} interleaved runs. Peak memory is that of the whole "
        "process, `import torch` included, without page cache."
    ]
    results.show(arguments.markdown)
    for path in outputs.values():
        remove(path)


if __name__ == "__main__":
    main()
