// The C interface of Mainspring's CPU kernels: the only header that code outside csrc/kernels includes.
//
// Canonical order: every output element's bits depend only on its own row's data, the fixed constants
// below and the instruction set; never on the number of rows, on the row's place in the batch, on the
// number of threads, on prefill or decode, on packed or paged keys.
//
// Conventions: arithmetic inside is float32; a bfloat16 result is rounded once, to nearest even, unless
// said otherwise. Strides count elements. Arguments are trusted: the caller checks shapes and dtypes.
// Outputs never overlap inputs, except where "in place" is said. Any count may be 0.
#ifndef MAINSPRING_KERNELS_H
#define MAINSPRING_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { MS_FLOAT32 = 0, MS_BFLOAT16 = 1 } ms_dtype;

// Keys are reduced in chunks of this many, aligned at position 0 of the sequence.
enum { MS_ATTENTION_CHUNK = 256 };

// out[m, n] = sum_k x[m, k] w[n, k] + bias[n]
typedef struct {
  const void* x;        // [m, k]
  int64_t x_stride;     // between rows
  const void* w;        // [n, k]
  int64_t w_stride;     // between rows
  const void* bias;     // [n] in `dtype`, or null
  void* out;            // [m, n] in `out_dtype`
  int64_t out_stride;   // between rows
  int64_t m, n, k;
  ms_dtype dtype;       // of x, w and bias
  ms_dtype out_dtype;   // `dtype` or MS_FLOAT32
} ms_linear_args;
void ms_linear(const ms_linear_args* args);

// GGML's types of blocks of 32 weights (its specification of GGUF names them).
typedef enum { MS_Q4_0 = 0, MS_Q4_1 = 1, MS_Q8_0 = 2 } ms_quantised_type;

// Weights in the layout of a file to the layout that ms_quantised_linear reads: ms_quantised_bytes() of them.
typedef struct {
  const void* rows;    // [n], each k / 32 blocks of the file
  int64_t row_stride;  // in bytes
  void* packed;
  int64_t n, k;        // k: a multiple of 32
  ms_quantised_type type;
} ms_quantised_pack_args;
void ms_quantised_pack(const ms_quantised_pack_args* args);
int64_t ms_quantised_bytes(ms_quantised_type type, int64_t n, int64_t k);

// out[m, n] = sum_k x[m, k] w[n, k] + bias[n] with x rounded to int8 in blocks of 32, d = max|x| / 127.
typedef struct {
  const void* x;        // [m, k]
  int64_t x_stride;     // between rows
  const void* w;        // packed
  const void* bias;     // [n] in `dtype`, or null
  void* out;            // [m, n] in `out_dtype`
  int64_t out_stride;   // between rows
  int64_t m, n, k;      // k: a multiple of 32
  ms_quantised_type type;
  ms_dtype dtype;       // of x and bias
  ms_dtype out_dtype;   // `dtype` or MS_FLOAT32
} ms_quantised_linear_args;
void ms_quantised_linear(const ms_quantised_linear_args* args);

// Rows offsets[e] <= r < offsets[e + 1] of x are multiplied with w[e]; bits equal those of ms_linear.
typedef struct {
  const void* x;           // [r, k]
  int64_t x_stride;
  const void* w;           // [e, n, k], contiguous
  const int32_t* offsets;  // [e + 1], non-decreasing
  void* out;               // [r, n] in `dtype`, contiguous
  int64_t num_experts, n, k;
  ms_dtype dtype;
} ms_grouped_linear_args;
void ms_grouped_linear(const ms_grouped_linear_args* args);

// sum = x + residual, rounded (only with a residual); out = round(round(v rsqrt(mean(v^2) + eps)) * weight),
// v being sum or x. Rows are indexed [outer, inner], so that the heads of a strided [T, heads, D] view are rows.
typedef struct {
  const void* x;                              // [outer, inner, h]
  int64_t x_outer_stride, x_inner_stride;
  const void* residual;                       // [outer * inner, h] contiguous, or null
  const void* weight;                         // [h]
  void* out;                                  // [outer * inner, h] contiguous
  void* residual_out;                         // the sum, contiguous; null without a residual
  int64_t outer, inner, h;
  float eps;
  ms_dtype dtype;
} ms_rms_norm_args;
void ms_rms_norm(const ms_rms_norm_args* args);

