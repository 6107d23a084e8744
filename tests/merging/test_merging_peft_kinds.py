"""Adapters computed through PEFT (LoHa, LoKr, VeRA, OFT, AdaLoRA, …) merge as with its `merge_and_unload`."""

import importlib.util
import json

import peft
import pytest
import torch
import transformers
from torch import nn

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.merging import PCBMerging, TaskArithmetic, merge


class Net(nn.Module):
    """Layers of several shapes, with and without biases, some inside others."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.block = nn.ModuleDict({"mid": nn.Linear(12, 12, bias=False), "out": nn.Linear(12, 8)})
        self.conv = nn.Conv2d(4, 8, 3)
        self.norm = nn.LayerNorm(8)


def gpt2():
    """Layers with weights (inputs, outputs)."""
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


LINEAR = ["first", "mid", "out"]
CASES = {
    "loha": (Net, peft.LoHaConfig(r=3, alpha=5, target_modules=[*LINEAR, "conv"])),
    "loha, patterns": (
        Net,
        peft.LoHaConfig(
            r=3, alpha=5, target_modules=LINEAR, rank_pattern={"mid": 2}, alpha_pattern={"^first": 7, r"block\..*": 3}
        ),
    ),
    "lokr": (Net, peft.LoKrConfig(r=2, alpha=5, target_modules=[*LINEAR, "conv"])),
    "adalora": (Net, peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=LINEAR)),
    "adalora, conv1d": (
        gpt2, peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=["c_attn"], fan_in_fan_out=True)
    ),
    "adalora, modules to save": (
        Net, peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=["mid"], modules_to_save=["norm", "first"])
    ),
    "layer norms": (Net, peft.LNTuningConfig(target_modules=["norm"])),
    "vera": (Net, peft.VeraConfig(r=4, target_modules=LINEAR)),
    "vera, projection drawn again": (Net, peft.VeraConfig(r=4, target_modules=LINEAR, save_projection=False)),
    "vera, conv1d": (gpt2, peft.VeraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "oft": (Net, peft.OFTConfig(oft_block_size=4, target_modules=LINEAR)),
    "oft, one block": (Net, peft.OFTConfig(r=1, oft_block_size=0, target_modules=["first"])),
    "boft": (Net, peft.BOFTConfig(boft_block_size=4, target_modules=LINEAR)),
    "c3a": (Net, peft.C3AConfig(block_size=4, target_modules=LINEAR)),
    "delora": (Net, peft.DeloraConfig(r=2, target_modules=LINEAR)),
    "fourierft": (Net, peft.FourierFTConfig(n_frequency=10, target_modules=LINEAR)),
    "hra": (Net, peft.HRAConfig(r=2, target_modules=LINEAR)),
    "miss": (Net, peft.MissConfig(r=4, target_modules=LINEAR)),
    "randlora": (Net, peft.RandLoraConfig(r=2, target_modules=LINEAR)),
    "road": (Net, peft.RoadConfig(group_size=4, target_modules=LINEAR)),
    "shira": (Net, peft.ShiraConfig(r=2, target_modules=LINEAR)),
    "vblora": (Net, peft.VBLoRAConfig(num_vectors=8, vector_length=4, r=2, topk=2, target_modules=LINEAR)),
    "waveft": (Net, peft.WaveFTConfig(n_frequency=10, target_modules=LINEAR)),
}  # fmt: skip
# Kinds that PEFT 0.18, the oldest supported version, does not have.
if hasattr(peft, "GraloraConfig"):
    CASES["gralora"] = (Net, peft.GraloraConfig(r=4, gralora_k=2, target_modules=LINEAR))
if hasattr(peft, "HiraConfig"):
    CASES["hira"] = (Net, peft.HiraConfig(r=4, target_modules=LINEAR))
if hasattr(peft, "VeloraConfig"):
    velora = peft.VeloraConfig(num_groups=2)
    CASES["a variant of LoRA"] = (Net, peft.LoraConfig(r=2, target_modules=LINEAR, velora_config=velora))


def write(folder, build, config, seed=0):
    """A saved adapter with random values, the base, and the model that PEFT merges the adapter into."""
    torch.manual_seed(0)
    model = build()
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    fresh = build()
    fresh.load_state_dict(base)
    return base, peft.PeftModel.from_pretrained(fresh, folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("case", CASES)
def test_peft_agrees(tmp_path, case):
    base, expected = write(tmp_path / "a", *CASES[case])
    state = torch.random.get_rng_state()
    merged = merge(base, [tmp_path / "a"], TaskArithmetic(1.0))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6)
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert changed == {name for name, tensor in expected.items() if not torch.equal(tensor, base[name])}
    assert changed


def test_adalora_whose_training_has_dropped_ranks(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.AdaLoraConfig(init_r=6, target_r=2, total_step=8, tinit=1, tfinal=2, target_modules=["0", "1"])
    wrapped = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(8):
        wrapped(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    wrapped.save_pretrained(tmp_path / "a")
    ranks = [sum(kept) for kept in wrapped.peft_config["default"].rank_pattern.values()]
    assert min(ranks) < 6
    fresh = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    fresh.load_state_dict(base)
    expected = peft.PeftModel.from_pretrained(fresh, tmp_path / "a").merge_and_unload().state_dict()
    for name, tensor in merge(base, [tmp_path / "a"], TaskArithmetic(1.0)).items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", ["loha", "oft", "road", "vera"])
def test_chunks_are_parts_of_the_whole(tmp_path, case):
    base, _ = write(tmp_path / "a", *CASES[case])
    adapter = open_checkpoint(tmp_path / "a").on(open_checkpoint(base))
    for name in adapter.deltas:
        whole = adapter.tensor(name).flatten()
        for start in range(0, len(whole), 31):
            stop = min(start + 50, len(whole))
            torch.testing.assert_close(adapter.read_range(name, start, stop), whole[start:stop])


def test_beside_each_other_and_from_files(tmp_path):
    kinds = ["loha", "oft", "vera"]
    written = {kind: write(tmp_path / kind, *CASES[kind], seed=index) for index, kind in enumerate(kinds)}
    base = written["loha"][0]
    save_checkpoint(tmp_path / "base.safetensors", base)
    expected = merge(base, {kind: tensors for kind, (_, tensors) in written.items()}, PCBMerging(0.5))
    merged = merge(tmp_path / "base.safetensors", {kind: tmp_path / kind for kind in kinds}, PCBMerging(0.5))
    for name, tensor in expected.items():
        close = torch.isclose(merged[name], tensor, rtol=1e-4, atol=1e-4)
        assert close.float().mean() > 0.99, name


@pytest.mark.parametrize("case", ["oft", "vera"])
def test_the_base_is_a_part_of_what_was_adapted(tmp_path, case):
    _, expected = write(tmp_path / "a", lambda: nn.ModuleDict({"net": Net(), "head": nn.Linear(8, 2)}), CASES[case][1])
    torch.manual_seed(0)
    merged = merge(Net().state_dict(), [tmp_path / "a"], TaskArithmetic(1.0))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[f"net.{name}"], rtol=2e-6, atol=2e-6)


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_what_peft_cannot_do_is_one_line(tmp_path):
    base, _ = write(tmp_path / "a", *CASES["loha"])
    change(tmp_path / "a", new_setting=3)
    with pytest.raises(CheckpointError, match="has the setting 'new_setting', which the installed PEFT does not know"):
        open_checkpoint(tmp_path / "a").on(open_checkpoint(base))  # before anything is read
    change(tmp_path / "a", new_setting=None, r="three")
    with pytest.raises(CheckpointError, match="PEFT cannot compute what this LOHA adapter does to 'first'") as caught:
        merge(base, [tmp_path / "a"], TaskArithmetic(1.0))
    assert "\n" not in str(caught.value)
    change(tmp_path / "a", r=10**9)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: r is 1000000000, expected at most 65536"):
        merge(base, [tmp_path / "a"], TaskArithmetic(1.0))


@pytest.mark.parametrize("case", ["adalora", "loha", "vera"])
def test_a_tensor_of_the_adapter_is_missing(tmp_path, case):
    base, _ = write(tmp_path / "a", *CASES[case])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_checkpoint(file)
    own = [name for name in tensors if ".first." in name]
    save_checkpoint(file, {name: tensors[name] for name in tensors if name != own[-1]})
    with pytest.raises(CheckpointError, match=r"'.*first.*' of the adapter is not in its file"):
        merge(base, [tmp_path / "a"], TaskArithmetic(1.0))


def test_the_wrong_base(tmp_path):
    base, _ = write(tmp_path / "a", *CASES["oft"])
    narrow = base | {"first.weight": base["first.weight"][:, :-4]}
    with pytest.raises(CheckpointError, match="PEFT cannot compute what this OFT adapter does to 'first'"):
        merge(narrow, [tmp_path / "a"], TaskArithmetic(1.0))


def test_without_peft(tmp_path, monkeypatch):
    base, _ = write(tmp_path / "a", *CASES["loha"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        CheckpointError, match=r"a: is a LOHA adapter, for which PEFT is needed: pip install 'freemerge"
    ):
        merge(base, [tmp_path / "a"], TaskArithmetic(1.0))
