"""Run `python -m freemerge export-experts` with parsed options."""

from __future__ import annotations

import json

import jsonargparse

from freemerge.cli.export_experts import build_parser
from freemerge.cli.printing import print_error
from freemerge.cli.showing import FAILURES, describe
from freemerge.models import FreeModel, export_experts
from freemerge.runtime import own_process


def run(config: jsonargparse.Namespace) -> int:
    """Export experts according to a parsed configuration.

    Args:
        config: the result of `build_parser().parse_args()`.

    Returns:
        The exit code: 0, or 2 after an error, which is printed as one line on stderr.
    """
    own_process()
    try:
        model = FreeModel.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        folder = export_experts(model, config.output)
    except FAILURES as error:
        print_error(describe(error, build_parser()))
        return 2
    for task, facts in json.loads((folder / "adapters.json").read_text(encoding="utf-8"))["adapters"].items():
        kept = "" if facts["only_factors"] else ", for PEFT: not only linear layers"
        print(f"{task}: rank {facts['rank']}, {facts['bytes']:,} bytes{kept}")
    print(f"{config.output}: backbone/, adapters/, adapters.json and README.md, which says how to serve them")
    return 0
