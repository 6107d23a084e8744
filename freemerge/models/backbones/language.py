"""`LanguageBackbone`: sequence-to-sequence and causal language models, which have their own head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from freemerge.checkpoints import expand_name
from freemerge.inputs import IGNORED, Inputs, named, select, to_device
from freemerge.models.backbones.hugging_face import Dtype, HuggingFaceBackbone, load_model
from freemerge.models.backbones.prompts import in_order, padded, reads_padding
from freemerge.models.backbones.tokenizers import find_tokenizer, load_tokenizer


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
        tokenizer: hub id or folder of the tokenizer, for prompts that are texts; None is that of `pretrained`, if any.

    Raises:
        ValueError: if not exactly one of `pretrained` and `config` is given, or no model can be loaded or built.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        dtype: Dtype = "float32",
        auto_class: str | None = None,
        tokenizer: str | None = None,
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
        self.tokenizer = expand_name(tokenizer) if tokenizer else find_tokenizer(pretrained)
        self._needs_tokenizer = tokenizer is not None  # a model on the Hub may have none

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
            inputs: by name: `input_ids` (B, L), `attention_mask` (B, L), and `labels` (B, L') of an encoder-decoder;
                without them, its decoder reads its start token only. `prompt_mask` is not used.

        Returns:
            (B, L, V), or (B, L', V) for an encoder-decoder.
        """
        given = named(inputs)
        labels = given.pop("labels", None)
        given.pop("prompt_mask", None)
        if self.kind == "seq2seq" and labels is not None:
            given["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        elif self.kind == "seq2seq":
            ids = given["input_ids"]
            given["decoder_input_ids"] = torch.full_like(ids[:, :1], self.model.config.decoder_start_token_id)
        return self.model(**given, use_cache=False).logits

    # -- prompts and answers ------------------------------------------------------------------------------------------

    def answer_positions(self, labels: Tensor) -> Tensor:
        """The positions whose logits predict a token of the answer.

        Args:
            labels: int64 (B, L), −100 where no token is to be predicted; see `Task`.

        Returns:
            (B, L) bool.
        """
        asked = labels != IGNORED
        if self.kind == "seq2seq":
            return asked
        return F.pad(asked[:, 1:], (0, 1))  # the logits at position i are of token i + 1

    @contextmanager
    def states_only(self, positions: Tensor) -> Iterator[list[Tensor]]:
        """Compute no logits for the duration of a block, only the states from which they would be computed.

        A vocabulary is large: the logits of a batch take more memory than all other activations.

        Args:
            positions: (B, L) bool, the tokens whose states are kept.

        Yields:
            A list, to which each forward pass in the block adds the output layer's inputs, (N, D) for N positions.
        """
        states: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states.append(arguments[0][positions])
            return (arguments[0][:, :0], *arguments[1:])  # the layer runs, on no token

        handle = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield states
        finally:
            handle.remove()

    @property
    def output_layer(self) -> str:
        """The name of the model's output layer, which maps states to logits."""
        layer = self.model.get_output_embeddings()
        return next(name for name, module in self.model.named_modules() if module is layer)

    def logits_of(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits of some tokens from their states.

        Args:
            states: (N, D), of `states_only`.
            weight: (V, D) of the output layer.
            bias: (V,) of the output layer, if it has one.

        Returns:
            (N, V), scaled or capped as the model does it.
        """
        config, logits = self.model.config.get_text_config(decoder=True), F.linear(states, weight, bias)
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * factor
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    def router_inputs(self, inputs: Inputs) -> Inputs:
        """The prompts of a batch: the inputs without their answers, padded on the right.

        Args:
            inputs: by name; see `forward`. `prompt_mask` (B, L) is 1 at the prompts' tokens; without it, the inputs of
                a causal model are prompts only.
        """
        return self.prompts(inputs, left=False)

    def prompts(self, inputs: Inputs, left: bool | None = None) -> dict[str, Tensor]:
        """The prompts of a batch, without answers.

        Args:
            inputs: by name; see `router_inputs`.
            left: whether to pad them on the left; by default where generation needs it: an encoder's on the right, as
                positions count from there, a causal model's on the left, as its answer follows.

        Returns:
            `input_ids` (B, P), `attention_mask` (B, P) and the other inputs; P is the length of the longest prompt.
        """
        given = named(inputs)
        given.pop("labels", None)
        ids = given["input_ids"]
        shown, kept = given.pop("prompt_mask", None), given.get("attention_mask")
        if kept is not None:
            mask = kept.bool()
        else:  # as transformers reads tokens without a mask
            pad = self.model.generation_config.pad_token_id
            mask = torch.ones_like(ids, dtype=torch.bool) if pad is None or pad in self._ends else ids != pad
        if shown is not None:
            mask = mask & shown.bool()
        on_left = self.kind == "causal_lm" if left is None else left
        return padded(given, mask, self.pad_token, on_left)

    @property
    def pad_token(self) -> int:
        """The token that pads prompts and answers; an end-of-sequence token if there is no other."""
        settings = self.model.generation_config
        return next((token for token in (settings.pad_token_id, *self._ends) if token is not None), 0)

    @property
    def _ends(self) -> list[int | None]:
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    @torch.no_grad()
    def generate(self, inputs: Inputs, **arguments: Any) -> Tensor:
        """Generate answers to a batch of prompts. What a prompt gets does not depend on the others of its batch.

        Args:
            inputs: by name; see `router_inputs`. Prompts may be padded on either side.
            **arguments: any arguments of transformers' `generate`.

        Returns:
            The tokens of the answers, int64 (B·R, N), padded on the right with `pad_token`; R is
            `num_return_sequences`.

        Raises:
            ValueError: for `return_dict_in_generate`, as only tokens are returned.
        """
        if arguments.get("return_dict_in_generate"):
            raise ValueError(f"{type(self).__name__}: generate returns tokens only; leave out return_dict_in_generate")
        prompts = self.prompts(inputs)
        first = prompts["input_ids"].shape[1] if self.kind == "causal_lm" else 1  # after the decoder's start token
        parts = self.without_padding(prompts, arguments)
        if len(parts) > 1:
            answers = [self.generate(select(prompts, part), **arguments) for part in parts]
            return in_order(answers, parts, self.pad_token)
        return self.model.generate(**prompts, **{"pad_token_id": self.pad_token, **arguments})[:, first:]

    def without_padding(self, prompts: Inputs, arguments: Mapping[str, Any]) -> list[Tensor]:
        """The parts of a batch that have to run one by one, because arguments of `generate` count or read padding too.

        Args:
            prompts: a result of `prompts`.
            arguments: those of `generate`, such as `max_length` and `repetition_penalty`.

        Returns:
            The samples of each part, int64; one part with all samples unless there are such arguments.
        """
        lengths = named(prompts)["attention_mask"].sum(dim=1)
        every = torch.arange(len(lengths), device=lengths.device)
        if not reads_padding(arguments, self.model.generation_config):
            return [every]
        return [every[lengths == length] for length in lengths.unique().tolist()]

    def ends_of(self, tokens: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The number of tokens of each answer before its end-of-sequence token.

        Args:
            tokens: int64 (B, N), a result of `generate`.
            arguments: those of `generate`, which may name other tokens that end an answer.

        Returns:
            int64 (B,).
        """
        asked = getattr(arguments.get("generation_config"), "eos_token_id", None)
        ends = arguments.get("eos_token_id", self._ends if asked is None else asked)
        every = [*(ends if isinstance(ends, list) else [ends]), self.model.generation_config.pad_token_id]
        known = [token for token in every if token is not None]
        ended = torch.isin(tokens, torch.tensor(known, dtype=torch.long, device=tokens.device))
        return F.pad(ended, (0, 1), value=True).int().argmax(dim=1)

    def answer(self, inputs: Inputs, answer_mask: Tensor | None = None, max_new_tokens: int = 128) -> list[list[int]]:
        """Generate answers to a batch of prompts by greedy decoding.

        Args:
            inputs: by name: `input_ids` (B, L), `attention_mask` (B, L), ….
            answer_mask: (B, L) bool, for causal models whose inputs contain the answer: True at the answer's tokens,
                which are removed from the prompt. None if the inputs are prompts only, or have a `prompt_mask`.
            max_new_tokens: maximum number of tokens of an answer.

        Returns:
            The token ids of each answer, up to its end-of-sequence token.
        """
        given = named(inputs)
        if answer_mask is not None and self.kind == "causal_lm":
            given["prompt_mask"] = ~answer_mask
        tokens = self.generate(given, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        return [row[:end] for row, end in zip(tokens.tolist(), self.ends_of(tokens, {}).tolist(), strict=True)]

    # -- texts --------------------------------------------------------------------------------------------------------

    def load_tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            ValueError: if there is none, or it cannot be loaded.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{type(self).__name__}: there is no tokenizer for texts; set `tokenizer` to a hub id or folder, or "
                "pass input_ids"
            )
        return load_tokenizer(self.tokenizer)

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The inputs of prompts, tokenized as text sources do it for training.

        Args:
            texts: B prompts.

        Returns:
            `input_ids` and `attention_mask`, int64 (B, L), on the model's device.

        Raises:
            ValueError: if there is no tokenizer, or a text has no tokens.
        """
        tokenizer = self.load_tokenizer()
        if not texts:
            nothing = torch.zeros(0, 0, dtype=torch.long, device=self.model.device)
            return {"input_ids": nothing, "attention_mask": nothing}
        rows = tokenizer(list(texts))["input_ids"]  # without padding, which would change the tokenizer for all threads
        if self.kind == "causal_lm":  # an end here would end the answer before it begins
            rows = [row[:-1] if row[-1:] == [tokenizer.eos_token_id] else row for row in rows]
        if empty := [text for text, row in zip(texts, rows, strict=True) if not row]:
            raise ValueError(f"{type(self).__name__}: the prompt {empty[0]!r} has no tokens")
        ids = [torch.tensor(row) for row in rows]
        pad = partial(pad_sequence, batch_first=True)
        inputs = {"input_ids": pad(ids), "attention_mask": pad([torch.ones_like(row) for row in ids])}
        return to_device(inputs, self.model.device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model as a Hugging Face folder, with its generation configuration, tokenizer and chat template.

        Args:
            directory: the folder, created if it is missing.

        Raises:
            ValueError: if the tokenizer cannot be loaded.
        """
        super().save_pretrained(directory)
        if self.tokenizer is None:
            return
        try:
            self.load_tokenizer().save_pretrained(directory)
        except ValueError:
            if self._needs_tokenizer:
                raise

    def recipe(self) -> dict[str, Any]:
        """The constructor arguments that a folder stores; see `Backbone.recipe`."""
        return {"dtype": self.dtype, "auto_class": self.auto_class}
