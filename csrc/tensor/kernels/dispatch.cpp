#include <cstring>

#include "kernels.h"
#include "kernels/kernel_set.h"

namespace mainspring {

namespace base { void fill_kernel_set(tensor::KernelSet&); }
#ifdef MAINSPRING_X86
namespace avx2 { void fill_kernel_set(tensor::KernelSet&); }
namespace avx512 { void fill_kernel_set(tensor::KernelSet&); }
namespace avx512_bf16 { void fill_kernel_set(tensor::KernelSet&); }
#endif

namespace tensor {
namespace {

void fill(KernelSet& set) {
  const char* isa = ms_isa();
#ifdef MAINSPRING_X86
  if (std::strcmp(isa, "avx512_bf16") == 0) return avx512_bf16::fill_kernel_set(set);
  if (std::strncmp(isa, "avx512", 6) == 0) return avx512::fill_kernel_set(set);
  if (std::strcmp(isa, "avx2") == 0) return avx2::fill_kernel_set(set);
#endif
  (void)isa;
  base::fill_kernel_set(set);
}

KernelSet choose() {
  KernelSet set = {};
  fill(set);
  fill_scalar(set);
  fill_half(set);
  return set;
}

}  // namespace

const KernelSet& kernels() {
  static const KernelSet set = choose();
  return set;
}

}  // namespace tensor
}  // namespace mainspring
