// What one instruction set offers: the same functions, compiled once for each in a namespace of its own.
#pragma once

#include "kernels.h"

namespace mainspring {

struct KernelTable {
  void (*linear)(const ms_linear_args&);
  void (*grouped_linear)(const ms_grouped_linear_args&);
  void (*rms_norm)(const ms_rms_norm_args&);
  void (*rope)(const ms_rope_args&);
  void (*swiglu)(const ms_swiglu_args&);
  void (*attention)(const ms_attention_args&);
  void (*log_softmax)(const ms_log_softmax_args&);
  void (*quantised_linear)(const ms_quantised_linear_args&);
};

namespace base { extern const KernelTable kKernels; }
namespace avx2 { extern const KernelTable kKernels; }
namespace avx512 { extern const KernelTable kKernels; }
namespace avx512_vnni { void quantised_linear(const ms_quantised_linear_args&); }  // the rest is that of avx512
namespace avx512_bf16 { extern const KernelTable kKernels; }

}  // namespace mainspring
