"""FreeModel: the merged backbone, an expert and a head per task, and the router, in one module.

    FreeModel(inputs)              routes each sample, runs each expert's group, returns routed tasks and logits
    FreeModel(inputs, task="x")    uses task x's expert and head for the whole batch
    FreeModel(inputs, head="x")    routes each sample to an expert, and answers by task x's head

- There is one backbone in memory, and each expert in the bytes of its file. Low-rank experts run side by side in one
  pass, where the backbone allows it; others change one layer at a time, while it computes. Of a small model, changed
  weights are kept for the next pass, up to `cache_bytes`.
- What a sample gets depends on the sample alone, never on its neighbours in the batch.
- Computing changes nothing in the model, so threads may share it, and models may share a backbone, at the same time.
  Only a backbone that is compiled has to be changed itself, by one thread at a time.
- A sample with too low a confidence of the router, or an out-of-distribution one, gets the plain merged backbone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from freemerge.experts import (
    Expert,
    Mixture,
    PackedExpert,
    WeightCache,
    by_first_names,
    check_fits,
    drop_replicas,
    exclusive,
    mix,
    mixable,
    run_groups,
    write_into,
)
from freemerge.inputs import Inputs, batch_size, device_of, select
from freemerge.models.backbones.base import Backbone
from freemerge.models.by_task import TaskModules
from freemerge.models.expert_state import LAYOUT, StateKeys, experts_from_state, experts_to_state, is_expert_key
from freemerge.models.routers import Router
from freemerge.names import check_task_name

_CACHE_BYTES = 64 << 20
_SHARES = 16  # soft routing's weights are multiples of 1/16, so that like samples can share a forward pass


@dataclass  # not frozen: Lightning moves predictions to the CPU field by field
class FreeOutput:
    """What a FreeModel says of a batch.

    Args:
        task: (B,) int64, whose head has answered: an index into `tasks`, of the task each sample was routed to unless
            the caller named a task or head.
        logits: (B, C) of that task's head, where C is the largest number of classes; −inf past a head's own classes.
            (B, L, V) of a language model, which has its own head.
        router_logits: (B, K), or None if the caller named the task.
        tasks: the K task names.
        abstained: (B,) bool, where the router's confidence was too low or the input out-of-distribution: no expert
            was used, and `task` is only the best guess. None if the caller named the task.
    """

    task: Tensor
    logits: Tensor
    router_logits: Tensor | None
    tasks: tuple[str, ...]
    abstained: Tensor | None = None

    @property
    def task_names(self) -> list[str]:
        """The task whose head has answered each sample, by name."""
        return [self.tasks[i] for i in self.task.tolist()]

    @property
    def labels(self) -> Tensor:
        """(B,) int64, the most likely class in that task's own label space; (B, L) tokens of a language model."""
        return self.logits.argmax(dim=-1)


