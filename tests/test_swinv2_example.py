"""``examples/swinv2_block.py`` on a stand-in with the interface of timm's ``WindowAttention``."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "swinv2_block.py"
    spec = importlib.util.spec_from_file_location("swinv2_block", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class WindowAttention(nn.Module):
    """Window attention of Swin Transformer V2 by the formulas of its paper, with the attributes that timm has."""

    def __init__(self, dim: int, side: int, heads: int) -> None:
        super().__init__()
        self.window_size, self.num_heads = (side, side), heads
        self.logit_scale = nn.Parameter(torch.linspace(1.0, 5.0, heads).view(heads, 1, 1))  # the last beyond log 100
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        offsets = torch.arange(1 - side, side)
        self.relative_coords_table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)[None] / side
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None] + side - 1
        self.relative_position_index = apart[0] * (2 * side - 1) + apart[1]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias))).chunk(3, -1)
        q, k, v = (y.view(batch, length, self.num_heads, -1).transpose(1, 2) for y in (q, k, v))
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
        logits = cosines * self.logit_scale.clamp(max=math.log(100)).exp() + bias
        if mask is not None:
            logits = logits + mask.repeat(batch // len(mask), 1, 1)[:, None]
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def shifted_mask(windows: int, length: int) -> Tensor:
    """(W, S, S): each window in two parts that do not see each other, 0 and -100 as in timm."""
    parts = torch.arange(length) >= torch.arange(1, windows + 1)[:, None] * length // (windows + 1)
    return torch.where(parts[:, :, None] == parts[:, None], 0.0, -100.0)


@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_are_the_same(example: ModuleType, masked: bool) -> None:
    torch.manual_seed(0)
    before = nn.ModuleDict({"attn": WindowAttention(24, side=3, heads=3)}).double()
    before["attn"].relative_coords_table = before["attn"].relative_coords_table.double()
    after = copy.deepcopy(before)
    assert example.replace_attention(after) == 1
    assert before.state_dict().keys() == after.state_dict().keys()
    x = torch.randn(2 * 4, 9, 24, dtype=torch.float64)
    mask = shifted_mask(4, 9).double() if masked else None
    dout = torch.randn_like(x)
    outs = [model["attn"](x, mask=mask) for model in (before, after)]
    torch.testing.assert_close(outs[1], outs[0])
    gradients = [
        torch.autograd.grad(out, list(m.parameters()), dout) for out, m in zip(outs, (before, after), strict=True)
    ]
    for (name, _), one, other in zip(before.named_parameters(), *gradients, strict=True):
        assert one.abs().max() > 0 or name == "attn.logit_scale"
        torch.testing.assert_close(other, one)
    assert gradients[1][0].flatten()[-1] == 0, "beyond the clamp the scale has no gradient"


def test_a_copy_of_a_replaced_model_uses_its_own_parameters(example: ModuleType) -> None:
    model = WindowAttention(24, side=3, heads=3)
    example.replace_attention(model)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.proj.weight)
    nn.init.zeros_(other.proj.bias)
    x = torch.randn(2, 9, 24)
    assert not other(x).any()
    assert model(x).any()


def test_torch_compile_takes_a_replaced_attention_as_one_graph(example: ModuleType) -> None:
    torch.manual_seed(0)
    model = WindowAttention(24, side=3, heads=3)
    example.replace_attention(model)
    x, mask = torch.randn(8, 9, 24), shifted_mask(4, 9)
    expected = model(x, mask=mask)
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(x, mask=mask), expected)


def test_dropout_of_weights_is_refused(example: ModuleType) -> None:
    model = WindowAttention(24, side=3, heads=3)
    model.attn_drop.p = 0.1
    with pytest.raises(ValueError, match="dropout"):
        example.replace_attention(model)
