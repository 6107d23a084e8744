"""Merge models whose single layer stands for many: tensors of all layers are read from the files of the first.

python merge_repeated.py '{"base": …, "models": […], "layers": 36, "method": "Ties()", "output": …}'
"""

import json
import sys

from freemerge import merging
from freemerge.checkpoints import Checkpoint, open_checkpoint
from freemerge.runtime import own_process

FIRST = "model.layers.0."


def repeated(path, layers):
    """The checkpoint of `path` with its first layer under the names of `layers` layers."""
    stored = open_checkpoint(path)
    origin = {}
    for name in stored.names:
        if name.startswith(FIRST):
            origin |= {f"model.layers.{layer}.{name.removeprefix(FIRST)}": name for layer in range(layers)}
        else:
            origin[name] = name

    def read(name, run):
        return stored.tensor(origin[name]) if run is None else stored.read_range(origin[name], *run)

    return Checkpoint(path, {name: stored.spec(first) for name, first in origin.items()}, read)


own_process()
job = json.loads(sys.argv[1])
base, *models = (repeated(path, job["layers"]) for path in (job["base"], *job["models"]))
method = eval(job["method"], vars(merging))
merging.merge(base, models, method, output=job["output"], overwrite=True, hash_inputs=False)
