"""How task vectors relate, against NumPy on whole models in float64."""

import numpy as np
import pytest
import torch

from freemerge.merging import HighPass, MergeError, NyquistDisc, advise, task_vector
from freemerge.runtime.threads import one_thread


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base():
    return {
        "layer.weight": normal(24, 16, seed=0),
        "layer.bias": normal(24, seed=1),
        "conv.weight": normal(8, 4, 3, 3, seed=2),
        "embed_tokens.weight": normal(30, 16, seed=3),
        "steps": torch.tensor(3),
    }


@pytest.fixture
def models(base):
    """Three fine-tuned models; the second leaves some values unchanged."""
    found = {}
    for index, label in enumerate("abc"):
        moved = {
            name: value + 0.1 * (index + 1) * normal(*value.shape, seed=100 * index + len(name))
            for name, value in base.items()
            if value.is_floating_point()
        }
        found[label] = {**base, **moved}
    found["b"]["layer.bias"] = base["layer.bias"].clone()
    return found


def vectors(base, models):
    """(K, D) float64."""
    names = [name for name in base if base[name].is_floating_point()]
    return np.stack(
        [
            np.concatenate([task_vector(base, model)[name].double().numpy().ravel() for name in names])
            for model in models.values()
        ]
    )


def test_norms_angles_and_signs_are_those_of_the_whole_vectors(base, models):
    found = advise(base, models).relations
    flat = vectors(base, models)
    norms = np.linalg.norm(flat, axis=1)
    assert found.labels == ("a", "b", "c")
    assert found.parameters == flat.shape[1]
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)
    whole = np.concatenate([v.double().numpy().ravel() for v in base.values() if v.is_floating_point()])
    np.testing.assert_allclose(found.relative_norms, norms / np.linalg.norm(whole), rtol=1e-6)
    np.testing.assert_allclose(found.changed, (flat != 0).mean(axis=1))
    np.testing.assert_allclose(found.cosines, flat @ flat.T / np.outer(norms, norms), atol=1e-6)
    for i in range(3):
        for j in range(3):
            both = (flat[i] != 0) & (flat[j] != 0)
            assert found.sign_conflicts[i][j] == pytest.approx((flat[i] * flat[j] < 0)[both].mean())
    up, down = (flat > 0).sum(0), (flat < 0).sum(0)
    shared = up + down > 1
    assert found.disagreement == pytest.approx(((up > 0) & (down > 0))[shared].mean())


def test_overlaps_are_those_of_the_leading_singular_vectors(base, models):
    found = advise(base, models).relations
    assert found.matrices == ("layer.weight", "conv.weight")  # embeddings are tables, not matrices
    sides = {"left": np.zeros((3, 3)), "right": np.zeros((3, 3))}
    for name, rank in (("layer.weight", 4), ("conv.weight", 2)):  # a quarter of the shorter side
        parts = [task_vector(base, model)[name].double().flatten(1).numpy() for model in models.values()]
        decomposed = [np.linalg.svd(part, full_matrices=False) for part in parts]
        for i, (u, _, v) in enumerate(decomposed):
            for j, (other_u, _, other_v) in enumerate(decomposed):
                sides["left"][i, j] += np.square(u[:, :rank].T @ other_u[:, :rank]).sum() / rank / 2
                sides["right"][i, j] += np.square(v[:rank] @ other_v[:rank].T).sum() / rank / 2
    np.testing.assert_allclose(found.left_overlap, sides["left"], atol=1e-4)
    np.testing.assert_allclose(found.right_overlap, sides["right"], atol=1e-4)
    assert found.left_chance == pytest.approx((4 / 24 + 2 / 8) / 2)
    assert found.right_chance == pytest.approx((4 / 16 + 2 / 36) / 2)
    assert found.directions == 3


@pytest.mark.parametrize("filter", [HighPass(0.2), NyquistDisc()], ids=repr)
def test_low_frequencies_are_what_the_filter_removes(base, models, filter):
    found = advise(base, models, filter=filter).relations
    for index, model in enumerate(models.values()):
        energy = removed = 0.0
        for name in ("layer.weight", "conv.weight"):
            matrix = task_vector(base, model)[name].double().flatten(1)
            height, width = matrix.shape
            rows = torch.arange(height, dtype=torch.float64)[:, None]
            gains = filter.gain(rows, torch.arange(width, dtype=torch.float64)[None, :], height, width)
            kept = torch.fft.ifft2(torch.fft.fft2(matrix) * gains).real
            energy += float(matrix.square().sum())
            removed += float(matrix.square().sum() - kept.square().sum())
        assert found.low_frequency[index] == pytest.approx(removed / energy, abs=1e-5)


def test_noise_has_the_energy_expected_by_chance(base):
    base = {"layer.weight": torch.zeros(256, 128)}
    found = advise(base, {"noise": {"layer.weight": normal(256, 128, seed=5)}}, filter=HighPass(0.3)).relations
    assert found.low_frequency[0] == pytest.approx(found.low_frequency_chance, abs=0.01)
    assert found.low_frequency_chance == pytest.approx(torch.pi * 0.3**2, abs=0.01)  # the disc of the removed bins


def test_numbers_do_not_depend_on_threads(base, models):
    with one_thread():
        alone = advise(base, models)
    assert advise(base, models) == alone


def test_unchanged_matrices_are_ignored():
    base = {f"{layer}.weight": normal(16, 12, seed=layer) for layer in range(30)}
    direction = torch.outer(normal(16, seed=50), normal(12, seed=51))
    models = {label: dict(base) for label in "ab"}
    for layer in (3, 17):
        for model in models.values():
            model[f"{layer}.weight"] = base[f"{layer}.weight"] + direction
    models["a"]["9.weight"] = base["9.weight"] + direction
    found = advise(base, models).relations
    assert found.matrices == ("3.weight", "9.weight", "17.weight")
    assert found.left_overlap[0][1] == pytest.approx(1, abs=1e-5)


def test_no_matrix_is_sampled_twice():
    base = {f"{layer}.weight": normal(6, 5, seed=layer) for layer in range(14)}
    found = advise(base, {"a": {name: value + 1 for name, value in base.items()}}).relations
    assert 10 <= len(set(found.matrices)) == len(found.matrices) <= 12


def test_stacked_experts_are_represented_by_the_first(base):
    base = {"mlp.experts.down_proj": normal(3, 12, 8, seed=0)}
    change = torch.zeros(3, 12, 8)
    change[0] = torch.outer(normal(12, seed=1), normal(8, seed=2))
    tuned = {"mlp.experts.down_proj": base["mlp.experts.down_proj"] + change}
    found = advise(base, {"a": tuned, "b": tuned}).relations
    assert found.left_overlap[0][1] == pytest.approx(1, abs=1e-5)  # of rank 1: directions of rounding error are ignored


def test_incompatible_models_raise_the_error_of_a_merge(base, models):
    del models["b"]["layer.bias"]
    with pytest.raises(MergeError, match=r"b: .*layer\.bias"):
        advise(base, models)
