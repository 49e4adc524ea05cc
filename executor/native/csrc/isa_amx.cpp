#include "kernels.h"

#if defined(PAGEWIRE_KNOWS_AMX)
// after the standard headers: what is inline in them must stay fit for every machine
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c,amx-tile,amx-bf16")
#define PAGEWIRE_AVX512  // the pragma does not define the macros that a flag would
#define PAGEWIRE_AMX
#define NAME amx
#include "isa.inc"
#endif
