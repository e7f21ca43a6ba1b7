// Loading and launching the kernels of the sentinel protocol, of which there is one for each element and world size.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

namespace tpo {

// Onto the current device. CUDA would else load a kernel at its first launch, which may wait for those that run.
template <typename Args>
cudaError_t load(std::initializer_list<void (*)(Args)> kernels) {
  cudaFuncAttributes attributes;  // asking for them loads the kernel
  for (const auto kernel : kernels) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// ahead: the kernel may begin while the one before it on the stream still runs, and waits by itself.
template <typename Args>
cudaError_t launch_ahead(void (*kernel)(Args), int blocks, int threads, bool ahead, const Args& args,
                         void* cuda_stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(cuda_stream);
  config.attrs = &attribute;
  config.numAttrs = ahead ? 1 : 0;
  void* parameters[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters);
}

}  // namespace tpo
