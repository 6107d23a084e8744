"""mergekit's configurations: what they become, what is refused, and the merged values against arithmetic."""

import json

import pytest
import torch
import yaml

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.cli import main
from freemerge.cli.mergekit import translate

PARTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
NAMES = ["model.embed_tokens.weight"]
NAMES += [f"model.layers.{layer}.{part}" for layer in range(4) for part in PARTS]
NAMES += ["model.norm.weight", "lm_head.weight"]
DEPTHS = {name: int(name.split(".")[2]) / 3 if ".layers." in name else 0.0 for name in NAMES}
"""As in mergekit 0.1: tensors outside the layers have the first value."""


def make(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 6, generator=generator) for name in NAMES}


@pytest.fixture
def models(tmp_path):
    """Label → tensors; the files are beside the configuration."""
    made = {"base": make(0), "a": make(1), "b": make(2)}
    for label, tensors in made.items():
        folder = tmp_path / label
        folder.mkdir()
        save_checkpoint(folder / "model.safetensors", tensors)
        config = {"model_type": "other", "num_hidden_layers": 4, "layer_types": ["w", "x", "y", "z"]}
        (folder / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Merge by the text of a configuration: the result's tensors."""
    monkeypatch.chdir(tmp_path)

    def merge(text, *options):
        (tmp_path / "their.yaml").write_text(text)
        assert main(["merge", "--config", "their.yaml", "--output", "out", "--overwrite", *options]) == 0
        return load_checkpoint(tmp_path / "out")

    return merge


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_a_weighted_mean_without_a_base(models, run):
    merged = run("""
        merge_method: linear
        models:
          - {model: base, parameters: {weight: 1}}
          - {model: a, parameters: {weight: 2}}
          - {model: b, parameters: {weight: 1}}
        dtype: float32
    """)
    close(merged, {n: (models["base"][n] + 2 * models["a"][n] + models["b"][n]) / 4 for n in NAMES})


def test_a_sum_of_weights(models, run):
    merged = run("""
        merge_method: linear
        models:
          - {model: a, parameters: {weight: 2}}
          - {model: b, parameters: {weight: 1}}
        parameters: {normalize: false}
    """)
    close(merged, {n: 2 * models["a"][n] + models["b"][n] for n in NAMES})


def test_a_gradient_of_weights_that_is_normalized(models, run):
    """The share of b is t/(1 + t) at the depth t, which is not linear in t."""
    merged = run("""
        merge_method: linear
        models:
          - {model: a, parameters: {weight: 1}}
          - {model: b, parameters: {weight: [0, 1]}}
    """)
    expected = {n: (models["a"][n] + DEPTHS[n] * models["b"][n]) / (1 + DEPTHS[n]) for n in NAMES}
    close(merged, expected)


def test_filters_and_gradients(models, run):
    """For attention of a: 0.5 at the first layer, 0 in the middle, 1 at the last; elsewhere 0.25. b: 0.5."""
    merged = run("""
        merge_method: task_arithmetic
        base_model: base
        models:
          - model: a
            parameters:
              weight:
                - {filter: self_attn, value: [0.5, 0, 1]}
                - {value: 0.25}
          - model: b
        parameters: {weight: 0.5, lambda: 2}
    """)

    def weight(name):
        depth = DEPTHS[name]
        if "self_attn" not in name:
            return 0.25
        return 0.5 - depth if depth < 0.5 else 2 * depth - 1

    base = models["base"]
    close(
        merged,
        {n: base[n] + 2 * (weight(n) * (models["a"][n] - base[n]) + 0.5 * (models["b"][n] - base[n])) for n in NAMES},
    )


def ties(deltas, weights, densities):
    """Keep the largest of each tensor, elect by the weighted sum, divide by the weights that agree."""
    kept = []
    for delta, density in zip(deltas, densities, strict=True):
        bound = delta.abs().flatten().sort(descending=True).values[max(1, int(density * delta.numel())) - 1]
        kept.append(torch.where(delta.abs() >= bound, delta, 0.0))
    weighted = torch.stack([weight * delta for weight, delta in zip(weights, kept, strict=True)])
    agrees = weighted.sign() == weighted.sum(0).sign()
    shares = torch.tensor(weights).view(-1, 1, 1)
    total = (shares * agrees * (weighted != 0)).sum(0)
    return (weighted * agrees).sum(0) / torch.where(total == 0, 1.0, total)


def test_ties(models, run):
    merged = run("""
        merge_method: ties
        base_model: base
        models:
          - model: base
          - {model: a, parameters: {weight: 0.5, density: 0.5}}
          - {model: b, parameters: {weight: 1.0, density: [1, 0.25]}}
        parameters: {int8_mask: true, lambda: 1.5}
    """)
    expected = {}
    for name in NAMES:
        deltas = [models[label][name] - models["base"][name] for label in "ab"]
        found = ties(deltas, [0.5, 1.0], [0.5, 1 - 0.75 * DEPTHS[name]])
        expected[name] = models["base"][name] + 1.5 * found
    close(merged, expected)


def test_slices_of_whole_models(models, run):
    """Weights of these models are far from parallel, so that the arc is not the chord."""
    merged = run("""
        merge_method: slerp
        base_model: base
        slices:
          - sources:
              - {model: a, layer_range: [0, 4]}
              - {model: base, layer_range: [0, 4]}
        parameters:
          t: [0, 1]
    """)
    expected = {}
    for name in NAMES:
        one, two, t = models["base"][name], models["a"][name], DEPTHS[name]
        angle = torch.acos((one * two).sum() / one.norm() / two.norm())
        expected[name] = (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle)
    close(merged, expected)


def test_stacked_layers(models, run, tmp_path):
    """Layers 0 1 of a, 1 2 of b with another scale, 3 of a; embeddings of the first slice, the rest of the last."""
    merged = run("""
        merge_method: passthrough
        slices:
          - sources: [{model: a, layer_range: [0, 2]}]
          - sources:
              - model: b
                layer_range: [1, 3]
                parameters:
                  scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.5}, {value: 1.0}]
          - sources: [{model: a, layer_range: [3, 4]}]
    """)
    a, b = models["a"], models["b"]
    expected = {name: a[name] for name in NAMES if ".layers." not in name}
    for layer, (source, old, factors) in enumerate(
        [(a, 0, (1, 1)), (a, 1, (1, 1)), (b, 1, (0, 0.5)), (b, 2, (0, 0.5)), (a, 3, (1, 1))]
    ):
        for part, factor in zip(PARTS, factors, strict=True):
            expected[f"model.layers.{layer}.{part}"] = factor * source[f"model.layers.{old}.{part}"]
    close(merged, expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (5, ["w", "x", "x", "y", "z"])


def test_merged_slices_with_parameters_of_their_own(models, run):
    """A gradient runs over its slice: layers 0 1 of the result have the weights 0.3, then 0 and 1."""
    merged = run("""
        merge_method: task_arithmetic
        base_model: base
        slices:
          - sources:
              - {model: base, layer_range: [0, 2]}
              - {model: a, layer_range: [0, 2], parameters: {weight: 0.3}}
          - sources:
              - {model: base, layer_range: [1, 3]}
              - {model: a, layer_range: [1, 3], parameters: {weight: [0, 1]}}
    """)
    base, a = models["base"], models["a"]
    expected = {}
    for layer, (old, weight) in enumerate([(0, 0.3), (1, 0.3), (1, 0.0), (2, 1.0)]):
        for part in PARTS:
            one, two = base[f"model.layers.{old}.{part}"], a[f"model.layers.{old}.{part}"]
            expected[f"model.layers.{layer}.{part}"] = one + weight * (two - one)
    for name, weight in zip((NAMES[0], *NAMES[-2:]), (0.3, 0.0, 0.0), strict=True):
        expected[name] = base[name] + weight * (a[name] - base[name])
    close(merged, expected)


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("task_arithmetic", {"normalize": True}, {"WeightAverage": {"coefficients": [0.4, 1.2]}}),
        ("dare_linear", {}, {"Dare": {"method": {"TaskArithmetic": {"scale": [0.4, 1.2]}}, "drop": [0.5, 0.25]}}),
        (
            "dare_linear",
            {"rescale": False},
            {"Dare": {"method": {"TaskArithmetic": {"scale": [0.2, 1.2 * 0.75]}}, "drop": [0.5, 0.25]}},
        ),
        (
            "dare_ties",
            {"lambda": 0.7},
            {
                "Dare": {
                    "method": {"Ties": {"density": 1.0, "scale": 0.7, "coefficients": [0.4, 1.2], "mean": False}},
                    "drop": [0.5, 0.25],
                }
            },
        ),
        (
            "della",
            {"epsilon": 0.1},
            {
                "Della": {
                    "method": {"Ties": {"density": 1.0, "scale": 1.0, "coefficients": [0.4, 1.2]}},
                    "drop": [0.5, 0.25],
                    "epsilon": 0.2,
                }
            },
        ),
        ("breadcrumbs", {"gamma": 0.25}, {"Breadcrumbs": {"bottom": [0.25, 0.0], "top": 0.25, "scale": [0.4, 1.2]}}),
        (
            "breadcrumbs_ties",
            {"gamma": 0.5},
            {"Breadcrumbs": {"bottom": 0.0, "top": [0.5, 0.25], "scale": [0.4, 1.2], "elect": "sum"}},
        ),
        ("nuslerp", {}, {"Slerp": {"t": 1.2 / 1.6}}),
        ("multislerp", {}, {"MultiSlerp": {"coefficients": [0.4, 1.2]}}),
        ("sce", {"select_topk": 0.3}, {"SCE": {"select": 0.3}}),
        ("model_stock", {}, {"ModelStock": {}}),
        (
            "karcher",
            {"max_iter": 3},
            {"WholeWeights": {"method": {"KarcherMean": {"iterations": 3, "tolerance": 1e-5}}}},
        ),
    ],
)
def test_methods(method, parameters, expected):
    """The parameters of two models, weights 0.4 and 1.2, densities 0.5 and 0.75, in our words."""
    table = {
        "merge_method": method,
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.4, "density": 0.5}},
            {"model": "b", "parameters": {"weight": 1.2, "density": 0.75}},
        ],
        "parameters": parameters,
    }
    assert short(translate(table).options["method"]) == expected


