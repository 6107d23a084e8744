"""RegMean and Fisher merging in a run: the stage `merge` measures what they merge by."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from freemerge import FineTuner, SuiteRun
from freemerge.checkpoints import load_checkpoint
from freemerge.cli import main
from freemerge.data import Task
from freemerge.merging import (
    SVC,
    AdaMerging,
    FisherMerging,
    MergeError,
    PerPattern,
    RegMean,
    TaskArithmetic,
    collected,
    merge,
    rescaled,
)
from freemerge.models import LanguageBackbone
from freemerge.pipeline import MergeSettings, Settings
from freemerge.pipeline.checks.findings import Findings
from freemerge.pipeline.checks.stages import check_merge
from freemerge.pipeline.stages import statistics
from freemerge.pipeline.stages.statistics import squared_gradients
from freemerge.pipeline.store import stage_folder
from tests.tiny import TinySuite, tiny_backbone

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
TINY = Path(__file__).parent.parent / "tiny.yaml"
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
TASKS = ("corners", "bars")


def make_run(folder, methods, **settings):
    tuner = FineTuner(tiny_backbone(), optimizer=partial(torch.optim.AdamW, lr=3e-3))
    tuner.backbone.pretrained = True
    merging = MergeSettings(methods, scales=[0.3, 1.0], free=next(iter(methods)), **settings)
    return SuiteRun(tuner, TinySuite(), folder, trainer=TRAINER, settings=Settings(merge=merging))


def test_a_run_measures_and_merges(tmp_path, capsys):
    methods = {"RegMean": RegMean("collect"), "Fisher": FisherMerging("collect")}
    run = make_run(tmp_path, methods, statistics_samples=24)
    run.run(["finetune", "merge"])
    paths = {
        kind: [tmp_path / "merge" / "statistics" / f"{task}.{kind}.safetensors" for task in TASKS]
        for kind in ("gram_matrices", "squared_gradients")
    }
    base, tuned = run.files.base_weights(), run.files.finetuned_weights()
    found = run.files.merge_stage().record()["results"]["methods"]
    for name, kind in (("RegMean", "gram_matrices"), ("Fisher", "squared_gradients")):
        method = {"RegMean": RegMean, "Fisher": FisherMerging}[name]([str(path) for path in paths[kind]])
        expected = merge(base, tuned, rescaled(method, found[name]["best"]["scale"]))
        written = load_checkpoint(tmp_path / "merge" / f"{name.lower()}.safetensors")
        assert all(torch.equal(written[tensor], value) for tensor, value in expected.items())
    _check_values(run, paths)
    capsys.readouterr()
    make_run(tmp_path, methods, statistics_samples=24).run(["finetune", "merge"])
    assert "merge: done already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="finished results would be replaced"):
        make_run(tmp_path, methods, statistics_samples=12).run(["merge"])


def _check_values(run, paths):
    """The last layer's bias: its gradient is that of the features, and its inputs are the layer before's outputs."""
    task = TASKS[0]
    backbone, head = run.files.backbone(run.files.finetuned(task)).eval(), run.files.heads(shared=False)[task]
    inputs = [batch for batch, _ in run.suite.for_task(task).train_dataloader()]
    samples = torch.cat(inputs)[:24]
    name = next(
        name for name, _ in backbone.model.named_parameters() if name.endswith("patch_embeddings.projection.weight")
    )
    patches = F.unfold(samples, 4, stride=4).transpose(1, 2).flatten(0, 1)
    gram = load_checkpoint(paths["gram_matrices"][0])[name]
    torch.testing.assert_close(gram, patches.T @ patches, rtol=1e-4, atol=1e-3)
    squares, generator = load_checkpoint(paths["squared_gradients"][0]), torch.Generator().manual_seed(run.seed)
    expected = {name: torch.zeros_like(value) for name, value in backbone.model.named_parameters()}
    assert expected.keys() == squares.keys()
    for sample in samples:
        logs = head(backbone(sample[None])).log_softmax(-1)
        backbone.zero_grad()
        F.nll_loss(logs, torch.multinomial(logs.detach().exp(), 1, generator=generator)[0]).backward()
        for name, value in backbone.model.named_parameters():
            expected[name] += value.grad.square() / 24 if value.grad is not None else 0
    for name, value in expected.items():
        torch.testing.assert_close(squares[name], value, rtol=1e-3, atol=1e-8)


def test_a_run_learns_coefficients_without_labels(tmp_path):
    method = AdaMerging("collect", steps=3, rate=0.05, batch_size=8)
    run = make_run(tmp_path, {"AdaMerging": method})
    run.run(["finetune", "merge"])
    paths = [run.files.statistics_path(method, task) for task in TASKS]
    numbers = [load_checkpoint(path) for path in paths]
    base, tuned = run.files.base_weights(), run.files.finetuned_weights()
    assert all(0 <= float(value) <= 1 for table in numbers for value in table.values())
    assert max(abs(float(value) - 0.3) for table in numbers for value in table.values()) > 0.1  # three steps of 0.05
    best = run.files.merge_stage().record()["results"]["methods"]["AdaMerging"]["best"]["scale"]
    written = load_checkpoint(tmp_path / "merge" / "adamerging.safetensors")
    for name, value in base.items():
        if not value.is_floating_point():
            continue
        change = sum(
            float(table[name]) * (model[name].double() - value.double())
            for table, model in zip(numbers, tuned.values(), strict=True)
        )
        torch.testing.assert_close(written[name].double(), value.double() + best * change, rtol=1e-5, atol=1e-6)


class NumbersSuite(TinySuite):
    """The second task is a regression."""

    def build(self, name):
        task = super().build(name)
        return task if name == "corners" else replace(task, class_names=(), kind="regression", metric=None)


def test_only_classes_have_an_entropy(tmp_path):
    run = make_run(tmp_path, {"ada": SVC(AdaMerging("collect"))})
    run.files.suite = NumbersSuite()
    findings = Findings()
    check_merge(run.files, findings)
    assert findings.faults == ["merge.methods: ada: AdaMerging learns from classes, and 'bars' is regression"]


def test_no_rank_waits_for_another_inside_of_what_rank_0_does_alone(tmp_path, monkeypatch):
    """Broadcasts within a broadcast's computation, which only rank 0 makes, would be answered by the wrong ones."""
    inside = []

    def alone(compute):
        assert not inside, "a collective call while rank 0 computes alone"
        inside.append(compute)
        try:
            return compute()
        finally:
            inside.pop()

    methods = {"ada": AdaMerging("collect", steps=1), "f": FisherMerging("collect"), "r": RegMean("collect")}
    make_run(tmp_path, methods, statistics_samples=4).run(["finetune"])
    for module in (stage_folder, statistics):
        monkeypatch.setattr(module, "from_rank_zero", alone)
    run = make_run(tmp_path, methods, statistics_samples=4)
    run.begin(run.files.merge_stage())
    statistics.collect_statistics(run)
    assert len(list((tmp_path / "merge" / "statistics").iterdir())) == 6


