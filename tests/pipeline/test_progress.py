"""Where a run is, and how long the rest takes."""

from freemerge.pipeline.progress import Progress


def test_the_rest_is_what_stages_of_the_same_kind_took() -> None:
    progress = Progress(["finetune a", "finetune b", "merge", "experts extracted", "experts a", "experts b"])
    assert (progress.place("finetune b"), progress.place("router")) == ("2 of 6", "")
    assert progress.left() == ""
    progress.done("finetune a", 90)
    assert progress.left() == "at least 2 min left"  # nobody knows of the others
    progress.done("finetune b", 30)
    assert progress.left() == ""
    progress.done("merge", 1)
    progress.done("experts extracted", 500)
    assert progress.left() == ""  # experts are trained by other stages than they are extracted in
    progress.done("experts a", 7300)
    assert progress.left() == "about 2 h 2 min left"
    progress.done("experts b", 0.2)
    assert progress.left() == ""


def test_short_times_are_not_nothing() -> None:
    progress = Progress(["finetune a", "finetune b"])
    progress.done("finetune a", 0.1)
    assert progress.left() == "about 1 s left"
