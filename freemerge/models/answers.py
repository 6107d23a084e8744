"""What `FreeModel.generate` takes and returns: prompts in any form, and answers with their tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from freemerge.inputs import named
from freemerge.models.backbones.language import LanguageBackbone

Prompts = str | Sequence[str] | Tensor | Mapping[str, Any] | None
"""A text or several, tokens (B, L), or a model's inputs by name, as a tokenizer returns them; None if the inputs are
keyword arguments."""


@dataclass  # not frozen: Lightning moves predictions to the CPU field by field
class FreeAnswers:
    """The answers of a FreeModel to a batch of prompts.

    Args:
        tokens: (B·R, N) int64, the answers without their prompts, padded on the right; R is `num_return_sequences`.
        lengths: (B·R,) int64, the number of tokens of each answer before its end-of-sequence token.
        task: (B,) int64, the task whose expert answered, as an index into `tasks`.
        router_logits: (B, K); None if the caller named the task.
        tasks: the K task names.
        abstained: (B,) bool, True where no expert was used; see `FreeOutput`. None if the caller named the task.
        texts: the B·R answers as texts, if the prompts were texts.
    """

    tokens: Tensor
    lengths: Tensor
    task: Tensor
    router_logits: Tensor | None
    tasks: tuple[str, ...]
    abstained: Tensor | None = None
    texts: list[str] | None = None

    @property
    def task_names(self) -> list[str]:
        """The name of each prompt's task."""
        return [self.tasks[i] for i in self.task.tolist()]

    def token_lists(self) -> list[list[int]]:
        """The tokens of each answer before its end-of-sequence token."""
        return [row[:end] for row, end in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]


def read_prompts(backbone: Any, prompts: Prompts, arguments: dict[str, Any]) -> tuple[LanguageBackbone, dict[str, Any]]:
    """The inputs of prompts.

    Args:
        backbone: the backbone, which has to be a language model.
        prompts: the prompts.
        arguments: those of `generate`; tensors among them are inputs, and are removed.

    Returns:
        The backbone, and the inputs by name; see `LanguageBackbone.router_inputs`.

    Raises:
        ValueError: if the backbone generates no text, or there are no prompts.
    """
    if not isinstance(backbone, LanguageBackbone):
        raise ValueError(
            f"FreeModel: a {type(backbone).__name__} generates no text, only a LanguageBackbone does; call the model "
            "for its logits"
        )
    given = {name: arguments.pop(name) for name in list(arguments) if isinstance(arguments[name], Tensor)}
    if isinstance(prompts, Mapping):
        given = {**named(prompts), **given}
    elif isinstance(prompts, Tensor):
        given["input_ids"] = prompts
    elif prompts is not None:
        given = {**backbone.encode([prompts] if isinstance(prompts, str) else prompts), **given}
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"{', '.join(given) or 'nothing'}"
        raise ValueError(f"FreeModel: generate needs prompts: texts, or input_ids (B, L) of integers; got {found}")
    return backbone, given
