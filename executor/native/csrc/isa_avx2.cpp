#include "kernels.h"

#if defined(__x86_64__)
// after the standard headers: what is inline in them must stay fit for every machine
#pragma GCC target("avx2,fma,f16c")
#define PAGEWIRE_AVX2
#define NAME avx2
#include "isa.inc"
#endif
