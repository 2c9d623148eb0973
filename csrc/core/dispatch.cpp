// Which instruction set runs, and how large the caches are: found once, when first asked.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace batchnorm {
namespace {

struct InstructionSet {
  const char* name;
  const KernelTable* table;  // null where this machine lacks it
};

// Best first.
const InstructionSet* instruction_sets(int* count) {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
#ifndef BATCHNORM_WITHOUT_AVX512
      {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
                     ? kernels_avx512()
                     : nullptr},
#endif
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
                   ? kernels_avx2()
                   : nullptr},
#elif defined(__aarch64__)
      {"neon", kernels_neon()},
#endif
      {"baseline", kernels_baseline()},
  };
  *count = int(sizeof(sets) / sizeof(sets[0]));
  return sets;
}

const InstructionSet*& current() {
  static const InstructionSet* chosen = [] {
    int count;
    const InstructionSet* sets = instruction_sets(&count);
    while (!sets->table) ++sets;
    return sets;
  }();
  return chosen;
}

int64_t cache_size(int index, int64_t otherwise) {
  char path[96], text[32] = {};
  std::snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
  std::FILE* file = std::fopen(path, "r");
  if (!file) return otherwise;
  const size_t read = std::fread(text, 1, sizeof(text) - 1, file);
  std::fclose(file);
  char* unit = text;
  const int64_t size = read ? std::strtoll(text, &unit, 10) : 0;
  if (size <= 0) return otherwise;
  return size << (*unit == 'K' ? 10 : *unit == 'M' ? 20 : 0);
}

}  // namespace

const KernelTable& kernel_table() { return *current()->table; }

const char* instruction_set() { return current()->name; }

bool select_instruction_set(const char* name) {
  int count;
  const InstructionSet* sets = instruction_sets(&count);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(sets[i].name, name) != 0 || !sets[i].table) continue;
    current() = &sets[i];
    return true;
  }
  return false;
}

const Caches& caches() {
  // index0 and index1 are the first level's data and instructions.
  static const Caches sizes{cache_size(0, 32 << 10), cache_size(2, 1 << 20), cache_size(3, 8 << 20)};
  return sizes;
}

}  // namespace batchnorm
