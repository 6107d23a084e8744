"""FreeModel: routing, grouping, exact restoration, and folders."""

import copy
import json
import random
from types import MethodType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from freemerge.checkpoints import CheckpointError
from freemerge.experts import PackedExpert, attached, emr_experts, extract, extract_low_rank, mix
from freemerge.models import ConvRouter, EarlyRouter, FreeModel, choose_thresholds
from tests.tiny import tiny_backbone, tiny_text_backbone


@pytest.fixture
def model(images: torch.Tensor) -> FreeModel:
    torch.manual_seed(0)
    backbone = tiny_backbone().eval()
    experts = {}
    for seed, task in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(t.shape, generator=generator) for name, t in backbone.weights().items()}
        expert = extract(noise, 0.05)
        experts[task] = expert.with_values(expert.flat_values().bfloat16().float())  # exact in a file
    heads = {"a": nn.Linear(16, 3), "b": nn.Linear(16, 5), "c": nn.Linear(16, 2)}
    router = ConvRouter(3, channels=1, width=4).eval()
    with torch.no_grad():  # an untrained router sends every image to one task
        router.head.bias -= router(images).mean(dim=0)
    return FreeModel(backbone, heads, experts, router, {"a": ["x", "y", "z"]}).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def by_hand(model: FreeModel, images: torch.Tensor, task: str) -> torch.Tensor:
    if task not in model.experts:
        return model.heads[task](model.backbone(images))
    with attached(model.backbone.model, model.experts[task]):
        return model.heads[task](model.backbone(images))


@torch.no_grad()
def test_a_named_task_uses_its_expert_and_head(model: FreeModel, images: torch.Tensor) -> None:
    for index, (task, classes) in enumerate((("a", 3), ("b", 5), ("c", 2))):
        output = model(images, task=task)
        assert output.task.tolist() == [index] * len(images)
        assert output.router_logits is None
        assert output.logits.shape == (40, 5)
        assert torch.equal(output.logits[:, :classes], by_hand(model, images, task))
        assert bool((output.logits[:, classes:] == float("-inf")).all())
        assert torch.equal(output.labels, by_hand(model, images, task).argmax(dim=1))


@torch.no_grad()
def test_each_sample_of_a_mixed_batch_has_the_result_of_its_task(model: FreeModel, images: torch.Tensor) -> None:
    output = model(images)
    assert torch.equal(output.task, model.router(images).argmax(dim=1))
    assert len(output.task.unique()) > 1  # otherwise the test shows nothing
    for i, name in enumerate(output.task_names):
        alone = model(images[i : i + 1], task=name)
        torch.testing.assert_close(output.logits[i], alone.logits[0])


@torch.no_grad()
def test_a_named_head_is_used_with_every_routed_expert(model: FreeModel, images: torch.Tensor) -> None:
    routed, output = model(images), model(images, head="b")
    assert output.task_names == ["b"] * len(images)
    assert torch.equal(output.router_logits, routed.router_logits)
    assert torch.equal(output.abstained, routed.abstained)
    for i, name in enumerate(routed.task_names):
        features = model.features(images[i : i + 1], name)
        torch.testing.assert_close(output.logits[i], model.heads["b"](features)[0])
    assert model(images[:0], head="b").logits.shape == (0, 5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_ten_thousand_switches_change_no_bit_in_bfloat16(model: FreeModel, images: torch.Tensor, kind: str) -> None:
    """Switches through the model; sparse experts with a single layer, so that the passes take seconds."""
    if kind == "low_rank":
        model = with_low_rank_experts(model)
    model = model.to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.backbone.weights().items()}
    outputs = {task: model(images.bfloat16(), task=task).logits for task in model.tasks}
    choose, inputs = random.Random(0), images[:1].bfloat16()
    if kind == "sparse":
        inputs = torch.ones(1, 16, dtype=torch.bfloat16)
        model.backbone.forward = MethodType(lambda part, inputs: part.layernorm(inputs), model.backbone.model)
    for _ in range(10_000 if kind == "sparse" else 100):
        model.features(inputs, choose.choice(model.tasks))
    vars(model.backbone).pop("forward", None)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.weights().items())
    for task in model.tasks:
        assert torch.equal(model(images.bfloat16(), task=task).logits, outputs[task])
    model(images.bfloat16())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.weights().items())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "low_rank", "mixed"])
