"""`FreeModel`: the merged backbone, an expert and a head per task, and a router, in one module.

    model(inputs)              routes each sample and returns the routed tasks and their logits
    model(inputs, task="x")    uses the expert and head of task x for the whole batch
    model(inputs, head="x")    routes each sample to an expert, and uses the head of task x for the whole batch
    model.generate(prompts)    routes each prompt of a language model, and answers it with its task's expert

- There is one backbone in memory, and the experts are stored in the compact form of their files. Low-rank experts run
  in one pass if the backbone allows it; other experts change one layer at a time while it computes. The changed weights
  of small models are cached for later passes, up to `cache_bytes`.
- The result for a sample depends on the sample alone, not on the other samples of its batch.
- A forward pass changes nothing in the model. Threads can share a model, and models can share a backbone, and compute
  at the same time. Only a compiled backbone is changed in place, by one thread at a time.
- A sample for which the router's confidence is too low, or which is out-of-distribution, gets no expert.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
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
from freemerge.inputs import Inputs, batch_size, device_of, join_padded, select
from freemerge.models.answers import FreeAnswers, Prompts, read_prompts
from freemerge.models.backbones.base import Backbone
from freemerge.models.backbones.prompts import in_order
from freemerge.models.by_task import TaskModules
from freemerge.models.expert_state import LAYOUT, StateKeys, experts_from_state, experts_to_state, is_expert_key
from freemerge.models.routers import Router
from freemerge.names import check_task_name

_CACHE_BYTES = 64 << 20
_STEPS = 16  # soft routing's weights are multiples of 1/16, so that similar samples share a forward pass


@dataclass  # not frozen: Lightning moves predictions to the CPU field by field
class FreeOutput:
    """The result of a FreeModel for a batch.

    Args:
        task: (B,) int64, the task whose head computed the logits, as an index into `tasks`: the task that each sample
            was routed to, or the task or head that the caller named.
        logits: (B, C) of that task's head, where C is the largest number of classes; −inf beyond a head's own classes.
            (B, L, V) for a language model, which has its own head.
        router_logits: (B, K); None if the caller named the task.
        tasks: the K task names.
        abstained: (B,) bool, True where the router's confidence was too low or the input looked out-of-distribution:
            no expert was used, and `task` is only the most likely one. None if the caller named the task.
    """

    task: Tensor
    logits: Tensor
    router_logits: Tensor | None
    tasks: tuple[str, ...]
    abstained: Tensor | None = None

    @property
    def task_names(self) -> list[str]:
        """The name of each sample's task."""
        return [self.tasks[i] for i in self.task.tolist()]

    @property
    def labels(self) -> Tensor:
        """The most likely class in the label space of each sample's task, (B,) int64; (B, L) for a language model."""
        return self.logits.argmax(dim=-1)


