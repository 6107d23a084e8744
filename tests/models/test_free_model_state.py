"""Experts are part of a FreeModel's state dict."""

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as distributed
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from freemerge.experts import LowRankExpert, emr_experts, extract, extract_low_rank
from freemerge.models import FreeModel
from tests.tiny import tiny_backbone

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def model_of(seed: int, kind: str | None = "sparse", density: float = 0.1, tasks: str = "ab") -> FreeModel:
    """The seed determines the backbone, heads and experts."""
    backbone = tiny_backbone(seed).eval()
    residuals = {}
    for task in tasks if kind else "":
        generator = torch.Generator().manual_seed(10 * seed + ord(task))
        residuals[task] = {n: torch.randn(t.shape, generator=generator) for n, t in backbone.weights().items()}
    if kind == "masked":
        experts = emr_experts(residuals)[1]
    elif kind == "low_rank":
        experts = {task: extract_low_rank(residual, density=density) for task, residual in residuals.items()}
    else:
        experts = {task: extract(residual, density) for task, residual in residuals.items()}
    torch.manual_seed(seed)
    return FreeModel(backbone, {task: nn.Linear(16, 3) for task in "abc"}, experts).eval()


@torch.no_grad()
def answers(model: FreeModel) -> torch.Tensor:
    return torch.cat([model(IMAGES, task=task).logits for task in model.tasks])


