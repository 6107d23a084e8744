"""Tensors that are split, joined and transposed between two namings, read whole and in chunks."""

import pytest
import torch

from freemerge.checkpoints import open_checkpoint
from freemerge.checkpoints.naming.blocks import Block
from freemerge.checkpoints.naming.tables import Table

EXPERTS, WIDE, NARROW = 3, 4, 5


def make_table():
    """Files: matrices up.E and gate.E per expert, and down transposed. Modules: one tensor of both, and down."""
    blocks, sources = [], {}
    for expert in range(EXPERTS):
        for part, name in enumerate(("gate", "up")):
            place = (2 * expert + part) * WIDE * NARROW
            blocks.append(Block.make(f"{name}.{expert}", (WIDE, NARROW), 0, (NARROW, 1), place, (NARROW, 1)))
            sources[f"{name}.{expert}"] = (WIDE, NARROW)
    transposed = Block.make("down", (NARROW, WIDE), 0, (1, NARROW), 0, (WIDE, 1))
    return Table(
        {"norm": "layer.norm"},
        {"experts": tuple(blocks), "layer.down": (transposed,)},
        sources | {"down": (WIDE, NARROW)},
        {"experts": (EXPERTS, 2 * WIDE, NARROW), "layer.down": (NARROW, WIDE)},
    )


def make_tensors():
    torch.manual_seed(0)
    files = {f"{name}.{expert}": torch.randn(WIDE, NARROW) for expert in range(EXPERTS) for name in ("gate", "up")}
    files |= {"down": torch.randn(WIDE, NARROW), "norm": torch.randn(7)}
    stacked = [torch.cat([files[f"gate.{expert}"], files[f"up.{expert}"]]) for expert in range(EXPERTS)]
    modules = {"experts": torch.stack(stacked), "layer.down": files["down"].T, "layer.norm": files["norm"]}
    return files, modules


@pytest.mark.parametrize("back", [False, True])
def test_every_tensor_and_every_chunk(back):
    files, modules = make_tensors()
    table = make_table().inverse if back else make_table()
    given, expected = (modules, files) if back else (files, modules)
    found = table.translate(open_checkpoint(given))
    assert set(found.names) == expected.keys()
    for name, value in expected.items():
        assert found.spec(name).shape == value.shape
        assert torch.equal(found.tensor(name), value)
        flat = value.reshape(-1)
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                assert torch.equal(found.read_range(name, start, stop), flat[start:stop])


def test_what_an_adapter_does_not_change_is_zero():
    files, _ = make_tensors()
    names = {"up.1": "up.1"}
    found = make_table().translate(open_checkpoint({"up.1": files["up.1"]}).as_deltas(names, names))
    assert found.names == ("experts",)
    assert found.deltas == {"experts"}
    expected = torch.zeros(EXPERTS, 2 * WIDE, NARROW)
    expected[1, WIDE:] = files["up.1"]
    assert torch.equal(found.tensor("experts"), expected)
    assert torch.equal(found.read_range("experts", 0, 9), torch.zeros(9))


def test_incomplete_groups_of_weights_keep_their_names():
    files, _ = make_tensors()
    del files["up.1"]
    found = make_table().translate(open_checkpoint(files))
    assert set(found.names) == (files.keys() - {"norm", "down"}) | {"layer.norm", "layer.down"}


def test_only_the_needed_chunk_of_a_large_tensor_is_read():
    """For a chunk within one expert, only that expert's rows are read."""
    files, _ = make_tensors()
    opened, asked = open_checkpoint(files), []
    read = opened._read
    opened._read = lambda name, run: asked.append((name, run)) or read(name, run)
    make_table().translate(opened).read_range("experts", 2 * WIDE * NARROW + 1, 2 * WIDE * NARROW + 4)
    assert asked == [("gate.1", (1, 4))]
