"""Task suites on made-up data: selection, loaders, mixture, fingerprint."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from freemerge.data import ArrayDataset, QuickstartSuite, Task, TaskData, TaskMixture, TaskSuite, collate
from freemerge.data.loaders import BalancedSampler, ShuffleSampler, derive_seed
from freemerge.data.mixture import MixtureDataset

SIZES = {"alpha": 50, "beta": 20, "gamma": 90}


def array(size: int, value: int, classes: int = 5) -> ArrayDataset:
    images = torch.full((size, 1, 4, 4), value, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(size)  # every image is different
    return ArrayDataset(images, torch.arange(size) % classes)


class ToySuite(TaskSuite):
    TASKS = tuple(SIZES)

    def build(self, name: str) -> Task:
        self.calls = [*getattr(self, "calls", []), name]
        value = 100 + 50 * list(SIZES).index(name)
        train, val, test = (array(size, value) for size in (SIZES[name], 7, 9))
        return Task(name, tuple("abcde"), train, val, test)


class SlowDataset(Dataset):
    """A third-party dataset: no batched fetch, and labels as plain numbers."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 4, 4), float(index)), index


# ---- tasks


@pytest.mark.parametrize("index", [0, 3])
def test_array_dataset_normalises(index: int) -> None:
    images = torch.randint(256, (4, 2, 5, 5), dtype=torch.uint8)
    data = ArrayDataset(images, torch.arange(4), mean=(0.2, 0.4), std=(0.5, 2.0))
    image, label = data[index]
    expected = (images[index] / 255 - torch.tensor([0.2, 0.4]).view(2, 1, 1)) / torch.tensor([0.5, 2.0]).view(2, 1, 1)
    assert image.dtype == torch.float32
    assert label.dtype == torch.int64
    assert label.shape == ()
    torch.testing.assert_close(image, expected)


def test_batched_fetch_equals_default_collate() -> None:
    data = array(10, 100)
    ours = DataLoader(data, batch_size=4, collate_fn=collate)
    default = DataLoader(data, batch_size=4)
    subset = DataLoader(Subset(data, list(range(10))), batch_size=4, collate_fn=collate)
    for a, b, c in zip(ours, default, subset, strict=True):
        for x, y, z in zip(a, b, c, strict=True):
            assert torch.equal(x, y)
            assert torch.equal(x, z)


def test_augmentation_follows_torchs_seed_and_does_not_change_the_data() -> None:
    images = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    data = ArrayDataset(images, torch.zeros(8, dtype=torch.int64), augment=lambda x: x + torch.rand_like(x))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(data.__getitems__(range(8)).inputs)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not images.any()


