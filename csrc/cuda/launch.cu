// The host half: the library's C functions, which choose a launch and start the kernels of sample.cu and
// history.cu.
// tests/kernels/cuda_emulation/ has a host half of its own.
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include "../llm_sampling.h"
#include "../validate.h"
#include "launch.cuh"

namespace llm_sampling {
namespace {

constexpr int32_t kFirstCudaError = 1000;  // return codes from here on are CUDA's
constexpr int kFirstMajor = 8;             // the oldest compute capability that setup.py builds for

int32_t code_of_cuda(cudaError_t error) {
  return error == cudaSuccess ? LLM_SAMPLING_OK : kFirstCudaError + static_cast<int32_t>(error);
}

// Describes the calling thread's current device.
cudaError_t find_device(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  int major = 0;
  int minor = 0;
  const auto attribute = [&](int& value, cudaDeviceAttr which) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, index);
  };
  attribute(major, cudaDevAttrComputeCapabilityMajor);
  attribute(minor, cudaDevAttrComputeCapabilityMinor);
  attribute(device.processors, cudaDevAttrMultiProcessorCount);
  attribute(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.capability = 10 * major + minor;
  return error;
}

// Success if this library has code for one of the devices.
cudaError_t find_usable() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return error;
  for (int device = 0; device < devices; ++device) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (major >= kFirstMajor) return cudaSuccess;
  }
  return cudaErrorNoKernelImageForDevice;
}

cudaError_t start(const Plan& plan, const Launch& launch, cudaStream_t stream) {
  const SampleKernel kernel = find_kernel(plan.args.dtype, launch.copied);
  const cudaError_t error = cudaFuncSetAttribute(
      kernel,
      cudaFuncAttributeMaxDynamicSharedMemorySize,
      launch.shared_bytes
  );
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(launch.blocks);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.args.rows * launch.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = launch.blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, plan);
}

int32_t run(const LlmSamplingArgs& args, cudaStream_t stream) {
  // The kernel of one row does not know whether all rows are valid.
  if (args.advance == LLM_SAMPLING_ADVANCE_IF_ALL_VALID) return LLM_SAMPLING_BAD_OPTION;
  const int32_t code = check_struct(args);
  if (code != LLM_SAMPLING_OK || args.rows == 0) return code;
  Device device = {};
  const cudaError_t error = find_device(device);
  if (error != cudaSuccess) return code_of_cuda(error);
  const int logit_bytes = args.dtype == LLM_SAMPLING_FLOAT32 ? 4 : 2;
  const Launch launch = choose_launch(args.rows, args.vocab_size, logit_bytes, device);
  if (args.rows > INT32_MAX / launch.blocks) return LLM_SAMPLING_BAD_SIZE;
  return code_of_cuda(start({args, launch.vecs}, launch, stream));
}

int32_t update(const LlmSamplingUpdate& update, cudaStream_t stream) {
  const int32_t code = check_update(update);
  if (code != LLM_SAMPLING_OK || update.rows == 0) return code;
  if (update.rows > INT32_MAX) return LLM_SAMPLING_BAD_SIZE;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(update.rows));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kUpdateBytes;
  config.stream = stream;
  return code_of_cuda(cudaLaunchKernelEx(&config, find_update_kernel(), update));
}

}  // namespace
}  // namespace llm_sampling

extern "C" {

__attribute__((visibility("default"))) int32_t
llm_sampling_cuda(const LlmSamplingArgs* args, void* stream) {
  LlmSamplingArgs own = {};
  const int32_t code = llm_sampling::read_struct(args, own);
  if (code != LLM_SAMPLING_OK) return code;
  return llm_sampling::run(own, static_cast<cudaStream_t>(stream));
}

__attribute__((visibility("default"))) int32_t
llm_sampling_cuda_update(const LlmSamplingUpdate* update, void* stream) {
  LlmSamplingUpdate own = {};
  const int32_t code = llm_sampling::read_struct(update, own);
  if (code != LLM_SAMPLING_OK) return code;
  return llm_sampling::update(own, static_cast<cudaStream_t>(stream));
}

__attribute__((visibility("default"))) int32_t llm_sampling_cuda_usable(void) {
  return llm_sampling::code_of_cuda(llm_sampling::find_usable());
}

__attribute__((visibility("default"))) uint32_t llm_sampling_abi_version(void) {
  return LLM_SAMPLING_ABI_VERSION;
}

__attribute__((visibility("default"))) uint32_t llm_sampling_args_size(void) {
  return sizeof(LlmSamplingArgs);
}

__attribute__((visibility("default"))) uint32_t llm_sampling_update_size(void) {
  return sizeof(LlmSamplingUpdate);
}

__attribute__((visibility("default"))) const char* llm_sampling_error(int32_t code) {
  using namespace llm_sampling;
  if (code < kFirstCudaError) return error_text(code);
  return cudaGetErrorString(static_cast<cudaError_t>(code - kFirstCudaError));
}

}  // extern "C"
