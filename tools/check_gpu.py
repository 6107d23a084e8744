"""Run fits, callbacks and merges under every strategy, on the available devices.

    python tools/check_gpu.py                        # everything; rows that need a GPU are skipped where there is none
    python tools/check_gpu.py --only cpu-ddp gpu-ddp

Every case runs in its own process (plus one for each further rank): it fine-tunes a small network with all callbacks
that its strategy allows, and compares their files with the result of one process on the same weights. Prints a table;
the exit code is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "callbacks")]
TIMEOUT = 300  # seconds for a case


@dataclass(frozen=True)
class Case:
    """One fit; or merges where `strategy` is "merge", or routed models where it is "free".

    Args:
        name: its name on the command line.
        strategy: the Trainer's.
        accelerator: "cpu" or "cuda".
        ranks: how many devices; 0 for all GPUs.
        precision: the Trainer's.
    """

    name: str
    strategy: str
    accelerator: str
    ranks: int = 1
    precision: str = "32-true"

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only its part of the weights."""
        return self.strategy in ("fsdp", "model_parallel")


CASES = [
    Case("cpu-single", "auto", "cpu"),
    Case("cpu-bf16", "auto", "cpu", precision="bf16-mixed"),
    Case("cpu-ddp", "ddp", "cpu", 2),
    Case("cpu-spawn", "ddp_spawn", "cpu", 2),
    Case("cpu-model-parallel", "model_parallel", "cpu", 2),
    Case("gpu-single", "auto", "cuda"),
    Case("gpu-bf16", "auto", "cuda", precision="bf16-mixed"),
    Case("gpu-ddp", "ddp", "cuda", 0),
    Case("gpu-spawn", "ddp_spawn", "cuda", 0),
    Case("gpu-fsdp", "fsdp", "cuda", 0),
    Case("gpu-model-parallel", "model_parallel", "cuda", 0),
    Case("gpu-ddp-bf16", "ddp", "cuda", 0, "bf16-mixed"),
    Case("gpu-model-parallel-bf16", "model_parallel", "cuda", 0, "bf16-mixed"),
    Case("gpu-merge", "merge", "cuda"),
    Case("gpu-free", "free", "cuda"),
    Case("gpu-free-bf16", "free", "cuda", precision="bf16-mixed"),
]


def run_case(case: Case, folder: Path) -> None:
    """Run one case and write `results.json`: check → "ok" or the error."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if case.strategy in ("merge", "free"):
        from check_gpu_models import free_checks, merge_checks

        narrow = case.precision != "32-true"
        merges = case.strategy == "merge"
        checks = merge_checks(case.accelerator, folder) if merges else free_checks(case.accelerator, narrow)
        results = dict(attempt(*check) for check in checks)
    else:
        fit(case, folder)
        if int(os.environ.get("LOCAL_RANK", 0)) != 0:
            return  # another rank, started by Lightning
        results = dict(attempt(*check) for check in fit_checks(case, folder))
    (folder / "results.json").write_text(json.dumps(results))


def attempt(name: str, check) -> tuple[str, str]:
    """A check's name, and "ok" or the error that it raised."""
    try:
        check()
    except Exception as error:
        return name, f"{type(error).__name__}: {error}"
    return name, "ok"


def fit(case: Case, folder: Path) -> None:
    """Fine-tune with all callbacks that the strategy allows."""
    import check_gpu_project as parts
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy

    from freemerge.checkpoints import save_checkpoint
    from freemerge.merging import FRMerging
    from freemerge_callbacks import MergeAtFitEnd, MergePreview, MultiTaskEvaluation, TaskCheckpoint

    L.seed_everything(0, verbose=False)
    base, other = str(folder / "base.safetensors"), str(folder / "other.safetensors")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        save_checkpoint(base, parts.make_backbone().state_dict())
        save_checkpoint(other, parts.make_finetuned())
    heads, loaders = parts.make_heads(), parts.make_loaders()
    merger = MergeAtFitEnd(FRMerging(), [other], str(folder / "merged.safetensors"))
    callbacks = [
        parts.DriftApart(),
        TaskCheckpoint(str(folder / "task.safetensors"), task="a", head=None),
        merger,
        MergeAtFitEnd(FRMerging(), [other], str(folder / "best.safetensors"), weights="best"),
        ModelCheckpoint(dirpath=folder / "checkpoints", monitor="age", mode="max"),  # the last is the best
        parts.SaveWeights(str(folder / "trained.pt")),
    ]
    if not case.sharded:
        preview = MergePreview(FRMerging(), base, [other], loaders, heads=heads)
        callbacks += [preview, MultiTaskEvaluation(loaders, heads=heads, merged=merger)]
    trainer = L.Trainer(
        accelerator=case.accelerator,
        devices=case.ranks or torch.cuda.device_count(),
        strategy=ModelParallelStrategy() if case.strategy == "model_parallel" else case.strategy,
        precision=case.precision,
        callbacks=[*callbacks, parts.SaveResults(str(folder / "results")), parts.LeaveTogether()],
        max_epochs=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        parts.Sharded() if case.strategy == "model_parallel" else parts.Small(),
        parts.make_loader(61),
        parts.make_loader(16),
    )


