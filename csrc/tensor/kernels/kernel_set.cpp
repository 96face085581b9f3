// The set of the instruction set that this file is being compiled for (MAINSPRING_ISA).
#include "kernels/kernel_set.h"

namespace mainspring::MAINSPRING_ISA {

void fill_elementwise(tensor::KernelSet&);
void fill_gemm(tensor::KernelSet&);
void fill_rows(tensor::KernelSet&);
void fill_optimizer(tensor::KernelSet&);

void fill_kernel_set(tensor::KernelSet& set) {
  fill_elementwise(set);
  fill_gemm(set);
  fill_rows(set);
  fill_optimizer(set);
}

}  // namespace mainspring::MAINSPRING_ISA
