"""EtinyNet: an ImageNet-pretrained CNN of 0.46 M parameters, the backbone of the vision benchmarks.

Xu et al., AAAI 2022: linear depthwise blocks, the later ones densely connected. Its weights are a safetensors file
whose names are those of this module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freemerge.checkpoints import load_checkpoint
from freemerge.models import Backbone

# per block: (in, out, stride of the first depthwise convolution, dense)
BLOCKS = (
    *[(32, 32, 1, False)] * 4,
    (32, 128, 2, False),
    *[(128, 128, 1, False)] * 3,
    (128, 192, 2, True),
    *[(192, 192, 1, True)] * 2,
    (192, 256, 2, True),
    (256, 256, 1, True),
    (256, 512, 1, True),
)


def _depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class Stem(nn.Module):
    """(B, 3, H, W) → (B, 32, H/4, W/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)

    def forward(self, images: Tensor) -> Tensor:
        return F.max_pool2d(self.norm(F.relu(self.conv(images))), 2)


class Block(nn.Module):
    """Depthwise, pointwise, depthwise; the first depthwise convolution is followed by no activation.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first depthwise convolution.
        dense: whether the second depthwise convolution is added to its input, and the block's input to that too where
            the shapes allow it.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dense: bool) -> None:
        super().__init__()
        self.depthwise1 = _depthwise(inputs, stride)
        self.norm1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.depthwise2 = _depthwise(outputs)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.dense = dense
        self.residual = dense and stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(F.relu(self.pointwise(self.norm1(self.depthwise1(x)))))
        if self.residual:
            y = y + x
        z = self.norm3(F.relu(self.depthwise2(y)))
        return z + y if self.dense else z


class EtinyNet(nn.Module):
    """(B, 3, H, W) → features (B, 512)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.blocks = nn.Sequential(*[Block(*block) for block in BLOCKS])

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images)).mean(dim=(2, 3))


class EtinyNetBackbone(Backbone):
    """EtinyNet on images of any size.

    Args:
        weights: its safetensors file.
        image_size: images are resized to this side, in pixels.
        keep_statistics: normalise by ImageNet's statistics in training too, so that a head which was fitted on the
            base's features stays fitting and a merge has no statistics to estimate again; else by each batch's.
    """

    def __init__(self, weights: str, image_size: int = 96, keep_statistics: bool = True) -> None:
        model = EtinyNet()
        state = model.state_dict()
        # Lightning counts batches in `num_batches_tracked`, which the file does not have and nothing here needs.
        model.load_state_dict({**state, **load_checkpoint(weights)}, strict=True)
        super().__init__(model, feature_dim=512)
        self.image_size = image_size
        self.keep_statistics = keep_statistics

    def train(self, mode: bool = True) -> EtinyNetBackbone:
        super().train(mode)
        if self.keep_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) on the scale 0…255 minus 128 → features (B, 512)."""
        size = (self.image_size, self.image_size)
        images = F.interpolate(inputs, size, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
        return self.model(images.contiguous(memory_format=torch.channels_last))  # a quarter faster on a CPU
