"""Write what the pages in docs/methods take from the code and the benchmarks.

    python tools/write_method_pages.py

- The title, the equations and the table of parameters come from the method's module and class.
- The measured lines come from the tables in docs/benchmarks.

Each page has these parts between comments; everything else in it is written by hand and stays. A method without a page
gets a new one. A test fails if a page is not what this program writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import freemerge.merging as merging
from freemerge.merging import MergeMethod

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
BENCHMARKS = ROOT / "docs" / "benchmarks"
BASES = {"MergeMethod", "AngleMethod", "MatrixMethod", "MeasuredMethod", "MethodWrapper"}

ACCURACIES = {
    "quickstart": "six image tasks, a small ViT",
    "text_zero_shot": "texts with zero-shot heads, MiniLM-L6",
    "text8": "eight text tasks with linear probes, MiniLM-L6",
    "vision8_vit": "eight image tasks with linear probes, a small ViT",
    "vision8_cnn": "eight image tasks with linear probes, a small CNN",
}
"""Page in docs/benchmarks → what was measured there."""

LINES = {
    "WeightAverage": ("average", "WeightAverage"),
    "TaskArithmetic": ("task arithmetic", "TaskArithmetic"),
    "Ties": ("TIES", "Ties"),
    "FRMerging": ("FR", "FR, align"),
    "PCBMerging": ("PCB", "PCB"),
    "BalancedMerging": ("balanced", "balanced"),
    "TSVMerge": ("TSV-M", "TSV"),
    "ACEMerging": ("ACE", "ACE"),
    "IsoC": ("Iso-C", "IsoC"),
    "IsoCTS": ("Iso-CTS", "IsoCTS"),
    "WUDIMerging": ("WUDI", "WUDI"),
    "Dare": ("DARE", "Dare, Ties"),
    "Breadcrumbs": ("Breadcrumbs", "Breadcrumbs"),
    "EMRMerging": ("EMR merge", "EMR"),
}
"""Method → its row in the tables of accuracies, and in that of speed."""


def methods() -> dict[str, type[MergeMethod]]:
    """Name → class of every method that users can choose."""
    found = {name: getattr(merging, name) for name in merging.__all__}
    return {
        name: kind
        for name, kind in sorted(found.items())
        if inspect.isclass(kind) and issubclass(kind, MergeMethod) and name not in BASES
    }


def write_page(name: str, text: str | None) -> str:
    """A page with its generated parts up to date.

    Args:
        name: the method.
        text: the page as it is; None makes a new one.

    Returns:
        The page.
    """
    parts = {"head": head(name), "class": from_class(name), "measured": measured(name)}
    if text is None:
        text = "\n\n".join(f"<!-- {part} -->\n<!-- end -->" for part in parts) + "\n"
    for part, content in parts.items():
        pattern = re.compile(rf"<!-- {part} -->\n.*?<!-- end -->", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(
                f"docs/methods/{name}.md: no part between `<!-- {part} -->` and `<!-- end -->`; add the comments"
            )
        text = pattern.sub(
            lambda _, part=part, content=content: f"<!-- {part} -->\n{content}<!-- end -->", text, count=1
        )
    return text


def head(name: str) -> str:
    """The title and one sentence, from the first line of the method's module."""
    line = (inspect.getdoc(sys.modules[methods()[name].__module__]) or "").split("\n\n")[0].replace("\n", " ")
    title, _, rest = line.rstrip(".").partition(": ")
    about, _, source = rest.rpartition(" (") if rest.endswith(")") else (rest, "", "")
    if not rest:
        title, about = name, title
    source = _linked(source.rstrip(")"))
    heading = title if title == name else f"{title} (`{name}`)"
    lines = [f"# {heading}", "", about[0].upper() + about[1:] + "."]
    return "\n".join(lines + (["", f"Source: {source}."] if source else [])) + "\n"