@pytest.mark.parametrize(
    ("images", "labels", "std", "message"),
    [
        (torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), 1.0, "uint8"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), 1.0, "N, C, H, W"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 1.0, "labels"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int32), 1.0, "int64"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), 0.0, "std"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), (1.0, 1.0), "per channel"),
    ],
)
def test_errors_of_array_dataset(images, labels, std, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArrayDataset(images, labels, std=std)


# ---- selection


def test_selected_tasks_keep_their_order() -> None:
    assert ToySuite().names == ("alpha", "beta", "gamma")
    suite = ToySuite(tasks=["gamma", "alpha"])
    assert suite.names == ("gamma", "alpha")
    assert suite.available() == ("alpha", "beta", "gamma")
    assert suite.task("beta").name == "beta"


def test_the_command_line_builds_a_suite_by_its_name() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(TaskSuite, "data")
    arguments = ["--data=QuickstartSuite", "--data.tasks=[faces, digits]", "--data.batch_size=8", "--data.seed=3"]
    suite = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert isinstance(suite, QuickstartSuite)
    assert (suite.names, suite.batch_size, suite.seed) == (("faces", "digits"), 8, 3)


def test_data_modules_can_be_pickled() -> None:
    suite = QuickstartSuite(tasks=["faces"])
    data = pickle.loads(pickle.dumps(suite.for_task("faces")))
    assert (data.name, data.num_classes) == ("faces", 5)
    assert copy.deepcopy(suite.mixture()).names == ("faces",)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["alpha", "bta"], "no task 'bta'. Did you mean 'beta'\\? Known tasks: alpha, beta, gamma"),
        (["zzzzzz"], "no task 'zzzzzz'. Known tasks"),
        (["alpha", "alpha"], "chosen twice: alpha"),
        ([], "no task chosen"),
    ],
)
def test_bad_selections_are_explained(tasks: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToySuite(tasks=tasks)


def test_unknown_names_are_explained_everywhere() -> None:
    suite = ToySuite()
    for call in (suite.task, suite.for_task):
        with pytest.raises(ValueError, match="Did you mean 'gamma'"):
            call("gama")


@pytest.mark.parametrize("argument", [{"batch_size": 0}, {"eval_batch_size": 0}, {"num_workers": -1}])
def test_bad_sizes_are_refused(argument: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        ToySuite(**argument)


def test_tasks_are_built_once_and_only_when_needed() -> None:
    suite = ToySuite(tasks=["beta"])
    suite.for_task("beta")
    suite.mixture()
    suite.fingerprint()
    texts = str(suite), str(suite.for_task("beta")), str(suite.mixture())
    assert texts == ("ToySuite(beta; seed=0)", "TaskData(beta)", "TaskMixture(beta)")
    assert not hasattr(suite, "calls")
    suite.setup("fit")
    suite.train_dataloader()
    suite.for_task("beta").setup("fit")
    assert suite.calls == ["beta"]
    assert suite.image_shape == (1, 4, 4)


# ---- loaders


def test_suite_loaders() -> None:
    suite = ToySuite(batch_size=16, eval_batch_size=4)
    suite.setup()
    train = suite.train_dataloader()
    assert list(train) == ["alpha", "beta", "gamma"]
    assert {name: len(loader) for name, loader in train.items()} == {"alpha": 3, "beta": 1, "gamma": 5}
    for loaders, split in ((suite.val_dataloader(), "val"), (suite.test_dataloader(), "test")):
        for name, loader in loaders.items():
            images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
            dataset = getattr(suite.task(name), split)
            assert torch.equal(labels, dataset.labels)
            assert torch.equal(images, dataset.images.float() / 255)
    assert list(suite.predict_dataloader()) == list(train)


def test_training_order_is_a_function_of_seed_and_epoch() -> None:
    def epoch(loader, number: int | None) -> list[int]:
        if number is not None:
            loader.sampler.set_epoch(number)
        return [int(x) for images, _ in loader for x in (images[:, 0, 0, 0] * 255).round()]

    one, two = (ToySuite(batch_size=10, seed=3).for_task("gamma").train_dataloader() for _ in range(2))
    first, second = epoch(one, None), epoch(one, None)
    assert sorted(first) == sorted(second) == list(range(90))
    assert first != second
    assert epoch(two, 1) == second  # as after resuming
    assert epoch(two, 0) == first
    assert epoch(ToySuite(batch_size=10, seed=4).for_task("gamma").train_dataloader(), 0) != first


def test_a_dataset_smaller_than_a_batch_is_one_batch() -> None:
    loader = ToySuite(batch_size=64).for_task("beta").train_dataloader()
    assert [len(labels) for _, labels in loader] == [20]


def test_for_task_takes_another_batch_size() -> None:
    suite = ToySuite(batch_size=16)
    data = suite.for_task("alpha", batch_size=25)
    assert isinstance(data, TaskData)
    assert data.num_classes == 5
    assert len(data.train_dataloader()) == 2
    assert len(suite.for_task("alpha").train_dataloader()) == 3


def test_pretraining_is_optional() -> None:
    suite = ToySuite()
    assert suite.pretraining() is None
    with pytest.raises(ValueError, match="no pretraining data"):
        suite.pretraining_data().setup()


def test_a_suite_is_a_datamodule_for_the_trainer() -> None:
    import lightning as L

    class Counter(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(16, 5)
            self.seen: list[tuple[int, int]] = []

        def loss(self, batch):
            images, labels = batch
            return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

        def training_step(self, batch, batch_idx):
            return sum(self.loss(part) for part in batch.values() if part is not None)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.seen.append((dataloader_idx, len(batch[1])))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Counter()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, ToySuite(batch_size=10))
    assert trainer.global_step == 9
    assert module.seen == [(0, 7), (1, 7), (2, 7)]


# ---- mixture


@pytest.mark.parametrize(("per_task", "expected"), [(None, 53), (10, 10), (200, 200)])
def test_mixture_is_balanced(per_task: int | None, expected: int) -> None:
    mixture = ToySuite(batch_size=1000).mixture(per_task=per_task)
    assert isinstance(mixture, TaskMixture)
    mixture.setup()
    loader = mixture.train_dataloader()
    images, labels = next(iter(loader))
    assert torch.bincount(labels).tolist() == [expected] * 3
    # The label is the index of the task that the image comes from.
    assert torch.equal((images[:, 0, 1, 1] * 255).round().long(), 100 + 50 * labels)
    again, _ = next(iter(loader))
    assert not torch.equal(images, again)


def test_mixture_evaluates_equal_parts() -> None:
    suite = ToySuite(tasks=["gamma", "beta"])
    mixture = suite.mixture()
    assert mixture.names == ("gamma", "beta")
    assert mixture.num_classes == 2
    for loader, count in ((mixture.val_dataloader(), 7), (mixture.test_dataloader(), 9)):
        labels = torch.cat([labels for _, labels in loader])
        assert torch.bincount(labels).tolist() == [count, count]
        assert labels.dtype == torch.int64


def test_mixture_needs_a_positive_per_task() -> None:
    with pytest.raises(ValueError, match="per_task"):
        ToySuite().mixture(per_task=0)


def test_mixture_of_third_party_datasets() -> None:
    mixture = MixtureDataset([SlowDataset(), Subset(SlowDataset(), [5, 4]), array(3, 9)])
    assert len(mixture) == 11
    batch = mixture.__getitems__([10, 7, 0, 6, 5])
    assert batch.labels.tolist() == [2, 1, 0, 1, 0]
    assert batch.inputs[1:, 0, 0, 0].tolist() == [4.0, 0.0, 5.0, 5.0]
    for index in range(len(mixture)):
        image, label = mixture[index]
        assert torch.equal(image, mixture.__getitems__([index]).inputs[0])
        assert label == mixture.__getitems__([index]).labels[0]
    with pytest.raises(IndexError, match="11 samples"):
        mixture[11]


def test_samplers_cover_everything() -> None:
    sampler = BalancedSampler([5, 2], per_dataset=5, seed=0)
    order = list(sampler)
    assert len(order) == len(sampler) == 10
    assert sorted(i for i in order if i < 5) == [0, 1, 2, 3, 4]
    assert {i for i in order if i >= 5} == {5, 6}
    assert sorted(ShuffleSampler(7, seed=0)) == list(range(7))
    with pytest.raises(ValueError, match="at least one"):
        BalancedSampler([3, 0], per_dataset=1, seed=0)


# ---- fingerprint


def test_fingerprint_covers_only_what_changes_the_data() -> None:
    fingerprint = ToySuite().fingerprint()
    assert len(fingerprint) == 64
    assert int(fingerprint, 16)
    assert ToySuite(batch_size=2, eval_batch_size=3, num_workers=1).fingerprint() == fingerprint
    assert ToySuite(tasks=list(SIZES)).fingerprint() == fingerprint
    assert ToySuite(seed=1).fingerprint() != fingerprint
    assert ToySuite(tasks=["alpha"]).fingerprint() != fingerprint
    assert ToySuite(tasks=["alpha"]).fingerprint(selection=False) == ToySuite().fingerprint(selection=False)


def test_fingerprint_covers_a_subclass() -> None:
    class Rooted(ToySuite):
        def __init__(self, root: str, **kwargs) -> None:
            self.root = root
            super().__init__(**kwargs)

    class Newer(Rooted):
        DATA_VERSION = 2

    prints = {Rooted("a").fingerprint(), Rooted("b").fingerprint(), Rooted("a", seed=1).fingerprint(),
              Newer("a").fingerprint(), ToySuite().fingerprint()}  # fmt: skip
    assert len(prints) == 5
    assert Rooted("a").fingerprint() == Rooted("a", batch_size=3).fingerprint()


def test_an_argument_that_is_not_stored_is_an_error() -> None:
    class Forgetful(ToySuite):
        def __init__(self, root: str) -> None:
            super().__init__()

    with pytest.raises(TypeError, match=r"'root' as self\.root"):
        Forgetful("a").fingerprint()


def test_derived_seeds_never_change() -> None:
    assert derive_seed(0) == 3456079177858693020
    assert derive_seed(0, "digits", "train") == 3767903712488063495


@pytest.mark.parametrize("name", ["a/b", "", "..", "a\\b", "line\n"])
def test_an_invalid_task_name_is_refused_before_anything_is_built(name: str) -> None:
    suite = type("Named", (TaskSuite,), {"TASKS": (name, "bars")})
    with pytest.raises(ValueError, match=r"Named: (a task has no name|the task .* cannot be called so)"):
        suite()