def test_autocast_has_no_outdated_copies_of_switched_weights(model: FreeModel, images: torch.Tensor, kind: str) -> None:
    model = with_low_rank_experts(model) if kind == "low_rank" else model
    model.top_n = 2 if kind == "mixed" else 1
    alone, routed = {}, None
    for task in model.tasks:
        with torch.autocast("cpu", torch.bfloat16):
            alone[task] = model(images, task=task).logits
    with torch.autocast("cpu", torch.bfloat16):
        routed = model(images).logits
    with torch.autocast("cpu", torch.bfloat16):  # all calls in one region
        for task in model.tasks:
            assert torch.equal(model(images, task=task).logits, alone[task])
        assert torch.equal(model(images).logits, routed)
        one_by_one = torch.cat([model(images[i : i + 1]).logits for i in range(len(images))])
    torch.testing.assert_close(one_by_one, routed, rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("top_n", [1, 2])
def test_a_backbone_with_another_layout_has_the_same_results_group_by_group(
    model: FreeModel, images: torch.Tensor, top_n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_low_rank_experts(model)
    model.top_n = top_n
    side_by_side = model(images)
    monkeypatch.setattr("freemerge.experts.running.groups.fits_one_pass_unlocked", lambda *_: False)
    one_by_one = model(images)
    assert torch.equal(one_by_one.task, side_by_side.task)
    torch.testing.assert_close(one_by_one.logits, side_by_side.logits)


def with_low_rank_experts(model: FreeModel) -> FreeModel:
    experts = {}
    for seed, task in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(t.shape, generator=generator) for name, t in model.backbone.weights().items()}
        experts[task] = extract_low_rank(noise, rank=1)
    return FreeModel(model.backbone, dict(model.heads), experts, model.router).eval()


@torch.no_grad()
def test_low_rank_experts_equal_summed_weights(model: FreeModel, images: torch.Tensor) -> None:
    model = with_low_rank_experts(model)
    for task in ("a", "b"):
        expected = by_hand(model, images, task)
        torch.testing.assert_close(model(images, task=task).logits[:, : expected.shape[1]], expected)
    output = model(images)
    for i, name in enumerate(output.task_names):
        torch.testing.assert_close(output.logits[i], model(images[i : i + 1], task=name).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_soft_routing_sums_the_top_experts_by_their_probabilities(
    model: FreeModel, images: torch.Tensor, kind: str
) -> None:
    model = with_low_rank_experts(model) if kind == "low_rank" else model
    model.top_n = 2
    output = model(images)
    probabilities, experts = output.router_logits.softmax(dim=1), model.experts
    assert torch.equal(output.task, probabilities.argmax(dim=1))
    for i in range(8):
        top, which = probabilities[i].topk(2)
        second = round(float(top[1] / top.sum()) * 16)
        shares = {model.tasks[which[0]]: 1 - second / 16, model.tasks[which[1]]: second / 16}
        shares = {task: share for task, share in shares.items() if task in experts and share}
        name = model.tasks[which[0]]
        with attached(model.backbone.model, mix([experts[t] for t in shares], list(shares.values()))):
            expected = model.heads[name](model.backbone(images[i : i + 1]))[0]
        torch.testing.assert_close(output.logits[i, : len(expected)], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output.logits[i], model(images[i : i + 1]).logits[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_router_with_low_confidence_abstains(model: FreeModel, images: torch.Tensor) -> None:
    confidence = model.route(images)[0].softmax(dim=1).amax(dim=1)
    model.threshold = float(confidence.median())
    output = model(images)
    assert torch.equal(output.abstained, confidence < model.threshold)
    assert 10 < int(output.abstained.sum()) < 30
    for i in range(len(images)):
        name = output.task_names[i]
        if output.abstained[i]:
            expected = model.heads[name](model.backbone(images[i : i + 1]))[0]
        else:
            expected = by_hand(model, images[i : i + 1], name)[0]
        torch.testing.assert_close(output.logits[i, : len(expected)], expected)


@torch.no_grad()
def test_an_out_of_distribution_input_gets_no_expert_at_any_confidence(model: FreeModel, images: torch.Tensor) -> None:
    router, tasks = model.router, torch.arange(40) % 3
    router.out_of_distribution.fit(router.head_inputs(images), tasks)
    router.out_of_distribution.threshold.fill_(float(router.judge(images)[1].amin()))
    strange = torch.cat([images[:3], 100 * images[3:6]])
    output = model(strange)
    assert output.abstained.tolist() == [False] * 3 + [True] * 3
    for i in range(3, 6):
        expected = model.heads[output.task_names[i]](model.backbone(strange[i : i + 1]))[0]
        torch.testing.assert_close(output.logits[i, : len(expected)], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_task_model_computes_what_the_named_task_does_compiled_and_exported(
    model: FreeModel, images: torch.Tensor
) -> None:
    for kind in (model, with_low_rank_experts(model)):
        expected = kind(images, task="a").logits[:, :3]
        plain = kind.task_model("a")
        torch.testing.assert_close(plain(images), expected)
        exported = torch.export.export(plain, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(exported.module()(images[:7]), expected[:7])
    torch.testing.assert_close(torch.compile(plain, backend="aot_eager")(images), expected)
    with pytest.raises(ValueError, match="unknown task 'd'; tasks: a, b, c"):
        model.task_model("d")


@torch.no_grad()
def test_a_compiled_backbone_sees_the_switched_weights(model: FreeModel, images: torch.Tensor) -> None:
    expected = {task: model(images, task=task).logits for task in model.tasks}
    model.backbone.model.compile(backend="aot_eager")
    for task in (*model.tasks, "a"):
        torch.testing.assert_close(model(images, task=task).logits, expected[task])


@torch.no_grad()
def test_experts_take_few_bytes_and_a_copy_is_independent(model: FreeModel, images: torch.Tensor) -> None:
    assert model.expert_bytes <= 3.2 * sum(expert.num_values for expert in model.experts.values()) + 400
    expected = model(images, task="a").logits
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.zero_()
    assert torch.equal(model(images, task="a").logits, expected)
    assert not torch.equal(copied(images, task="a").logits, expected)


@torch.no_grad()
def test_texts_are_routed_by_the_backbones_own_embeddings() -> None:
    """Inputs are a dictionary; padding on the right changes nothing."""
    torch.manual_seed(0)
    backbone = tiny_text_backbone().eval()
    experts = {
        task: extract(
            {name: torch.randn(t.shape) for name, t in backbone.weights().items() if t.is_floating_point()}, 0.05
        )
        for task in ("a", "b")
    }
    router = EarlyRouter(2, "embeddings", 16, hidden=4).eval()
    model = FreeModel(backbone, {"a": nn.Linear(16, 3), "b": nn.Linear(16, 2)}, experts, router).eval()
    ids = torch.randint(1, 50, (12, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        router.head.bias -= model.route(inputs)[0].mean(dim=0)
    output = model(inputs)
    assert len(output.task.unique()) == 2
    padded = {name: nn.functional.pad(tensor, (0, 3)) for name, tensor in inputs.items()}
    torch.testing.assert_close(model(padded).logits, output.logits, atol=1e-5, rtol=1e-4)
    for i, name in enumerate(output.task_names):
        alone = {key: tensor[i : i + 1] for key, tensor in inputs.items()}
        torch.testing.assert_close(model(alone, task=name).logits[0], output.logits[i], atol=1e-5, rtol=1e-4)
    assert model({name: tensor[:0] for name, tensor in inputs.items()}).logits.shape == (0, 3)


@torch.no_grad()
def test_packed_experts_are_not_copied(model: FreeModel, images: torch.Tensor) -> None:
    packed = {task: PackedExpert(expert) for task, expert in model.experts.items()}
    again = FreeModel(copy.deepcopy(model.backbone), dict(model.heads), packed).eval()
    assert again.expert_bytes == model.expert_bytes
    assert torch.equal(again(images, task="a").logits, model(images, task="a").logits)
    with pytest.raises(ValueError, match="there is an expert for 'z' but no head"):
        FreeModel(model.backbone, dict(model.heads), {"z": packed["a"]})


@torch.no_grad()
def test_batches_of_one_and_none(model: FreeModel, images: torch.Tensor) -> None:
    assert model(images[:1]).logits.shape == (1, 5)
    empty = model(images[:0])
    assert empty.logits.shape == (0, 5)
    assert empty.task_names == []
    assert model(images[:0], task="a").labels.shape == (0,)


def test_refusals(model: FreeModel, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="unknown task 'd'; tasks: a, b, c"):
        model(images, task="d")
    with pytest.raises(ValueError, match="unknown task 'd'; tasks: a, b, c"):
        model(images, head="d")
    with pytest.raises(ValueError, match="pass `task` or `head`, not both"):
        model(images, task="a", head="b")
    with pytest.raises(ValueError, match="no router; name the task"):
        FreeModel(model.backbone, dict(model.heads))(images)
    with pytest.raises(ValueError, match="an expert for 'z' but no head"):
        FreeModel(model.backbone, dict(model.heads), {"z": model.experts["a"]})
    with pytest.raises(ValueError, match="the router has 3 tasks, there are 1 heads"):
        FreeModel(model.backbone, {"a": model.heads["a"]}, router=model.router)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        FreeModel(model.backbone, dict(model.heads), threshold=2.0)
    with pytest.raises(ValueError, match="top_n must be between 1 and the 3 tasks, got 4"):
        FreeModel(model.backbone, dict(model.heads), top_n=4)
    with pytest.raises(ValueError, match="the model has no tensor 'nowhere'"):
        FreeModel(model.backbone, dict(model.heads), {"a": extract({"nowhere": torch.ones(3)}, 1.0)})


@torch.no_grad()
def test_the_folder_round_trips(tmp_path, model: FreeModel, images: torch.Tensor) -> None:
    model.threshold, model.top_n = 0.4, 2
    model(images)  # the backbone's weights lie in one buffer now
    model.save_pretrained(tmp_path / "m")
    again = FreeModel.from_pretrained(tmp_path / "m")
    assert again.tasks == model.tasks
    assert again.class_names == model.class_names
    assert (again.threshold, again.top_n) == (0.4, 2)
    for task in (None, "a", "c"):
        assert torch.equal(again(images, task=task).logits, model(images, task=task).logits)
    plain = AutoModel.from_pretrained(tmp_path / "m", add_pooling_layer=False)
    assert torch.equal(plain.state_dict()["layernorm.weight"], model.backbone.weights()["layernorm.weight"])


def test_files_that_do_not_belong_together_are_refused(tmp_path, model: FreeModel) -> None:
    with pytest.raises(CheckpointError, match=r"not a FREE model \(no freemerge.json\)"):
        FreeModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "layernorm.weight": weights["layernorm.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="the folder's files do not belong together"):
        FreeModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "freemerge.json").read_text())
    (tmp_path / "freemerge.json").write_text(json.dumps({**description, "format": "other"}))
    with pytest.raises(CheckpointError, match="format 'other'"):
        FreeModel.from_pretrained(tmp_path)


def test_an_expert_of_other_merged_weights_is_refused(tmp_path, model: FreeModel) -> None:
    model.save_pretrained(tmp_path / "m")
    shifted = {name: tensor + 1e-3 for name, tensor in model.backbone.weights().items()}
    model.backbone.load_weights(shifted)
    model.save_pretrained(tmp_path / "n")
    expert = tmp_path / "m" / "experts" / "a.safetensors"
    expert.write_bytes((tmp_path / "n" / "experts" / "a.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"a\.safetensors: this expert belongs to merged weights"):
        FreeModel.from_pretrained(tmp_path / "m")


def test_the_thresholds_let_the_wanted_fraction_of_validation_samples_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, scores = 3 * torch.randn(1000, 4, generator=generator), torch.randn(1000, generator=generator)
    confidence = logits.softmax(dim=1).amax(dim=1)
    for fraction in (0.5, 0.9, 0.99):
        least_sure, least_score = choose_thresholds(logits, scores, fraction)
        passed = int(((confidence >= least_sure) & (scores >= least_score)).sum())
        assert 1000 * fraction <= passed <= 1000 * fraction + 1
        assert int((confidence < least_sure).sum()) == int((scores < least_score).sum()) > 0
    assert choose_thresholds(logits, scores, 1.0) == (0.0, float("-inf"))
    always = torch.zeros(1000)  # a router whose inputs all have one score decides by its confidence alone
    assert int((confidence >= choose_thresholds(logits, always, 0.9)[0]).sum()) == 900
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got 0"):
        choose_thresholds(logits, scores, 0.0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_an_expert_that_overflows_float16_is_an_error(model: FreeModel, images: torch.Tensor, kind: str) -> None:
    name = "layernorm.weight"
    change = torch.zeros(16)
    change[3] = 65504.0
    model.backbone.weights()[name].fill_(100.0)
    huge = extract({name: change}, 1.0) if kind == "sparse" else extract_low_rank({name: change}, rank=1)
    half = FreeModel(copy.deepcopy(model.backbone), dict(model.heads), {"a": huge.tagged(task="a")}).half().eval()
    before = {key: tensor.clone() for key, tensor in half.backbone.weights().items()}
    for compute in (
        lambda: half(images.half(), task="a"),
        lambda: half.task_model("a"),
        lambda: attached(half.backbone.model, huge.tagged(task="a")).__enter__(),
    ):
        with pytest.raises(
            OverflowError, match=r"expert of task 'a' makes tensor 'layernorm.weight' larger than float16"
        ):
            compute()
    assert all(torch.equal(before[key], tensor) for key, tensor in half.backbone.weights().items())
    assert half(images.half(), task="b").logits.isfinite().all()


@torch.no_grad()
def test_experts_of_several_kinds_mix(model: FreeModel, images: torch.Tensor) -> None:
    residuals = {task: {n: torch.randn(t.shape) for n, t in model.backbone.weights().items()} for task in "abc"}
    _, masked = emr_experts({task: residuals[task] for task in "bc"})
    experts = {"a": extract(residuals["a"], 0.1), "b": masked["b"], "c": extract_low_rank(residuals["c"], rank=1)}
    free = FreeModel(model.backbone, dict(model.heads), experts, top_n=2).eval()
    for pair in (("a", "b"), ("a", "c"), ("b", "c")):
        found = free._grouped_features(images, [(dict.fromkeys(pair, 0.5), len(images))])
        by_hand = copy.deepcopy(model.backbone)
        for name, weight in by_hand.weights().items():
            zero = torch.zeros_like(weight)
            weight += sum(
                0.5 * free.experts[task].added(name, zero) for task in pair if name in free.experts[task].shapes
            )
        torch.testing.assert_close(found, by_hand(images), atol=1e-4, rtol=1e-4)
