"""A transformer block around CosineAttention: rotary positions, a learned scale per head, grouped key/value heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosattn import CosineAttention


def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate pairs of channels by an angle that grows with the position. Rotations keep norms, as attention needs."""

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        frequencies = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)

    return rotate(q), rotate(k)


class Block(nn.Module):
    """Pre-norm block: ``(B, S, dim)`` to ``(B, S, dim)``."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = CosineAttention(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            dim_head=dim // heads,
            causal=True,
            learned_scale=True,
            scale_max=20.0,  # keeps the logits bounded, and so the softmax without a running maximum
            rotary=rotary,
        )
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(x)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = Block(dim=128, heads=4, kv_heads=2).to(device)
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-3)
    x = torch.randn(4, 64, 128, device=device)
    target = x.roll(1, dims=1)  # each position is to copy the one before it
    for step in range(31):
        loss = (block(x)[:, 1:] - target[:, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2d}  loss {loss.item():.4f}")
    print("learned scales", [round(s, 2) for s in block.attention.scale.tolist()])


if __name__ == "__main__":
    main()
