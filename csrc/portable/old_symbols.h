// Included before every source: names the first version of a function of glibc whose newest one is younger than 2.28.
#pragma once

#if defined(__linux__)
#include <features.h>
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp,exp@GLIBC_2.17");
#endif
#endif
