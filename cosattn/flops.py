"""Tells ``torch.utils.flop_counter`` what the operators cost.

Only once a counter is in use: importing that module imports triton, which would slow down the first call of every
process.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_Shape = tuple[int, int, int, int]


def _forward(q: _Shape, k: _Shape, v: _Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products: logits and output."""
    batch, heads, q_len, head_dim = q
    return 2 * batch * heads * q_len * k[2] * (head_dim + v[3])


def _backward(dout: Any, dlse: Any, q: _Shape, k: _Shape, v: _Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Five products: logits again, dP, dV, dQ and dK."""
    batch, heads, q_len, head_dim = q
    return 2 * batch * heads * q_len * k[2] * (3 * head_dim + 2 * v[3])


def tell_active_counters() -> None:
    """Register the formulas, also with counters that started before and so hold a copy of the registry."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    formulas = {torch.ops.cosattn.attention_forward: _forward, torch.ops.cosattn.attention_backward: _backward}
    for operator, formula in formulas.items():
        if operator not in module.flop_registry:
            module.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for operator in formulas:
                counter.flop_registry.setdefault(operator, module.flop_registry[operator])
