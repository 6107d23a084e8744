"""LanguageBackbone: sequence-to-sequence and causal language models, whose head is their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from freemerge.inputs import Inputs, named
from freemerge.models.backbones.hugging_face import Dtype, HuggingFaceBackbone, load_model


class LanguageBackbone(HuggingFaceBackbone):
    """A language model of the transformers library; its "features" are the logits (B, L, V) of its own head.

    With an encoder and a decoder (T5, BART, …) the logits are of the target tokens, which the inputs carry as `labels`;
    of a causal model (GPT-2, Llama, …) they are of the input tokens, each predicting the next.

    Args:
        pretrained: hub id or local folder to load configuration and weights from.
        config: configuration to build a randomly initialised model from, `model_type` included. Give either this or
            `pretrained`.
        dtype: of the weights while they are fine-tuned and merged, whatever they are stored in.
        auto_class: class of transformers that builds the model; None is AutoModelForSeq2SeqLM or AutoModelForCausalLM
            as the configuration asks. Models that see images too want AutoModelForImageTextToText.

    Raises:
        ValueError: if not exactly one of `pretrained` and `config` is given, or it does not lead to a model.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        dtype: Dtype = "float32",
        auto_class: str | None = None,
    ) -> None:
        import transformers

        def choose(model_config: Any) -> Any:
            name = auto_class or f"AutoModelFor{'Seq2Seq' if model_config.is_encoder_decoder else 'Causal'}LM"
            if not hasattr(transformers, name):
                raise ValueError(f"{type(self).__name__}: transformers has no class {name!r}")
            return getattr(transformers, name)

        model = load_model(type(self).__name__, choose, pretrained, config, dtype)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        super().__init__(model, feature_dim=vocabulary, pretrained=pretrained is not None)
        self.dtype = dtype
        self.auto_class = auto_class

    @property
    def kind(self) -> str:
        """What kind of task the model is for: `seq2seq` or `causal_lm`."""
        return "seq2seq" if self.model.config.is_encoder_decoder else "causal_lm"

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (B, L, V) of a batch of inputs by name."""
        given = named(inputs)
        labels = given.pop("labels", None)
        if self.kind == "seq2seq":
            given["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        return self.model(**given, use_cache=False).logits

    @torch.no_grad()
    def answer(self, inputs: Inputs, asked: Tensor | None = None, max_new_tokens: int = 128) -> list[list[int]]:
        """Answers to a batch of prompts, by greedy decoding.

        Args:
            inputs: by name: `input_ids` (B, L), `attention_mask` (B, L), ….
            asked: (B, L) bool, for a causal model: the tokens of the inputs that are no part of the prompt, but its
                answer; they are not shown to the model. None where the inputs are prompts.
            max_new_tokens: an answer has no more tokens than this.

        Returns:
            The tokens of each answer, up to its end.
        """
        given = {name: tensor for name, tensor in named(inputs).items() if name != "labels"}
        settings = self.model.generation_config
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        pad = next((token for token in (settings.pad_token_id, *ends) if token is not None), 0)
        first = 1  # the decoder's start
        if self.kind == "causal_lm":
            given |= _prompts(given["input_ids"], given.get("attention_mask"), asked, pad)
            first = given["input_ids"].shape[1]
        tokens = self.model.generate(
            **given, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad
        )
        answers = []
        for row in tokens[:, first:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            answers.append(row[:end])
        return answers

    def recipe(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "auto_class": self.auto_class}


def _prompts(ids: Tensor, mask: Tensor | None, asked: Tensor | None, pad: int) -> dict[str, Tensor]:
    """The prompts of a batch, padded on the left, as generation needs them: `input_ids` and `attention_mask` (B, P)."""
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if asked is not None:
        kept &= ~asked
    rows = [row[keep] for row, keep in zip(ids, kept, strict=True)]
    width = max(1, *(len(row) for row in rows))
    padded = torch.stack([F.pad(row, (width - len(row), 0), value=pad) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    shown = torch.arange(width, device=ids.device) >= width - lengths[:, None]
    return {"input_ids": padded, "attention_mask": shown.long()}
