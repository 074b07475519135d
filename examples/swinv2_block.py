"""Swin Transformer V2 with cosattn in the place of its attention: the same outputs, gradients and state dict, faster.

    python examples/swinv2_block.py                            # timm's model, if timm is installed
    python examples/swinv2_block.py --window 16 --batch 128 --compile

Its attention is a cosine attention already: a learned scale for each head, clamped at 100 (so the softmax keeps a
running maximum), plus a bias that a small network makes from relative positions (H, S, S), plus, in every other block,
a mask that keeps the parts of a shifted window apart (W, S, S). The batch is images x W, so the mask repeats over it.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosattn import cosine_attention


def attend(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What ``timm.models.swin_transformer_v2.WindowAttention.forward`` computes, by one call.

    Args:
        self: a ``WindowAttention``.
        x: (images * W, S, C).
        mask: (W, S, S), 0 where a query may attend a key and -100 elsewhere. Here what is not 0 is hidden altogether.
    """
    bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
    qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (images * W, H, S, D), read where they are
    out = cosine_attention(
        q,
        k,
        v,
        scale=self.logit_scale.clamp(max=math.log(100)).exp(),
        attn_bias=position_bias(self),
        mask=None if mask is None else (mask == 0)[None, :, None],
    )
    projected: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
    return projected


def position_bias(self: Any) -> Tensor:
    """(H, S, S), from the network over relative positions."""
    length = self.window_size[0] * self.window_size[1]
    table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
    bias: Tensor = table[self.relative_position_index.view(-1)].view(length, length, -1).permute(2, 0, 1)
    return 16 * torch.sigmoid(bias).contiguous()


def replace_attention(model: nn.Module) -> int:
    """Give every window attention of a model the forward above; parameters stay where they are. Returns how many."""
    found = [module for module in model.modules() if hasattr(module, "logit_scale") and hasattr(module, "cpb_mlp")]
    for module in found:
        if getattr(module, "attn_drop", None) is not None and module.attn_drop.p:
            raise ValueError("cosattn has no dropout of attention weights")
        module.forward = types.MethodType(attend, module)
    return len(found)


def wake(model: nn.Module) -> None:
    """A new model has nearly equal biases, and scales every residual branch by 0: let attention matter."""
    for module in model.modules():
        if hasattr(module, "cpb_mlp"):
            nn.init.normal_(module.cpb_mlp[2].weight, std=0.1)
        if hasattr(module, "norm1") and hasattr(module, "attn"):
            nn.init.ones_(module.norm1.weight)
            nn.init.ones_(module.norm2.weight)


def step(model: nn.Module, images: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """Forward and backward, the gradients left in the parameters."""
    with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
        out = model(images)
    out.float().square().mean().backward()
    return out.detach()


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm().clamp(min=1e-30)).item()


def compare(before: nn.Module, after: nn.Module, images: Tensor) -> None:
    """The same outputs, gradients, and parameters after one step, in float32."""
    outs = [step(model, images) for model in (before, after)]
    print(f"outputs differ by {difference(*outs):.1e}")
    pairs = [
        (name, one, other)
        for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if one.grad is not None
    ]
    total = torch.stack([one.grad.norm() for _, one, _ in pairs]).norm()
    errors = {name: ((one.grad - other.grad).norm() / total).item() for name, one, other in pairs}
    worst = max(errors, key=lambda name: errors[name])
    print(f"gradients of {len(pairs)} parameters differ by at most {errors[worst]:.1e} of all ({worst})")
    for model in (before, after):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = max(difference(other.detach(), one.detach()) for _, one, other in pairs)
    print(f"parameters after one step differ by at most {moved:.1e}")


def images_per_second(models: dict[str, nn.Module], images: Tensor, seconds: float) -> dict[str, float]:
    """Median over turns of forward and backward in bfloat16, the models in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    wait: Callable[[], None] = torch.cuda.synchronize if images.is_cuda else lambda: None
    for model in models.values():  # compiles what has to be
        for _ in range(3):
            step(model, images, torch.bfloat16)
    end = time.perf_counter() + seconds * len(models)
    while time.perf_counter() < end:
        for name, model in models.items():
            wait()
            began = time.perf_counter()
            step(model, images, torch.bfloat16)
            wait()
            times[name].append(time.perf_counter() - began)
    return {name: len(images) / sorted(values)[len(values) // 2] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="SwinV2 before and after")
    parser.add_argument("--window", type=int, choices=(8, 16), default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring, each model")
    parser.add_argument("--compile", action="store_true", help="torch.compile the attention of both, too")
    options = parser.parse_args()
    try:
        import timm
    except ImportError:
        print("timm is not installed (pip install timm): nothing to show")
        return
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = timm.create_model(f"swinv2_tiny_window{options.window}_256", num_classes=100, drop_path_rate=0.0).to(
        device
    )
    wake(before)
    after = copy.deepcopy(before)
    print(f"{replace_attention(after)} attentions replaced, {device}")
    small = torch.randn(4 if device == "cuda" else 1, 3, 256, 256, device=device)
    compare(copy.deepcopy(before), copy.deepcopy(after), small)
    if device == "cpu":
        return
    models = {"timm": before, "cosattn": after}
    if options.compile:
        torch._dynamo.config.recompile_limit = 64
        for name in ("timm", "cosattn"):
            models[f"{name}, attention compiled"] = compiled = copy.deepcopy(models[name])
            for module in compiled.modules():
                if hasattr(module, "cpb_mlp"):
                    module.compile()
    images = torch.randn(options.batch, 3, 256, 256, device=device)
    rates = images_per_second(models, images, options.seconds)
    for name, rate in rates.items():
        print(f"{name:28} {rate:8.0f} images/s forward + backward, bfloat16, {rate / rates['timm']:.2f}x timm")


if __name__ == "__main__":
    main()
