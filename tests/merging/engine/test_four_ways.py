"""Memory, files, a search and an adapter: one executor, so the same values and the same errors."""

import pytest
import torch
from peft import PeftModel

from freemerge.checkpoints import load_checkpoint
from freemerge.merging import Candidates, MergeError, TaskArithmetic, merge, merge_to, plan_merge
from tests.merging.engine.test_adapter_output import make, tuned, untied
from tests.merging.merging_models import METHODS

LARGER_THAN_ANY_MATRIX = 32


def in_memory(base, models, method, folder):
    return merge(base, models, method)


def in_a_file(base, models, method, folder):
    return load_checkpoint(merge_to(base, models, method, folder / "merged.safetensors"))


def in_a_search(base, models, method, folder):
    return Candidates(base, models).merge(method)


def in_a_search_without_memory(base, models, method, folder):
    return Candidates(base, models, memory=0).merge(method)


def in_an_adapter(base, models, method, folder):
    return merge_to(base, models, method, folder / "adapter", output_format="lora", rank=LARGER_THAN_ANY_MATRIX)


OTHERS = [in_a_file, in_a_search, in_a_search_without_memory]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_the_same_values(base, models, method, tmp_path, count, dtype):
    """Bit-identical for one model and for three, including models that are returned unchanged."""
    try:
        method.check("abc"[:count])
    except MergeError as refusal:
        pytest.skip(str(refusal))
    base, *models = (
        {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model.items()}
        for model in (base, *models[:count])
    )
    named = dict(zip("abc", models, strict=False))
    expected = in_memory(base, named, method, tmp_path)
    for other in OTHERS:
        found = other(base, named, method, tmp_path)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (other.__name__, name)
        (tmp_path / "merged.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[5], METHODS[11], METHODS[-4]], ids=repr)
def test_an_adapter_of_sufficient_rank_agrees_up_to_rounding(tmp_path, method):
    model, base = make(untied)
    models = dict(zip("ab", tuned(base, (1, 2)), strict=True))
    expected = in_memory(base, models, method, tmp_path)
    loaded = PeftModel.from_pretrained(model, in_an_adapter(base, models, method, tmp_path)).merge_and_unload()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("way", [in_memory, *OTHERS, in_an_adapter])
def test_the_same_errors(tmp_path, way):
    """Errors of a value that overflows float16 and of a method that returns infinity."""
    _, base = make(untied)
    name = "model.layers.0.mlp.up_proj.weight"
    half = {key: tensor.half() for key, tensor in base.items()}
    half[name] = torch.full_like(half[name], 60000.0)
    models = {"a": {**half, name: torch.full_like(half[name], 64000.0)}, "b": half}
    with pytest.raises(MergeError, match=rf"'{name}' has 96 values that do not fit into float16 \(the first is 68000"):
        way(half, models, TaskArithmetic(2.0), tmp_path)
    models = {"a": {**base, name: torch.full_like(base[name], 3e38)}, "b": base}
    with pytest.raises(MergeError, match=f"TaskArithmetic: the merged tensor '{name}' has NaN or infinite values"):
        way(base, models, TaskArithmetic(10.0), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_three_verbs_are_what_merge_does_with_its_options(base, models, tmp_path):
    path = merge(base, models, TaskArithmetic(), output=tmp_path / "a.safetensors")
    assert path.read_bytes() == merge_to(base, models, TaskArithmetic(), tmp_path / "b.safetensors").read_bytes()
    planned = plan_merge(base, models, TaskArithmetic(), tmp_path / "c.safetensors", exclude=["conv.*"])
    assert planned == merge(
        base, models, TaskArithmetic(), output=tmp_path / "c.safetensors", exclude=["conv.*"], dry_run=True
    )
    assert planned.files == {"c.safetensors": sum(tensor.nbytes for tensor in base.values())}
    assert not (tmp_path / "c.safetensors").exists()
    with pytest.raises(MergeError, match="a resumed merge has to write its result"):
        merge(base, models, TaskArithmetic(), resume=True)
