"""torch.compile over the public function: one graph, gradients, lengths that change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cosattn.functional import cosine_attention


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


CASES: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "plain": ((leaf(2, 4, 5, 16), leaf(2, 4, 7, 16), leaf(2, 4, 7, 8)), {}),
    "causal, mask, one key head": (
        (leaf(2, 4, 5, 16), leaf(2, 7, 16), leaf(2, 7, 8)),
        {"causal": True, "mask": torch.rand(2, 7) < 0.8, "groups": 2},
    ),
    "merged": ((leaf(6, 5, 16), leaf(6, 7, 16), leaf(6, 7, 8)), {"l2norm_qk": False, "scale": 0.1}),
    "bias and learned scale": (
        (leaf(2, 4, 5, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 8)),
        {"attn_bias": leaf(4, 5, 7), "scale": torch.rand(4, 1, 1).requires_grad_(), "deterministic": True},
    ),
    "windows of two images": (
        (leaf(4, 2, 5, 16), leaf(4, 2, 5, 16), leaf(4, 2, 5, 8)),
        {"mask": torch.rand(1, 2, 1, 5, 5) < 0.8, "attn_bias": leaf(2, 5, 5)},
    ),
    "a bias of keys": (
        (leaf(2, 4, 5, 16), leaf(2, 4, 7, 16), leaf(2, 4, 7, 8)),
        {"mask": torch.rand(2, 1, 1, 7) < 0.8, "attn_bias": leaf(2, 1, 1, 7)},
    ),
    "lse": ((leaf(2, 4, 5, 16), leaf(2, 4, 7, 16), leaf(2, 4, 7, 8)), {"return_lse": True, "scale": 60}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_graph_with_the_same_results_and_gradients(case: str) -> None:
    tensors, options = CASES[case]

    def step(*tensors: Tensor) -> Any:
        found = cosine_attention(*tensors, **options)
        return sum(x.square().sum() for x in (found if isinstance(found, tuple) else (found,)))

    leaves = [x for x in (*tensors, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
    expected = torch.autograd.grad(step(*tensors), leaves)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_lengths_that_change_recompile_once() -> None:
    """The first new length makes lengths symbolic; after that nothing is compiled again."""
    counter = CompileCounterWithBackend("aot_eager")
    bias_free = torch.compile(
        lambda q, k, v, mask: cosine_attention(q, k, v, causal=True, mask=mask), fullgraph=True, backend=counter
    )
    for q_len, k_len in ((5, 9), (6, 11), (17, 17), (33, 64), (128, 129)):
        q, k, v = leaf(2, 4, q_len, 16), leaf(2, 4, k_len, 16), leaf(2, 4, k_len, 16)
        mask = torch.rand(2, k_len) < 0.9
        out = bias_free(q, k, v, mask)
        torch.testing.assert_close(out, cosine_attention(q, k, v, causal=True, mask=mask))
        out.sum().backward()
        assert q.grad is not None
    assert counter.frame_count <= 2


def test_symbolic_from_the_start_never_compiles_again() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: cosine_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    first = 0
    for batch, length in ((2, 5), (3, 8), (4, 130)):
        q, k, v = (leaf(batch, length, 4, 16) for _ in range(3))
        out = compiled(q, k, v)
        out.sum().backward()
        assert out.transpose(1, 2).is_contiguous()
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_a_module_in_training_through_inductor() -> None:
    """The default backend, whose generated code chooses strides of its own around the operator."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(32, 96, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            return x + cosine_attention(q, k, v, causal=True).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 6, 32)
    block(x).square().sum().backward()
    expected = block.project.weight.grad
    block.zero_grad()
    torch.compile(block, fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(block.project.weight.grad, expected)


def test_autocast_inside_the_graph() -> None:
    q, k, v = (leaf(2, 4, 5, 16) for _ in range(3))

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cosine_attention(q, k, v)

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, step(q, k, v))


def test_export_keeps_the_operator() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cosine_attention(q, k, v, causal=True)

    tensors = tuple(torch.randn(2, 4, 6, 16) for _ in range(3))
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = tuple({2: length} for _ in range(3))
    program = torch.export.export(Attention(), tensors, dynamic_shapes=shapes)
    assert any(str(node.target).startswith("cosattn.attention_forward") for node in program.graph.nodes)
    longer = tuple(torch.randn(2, 4, 9, 16) for _ in range(3))
    torch.testing.assert_close(program.module()(*longer), Attention()(*longer))
