#!/usr/bin/env python3
"""Train a byte-level language model with cosine-similarity attention, on text this machine already has.

    python scripts/train.py                                  a couple of minutes on a CPU, the full model on a GPU
    python scripts/train.py --attention sdpa                 the same model and data on another attention
    python scripts/train.py --data enwik8 --seq-len 8192     enwik8 (plain or .gz) and a long context

The text is the Python standard library's own source files unless --data names a file. The full model is the one
flash-cosine-sim-attention trained: depth 8, dim 512, 8 heads of 64, keys and queries normalised in 8 groups, scale 1.
On a CPU the defaults choose a smaller one. Validation uses the last twentieth of the text.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Where other processes share the cores, OpenMP threads that spin while they wait cost ten times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baselines import grouped_normalize, plain_attention
from machine import environment

from cosattn import cosine_attention

SAMPLE_SECONDS = 20.0
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """The model's shape."""

    depth: int
    dim: int
    heads: int
    head_dim: int
    groups: int
    scale: float
    seq_len: int


def attention_named(name: str, config: Config) -> Attention:
    """Causal grouped cosine attention by cosattn, by PyTorch's SDPA on normalised inputs, or by plain einsum."""
    scale, groups = config.scale, config.groups
    if name == "cosattn":
        return lambda q, k, v: cosine_attention(q, k, v, scale=scale, groups=groups, causal=True)
    if name == "plain":
        return lambda q, k, v: plain_attention(q, k, v, scale=scale, groups=groups, causal=True)

    def normalized_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (grouped_normalize(x, groups).to(v.dtype) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    return normalized_sdpa


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: Config, attention: Attention) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.attention = attention
        self.attention_norm = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, 4 * config.dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.dim, config.dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.feed_forward(x)


