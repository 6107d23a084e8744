"""Run `python -m freemerge advise` with parsed options."""

from __future__ import annotations

import json
import sys

import jsonargparse
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from freemerge.cli import merge
from freemerge.cli.advise import build_parser
from freemerge.cli.printing import print_error
from freemerge.cli.showing import FAILURES, bar, describe, in_options, notes
from freemerge.merging import MergeMethod, Relations, advise, describe_method
from freemerge.runtime import own_process

_WIDTH = 120  # of lines, if the output is not a terminal
_PAIRS = 28  # at most this many pairs are shown: all pairs of eight models


def run(config: jsonargparse.Namespace) -> int:
    """Print advice according to a parsed configuration.

    Args:
        config: the result of `build_parser().parse_args()`.

    Returns:
        The exit code: 0, or 2 after an error, which is printed as one line on stderr.
    """
    own_process()
    parser = build_parser()
    finetuned = dict(config.finetuned) if isinstance(config.finetuned, dict) else list(config.finetuned)
    try:
        with notes(parser), bar("advise", sys.stderr.isatty()) as progress:
            advice = advise(
                config.base,
                finetuned,
                include=config.include,
                exclude=config.exclude,
                device=config.device,
                progress=progress,
            )
    except FAILURES as error:
        print_error(describe(error, parser))
        return 2
    if config.json:
        print(json.dumps(advice.as_dict(), indent=2, ensure_ascii=False))
        return 0
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    for table in tables(advice.relations):
        console.print(table)
    for warning in advice.warnings:
        # The messages name options of `merge`.
        console.print(f"[yellow]warning:[/yellow] {escape(in_options(warning, merge.build_parser()))}", soft_wrap=True)
    console.print(f"begin with: {escape(as_words(advice.method))}", soft_wrap=True)
    console.print(f"because {escape(advice.reason)}", soft_wrap=True)
    return 0


def tables(relations: Relations) -> list[Table]:
    """The measurements as tables: one of the models and, if there are several, one of their pairs."""
    chance = relations.low_frequency_chance
    models = Table(box=box.SIMPLE_HEAD, title=f"{relations.parameters:,} values, ‖base‖ {relations.base_norm:.4g}")
    models.add_column("task vector")
    for heading in ("norm", "÷ base", "÷ longest", "changed", f"low frequencies ({chance:.2%} of noise)"):
        models.add_column(heading, justify="right")
    longest = max(relations.norms)
    columns = (
        relations.labels,
        relations.norms,
        relations.relative_norms,
        relations.changed,
        relations.low_frequency,
    )
    for label, norm, relative, changed, low in zip(*columns, strict=True):
        part = norm / longest if longest else 0.0
        models.add_row(escape(label), f"{norm:.4g}", f"{relative:.4f}", f"{part:.3f}", f"{changed:.1%}", f"{low:.2%}")
    count = len(relations.labels)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    if not pairs:
        return [models]
    pairs.sort(key=lambda pair: -abs(relations.cosines[pair[0]][pair[1]]))
    left, right = (f"{value:.2f}" for value in (relations.left_chance, relations.right_chance))
    title = f"Pairs: signs differ at {relations.disagreement:.1%} of what several models changed"
    if len(pairs) > _PAIRS:
        title += f"; the {_PAIRS} pairs of the largest cosines of {len(pairs)}"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for heading in ("task vector", "and"):
        table.add_column(heading)
    for heading in ("cosine", "sign conflicts", f"left overlap (chance {left})", f"right overlap (chance {right})"):
        table.add_column(heading, justify="right")
    for i, j in pairs[:_PAIRS]:
        table.add_row(
            escape(relations.labels[i]),
            escape(relations.labels[j]),
            f"{relations.cosines[i][j]:.3f}",
            f"{relations.sign_conflicts[i][j]:.1%}",
            f"{relations.left_overlap[i][j]:.2f}",
            f"{relations.right_overlap[i][j]:.2f}",
        )
    return [models, table]


def as_words(method: MergeMethod) -> str:
    """The options of `merge` for a method and its scale."""
    name = describe_method(method)["class_path"].rpartition(".")[2]
    scale = getattr(method, "scale", None)
    return f"--method {name}" + ("" if scale is None else f" --method.scale {scale:g}")