class FreeModel(nn.Module):
    """One merged backbone that serves many tasks (FREE-Merging, arXiv 2411.16815).

    Args:
        backbone: the backbone with the merged weights.
        heads: task name → head, features (B, F) → logits (B, C_k); defines the order of the tasks.
        experts: task name → expert, packed or not; tasks without an expert use the merged backbone.
        router: inputs → task logits (B, K); without a router, each call must name the task.
        class_names: task name → names of its classes, stored for users of the model.
        threshold: minimum probability of the most likely task, in [0, 1]; the router abstains below it, and below
            `router.out_of_distribution.threshold`.
        top_n: number of the most likely tasks whose experts are mixed, weighted by their probabilities rounded to
            sixteenths; 1 uses the most likely task's expert, as the paper does.

    Raises:
        ValueError: if an expert has no head or does not match the backbone, the router has another number of tasks, or
            an argument is out of range.
    """

    _one_pass = True  # whether low-rank experts may run in one pass

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
            raise ValueError(f"FreeModel: the router has {router.num_tasks} tasks, there are {len(self.heads)} heads")
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"FreeModel: threshold must be in [0, 1], got {threshold}")
        if not 1 <= top_n <= len(self.heads):
            raise ValueError(f"FreeModel: top_n must be between 1 and the {len(self.heads)} tasks, got {top_n}")
        self._packed = {
            task: expert if isinstance(expert, PackedExpert) else PackedExpert(expert)
            for task, expert in (experts or {}).items()
        }
        self._cache = WeightCache(_CACHE_BYTES)

    # -- parts --------------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names, in the order of the router's outputs."""
        return tuple(self.heads)

    @property
    def experts(self) -> dict[str, Expert]:
        """Task name → expert, unpacked for each access; the model stores them packed."""
        return {task: packed.unpacked() for task, packed in self._packed.items()}

    @property
    def packed_experts(self) -> dict[str, PackedExpert]:
        """Task name → packed expert."""
        return dict(self._packed)

    @property
    def expert_bytes(self) -> int:
        """Bytes in memory of all experts."""
        return sum(packed.num_bytes for packed in self._packed.values())

    @property
    def cache_bytes(self) -> int:
        """The maximum size in bytes of the cache of changed weights; 64 MiB by default, 0 disables the cache.

        The cache makes passes of small models faster without changing results. Experts whose weights do not fit are
        not cached, and nothing is cached while gradients are computed.

        Raises:
            ValueError: if it is set to a negative number.
        """
        return self._cache.limit

    @cache_bytes.setter
    def cache_bytes(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"FreeModel: cache_bytes must not be negative, got {limit}")
        self._cache = WeightCache(limit)

    @property
    def cached_bytes(self) -> int:
        """Current size in bytes of the cache, including the copies that its entries are validated against."""
        return self._cache.num_bytes

    def num_outputs(self, task: str) -> int:
        """The number of outputs of a task's head.

        Args:
            task: name of the task.

        Raises:
            ValueError: if the task is unknown.
        """
        self._check(task)
        return self._outputs(self.heads[task])

    def task_model(self, task: str) -> TaskModel:
        """Extract one task's model: a copy of the backbone with the expert added permanently, and the head.

        It computes the same as `model(inputs, task=…)` and is a plain module for `torch.compile` and `torch.export`.

        Args:
            task: name of the task.

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
        """Keep other threads from computing with the model for the duration of a block.

        Code that writes to the model's weights while threads compute must run in such a block. The model's own methods
        use it themselves.
        """
        with exclusive(self.backbone.model):
            yield

    def train(self, mode: bool = True) -> FreeModel:
        """Set the mode while no other thread computes; see `nn.Module.train`."""
        with self.undisturbed():
            return super().train(mode)

    def load_state_dict(self, *args, **kwargs):
        """Load a state dict, experts included, while no other thread computes; see `nn.Module.load_state_dict`."""
        with self.undisturbed():
            drop_replicas(self.backbone)
            self._cache.clear()
            return super().load_state_dict(*args, **kwargs)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Where torch's distributed checkpoints look up the state keys of experts, which belong to no module."""
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
                "FreeModel: the state dict has no experts; it is older than they are, or from another model. With "
                "strict=False the model keeps its own experts, which is correct only if they belong to these weights",
                stacklevel=2,
            )

    def _take_experts(self, state: Mapping[str, Tensor], local_metadata: Mapping[str, object]) -> list[str]:
        """Replace the model's experts by those of a state dict.

        Returns:
            The keys that the state dict lacks; if there are any, the model keeps its own experts.

        Raises:
            ValueError: if the experts do not match the model; it keeps its own.
        """
        device = next(self.parameters()).device
        assign = local_metadata.get("assign_to_params_buffers", False)
        experts, lacking = experts_from_state(
            state, (lambda tensor: tensor) if assign else (lambda tensor: tensor.to(device, copy=True))
        )
        if not lacking:
            self._check_experts(experts)
            self._packed = experts
        return lacking

    def _check_experts(self, experts: Mapping[str, Expert | PackedExpert]) -> None:
        """Raise a ValueError if an expert has no head or does not match the backbone."""
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
            self._cache.clear()
            super()._apply(fn, recurse)
            device = next(self.parameters()).device
            for packed in self._packed.values():
                packed.to(device)
        return self

    def __deepcopy__(self, memo: dict) -> FreeModel:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        with exclusive(self.backbone.model).shared():
            copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def _check(self, task: str) -> None:
        """Raise a ValueError if a task is unknown."""
        if task not in self.heads:
            raise ValueError(f"FreeModel: unknown task {task!r}; tasks: {', '.join(self.tasks)}")

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs, task: str | None = None, head: str | None = None) -> FreeOutput:
        """Compute logits, each sample with the expert and head of its own task.

        Args:
            inputs: a batch (B, …), a tensor or a dictionary of tensors; B may be 0.
            task: name of the task to use for every sample instead of the router's choice.
            head: name of the task whose head to use for every sample, while the router chooses the experts: for inputs
                whose label space is known but whose origin is not, and for comparison with papers.

        Returns:
            Routed tasks and logits; see `FreeOutput`.

        Raises:
            ValueError: if a task is unknown, `task` and `head` are both given, neither is given and there is no router,
                or the backbone is sharded.
            OverflowError: if an expert makes a weight larger than float16 can hold.
        """
        if task is not None and head is not None:
            raise ValueError("FreeModel: `task` also selects the head; pass `task` or `head`, not both")
        if head is not None:
            self._check(head)
        size, device = batch_size(inputs), device_of(inputs)
        if task is not None:
            self._check(task)
            index = self.tasks.index(task)
            features = self.features(inputs, task) if size else None
            routed = torch.full((size,), index, dtype=torch.long, device=device)
            return FreeOutput(routed, self._logits(features, routed), None, self.tasks)
        router_logits, abstained, routed, sixteenths = self._choose(inputs)
        features = self._routed_features(inputs, sixteenths) if size else None
        chosen = routed if head is None else torch.full_like(routed, self.tasks.index(head))
        return FreeOutput(chosen, self._logits(features, chosen), router_logits, self.tasks, abstained)

    @torch.no_grad()
    def generate(self, prompts: Prompts = None, *, task: str | None = None, **arguments: Any) -> FreeAnswers:
        """Answer prompts, each with the expert of its own task, which is kept to the answer's end.

        Each prompt is routed once, by the prompt alone. Under greedy decoding in float32 it gets the tokens that
        `task_model(task)` generates for this prompt alone.

        Args:
            prompts: texts, tokens (B, L), or inputs by name, as a tokenizer returns them; these may also be keyword
                arguments: `generate(**tokenizer(texts, …))`. Prompts may be padded on either side.
            task: name of the task to use for every prompt instead of the router's choice.
            **arguments: any arguments of transformers' `generate`, such as `max_new_tokens` and `num_beams`.

        Returns:
            The answers and routed tasks; see `FreeAnswers`.

        Raises:
            ValueError: if the backbone generates no text, the prompts cannot be read, a task is unknown, or neither
                `task` is given nor is there a router.
        """
        if task is not None:
            self._check(task)
        backbone, given = read_prompts(self.backbone, prompts, arguments)
        size, device, pad = batch_size(given), device_of(given), backbone.pad_token
        router_logits = abstained = None
        if task is None:
            router_logits, abstained, routed, sixteenths = self._choose(given)
        else:
            routed = torch.full((size,), self.tasks.index(task), dtype=torch.long, device=device)
            sixteenths = torch.full((size, 1), _STEPS) * (torch.arange(len(self.tasks)) == self.tasks.index(task))
        tokens = torch.zeros(0, 0, dtype=torch.long, device=device)
        if size:
            own = backbone.prompts(given)
            parts = backbone.without_padding(own, arguments)
            call: Callable[..., Tensor] = lambda run, part: run.generate(part, **arguments)  # noqa: E731
            answers = [
                self._routed_features(select(own, part), sixteenths[part.cpu()], call, partial(join_padded, value=pad))
                for part in parts
            ]
            tokens = in_order(answers, parts, pad)
        lengths, texts = backbone.ends_of(tokens, arguments), None
        found = FreeAnswers(tokens, lengths, routed, router_logits, self.tasks, abstained, texts)
        if prompts is not None and not isinstance(prompts, (Tensor, Mapping)):
            decode = backbone.load_tokenizer().decode
            found.texts = [decode(row, skip_special_tokens=True) for row in found.token_lists()]
        return found

    def _choose(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Route a batch.

        Returns:
            Task logits (B, K); (B,) bool, True where the router abstains; (B,) int64, the most likely task; and (B, K)
            int64 on the CPU, the weight of each expert in sixteenths.
        """
        router_logits, abstained = self.route(inputs)
        probabilities = router_logits.float().softmax(dim=1)
        routed = probabilities.argmax(dim=1)
        sixteenths = self._sixteenths(probabilities, routed).masked_fill(abstained[:, None], 0)
        return router_logits, abstained, routed, sixteenths.cpu()

    def _routed_features(self, inputs: Inputs, sixteenths: Tensor, *how: Callable[..., Tensor]) -> Tensor:
        """Features (B, F) of samples with given weights of the experts; samples with equal weights run together.

        Args:
            inputs: B ≥ 1 samples.
            sixteenths: (B, K) int64 on the CPU, the weight of each expert in sixteenths.
            *how: `call` and `join` of `run_groups`, which may compute something else, with any rows per sample.
        """
        rows, group_of = sixteenths.unique(dim=0, return_inverse=True)
        weights = [{self.tasks[k]: count / _STEPS for k, count in enumerate(row) if count} for row in rows.tolist()]
        if len(rows) == 1:
            return self._grouped_features(inputs, [(weights[0], len(group_of))], *how)
        order, device = group_of.argsort(stable=True), device_of(inputs)  # group by group
        sizes = group_of.bincount().tolist()
        grouped = self._grouped_features(select(inputs, order.to(device)), list(zip(weights, sizes, strict=True)), *how)
        return grouped.unflatten(0, (len(order), -1))[order.argsort().to(device)].flatten(0, 1)

    def route(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Run the router.

        Args:
            inputs: a batch (B, …); B may be 0.

        Returns:
            Task logits (B, K), and (B,) bool, True where the router abstains.

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
        """The features of the merged backbone with one task's expert.

        Args:
            inputs: B ≥ 1 samples.
            task: name of the task; without an expert, the merged backbone is used.

        Returns:
            (B, F).
        """
        return self._grouped_features(inputs, [({task: 1.0}, batch_size(inputs))])

    def _sixteenths(self, probabilities: Tensor, routed: Tensor) -> Tensor:
        """The weight of each expert for every sample in sixteenths, (B, K) int64."""
        weights = torch.zeros_like(probabilities, dtype=torch.long)
        if self.top_n == 1:
            return weights.scatter_(1, routed[:, None], _STEPS)
        top, which = probabilities.topk(self.top_n, dim=1)  # (B, n)
        rounded = (top / top.sum(dim=1, keepdim=True) * _STEPS).round().long()
        rounded[:, 0] += _STEPS - rounded.sum(dim=1)  # the weights sum to one
        return weights.scatter_(1, which, rounded)

    def _grouped_features(
        self, inputs: Inputs, groups: Sequence[tuple[Mapping[str, float], int]], *how: Callable[..., Tensor]
    ) -> Tensor:
        """Features (B, F) of the backbone with Σ w · expert added to its weights, for each group of samples.

        Args:
            inputs: B ≥ 1 samples, ordered by group.
            groups: task → w, and the number of samples.
            *how: see `_routed_features`.
        """
        chosen = [(self._expert(weights), count) for weights, count in groups]
        one_pass = self._one_pass and not self.training
        return run_groups(self.backbone, self.backbone.model, inputs, chosen, one_pass, self._cache, *how)

    def _expert(self, weights: Mapping[str, float]) -> Expert | PackedExpert | Mixture | None:
        """Σ w · expert; the packed expert itself if it is the only one with w = 1; None if no task has an expert."""
        packed = {task: self._packed[task] for task in weights if task in self._packed}
        if len(packed) == 1 and all(weights[task] == 1.0 for task in packed):
            return next(iter(packed.values()))
        if not packed:
            return None
        live, factors = self.backbone.weights(), [weights[task] for task in packed]
        experts = [one.unpacked() for one in packed.values()]
        if mixable(experts):
            return mix([by_first_names(expert, live) for expert in experts], factors)
        return Mixture(experts, factors, live)

    def _logits(self, features: Tensor | None, chosen: Tensor) -> Tensor:
        """(B, F) → (B, C), each sample by the head of its task in `chosen` (B,); −inf beyond the head's classes."""
        width = max(self._outputs(head) for head in self.heads.values())
        if features is None:  # an empty batch
            return torch.empty((0, width), device=chosen.device)
        logits: Tensor | None = None
        on_cpu = chosen.cpu()
        for index in on_cpu.unique().tolist():
            group = (on_cpu == index).nonzero().squeeze(1).to(chosen.device)
            outputs = self.heads[self.tasks[index]](features[group])  # (b, C_k)
            if logits is None:
                logits = outputs.new_full((len(features), *outputs.shape[1:-1], width), float("-inf"))
            logits[group, ..., : outputs.shape[-1]] = outputs
        assert logits is not None  # there is at least one sample
        return logits

    @torch.no_grad()
    def _outputs(self, head: nn.Module) -> int:
        """The number of outputs of a head: its `out_features`, or the width of its result for a zero vector."""
        if isinstance(known := getattr(head, "out_features", None), int):
            return known
        if head not in _widths:
            like = next(self.backbone.parameters())
            zeros = torch.zeros(1, self.backbone.feature_dim, dtype=like.dtype, device=like.device)
            _widths[head] = copy.deepcopy(head).eval()(zeros).shape[-1]
        return _widths[head]

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the model to a folder.

        Args:
            directory: the folder, created if it is missing. A FREE model in it is replaced; other files stay.

        Returns:
            The folder.

        Raises:
            ValueError: if a part of the model cannot be saved; nothing is written then.
        """
        from freemerge.models.free_folder import save_free_model

        with exclusive(self.backbone.model).shared():
            return save_free_model(self, directory)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload the model to the Hugging Face Hub, with a model card.

        Args:
            repository: the model's name there, `org/name`; created if it is missing.
            private: whether a new model is private.

        Returns:
            The address of the commit.

        Raises:
            ValueError: if a part of the model cannot be saved.
            CheckpointError: if the upload fails; the message says why.
        """
        from freemerge.models.free_card import push_free_model

        return push_free_model(self, repository, private)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        backbone: Backbone | None = None,
        *,
        heads: Mapping[str, nn.Module] | None = None,
        router: Router | None = None,
        trust_remote_code: bool = False,
    ) -> FreeModel:
        """Load a folder written by `save_pretrained`.

        Args:
            directory: the folder, or the model's name on the Hub (`org/name`, `org/name@revision`).
            backbone: an object for a backbone of a class of your own; it gets the folder's weights.
            heads: task → object for a head of a class of your own; they get the folder's weights.
            router: an object for a router of a class of your own; it gets the folder's weights.
            trust_remote_code: whether classes from outside freemerge that the folder names may be imported, which runs
                their code.

        Returns:
            The model, in evaluation mode.

        Raises:
            CheckpointError: if the folder is not a FREE model, its files do not match each other, or it names a class
                that may not or cannot be imported.
        """
        from freemerge.models.free_folder import load_free_model

        return load_free_model(directory, backbone, heads=heads, router=router, trust_remote_code=trust_remote_code)


_widths: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Head without `out_features` → its number of outputs."""


class TaskModel(nn.Module):
    """The model of one task: inputs → logits (B, C).

    Args:
        backbone: the backbone with the task's weights.
        head: features (B, F) → logits (B, C).
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits of a batch.

        Args:
            inputs: (B, …).

        Returns:
            (B, C).
        """
        return self.head(self.backbone(inputs))

    @torch.no_grad()
    def generate(self, prompts: Prompts = None, **arguments: Any) -> Tensor:
        """Answer prompts; see `FreeModel.generate`.

        Args:
            prompts: the prompts.
            **arguments: any arguments of transformers' `generate`.

        Returns:
            The tokens of the answers, int64 (B·R, N), padded on the right.

        Raises:
            ValueError: if the backbone generates no text, or the prompts cannot be read.
        """
        backbone, given = read_prompts(self.backbone, prompts, arguments)
        return backbone.generate(given, **arguments)
