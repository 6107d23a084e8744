"""Metrics, the loop, the evaluator and the report, against counts and sums written out."""

import io
import json
import math

import lightning as L
import pytest
import torch
from rich.console import Console
from torch import nn

from freemerge.evaluation import (
    LabelSpace,
    MultiTaskEvaluator,
    MultiTaskMetrics,
    Report,
    Row,
    evaluate,
    evaluate_routing,
)
from freemerge.evaluation.report import format_bytes
from freemerge.models import ConvRouter, FreeModel, FreeOutput
from tests.tiny import TinySuite, tiny_backbone

SPACE = LabelSpace({"a": 2, "b": 3})


def test_label_space_offsets_each_tasks_classes() -> None:
    assert SPACE.size == 5
    assert SPACE.to_global("b", torch.tensor([0, 2])).tolist() == [2, 4]
    assert SPACE.predictions("b", torch.tensor([[0.0, 2.0, 1.0]])).tolist() == [3]


def test_a_prediction_is_right_only_if_task_and_class_are() -> None:
    inf = float("-inf")
    logits = torch.tensor([[0.0, 1.0, inf], [0.0, 0.0, 9.0], [0.0, 1.0, inf], [0.0, 5.0, 1.0]])
    output = FreeOutput(torch.tensor([0, 1, 0, 1]), logits, None, ("a", "b"))
    metrics = MultiTaskMetrics(SPACE)
    # Right task and class; right class of the wrong task (b's 2 for a); right; b's class 1 for a's 1.
    metrics.update("a", output, torch.tensor([1, 1, 1, 1]))
    metrics.update("b", torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0], [9.0, 0.0, 0.0]]), torch.tensor([2, 0, 1]))
    assert metrics.compute() == {"a": 0.5, "b": pytest.approx(2 / 3)}
    metrics.reset()
    metrics.update("a", torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    metrics.update("b", torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([1]))
    assert metrics.compute() == {"a": 1.0, "b": 0.0}


def test_a_model_with_other_tasks_is_refused() -> None:
    output = FreeOutput(torch.tensor([0]), torch.zeros(1, 2), None, ("z",))
    with pytest.raises(ValueError, match="routes to z, which is not among the tasks a, b"):
        SPACE.predictions("a", output)


def loaders() -> dict[str, list]:
    generator = torch.Generator().manual_seed(0)
    make = lambda classes, sizes: [  # noqa: E731
        (torch.randn(n, classes, generator=generator), torch.randint(classes, (n,), generator=generator)) for n in sizes
    ]
    return {"a": make(2, (8, 8, 3)), "b": make(3, (5,))}


def test_the_loop_counts_every_sample_once() -> None:
    data = loaders()
    result = evaluate(lambda inputs, task: inputs, data, SPACE)
    for task, batches in data.items():
        right = sum(int((inputs.argmax(1) == labels).sum()) for inputs, labels in batches)
        assert result[task] == pytest.approx(right / sum(len(labels) for _, labels in batches))


@pytest.fixture
def free_model() -> FreeModel:
    torch.manual_seed(0)
    heads = {"corners": nn.Linear(16, 4), "bars": nn.Linear(16, 2)}
    return FreeModel(tiny_backbone(), heads, router=ConvRouter(2, channels=1, width=4)).eval()


@pytest.mark.parametrize("oracle", [False, True])
def test_the_evaluator_and_the_loop_give_the_same_numbers(free_model: FreeModel, oracle: bool) -> None:
    suite = TinySuite(eval_batch_size=8)
    evaluator = MultiTaskEvaluator(free_model, suite.names, oracle=oracle)
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    logged = trainer.test(evaluator, datamodule=suite, verbose=False)[0]
    direct = evaluate(
        lambda inputs, task: free_model(inputs, task=task if oracle else None),
        suite.test_dataloader(),
        evaluator.label_space,
    )
    assert evaluator.results == pytest.approx(direct)
    assert logged["test/corners/acc"] == pytest.approx(direct["corners"])
    assert logged["test/mean_acc"] == pytest.approx(sum(direct.values()) / 2)


def test_the_evaluator_refuses_tasks_that_the_model_lacks(free_model: FreeModel) -> None:
    with pytest.raises(ValueError, match="the model has no task digits; its tasks: corners, bars"):
        MultiTaskEvaluator(free_model, ("digits",))


@pytest.fixture
def report() -> Report:
    return Report(
        "title",
        [
            Row("individual", {"a": 0.8, "b": 0.9}, 1_000_000),
            Row("FR", {"a": 0.6, "b": 0.9}, 0, chosen={"scale": 0.3}),
            Row("router accuracy", {"a": 1.0, "b": 0.5}, 54_760, kind="router"),
        ],
        search={"FR": [{"scale": 0.3, "mean_acc": 0.7}]},
        settings={"seed": 0},
    )


def test_the_numbers_of_the_report(report: Report, tmp_path) -> None:
    row = report.row("FR")
    assert report.average(row) == pytest.approx(0.75)
    assert report.normalized(row) == pytest.approx((0.6 / 0.8 + 1.0) / 2)
    drop, task = report.worst_drop(row)
    assert (drop, task) == (pytest.approx(-0.2), "a")
    report.write_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert [entry["name"] for entry in data["rows"]] == ["individual", "FR", "router accuracy"]
    assert data["rows"][1]["chosen"] == {"scale": 0.3}
    assert math.isclose(data["rows"][1]["normalized"], 0.875)
    assert "normalized" not in data["rows"][2]
    assert data["search"]["FR"] == [{"scale": 0.3, "mean_acc": 0.7}]
    assert not list(tmp_path.glob(".*"))


def test_the_table_is_complete_on_a_narrow_terminal(report: Report) -> None:
    console = Console(width=20, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print(console)
    text = console.export_text()
    for word in ("individual", "75.0", "87.5", "-20.0 a", "1.0 MB", "54.8 kB", "worst drop"):
        assert word in text
    assert "…" not in text
    assert console.width == 20


def test_the_chart_is_written_as_png(report: Report, tmp_path) -> None:
    report.plot(tmp_path / "report.png")
    data = (tmp_path / "report.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1200, 675)


def _many(tasks: int) -> Report:
    names = ["individual", "base (probe)", "task arithmetic", "FREE trained (oracle)"]
    rows = [Row(name, {f"task number {t}": 0.9 - 0.1 * i for t in range(tasks)}, 1234) for i, name in enumerate(names)]
    return Report(f"Suite: test accuracy (%), {tasks} tasks", rows)


@pytest.mark.parametrize("tasks", [1, 2, 20])
@pytest.mark.parametrize("width", [80, 100])
def test_lines_fit_the_terminal_and_no_cell_is_missing(tasks: int, width: int) -> None:
    console = Console(width=width, record=True, force_terminal=True, file=io.StringIO())
    _many(tasks).print(console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert all(f"task number {t}" in text for t in range(tasks))
    assert text.count("90.0") == tasks + 1  # individual, on each task and on average
    tables = text.count("base (probe)")
    assert tables == text.count("FREE trained (oracle)")
    assert (tables == 1) == ((tasks, width) == (1, 100))
    assert "…" not in text


@pytest.mark.parametrize("tasks", [2, 8, 9, 20])
def test_charts_of_few_and_of_many_tasks_show_every_number(tasks: int, tmp_path) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
        _many(tasks).plot(tmp_path / "report.png")
    figure = drawn[0]
    figure.draw_without_rendering()
    axes, inside = figure.axes[0], figure.bbox
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        *(f"task number {t}" for t in range(tasks)),
        "average",
    ]
    if tasks <= 8:
        heights = [bar.get_height() for bars in axes.containers for bar in bars]
        assert heights == pytest.approx([90 - 10 * i for i in range(4) for _ in range(tasks + 1)])
        legend = figure.legends[0].get_window_extent()
        assert legend.x0 >= inside.x0
        assert legend.x1 <= inside.x1
    else:
        written = [text.get_text() for text in axes.texts]
        assert written == [f"{90 - 10 * i:.1f}" for i in range(4) for _ in range(tasks + 1)]


def test_sizes_are_readable() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 54_760, 999_600, 1_234_567_890)] == [
        "0 B", "999 B", "1.0 kB", "54.8 kB", "1.0 MB", "1.2 GB",
    ]  # fmt: skip


def test_routing_counts_confusions_and_abstentions(free_model: FreeModel) -> None:
    suite = TinySuite(eval_batch_size=16)
    suite.setup()
    data = suite.test_dataloader()
    logits = {task: torch.cat([free_model.route(x)[0] for x, _ in loader]).detach() for task, loader in data.items()}
    confidence = torch.cat(list(logits.values())).softmax(dim=1).amax(dim=1)
    free_model.threshold = float(confidence.median())
    routing = evaluate_routing(free_model, data)
    for row, (task, own) in enumerate(logits.items()):
        expected = [int((own.argmax(dim=1) == column).sum()) for column in range(2)]
        assert routing.counts[row].tolist() == expected
        unsure = int((own.softmax(dim=1).amax(dim=1) < free_model.threshold).sum())
        assert routing.accuracy[task] == pytest.approx(expected[row] / 45)
        assert routing.as_dict()[task] == {
            "routed_to": dict(zip(("corners", "bars"), expected, strict=True)),
            "abstained": unsure,
        }
    assert int(routing.abstained.sum()) == int((confidence < free_model.threshold).sum()) > 0
