// Tensor maps on the host: what the copy engine is told about a tensor in device memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace mainspring {

// The driver's encoder, found at run time so that nothing links against the driver.
inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, int rank, void* address,
                                  const uint64_t* sizes, const uint64_t* strides_bytes, const uint32_t* box,
                                  CUtensorMapSwizzle swizzle) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return CUDA_ERROR_NOT_SUPPORTED;
  // The encoder wants a current context. A thread that has not called the runtime yet, such as autograd's at the first
  // gradient, has none; setting the device it already has makes it current.
  static thread_local const cudaError_t context = [] {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error == cudaSuccess ? cudaSetDevice(device) : error;
  }();
  if (context != cudaSuccess) return CUDA_ERROR_INVALID_CONTEXT;
  const uint32_t ones[5] = {1, 1, 1, 1, 1};
  return encode(map, type, rank, address, sizes, strides_bytes, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// A tensor of `rank` dimensions, innermost first. sizes: in elements; strides: of dimensions 1.., in bytes (multiples of
// 16); box: the tile of one copy. With a swizzle of 128 bytes the box's innermost row is at most 128 bytes.
inline bool make_tensor_map(CUtensorMap* map, CUtensorMapDataType type, int rank, const void* address,
                            const uint64_t* sizes, const uint64_t* strides_bytes, const uint32_t* box,
                            CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  return encode_tensor_map(map, type, rank, const_cast<void*>(address), sizes, strides_bytes, box, swizzle) ==
         CUDA_SUCCESS;
}

}  // namespace mainspring

// The text of an error code that a launcher of this library returned. (A library is one source file.)
extern "C" const char* mainspring_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