// angle = float32(position) * inv_freq; cos = scale cos(angle), sin = scale sin(angle).
typedef struct {
  const int64_t* positions;  // [t]
  const float* inv_freq;     // [half]
  float* cos;                // [t, half]
  float* sin;                // [t, half]
  int64_t t, half;
  float scale;
} ms_rope_angles_args;
void ms_rope_angles(const ms_rope_angles_args* args);

// In place on q and k, with x = (x1, x2) split in halves: (x1 cos - x2 sin, x2 cos + x1 sin).
typedef struct {
  void* q;                            // [t, q_heads, 2 half]; heads are contiguous
  void* k;                            // [t, k_heads, 2 half], or null with k_heads = 0
  int64_t q_stride, k_stride;         // between tokens
  const float* cos;                   // [t, half]
  const float* sin;                   // [t, half]
  int64_t t, q_heads, k_heads, half;
  ms_dtype dtype;
} ms_rope_args;
void ms_rope(const ms_rope_args* args);

// out = silu(gate) * up, where a row of gate_up is (gate, up).
typedef struct {
  const void* gate_up;  // [m, 2 * i]
  int64_t stride;       // between rows
  void* out;            // [m, i], contiguous
  int64_t m, i;
  ms_dtype dtype;
} ms_swiglu_args;
void ms_swiglu(const ms_swiglu_args* args);

// cache[slots[t]] = key or value of token t; a negative slot skips the token.
typedef struct {
  const void* k;               // [t, row]; row = kv_heads * head_dim
  const void* v;
  int64_t k_stride, v_stride;  // between tokens
  const int64_t* slots;        // [t]
  void* k_cache;               // [num_slots, row], contiguous
  void* v_cache;
  int64_t t, row;
  ms_dtype dtype;
} ms_write_cache_args;
void ms_write_cache(const ms_write_cache_args* args);

// Causal attention over ragged sequences. Query i of the n queries of sequence s stands at position
// p = context_lens[s] - n + i and sees the keys j <= p with j > p - window (window 0: all of them).
// q, k and v must be finite. A query that sees no key gives 0 (and lse -inf).
typedef struct {
  const void* q;                   // [t, q_heads, d]; heads are contiguous
  const void* k;                   // packed: [t, kv_heads, d], sequence s at rows cu_seqlens[s]..;
  const void* v;                   // paged: [num_blocks, block_size, kv_heads, d]
  int64_t q_stride;                // between tokens
  int64_t k_stride, v_stride;      // between tokens; paged: between slots
  const int32_t* cu_seqlens;       // [s + 1]
  const int32_t* context_lens;     // [s]
  const int32_t* block_tables;     // [s, table_stride], or null when packed
  int64_t table_stride, block_size;
  void* out;                       // [t, q_heads, d], contiguous
  float* lse;                      // [t, q_heads] natural logarithm, or null
  int64_t num_seqs, q_heads, kv_heads, d;  // d: a multiple of 8, at most 256
  int64_t window;                  // 0: none
  float scale;
  float softcap;                   // 0: none; else scores become softcap * tanh(score / softcap)
  ms_dtype dtype;
} ms_attention_args;
void ms_attention(const ms_attention_args* args);

// lse[m] = logsumexp(logits[m] / temperature), and, with targets,
// log_probs[m] = logits[m, targets[m]] / temperature - lse[m].
typedef struct {
  const float* logits;     // [m, v]
  int64_t stride;          // between rows
  const int64_t* targets;  // [m], or null
  float* lse;              // [m], or null
  float* log_probs;        // [m]; null without targets
  int64_t m, v;
  float temperature;       // > 0
} ms_log_softmax_args;
void ms_log_softmax(const ms_log_softmax_args* args);

// The chosen instruction set: "base", "avx2", "avx512", "avx512_vnni" or "avx512_bf16". The environment variable
// MAINSPRING_CPU_ISA lowers it, read once at first use.
const char* ms_isa(void);

int ms_num_threads(void);
void ms_set_num_threads(int count);  // >= 1

#ifdef __cplusplus
}
#endif
#endif