def test_other_learning_is_another_file():
    names = {AdaMerging("collect", **change).collected_as for change in ({}, {"steps": 7}, {"rate": 0.1})}
    assert len(names) == 3


def test_a_search_says_what_was_not_collected(tmp_path):
    run = make_run(tmp_path, {"sum": TaskArithmetic()})
    run.run(["finetune"])
    run.settings.tune.method = SVC(RegMean("collect"))
    with pytest.raises(ValueError, match=r"corners\.gram_matrices\.safetensors is not there: .* that is RegMean"):
        run.tune()


def test_the_squared_gradients_of_a_language_model_are_of_the_tokens_that_count():
    """Each output answers for the next token; prompts, with labels of −100, have no part."""
    torch.manual_seed(0)
    backbone = LanguageBackbone(config=LLAMA).eval()
    tokens = torch.randint(0, 40, (3, 7))
    labels = torch.where(torch.arange(7) < 3, -100, tokens)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    task = Task("t", (), None, None, None, kind="causal_lm")
    found = squared_gradients(backbone, torch.nn.Identity(), task, iter([(inputs, labels)]), seed=0)
    generator = torch.Generator().manual_seed(0)
    expected = {name: torch.zeros_like(value) for name, value in backbone.model.named_parameters()}
    for index in range(3):
        outputs = backbone({name: value[index : index + 1] for name, value in inputs.items()})[0, 2:-1]
        logs = outputs.log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        backbone.zero_grad()
        logs.gather(1, drawn).sum().backward()
        for name, value in backbone.model.named_parameters():
            expected[name] += value.grad.square() / 3
    assert found.keys() == expected.keys()  # the tied head has no entry of its own
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)


def test_a_configuration_says_it_in_one_line(tmp_path, capsys):
    config = yaml.safe_load(TINY.read_text())
    line = {"class_path": "RegMean", "init_args": {"statistics": "collect"}}
    config["merge"] = {"methods": {"RegMean": line}, "free": "RegMean", "scales": [1.0], "statistics_samples": 8}
    config["trainer"]["max_steps"] = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--run.folder", str(tmp_path / "run")]
    assert main(["fit", *arguments, "--run.stages", "[pretrain, finetune, merge]"]) == 0
    assert (tmp_path / "run" / "merge" / "regmean.safetensors").is_file()
    assert len(list((tmp_path / "run" / "merge" / "statistics").iterdir())) == 2


def test_methods_inside_of_others_are_found():
    asked = []

    def paths(method):
        asked.append(method.measures)
        return [f"{method.collected_as}.safetensors"]

    inner = PerPattern(TaskArithmetic(), {"a": RegMean("collect"), "b": FisherMerging("collect")})
    assert collected(SVC(inner), paths) == SVC(
        PerPattern(
            TaskArithmetic(),
            {"a": RegMean(["gram_matrices.safetensors"]), "b": FisherMerging(["squared_gradients.safetensors"])},
        )
    )
    assert asked == ["gram_matrices", "squared_gradients"]
    given = SVC(RegMean(["a.safetensors"]))
    assert collected(given, paths) is given


def test_without_a_run_there_is_nothing_to_collect_on():
    base = {"w": torch.ones(2, 2)}
    with pytest.raises(MergeError, match='RegMean: statistics="collect" is for runs over a suite'):
        merge(base, [base], RegMean("collect"))


def test_the_number_of_samples_concerns_no_run_that_collects_nothing(tmp_path):
    methods = {"sum": TaskArithmetic()}
    make_run(tmp_path, methods).run(["finetune"])
    keys = {make_run(tmp_path, methods, statistics_samples=count).files.merge_stage().key for count in (8, 9)}
    assert len(keys) == 1
    with pytest.raises(ValueError, match=r"merge\.statistics_samples: must be at least 1, got 0"):
        make_run(tmp_path, methods, statistics_samples=0)
