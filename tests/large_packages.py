"""Import the large packages that the tests' processes use, and nothing of freemerge.

The collector of garbage does not go through them while they are imported, which takes 0.9 of 5.3 seconds, nor later, in
each process that is forked afterwards: they stay.
"""

import gc
from importlib import import_module

gc.disable()
for name in (
    "lightning.pytorch.cli",
    "peft",
    "torchvision",
    "torch.distributed.checkpoint",
    "torch.distributed.run",
    "matplotlib.pyplot",
    "sklearn.linear_model",
    "transformers.models.vit.modeling_vit",
    "transformers.models.bert.modeling_bert",
):
    import_module(name)
gc.freeze()
gc.enable()
