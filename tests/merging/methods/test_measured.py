"""RegMean and Fisher merging with statistics in files, against least squares on the data themselves."""

import numpy as np
import pytest
import torch

from freemerge.checkpoints import save_checkpoint
from freemerge.merging import AdaMerging, FisherMerging, MergeError, RegMean, merge, merge_task_vectors
from freemerge.testing import check_method


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def models():
    return [{"fc.weight": normal(5, 8, seed=seed), "fc.bias": normal(5, seed=10 + seed)} for seed in range(3)]


def save(folder, tables):
    paths = [str(folder / f"{index}.safetensors") for index in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        save_checkpoint(path, table)
    return paths


def test_regmean_is_the_least_squares_solution(tmp_path, models):
    """argmin_W Σ_k ‖X_k Wᵀ − X_k W_kᵀ‖², solved on all samples together."""
    inputs = [normal(40, 8, seed=20 + seed) * (seed + 1) for seed in range(3)]
    paths = save(tmp_path, [{"fc.weight": samples.T @ samples} for samples in inputs])
    merged = merge_task_vectors(models, RegMean(paths, alpha=1.0))
    samples = torch.cat(inputs).double()
    outputs = torch.cat([x.double() @ model["fc.weight"].double().T for x, model in zip(inputs, models, strict=True)])
    expected = torch.linalg.lstsq(samples, outputs).solution.T
    np.testing.assert_allclose(merged["fc.weight"].numpy(), expected.numpy(), atol=1e-4)
    torch.testing.assert_close(merged["fc.bias"], sum(model["fc.bias"] for model in models) / 3)


def test_regmean_scales_what_lies_off_the_diagonal(tmp_path, models):
    grams = [(x.T @ x).double() for x in (normal(40, 8, seed=20 + seed) for seed in range(3))]
    paths = save(tmp_path, [{"fc.weight": gram.float()} for gram in grams])
    scaled = [0.9 * gram + 0.1 * torch.diag(gram.diagonal()) for gram in grams]
    above = sum(model["fc.weight"].double() @ gram for model, gram in zip(models, scaled, strict=True))
    expected = 2 * above @ torch.linalg.inv(sum(scaled))
    np.testing.assert_allclose(
        merge_task_vectors(models, RegMean(paths, 2.0))["fc.weight"].numpy(), expected.numpy(), atol=1e-4
    )


def test_fisher_weighs_each_entry(tmp_path, models):
    information = [{name: normal(*t.shape, seed=30 + k).square() for name, t in models[0].items()} for k in range(3)]
    paths = save(tmp_path, information)
    merged = merge_task_vectors(models, FisherMerging(paths, scale=0.5, least=1e-12))
    for name, tensor in merged.items():
        above = sum(f[name].double() * model[name].double() for f, model in zip(information, models, strict=True))
        expected = 0.5 * above / sum(f[name].double() for f in information)
        np.testing.assert_allclose(tensor.numpy(), expected.numpy(), atol=1e-5)


def test_entries_on_which_nothing_depends_are_averaged(tmp_path, models):
    paths = save(tmp_path, [{"fc.bias": torch.zeros(5)} for _ in models])
    merged = merge_task_vectors(models, FisherMerging(paths))
    for name in merged:
        torch.testing.assert_close(merged[name], sum(model[name] for model in models) / 3)


def test_files_of_a_merge_on_the_disk(tmp_path, models):
    base = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    paths = save(tmp_path, [{name: normal(*t.shape, seed=k).square() for name, t in base.items()} for k in range(3)])
    expected = merge_task_vectors(models, FisherMerging(paths))
    merged = merge(base, models, FisherMerging(paths))
    for name in base:
        torch.testing.assert_close(merged[name], expected[name])


def test_errors_say_which_file_and_which_tensor(tmp_path, models):
    good = {"fc.weight": torch.eye(8)}
    for tables, method, message in [
        ([good, good], RegMean, "RegMean has 2 files in `statistics` for 3 fine-tuned models"),
        ([{"other": torch.eye(8)}] * 3, RegMean, "0.safetensors: has no statistics of any merged weight"),
        ([good, good, {"x": torch.eye(2)}], RegMean, "2.safetensors: has no statistics of 'fc.weight'"),
        ([good, good, {"fc.weight": torch.eye(5)}], RegMean, r"'fc.weight' have shape \[5, 5\], expected \[8, 8\]"),
        ([{"fc.bias": torch.eye(5)}] * 3, RegMean, r"'fc.bias' have shape \[5, 5\], expected none for RegMean"),
        ([good, good, {"fc.weight": torch.full((8, 8), torch.nan)}], RegMean, "2.safetensors: .* have NaN or infinite"),
        ([{"fc.bias": -torch.ones(5)}] * 3, FisherMerging, "0.safetensors: the statistics of 'fc.bias' are negative"),
    ]:
        paths = save(tmp_path, tables)
        with pytest.raises(MergeError, match=message):
            merge_task_vectors(models, method(paths))
    for build, message in [
        (RegMean, "`statistics` must list a file for each model"),
        (lambda: RegMean(["a"], alpha=2), r"`alpha` must lie in \[0, 1\], got 2"),
        (lambda: FisherMerging(["a"], least=0), "`least` must be above 0, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


def test_adamerging_weighs_each_tensor_by_its_own_number(tmp_path, models):
    numbers = [{"fc.weight": torch.tensor(0.2 * k + 0.1)} for k in range(3)]
    paths = save(tmp_path, numbers)
    method = AdaMerging(paths, scale=0.5, initial=0.4)
    merged = merge_task_vectors(models, method)
    expected = 0.5 * sum((0.2 * k + 0.1) * model["fc.weight"].double() for k, model in enumerate(models))
    np.testing.assert_allclose(merged["fc.weight"].numpy(), expected.numpy(), atol=1e-6)
    rest = 0.5 * 0.4 * sum(model["fc.bias"].double() for model in models)  # no number was learned for it
    np.testing.assert_allclose(merged["fc.bias"].numpy(), rest.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        (AdaMerging, [{"square.weight": torch.tensor(0.1 * k), "norm.bias": torch.tensor(0.3)} for k in range(3)]),
        (RegMean, [{"square.weight": torch.eye(8) * (k + 1), "conv.weight": torch.eye(27)} for k in range(3)]),
        (FisherMerging, [{"norm.bias": torch.arange(6.0) + k} for k in range(3)]),
    ],
)
def test_what_the_engine_relies_on(tmp_path, kind, tables):
    check_method(kind(save(tmp_path, tables)))


def test_parameters_of_adamerging_are_checked():
    for arguments, message in [
        ({"initial": 1.5}, r"`initial` must lie in \[0, 1\], got 1.5"),
        ({"rate": 0.0}, "`rate` must be above 0, got 0"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"batch_size": 1.5}, "`batch_size` must be at least 1, got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            AdaMerging("collect", **arguments)
