"""The DINOv2 model read from an ONNX graph computes the same outputs as the exported model."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from tools.dinov2_from_onnx import weights_from_onnx, write_folder


@pytest.fixture
def model() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=1, image_size=28, initializer_range=0.3
    )
    return Dinov2Model(config).eval()


def exported(weights: dict[str, torch.Tensor]) -> onnx.GraphProto:
    """A graph with the weights as torch.onnx writes them: matrices transposed and named after their nodes."""
    nodes, stored = [], []

    def add(operation: str, module: str, tensor: torch.Tensor) -> None:
        name = f"onnx::{operation}_{len(stored)}"
        stored.append(numpy_helper.from_array(np.ascontiguousarray(tensor.numpy()), name))
        nodes.append(helper.make_node(operation, ["input", name], ["output"], name=f"/backbone/{module}/{operation}"))

    for name, tensor in weights.items():
        module = name.removesuffix(".weight").replace(".", "/")
        if name == "embeddings.position_embeddings":
            add("Concat", "embeddings", tensor[:, :1])
            add("Reshape", "embeddings", tensor[:, 1:])
        elif name.endswith(".weight") and tensor.ndim == 2:
            add("MatMul", module, tensor.T)
        elif name != "embeddings.mask_token":
            stored.append(numpy_helper.from_array(tensor.numpy(), f"backbone.{name}"))
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "model", [value], [value], stored)


def test_the_first_blocks_compute_what_the_exported_model_does(model: Dinov2Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "whole")
    graph = exported(load_file(tmp_path / "whole" / "model.safetensors"))
    write_folder(weights_from_onnx(graph, blocks=2), tmp_path / "cut")
    cut = Dinov2Model.from_pretrained(tmp_path / "cut").eval()
    images = torch.randn(2, 3, 56, 42)
    with torch.no_grad():
        expected = model(images, output_hidden_states=True).hidden_states[2]
        found = cut(images)
    torch.testing.assert_close(
        found.last_hidden_state, torch.nn.functional.layer_norm(expected, (64,), eps=model.config.layer_norm_eps)
    )


def test_a_graph_of_another_model_is_refused_by_the_weight_that_it_lacks(model: Dinov2Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"the graph holds no encoder\.layer\.3\.attention\.attention\.query\.weight \(18 "
    ):
        weights_from_onnx(exported(weights), blocks=4)
    del weights["embeddings.cls_token"]
    with pytest.raises(ValueError, match=r"the graph holds no embeddings\.cls_token \(1 weights are missing\)"):
        weights_from_onnx(exported(weights), blocks=3)
