// AMX instructions as functions over tile numbers. Assembly, because GCC 12's intrinsics do not tell the
// compiler that a tile load reads memory, and its _tile_loadconfig names only 8 of the 64 bytes.
#pragma once
#include "mill.h"

namespace mill::MILL_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void tile_configure(const TileConfig& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
inline void tile_release() { asm volatile("tilerelease"); }

template <int T> inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> inline void tile_load(const void* p, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> inline void tile_store(void* p, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// C += A (signed bytes) * B (unsigned bytes).
template <int C, int A, int B> inline void tile_dot_su() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace mill::MILL_ISA
