"""FreeModel in threads: results equal those of a single thread, and the model does not change."""

import copy
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from freemerge.experts import Expert, attached, emr_experts, extract, extract_low_rank
from freemerge.models import EarlyRouter, FreeModel
from tests.tiny import tiny_backbone

KINDS = ("sparse", "low_rank", "masked")


def experts_of(backbone: nn.Module, kind: str) -> dict[str, Expert]:
    residuals = {}
    for seed, task in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        residuals[task] = {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in backbone.weights().items()}
    if kind == "masked":
        return emr_experts(residuals)[1]
    cut = (lambda r: extract(r, 0.2)) if kind == "sparse" else (lambda r: extract_low_rank(r, density=0.3))
    return {task: cut(residual) for task, residual in residuals.items()}


def model_of(kind: str, backbone: nn.Module | None = None) -> FreeModel:
    backbone = backbone or tiny_backbone().eval()
    torch.manual_seed(0)
    heads = {task: nn.Linear(16, 3) for task in "ab"}
    return FreeModel(backbone, heads, experts_of(backbone, kind), EarlyRouter(2, "embeddings", 16, hidden=0)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@contextmanager
def computing(*works: Callable[[], None]) -> Iterator[list[BaseException]]:
    """Run each function repeatedly in its own thread while the block runs; the list collects their errors."""
    stop, raised, started = threading.Event(), [], threading.Barrier(len(works) + 1)

    def repeat(work: Callable[[], None]) -> None:
        started.wait()
        try:
            while not stop.is_set():
                with torch.no_grad():
                    work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=repeat, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    started.wait()
    try:
        yield raised
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=20)
        assert not any(thread.is_alive() for thread in threads)


