"""A small Llama of transformers', a LoRA of PEFT's on top of it, and dtrain's step for both."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama(width: int, depth: int) -> LlamaForCausalLM:
    """With random weights, for bytes; its output layer is its embedding."""
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": depth, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=True, use_cache=False, **shape))


def with_lora(base: nn.Module, r: int) -> PeftModel:
    """The adapter is what is trained: get_peft_model freezes the rest."""
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=r, target_modules="all-linear"))


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The model's own loss is the mean over the labels that are there; it compares each with what came before it."""
    output, labels = model(**batch), batch["labels"][:, 1:]
    predictions = output.logits[:, :-1].flatten(0, 1)
    return {
        "loss": output.loss,
        "weight": (labels != -100).sum(),
        "predictions": predictions,
        "target": labels.flatten(),
    }
