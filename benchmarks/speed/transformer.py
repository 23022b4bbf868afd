"""A standard pre-norm transformer encoder, small enough for a CPU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

VOCABULARY = 256
CLASSES = 2


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), with four times the width inside."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project_in, self.project_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "n length width"]) -> Float[Tensor, "n length width"]:
        """The block's output."""
        parts = self.project_in(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.project_out(attended)
        out: Tensor = x + self.narrow(F.gelu(self.widen(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """Token and position embeddings, pre-norm blocks, a last norm and a linear head per token.

    Of width 512 and 12 layers it has 38 M parameters.
    """

    def __init__(self, width: int = 512, layers: int = 12, heads: int = 8, length: int = 512):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n length classes"]:
        """The logits of every token."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(
            self.norm(self.blocks(self.tokens(tokens) + self.positions(places)))
        )
        return logits
