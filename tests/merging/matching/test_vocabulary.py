"""Different vocabularies are refused by default or merged by rows; no other shape may differ."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from freemerge.checkpoints import open_checkpoint, save_checkpoint
from freemerge.checkpoints.vocabulary import moved_tokens, vocabulary_size
from freemerge.cli.merge import build_parser
from freemerge.cli.run_merge import run
from freemerge.merging import FRMerging, MergeError, PCBMerging, TaskArithmetic, WeightAverage, merge
from tests.merging.merging_models import METHODS

ROWS = {"base": 10, "more": 12, "fewer": 8, "same": 10}


@pytest.fixture
def models():
    """A base with padding rows, a model with two more tokens, one without padding, and one like the base."""
    generator = torch.Generator().manual_seed(0)
    base = {
        "embed.wte.weight": torch.randn(10, 4, generator=generator),
        "lm_head.bias": torch.randn(10),
        "w": torch.ones(3),
    }
    found = {}
    for name, rows in ROWS.items():
        found[name] = {
            "embed.wte.weight": torch.randn(rows, 4, generator=generator),
            "lm_head.bias": torch.randn(rows, generator=generator),
            "w": torch.randn(3, generator=generator),
        }
    found["base"] = base
    return found


def split(models):
    return models["base"], {name: model for name, model in models.items() if name != "base"}


def padded(models, rows):
    """The models with the base's rows: `rows` of their own, then the base's."""
    base, finetuned = split(models)
    return base, {
        name: {
            key: torch.cat([value[: rows[name]], base[key][rows[name] :]]) if key != "w" else value
            for key, value in model.items()
        }
        for name, model in finetuned.items()
    }


def test_the_default_is_an_error_that_counts_rows_and_names_models(models):
    with pytest.raises(MergeError) as caught:
        merge(*split(models), WeightAverage())
    assert str(caught.value) == (
        "the vocabulary differs: the tensor 'embed.wte.weight' has 10 rows in the base, 2 more in more, 2 fewer in "
        "fewer; embeddings='base' merges the rows that the base has, embeddings='common' only those that all models "
        "have, and exclude=['embed.wte.weight'] keeps the base's"
    )
    kept = merge(*split(models), WeightAverage(), exclude=["embed*", "lm_head*"])
    assert torch.equal(kept["embed.wte.weight"], models["base"]["embed.wte.weight"])


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_base_merges_the_rows_of_the_base(models, method):
    merged = merge(*split(models), method, embeddings="base")
    expected = merge(*padded(models, {"more": 10, "fewer": 8, "same": 10}), method)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_common_merges_the_rows_that_all_have(models, method):
    merged = merge(*split(models), method, embeddings="common")
    expected = merge(*padded(models, {"more": 8, "fewer": 8, "same": 8}), method)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", ["base", "common"])
def test_one_model_comes_through_unchanged(models, mode):
    base = models["base"]
    for name in ("more", "fewer"):
        merged = merge(base, {name: models[name]}, WeightAverage(), embeddings=mode)
        rows = min(ROWS[name], 10)
        assert torch.equal(merged["embed.wte.weight"][:rows], models[name]["embed.wte.weight"][:rows])
        assert torch.equal(merged["embed.wte.weight"][rows:], base["embed.wte.weight"][rows:])


def test_where_vocabularies_agree_the_choice_changes_nothing(models):
    base, same = models["base"], {"same": models["same"]}
    results = [merge(base, same, FRMerging(), embeddings=mode) for mode in ("error", "base", "common")]
    assert all(torch.equal(results[0][name], result[name]) for result in results for name in base)


def test_files_and_their_record(tmp_path, models):
    for name, model in models.items():
        save_checkpoint(tmp_path / f"{name}.safetensors", model)
    paths = {name: tmp_path / f"{name}.safetensors" for name in ROWS if name != "base"}
    output = merge(
        tmp_path / "base.safetensors", paths, PCBMerging(0.5), embeddings="common", output=tmp_path / "merged"
    )
    expected = merge(*split(models), PCBMerging(0.5), embeddings="common")
    found = open_checkpoint(output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    record = json.loads((output / "freemerge.json").read_text())
    assert record["embeddings"] == "common"
    assert record["rows"]["embed.wte.weight"] == {"more": 8, "fewer": 8, "same": 8}


@pytest.mark.parametrize("mode", ["base", "common"])
def test_other_shapes_stay_errors(models, mode):
    base = models["base"]
    wide = {"embed.wte.weight": torch.ones(10, 5)}
    transposed = {"embed.wte.weight": torch.ones(4, 10)}
    for changed in (wide, transposed, {"w": torch.ones(4)}, {"embed.wte.weight": torch.ones(10)}):
        with pytest.raises(MergeError, match=r"has shape .*, expected .* as in base"):
            merge(base, [models["same"] | changed], WeightAverage(), embeddings=mode)
    # A position has no token, and neither has a class: their names are not those of embeddings.
    for name in ("wpe.weight", "embeddings.position_embeddings.weight", "classifier.weight", "decoder.weight"):
        with pytest.raises(MergeError, match="has shape"):
            merge({name: torch.ones(4, 2)}, [{name: torch.ones(6, 2)}], WeightAverage(), embeddings=mode)
    with pytest.raises(MergeError, match="embeddings must be one of error, base, common, got 'union'"):
        merge(base, [models["same"]], WeightAverage(), embeddings="union")


def folder(path, rows, tensor="own.table.weight", **files):
    path.mkdir()
    save_checkpoint(path / "model.safetensors", {tensor: torch.randn(rows, 3), "w": torch.randn(3)})
    (path / "config.json").write_text(json.dumps({"vocab_size": rows}))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_unknown_embedding_names_are_found_by_the_configuration(tmp_path):
    base, tuned = folder(tmp_path / "base", 6), folder(tmp_path / "tuned", 9)
    assert vocabulary_size(base) == 6
    with pytest.raises(MergeError, match=r"the vocabulary differs: the tensor 'own\.table\.weight' has 6 rows in the"):
        merge(base, [tuned], WeightAverage())
    merged = merge(base, [tuned], WeightAverage(), embeddings="base")
    assert torch.equal(merged["own.table.weight"], open_checkpoint(tuned)["own.table.weight"][:6])
    (tmp_path / "base" / "config.json").write_text('{"text_config": {"vocab_size": 6}}')
    assert vocabulary_size(base) == 6
    (tmp_path / "base" / "config.json").write_text("[")
    assert vocabulary_size(base) is None
    with pytest.raises(MergeError, match="has shape"):
        merge(base, [tuned], WeightAverage(), embeddings="base")


def tokenizer(vocabulary, added=()):
    return {"model": {"vocab": vocabulary}, "added_tokens": [{"content": token, "id": index} for token, index in added]}


def test_rows_of_other_tokens_are_refused(tmp_path):
    """Rows of moved tokens cannot be compared; those of added and renamed tokens can."""
    name = "wte.weight"
    base = folder(tmp_path / "base", 4, name, tokenizer=tokenizer({"a": 0, "b": 1, "c": 2, "<r>": 3}))
    moved = folder(tmp_path / "moved", 4, name, tokenizer=tokenizer({"b": 0, "a": 1, "c": 2, "<r>": 3}))
    renamed = folder(
        tmp_path / "renamed", 5, name, tokenizer=tokenizer({"a": 0, "b": 1, "c": 2}, [("<x>", 3), ("<y>", 4)])
    )
    assert merge(base, [renamed], WeightAverage(), embeddings="base")["wte.weight"].shape == (4, 3)
    with pytest.raises(
        MergeError, match=r"moved: its tokenizer gives the token 'a' the id 1, expected 0 as in .*\(2 tok"
    ):
        merge(base, [moved], WeightAverage())
    merge(base, [moved], WeightAverage(), exclude=["wte*"])
    merge(base, [folder(tmp_path / "none", 4, name)], WeightAverage())


def test_tokenizers_of_all_kinds(tmp_path):
    for number, (first, second) in enumerate(
        [
            (tokenizer([["a", -1.0], ["b", -2.0]]), tokenizer([["b", -1.0], ["a", -2.0]])),
            (tokenizer({"b": 1}, [("a", 0)]), tokenizer({"b": 1}, [("a", 2)])),
        ]
    ):
        for name, content in (("one", first), ("two", second)):
            (tmp_path / f"{name}{number}").mkdir()
            (tmp_path / f"{name}{number}" / "tokenizer.json").write_text(json.dumps(content))
        moved = moved_tokens(tmp_path / f"one{number}", tmp_path / f"two{number}")
        assert ("a", 0, number + 1) in moved
        assert moved_tokens(tmp_path / f"one{number}", tmp_path / f"one{number}") == []
    for name, files in (("vocab.txt", ("a\nb\n", "b\na\n")), ("vocab.json", ('{"a": 0, "b": 1}', '{"b": 0, "a": 1}'))):
        for path, content in zip(("x", "y"), files, strict=True):
            (tmp_path / path).mkdir(exist_ok=True)
            for old in (tmp_path / path).iterdir():
                old.unlink()
            (tmp_path / path / name).write_text(content)
        assert moved_tokens(tmp_path / "x", tmp_path / "y") == [("a", 0, 1), ("b", 1, 0)]
    (tmp_path / "x" / "vocab.json").write_text("[1")
    assert moved_tokens(tmp_path / "x", tmp_path / "y") == []
    assert moved_tokens(None, tmp_path / "y") == []


def test_an_adapter_of_a_resized_embedding(tmp_path):
    """Trained after tokens were added, so that its difference has more rows than the base."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
    model = GPT2LMHeadModel(config)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del base["lm_head.weight"]
    model.resize_token_embeddings(13)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["wte", "c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"'transformer\.wte\.weight' has 11 rows in the base, 2 more in .*adapter"):
        merge(base, [tmp_path / "adapter"], TaskArithmetic(1.0))
    merged = merge(base, [tmp_path / "adapter"], TaskArithmetic(1.0), embeddings="base")
    expected = wrapped.merge_and_unload().state_dict()
    torch.testing.assert_close(merged["transformer.wte.weight"], expected["transformer.wte.weight"][:11])


def test_the_command(tmp_path, models, capsys):
    for name in ("base", "more"):
        save_checkpoint(tmp_path / f"{name}.safetensors", models[name])
    arguments = ["--base", str(tmp_path / "base.safetensors"), "--finetuned", f"[{tmp_path / 'more.safetensors'}]"]
    arguments += ["--method", "WeightAverage", "--output", str(tmp_path / "o.safetensors")]
    assert run(build_parser().parse_args(arguments)) == 2
    assert "the vocabulary differs" in capsys.readouterr().err
    assert run(build_parser().parse_args([*arguments, "--embeddings", "base"])) == 0
