"""Time and memory of a merge, compared with the minimum that any merge needs.

    python tools/benchmark_merge.py                        # both cases, all parts: about a quarter of an hour
    python tools/benchmark_merge.py --case vit --methods Ties PCB --repeat 5
    python tools/benchmark_merge.py --small --repeat 1     # tries it out, in minutes
    python tools/benchmark_merge.py --device cuda          # a GPU's rows as well, skipped where there is none
    python tools/benchmark_merge.py --device cuda --parts device   # only merges of models in its memory

Two cases: the vision tower of CLIP ViT-B/32 (88 M parameters, float32) with eight fine-tuned models, and a Llama of
0.35 B (bfloat16, shards with an index) with four. The models are random with the statistics of real ones
(`benchmarks/models.py`), written once and reused.

Every line is a whole process, imports and the written output included, on two cores; medians over interleaved runs,
with the inputs in the page cache; peak memory without it (`benchmarks/processes.py`). `floor` is a script that reads
all models with safetensors, forms base + c·Σ(delta) and writes it (`benchmarks/programs/floor.py`); times are given as
multiples of it. `floor, synced` also waits until its output is on the disk, as freemerge always does. The limits are
the project's own aims; `kept` says whether they are met.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.models import DEFAULT_FOLDER, Case, Inputs, llama, small, vit, write_case, write_tiny_tensors
from benchmarks.processes import (
    Job,
    Usage,
    confine,
    drop_from_cache,
    median,
    program,
    read_into_cache,
    remove,
    run_all,
)
from benchmarks.tables import Results, machine, met, mib

METHODS = {  # name → (method, largest multiple of the floor)
    "TaskArithmetic": ("TaskArithmetic(0.3)", 1.2),
    "WeightAverage": ("WeightAverage()", None),
    "FR, align": ("FRMerging()", 4.0),
    "FR, mean": ("FRMerging(coefficients='mean')", 1.6),
    "FR, uniform": ("FRMerging(coefficients='uniform', scale=0.3)", 1.6),
    "Ties": ("Ties()", 3.0),
    "Ties, tensor": ("Ties(scope='tensor')", 3.0),
    "PCB": ("PCBMerging()", 5.0),
    "FR, PCB": ("PCBMerging(filter=NyquistDisc())", None),
    "Dare, Ties": ("Dare(Ties())", None),
    "Breadcrumbs": ("Breadcrumbs()", None),
    "EMR": ("EMRMerging()", None),
    "TSV": ("TSVMerge()", 8.0),
    "IsoC": ("IsoC()", 8.0),
    "IsoCTS": ("IsoCTS()", 8.0),
    "ACE": ("ACEMerging()", 8.0),
    "balanced": ("BalancedMerging()", None),
    "WUDI": ("WUDIMerging()", None),
}
SLOW = {
    "TSV",
    "IsoC",
    "IsoCTS",
    "ACE",
    "balanced",
    "WUDI",
    "FR, PCB",
}  # spectra and covariances of weights; five passes of K transforms: minutes
FIRST_TENSOR = 1.0  # seconds over `import torch`
PLANNING = 1.0  # seconds for 4 000 tensors × 5 models
MEMORY = 6  # the peak may be K + 6 of the largest tensor in float32 over `import torch`
PARTS = ("merge", "start", "planning", "device")

IMPORT_TORCH = [sys.executable, "-c", "import torch, time; print('first', time.monotonic())"]


def merge_job(inputs: Inputs, method: str, output: Path, **options: object) -> dict[str, object]:
    """The argument of `programs/merge_models.py`."""
    options = {"overwrite": True, "hash_inputs": False, **options}
    paths = [str(path) for path in inputs.models]
    return {"base": str(inputs.base), "models": paths, "method": method, "output": str(output), "options": options}


def python(job: dict[str, object]) -> list[str]:
    """A merge from Python."""
    return program("merge_models", json.dumps(job))


def command_line(inputs: Inputs, output: Path) -> list[str]:
    """The arguments of `python -m freemerge merge` for task arithmetic."""
    finetuned = json.dumps([str(path) for path in inputs.models])
    arguments = ["--base", str(inputs.base), "--finetuned", finetuned, "--output", str(output), "--overwrite", "true"]
    return [*arguments, "--hash_inputs", "false", "--method", "TaskArithmetic", "--method.scale", "0.3"]


def merges(case: Case, inputs: Inputs, arguments: argparse.Namespace) -> Results:
    """The table of one case: every method against the floor."""
    output = arguments.folder / ("merged" if case.config else "merged.safetensors")
    cat = ["sh", "-c", 'cat "$@" > /dev/null', "cat", *map(str, inputs.files)]
    floor = program("floor", output, inputs.base, *inputs.models)
    jobs = {
        "import torch": Job(IMPORT_TORCH),
        "cat inputs, cold": Job(cat, before=lambda: drop_from_cache(inputs.files)),
        "cat inputs": Job(cat, before=lambda: read_into_cache(inputs.files)),
        "floor": Job(floor, output),
        "floor, synced": Job([*floor, "--sync"], output),
    }
    limits: dict[str, float | None] = {}
    for name in arguments.methods:
        text, limits[name] = METHODS[name]
        jobs[name] = Job(python(merge_job(inputs, text, output)), output)
        if name == "TaskArithmetic":
            command = "TaskArithmetic, command"
            jobs[command] = Job([sys.executable, "-m", "freemerge", "merge", *command_line(inputs, output)], output)
            limits[command] = limits[name]
            if case.config:
                hashed = merge_job(inputs, text, output, hash_inputs=True)
                jobs["TaskArithmetic, hashes"] = Job(python(hashed), output)
        if arguments.device != "cpu":
            job = merge_job(inputs, text, output, device=arguments.device)
            jobs[f"{name}, {arguments.device}"] = Job(python(job), output)
    found = {name: median(runs) for name, runs in run_all(jobs, arguments.repeat).items()}
    remove(output)

    floor_time, bare = found["floor"].wall, found["import torch"].peak
    results = Results(
        f"{case.title}: {case.parameters / 1e6:.0f} M parameters, base + {case.models} models",
        ["", "wall s", "CPU s", "× floor", "limit", "kept", "peak MiB", "over import", "limit", "kept"],
    )
    moved = inputs.bytes * (case.models + 2) / (case.models + 1)
    for name, usage in found.items():
        ours = name in limits or name.startswith("TaskArithmetic")
        over = (usage.peak - bare) / case.largest
        times = ("",) * 3
        if name.startswith("floor") or ours:
            ratio = usage.wall / floor_time
            times = (f"{ratio:.2f}", *met(ratio, limits.get(name)))
        memory = ("",) * 3
        if name.startswith("floor") or ours:
            memory = (f"{over:.1f}", *met(over, case.models + MEMORY if ours else None))
        results.add(name, f"{usage.wall:.2f}", f"{usage.cpu:.2f}", *times, mib(usage.peak), *memory)
    results.notes = [
        f"Inputs {mib(inputs.bytes)} MiB, in the page cache; for `cold` their pages were dropped with posix_fadvise (a "
        f"virtual machine's host may still have them). {machine(arguments.cores)}, median of {arguments.repeat} "
        f"interleaved runs. Inputs and output together at the floor's pace: {moved / floor_time / 1e9:.2f} GB/s.",
        f"`over import`: peak memory over that of `import torch`, in units of the largest tensor in float32 "
        f"({case.largest / 2**20:.1f} MiB); the limit is K + {MEMORY}. Page cache and mapped files are not counted.",
    ]
    if case.config:
        results.notes.append("`hashes`: with the inputs' hashes in freemerge.json, the default for folders.")
    return results


def start(case: Case, inputs: Inputs, arguments: argparse.Namespace) -> Results:
    """From the start of the process to the first merged tensor, over `import torch`."""
    output = arguments.folder / "first.safetensors"
    text = METHODS["TaskArithmetic"][0]
    jobs = {
        "import torch": Job(IMPORT_TORCH),
        "merge() from Python": Job(
            program("first_tensor", "python", json.dumps(merge_job(inputs, text, output))), output
        ),
        "python -m freemerge merge": Job(program("first_tensor", "command", *command_line(inputs, output)), output),
    }
    found = run_all(jobs, max(arguments.repeat, 3))
    remove(output)
    results = Results(
        f"Start to first merged tensor, {case.title}, task arithmetic",
        ["", "s", "over import torch, s", "limit", "kept"],
    )
    seconds = {name: sorted(map(until_first, runs))[len(runs) // 2] for name, runs in found.items()}
    for name, value in seconds.items():
        over = value - seconds["import torch"]
        limit = None if name == "import torch" else FIRST_TENSOR
        results.add(name, f"{value:.2f}", "" if limit is None else f"{over:.2f}", *met(over, limit))
    return results


def until_first(usage: Usage) -> float:
    """Seconds from the start of a process to the line `first <time.monotonic()>` that it printed."""
    line = next(line for line in usage.printed.splitlines() if line.startswith("first "))
    return float(line.split()[1]) - usage.started


def planning(arguments: argparse.Namespace) -> Results:
    """Time of planning against the number of tensors."""
    results = Results(
        "Planning a merge of tiny tensors, base + 5 models",
        ["tensors", "open s", "plan s", "both s", "limit", "kept", "μs per tensor and model"],
    )
    for count in (4000, 8000, 16_000):
        inputs = write_tiny_tensors(count, 5, arguments.folder)
        job = Job(program("planning", inputs.base, *inputs.models))
        runs = run_all({f"planning {count} tensors": job}, max(arguments.repeat, 3))
        times = [tuple(map(float, usage.printed.split())) for usage in next(iter(runs.values()))]
        opening, plan = sorted(times, key=sum)[len(times) // 2]
        limit = PLANNING if count == 4000 else None
        cells = met(opening + plan, limit)
        each = 1e6 * (opening + plan) / count / 6
        results.add(f"{count:,}", f"{opening:.3f}", f"{plan:.3f}", f"{opening + plan:.3f}", *cells, f"{each:.1f}")
        shutil.rmtree(inputs.base.parent)
    return results


def on_device(case: Case, arguments: argparse.Namespace) -> Results:
    """Merges of models in the device's memory, in GB/s."""
    methods = {name: METHODS[name][0] for name in arguments.methods}
    job = {
        "case": case.name.partition("-")[0],
        "small": arguments.small,
        "methods": methods,
        "device": arguments.device,
        "repeat": max(arguments.repeat, 3),
    }
    done = subprocess.run(program("on_device", json.dumps(job)), check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    results = Results(f"In the memory of {arguments.device}: {case.title}", ["", "s", "GB/s", "of a copy"])
    results.add("copy within the device", "", f"{found['copy']:.1f}", "1.00")
    for name, seconds in found["seconds"].items():
        speed = found["bytes"] / seconds / 1e9
        results.add(name, f"{seconds:.4f}", f"{speed:.1f}", f"{speed / found['copy']:.2f}")
    results.notes = ["GB/s of all bytes of the inputs, read once, and of the output; the copy's, read and written."]
    return results


def device_is_there(device: str) -> bool:
    """Whether torch has the device and `merge` accepts one; prints what is missing."""
    code = (
        "import inspect, sys, torch; from freemerge.merging import merge; "
        "print('merge takes no device yet' if 'device' not in inspect.signature(merge).parameters else "
        "'' if torch.device(sys.argv[1]).type == 'cpu' or torch.cuda.is_available() else 'there is no GPU')"
    )
    done = subprocess.run([sys.executable, "-c", code, device], check=True, stdout=subprocess.PIPE, text=True)
    if missing := done.stdout.strip():
        print(f"--device {device}: {missing}; its rows are skipped\n", file=sys.stderr)
    return not missing


def main() -> None:
    """Write the models, run every job, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=("vit", "llama", "both"), default="both")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all but the slow ones")
    parser.add_argument("--slow", action="store_true", help=f"also {' and '.join(sorted(SLOW))}, which take minutes")
    parser.add_argument("--repeat", type=int, default=3, help="runs of every line; the median counts")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="for example cuda: rows for this device as well")
    parser.add_argument("--small", action="store_true", help="tiny models of the same names")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the models are kept, 7 GB")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    arguments.methods = arguments.methods or [name for name in METHODS if arguments.slow or name not in SLOW]
    confine(arguments.cores)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.device != "cpu" and not device_is_there(arguments.device):
        arguments.device = "cpu"

    for case in (vit(), llama()):
        if not case.name.startswith(arguments.case) and arguments.case != "both":
            continue
        case = small(case) if arguments.small else case
        if "device" in arguments.parts and arguments.device != "cpu":
            on_device(case, arguments).show(arguments.markdown)
        if not {"merge", "start"} & set(arguments.parts):
            continue
        inputs = write_case(case, arguments.folder)
        if "merge" in arguments.parts:
            merges(case, inputs, arguments).show(arguments.markdown)
        if "start" in arguments.parts:
            start(case, inputs, arguments).show(arguments.markdown)
    if "planning" in arguments.parts:
        planning(arguments).show(arguments.markdown)


if __name__ == "__main__":
    main()