def fit_checks(case: Case, folder: Path) -> Iterator[tuple]:
    """The checks after a fit."""
    import check_gpu_project as parts
    import torch

    from freemerge.checkpoints import hash_tensors, load_checkpoint, read_record
    from freemerge.merging import FRMerging, merge

    base = load_checkpoint(folder / "base.safetensors")
    trained = torch.load(folder / "trained.pt", weights_only=True)

    def trained_at_all() -> None:
        assert any(not torch.equal(trained[name], base[name]) for name in base), "the weights did not change"

    def identical() -> None:
        models = {"own": trained, "other": folder / "other.safetensors"}
        merge(base, models, FRMerging(), output=folder / "one.safetensors", overwrite=True)
        one, several = ((folder / f"{name}.safetensors").read_bytes() for name in ("one", "merged"))
        assert one == several, "the merged file differs from that of one process"

    def shared() -> None:
        found = [torch.load(path, weights_only=True)["ranks"] for path in sorted(folder.glob("results.[0-9]*"))]
        assert found == [len(found)] * len(found), f"{len(found)} ranks, and {found} of them shared the merge"

    def best() -> None:
        last, best = ((folder / f"{name}.safetensors").read_bytes() for name in ("merged", "best"))
        assert last == best, "the weights of the checkpoint are not those that the fit ended with"

    def recorded() -> None:
        assert read_record(folder / "task.safetensors").base_hash == hash_tensors(base), "another hash of the base"
        kept = load_checkpoint(folder / "task.safetensors")
        assert all(torch.equal(kept[f"backbone.{name}"], trained[name]) for name in base), "other weights"

    def exact() -> None:
        backbone = parts.make_backbone().eval()
        backbone.load_state_dict(load_checkpoint(folder / "merged.safetensors"))
        heads, files = parts.make_heads(), sorted(folder.glob("results.[0-9]*"))
        # On another device or in another precision, a sample may fall on the other side of a decision boundary.
        slack = 0 if (case.accelerator, case.precision) == ("cpu", "32-true") else 1
        for path in files:
            found = torch.load(path, weights_only=True)
            for name, results in ((name, found[name]) for name in ("MultiTaskEvaluation", "MergePreview")):
                for task, loader in parts.make_loaders().items():
                    right = sum(int((heads[task](backbone(x)).argmax(1) == y).sum()) for x, y in loader)
                    count = results[task] * parts.SIZES[task]
                    assert abs(count - round(count)) < 1e-3, f"{name}: {task}: {count} samples"
                    assert abs(count - right) < slack + 1e-3, f"{name}: {task}: {count:.0f} right, expected {right}"

    yield "trains", trained_at_all
    yield "merged file = one process's", identical
    yield "merge shared by all ranks", shared
    yield "merged from ModelCheckpoint", best
    yield "task file, hash of the base", recorded
    if not case.sharded:
        yield "metrics exact", exact


def run(case: Case) -> tuple[dict[str, str], float]:
    """Run a case in processes of its own: its results, and seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="check_gpu.") as folder:
        command = [sys.executable, __file__, "--case", case.name, "--folder", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            said = f"not done after {TIMEOUT} s"
        path = Path(folder) / "results.json"
        results = json.loads(path.read_text()) if path.exists() else {"runs": said}
    return results, time.monotonic() - began


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="some of the cases")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(next(case for case in CASES if case.name == arguments.case), arguments.folder)
        return 0

    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    gpus = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(gpus)}))
    title = f"torch {torch.__version__}, {gpus or 'no'} GPU{'s' * (gpus > 1)} {names}".strip()
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("check", "strategy", "devices", "precision", "result"):
        table.add_column(column, overflow="fold")
    table.add_column("seconds", justify="right")
    failed = False
    with Console(stderr=True).status("") as status:
        for case in CASES:
            if arguments.only and case.name not in arguments.only:
                continue
            status.update(case.name)
            devices = f"{case.ranks or gpus} × {case.accelerator}"
            about = [case.strategy, devices, case.precision]
            if case.accelerator == "cuda" and not gpus:
                table.add_row("all", case.strategy, "cuda", case.precision, "skipped: no GPU", "")
                continue
            results, seconds = run(case)
            for index, (check, result) in enumerate(results.items()):
                failed |= result != "ok"
                colour = "green" if result == "ok" else "red"
                table.add_row(check, *about, f"[{colour}]{result}", f"{seconds:.1f}" if index == 0 else "")
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
