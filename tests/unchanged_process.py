"""Use the library as another program would, and print what changed in the process, as JSON.

python tests/unchanged_process.py merges|callbacks|models FOLDER
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch


def mapped() -> bool:
    """Whether the C library still allocates 31 MiB from the system: a merge must not change this setting."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    start = library.malloc(31 << 20)  # kept: freeing it would change the threshold
    heap = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
    low, high = (int(end, 16) for end in heap.split()[0].split("-"))
    return not low <= start < high


def state() -> dict[str, Any]:
    """All state of a process that a library might change."""
    mask = os.umask(0)
    os.umask(mask)
    return {
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "umask": mask,
        "signal handlers": {str(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "hooks": repr((sys.excepthook, sys.unraisablehook, sys.gettrace(), sys.stdout, sys.stderr)),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "warnings": repr((warnings.filters, warnings.showwarning)),
        "logging": {
            name: (logger.level, logger.disabled, logger.propagate, len(logger.handlers), len(logger.filters))
            for name, logger in logging.root.manager.loggerDict.items()
            if isinstance(logger, logging.Logger)
        },
        "root logger": (logging.root.level, len(logging.root.handlers), logging.root.manager.disable),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "precision": (torch.get_float32_matmul_precision(), str(torch.get_default_dtype()), torch.is_grad_enabled()),
        "random numbers": (torch.get_rng_state().tolist(), repr(np.random.get_state()), repr(random.getstate())),  # noqa: NPY002
        "allocator": mapped() if sys.platform == "linux" else None,
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The values that differ; new loggers are ignored."""
    found = []
    for name, value in before.items():
        now = after[name]
        if name == "logging":
            now = {each: level for each, level in now.items() if each in value}
        if now != value:
            found.append(name if name == "random numbers" else f"{name}: {value} → {now}")
    return found


def watch(report: dict[str, list[str]], what: str, action: Callable[[], Any]) -> Any:
    before = state()
    result = action()
    report[what] = changes(before, state())
    return result


def merges(folder: Path) -> dict[str, list[str]]:
    from freemerge import merge, merging
    from freemerge.checkpoints import save_checkpoint

    report: dict[str, list[str]] = {}
    base = {f"{layer}.weight": torch.randn(300, 200) for layer in range(4)}
    models = [{name: tensor + torch.randn_like(tensor) for name, tensor in base.items()} for _ in range(2)]
    for index, tensors in enumerate([base, *models]):
        save_checkpoint(folder / f"{index}.safetensors", tensors)
    files = [folder / f"{index}.safetensors" for index in range(3)]
    for method in (merging.FRMerging(), merging.PCBMerging(), merging.Ties(), merging.TSVMerge(), merging.IsoC()):
        name = type(method).__name__
        output = folder / f"{name}.safetensors"
        watch(report, f"{name} of files", partial(merge, files[0], files[1:], method, output=output))
        watch(report, f"{name} in memory", partial(merge, base, models, method))
    return report


def callbacks(folder: Path) -> dict[str, list[str]]:
    from freemerge.checkpoints import save_checkpoint
    from freemerge.merging import FRMerging
    from freemerge_callbacks import MergeAtFitEnd, MergePreview, MultiTaskEvaluation, TaskCheckpoint
    from tests.callbacks.callbacks_project import Validated, make_backbone, make_loader, make_trainer

    base, other = str(folder / "base.safetensors"), [str(folder / "other.safetensors")]
    save_checkpoint(base, make_backbone().state_dict())
    save_checkpoint(other[0], {name: value + 0.1 for name, value in make_backbone().state_dict().items()})

    def fitted(*chosen: Any) -> dict[str, Any]:
        """The state after a fit. Lightning changes it too, so the reference is a fit without callbacks."""
        torch.manual_seed(0)
        make_trainer(folder, *chosen).fit(Validated(), make_loader(0), make_loader(0))
        return state()

    fitted()
    plain = fitted()
    loaders = {"a": make_loader(0), "b": make_loader(1)}
    made = [
        TaskCheckpoint(str(folder / "task.safetensors"), "a"),
        MergeAtFitEnd(FRMerging(), other, str(folder / "merged.safetensors")),
        MultiTaskEvaluation(loaders, every_n_epochs=1),
        MergePreview(FRMerging(), base, other, loaders),
    ]
    return {type(each).__name__: changes(plain, fitted(each)) for each in made}


def models(folder: Path) -> dict[str, list[str]]:
    import lightning as L
    import optuna  # noqa: F401 - has loggers of its own
    import torchmetrics  # noqa: F401 - imports transformers, which adds a filter of warnings

    from freemerge import FineTuner, FreeModel, SuiteRun
    from freemerge.pipeline import Settings, TuneSettings
    from tests.callbacks.callbacks_project import Plain, make_loader, make_trainer
    from tests.tiny import TinySuite, tiny_backbone

    report: dict[str, list[str]] = {}
    tuner = FineTuner(tiny_backbone(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    L.seed_everything(5, verbose=False)
    make_trainer(folder).fit(Plain(), make_loader(0))  # what Lightning changes itself has happened then
    suite = TinySuite()
    watch(report, "suite", lambda: (suite.prepare_data(), suite.setup("fit")))
    watch(report, "data", lambda: next(iter(suite["bars"].test_dataloader())))
    trainer = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    settings = Settings(tune=TuneSettings(trials=2))
    run = SuiteRun(tuner, suite, folder / "run", trainer=trainer, settings=settings)
    watch(report, "run", run.run)
    watch(report, "search", run.tune)
    model = watch(report, "load", lambda: FreeModel.from_pretrained(folder / "run" / "free_model"))
    watch(report, "compute", lambda: model(torch.zeros(3, 1, 8, 8)))
    watch(report, "save", lambda: model.save_pretrained(folder / "copy"))
    watch(report, "copy", lambda: copy.deepcopy(model))
    return report


if __name__ == "__main__":
    report = {"merges": merges, "callbacks": callbacks, "models": models}[sys.argv[1]](Path(sys.argv[2]))
    print("\n" + json.dumps(report))
