"""Folders of FREE models: every class round-trips, also in a new process, and nothing is half-written."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from freemerge.checkpoints import CheckpointError, load_checkpoint
from freemerge.experts import Expert, emr_experts, extract, extract_low_rank
from freemerge.models import ConvRouter, EarlyRouter, FreeModel, LanguageBackbone, ModuleBackbone, load_backbone
from tests import processes
from tests.configs import tiny_files
from tests.language_models import expert_of, language_model
from tests.models.own_parts import OwnBackbone, OwnHead, OwnRouter, OwnViT, ShiftExpert, SilentBackbone
from tests.tiny import VIT, tiny_backbone

ROOT = Path(__file__).parent.parent.parent
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def residual_of(backbone: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) for name, t in backbone.weights().items()}


def as_stored(expert: Expert) -> Expert:
    """Experts whose values a file stores exactly."""
    return expert.with_values(expert.flat_values().bfloat16().float())


def mlp(classes: int) -> nn.Sequential:
    layers = (nn.LayerNorm(16), nn.Linear(16, 12, bias=False), nn.GELU("tanh"), nn.Dropout(0.2), nn.Linear(12, classes))
    return nn.Sequential(*layers)


def answers(model: FreeModel, inputs=IMAGES) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {task: model(inputs, task=task).logits for task in model.tasks}


def same(model: FreeModel, again: FreeModel, inputs=IMAGES) -> bool:
    ours, theirs = answers(model, inputs), answers(again, inputs)
    return list(ours) == list(theirs) and all(torch.equal(ours[task], theirs[task]) for task in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_any_layers_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(16, 4)
    heads = {
        "mlp": mlp(5),
        "no bias": nn.Linear(16, 3, bias=False),
        "one": shared,
        "two": shared,
        "as is": nn.Identity(),
    }
    model = FreeModel(tiny_backbone(), heads).eval()
    for head in (model.heads["mlp"], model.heads["one"]):
        head.to(dtype)
    model.save_pretrained(tmp_path / "m")
    again = FreeModel.from_pretrained(tmp_path / "m")
    assert again.tasks == tuple(heads)
    for task, head in model.heads.items():
        assert str(again.heads[task]) == str(head)
        own = again.heads[task].state_dict()
        assert {name: tensor.dtype for name, tensor in own.items()} == {
            n: t.dtype for n, t in head.state_dict().items()
        }
        assert all(torch.equal(tensor, own[name]) for name, tensor in head.state_dict().items())
    assert again.heads["one"] is again.heads["two"]
    if dtype == torch.float32:
        assert same(model, again)
        assert answers(model)["mlp"].shape == (6, 16)  # the width of the features
        with torch.no_grad():
            assert torch.equal(answers(model)["mlp"][:, :5], heads["mlp"](model.backbone(IMAGES)))
        assert model(IMAGES[:0], task="mlp").logits.shape == (0, 16)


def test_task_names_may_be_any_file_name(tmp_path: Path) -> None:
    names = ["type", "keys", "v1.0", "forward", "a b", "Straße", "数字", "training", "100%", "_keys", "x%2Ey", "x.y"]
    backbone = tiny_backbone()
    heads = {name: nn.Linear(16, 2 + index) for index, name in enumerate(names)}
    experts = {name: as_stored(extract(residual_of(backbone, index), 0.05)) for index, name in enumerate(names)}
    model = FreeModel(backbone, heads, experts, ConvRouter(len(names), 1, width=4)).eval()
    assert model.tasks == tuple(names)
    assert all(model.heads[name] is heads[name] for name in names)
    model.save_pretrained(tmp_path / "m")
    again = FreeModel.from_pretrained(tmp_path / "m")
    assert same(model, again)
    with torch.no_grad():
        assert torch.equal(again(IMAGES).logits, model(IMAGES).logits)
    others = {name: nn.Linear(16, 2 + index) for index, name in enumerate(names)}
    copied = FreeModel(tiny_backbone(1), others, router=ConvRouter(len(names), 1, width=4)).eval()
    copied.load_state_dict(model.state_dict())
    torch.testing.assert_close(answers(copied), answers(model), atol=1e-6, rtol=1e-5)
    assert isinstance(model.get_submodule("heads.%type"), nn.Linear)


@pytest.mark.parametrize("name", ["", " ", "a/b", "a\\b", "..", "tab\t", "long" * 60])
def test_impossible_file_names_are_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=r"FreeModel: (a task has no name|the task|the name of task)"):
        FreeModel(tiny_backbone(), {"a": nn.Linear(16, 2), name: nn.Linear(16, 2)})


def test_masked_experts_store_their_shared_vector_once(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    _, experts = emr_experts({task: residual_of(backbone, seed) for seed, task in enumerate("ab")})
    model = FreeModel(backbone, {task: nn.Linear(16, 3) for task in "ab"}, experts).eval()
    model.save_pretrained(tmp_path / "m")
    assert [path.name for path in (tmp_path / "m" / "shared_vectors").iterdir()] == ["0.safetensors"]
    again = FreeModel.from_pretrained(tmp_path / "m")
    assert again.packed_experts["a"].shared is again.packed_experts["b"].shared
    for task, logits in answers(model).items():
        torch.testing.assert_close(answers(again)[task], logits, atol=0.05, rtol=0.05)  # rescalers are stored in int8


def test_user_made_classes_are_passed_or_trusted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = OwnBackbone()
    shift = ShiftExpert({"1.bias": torch.tensor([0.5])}, {"1.bias": (8,)})
    heads = {"a": OwnHead(8, 3), "b": nn.Linear(8, 2)}
    model = FreeModel(backbone, heads, {"a": shift}, OwnRouter(2)).eval()
    with torch.no_grad():
        plain = heads["a"](backbone(IMAGES))
        assert not torch.equal(model(IMAGES, task="a").logits, plain)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=r"the backbone is a tests.models.own_parts.OwnBackbone, which is not imported"
    ):
        FreeModel.from_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"the head of 'a' is a .*OwnHead.*; pass heads={'a': …}"):
        FreeModel.from_pretrained(tmp_path / "m", OwnBackbone())
    with pytest.raises(CheckpointError, match=r"the router is a .*OwnRouter.*; pass router=…"):
        FreeModel.from_pretrained(tmp_path / "m", OwnBackbone(), heads={"a": OwnHead(8, 3)})
    with pytest.raises(CheckpointError, match="its weights do not match this OwnBackbone"):
        FreeModel.from_pretrained(tmp_path / "m", OwnBackbone(width=4))
    with pytest.raises(CheckpointError, match="a head does not match its file"):
        FreeModel.from_pretrained(tmp_path / "m", OwnBackbone(), heads={"a": OwnHead(8, 4)}, router=OwnRouter(2))
    given = FreeModel.from_pretrained(tmp_path / "m", OwnBackbone(), heads={"a": OwnHead(8, 3)}, router=OwnRouter(2))
    trusted = FreeModel.from_pretrained(tmp_path / "m", trust_remote_code=True)
    for again in (given, trusted):
        assert isinstance(again.experts["a"], ShiftExpert)
        assert same(model, again)
        with torch.no_grad():
            torch.testing.assert_close(again(IMAGES).logits, model(IMAGES).logits, atol=2e-2, rtol=2e-2)  # router: bf16


def test_a_new_process_loads_user_made_classes_only_if_allowed(tmp_path: Path) -> None:
    model = FreeModel(
        OwnBackbone(),
        {"a": OwnHead(8, 3)},
        {"a": ShiftExpert({"1.bias": torch.tensor([0.5])}, {"1.bias": (8,)})},
    ).eval()
    model.save_pretrained(tmp_path / "m")
    torch.save(answers(model), tmp_path / "answers.pt")
    script = """
