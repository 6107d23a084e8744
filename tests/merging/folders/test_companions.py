"""Differences of the fine-tuned models' companions from the base's are reported, and used on request."""

import json
import warnings

import pytest
import torch

from freemerge.checkpoints import save_checkpoint
from freemerge.cli.merge import build_parser
from freemerge.cli.run_merge import run
from freemerge.merging import MergeError, MergeWarning, WeightAverage, merge

CONFIG = {
    "model_type": "own",
    "dtype": "float32",
    "rope_theta": 10000.0,
    "architectures": ["OwnModel"],
    "vocab_size": 4,
}


def write(folder, files=None, rows=4, **config):
    save_checkpoint(folder / "model.safetensors", {"embed_tokens.weight": torch.ones(rows, 2)})
    for name, content in {"config.json": {**CONFIG, **config}, **(files or {})}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def note_of(tmp_path, base, models, **arguments):
    """The note that a merge prints, at most once, or None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = merge(base, models, WeightAverage(), output=tmp_path / "o", overwrite=True, **arguments)
    said = [str(warning.message) for warning in caught if warning.category is MergeWarning]
    assert len(said) < 2
    assert json.loads((output / "freemerge.json").read_text())["files"]["note"] == (said[0] if said else None)
    return said[0] if said else None


def test_models_that_agree_with_the_base_give_no_note(tmp_path):
    """Keys differ between versions of transformers, and training changes some that do not affect use."""
    base = write(tmp_path / "base", {"tokenizer_config.json": {"eos_token": "</s>", "name_or_path": "x"}}, dropout=0.1)
    newer = {"rope_theta": None, "rope_parameters": {"rope_theta": 10000, "rope_type": "default"}, "new_key": 3}
    tokens = {"tokenizer_config.json": {"eos_token": {"content": "</s>"}, "backend": "rust", "pad_token": None}}
    other = {"dtype": "bfloat16", "architectures": ["OwnForClasses"], "id2label": {"0": "a"}, "dropout": 0.0}
    model = write(tmp_path / "a", tokens, transformers_version="5", **newer, **other)
    assert note_of(tmp_path, base, [model]) is None
    assert note_of(tmp_path, base, [write(tmp_path / "b"), {"embed_tokens.weight": torch.ones(4, 2)}]) is None


def test_differences_shared_by_all_models_are_reported(tmp_path):
    base = write(tmp_path / "base", {"generation_config.json": {"eos_token_id": 2}, "tokenizer_config.json": {}})
    files = {
        "generation_config.json": {"eos_token_id": [2, 7], "transformers_version": "5"},
        "chat_template.jinja": "{{ messages }}",
        "tokenizer_config.json": {"eos_token": "<|eot|>"},
        "custom_generate/generate.py": "pass",
    }
    models = [write(tmp_path / name, files, rope_theta=1e6) for name in "ab"]
    assert note_of(tmp_path, base, models) == (
        "the fine-tuned models agree on settings that differ from the base's: rope_theta 1000000.0 of config.json (the "
        "base: "
        '10000.0), eos_token_id [2, 7] of generation_config.json (the base: 2), eos_token "<|eot|>" of '
        "tokenizer_config.json (the base: none), a chat template (the base: none), custom_generate/generate.py (the "
        f"base: none); the result has the base's, companions_from='{models[0]}' takes that model's"
    )
    assert note_of(tmp_path, base, models, companions_from="base") is None
    # If one model agrees with the base, the base's is kept; a model without such a file is ignored.
    third = write(tmp_path / "c", {"generation_config.json": {"eos_token_id": 2}})
    note = note_of(tmp_path, base, [*models, third])
    assert "eos_token " in note
    assert "a chat template" in note
    assert note.count("(the base") == 2


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ['rope_type "yarn"', "rope_factor 4.0"]),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": None}, ["rope_theta 500000.0"]),
        ({"text_config": {"rope_theta": 5e5}}, ["text_config.rope_theta 500000.0"]),
        ({"layer_norm_eps": 1e-3}, ["layer_norm_eps 0.001 of config.json (the base: 1e-05)"]),
    ],
)
def test_rope_settings_are_compared_in_every_notation(tmp_path, config, says):
    base = write(tmp_path / "base", layer_norm_eps=1e-5)
    note = note_of(tmp_path, base, [write(tmp_path / "a", **{"layer_norm_eps": 1e-5, **config})])
    assert all(part in note for part in says)
    assert note.count("(the base") == len(says)


def test_added_tokens_are_reported(tmp_path):
    vocabulary = {"vocab": {"a": 0, "b": 1}}
    base = write(
        tmp_path / "base", {"tokenizer.json": {"model": vocabulary, "added_tokens": [{"content": "<s>", "id": 2}]}}
    )
    added = [{"content": "<s>", "id": 2}, {"content": "<|im_end|>", "id": 3}]
    model = write(tmp_path / "a", {"tokenizer.json": {"model": vocabulary, "added_tokens": added}})
    assert 'added tokens ["<|im_end|>"];' in note_of(tmp_path, base, [model])


def test_different_templates_are_reported(tmp_path):
    base = write(tmp_path / "base")
    models = [write(tmp_path / name, {"tokenizer_config.json": {"chat_template": name}}) for name in "ab"]
    assert note_of(tmp_path, base, models).startswith(
        "every fine-tuned model has a different chat template, and none has"
    )


def test_companions_come_from_the_chosen_model(tmp_path):
    old = {"tokenizer.model": "old", "special_tokens_map.json": "{}", "chat_template.jinja": "old", "LICENSE": "free"}
    base = write(tmp_path / "base", old, text_config={"dtype": "float32"})
    new = {"tokenizer.json": "{}", "tokenizer_config.json": {"chat_template": "new"}, "generation_config.json": "{}"}
    other = {"dtype": "float16", "text_config": {"dtype": "float16"}, "architectures": ["Classes"], "id2label": {}}
    model = write(tmp_path / "tuned", new, rope_theta=1e6, **other)
    for origin in (str(model), "tuned"):
        assert note_of(tmp_path, base, [model, base], companions_from=origin) is None
        record = json.loads((tmp_path / "o" / "freemerge.json").read_text())
        # Tokenizers are not mixed, and the base's template is not kept beside the model's.
        assert record["files"]["copied"] == sorted(["LICENSE", "config.json", *new])
        assert record["files"]["from"] == str(model)
        # The weights are named and typed as the base's, so these keys are the base's.
        config = json.loads((tmp_path / "o" / "config.json").read_text())
        assert config == {**CONFIG, "rope_theta": 1e6, "text_config": {"dtype": "float32"}}
    note_of(tmp_path, base, [model], companions_from="tuned", dtype="bfloat16")
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["dtype"]) == ("bfloat16", "bfloat16")


def test_a_template_alone_leaves_the_bases_tokenizer(tmp_path):
    base = write(tmp_path / "base", {"tokenizer.json": "{}", "chat_template.jinja": "old"})
    model = write(tmp_path / "a", {"chat_template.json": {"chat_template": "new"}})
    note_of(tmp_path, base, {"chat": model}, companions_from="chat")
    copied = json.loads((tmp_path / "o" / "freemerge.json").read_text())["files"]["copied"]
    assert copied == ["chat_template.json", "config.json", "tokenizer.json"]


def test_invalid_choices_of_companions(tmp_path):
    base, longer = write(tmp_path / "base"), write(tmp_path / "longer", rows=6)
    plain = {"embed_tokens.weight": torch.ones(4, 2)}
    models = {"longer": longer, "plain": plain}

    def take(origin, **arguments):
        where = {"output": tmp_path / "o", "embeddings": "base", **arguments}
        merge(base, models, WeightAverage(), companions_from=origin, **where)

    with pytest.raises(MergeError, match=r"no fine-tuned model 'other'; name one of 'longer', 'plain', or 'base'"):
        take("other")
    with pytest.raises(MergeError, match="plain has no configuration beside its weights"):
        take("plain")
    with pytest.raises(MergeError, match=r"longer is for 6 rows of 'embed_tokens.weight', and the result has 4"):
        take("longer")
    with pytest.raises(MergeError, match="companions_from is of a model's folder"):
        take("longer", output=tmp_path / "o.safetensors")
    assert not (tmp_path / "o").exists()


def test_weights_of_another_kind_are_not_chosen_by_chance(tmp_path):
    base, same = write(tmp_path / "base", {"linear.pt": "a"}), write(tmp_path / "same", {"linear.pt": "a"})
    other = write(tmp_path / "other", {"linear.pt": "b"})
    note_of(tmp_path, base, [same, {"embed_tokens.weight": torch.ones(4, 2)}])
    assert (tmp_path / "o" / "linear.pt").read_text() == "a"
    with pytest.raises(MergeError, match=r"other: linear.pt holds weights other than the base's"):
        merge(base, [same, other], WeightAverage(), output=tmp_path / "p")
    for origin, content in (("base", "a"), ("other", "b")):
        note_of(tmp_path, base, [same, other], companions_from=origin)
        assert (tmp_path / "o" / "linear.pt").read_text() == content


def test_the_command_reports_differences_and_takes_companions(tmp_path, capsys):
    base, model = write(tmp_path / "base"), write(tmp_path / "a", {"chat_template.jinja": "new"})
    arguments = ["--base", str(base), "--finetuned", f"[{model}]", "--method", "WeightAverage", "--overwrite", "true"]
    arguments += ["--output", str(tmp_path / "o")]
    assert run(build_parser().parse_args(arguments)) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        "note: the fine-tuned models agree on settings that differ from the base's: a chat template (the base"
    )
    assert said.count("\n") == 1
    assert run(build_parser().parse_args([*arguments, "--companions_from", "a"])) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "o" / "chat_template.jinja").read_text() == "new"


CARD = "---\nlicense: {}\ntags:\n- x\n---\n# A model\n"


def test_the_licence_is_the_bases_and_others_are_reported(tmp_path):
    base = write(tmp_path / "base", {"README.md": CARD.format("apache-2.0")})
    same = write(tmp_path / "same", {"README.md": CARD.format("Apache-2.0 # as the base")})
    assert note_of(tmp_path, base, {"a": same, "b": write(tmp_path / "unknown")}) is None
    card = (tmp_path / "o" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: transformers\nlicense: "apache-2.0"\ntags:\n')
    own = "---\nlicense: other\nlicense_name: 'llama3'\nlicense_link: LICENSE\n---\n"
    other = write(tmp_path / "other", {"README.md": own})
    assert note_of(tmp_path, base, {"a": same, "b": other}) == (
        "licences differ (the base: apache-2.0; b: llama3); the model card names the base's, check what the others "
        "demand"
    )
    assert note_of(tmp_path, other, {"a": other}) is None
    card = (tmp_path / "o" / "README.md").read_text()
    assert 'license: "other"\nlicense_name: "llama3"\nlicense_link: "LICENSE"\n' in card


def test_custom_code_comes_along_only_if_it_is_trusted(tmp_path):
    base = write(tmp_path / "base", {"modeling_own.py": "print(1)", "tokenizer.json": "{}"})
    note = note_of(tmp_path, base, [write(tmp_path / "a")])
    assert note == "custom code is left out: modeling_own.py; trust_remote_code=True takes it along"
    record = json.loads((tmp_path / "o" / "freemerge.json").read_text())
    assert record["files"]["copied"] == ["config.json", "tokenizer.json"]
    assert "modeling_own.py" in record["files"]["left_out"]
    assert "left out: modeling_own.py." in (tmp_path / "o" / "README.md").read_text()
    assert note_of(tmp_path, base, [tmp_path / "a"], trust_remote_code=True) is None
    assert (tmp_path / "o" / "modeling_own.py").read_text() == "print(1)"


def test_a_chat_template_of_a_model_or_a_file(tmp_path):
    tokenizer = {"eos_token": "</s>", "chat_template": "old"}
    base = write(tmp_path / "base", {"tokenizer_config.json": tokenizer, "chat_template.json": {"chat_template": "x"}})
    chat = write(tmp_path / "chat", {"chat_template.jinja": "{{ new }}"})
    far = write(tmp_path / "far", {"tokenizer_config.json": {"chat_template": "far"}})
    (tmp_path / "own.jinja").write_text("{{ own }}")
    for origin, text in (("chat", "{{ new }}"), (str(far), "far"), (str(tmp_path / "own.jinja"), "{{ own }}")):
        note_of(tmp_path, base, [chat], chat_template_from=origin)
        assert (tmp_path / "o" / "chat_template.jinja").read_text() == text
        assert json.loads((tmp_path / "o" / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
        assert not (tmp_path / "o" / "chat_template.json").exists()
    named = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    several = write(tmp_path / "several", {"tokenizer_config.json": {"chat_template": named}})
    note_of(tmp_path, base, [several], chat_template_from="several")
    assert json.loads((tmp_path / "o" / "tokenizer_config.json").read_text())["chat_template"] == named
    assert not (tmp_path / "o" / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ("plain", "chat_template_from: plain has no chat template"),
        ("nowhere", r"chat_template_from: there is no model 'nowhere'; name one of 'base', 'plain', a folder"),
        ("nowhere.jinja", r"chat_template_from: nowhere.jinja cannot be read"),
        ("org/nowhere", r"chat_template_from: org/nowhere: there is no such path"),
    ],
)
def test_templates_that_are_not_there(tmp_path, origin, message):
    base, plain = write(tmp_path / "base"), write(tmp_path / "plain")
    with pytest.raises(MergeError, match=message):
        merge(base, {"plain": plain}, WeightAverage(), output=tmp_path / "o", chat_template_from=origin)
    with pytest.raises(MergeError, match="chat_template_from is of a model's folder"):
        merge(base, [plain], WeightAverage(), output=tmp_path / "o.safetensors", chat_template_from="base")
