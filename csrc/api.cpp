#include "api.h"

#include <cuda_runtime_api.h>

// Hidden visibility is the default of the build; these names are what the library shows.
#pragma GCC visibility push(default)

int tpo_abi_version(void) { return TPO_ABI_VERSION; }

const char* tpo_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#pragma GCC visibility pop
