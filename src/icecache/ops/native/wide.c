/* Products by AVX-512 or by AVX2; products.c and distances.c have loops for all else. */
#include "wide.h"

#include <string.h>

#include "vector.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include "wide16.h"
#include "wide8.h"

#define WIDE_JOIN(a, b) a##b
#define WIDE_NAME(a, b) WIDE_JOIN(a, b)

/* Call f with a number of heads that the compiler knows. */
#define BY_HEADS(heads, f, ...)          \
    switch (heads) {                     \
    case 1: f(1, __VA_ARGS__); break;    \
    case 2: f(2, __VA_ARGS__); break;    \
    case 3: f(3, __VA_ARGS__); break;    \
    default: f(4, __VA_ARGS__);          \
    }

#define NUM_LANES 8
#include "wide_body.h"

#define NUM_LANES 16
#include "wide_body.h"

const Wide *icecache_wide(int64_t dim) {
    static const Wide of_8 = {dot_8, add_all_8, distances_8};
    static const Wide of_16 = {dot_16, add_all_16, distances_16};
    __builtin_cpu_init();
    if (dim % 16 == 0 && __builtin_cpu_supports("avx512f")) return &of_16;
    int has_8 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return dim % 8 == 0 && has_8 ? &of_8 : 0;
}
#else
const Wide *icecache_wide(int64_t dim) {
    (void)dim;
    return 0;
}
#endif