def short(described):
    """A description as {class: arguments}."""
    if not isinstance(described, dict) or "class_path" not in described:
        return described
    return {described["class_path"]: {key: short(value) for key, value in described.get("init_args", {}).items()}}


@pytest.mark.parametrize(("method", "ours"), [("nearswap", "NearSwap"), ("arcee_fusion", "ArceeFusion")])
def test_methods_of_one_model_besides_the_base(method, ours):
    table = {"merge_method": method, "base_model": "a", "models": [{"model": "a"}, {"model": "b"}]}
    table["parameters"] = {"t": 0.01} if method == "nearswap" else {}
    options = translate(table).options
    assert (options["base"], options["finetuned"], options["method"]["class_path"]) == ("a", ["b"], ours)


def test_adapters_revisions_and_files():
    table = yaml.safe_load("""
        merge_method: linear
        base_model: org/base
        models:
          - {model: org/base+org/adapter}
          - {model: {model: {path: org/other, revision: v2}}}
          - {model: org/base}
        parameters: {weight: 1.0}
        dtype: float32
        out_dtype: bfloat16
        tokenizer_source: model:org/other@v2
    """)
    options = translate(table).options
    assert (options["base"], options["finetuned"]) == ("org/base", ["org/adapter", "org/other@v2"])
    assert (options["dtype"], options["companions_from"]) == ("bfloat16", "org/other@v2")