class LanguageModel(nn.Module):
    """Bytes in, logits over the next byte out."""

    def __init__(self, config: Config, attention: Attention) -> None:
        super().__init__()
        self.seq_len = config.seq_len
        self.tokens = nn.Embedding(256, config.dim)
        self.positions = nn.Embedding(config.seq_len, config.dim)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.logits = nn.Linear(config.dim, 256, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.logits(self.norm(h))

    @torch.no_grad()
    def sample(self, prompt: Tensor, length: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Extend a ``(1, n)`` prompt by ``length`` bytes, or by as many as come within SAMPLE_SECONDS."""
        deadline = time.perf_counter() + SAMPLE_SECONDS
        for _ in range(length):
            if time.perf_counter() > deadline:
                break
            logits = self(prompt[:, -self.seq_len :])[:, -1].float() / temperature
            best = logits.topk(32)
            choice = torch.multinomial(best.values.softmax(-1).cpu(), 1, generator=generator).to(prompt.device)
            prompt = torch.cat((prompt, best.indices.gather(1, choice)), dim=1)
        return prompt


def standard_library_text(limit: int) -> bytes:
    """Source files of Python's own standard library up to ``limit`` bytes, in an order that mixes its packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "encodings", "idlelib", "site-packages", "dist-packages", "__pycache__"}
    text = bytearray()
    for path in sorted(root.rglob("*.py"), key=lambda path: hashlib.md5(path.name.encode()).digest()):
        if left_out.isdisjoint(path.relative_to(root).parts[:-1]):
            text += path.read_bytes()
            if len(text) >= limit:
                break
    return bytes(text[:limit])


def read_text(path: Path | None, limit: int) -> bytes:
    """The training text: a file (``.gz`` is unpacked) or the standard library."""
    if path is None:
        return standard_library_text(limit)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return file.read(limit)


class Batches:
    """Windows of ``seq_len + 1`` bytes; the same seed gives the same windows whatever the attention."""

    def __init__(self, data: Tensor, seq_len: int, batch: int, device: torch.device, seed: int) -> None:
        if len(data) < seq_len + 2:
            raise SystemExit(f"the text has {len(data)} bytes here, and a window needs {seq_len + 2}: lower --seq-len")
        self.data, self.seq_len, self.batch, self.device = data, seq_len, batch, device
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each ``(batch, seq_len)``."""
        starts = torch.randint(len(self.data) - self.seq_len - 1, (self.batch,), generator=self.generator)
        windows = torch.stack([self.data[s : s + self.seq_len + 1] for s in starts.tolist()]).long().to(self.device)
        return windows[:, :-1], windows[:, 1:]


class Trainer:
    """One training run."""

    def __init__(self, args: argparse.Namespace, config: Config, device: torch.device) -> None:
        self.args, self.config, self.device = args, config, device
        text = torch.frombuffer(bytearray(read_text(args.data, args.bytes)), dtype=torch.uint8)
        cut = len(text) * 19 // 20
        torch.manual_seed(args.seed)
        self.model = LanguageModel(config, attention_named(args.attention, config)).to(device)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if args.compile else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.batches = Batches(text[:cut], config.seq_len, args.batch, device, args.seed)
        held_out = Batches(text[cut:], config.seq_len, args.batch, device, args.seed + 1)
        self.validation = [held_out.draw() for _ in range(args.validation_batches)]
        self.prompt = text[cut : cut + min(64, config.seq_len)].long().to(device)[None]
        self.curve: list[dict[str, float]] = []
        self.timed_tokens, self.timed_seconds = 0, 0.0

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 where asked for."""
        if self.args.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.args.dtype))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a byte."""
        with self.autocast():
            logits = self.forward(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def step(self, number: int) -> float:
        """One optimiser step; the learning rate rises linearly over the first steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * min(1.0, (number + 1) / self.args.rise)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(*self.batches.draw())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        return loss.item()  # waits for the device, so step times are true

    @torch.no_grad()
    def validate(self) -> float:
        """Loss on the same held-out windows each time."""
        self.model.eval()
        losses = [self.loss(*pair).item() for pair in self.validation]
        self.model.train()
        return sum(losses) / len(losses)

    def run(self) -> None:
        """All steps, printing progress; stops early at the time limit."""
        start = time.perf_counter()
        training_loss = float("nan")
        for number in range(self.args.steps + 1):
            elapsed = time.perf_counter() - start
            last = number == self.args.steps or elapsed > 60 * self.args.minutes
            if last or number % self.args.validate_every == 0:
                self.report(number, training_loss, start)
            if last:
                break
            before = time.perf_counter()
            training_loss = self.step(number)
            if number >= 3:  # the first steps compile and allocate
                self.timed_tokens += self.args.batch * self.config.seq_len
                self.timed_seconds += time.perf_counter() - before

    def report(self, number: int, training_loss: float, start: float) -> None:
        """Validate, remember, print one line."""
        loss = self.validate()
        seconds = time.perf_counter() - start
        self.curve.append({"step": number, "validation_loss": loss, "training_loss": training_loss, "seconds": seconds})
        bar = "#" * (20 * number // max(self.args.steps, 1))
        shown = "  -   " if number == 0 else f"{training_loss:.4f}"
        print(
            f"[{bar:20}] step {number:5d}/{self.args.steps}  training {shown}  validation {loss:.4f}  "
            f"{self.tokens_per_second:10,.0f} tokens/s  {seconds:6.1f} s",
            flush=True,
        )

    @property
    def tokens_per_second(self) -> float:
        """Training tokens a second, validation and the first steps left out."""
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else 0.0

    def sample(self) -> str:
        """Text the model writes after the start of the held-out part."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.args.seed)
        with self.autocast():
            out = self.model.sample(self.prompt, self.args.sample_bytes, 0.8, generator)
        return bytes(out[0].tolist()).decode("utf-8", errors="replace")


def parser(on_gpu: bool) -> argparse.ArgumentParser:
    """Command line; the defaults differ between a GPU and a CPU."""

    def either(gpu: Any, cpu: Any) -> Any:
        return gpu if on_gpu else cpu

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--attention", choices=["cosattn", "sdpa", "plain"], default="cosattn")
    p.add_argument(
        "--data", type=Path, help="text file, for example enwik8 or enwik8.gz; default: the standard library's sources"
    )
    p.add_argument("--bytes", type=int, default=either(100_000_000, 4_000_000), help="most bytes of text to use")
    p.add_argument("--steps", type=int, default=either(1000, 250))
    p.add_argument("--minutes", type=float, default=either(60.0, 1.5), help="stop after this long")
    p.add_argument("--batch", type=int, default=either(16, 8))
    p.add_argument("--seq-len", type=int, default=either(1024, 256))
    p.add_argument("--depth", type=int, default=either(8, 4))
    p.add_argument("--dim", type=int, default=either(512, 128))
    p.add_argument("--heads", type=int, default=either(8, 4))
    p.add_argument("--head-dim", type=int, default=either(64, 32))
    p.add_argument("--groups", type=int, default=8, help="chunks the L2 norm is taken over")
    p.add_argument("--scale", type=float, default=1.0, help="factor on the cosine similarities")
    p.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default=either("bfloat16", "float32"), help="autocast to this type"
    )
    p.add_argument("--learning-rate", type=float, default=either(4e-4, 2e-3))
    p.add_argument("--rise", type=int, default=20, help="steps over which the learning rate rises")
    p.add_argument("--validate-every", type=int, default=either(50, 25))
    p.add_argument("--validation-batches", type=int, default=either(8, 4))
    p.add_argument("--sample-bytes", type=int, default=either(512, 200), help="0: no sample")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default=either("cuda", "cpu"))
    p.add_argument("--results", type=Path, help="JSON file: loss curve, tokens/s, machine")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when memory ran out or the validation loss did not fall."""
    args = parser(torch.cuda.is_available()).parse_args(arguments)
    device = torch.device(args.device)
    config = Config(args.depth, args.dim, args.heads, args.head_dim, args.groups, args.scale, args.seq_len)
    trainer = Trainer(args, config, device)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{args.attention}: depth {args.depth}, dim {args.dim}, {args.heads} heads of {args.head_dim}, "
        f"{args.groups} groups, {parameters / 1e6:.1f} M parameters; "
        f"batch {args.batch} x {args.seq_len} bytes, {args.dtype}, {device}"
    )
    outcome, sample = "finished", ""
    try:
        trainer.run()
        if args.sample_bytes:
            sample = trainer.sample()
            print(f"{'-' * 80}\n{sample}\n{'-' * 80}")
    except torch.OutOfMemoryError:
        outcome = "out of memory"
    losses = [point["validation_loss"] for point in trainer.curve]
    fell = len(losses) > 1 and losses[-1] < losses[0]
    if losses:
        print(
            f"{outcome}: validation loss {losses[0]:.4f} -> {losses[-1]:.4f}, {trainer.tokens_per_second:,.0f} tokens/s"
        )
    else:
        print(outcome)
    if args.results is not None:
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        result = {
            "suite": "train",
            "environment": environment(device),
            "attention": args.attention,
            "config": asdict(config)
            | {"batch": args.batch, "dtype": args.dtype, "parameters": parameters, "compile": args.compile},
            "outcome": outcome,
            "tokens_per_second": trainer.tokens_per_second,
            "peak_memory_bytes": memory,
            "curve": trainer.curve,
            "sample": sample,
        }
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if outcome == "finished" and fell else 1


if __name__ == "__main__":
    sys.exit(main())
