// The set of the instruction set that this file is being compiled for (MAINSPRING_ISA).
#include "kernels/kernel_set.h"

#ifdef MAINSPRING_BF16
namespace mainspring::avx512 { void fill_kernel_set(tensor::KernelSet&); }
#endif

namespace mainspring::MAINSPRING_ISA {

void fill_elementwise(tensor::KernelSet&);
void fill_gemm(tensor::KernelSet&);
void fill_rows(tensor::KernelSet&);
void fill_optimizer(tensor::KernelSet&);

void fill_kernel_set(tensor::KernelSet& set) {
#ifdef MAINSPRING_BF16
  avx512::fill_kernel_set(set);  // with bfloat16 instructions only the product differs
#else
  fill_elementwise(set);
  fill_rows(set);
  fill_optimizer(set);
#endif
  fill_gemm(set);
}

}  // namespace mainspring::MAINSPRING_ISA
