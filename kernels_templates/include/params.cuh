// The arguments of a launch, field by field as in cosattn/abi.py. Every field is eight bytes. Strides count elements.
#pragma once
#include <stdint.h>

struct Pointers {
    const void* q;      // (B, Hq, Sq, D)
    const void* k;      // (B, Hkv, Sk, D)
    const void* v;      // (B, Hkv, Sk, Dv)
    const void* mask;   // (B, Sk) or (W, Hq|1, Sq|1, Sk) bool
    const void* bias;   // (W, Hq|1, Sq, Sk)
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
    int64_t mask_b, mask_h, mask_q, mask_s, mask_batches;
    Stride bias;
    int64_t bias_batches;
    Stride dbias;
    double scale;
};

// Entry b of the batch reads entry b % W of a bias or of a mask over queries and keys: the place of (query 0, key 0).
template <class Bias>
__device__ __forceinline__ const Bias* bias_of(const Pointers& p, const Problem& n, int b, int h) {
    return static_cast<const Bias*>(p.bias) + unsigned(b) % unsigned(n.bias_batches) * n.bias.b + h * n.bias.h;
}
__device__ __forceinline__ const unsigned char* pair_mask_of(const Pointers& p, const Problem& n, int b, int h) {
    return static_cast<const unsigned char*>(p.mask) + unsigned(b) % unsigned(n.mask_batches) * n.mask_b + h * n.mask_h;
}
