"""FR-Merging and PCB-Merging as their released implementations compute them, with all tensors in memory.

    python plain_papers.py OUTPUT METHOD BASE MODEL...      METHOD: fr-align, fr-uniform or pcb

Written for this benchmark from the papers and the implementations' behaviour:

- FR: a full complex transform of every task vector's weights, the mask, a full inverse, its real part; the aligned
  (or equal) coefficients, the sum.
- PCB: the task vectors flattened and stacked to (K, D); full sorts for the clamp and for the threshold.

All arithmetic in float32, the result in the base's dtype.
"""

import sys

import torch
from safetensors.torch import load_file, save_file

RADIUS, CLIP, RATIO, UNIFORM_SCALE = 0.7, 1e-4, 0.1, 0.3


def high_pass(vector):
    """Keep the bins of the unshifted spectrum around its middle, up to a distance of 0.7 of the shorter side."""
    if vector.dim() < 2:
        return vector
    matrix = vector.flatten(1)
    height, width = matrix.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = torch.sqrt((rows - height // 2).double() ** 2 + (columns - width // 2).double() ** 2)
    mask = (distance <= RADIUS * min(height, width)).float()
    return torch.fft.ifft2(torch.fft.fft2(matrix) * mask).real.reshape(vector.shape)


def fr(vectors, align):
    """Filter every task vector, then sum."""
    filtered = [{name: high_pass(tensor) for name, tensor in vector.items()} for vector in vectors]
    merged = {}
    for name in vectors[0]:
        if align:
            sizes = torch.stack([vector[name].abs().mean() for vector in filtered])
            before = torch.stack([vector[name].abs().mean() for vector in vectors])
            something = (
                sizes > torch.finfo(torch.float32).eps * before
            )  # ignore rounding errors that remain after the filter
            factors = torch.where(something, torch.where(something, sizes, 0.0).max() / sizes, 0.0)
        else:
            factors = torch.full((len(filtered),), UNIFORM_SCALE)
        merged[name] = sum(factor * vector[name] for factor, vector in zip(factors, filtered, strict=True))
    return merged


def pcb(vectors):
    """Flatten, clamp, score, keep the best tenth, weight."""
    flat = torch.stack([torch.cat([tensor.flatten() for tensor in vector.values()]) for vector in vectors])  # (K, D)
    tasks, total = flat.shape
    magnitudes = flat.abs()
    ordered = magnitudes.sort(dim=1).values
    low, high = ordered[:, int(total * CLIP), None], ordered[:, int(total * (1 - CLIP) - 1), None]
    del ordered
    magnitudes = magnitudes.clamp(low, high)
    normalized = (magnitudes - low) / (high - low)
    clamped = flat.sign() * magnitudes
    del magnitudes
    within = torch.exp(tasks * normalized**2)
    del normalized
    between = torch.tanh(flat * flat.sum(0))
    del flat
    scores = within * between
    del within, between
    ordered = scores.sort(dim=1).values
    threshold, largest = ordered[:, int(total * (1 - RATIO)), None], ordered[:, -1:]
    del ordered
    weights = (scores.clamp(threshold, largest) - threshold) / (largest - threshold)
    del scores
    merged = (clamped * weights).sum(0) / weights.sum(0).clamp(min=1e-12)
    chunks = merged.split([tensor.numel() for tensor in vectors[0].values()])
    return {name: chunk.view_as(vectors[0][name]) for name, chunk in zip(vectors[0], chunks, strict=True)}


output, method, base_path, *paths = sys.argv[1:]
base = load_file(base_path)
models = [load_file(path) for path in paths]
vectors = [{name: model[name].float() - base[name].float() for name in base} for model in models]
del models
merged = pcb(vectors) if method == "pcb" else fr(vectors, align=method == "fr-align")
save_file({name: (base[name].float() + merged[name]).to(base[name].dtype) for name in base}, output)
