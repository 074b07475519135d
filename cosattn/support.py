"""What cosattn can serve: reasons as sentences, used by errors, doctor, warmup, tests and the README's matrix."""

from __future__ import annotations

from cosattn import tiles_split
from cosattn.arch import ARCHS
from cosattn.spec import DTYPES, HEAD_DIMS, KernelSpec


def reasons(spec: KernelSpec) -> list[str]:
    """Why no kernel can serve ``spec``; empty when one can."""
    found: list[str] = []
    if spec.arch not in ARCHS:
        found.append(f"no kernels are written for {spec.arch}; there are kernels for {', '.join(ARCHS)}")
    if spec.dtype not in DTYPES:
        found.append(f"dtype {spec.dtype} has no kernels; {', '.join(DTYPES)} have")
    if spec.bias is not None and spec.bias not in DTYPES:
        found.append(f"attn_bias of dtype {spec.bias} is not read by any kernel; {', '.join(DTYPES)} are")
    for name, size in (("head dim", spec.head_dim), ("value dim", spec.value_dim)):
        if size not in HEAD_DIMS:
            found.append(
                f"{name} {size} is not a multiple of 8 between {HEAD_DIMS[0]} and {HEAD_DIMS[-1]}; "
                "zero columns at the end of q, k or v change nothing but the size"
            )
    if spec.groups < 1 or spec.head_dim % spec.groups:
        found.append(f"groups {spec.groups} does not divide head dim {spec.head_dim}")
    if spec.direction == "forward" and (spec.deterministic or spec.bias_grad):
        found.append("deterministic and bias_grad belong to backward kernels only")
    if spec.split and not tiles_split.serves(spec):
        found.append(
            "only forward calls of 16-bit types, without groups, biases and masks over pairs, split their keys, in "
            "tiles of up to 128 rows, 64 above head dim 128"
        )
    if spec.split not in (0, *tiles_split.ROWS):
        found.append(f"tiles of split keys have {', '.join(map(str, tiles_split.ROWS))} rows, not {spec.split}")
    if spec.mask and spec.pair_mask:
        found.append("a mask is over keys or over pairs of queries and keys, not both")
    if spec.bias_grad and spec.bias is None:
        found.append("bias_grad needs a bias")
    return found
