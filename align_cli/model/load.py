"""Loads the models and tokenizers that a recipe names by directory, finished run or hub id.

Loads safetensors only. Code that comes with a model runs only with `model.trust_remote_code`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align_cli.compat import chat_date, libraries
from align_cli.errors import UpstreamError
from align_cli.model import saved_tokenizer, templates
from align_cli.recipe.sections import Model

PAD_CANDIDATES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
"""Tokens to use as padding, in order of preference, if the tokenizer has no pad token."""


MULTIPLE = 64
"""Widened embeddings have a multiple of this number of rows: Tensor Cores are slow with others."""

_NEW: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, list[str]] = weakref.WeakKeyDictionary()
_SAVED: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, int] = weakref.WeakKeyDictionary()


def tokenizer(model: Model, path: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `path` (default: the model's) with a chat template, an EOS token, and a pad token that is not
    EOS.

    If the pad token equals EOS, libraries that mask padding by its id never train the model to stop (trl#976). Without
    an EOS token, the token with which the template closes an answer is used. Raises UpstreamError if the tokenizer
    cannot be loaded, has no template, or has no token that could end an answer.
    """
    path = path or model.path
    try:
        loaded = AutoTokenizer.from_pretrained(
            path, trust_remote_code=model.trust_remote_code, revision=_revision(model, path)
        )
    except Exception as error:  # broken tokenizer files raise all kinds of exceptions
        raise UpstreamError(f"model.path: {path}: no tokenizer could be loaded ({_first_line(error)})") from None
    _SAVED[loaded] = len(loaded)
    if model.chat_template is not None:
        loaded.chat_template = templates.text(model.chat_template)
        known = loaded.get_vocab()
        markers = [token for token in templates.END_TOKENS.get(model.chat_template, []) if token not in known]
        if markers:
            loaded.add_special_tokens({"additional_special_tokens": markers})
            _NEW[loaded] = markers
    if loaded.chat_template is None:
        raise UpstreamError(
            f"model.path: {path}: its tokenizer has no chat template; set model.chat_template= to "
            f"{', '.join(templates.BUILT_IN)} or a Jinja file"
        )
    chat_date.fix(loaded.chat_template)
    if loaded.eos_token is None:
        loaded.eos_token = saved_tokenizer.closing(loaded)
        if loaded.eos_token is None:
            raise UpstreamError(templates.endless(path))
    if loaded.pad_token is None or loaded.pad_token_id == loaded.eos_token_id:
        known = loaded.get_vocab()
        pad = next((token for token in PAD_CANDIDATES if token in known and token != loaded.eos_token), None)
        loaded.add_special_tokens({"pad_token": pad or "<|pad|>"})
    loaded.padding_side = "right"
    return loaded


def new_tokens(loaded: PreTrainedTokenizerBase) -> list[str]:
    """Markers of a built-in template that were added to the vocabulary."""
    return _NEW.get(loaded, [])


def pretrained(
    loader: type[AutoModelForCausalLM | AutoModelForSequenceClassification],
    model: Model,
    path: str,
    dtype: str,
    **extra: Any,
) -> PreTrainedModel:
    """`loader.from_pretrained(path)` with the recipe's settings. Raises UpstreamError if it fails."""
    attention = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    try:
        return loader.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            trust_remote_code=model.trust_remote_code,
            revision=_revision(model, path),
            use_safetensors=True,
            **attention,
            **extra,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UpstreamError(f"model.path: {path}: cannot be loaded ({_first_line(error)})") from None


def _revision(model: Model, path: str) -> str:
    """The revision to load: the recipe's for its own model, the newest of any other."""
    return (model.revision if path == model.path else None) or "main"


def policy(
    model: Model, tok: PreTrainedTokenizerBase, *, dtype: str, path: str | None = None, adapter: bool = False
) -> PreTrainedModel:
    """The causal language model of `path` (default: the recipe's), with embeddings resized to fit the tokenizer;
    `adapter` as in `widen`.

    Under ZeRO-3 the training arguments must be created first, or every rank loads the whole model. Raises UpstreamError
    if it cannot be loaded.
    """
    loaded = pretrained(AutoModelForCausalLM, model, path or model.path, dtype)
    _suppress(loaded, tok, widened=widen(loaded, tok, adapter=adapter))
    for config in (loaded.config, loaded.generation_config):
        config.pad_token_id = tok.pad_token_id
    if libraries.made_from_config(loaded.generation_config):
        # without generation_config.json, the EOS of the model's config is usually the architecture's default
        special = {index for index, token in tok.added_tokens_decoder.items() if token.special}
        loaded.generation_config.eos_token_id = [id for id in _ends(loaded) if id in special] or None
    return loaded


def widen(loaded: PreTrainedModel, tok: PreTrainedTokenizerBase, *, adapter: bool) -> bool:
    """Resize the embeddings if they have fewer rows than the tokenizer has tokens. Returns whether they had.

    The new rows are drawn from the old ones' distribution, the same in every load: policy and reference start equal.
    With `adapter`, for the base of one, there is exactly one row per token, since PEFT resizes a base so when it loads
    an adapter.
    """
    # under ZeRO-3 the weight itself has no rows here
    rows = loaded.config.get_text_config().vocab_size
    if rows >= len(tok):
        return False
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(rows)
        loaded.resize_token_embeddings(len(tok), pad_to_multiple_of=None if adapter else MULTIPLE)
    return True


def _suppress(loaded: PreTrainedModel, tok: PreTrainedTokenizerBase, *, widened: bool) -> None:
    """Never generate the rows that a resize adds beyond the tokenizer, nor a padding token that no text contains, here
    and wherever the saved model is served. Rows drawn from the others' distribution have their probability."""
    known, config = _SAVED.get(tok, len(tok)), loaded.generation_config
    # rows that were unused when the model was saved may be new tokens now
    unused = {token for token in config.suppress_tokens or [] if not known <= token < len(tok)}
    if widened:
        unused |= set(range(len(tok), loaded.config.get_text_config().vocab_size))
    if tok.pad_token_id is not None and tok.pad_token_id >= known:
        unused.add(tok.pad_token_id)
    config.suppress_tokens = sorted(unused) or None


def set_ends(model: PreTrainedModel | PeftModel, ends: list[int]) -> list[int]:
    """Add `ends` to the model's EOS ids, for generation here and wherever the saved model is served. Returns all EOS
    ids."""
    ends = sorted({*ends, *_ends(model)})
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return ends


def _ends(model: PreTrainedModel | PeftModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
