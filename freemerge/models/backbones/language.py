"""`LanguageBackbone`: sequence-to-sequence and causal language models, which have their own head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from freemerge.inputs import Inputs, named
from freemerge.models.backbones.hugging_face import Dtype, HuggingFaceBackbone, load_model


class LanguageBackbone(HuggingFaceBackbone):
    """A language model of the transformers library; its features are the logits (B, L, V) of its own head.

    The logits of an encoder-decoder model (T5, BART, …) are those of the target tokens, which the inputs contain as
    `labels`. A causal model (GPT-2, Llama, …) has the logits of the next token at each input token.

    Args:
        pretrained: hub id or local folder to load the configuration and weights from.
        config: configuration of a randomly initialised model, with its `model_type`. Give either this or `pretrained`.
        dtype: dtype of the weights in fine-tuning and merging, whatever dtype they are stored in.
        auto_class: class of transformers that builds the model; None is AutoModelForSeq2SeqLM or AutoModelForCausalLM,
            depending on the configuration. Models with image inputs need AutoModelForImageTextToText.

    Raises:
        ValueError: if not exactly one of `pretrained` and `config` is given, or no model can be loaded or built.
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
        """The kind of task that the model is for: `seq2seq` or `causal_lm`."""
        return "seq2seq" if self.model.config.is_encoder_decoder else "causal_lm"

    @property
    def reads_texts(self) -> bool:
        return False  # as features: it has a head of its own

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits of a batch.

        Args:
            inputs: by name: `input_ids` (B, L), `attention_mask` (B, L), and `labels` (B, L') of an encoder-decoder.

        Returns:
            (B, L, V), or (B, L', V) for an encoder-decoder.
        """
        given = named(inputs)
        labels = given.pop("labels", None)
        if self.kind == "seq2seq":
            given["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        return self.model(**given, use_cache=False).logits

    @torch.no_grad()
    def answer(self, inputs: Inputs, answer_mask: Tensor | None = None, max_new_tokens: int = 128) -> list[list[int]]:
        """Generate answers to a batch of prompts by greedy decoding.

        Args:
            inputs: by name: `input_ids` (B, L), `attention_mask` (B, L), ….
            answer_mask: (B, L) bool, for causal models whose inputs contain the answer: True at the answer's tokens,
                which are removed from the prompt. None if the inputs are prompts only.
            max_new_tokens: maximum number of tokens of an answer.

        Returns:
            The token ids of each answer, up to its end-of-sequence token.
        """
        given = {name: tensor for name, tensor in named(inputs).items() if name != "labels"}
        settings = self.model.generation_config
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        pad = next((token for token in (settings.pad_token_id, *ends) if token is not None), 0)
        first = 1  # after the decoder's start token
        if self.kind == "causal_lm":
            given |= _prompts(given["input_ids"], given.get("attention_mask"), answer_mask, pad)
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
        """The constructor arguments that a folder stores; see `Backbone.recipe`."""
        return {"dtype": self.dtype, "auto_class": self.auto_class}


def _prompts(ids: Tensor, mask: Tensor | None, answer_mask: Tensor | None, pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, P) of the prompts of a batch, padded on the left as generation requires."""
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if answer_mask is not None:
        kept &= ~answer_mask
    rows = [row[keep] for row, keep in zip(ids, kept, strict=True)]
    width = max(1, *(len(row) for row in rows))
    padded = torch.stack([F.pad(row, (width - len(row), 0), value=pad) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    shown = torch.arange(width, device=ids.device) >= width - lengths[:, None]
    return {"input_ids": padded, "attention_mask": shown.long()}
