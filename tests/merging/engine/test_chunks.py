"""Chunks, samples and read-ahead: equal results in bounded memory, with the promised number of passes."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.checkpoints.memory import flat_range
from freemerge.merging import (
    Breadcrumbs,
    Dare,
    FRMerging,
    HighPass,
    PCBMerging,
    TaskArithmetic,
    Ties,
    Vectors,
    WeightAverage,
    merge,
)
from freemerge.tensors.chunks import Chunk, chunks, read_ahead


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Chunks of seven values, batches of fifty: small models become long streams."""
    monkeypatch.setattr("freemerge.tensors.chunks.CHUNK", 21)
    monkeypatch.setattr("freemerge.tensors.chunks._SHORTEST", 1)
    for name in ("_BATCH", "_PARTITIONED", "_PARTITIONED_DESPITE_SAMPLE"):
        monkeypatch.setattr(f"freemerge.tensors.order_statistics.{name}", 50)


def test_chunks_change_no_result(base, models, method, request):
    base["transposed"] = torch.randn(5, 7).T
    base["none"] = torch.zeros(0, 3)
    for model in models:
        model["transposed"] = base["transposed"] + torch.randn(7, 5)
        model["none"] = torch.zeros(0, 3)
    whole = merge(base, models, method)
    request.getfixturevalue("tiny_chunks")
    cut = merge(base, models, method)
    for name in base:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-6, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=4),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
def test_chunks_of_tensors_with_any_strides(shape, order, data):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape).permute(axes)
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    assert torch.equal(flat_range(tensor, start, stop), tensor.flatten()[start:stop])


def test_chunks_cover_every_value_once():
    shapes = {"a": torch.Size([3, 5]), "b": torch.Size([]), "c": torch.Size([0, 2]), "d": torch.Size([40])}
    found = list(chunks(shapes, models=3, size=30))
    assert [(chunk.name, chunk.start, chunk.stop) for chunk in found] == [
        ("a", 0, 10), ("a", 10, 15), ("b", 0, 1), ("d", 0, 10), ("d", 10, 20), ("d", 20, 30), ("d", 30, 40)
    ]  # fmt: skip


class Counted(Vectors):
    """Task vectors in memory that count how many values are read."""

    def __init__(self, tensors):
        self.seen = 0
        lock = threading.Lock()

        def read(name):
            with lock:
                self.seen += tensors[name][0].numel()
            return tensors[name].clone()

        def read_chunk(chunk):
            with lock:
                self.seen += chunk.stop - chunk.start
            return tensors[chunk.name].flatten(1)[:, chunk.start : chunk.stop].clone()

        super().__init__("abc", {name: tensor.shape[1:] for name, tensor in tensors.items()}, read, read_chunk)


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (TaskArithmetic(), 0),
        (Ties(scope="tensor"), 1),
        (Breadcrumbs(), 1),
        (FRMerging(), 0),
        (FRMerging(coefficients="mean"), 1),
        (Ties(), 1),
        (PCBMerging(), 2),
        (PCBMerging(inter="normalized"), 2),
        (PCBMerging(filter=HighPass(0.1)), 4),
        (Dare(PCBMerging(), drop=0.5), 2),
        (Dare(FRMerging()), 0),
    ],
    ids=repr,
)
def test_statistics_take_the_promised_number_of_passes(method, passes, monkeypatch):
    monkeypatch.setattr("freemerge.tensors.brackets._COLLECTED", 1 << 18)  # as if the model were larger
    generator = torch.Generator().manual_seed(0)
    # Tensors of different sizes and scales, as in a real model, and more values than fit in a batch.
    sizes = {"embed": (3, 3000, 400), "wide": (3, 300, 500), "norm": (3, 400), "narrow": (3, 40, 40)}
    tensors = {name: torch.randn(size, generator=generator) / (1 + len(name)) ** 3 for name, size in sizes.items()}
    vectors = Counted(tensors)
    method.collect_statistics(vectors)
    assert passes * vectors.numel <= vectors.seen <= passes * vectors.numel * 1.1


def test_samples_are_spread_over_the_model_and_repeat():
    tensors = {"a": torch.full((2, 1000, 1000), 1.0), "b": torch.full((2, 3000, 1000), 2.0), "c": torch.ones(2, 3) * 3}
    sample = Counted(tensors).sample()
    assert len(sample) == 2
    assert 100_000 < sample.shape[1] < 150_000
    assert float((sample == 1).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(sample, Counted(tensors).sample())
    small = Counted({"c": tensors["c"]}).sample()
    assert torch.equal(small, tensors["c"])


def test_vectors_without_chunks_are_cut_from_whole_tensors():
    tensors = {"a": torch.randn(2, 3, 4), "b": torch.randn(2)}
    vectors = Vectors("ab", {name: t.shape[1:] for name, t in tensors.items()}, tensors.__getitem__)
    assert [chunk.shape for chunk in vectors.chunks()] == [(2, 12), (2, 1)]
    assert vectors.sample().shape == (2, 0)
    assert torch.equal(vectors.read_chunk(Chunk("a", 3, 7)), tensors["a"].flatten(1)[:, 3:7])
    assert len(vectors) == 2
    assert torch.equal(vectors.read("a"), tensors["a"])


def test_reading_ahead_keeps_order_and_bounds():
    alive, most = 0, 0

    def read(job):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return job

    found = []
    for job in read_ahead(read, range(20), depth=2):
        found.append(job)
        alive -= 1
    assert found == list(range(20))
    assert most <= 4


def test_errors_of_the_reading_thread_arrive_and_it_ends():
    before = threading.active_count()

    def read(job):
        if job == 3:
            raise ValueError("job 3 is broken")
        return job

    found = []
    with pytest.raises(ValueError, match="job 3 is broken"):
        found.extend(read_ahead(read, range(10)))
    abandoned = read_ahead(read, range(3))
    assert next(abandoned) == 0
    abandoned.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A tensor of 32 MiB in bfloat16, base and three models: 256 MiB in float32; the merge needs less."""
    weight = torch.empty(2048, 8192, dtype=torch.bfloat16)
    for name in "abcd":
        save_checkpoint(tmp_path / f"{name}.safetensors", {"w": weight.normal_()})
    code = """
import re, sys
from freemerge.merging import PCBMerging, merge
# Not ru_maxrss: that one is inherited from the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
paths = [f"{sys.argv[1]}/{name}.safetensors" for name in "abcd"]
before = peak()
merge(paths[0], paths[1:], PCBMerging(), output=f"{sys.argv[1]}/o.safetensors")
print((peak() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert 1 < float(done.stdout) < 160


def test_files_are_read_chunk_by_chunk(tmp_path, tiny_chunks, base, models):
    paths = []
    for index, state in enumerate((base, *models)):
        paths.append(tmp_path / f"{index}.safetensors")
        save_checkpoint(paths[-1], state)
    output = merge(paths[0], paths[1:], WeightAverage(), output=tmp_path / "o.safetensors")
    expected = merge(base, models, WeightAverage())
    merged = load_checkpoint(output)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