class Project(L.LightningModule):
    """A user's module that contains a FREE model and trains its heads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.free = model_of(seed)
        self.free.backbone.requires_grad_(False)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.free(batch[0], task="a").logits.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.free.heads.parameters(), lr=0.1)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({"density": 0.1}, {"density": 0.1}),
        ({"density": 0.3, "tasks": "abc"}, {"density": 0.05, "tasks": "a"}),
        ({"kind": "low_rank"}, {"kind": "sparse"}),
        ({"kind": "sparse"}, {"kind": "masked"}),
        ({"kind": "masked"}, {"kind": None}),
        ({"kind": None}, {"kind": "low_rank"}),
    ],
)
def test_a_loaded_state_replaces_the_experts(source: dict, target: dict, assign: bool) -> None:
    one, two = model_of(0, **source), model_of(1, **target)
    expected, state = answers(one), copy.deepcopy(one.state_dict())
    assert not torch.allclose(answers(two), expected, atol=0.1)
    kept = copy.deepcopy(state)
    assert str(two.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    torch.testing.assert_close(answers(two), expected, atol=1e-6, rtol=1e-5)
    assert two.packed_experts.keys() == one.packed_experts.keys()
    assert two.expert_bytes == one.expert_bytes
    if not assign:  # independent tensors
        two.half().float()
        assert all(torch.equal(state[key], kept[key]) for key in kept)


def test_the_state_contains_the_packed_experts(tmp_path: Path) -> None:
    for kind in ("sparse", "low_rank", "masked"):
        model = model_of(0, kind)
        state = model.state_dict()
        packed = model.packed_experts["a"]
        assert state["experts.a.codes"] is packed.codes
        assert state["experts.a.scales"].dtype == torch.float32
        added = {key: t for key, t in state.items() if key.startswith("experts.") and not key.endswith("layout")}
        assert sum(t.numel() * t.element_size() for t in added.values()) == model.expert_bytes
        save_file({key: t.clone() for key, t in state.items()}, tmp_path / f"{kind}.safetensors")
        torch.save(state, tmp_path / "state.pt")
        for again in (load_file(tmp_path / f"{kind}.safetensors"), torch.load(tmp_path / "state.pt")):
            other = model_of(1, None)
            other.load_state_dict(again)
            torch.testing.assert_close(answers(other), answers(model), atol=1e-6, rtol=1e-5)


def test_moving_and_casting_a_model_leaves_its_experts_exact() -> None:
    model = model_of(0)
    before = {key: t.clone() for key, t in model.state_dict().items() if key.startswith("experts")}
    state = model.to(torch.bfloat16).state_dict()
    assert all(torch.equal(before[key], state[key]) for key in before)
    assert state["heads.a.weight"].dtype == torch.bfloat16
    assert not {key for key, _ in model.named_buffers() if key.startswith("experts")}  # DDP broadcasts them
    copied = copy.deepcopy(model)
    assert all(torch.equal(before[key], copied.state_dict()[key]) for key in before)
    assert copied.state_dict()["experts.a.codes"].data_ptr() != state["experts.a.codes"].data_ptr()


def test_a_state_without_experts_warns_and_strict_false_keeps_the_models_own() -> None:
    one, two = model_of(0), model_of(1)
    own = {task: packed.codes for task, packed in two.packed_experts.items()}
    old = {key: t for key, t in one.state_dict().items() if not key.startswith("experts")}
    with pytest.warns(UserWarning, match="state dict has no experts"), pytest.raises(RuntimeError, match=r"experts\.a"):
        two.load_state_dict(old)
    with pytest.warns(UserWarning, match="strict=False the model keeps its own"):
        said = two.load_state_dict(old, strict=False)
    assert "experts.layout" in said.missing_keys
    assert all(two.packed_experts[task].codes is codes for task, codes in own.items())
    assert str(model_of(1, None).load_state_dict(old)) == "<All keys matched successfully>"


def test_experts_that_do_not_match_are_refused_and_change_nothing() -> None:
    one, two = model_of(0), model_of(1)
    own = two.packed_experts
    lacking = {key: t for key, t in one.state_dict().items() if key != "experts.b.gaps"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "experts.b.gaps"'):
        two.load_state_dict(lacking)
    short = one.state_dict()
    short["experts.a.codes"] = short["experts.a.codes"][:-1]
    with pytest.raises(RuntimeError, match="the expert of 'a' cannot be loaded"):
        two.load_state_dict(short)
    elsewhere = one.state_dict()
    other = FreeModel(one.backbone, {"z": nn.Linear(16, 3)}, {"z": one.experts["a"]}).state_dict()
    elsewhere = {key: t for key, t in elsewhere.items() if not key.startswith("experts")}
    elsewhere |= {key: t for key, t in other.items() if key.startswith("experts")}
    with pytest.raises(RuntimeError, match="an expert for 'z' but no head; tasks: a, b, c"):
        two.load_state_dict(elsewhere)
    wide = LowRankExpert({}, {}, {"layernorm.bias": torch.ones(16)}, {"layernorm.bias": (16,)})
    narrow = FreeModel(one.backbone, {"a": nn.Linear(16, 3)}, {"a": wide})
    packed = narrow.packed_experts["a"]
    packed.shapes["layernorm.bias"] = (8,)
    wrong = {key: t for key, t in one.state_dict().items() if not key.startswith("experts")}
    wrong |= {key: t for key, t in narrow.state_dict().items() if key.startswith("experts")}
    with pytest.raises(RuntimeError, match=r"'layernorm.bias' has shape \(16,\) in the model, .* for \(8,\)"):
        two.load_state_dict(wrong)
    assert all(two.packed_experts[task] is own[task] for task in own)


def test_a_lightning_checkpoint_contains_the_experts(tmp_path: Path) -> None:
    one, two = Project(0), Project(1)
    quiet = {
        "accelerator": "cpu", "max_steps": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    trainer = L.Trainer(**quiet)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES), batch_size=4)
    trainer.fit(one, loader)
    trainer.save_checkpoint(tmp_path / "whole.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert "free.experts.a.codes" in checkpoint["state_dict"]
    again = Project.load_from_checkpoint(tmp_path / "whole.ckpt", seed=2)
    torch.testing.assert_close(answers(again.free.eval()), answers(one.free.eval()), atol=1e-6, rtol=1e-5)
    checkpoint["state_dict"] = {k: t for k, t in checkpoint["state_dict"].items() if ".experts." not in k}
    with pytest.warns(UserWarning, match="it is older than they are"), pytest.raises(RuntimeError, match="experts"):
        two.load_state_dict(checkpoint["state_dict"])


NAMES = ["a", "keys", "v1.0", "shared", "codes"]


@pytest.mark.parametrize("kind", ["sparse", "low_rank", "masked"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_torchs_distributed_checkpoints_contain_the_experts(kind: str, wrapped: bool, tmp_path: Path) -> None:
    """`get_model_state_dict` finds every key for any task names; another model loads all of it from files."""

    def make(seed: int) -> tuple[FreeModel, nn.Module]:
        free = model_of(seed, kind)
        free = FreeModel(free.backbone, dict.fromkeys(NAMES, free.heads["a"]), dict.fromkeys(NAMES, free.experts["a"]))
        return free.eval(), nn.ModuleDict({"free": free}) if wrapped else free

    (one, whole), (two, other) = make(0), make(1)
    expected, state = answers(one), get_model_state_dict(whole)
    assert state.keys() == whole.state_dict().keys()
    distributed.save(state, checkpoint_id=tmp_path / "dcp")
    set_model_state_dict(other, copy.deepcopy(state))
    torch.testing.assert_close(answers(two), expected, atol=1e-6, rtol=1e-5)
    copied = copy.deepcopy(whole)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.zero_()
    found = get_model_state_dict(copied)
    distributed.load(found, checkpoint_id=tmp_path / "dcp")
    set_model_state_dict(copied, found)
    torch.testing.assert_close(answers(copied["free"] if wrapped else copied), expected)
    if kind != "masked":  # another model's experts have other sizes
        with pytest.raises(CheckpointException, match=r"Size mismatch .* experts\.|Size mismatch .* free\.experts\."):
            distributed.load(get_model_state_dict(make(2)[1]), checkpoint_id=tmp_path / "dcp")
