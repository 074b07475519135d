// The arguments of a launch, field by field as in cosattn/abi.py. Every field is eight bytes. Strides count elements.
#pragma once
#include <stdint.h>

struct Pointers {
    const void* q;      // (B, Hq, Sq, D)
    const void* k;      // (B, Hkv, Sk, D)
    const void* v;      // (B, Hkv, Sk, Dv)
    const void* mask;   // (B, Sk) bool
    const void* bias;   // (B|1, Hq|1, Sq, Sk)
    const void* scale;  // (Hq,) float32, or null: Problem::scale
    void* out;          // (B, Hq, Sq, Dv)
    void* lse;          // (B, Hq, Sq) float32, or null
    const void* dout;   // (B, Hq, Sq, Dv)
    const void* dlse;   // (B, Hq, Sq) float32, or null
    void* dq;           // (B, Hq, Sq, D)
    void* dk;           // (B, Hkv, Sk, D)
    void* dv;           // (B, Hkv, Sk, Dv)
    void* dbias;        // float32, shape of the unbroadcast bias
    void* dscale;       // (B, Hq, Sq) float32, or null
    void* workspace;    // cosattn_workspace_bytes() bytes
};

struct Stride {
    int64_t b, h, s;
};

struct Problem {
    int64_t batch, q_heads, kv_heads, q_len, k_len;
    Stride q, k, v, out, dout, dq, dk, dv;
    int64_t mask_b, mask_s;
    Stride bias, dbias;
    double scale;
};
