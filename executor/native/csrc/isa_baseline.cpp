#include "kernels.h"

#define NAME baseline
#include "isa.inc"
