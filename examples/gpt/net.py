"""A transformer that predicts each byte from those before it (GPT-2's form: Radford et al., 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


class Block(nn.Module):
    """Causal attention, then a feed-forward layer, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.attention(self.before_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """(batch, length) bytes to (batch, length, 256) logits of the bytes that follow; length up to `context`."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.bytes.weight  # what a byte means is what predicts it
        self.apply(_initialise)
        for block in self.blocks:  # the sum over all blocks keeps its size
            nn.init.normal_(block.projection.weight, std=0.02 / (2 * depth) ** 0.5)
            nn.init.normal_(block.mlp[2].weight, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.bytes(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def next_byte(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """dtrain's step: the mean loss over the bytes that are there, whose number is the weight."""
    logits, target = model(batch["inputs"]).flatten(0, 1), batch["target"].flatten()
    loss = F.cross_entropy(logits.float(), target)
    return {"loss": loss, "weight": (target != -100).sum(), "predictions": logits, "target": target}
