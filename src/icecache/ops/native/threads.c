/* How many threads a calling thread's own loops and matrix products share. */
#include "layer.h"
#include "vector.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

/* The calling thread works alone from here on. Without OpenMP torch has threads of another kind,
 * which this library cannot reach. */
EXPORT void icecache_work_alone(void) {
#if defined(_OPENMP)
    omp_set_num_threads(1);
#endif
}
