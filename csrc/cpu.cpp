// Which instruction sets this processor, and this kernel, can run.
#include <cstring>
#include "mill.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace mill {

#if defined(__x86_64__)
namespace {

// The operating system must give a process the tile registers before the first tile instruction.
bool amx_permitted() {
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  static const bool ok = syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
  return ok;
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1, int8 = d >> 25 & 1, bf16 = d >> 22 & 1;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool vector_bf16 = a >> 5 & 1;
  return tile && int8 && bf16 && vector_bf16 && amx_permitted();
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

}  // namespace
#elif defined(__aarch64__)
namespace {

bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple processor of this kind
#endif
}

}  // namespace
#endif

int detect_isas(const char** names) {
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Asked once: in a virtual machine each question costs many microseconds.
  static const bool avx2 = has_avx2(), wide = has_avx512() && avx2, amx = wide && has_amx(),
                    avxvnni = avx2 && has_avx_vnni();
  if (amx) names[n++] = "amx";
  if (wide) names[n++] = "avx512";
  if (avxvnni) names[n++] = "avxvnni";
  if (avx2) names[n++] = "avx2";
#elif defined(__aarch64__)
  if (has_dot_product()) names[n++] = "neon";
#endif
  names[n++] = "portable";
  return n;
}

const Kernels* find_kernels(const char* name) {
  const char* names[8];
  const int n = detect_isas(names);
  bool available = false;
  for (int i = 0; i < n; i++) available = available || !strcmp(names[i], name);
  if (!available) return nullptr;
#if defined(__x86_64__)
  if (!strcmp(name, "amx")) return kernels_amx();
  if (!strcmp(name, "avx512")) return kernels_avx512();
  if (!strcmp(name, "avxvnni")) return kernels_avxvnni();
  if (!strcmp(name, "avx2")) return kernels_avx2();
#elif defined(__aarch64__)
  if (!strcmp(name, "neon")) return kernels_neon();
#endif
  return kernels_portable();
}

}  // namespace mill