TWO = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("merge_method: [ties]", ["merge_method: there is no ['ties'] here; did you mean 'ties'?"]),
        ("merge_method: tis", ["merge_method: there is no 'tis' here; did you mean 'ties'?"]),
        (
            f"{{merge_method: linear, {TWO}, base_modl: a, chat_template: chatml, tokenizer_source: union}}",
            [
                "base_modl: is not a key of mergekit's configurations; did you mean 'base_model'?",
                "chat_template: is not possible here",
                "tokenizer_source: a union of tokenizers is not possible here",
            ],
        ),
        (f"{{merge_method: ties, {TWO}}}", ["base_model: is missing; ties needs it"]),
        (
            f"{{merge_method: linear, {TWO}, parameters: {{wieght: 1}}}}",
            ["parameters.wieght: is no parameter of any method; did you mean 'weight'?"],
        ),
        ("{merge_method: linear, models: [{model: a}]}", ["parameters: linear needs `weight` for each model"]),
        ("{merge_method: linear, models: [{modle: a}]}", ["models[0]: expected a mapping with `model`"]),
        ("{merge_method: linear, modules: {}}", ["modules: are not possible here"]),
        ("{merge_method: slerp, base_model: a, models: [{model: b}, {model: c}]}", ["models: slerp needs 1 besides"]),
        (
            "{merge_method: linear, models: [{model: a, parameters: {weight: [x]}}]}",
            ["models[0].parameters.weight: expected a number, true, false, or a list of numbers, got ['x']"],
        ),
        (
            "{merge_method: linear, models: [{model: a+b}, {model: c}], parameters: {weight: 1}}",
            ["models[0].model: an adapter is merged only with base_model, and a is another model"],
        ),
        (
            "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [4, 2]}]}]}",
            ["slices[0].sources[0].layer_range: expected the first layer and the one after the last, got [4, 2]"],
        ),
        (
            "{merge_method: nuslerp, base_model: c, models: [{model: a}, {model: b}], "
            "parameters: {weight: 1, nuslerp_flatten: false}}",
            ["parameters.nuslerp_flatten: false is not possible"],
        ),
    ],
)
def test_what_is_not_possible_is_one_line_per_key(tmp_path, monkeypatch, capsys, text, messages):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["merge", "--config", "their.yaml", "--output", "out"])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages)
    for message in messages:
        assert any(line.startswith(f"error: their.yaml: {message}") for line in lines), lines
    assert not (tmp_path / "out").exists()


