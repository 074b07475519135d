"""The two structs a kernel launch takes, field by field, in the order of ``kernels_templates/include/params.cuh``.

Every field is eight bytes (pointer, int64 or double), so the layout needs no padding rules. Strides count elements.
"""

from __future__ import annotations

POINTERS: tuple[str, ...] = (
    "q",  # (B, Hq, Sq, D)
    "k",  # (B, Hkv, Sk, D)
    "v",  # (B, Hkv, Sk, Dv)
    "mask",  # (B, Sk) or (W, Hq|1, Sq|1, Sk) bool, True = may be attended; null without a mask
    "bias",  # (W, Hq|1, Sq, Sk), float; null without a bias
    "scale",  # (Hq,) float32 on the device; null when scale is a constant
    "out",  # (B, Hq, Sq, Dv): written by forward, read by backward
    "lse",  # (B, Hq, Sq) float32 contiguous, natural log; forward: null when nobody wants it
    "dout",  # (B, Hq, Sq, Dv)
    "dlse",  # (B, Hq, Sq) float32 contiguous; null when lse has no gradient
    "dq",  # (B, Hq, Sq, D)
    "dk",  # (B, Hkv, Sk, D)
    "dv",  # (B, Hkv, Sk, Dv)
    "dbias",  # float32, shape of the unbroadcast bias, contiguous; the launch zeroes what it accumulates into
    "dscale",  # (B, Hq, Sq) float32 contiguous: q_hat . sum_j dS_ij k_hat_j of each row; null when not wanted
    "workspace",  # cosattn_workspace_bytes() bytes, 256-byte aligned
)

INTEGERS: tuple[str, ...] = (
    "batch",
    "q_heads",
    "kv_heads",
    "q_len",
    "k_len",
    *(f"{tensor}_{axis}" for tensor in ("q", "k", "v", "out", "dout", "dq", "dk", "dv") for axis in ("b", "h", "s")),
    "mask_b",  # 0 where the mask is broadcast
    "mask_h",
    "mask_q",
    "mask_s",
    "mask_batches",  # W: entry b of the batch reads entry b % W; not for (B, Sk)
    "bias_b",  # 0 where the bias is broadcast
    "bias_h",
    "bias_s",
    "bias_batches",
    "dbias_b",
    "dbias_h",
    "dbias_s",
)

DOUBLES: tuple[str, ...] = ("scale",)
"""The constant scale; ignored when the scale pointer is given."""

POINTERS_FORMAT = f"{len(POINTERS)}Q"
PROBLEM_FORMAT = f"{len(INTEGERS)}q{len(DOUBLES)}d"
"""``struct`` formats, native order."""

# What a built kernel exports (extern "C"):
#   int         cosattn_launch(const Pointers*, const Problem*, void* stream)   0, or a cudaError_t
#   long long   cosattn_workspace_bytes(const Problem*)                         bytes this launch needs
#   const char* cosattn_error_string(int)
#   const char* cosattn_spec_name()
#   int         cosattn_abi_bytes()                                             sizeof(Pointers) + sizeof(Problem)