class FreeModel(nn.Module):
    """One merged backbone that serves many tasks (FREE-Merging, arXiv 2411.16815).

    Args:
        backbone: the backbone with the merged weights loaded.
        heads: task name → head, features (B, F) → logits (B, C_k); their order is the order of the tasks.
        experts: task name → expert, packed already or not; tasks without one use the merged backbone as it is.
        router: inputs → task logits (B, K); without one, the task must be named in each call.
        class_names: task name → names of its classes, kept for whoever uses the model.
        threshold: the router abstains where its most likely task is less probable than this, and where an input is less
            familiar than `router.out_of_distribution.threshold`.
        top_n: how many of the most likely tasks' experts are mixed, weighted by their probabilities (rounded to
            sixteenths); 1 takes the most likely one's, as the paper does.

    Raises:
        ValueError: if an expert names no task or does not fit the backbone, or the router has another number of tasks.
    """

    _one_pass = True  # whether low-rank experts run side by side where they can

    def __init__(
        self,
        backbone: Backbone,
        heads: Mapping[str, nn.Module],
        experts: Mapping[str, Expert | PackedExpert] | None = None,
        router: Router | None = None,
        class_names: Mapping[str, Sequence[str]] | None = None,
        threshold: float = 0.0,
        top_n: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        for task in heads:
            check_task_name("FreeModel", task)
        self.heads = TaskModules(heads)
        self.router = router
        self.class_names = {task: list(names) for task, names in (class_names or {}).items()}
        self.threshold = threshold
        self.top_n = top_n
        self._check_experts(experts or {})
        if router is not None and router.num_tasks != len(self.heads):
            raise ValueError(f"FreeModel: the router knows {router.num_tasks} tasks, there are {len(self.heads)} heads")
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"FreeModel: threshold is a probability, in [0, 1], got {threshold}")
        if not 1 <= top_n <= len(self.heads):
            raise ValueError(f"FreeModel: top_n must be between 1 and the {len(self.heads)} tasks, got {top_n}")
        self._packed = {
            task: expert if isinstance(expert, PackedExpert) else PackedExpert(expert)
            for task, expert in (experts or {}).items()
        }
        self._kept = WeightCache(_CACHE_BYTES)

    # -- what it is made of -------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names, in the order of the router's outputs."""
        return tuple(self.heads)

    @property
    def experts(self) -> dict[str, Expert]:
        """Task name → expert, unpacked for the caller; the model keeps them packed."""
        return {task: packed.unpacked() for task, packed in self._packed.items()}

    @property
    def packed_experts(self) -> dict[str, PackedExpert]:
        """Task name → expert as the model keeps it."""
        return dict(self._packed)

    @property
    def expert_bytes(self) -> int:
        """Bytes in memory that all experts take."""
        return sum(packed.num_bytes for packed in self._packed.values())

    @property
    def cache_bytes(self) -> int:
        """How many bytes of changed weights are kept between passes at most; 64 MiB unless set, none if set to 0.

        They make passes of small models faster; what passes give is the same. Nothing is kept of an expert whose
        weights do not fit, nor while gradients are computed.
        """
        return self._kept.limit

    @cache_bytes.setter
    def cache_bytes(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"FreeModel: cache_bytes must not be negative, got {limit}")
        self._kept = WeightCache(limit)

    @property
    def cached_bytes(self) -> int:
        """Bytes of changed weights that are kept now, with the copies that tell whether they still hold."""
        return self._kept.num_bytes

    def num_outputs(self, task: str) -> int:
        """How many outputs a task's head has."""
        self._check(task)
        return self._outputs(self.heads[task])

    def task_model(self, task: str) -> TaskModel:
        """One task's backbone, its expert added for good, with its head: a plain module of its own.

        It computes what `model(inputs, task=…)` does, and holds nothing that `torch.compile` or `torch.export` could
        stumble over.

        Raises:
            ValueError: if the task is unknown.
        """
        self._check(task)
        with exclusive(self.backbone.model).shared():
            backbone = copy.deepcopy(self.backbone)
        if task in self._packed:
            write_into(backbone.weights(), self._packed[task].unpacked())
        return TaskModel(backbone, copy.deepcopy(self.heads[task])).train(self.training)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While a block runs, no other thread computes with the model.

        Whatever writes to the live weights beside threads that compute belongs in such a block. The model's own
        methods do this by themselves.
        """
        with exclusive(self.backbone.model):
            yield

    def train(self, mode: bool = True) -> FreeModel:
        with self.undisturbed():
            return super().train(mode)

    def load_state_dict(self, *args, **kwargs):
        with self.undisturbed():
            drop_replicas(self.backbone)
            self._kept.clear()
            return super().load_state_dict(*args, **kwargs)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Where torch's distributed checkpoints look up the keys of a state that belong to no module."""
        return {"experts": "_state_keys", "experts_shared": "_state_keys"}

    @property
    def _state_keys(self) -> StateKeys:
        return StateKeys(experts_to_state(self._packed))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + key: tensor for key, tensor in experts_to_state(self._packed).items()})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        own = {key[len(prefix) :]: key for key in state_dict if key.startswith(prefix)}
        state = {key: state_dict[whole] for key, whole in own.items() if is_expert_key(key)}
        rest = {key: value for key, value in state_dict.items() if key[len(prefix) :] not in state}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        if LAYOUT in state:
            try:
                missing += [prefix + key for key in self._take_experts(state, local_metadata)]
            except ValueError as error:
                errors.append(str(error))
        elif self._packed:
            missing += [prefix + key for key in experts_to_state(self._packed)]
            unexpected += [own[key] for key in state]
            warnings.warn(
                "FreeModel: the state has no experts: it was saved before they were part of it, or of another model. "
                "With strict=False the model keeps its own, which is right only if they were made for these weights",
                stacklevel=2,
            )

    def _take_experts(self, state: Mapping[str, Tensor], local_metadata: Mapping[str, object]) -> list[str]:
        """Have the experts of a state instead of its own; returns the keys that it lacks, if any, and has its own then.

        Raises:
            ValueError: if they do not fit; the model keeps its own.
        """
        device = next(self.parameters()).device
        as_they_are = local_metadata.get("assign_to_params_buffers", False)
        experts, lacking = experts_from_state(
            state, (lambda tensor: tensor) if as_they_are else (lambda tensor: tensor.to(device, copy=True))
        )
        if not lacking:
            self._check_experts(experts)
            self._packed = experts
        return lacking

    def _check_experts(self, experts: Mapping[str, Expert | PackedExpert]) -> None:
        """Raise a ValueError if an expert names no task or does not fit the backbone."""
        weights = self.backbone.weights()
        for task, expert in experts.items():
            if task not in self.heads:
                raise ValueError(
                    f"FreeModel: there is an expert for {task!r} but no head; tasks: {', '.join(self.tasks)}"
                )
            check_fits(expert, weights)

    def _apply(self, fn, recurse: bool = True):
        with self.undisturbed():
            drop_replicas(self.backbone)
            self._kept.clear()
            super()._apply(fn, recurse)
            device = next(self.parameters()).device
            for packed in self._packed.values():
                packed.to(device)
        return self

    def __deepcopy__(self, memo: dict) -> FreeModel:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        with exclusive(self.backbone.model).shared():
            twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def _check(self, task: str) -> None:
        if task not in self.heads:
            raise ValueError(f"FreeModel: unknown task {task!r}; tasks: {', '.join(self.tasks)}")

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs, task: str | None = None, head: str | None = None) -> FreeOutput:
        """Logits of a batch, each sample by its own task's expert and head.

        Args:
            inputs: a batch (B, …), a tensor or a dict of tensors; B may be 0.
            task: use this task for every sample instead of the router.
            head: the router chooses each sample's expert, and this task's head answers: for who knows what to ask of
                an input but not where it comes from, and as papers measure routed models.

        Raises:
            ValueError: if a task is unknown, both are named, or no task is and there is no router; if the backbone is
                sharded.
            OverflowError: if an expert makes a weight larger than float16 can hold.
        """
        if task is not None and head is not None:
            raise ValueError("FreeModel: task names the head as well; give task or head, not both")
        if head is not None:
            self._check(head)
        size, device = batch_size(inputs), device_of(inputs)
        if task is not None:
            self._check(task)
            index = self.tasks.index(task)
            features = self.features(inputs, task) if size else None
            routed = torch.full((size,), index, dtype=torch.long, device=device)
            return FreeOutput(routed, self._logits(features, routed), None, self.tasks)
        router_logits, abstained = self.route(inputs)
        probabilities = router_logits.float().softmax(dim=1)
        routed = probabilities.argmax(dim=1)
        shares = self._shares(probabilities, routed).masked_fill(abstained[:, None], 0)  # (B, K)
        features = self._mixed(inputs, shares.cpu()) if size else None
        answering = routed if head is None else torch.full_like(routed, self.tasks.index(head))
        return FreeOutput(answering, self._logits(features, answering), router_logits, self.tasks, abstained)

    def _mixed(self, inputs: Inputs, shares: Tensor) -> Tensor:
        """Features (B, F), samples that share their experts together.

        Args:
            inputs: B ≥ 1 samples.
            shares: (B, K) int64 on the CPU, sixteenths of each expert.
        """
        groups, of = shares.unique(dim=0, return_inverse=True)
        weights = [
            {self.tasks[k]: share / _SHARES for k, share in enumerate(group) if share} for group in groups.tolist()
        ]
        if len(groups) == 1:
            return self._grouped(inputs, [(weights[0], len(of))])
        order, device = of.argsort(stable=True), device_of(inputs)  # the groups side by side
        grouped = self._grouped(
            select(inputs, order.to(device)), list(zip(weights, of.bincount().tolist(), strict=True))
        )
        return grouped[order.argsort().to(device)]

    def route(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What the router says: task logits (B, K), and where it abstains, (B,) bool.

        Raises:
            ValueError: if there is no router.
        """
        if self.router is None:
            raise ValueError("FreeModel: there is no router; name the task: model(inputs, task=…)")
        if batch_size(inputs) == 0:
            device = device_of(inputs)
            return torch.zeros(0, len(self.tasks), device=device), torch.zeros(0, dtype=torch.bool, device=device)
        logits, scores = self.router.judge(inputs, self.backbone)
        return logits, self.router.abstains(logits, scores, self.threshold)

    def features(self, inputs: Inputs, task: str) -> Tensor:
        """Features (B, F) of the merged backbone with `task`'s expert; the weights are afterwards what they were."""
        return self._grouped(inputs, [({task: 1.0}, batch_size(inputs))])

    def _shares(self, probabilities: Tensor, routed: Tensor) -> Tensor:
        """How many sixteenths of each expert every sample gets: (B, K) int64."""
        shares = torch.zeros_like(probabilities, dtype=torch.long)
        if self.top_n == 1:
            return shares.scatter_(1, routed[:, None], _SHARES)
        top, which = probabilities.topk(self.top_n, dim=1)  # (B, n)
        rounded = (top / top.sum(dim=1, keepdim=True) * _SHARES).round().long()
        rounded[:, 0] += _SHARES - rounded.sum(dim=1)  # they add up to one
        return shares.scatter_(1, which, rounded)

    def _grouped(self, inputs: Inputs, groups: Sequence[tuple[Mapping[str, float], int]]) -> Tensor:
        """Features (B, F) of the backbone with Σ w · expert added to its weights, for each group of samples.

        Args:
            inputs: B ≥ 1 samples, group by group.
            groups: task → w, and the number of samples.
        """
        chosen = [(self._expert(weights), count) for weights, count in groups]
        one_pass = self._one_pass and not self.training
        return run_groups(self.backbone, self.backbone.model, inputs, chosen, one_pass, self._kept)

    def _expert(self, weights: Mapping[str, float]) -> Expert | PackedExpert | Mixture | None:
        """Σ w · expert, or the expert itself, packed, if it is one alone; None if there is none."""
        packed = {task: self._packed[task] for task in weights if task in self._packed}
        if len(packed) == 1 and all(weights[task] == 1.0 for task in packed):
            return next(iter(packed.values()))
        if not packed:
            return None
        live, shares = self.backbone.weights(), [weights[task] for task in packed]
        experts = [one.unpacked() for one in packed.values()]
        if mixable(experts):
            return mix([by_first_names(expert, live) for expert in experts], shares)
        return Mixture(experts, shares, live)

    def _logits(self, features: Tensor | None, answering: Tensor) -> Tensor:
        """(B, F) → (B, C), each sample by the head of the task `answering` names; −inf past its own classes."""
        width = max(self._outputs(head) for head in self.heads.values())
        if features is None:  # an empty batch
            return torch.empty((0, width), device=answering.device)
        logits: Tensor | None = None
        on_cpu = answering.cpu()
        for index in on_cpu.unique().tolist():
            group = (on_cpu == index).nonzero().squeeze(1).to(answering.device)
            outputs = self.heads[self.tasks[index]](features[group])  # (b, C_k)
            if logits is None:
                logits = outputs.new_full((len(features), *outputs.shape[1:-1], width), float("-inf"))
            logits[group, ..., : outputs.shape[-1]] = outputs
        assert logits is not None  # there is a sample, so some head has answered
        return logits

    @torch.no_grad()
    def _outputs(self, head: nn.Module) -> int:
        """How many outputs a head has; one that does not say it is asked once."""
        if isinstance(known := getattr(head, "out_features", None), int):
            return known
        if head not in _widths:
            like = next(self.backbone.parameters())
            twin = copy.deepcopy(head).eval()
            _widths[head] = twin(torch.zeros(1, self.backbone.feature_dim, dtype=like.dtype, device=like.device)).shape[
                -1
            ]
        return _widths[head]

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory):
        """Write the model to a folder; see `freemerge.models.free_folder`."""
        from freemerge.models.free_folder import save_free_model

        with exclusive(self.backbone.model).shared():
            return save_free_model(self, directory)

    @classmethod
    def from_pretrained(
        cls,
        directory,
        backbone: Backbone | None = None,
        *,
        heads: Mapping[str, nn.Module] | None = None,
        router: Router | None = None,
        trust_remote_code: bool = False,
    ) -> FreeModel:
        """Load a folder written by `save_pretrained`; see `freemerge.models.free_folder`."""
        from freemerge.models.free_folder import load_free_model

        return load_free_model(directory, backbone, heads=heads, router=router, trust_remote_code=trust_remote_code)


_widths: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Head that does not say how many outputs it has → how many these are."""


class TaskModel(nn.Module):
    """One task's model: inputs → logits (B, C).

    Args:
        backbone: with the task's weights.
        head: features (B, F) → logits (B, C).
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (B, C) of a batch."""
        return self.head(self.backbone(inputs))