import sys, torch
from freemerge.models import FreeModel
images, folder = torch.load(sys.argv[1] + "/images.pt"), sys.argv[1] + "/m"
try:
    FreeModel.from_pretrained(folder)
except Exception as error:
    print(type(error).__name__, "own_parts" in str(sys.modules.keys()))
model = FreeModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    print(torch.equal(model(images, task="a").logits, torch.load(sys.argv[1] + "/answers.pt")["a"]))
"""
    torch.save(IMAGES, tmp_path / "images.pt")
    path = os.pathsep.join([str(ROOT), str(ROOT / "callbacks")])
    done = processes.run("-c", script, tmp_path, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path)
    assert done.stdout.split() == ["CheckpointError", "False", "True"], done.stderr


def test_a_backbone_without_a_recipe_is_passed(tmp_path: Path) -> None:
    for index, make in enumerate((SilentBackbone, lambda: ModuleBackbone(OwnBackbone().model, 8))):
        model = FreeModel(make(), {"a": nn.Linear(8, 2)}).eval()
        model.save_pretrained(tmp_path / str(index))
        with pytest.raises(CheckpointError, match=r"no backbone.json\. Cannot rebuild the backbone; pass `backbone=`"):
            FreeModel.from_pretrained(tmp_path / str(index), trust_remote_code=True)
        assert same(model, FreeModel.from_pretrained(tmp_path / str(index), make()))


def test_a_subclass_of_a_freemerge_class_is_not_mistaken_for_it(tmp_path: Path) -> None:
    model = FreeModel(OwnViT(config=VIT, pooling="mean"), {"a": nn.Linear(16, 2)}).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"own_parts\.OwnViT, which is not imported by default"):
        load_backbone(tmp_path)
    trusted = FreeModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert isinstance(trusted.backbone, OwnViT)
    assert same(model, trusted)
    assert same(model, FreeModel.from_pretrained(tmp_path, OwnViT(config=VIT, pooling="mean")))


class Broken(nn.Linear):
    """A head whose weights cannot be written."""

    def state_dict(self, *args, **kwargs):
        raise RuntimeError("disk full")


def test_a_failed_save_leaves_no_files_and_keeps_the_old_model(tmp_path: Path) -> None:
    good, bad = (FreeModel(tiny_backbone(), {"a": kind(16, 2)}).eval() for kind in (nn.Linear, Broken))
    with pytest.raises(RuntimeError, match="disk full"):
        bad.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    good.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError, match="disk full"):
        bad.save_pretrained(tmp_path / "m")
    assert {path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()} == before
    assert same(good, FreeModel.from_pretrained(tmp_path / "m"))


def test_saving_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    with pytest.raises(ValueError, match="is a file; a model is saved as a folder"):
        FreeModel(tiny_backbone(), {"a": nn.Linear(16, 2)}).save_pretrained(tmp_path / "m")
    assert (tmp_path / "m").read_text() == "mine"


def test_a_new_model_replaces_an_old_one(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    heads = {task: nn.Linear(16, 2) for task in "ab"}
    experts = {task: extract(residual_of(backbone, 0), 0.05) for task in "ab"}
    FreeModel(backbone, heads, experts, ConvRouter(2, 1, width=4)).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("mine")
    model = FreeModel(
        tiny_backbone(1), {"a": heads["a"]}, {"a": extract_low_rank(residual_of(backbone, 1), rank=1)}
    ).eval()
    model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "router.safetensors").exists()
    assert [path.name for path in (tmp_path / "m" / "experts").iterdir()] == ["a.safetensors"]
    assert (tmp_path / "m" / "README.md").read_text() == "mine"
    assert not list((tmp_path / "m").glob(".*"))
    assert FreeModel.from_pretrained(tmp_path / "m").tasks == ("a",)


def test_folders_of_the_old_format_load(tmp_path: Path) -> None:
    model = FreeModel(
        tiny_backbone(), {"a": nn.Linear(16, 3), "b": nn.Linear(16, 2)}, class_names={"b": ["x", "y"]}
    ).eval()
    model.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "freemerge.json").read_text())
    tasks = {"a": {"num_classes": 3, "class_names": None}, "b": {"num_classes": 2, "class_names": ["x", "y"]}}
    old = {key: new[key] for key in ("merged_hash", "experts", "router", "threshold", "top_n")}
    (tmp_path / "freemerge.json").write_text(json.dumps({**old, "format": "freemerge-free-model-3", "tasks": tasks}))
    again = FreeModel.from_pretrained(tmp_path)
    assert same(model, again)
    assert again.class_names == {"b": ["x", "y"]}
    for text, said in (
        ("[]", "format None"),
        ("{", "damaged"),
        ('{"format": "freemerge-free-model-9"}', "format 'free"),
    ):
        (tmp_path / "freemerge.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            FreeModel.from_pretrained(tmp_path)


GPT2 = {"model_type": "gpt2", "vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1}
T5 = {"model_type": "t5", "vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("config", "point"),
    [({**GPT2, "eos_token_id": 2}, "transformer.wte"), ({**T5, "decoder_start_token_id": 0}, "encoder.embed_tokens")],
)
def test_a_language_model_computes_each_sample_as_its_task_model(tmp_path: Path, config: dict, point: str) -> None:
    torch.manual_seed(0)
    backbone = LanguageBackbone(config=config).eval()
    residuals = {t: residual_of(backbone, seed) for seed, t in enumerate("ab")}
    heads = {task: nn.Identity() for task in "ab"}
    ids = torch.randint(3, 30, (4, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)}
    for cut in (lambda r: extract(r, 0.1), lambda r: extract_low_rank(r, rank=1)):
        experts = {task: as_stored(cut(residual)) for task, residual in residuals.items()}
        router = EarlyRouter(2, point, 16, hidden=0)
        model = FreeModel(backbone, heads, experts, router).eval()
        with torch.no_grad():
            expected = {task: model.task_model(task)(inputs) for task in "ab"}
            for task in "ab":
                output = model(inputs, task=task)
                assert output.logits.shape == (4, 6, 30)
                assert torch.equal(output.labels, output.logits.argmax(dim=2))
                torch.testing.assert_close(output.logits, expected[task], atol=1e-4, rtol=1e-3)
            router.head.bias -= model.route(inputs)[0].mean(dim=0)  # an untrained router sends all to one task
            routed = model(inputs)
            assert len(set(routed.task_names)) == 2
            for i, name in enumerate(routed.task_names):
                torch.testing.assert_close(routed.logits[i], expected[name][i], atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path / "m")
    again = FreeModel.from_pretrained(tmp_path / "m")
    assert load_checkpoint(tmp_path / "m" / "heads.safetensors") == {}
    for task, logits in answers(model, inputs).items():
        torch.testing.assert_close(answers(again, inputs)[task], logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_language_models_folder_generates_from_texts(kind: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_files.write_tokenizer(tmp_path / "tokenizer"))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    backbone = language_model(kind)
    backbone.tokenizer = str(tmp_path / "tokenizer")
    backbone.model.generation_config.max_new_tokens = 5
    point = "model.embed_tokens" if kind == "llama" else "encoder.block.0"
    experts = {task: as_stored(expert_of(backbone, seed)) for seed, task in enumerate("ab")}
    model = FreeModel(backbone, {task: nn.Identity() for task in "ab"}, experts, EarlyRouter(2, point, 16)).eval()
    texts = ["what is red", "a photo of the good blue"]
    assert model.generate([]).texts == []
    expected = model.generate(texts, do_sample=False)
    assert expected.texts == [tokenizer.decode(row, skip_special_tokens=True) for row in expected.token_lists()]
    ids = tokenizer(texts)["input_ids"]  # they end with [SEP], which a causal model's prompt must not
    prompts = [row[:-1] if kind == "llama" else row for row in ids]
    for row, prompt in enumerate(prompts):
        task = expected.task_names[row]
        alone = model.task_model(task).generate(torch.tensor([prompt]), do_sample=False)[0].tolist()
        assert expected.tokens[row].tolist() == alone + [0] * (expected.tokens.shape[1] - len(alone))
    model.save_pretrained(tmp_path / "m")
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in (tmp_path / "m").iterdir()
    }
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    again = FreeModel.from_pretrained(tmp_path / "m")
    answers = again.generate(texts, do_sample=False)
    assert (answers.texts, answers.task_names) == (expected.texts, expected.task_names)
    assert torch.equal(answers.tokens, expected.tokens)
    chat = again.backbone.load_tokenizer().apply_chat_template([{"role": "user", "content": texts[0]}], tokenize=False)
    assert chat == f"{texts[0]} "
    backbone.tokenizer = None
    model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "tokenizer.json").exists()
