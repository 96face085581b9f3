// The table of the instruction set that this file is being compiled for (MAINSPRING_ISA).
#include "kernel_table.h"

namespace mainspring::MAINSPRING_ISA {

void linear(const ms_linear_args&);
void grouped_linear(const ms_grouped_linear_args&);
void rms_norm(const ms_rms_norm_args&);
void rope(const ms_rope_args&);
void swiglu(const ms_swiglu_args&);
void attention(const ms_attention_args&);
void log_softmax(const ms_log_softmax_args&);
#ifdef MAINSPRING_BF16
using avx512_vnni::quantised_linear;  // every processor with bfloat16 instructions has those for int8
#else
void quantised_linear(const ms_quantised_linear_args&);
#endif

extern const KernelTable kKernels = {linear, grouped_linear, rms_norm, rope, swiglu, attention, log_softmax, quantised_linear};

}  // namespace mainspring::MAINSPRING_ISA
