"""Scenarios on a finished run: the search's path, and scores that are those of a run at the chosen scale."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from freemerge.cli import main
from freemerge.merging import PCBMerging, TaskArithmetic, WeightAverage
from tests.tiny import TinySuite

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "tests" / "tiny.yaml")


@pytest.fixture
def tools(monkeypatch):
    """The modules of the scenarios, imported as a script in tools/ imports them."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import scenarios
    from benchmarks import searched

    yield scenarios, searched
    for name in [name for name in sys.modules if name == "scenarios" or name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenarios") / "run"
    overlay = folder.parent / "overlay.yaml"
    overlay.write_text("merge: {methods: {average: WeightAverage, PCB: PCBMerging}, free: PCB}\n")
    options = ["--config", TINY, "--config", str(overlay), "--run.folder", str(folder)]
    assert main(["fit", *options, "--run.stages", "[pretrain, finetune]"]) == 0
    return folder


def searched_path(search, score) -> list[float]:
    path = []
    for scale in search:
        path.append(scale)
        search.scores[scale] = score(scale)
    return path


def test_a_search_goes_on_until_the_best_scale_has_two_neighbours(tools) -> None:
    _, searched = tools
    assert searched_path(searched.ScaleSearch(), lambda scale: -abs(scale - 2.9)) == [1, 0.707, 1.41, 2, 2.83, 4, 2.83]
    assert searched_path(searched.ScaleSearch(), lambda scale: -abs(scale - 0.5)) == [1, 0.707, 0.5, 0.354, 0.5]
    assert searched_path(searched.ScaleSearch(), lambda scale: 0.7) == [1, 0.707, 1.41, 1]  # of equal ones, the nearest
    longest = searched_path(searched.ScaleSearch(), lambda scale: scale)
    assert longest[-1] == max(longest) == float(f"{2**6.5:.3g}")


def test_test_scores_are_those_of_a_run_at_the_chosen_scale(tools, run: Path, tmp_path) -> None:
    _, searched = tools
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    bench = searched.Bench(folder)
    average = bench.measured(searched.Case("average", WeightAverage(), TinySuite.TASKS))
    found = bench.measured(searched.Case("PCB", PCBMerging(), TinySuite.TASKS))
    assert found["search"][f"{found['scale']:.3g}".removesuffix(".0")] == max(found["search"].values())
    again = searched.Bench(folder)
    again.models = None  # nothing is merged again
    assert again.measured(searched.Case("PCB", PCBMerging(), TinySuite.TASKS)) == found

    options = ["--config", str(folder / "config.yaml"), "--run.folder", str(folder)]
    options += ["--merge.scales", f"[{found['scale']}]", "--run.stages", "[merge, evaluate]"]
    assert main(["fit", *options]) == 0
    rows = {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}
    assert rows["average"]["scores"] == average["test"]
    assert rows["PCB"]["scores"] == found["test"]
    cost = bench.cost(PCBMerging())
    assert 0 < cost["cpu"] < 60
    assert cost["peak"] > 20 * 2**20  # a process with torch
    assert rows["individual"]["scores"] == bench.bounds()["individual"]


def test_the_table_and_the_curves_are_means_over_the_runs(tools, run: Path, tmp_path, capsys, monkeypatch) -> None:
    scenarios, searched = tools
    a, b = TinySuite.TASKS
    scores = {"base": (0.2, 0.4), "individual": (0.8, 0.5), "TA": (0.6, 0.5), "average": (0.4, 0.3)}

    def rows(shift: float) -> list[dict]:
        bounds = {name: {a: scores[name][0] + shift, b: scores[name][1]} for name in ("base", "individual")}
        stored = [{"bounds": [a, b], **bounds}]
        for name, method in (("TA", TaskArithmetic()), ("average", WeightAverage())):
            said = {"method": searched.describe_method(method), "tasks": [a, b]}
            result = {
                "scale": 0.5 if name == "TA" else None,
                "search": {"0.5": 0.6, "1.0": 0.4} if name == "TA" else {},
            }
            stored.append(said | result | {"test": {a: scores[name][0] + shift, b: scores[name][1]}, "seconds": 2.0})
        return stored

    for number, shift in enumerate((0.0, 0.1)):
        shutil.copytree(run, tmp_path / str(number))
        (tmp_path / str(number) / "scenarios.json").write_text(json.dumps(rows(shift)))
    benches = [searched.Bench(tmp_path / str(number)) for number in range(2)]
    scenario = scenarios.Scenario(benches, {"TA": TaskArithmetic(), "average": WeightAverage()})
    table = {row[0]: row[1:] for row in scenario.table().rows}
    # TA: a 0.60 and 0.70 of 0.80 and 0.90, b 0.50 of 0.50; averages 0.55 and 0.60, normalized 0.8750 and 0.8889
    assert table["TA"] == [
        "0.3",
        "0.5 / 0.5",
        "65.0",
        "50.0",
        "55.0 / 60.0",
        "57.5",
        "3.5",
        "88.2",
        f"-20.0 {a}",
        "2.0",
    ]
    assert table["base"] == ["", "", "25.0", "40.0", "30.0 / 35.0", "32.5", "3.5", "54.6", f"-60.0 {a}", ""]
    assert table["individual"][-2:] == ["none", ""]
    assert scenario.by_number() == {
        "base": {2: pytest.approx((0.25 + 0.8 + 0.3 / 0.9 + 0.8) / 4)},
        "TA": {2: pytest.approx((0.75 + 1 + 0.7 / 0.9 + 1) / 4)},
        "average": {2: pytest.approx((0.5 + 0.6 + 0.5 / 0.9 + 0.6) / 4)},
    }
    for name in ("methods", "tasks"):
        picture = tmp_path / f"{name}.png"
        folders = [str(bench.folder) for bench in benches]
        monkeypatch.setattr(
            sys, "argv", ["scenarios.py", name, *folders, "--lines", "average", "--picture", str(picture)]
        )
        scenarios.main()
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert "average" in capsys.readouterr().out
