// mainspring._kernels: every kernel as a function of addresses, strides and counts.
//
// The typed and checked face is mainspring.ops.cpu; nothing else should call this module. Addresses are
// plain integers (0 for null), so that a call costs well under a microsecond. Kernels run without the GIL.
#include <nanobind/nanobind.h>

#include "kernels.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void linear(uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, uintptr_t bias, uintptr_t out,
            int64_t out_stride, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype) {
  const ms_linear_args args = {at<void>(x), x_stride, at<void>(w), w_stride, at<void>(bias), at<void>(out),
                               out_stride, m, n, k, static_cast<ms_dtype>(dtype), static_cast<ms_dtype>(out_dtype)};
  ms_linear(&args);
}

void grouped_linear(uintptr_t x, int64_t x_stride, uintptr_t w, uintptr_t offsets, uintptr_t out,
                    int64_t num_experts, int64_t n, int64_t k, int dtype) {
  const ms_grouped_linear_args args = {at<void>(x), x_stride, at<void>(w), at<int32_t>(offsets), at<void>(out),
                                       num_experts, n, k, static_cast<ms_dtype>(dtype)};
  ms_grouped_linear(&args);
}

void rms_norm(uintptr_t x, int64_t x_outer_stride, int64_t x_inner_stride, uintptr_t residual, uintptr_t weight,
              uintptr_t out, uintptr_t residual_out, int64_t outer, int64_t inner, int64_t h, float eps, int dtype) {
  const ms_rms_norm_args args = {at<void>(x), x_outer_stride, x_inner_stride, at<void>(residual), at<void>(weight),
                                 at<void>(out), at<void>(residual_out), outer, inner, h, eps,
                                 static_cast<ms_dtype>(dtype)};
  ms_rms_norm(&args);
}

void rope_angles(uintptr_t positions, uintptr_t inv_freq, uintptr_t cos, uintptr_t sin, int64_t t, int64_t half,
                 float scale) {
  const ms_rope_angles_args args = {at<int64_t>(positions), at<float>(inv_freq), at<float>(cos), at<float>(sin),
                                    t, half, scale};
  ms_rope_angles(&args);
}

void rope(uintptr_t q, uintptr_t k, int64_t q_stride, int64_t k_stride, uintptr_t cos, uintptr_t sin, int64_t t,
          int64_t q_heads, int64_t k_heads, int64_t half, int dtype) {
  const ms_rope_args args = {at<void>(q), at<void>(k), q_stride, k_stride, at<float>(cos), at<float>(sin),
                             t, q_heads, k_heads, half, static_cast<ms_dtype>(dtype)};
  ms_rope(&args);
}

void swiglu(uintptr_t gate_up, int64_t stride, uintptr_t out, int64_t m, int64_t i, int dtype) {
  const ms_swiglu_args args = {at<void>(gate_up), stride, at<void>(out), m, i, static_cast<ms_dtype>(dtype)};
  ms_swiglu(&args);
}

void write_cache(uintptr_t k, uintptr_t v, int64_t k_stride, int64_t v_stride, uintptr_t slots, uintptr_t k_cache,
                 uintptr_t v_cache, int64_t t, int64_t row, int dtype) {
  const ms_write_cache_args args = {at<void>(k), at<void>(v), k_stride, v_stride, at<int64_t>(slots),
                                    at<void>(k_cache), at<void>(v_cache), t, row, static_cast<ms_dtype>(dtype)};
  ms_write_cache(&args);
}

void attention(uintptr_t q, uintptr_t k, uintptr_t v, int64_t q_stride, int64_t k_stride, int64_t v_stride,
               uintptr_t cu_seqlens, uintptr_t context_lens, uintptr_t block_tables, int64_t table_stride,
               int64_t block_size, uintptr_t out, uintptr_t lse, int64_t num_seqs, int64_t q_heads,
               int64_t kv_heads, int64_t d, int64_t window, float scale, float softcap, int dtype) {
  const ms_attention_args args = {
      at<void>(q), at<void>(k), at<void>(v), q_stride, k_stride, v_stride, at<int32_t>(cu_seqlens),
      at<int32_t>(context_lens), at<int32_t>(block_tables), table_stride, block_size, at<void>(out), at<float>(lse),
      num_seqs, q_heads, kv_heads, d, window, scale, softcap, static_cast<ms_dtype>(dtype)};
  ms_attention(&args);
}

void log_softmax(uintptr_t logits, int64_t stride, uintptr_t targets, uintptr_t lse, uintptr_t log_probs, int64_t m,
                 int64_t v, float temperature) {
  const ms_log_softmax_args args = {at<float>(logits), stride, at<int64_t>(targets), at<float>(lse),
                                    at<float>(log_probs), m, v, temperature};
  ms_log_softmax(&args);
}

void quantised_pack(uintptr_t rows, int64_t row_stride, uintptr_t packed, int64_t n, int64_t k, int type) {
  const ms_quantised_pack_args args = {at<void>(rows), row_stride, at<void>(packed), n, k, static_cast<ms_quantised_type>(type)};
  ms_quantised_pack(&args);
}

int64_t quantised_bytes(int type, int64_t n, int64_t k) { return ms_quantised_bytes(static_cast<ms_quantised_type>(type), n, k); }

void quantised_linear(uintptr_t x, int64_t x_stride, uintptr_t w, uintptr_t bias, uintptr_t out, int64_t out_stride, int64_t m,
                      int64_t n, int64_t k, int type, int dtype, int out_dtype) {
  const ms_quantised_linear_args args = {at<void>(x), x_stride, at<void>(w), at<void>(bias), at<void>(out), out_stride, m, n, k,
                                         static_cast<ms_quantised_type>(type), static_cast<ms_dtype>(dtype),
                                         static_cast<ms_dtype>(out_dtype)};
  ms_quantised_linear(&args);
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "CPU kernels behind addresses; call them through mainspring.ops.cpu.";
  m.attr("FLOAT32") = static_cast<int>(MS_FLOAT32);
  m.attr("BFLOAT16") = static_cast<int>(MS_BFLOAT16);
  m.attr("ATTENTION_CHUNK") = static_cast<int>(MS_ATTENTION_CHUNK);

  const auto no_gil = nb::call_guard<nb::gil_scoped_release>();
  m.def("linear", &linear, no_gil);
  m.def("grouped_linear", &grouped_linear, no_gil);
  m.def("rms_norm", &rms_norm, no_gil);
  m.def("rope_angles", &rope_angles, no_gil);
  m.def("rope", &rope, no_gil);
  m.def("swiglu", &swiglu, no_gil);
  m.def("write_cache", &write_cache, no_gil);
  m.def("attention", &attention, no_gil);
  m.def("log_softmax", &log_softmax, no_gil);
  m.def("quantised_pack", &quantised_pack, no_gil);
  m.def("quantised_bytes", &quantised_bytes);
  m.def("quantised_linear", &quantised_linear, no_gil);

  m.def("isa", &ms_isa, "The instruction set in use: base, avx2, avx512, avx512_vnni or avx512_bf16.");
  m.def("num_threads", &ms_num_threads, "How many threads the kernels use, the caller included.");
  m.def("set_num_threads", &ms_set_num_threads, "count"_a, no_gil, "Sets how many threads the kernels use (>= 1).");
}