def from_class(name: str) -> str:
    """The equations and the parameters, from the class's docstring and fields."""
    kind = methods()[name]
    text, _ = _docstring(kind)
    lines = [
        "## Definition",
        "",
        *_linked(text).splitlines(),
        "",
        "v_k are the task vectors (fine-tuned model − base), τ is the result, K the number of models.",
        "",
    ]
    fields = [field for field in dataclasses.fields(kind) if field.init]
    if fields:
        lines += ["## Parameters", "", "| parameter | default | meaning |", "| --- | --- | --- |"]
    for field in fields:
        lines.append(f"| `{field.name}`: {_type(field)} | {_default(field)} | {_meaning(kind, field.name)} |")
    if fields:
        lines.append("")
    scale = "scale" in {field.name for field in fields}
    if scale and kind.linear_in_scale:
        lines += ["The result is proportional to `scale`: a search over λ merges once.", ""]
    elif scale:
        lines += ["The result is not proportional to `scale`: a search over λ merges once for each value.", ""]
    return "\n".join(lines)


def measured(name: str) -> str:
    """What docs/benchmarks has of the method."""
    row, fast = LINES.get(name, (None, None))
    found = []
    for page, about in ACCURACIES.items() if row else ():
        values = [_cell(page, line, ("mean", "average")) for line in (row, "base", "individual")]
        values[1] = (
            values[1] or _cell(page, "base (prototypes)", ("mean",)) or _cell(page, "base (zero-shot)", ("average",))
        )
        if all(values):
            found.append(
                f"- [{about}](../benchmarks/{page}.md): {values[0]} % (base {values[1]}, individual {values[2]})"
            )
    floor, memory = (_cell("merge_speed", fast, (column,)) if fast else None for column in ("× floor", "peak MiB"))
    if floor and memory:
        found.append(
            "- [speed](../benchmarks/merge_speed.md), ViT-B/32 with eight models on two CPU cores: "
            f"{floor} × the least that a merge has to do, {memory} MiB at most"
        )
    if not found:
        found = ["The [benchmarks](../benchmarks/README.md) do not cover this method yet."]
    return "\n".join(["## Measured", "", *found]) + "\n"


def _linked(text: str) -> str:
    """A text whose numbers of arXiv are links."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _docstring(kind: type) -> tuple[str, dict[str, str]]:
    """A class's docstring: the text before `Args:`, and parameter → meaning."""
    text, _, rest = (inspect.getdoc(kind) or "").partition("\nArgs:\n")
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", rest, re.MULTILINE | re.DOTALL)
    return text.strip(), {name: " ".join(meaning.split()) for name, meaning in entries}


def _meaning(kind: type, name: str) -> str:
    for each in kind.__mro__:
        meaning = _docstring(each)[1].get(name, "") if each is not object else ""
        if meaning and not re.fullmatch(r"see `\w+`\.?", meaning):
            meaning = re.sub(
                r"^see `MeasuredMethod`; ", f"{_docstring(merging.MeasuredMethod)[1]['statistics']} Here ", meaning
            )
            return meaning.replace("|", "\\|")
    raise ValueError(f"{kind.__name__}: no entry for {name!r} under Args in its docstring")


def _type(field: dataclasses.Field) -> str:
    text = str(field.type).replace("Literal[", "[").replace('"', "`").replace("'", "`")
    return text.replace(" | ", " or ").replace("[`", "`").replace("`]", "`").replace("|", "\\|")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`".replace("'", '"')
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`".replace("'", '"')
    return "required"


def _cell(page: str, row: str, columns: tuple[str, ...]) -> str | None:
    """A cell of the first table of a page that has such a row and column."""
    header: list[str] = []
    for line in (BENCHMARKS / f"{page}.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and (not header or cells[0] == ""):
            header = cells
        elif not cells:
            header = []
        elif cells[0] == row:
            for column in columns:
                if column in header and header.index(column) < len(cells):
                    return cells[header.index(column)] or None
    return None


def main() -> None:
    """Bring all pages up to date."""
    PAGES.mkdir(exist_ok=True)
    for name in methods():
        path = PAGES / f"{name}.md"
        path.write_text(
            write_page(name, path.read_text(encoding="utf-8") if path.is_file() else None), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
