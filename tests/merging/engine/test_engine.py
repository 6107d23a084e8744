"""`merge`: any kind of input, every tensor accounted for, one clear error before any work."""

import copy

import pytest
import torch
from torch import nn

from freemerge.checkpoints import CheckpointError, load_checkpoint, open_checkpoint, save_checkpoint
from freemerge.merging import MergeError, MergeMethod, PCBMerging, TaskArithmetic, Ties, WeightAverage, merge
from tests.merging.merging_models import finetune


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def mean_of(base, models):
    return merge(base, models, WeightAverage())


def test_files_and_memory_give_the_same_result(tmp_path, base, models, method):
    names = [f"task {index}" for index in range(3)]
    expected = merge(base, dict(zip(names, models, strict=True)), method)
    save_checkpoint(tmp_path / "base.safetensors", base)
    paths = {}
    for index, model in enumerate(models[:2]):
        paths[f"task {index}"] = tmp_path / f"{index}.safetensors"
        save_checkpoint(paths[f"task {index}"], model)
    torch.save(models[2], tmp_path / "2.pt")
    paths["task 2"] = str(tmp_path / "2.pt")
    assert_equal(merge(tmp_path / "base.safetensors", paths, method), expected)
    output = merge(tmp_path / "base.safetensors", paths, method, output=tmp_path / "o.safetensors")
    assert output == tmp_path / "o.safetensors"
    assert_equal(load_checkpoint(output), expected)


def test_modules_and_lightning_checkpoints(tmp_path):
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += 1
    state = {f"backbone.{name}": tensor for name, tensor in tuned.state_dict().items()} | {"head.weight": torch.ones(9)}
    torch.save({"state_dict": state}, tmp_path / "epoch=3.ckpt")
    merged = merge(base, [tuned, tmp_path / "epoch=3.ckpt", base], TaskArithmetic(0.25))
    torch.testing.assert_close(merged["0.weight"], base[0].weight.detach() + 0.5)
    assert merged["1.num_batches_tracked"] == 0
    copy.deepcopy(base).load_state_dict(merged)


def test_the_result_shares_no_memory(base, models, method):
    merged = merge(base, models, method, exclude=["conv.*"])
    memory = {tensor.untyped_storage().data_ptr() for state in (base, *models) for tensor in state.values()}
    assert not memory & {tensor.untyped_storage().data_ptr() for tensor in merged.values()}
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_patterns(base, models):
    everything = mean_of(base, models)
    for include, exclude, names in [
        (["*.weight"], None, {"embed.weight", "conv.weight"}),
        (None, ["*.weight"], {"norm.bias", "temperature"}),
        (["*.weight", "norm.bias"], ["conv.*"], {"embed.weight", "norm.bias"}),
        (["re:(embed|norm)\\..*"], None, {"embed.weight", "norm.bias"}),
        (None, ["re:.*(weight|bias)"], {"temperature"}),
        (["temperature"], [], {"temperature"}),
    ]:
        merged = merge(base, models, WeightAverage(), include=include, exclude=exclude)
        assert_equal(merged, {name: everything[name] if name in names else base[name] for name in base})


def test_global_methods_count_selected_tensors_only(base, models):
    method = Ties(density=0.1)
    alone = {name: base[name] for name in ("embed.weight", "norm.bias")}
    expected = merge(alone, [{name: model[name] for name in alone} for model in models], method)
    merged = merge(base, models, method, include=["embed.*", "norm.*"])
    assert_equal({name: merged[name] for name in alone}, expected)


def test_dtypes(tmp_path, base, models):
    narrow = {name: t.bfloat16() if t.is_floating_point() else t for name, t in base.items()}
    assert_equal(merge(narrow, [narrow], WeightAverage()), narrow)
    merged = merge(narrow, models, WeightAverage())
    exact = mean_of({name: t.float() if t.is_floating_point() else t for name, t in narrow.items()}, models)
    assert_equal(merged, {name: t.to(narrow[name].dtype) for name, t in exact.items()})
    for dtype in ("float16", "torch.float16", torch.float16):
        merged = merge(base, models, WeightAverage(), dtype=dtype, exclude=["embed.weight"])
        assert {name: t.dtype for name, t in merged.items()} == {
            name: torch.float16 if t.is_floating_point() else t.dtype for name, t in base.items()
        }
    merge(narrow, models, WeightAverage(), dtype="float32", output=tmp_path / "o.safetensors")
    assert_equal(load_checkpoint(tmp_path / "o.safetensors"), exact)
    with pytest.raises(MergeError, match="there is no dtype 'float31'; use float32, bfloat16 or float16"):
        merge(base, models, WeightAverage(), dtype="float31")
    with pytest.raises(MergeError, match=r"must be a floating-point one, not torch\.int8"):
        merge(base, models, WeightAverage(), dtype=torch.int8)


