"""Small models to merge, and methods with parameters of every kind."""

from __future__ import annotations

import torch

from freemerge.merging import (
    SCE,
    SVC,
    ACEMerging,
    BalancedMerging,
    Breadcrumbs,
    Butterworth,
    Consensus,
    CoreSpace,
    Dare,
    Della,
    EMRMerging,
    FRMerging,
    Gaussian,
    HighPass,
    IsoC,
    IsoCTS,
    KarcherMean,
    KnOTS,
    LocalizeAndStitch,
    ModelStock,
    MultiSlerp,
    PCBMerging,
    PerPattern,
    TaskArithmetic,
    Ties,
    TSVMerge,
    WeightAverage,
    WUDIMerging,
)

METHODS = [
    TaskArithmetic(0.3),
    TaskArithmetic([0.5, 0.2, 0.9]),
    WeightAverage(),
    Ties(),
    Ties(density=0.5, scale=0.7, scope="tensor"),
    FRMerging(),
    FRMerging(coefficients="mean"),
    FRMerging(coefficients="uniform", scale=0.3),
    FRMerging(coefficients=[0.2, 0.3, 0.5], filter=HighPass(0.2)),
    FRMerging(filter=Butterworth(0.1)),
    FRMerging(filter=Gaussian(0.1), coefficients="uniform"),
    PCBMerging(),
    PCBMerging(ratio=0.3, inter="normalized", scale=1.2),
    PCBMerging(ratio=0.3, inter="pairwise", scale=[1.0, 0.5, 2.0], clip=0.01),
    PCBMerging(ratio=1.0, clip=0.0, inter="normalized", filter=HighPass(0.1)),
    Dare(TaskArithmetic(0.3), drop=0.5),
    Dare(drop=0.3, method=Ties(density=0.5), scale=0.5, seed=7),
    Dare(drop=0.3, method=PCBMerging(ratio=0.5, scale=[1.0, 0.5, 2.0])),
    Breadcrumbs(),
    Breadcrumbs(bottom=0.2, top=0.1, scale=[0.5, 0.2, 0.9]),
    Breadcrumbs(bottom=0.5, top=0.1, scope="model"),
    Breadcrumbs(bottom=0.2, scale=[0.5, 0.2, 0.9], elect=True),
    KarcherMean(coefficients=[1.0, 2.0, 0.5]),
    MultiSlerp(0.7),
    ModelStock(),
    SCE(0.5),
    SCE(select=0.3),
    PCBMerging(ratio=0.3, scope="tensor"),
    PCBMerging(ratio=0.3, filter=HighPass(0.1), scope="tensor"),
    TSVMerge(),
    TSVMerge(0.5),
    IsoC(),
    IsoC(1.3),
    IsoC(filter=HighPass(0.1), align=True),
    IsoCTS(),
    ACEMerging(),
    BalancedMerging(),
    BalancedMerging(0.7, filter=HighPass(0.1), align=False, ridge=0.5, steps=2),
    ACEMerging(form="released", filter=HighPass(0.1)),
    WUDIMerging(steps=10),
    WUDIMerging(solver="exact"),
    Consensus(),
    Consensus(Ties(), scale=0.7, threshold=0.2, tasks=1),
    Consensus(FRMerging(coefficients="uniform"), tasks=3),
    Della(seed=3),
    Della(TaskArithmetic([0.5, 0.2, 0.9]), drop=0.5),
    WeightAverage([0.5, 0.2, 0.9]),
    Ties([0.5, 1.0, 0.1], 0.7, "tensor", coefficients=[0.5, 0.2, 0.9]),
    Ties([0.5, 1.0, 0.1], coefficients=[0.5, -0.2, 0.9], mean=False),
    Dare(Ties(1.0, mean=False), drop=[0.5, 0.0, 0.9]),
    Della(drop=[0.5, 0.0, 0.8], epsilon=[0.2, 0.0, 0.3]),
    Breadcrumbs(bottom=[0.2, 0.0, 0.5], top=[0.1, 0.3, 0.0], scale=[0.5, 0.2, 0.9], elect="sum"),
    SVC(TaskArithmetic(1.0)),
    SVC(TSVMerge(), form="released", alpha=0.5),
    KnOTS(),
    CoreSpace(),
    CoreSpace(PCBMerging(ratio=0.5, scale=[1.0, 0.5, 2.0])),
    LocalizeAndStitch(0.3),
    LocalizeAndStitch(0.1, 0.7, scope="tensor"),
    EMRMerging(0.4),
    PerPattern(PCBMerging(0.5), {"embed.*": FRMerging(), "re:.*bias": WeightAverage()}, scale=0.5),
]


def make_base(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(20, 6, generator=generator),
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "norm.bias": torch.randn(6, generator=generator),
        "temperature": torch.randn((), generator=generator),
        "steps": torch.tensor(3),
        "mask": torch.tensor([True, False]),
    }


def finetune(base: dict[str, torch.Tensor], seed: int, size: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in base.items()
    }
