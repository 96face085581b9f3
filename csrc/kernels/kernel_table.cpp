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

extern const KernelTable kKernels = {linear, grouped_linear, rms_norm, rope, swiglu, attention, log_softmax};

}  // namespace mainspring::MAINSPRING_ISA
