"""What a run would replace: reasons in one line, and extensions, which need no asking."""

from freemerge.pipeline.store.replacing import difference, is_extension, make_plan
from freemerge.pipeline.store.stage_folder import NOT_MADE, StageFolder

MERGE = {"tasks": ["a", "c"], "models": {"a": "1", "c": "2"}, "base": "0"}


def test_further_tasks_are_an_extension() -> None:
    grown = {"tasks": ["a", "b", "c"], "models": {"a": "1", "b": NOT_MADE, "c": "2"}, "base": "0"}
    assert is_extension(MERGE, grown)
    assert not is_extension(grown, MERGE)
    assert not is_extension(MERGE, MERGE)
    assert not is_extension(MERGE, {**grown, "tasks": ["c", "b", "a"]})
    assert not is_extension(MERGE, {**grown, "base": "1"})
    assert not is_extension(MERGE, {**grown, "models": {**grown["models"], "a": "3"}})


def test_a_reason_names_what_differs() -> None:
    finished = {"files": {}, "inputs": MERGE}
    assert difference(finished, MERGE) is None
    assert difference(finished, {**MERGE, "base": NOT_MADE}) is None
    assert (
        difference(finished, {**MERGE, "base": "1", "models": {"a": "3", "c": "2"}}) == "models.a: 1 → 3, base: 0 → 1"
    )
    assert difference({"files": {}, "inputs": {"x": "a" * 64}}, {"x": "b" * 64}) == "x has changed"


def test_what_is_made_from_something_that_is_replaced_is_replaced(tmp_path) -> None:
    def stages(seed: int):
        return [
            lambda: StageFolder(tmp_path / "one", "one", {"seed": seed}),
            lambda: StageFolder(tmp_path / "two", "two", {"x": 0}, ("one",)),
            lambda: StageFolder(tmp_path / "three", "three", {"x": 0}),
        ]

    for make in stages(0):
        stage = make()
        stage.begin()
        stage.finish({})
    assert make_plan(stages(0), lambda name: True).replaced == {}
    assert make_plan(stages(1), lambda name: True).reason == "one (seed: 0 → 1); two (made from one)"
    assert make_plan(stages(1), lambda name: name != "one").replaced == {}