def test_the_configuration_in_our_words_does_the_same(models, run, tmp_path, capsys):
    text = """
        merge_method: task_arithmetic
        base_model: base
        models: [{model: a, parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: 0.25}]}}]
        parameters: {t: 0.5}
    """
    merged = run(text)
    assert "note: their.yaml: parameters.t: has no effect on task_arithmetic" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["merge", "--config", "their.yaml", "--output", "again", "--print_config"])
    printed = capsys.readouterr().out
    assert "merge_method" not in printed
    (tmp_path / "ours.yaml").write_text(printed)
    assert main(["merge", "--config", "ours.yaml"]) == 0
    assert all(torch.equal(tensor, merged[name]) for name, tensor in load_checkpoint(tmp_path / "again").items())
    capsys.readouterr()
    with pytest.raises(SystemExit):  # options after the file replace what it says, as with a file of ours
        main(["merge", "--config", "their.yaml", "--output", "x", "--finetuned", "b", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["finetuned"] == ["b"]


def test_a_filter_that_is_misspelt_is_noted_and_numbers_may_be_text(models, run, capsys):
    """YAML reads 1e-1 as text."""
    merged = run("""
        merge_method: task_arithmetic
        base_model: base
        models: [{model: a, parameters: {weight: [{filter: self_atn, value: 0.5}, {value: 1e-1}]}}]
    """)
    assert "note: overrides: the pattern '*self_atn*' matches no tensor\n" in capsys.readouterr().err
    close(merged, {n: models["base"][n] + 0.1 * (models["a"][n] - models["base"][n]) for n in NAMES})


def test_filters_in_lists_that_differ():
    """Both models have a list of filters, so that four cases of tensors are distinguished."""
    table = yaml.safe_load("""
        merge_method: task_arithmetic
        base_model: base
        models:
          - {model: a, parameters: {weight: [{filter: attn, value: 1}, {value: 2}]}}
          - {model: b, parameters: {weight: [{filter: layers.0, value: 3}, {value: 4}]}}
    """)
    method = short(translate(table).options["method"])["PerPattern"]
    assert method["default"] == {"TaskArithmetic": {"scale": [2.0, 4.0]}}
    assert [short(each)["TaskArithmetic"]["scale"] for each in method["overrides"].values()] == [
        [1.0, 3.0],
        [1.0, 4.0],
        [2.0, 3.0],
    ]
    assert list(method["overrides"]) == ["re:(?=.*attn)(?=.*layers\\.0).*", "*attn*", "*layers.0*"]