@pytest.mark.parametrize("device", ["cuda:97", "graphics", "meta"])
def test_a_device_that_cannot_compute_is_one_line(base, models, device, tmp_path):
    with pytest.raises(MergeError, match=rf"^cannot compute on the device '{device}': .+") as refused:
        merge(base, models, WeightAverage(), device=device, output=tmp_path / "o.safetensors")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_float64_base_keeps_its_precision():
    base = {"w": torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)}
    assert_equal(merge(base, [base, base], WeightAverage()), base)


def test_tied_tensors_stay_tied(tmp_path):
    shared, tuned = torch.randn(4, 3), torch.randn(4, 3)
    base, model = {"wte": shared, "head": shared}, {"wte": tuned, "head": tuned}
    save_checkpoint(tmp_path / "model.safetensors", model)
    merged = merge(base, [model, tmp_path / "model.safetensors"], WeightAverage())
    assert merged["wte"] is merged["head"]
    torch.testing.assert_close(merged["wte"], tuned)
    merge(base, [model], WeightAverage(), output=tmp_path / "o.safetensors")
    loaded = load_checkpoint(tmp_path / "o.safetensors")
    assert loaded["wte"] is loaded["head"]
    # A model fine-tuned without the tie is merged without it.
    cut = merge(base, [model, {"wte": tuned, "head": -tuned}], WeightAverage())
    assert not torch.equal(cut["wte"], cut["head"])
    # The tied tensor counts once in a global method.
    vectors = [{"w": torch.randn(50)}, {"w": torch.randn(50)}]
    zero = torch.zeros(50)
    tied = merge({"w": zero, "v": zero}, [{"w": v["w"], "v": v["w"]} for v in vectors], PCBMerging(0.3))
    assert torch.equal(tied["w"], merge({"w": zero}, vectors, PCBMerging(0.3))["w"])


def test_heads_of_the_models_alone_are_left_out(base, models):
    models[1]["head.weight"] = torch.zeros(2, 2)
    with pytest.raises(MergeError) as caught:
        merge(base, models, WeightAverage())
    assert str(caught.value) == (
        "model 1: the tensor 'head.weight' with shape [2, 2] is not in base; if it is a head, leave it out with "
        "exclude=['head.weight']"
    )
    merged = merge(base, models, WeightAverage(), exclude=["head.*"])
    del models[1]["head.weight"]
    assert_equal(merged, mean_of(base, models))


def test_integer_buffers_may_differ(base, models):
    models[0]["steps"] = torch.tensor([99, 3])
    del models[1]["mask"]
    models[2]["positions"] = torch.arange(3)
    merged = merge(base, models, WeightAverage())
    assert torch.equal(merged["steps"], base["steps"])
    assert torch.equal(merged["mask"], base["mask"])


def broken(base, models, change):
    change(models)
    return base, {"a": models[0], "b": models[1], "c": models[2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m[1].pop("norm.bias"),
            "b: the tensor 'norm.bias' is missing; base has it with shape [6]; exclude=['norm.bias'] keeps the base's",
        ),
        (
            lambda m: m[2].update({"norm.bias": torch.zeros(7)}),
            "c: the tensor 'norm.bias' has shape [7], expected [6] as in base; exclude=['norm.bias'] keeps the base's",
        ),
        (
            lambda m: m[0].update({"embed.weight": m[0]["embed.weight"].T}),
            "a: the tensor 'embed.weight' has shape [6, 20], expected [20, 6] as in base; exclude=['embed.weight'] "
            "keeps the base's",
        ),
        (
            lambda m: m[0].update({"norm.bias": torch.zeros(6, dtype=torch.int8)}),
            "a: the tensor 'norm.bias' has dtype torch.int8, expected a floating-point one; a quantized model must be "
            "dequantized first",
        ),
        (
            lambda m: [x.pop("norm.bias") for x in m],
            "a: the tensor 'norm.bias' is missing; base has it with shape [6]; exclude=['norm.bias'] keeps the base's; "
            "nor do these fit: b: 'norm.bias' (missing), c: 'norm.bias' (missing)",
        ),
        (
            lambda m: m[1]["conv.weight"].view(-1)[5:7].fill_(float("nan")),
            "b: the tensor 'conv.weight' has 2 values that are NaN or infinite (the first is nan); repair the model, "
            "or exclude the tensor",
        ),
        (
            lambda m: m[2].update({"temperature": torch.tensor(float("inf"))}),
            "c: the tensor 'temperature' has 1 values that are NaN or infinite (the first is inf); repair the model, "
            "or exclude the tensor",
        ),
    ],
)
@pytest.mark.parametrize("method", [WeightAverage(), PCBMerging()], ids=repr)
def test_models_that_do_not_fit(tmp_path, base, models, change, message, method):
    base, named = broken(base, models, change)
    with pytest.raises(MergeError) as caught:
        merge(base, named, method, output=tmp_path / "new" / "o.safetensors")
    assert str(caught.value) == message
    assert not list(tmp_path.rglob("*.safetensors*"))
    assert not list(tmp_path.rglob(".*"))


