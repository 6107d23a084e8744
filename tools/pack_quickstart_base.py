"""Write the base of the quickstart into the package, as `freemerge/quickstart/base`.

    python -m freemerge fit --config configs/quickstart_base.yaml
    python tools/pack_quickstart_base.py runs/quickstart_base

The weights are rounded to float16, which halves the package and changes no accuracy by more than a sample or two.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml

from freemerge.checkpoints import load_checkpoint
from freemerge.models import TransformersBackbone

FOLDER = Path(__file__).parent.parent / "freemerge" / "quickstart" / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of the run that pretrained the base")
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    settings = yaml.safe_load((arguments.run / "config.yaml").read_text(encoding="utf-8"))
    given = settings["model"]["init_args"]["backbone"]["init_args"]
    backbone = TransformersBackbone(config=given["config"], pooling=given["pooling"])
    backbone.load_weights(load_checkpoint(arguments.run / "base.safetensors"))
    backbone.model.to(torch.float16).save_pretrained(arguments.output)
    print(f"{arguments.output}: {sum(file.stat().st_size for file in arguments.output.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
