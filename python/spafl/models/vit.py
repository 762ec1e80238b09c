"""The vision transformer published with SpaFL: thresholds on the attention and feed-forward linears."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spafl_kernels import ThresholdLinear


class Patches(nn.Module):
    """``(N, C, H, W) -> (N, patches, size * size * C)``, pixels of a patch in row, column, channel order."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        p = self.size
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(n, (h // p) * (w // p), p * p * c)


class PreNorm(nn.Module):
    """LayerNorm, then ``fn``."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            ThresholdLinear(dim, hidden, bias=False),
            nn.GELU(),
            nn.Dropout(dropout),
            ThresholdLinear(hidden, dim, bias=False),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    """Multi-head self-attention: one linear for queries, keys and values, softmax(q k' / sqrt(head)) v, one linear."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = head_dim**-0.5
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.to_qkv = ThresholdLinear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(ThresholdLinear(heads * head_dim, dim, bias=False), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = (t.reshape(n, tokens, self.heads, -1).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        weights = self.dropout(self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale))
        out = torch.matmul(weights, v).transpose(1, 2).reshape(n, tokens, -1)
        return self.to_out(out)


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, head_dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, Attention(dim, heads, head_dim, dropout)),
                    PreNorm(dim, FeedForward(dim, hidden, dropout)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            assert isinstance(block, nn.ModuleList)
            attention, feed_forward = block
            x = attention(x) + x
            x = feed_forward(x) + x
        return x


class ViT(nn.Module):
    """``(N, in_channels, image, image) -> (N, classes)`` from the class token; 12,288 thresholds by default."""

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 3,
        image: int = 32,
        patch: int = 4,
        dim: int = 128,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        hidden: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"image size {image} is not a multiple of the patch size {patch}")
        self.to_patch_embedding = nn.Sequential(Patches(patch), nn.Linear(in_channels * patch**2, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(dim, depth, heads, head_dim, hidden, dropout)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_patch_embedding(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.dropout(x + self.pos_embedding)
        return self.mlp_head(self.transformer(x)[:, 0])