def expects(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A function that asserts that the results never change."""
    with torch.no_grad():
        expected = call()
    return lambda: torch.testing.assert_close(call(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_have_the_results_of_one_thread_and_change_no_bit(kind: str, images: torch.Tensor) -> None:
    model = model_of(kind)
    before = {name: tensor.clone() for name, tensor in model.backbone.weights().items()}
    works = [expects(lambda task=task: model(images, task=task).logits) for task in "ab"]
    works += [expects(lambda: model(images).logits), expects(lambda: model.features(images, "b"))]
    with computing(*works) as raised, torch.no_grad():
        for _ in range(40):
            works[0]()
    assert not raised
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.weights().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kinds", [("sparse", "sparse"), ("sparse", "low_rank"), ("masked", "low_rank")])
def test_models_that_share_a_backbone_do_not_affect_each_other(kinds: tuple[str, str], images: torch.Tensor) -> None:
    backbone = tiny_backbone().eval()
    one, two = (model_of(kind, backbone) for kind in kinds)
    before = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    works = [expects(lambda model=model: model(images, task="a").logits) for model in (one, two)]
    name, weight = next((n, t) for n, t in backbone.weights().items() if re.search(r"layers?\.0\.", n) and t.dim() == 2)
    inner = extract({name: torch.ones_like(weight)}, 0.5)

    def with_a_layer_changed() -> torch.Tensor:
        with attached(backbone.model, inner):
            return backbone(images)

    with computing(*works, expects(with_a_layer_changed)) as raised, torch.no_grad():
        for _ in range(40):
            works[0]()
            works[1]()
    assert not raised
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.weights().items())


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_copies_and_files_made_during_passes_have_the_merged_weights(kind: str, images: torch.Tensor, tmp_path) -> None:
    model = model_of(kind)
    before = {name: tensor.clone() for name, tensor in model.backbone.weights().items()}
    with torch.no_grad():
        expected = model(images, task="a").logits
    with computing(*(lambda task=task: model(images, task=task) for task in "ab")) as raised, torch.no_grad():
        for turn in range(10):
            copied, plain = copy.deepcopy(model), model.task_model("a")
            with model.undisturbed():
                state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            assert all(torch.equal(before[name], tensor) for name, tensor in copied.backbone.weights().items())
            assert all(torch.equal(before[name], state[f"backbone.model.{name}"]) for name in before)
            torch.testing.assert_close(plain(images), expected, atol=1e-5, rtol=1e-4)
            if turn % 5 == 0:
                model.save_pretrained(tmp_path / str(turn))
                again = FreeModel.from_pretrained(tmp_path / str(turn))
                assert all(torch.equal(before[name], tensor) for name, tensor in again.backbone.weights().items())
    assert not raised


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_pass_does_not_block_others(kind: str, images: torch.Tensor) -> None:
    model = model_of(kind)
    work = expects(lambda: model(images, task="a").logits)
    before = {name: tensor.clone() for name, tensor in model.backbone.weights().items()}
    last = model.backbone.model.layernorm
    for error in (RuntimeError("out of memory"), KeyboardInterrupt()):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        handle = last.register_forward_pre_hook(fail)
        with pytest.raises(type(error)):
            model(images, task="b")
        handle.remove()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.weights().items())
        with computing(work) as raised:
            work()
        assert not raised


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_has_computed_can_be_pickled(kind: str, images: torch.Tensor) -> None:
    model = model_of(kind)
    expected = model(images, task="a").logits
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(images, task="a").logits, expected)
    for parameter in again.parameters():
        parameter.zero_()
    torch.testing.assert_close(model(images, task="a").logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_threads_compute_at_the_same_time_and_see_the_merged_weights(kind: str, images: torch.Tensor) -> None:
    """Each thread waits within its pass for the others, while the model has its own weights."""
    model = model_of(kind)
    works = [expects(lambda task=task: model(images, task=task).logits) for task in "abab"]
    live = dict(model.state_dict(keep_vars=True))
    before = {name: tensor.clone() for name, tensor in live.items()}
    middle, met = threading.Barrier(len(works)), []

    def meet(*_: object) -> None:
        middle.wait(timeout=20)
        met.append(all(torch.equal(before[name], tensor) for name, tensor in live.items()))

    handle = model.backbone.model.layernorm.register_forward_pre_hook(meet)
    raised = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    handle.remove()
    assert not raised
    assert met == [True] * len(works)


@torch.no_grad()
def test_changes_wait_for_passes_and_passes_for_changes(images: torch.Tensor) -> None:
    model, other = model_of("sparse"), model_of("sparse", tiny_backbone(1).eval())
    states = [{name: t.clone() for name, t in one.state_dict().items()} for one in (model, other)]
    allowed = [one(images, task="a").logits for one in (model, other)]

    def is_one_of_both() -> None:
        found = model(images, task="a").logits
        assert any(torch.allclose(found, whole, atol=1e-5, rtol=1e-4) for whole in allowed)

    with computing(is_one_of_both, is_one_of_both) as raised:
        for turn in range(20):
            model.load_state_dict(states[turn % 2])
            model.double().float()
            model.train().eval()
    assert not raised


@torch.no_grad()
def test_a_compiled_backbone_is_used_by_one_thread_at_a_time(images: torch.Tensor) -> None:
    model = model_of("sparse")
    works = [expects(lambda task=task: model(images, task=task).logits) for task in "ab"]
    model.backbone.model.compile(backend="eager")
    works[0]()
    with computing(*works) as raised:
        for _ in range(5):
            works[0]()
    assert not raised


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_backbone_is_refused_and_a_model_under_ddp_computes(
    kind: str, images: torch.Tensor, tmp_path
) -> None:
    model = model_of(kind)
    expected = model(images, task="a").logits
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = nn.parallel.DistributedDataParallel(model)(images, task="a").logits
        torch.testing.assert_close(found, expected)
        fully_shard(model.backbone.model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"the backbone is sharded \(FSDP, as a whole\)"):
            model(images, task="a")
    finally:
        torch.distributed.destroy_process_group()
