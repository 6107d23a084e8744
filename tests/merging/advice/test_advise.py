"""Warnings and suggestions follow from the measurements and from docs/benchmarks."""

import json
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from freemerge.merging import BalancedMerging, MergeMethod, TaskArithmetic, advise
from freemerge.merging.advice.measured import LINES, TABLES, best_line

BENCHMARKS = Path(__file__).parents[3] / "docs" / "benchmarks"


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base():
    return {"a.weight": normal(32, 16, seed=0), "b.weight": normal(16, 16, seed=1)}


def moved(base, seed, size=0.05):
    return {name: value + size * normal(*value.shape, seed=seed + len(name)) for name, value in base.items()}


def test_models_that_suit_each_other_need_no_warning(base):
    advice = advise(base, {name: moved(base, 10 * seed) for seed, name in enumerate("abc", 1)})
    assert advice.warnings == ()
    assert advice.method == BalancedMerging()
    json.dumps(advice.as_dict())


def test_a_zero_task_vector_and_a_duplicate(base):
    one = moved(base, 10)
    advice = advise(base, {"one": one, "same": one, "other": moved(base, 20), "none": base})
    zero, duplicate = advice.warnings
    assert zero.startswith("none: its weights equal the base's")
    assert duplicate.startswith("one and same are nearly the same model (cosine 1.000)")


def test_norms_far_apart(base):
    models = {"a": moved(base, 10), "b": moved(base, 20), "long": moved(base, 30, 0.2)}
    apart, longer = advise(base, models).warnings
    norms = advise(base, models).relations.norms
    assert f"{norms[2] / min(norms):.1f} times" in apart
    assert f"scale [1, 1, {max(norms[:2]) / norms[2]:.2g}]" in apart  # the median of the three, at most 1
    assert longer.startswith("long: its task vector is 4")


def test_another_base(base):
    models = {name: moved(base, 10 * seed, size=2.0) for seed, name in enumerate("ab", 1)}
    assert [warning.partition(":")[0] for warning in advise(base, models).warnings] == ["a", "b"]
    later = moved(base, 90, 0.1)
    models = {name: moved(later, 10 * seed, size=0.03) for seed, name in enumerate("abc", 1)}
    assert "all task vectors point the same way" in advise(base, models).warnings[0]
    assert advise(later, models).warnings == ()


def test_added_tokens(base):
    base = {**base, "embed_tokens.weight": normal(10, 4, seed=5)}
    longer = {**moved(base, 10), "embed_tokens.weight": normal(12, 4, seed=6)}
    advice = advise(base, {"a": longer, "b": moved(base, 20)}, exclude=["a.weight"])
    assert "'embed_tokens.weight' has 10 rows in the base and 12 in a: tokens were added" in advice.warnings[-1]
    assert advice.relations.parameters == 16 * 16 + 10 * 4


def test_a_single_model_is_suggested_at_scale_one(base):
    assert advise(base, {"a": moved(base, 10)}).method == TaskArithmetic(1.0)


def averages(page: str) -> dict[str, str]:
    """Line → average of a page's first table."""
    lines = page.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = [[cell.strip() for cell in line.split("|")] for line in takewhile(str.strip, lines[first:])]
    column = table[0].index("average" if "average" in table[0] else "mean")
    return {row[1].removesuffix(" (prototypes)"): row[column] for row in table[2:]}


def test_the_numbers_are_those_of_the_benchmarks():
    pages = [path.read_text(encoding="utf-8") for path in BENCHMARKS.glob("*.md")]
    for table in TABLES:
        (page,) = [page for page in pages if page.startswith(f"# {table.title}\n")]
        rows = averages(page)
        assert float(rows["base"]) == table.base
        assert {line: float(rows[line]) for line in LINES if line in rows} == table.averages


def test_the_suggested_method_is_the_one_of_the_largest_mean_gain():
    gains = {}
    for line in LINES:
        found = [table.averages[line] - table.averages["task arithmetic"] for table in TABLES if line in table.averages]
        if len(found) > 1:
            gains[line] = sum(found) / len(found)
    line, tables = best_line()
    assert gains[line] == max(gains.values())
    assert all(line in table.averages for table in tables)
    assert all(isinstance(kind(), MergeMethod) for kind in LINES.values())
