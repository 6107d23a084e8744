"""Compare mergekit and freemerge on the same merges: time, memory, and agreement of the results.

    python tools/benchmark_mergekit.py                            # Llama of 0.35 B, four models: about half an hour
    python tools/benchmark_mergekit.py --small --repeat 1         # tries it out
    python tools/benchmark_mergekit.py --venv ~/venvs/mergekit    # an environment with mergekit; created if missing

mergekit's newest release is installed into an environment of its own, once, with the torch that freemerge runs on. Both
sides read the same Hugging Face folders and write one; both compute in float32 and write bfloat16 (`--dtype bfloat16`
lets mergekit compute in bfloat16, which its users often do). Whole processes, interleaved, medians; peak memory without
page cache (`benchmarks/processes.py`). mergekit is run without a tokenizer to copy and without a model card, freemerge
without hashing its inputs, which mergekit does not do.

The arithmetic is the same for `linear` and for task arithmetic, where all values must agree up to the last rounding.
For the other methods it differs: DARE's masks are random, and among equal entries mergekit's TIES and Breadcrumbs keep
a fixed number per tensor, while freemerge keeps all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmark_merge import merge_job, python
from benchmarks.compare import compare
from benchmarks.models import DEFAULT_FOLDER, Inputs, llama, small, write_case
from benchmarks.processes import Job, confine, median, read_into_cache, remove, run_all
from benchmarks.tables import NO, YES, Results, machine, met, mib


class Pair(NamedTuple):
    """A merge as mergekit's configuration and as freemerge's method."""

    mergekit: str  # merge_method
    parameters: dict[str, float]  # of each model
    ours: dict[str, str]  # row → method
    faster: float | None  # required speed-up
    same: bool = False  # the same arithmetic


PAIRS = {
    "linear": Pair("linear", {"weight": 1.0}, {"WeightAverage": "WeightAverage()"}, 2.0, same=True),
    "task arithmetic": Pair(
        "task_arithmetic", {"weight": 0.3}, {"TaskArithmetic": "TaskArithmetic(0.3)"}, 2.0, same=True
    ),
    "DARE-TIES": Pair(
        "dare_ties", {"weight": 1.0, "density": 0.1}, {"Dare, Ties": "Dare(Ties(density=1.0), drop=0.9)"}, 5.0
    ),
    "TIES": Pair(
        "ties",
        {"weight": 1.0, "density": 0.2},
        {"Ties, tensor": "Ties(0.2, scope='tensor')", "Ties, model": "Ties(0.2)"},
        10.0,
    ),
    "Breadcrumbs": Pair(
        "breadcrumbs",
        {"weight": 0.3, "density": 0.143, "gamma": 0.007},
        {"Breadcrumbs": "Breadcrumbs(bottom=0.85, top=0.007, scale=0.3)"},
        None,
    ),
}


def install(venv: Path) -> Path:
    """The Python of an environment with mergekit, which is created if it is missing."""
    import torch

    interpreter = venv / "bin" / "python"
    if not interpreter.exists():
        print(f"making {venv}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    if not (venv / "bin" / "mergekit-yaml").exists():
        print("installing mergekit and its torch: some gigabytes, once", file=sys.stderr)
        wanted = ["mergekit", f"torch=={torch.__version__.partition('+')[0]}"]
        subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *wanted], check=True)
    return interpreter


def versions(interpreter: Path) -> str:
    """The versions installed there, for the table's notes."""
    code = (
        "from importlib.metadata import version; "
        "print(', '.join(f'{name} {version(name)}' for name in ('mergekit', 'torch', 'transformers')))"
    )
    done = subprocess.run([str(interpreter), "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def configuration(pair: Pair, inputs: Inputs, dtype: str) -> str:
    """mergekit's configuration of a merge; JSON is YAML."""
    models = [{"model": str(path), "parameters": pair.parameters} for path in inputs.models]
    table = {"merge_method": pair.mergekit, "models": models, "dtype": dtype, "out_dtype": "bfloat16"}
    if pair.mergekit != "linear":
        table["base_model"] = str(inputs.base)
    return json.dumps(table, indent=2)


def main() -> None:
    """Run both sides of every pair, compare their outputs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that mergekit computes in")
    parser.add_argument(
        "--options", nargs="*", default=[], help="further options of mergekit-yaml, without their dashes"
    )
    parser.add_argument("--venv", type=Path, help="mergekit's environment; default: in the folder")
    parser.add_argument("--repeat", type=int, default=3, help="runs of every line; the median counts")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="tiny models of the same names")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the models are kept, 3.5 GB")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    interpreter = install((arguments.venv or arguments.folder / "mergekit-venv").absolute())
    confine(arguments.cores)

    case = small(llama()) if arguments.small else llama()
    inputs = write_case(case, arguments.folder)
    read_into_cache(inputs.files)
    jobs: dict[str, Job] = {}
    for name in arguments.methods:
        pair = PAIRS[name]
        stem = arguments.folder / f"mergekit-{pair.mergekit}"
        stem.with_suffix(".yaml").write_text(configuration(pair, inputs, arguments.dtype))
        options = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card", "--random-seed", "0"]
        options += [f"--{option}" for option in arguments.options]
        command = [interpreter.with_name("mergekit-yaml"), stem.with_suffix(".yaml"), stem, *options]
        jobs[f"{name}, mergekit"] = Job(command, stem, environment={"PYTHONPATH": ""})
        for row, method in pair.ours.items():
            output = arguments.folder / f"freemerge-{len(jobs)}"
            jobs[row] = Job(python(merge_job(inputs, method, output)), output)
    found = {name: median(runs) for name, runs in run_all(jobs, arguments.repeat).items()}

    results = Results(
        f"{case.title}: {case.parameters / 1e6:.0f} M parameters, base + {case.models} models",
        ["", "wall s", "CPU s", "faster", "limit", "kept", "peak MiB", "of theirs", "limit", "kept", "beyond", "agree"],
    )
    for name in arguments.methods:
        pair, theirs = PAIRS[name], found[f"{name}, mergekit"]
        times = f"{theirs.wall:.2f}", f"{theirs.cpu:.2f}"
        results.add(f"{name}, mergekit", *times, "", "", "", mib(theirs.peak), "", "", "", "", "")
        for row in pair.ours:
            ours = found[row]
            faster, memory = theirs.wall / ours.wall, ours.peak / theirs.peak
            difference = compare(inputs.base, jobs[f"{name}, mergekit"].output, jobs[row].output)
            results.add(
                row,
                f"{ours.wall:.2f}",
                f"{ours.cpu:.2f}",
                f"{faster:.1f} ×",
                *met(faster, pair.faster, at_least=True),
                mib(ours.peak),
                f"{memory:.2f}",
                *met(memory, 1.0),
                f"{100 * difference.beyond:.2f} %",
                (YES if difference.beyond == 0 else NO) if pair.same and arguments.dtype == "float32" else "",
            )
    results.notes = [
        f"{versions(interpreter)}; mergekit computes in {arguments.dtype}. {machine(arguments.cores)}, median of "
        f"{arguments.repeat} interleaved runs. Peak memory without page cache and mapped files.",
        "`beyond`: values of the two results that are further apart than one rounding step; `agree`: none are, where "
        "the arithmetic is the same.",
    ]
    results.show(arguments.markdown)
    for job in jobs.values():
        remove(job.output)
    for name in arguments.methods:
        remove(arguments.folder / f"mergekit-{PAIRS[name].mergekit}.yaml")


if __name__ == "__main__":
    main()
