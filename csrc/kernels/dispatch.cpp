// Chooses the instruction set once, at first use, and forwards the C interface to its kernels.
#include <cstdlib>
#include <cstring>

#include "kernel_table.h"
#include "thread_pool.h"

namespace mainspring {
namespace {

struct Choice {
  const char* name;
  const KernelTable* kernels;
};

// From the least to the most capable; the processor must support every one before its choice.
int supported_level() {
#ifdef MAINSPRING_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return 1;
  if (!__builtin_cpu_supports("avx512vnni")) return 2;
  return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
#else
  return 0;
#endif
}

#ifdef MAINSPRING_X86
const KernelTable& with_vnni() {
  static const KernelTable table = [] {
    KernelTable t = avx512::kKernels;
    t.quantised_linear = avx512_vnni::quantised_linear;
    return t;
  }();
  return table;
}
#endif

Choice choose() {
  static const Choice choices[] = {
      {"base", &base::kKernels},
#ifdef MAINSPRING_X86
      {"avx2", &avx2::kKernels},
      {"avx512", &avx512::kKernels},
      {"avx512_vnni", &with_vnni()},
      {"avx512_bf16", &avx512_bf16::kKernels},
#endif
  };
  int level = supported_level();
  // The variable can only lower the level; a name that is unknown or too high changes nothing.
  if (const char* wish = std::getenv("MAINSPRING_CPU_ISA"))
    for (int i = 0; i < level; ++i)
      if (std::strcmp(wish, choices[i].name) == 0) level = i;
  return choices[level];
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace
}  // namespace mainspring

using mainspring::chosen;

void ms_linear(const ms_linear_args* args) { chosen().kernels->linear(*args); }
void ms_grouped_linear(const ms_grouped_linear_args* args) { chosen().kernels->grouped_linear(*args); }
void ms_rms_norm(const ms_rms_norm_args* args) { chosen().kernels->rms_norm(*args); }
void ms_rope(const ms_rope_args* args) { chosen().kernels->rope(*args); }
void ms_swiglu(const ms_swiglu_args* args) { chosen().kernels->swiglu(*args); }
void ms_attention(const ms_attention_args* args) { chosen().kernels->attention(*args); }
void ms_log_softmax(const ms_log_softmax_args* args) { chosen().kernels->log_softmax(*args); }
void ms_quantised_linear(const ms_quantised_linear_args* args) { chosen().kernels->quantised_linear(*args); }

const char* ms_isa(void) { return chosen().name; }
int ms_num_threads(void) { return mainspring::num_threads(); }
void ms_set_num_threads(int count) { mainspring::set_num_threads(count); }