def test_a_broken_base_is_named(base, models):
    base["norm.bias"][0] = float("-inf")
    with pytest.raises(MergeError, match=r"^base: the tensor 'norm.bias' has 1 values that are NaN or infinite"):
        merge(base, models, WeightAverage())
    merge(base, models, WeightAverage(), exclude=["norm.bias"])


def test_large_finite_values_are_not_mistaken_for_infinities(base):
    big = {"w": torch.full((4,), 3e38)}
    assert_equal(merge(big, [big], WeightAverage()), big)
    large = merge({"w": torch.zeros(4)}, [big, big], TaskArithmetic(0.1))
    assert torch.isfinite(large["w"]).all()


def test_invalid_calls(tmp_path, base, models):
    for finetuned, message in [
        ([], "there is no fine-tuned model to merge; name at least one"),
        ("model.safetensors", r"must be a list or a dict; write \['model.safetensors'\]"),
        (models[0], "this is one state dict"),
        ([tmp_path / "x.pt", tmp_path / "x.pt"], "x.pt"),
    ]:
        with pytest.raises((MergeError, CheckpointError), match=message):
            merge(base, finetuned, WeightAverage())
    same_name = [open_checkpoint(model, label="x") for model in models]
    with pytest.raises(MergeError, match="two fine-tuned models have the same name 'x'"):
        merge(base, same_name, WeightAverage())
    for arguments, message in [
        ({"include": ["attn.*"]}, r"include: the pattern 'attn\.\*' matches no tensor of any model; is it misspelt\?"),
        ({"exclude": ["head.*"]}, r"exclude: the pattern 'head\.\*' matches no tensor of any model"),
        ({"exclude": ["*"]}, "include and exclude leave no floating-point tensor of the base to merge"),
        ({"include": ["steps"]}, "leave no floating-point tensor"),
        ({"include": "*"}, r"include= takes a list of patterns; write \['\*'\]"),
        ({"exclude": ["re:("]}, r"exclude: 're:\(' is not a valid regular expression"),
        ({"output": tmp_path / "o.gguf"}, r"o\.gguf: the output must be"),
    ]:
        with pytest.raises(MergeError, match=message):
            merge(base, models, WeightAverage(), **arguments)


def test_an_existing_output_is_refused_before_any_work(tmp_path, base, models):
    output = tmp_path / "o.safetensors"
    merge(base, models, WeightAverage(), output=output)
    before = output.read_bytes()
    with pytest.raises(MergeError, match=r"o\.safetensors: exists already; choose another output, or overwrite"):
        merge("no such base", models, WeightAverage(), output=output)
    assert output.read_bytes() == before
    merge(base, models, TaskArithmetic(), output=output, overwrite=True)
    assert output.read_bytes() != before


def test_an_output_may_replace_an_input(tmp_path, base, models):
    path = tmp_path / "base.safetensors"
    save_checkpoint(path, base)
    merge(path, models, WeightAverage(), output=path, overwrite=True)
    assert_equal(load_checkpoint(path), mean_of(base, models))


def test_a_method_that_returns_the_wrong_shape_is_named(base):
    class Wrong(MergeMethod):
        def combine(self, name, deltas, statistics):
            return deltas

    with pytest.raises(MergeError, match=r"Wrong.combine returned shape \[1, 20, 6\] for the tensor 'embed"):
        merge(base, [finetune(base, 0)], Wrong())
