"""The features of cosine_attention, one call each. Runs on a GPU or on a CPU."""

from __future__ import annotations

import torch

from cosattn import cosine_attention, flash_cosine_sim_attention


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, heads, length, dim = 2, 8, 256, 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, requires_grad=True)

    q, k, v = (normal(batch, heads, length, dim) for _ in range(3))

    out = cosine_attention(q, k, v)
    print("self-attention", tuple(out.shape))

    out = cosine_attention(q, k, v, causal=True)
    out.sum().backward()
    print("causal, with gradients", tuple(out.shape), tuple(q.grad.shape))

    context_k, context_v = normal(batch, heads, 300, dim), normal(batch, heads, 300, 32)
    print("cross-attention, values of another width", tuple(cosine_attention(q, context_k, context_v).shape))

    mask = torch.arange(length, device=device) < torch.tensor([[256], [100]], device=device)
    print("key mask and causal", tuple(cosine_attention(q, k, v, mask=mask, causal=True).shape))

    grouped_k, grouped_v = normal(batch, 2, length, dim), normal(batch, 2, length, dim)
    print("two key/value heads for eight query heads", tuple(cosine_attention(q, grouped_k, grouped_v).shape))

    bias, scale = normal(heads, length, length), torch.full((heads,), 10.0, device=device, requires_grad=True)
    cosine_attention(q, k, v, attn_bias=bias, scale=scale).sum().backward()
    print("bias and one scale a head, both learned", tuple(bias.grad.shape), tuple(scale.grad.shape))

    print("norm over 8 groups of channels", tuple(cosine_attention(q, k, v, groups=8, scale=1.0).shape))

    first, first_lse = cosine_attention(q, k[:, :, :100], v[:, :, :100], return_lse=True)
    second, second_lse = cosine_attention(q, k[:, :, 100:], v[:, :, 100:], return_lse=True)
    weights = torch.stack((first_lse, second_lse)).softmax(0)[..., None]
    merged = weights[0] * first + weights[1] * second
    print("two halves of the keys merged: difference", f"{(merged - cosine_attention(q, k, v)).abs().max():.1e}")

    same = flash_cosine_sim_attention(q, k, v, None, None, 8, 1, True)
    print("the older package's signature", tuple(same.shape))


if __name__ == "__main__":
    main()
