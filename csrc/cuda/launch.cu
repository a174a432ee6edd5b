// The host half: the library's C functions, which choose a launch and start the kernels of sample.cu, history.cu
// and rules.cu.
// tests/kernels/cuda_emulation/ has a host half of its own.
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include <atomic>

#include "../llm_sampling.h"
#include "../validate.h"
#include "launch.cuh"

namespace llm_sampling {
namespace {

constexpr int32_t kFirstCudaError = 1000;  // return codes from here on are CUDA's
constexpr int kFirstMajor = 8;             // of the oldest device that setup.py builds PTX for
constexpr int kFirstWithClusters = 90;     // of the oldest architecture with clusters
constexpr int kRemembered = 64;            // devices for which facts are kept
constexpr int kDtypes = 3;

int32_t code_of_cuda(cudaError_t error) {
  return error == cudaSuccess ? LLM_SAMPLING_OK : kFirstCudaError + static_cast<int32_t>(error);
}

// Success if this library has code for a device. There is PTX for kFirstMajor, from which a driver compiles for
// any later device.
cudaError_t find_usable(int index) {
  int major = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error != cudaSuccess || major >= kFirstMajor) return error;
  return cudaErrorNoKernelImageForDevice;
}

// Describes the calling thread's current device; most_blocks is left to find_launch().
cudaError_t find_device(int& index, Device& device) {
  cudaError_t error = cudaGetDevice(&index);
  const auto attribute = [&](int& value, cudaDeviceAttr which) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, index);
  };
  attribute(device.processors, cudaDevAttrMultiProcessorCount);
  attribute(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return error;
}

// Lets a kernel have all shared memory of the device, and finds whether its code was compiled for an architecture
// with clusters: a library of an old compiler has only older code for a new device. Both happen once for a kernel
// and a device. The limit of shared memory belongs to the kernel and not to a launch, so it must not depend on
// the launch: another thread may set it before this one launches.
cudaError_t make_ready(
    SampleKernel kernel,
    int number,
    int index,
    const Device& device,
    bool& clusters
) {
  enum { kUnknown, kWithout, kWith };
  static std::atomic<int> known[kRemembered][kDtypes * kLayouts * kCalls];
  const bool is_remembered = index < kRemembered;
  int state = is_remembered ? known[index][number].load(std::memory_order_acquire) : kUnknown;
  if (state == kUnknown) {
    cudaFuncAttributes attributes = {};
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(
        kernel,
        cudaFuncAttributeMaxDynamicSharedMemorySize,
        device.shared_bytes - static_cast<int>(attributes.sharedSizeBytes)
    );
    if (error != cudaSuccess) return error;
    state = attributes.ptxVersion >= kFirstWithClusters ? kWith : kWithout;
    if (is_remembered) known[index][number].store(state, std::memory_order_release);
  }
  clusters = state == kWith;
  return cudaSuccess;
}

// A launch as CUDA describes it.
struct Config {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  Config(const Launch& launch, int64_t rows, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(launch.blocks);
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    const auto blocks = static_cast<unsigned>(launch.blocks);
    const auto all = static_cast<unsigned>(rows);
    config.gridDim = launch.is_split ? dim3(blocks, all) : dim3(all * blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = launch.blocks > 1 && !launch.is_split ? 1 : 0;
  }
  Config(const Config&) = delete;
};

// Whether a cluster of this launch can be placed: a partition of the device may have no room for one. The last
// answer of each thread is remembered.
cudaError_t can_place(
    SampleKernel kernel,
    const Launch& launch,
    int index,
    cudaStream_t stream,
    bool& can
) {
  struct Asked {
    SampleKernel kernel;
    int index, blocks, shared_bytes;
    cudaStream_t stream;
    bool can;
  };
  static thread_local Asked last = {};
  if (last.kernel != kernel || last.index != index || last.blocks != launch.blocks ||
      last.shared_bytes != launch.shared_bytes || last.stream != stream) {
    const Config config(launch, 1, stream);
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config.config);
    if (error == cudaErrorInvalidClusterSize) clusters = 0;
    if (error != cudaSuccess && error != cudaErrorInvalidClusterSize) return error;
    last = {kernel, index, launch.blocks, launch.shared_bytes, stream, clusters > 0};
  }
  can = last.can;
  return cudaSuccess;
}

// Chooses a launch that the current device can start, and its kernel.
cudaError_t find_launch(
    int64_t rows,
    int64_t vocab_size,
    int32_t dtype,
    bool has_workspace,
    Calls calls,
    cudaStream_t stream,
    Launch& launch,
    SampleKernel& kernel
) {
  int index = 0;
  Device device = {};
  cudaError_t error = find_device(index, device);
  if (error != cudaSuccess) return error;
  const int logit_bytes = dtype == LLM_SAMPLING_FLOAT32 ? 4 : 2;
  device.most_blocks = kMaxBlocks;
  bool splits = false;
  while (true) {
    launch = choose_launch(rows, vocab_size, logit_bytes, splits, device);
    const Layout layout = layout_of(launch);
    kernel = find_kernel(dtype, layout, calls);
    bool clusters = false;
    const int number =
        kCalls * (kLayouts * dtype + static_cast<int>(layout)) + static_cast<int>(calls);
    error = make_ready(kernel, number, index, device, clusters);
    if (error != cudaSuccess) return error;
    if (device.most_blocks == 1) return cudaSuccess;
    if (!clusters) {
      splits = has_workspace;  // the kernel for split rows is empty in code that knows clusters
      device.most_blocks = 1;
      continue;
    }
    if (launch.blocks == 1) return cudaSuccess;
    bool can = false;
    error = can_place(kernel, launch, index, stream, can);
    if (error != cudaSuccess || can) return error;
    device.most_blocks = launch.blocks / 2;
  }
}

// Makes the lists of step 5a; there are no more rows than blocks.
cudaError_t make_lists(const LlmSamplingArgs& args, cudaStream_t stream) {
  const ListPlan plan = list_plan_of(args);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.rows));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(list_bytes(plan));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, find_list_kernel(), plan);
}

int32_t run(const LlmSamplingArgs& args, cudaStream_t stream) {
  // The kernel of one row does not know whether all rows are valid.
  if (args.advance == LLM_SAMPLING_ADVANCE_IF_ALL_VALID) return LLM_SAMPLING_BAD_OPTION;
  int32_t code = check_struct(args);
  if (code == LLM_SAMPLING_OK && args.dry_multiplier != nullptr) code = check_lists(args);
  if (code != LLM_SAMPLING_OK || args.rows == 0) return code;
  Launch launch = {};
  SampleKernel kernel = nullptr;
  const cudaError_t error = find_launch(
      args.rows,
      args.vocab_size,
      args.dtype,
      can_split(args),
      calls_of(args),
      stream,
      launch,
      kernel
  );
  if (error != cudaSuccess) return code_of_cuda(error);
  if (args.rows > INT32_MAX / launch.blocks) return LLM_SAMPLING_BAD_SIZE;
  if (launch.is_split && args.workspace_bytes < workspace_bytes(args.rows, launch.blocks)) {
    return LLM_SAMPLING_BAD_SIZE;
  }
  if (args.dry_multiplier != nullptr) {
    const cudaError_t failure = make_lists(args, stream);
    if (failure != cudaSuccess) return code_of_cuda(failure);
  }
  const Config config(launch, args.rows, stream);
  return code_of_cuda(cudaLaunchKernelEx(&config.config, kernel, plan_of(args, launch)));
}

// The launch of a call of this size that has a workspace.
int32_t find_launch_of(int64_t rows, int64_t vocab_size, int32_t dtype, Launch& launch) {
  if (rows < 0 || vocab_size < 1 || vocab_size > LLM_SAMPLING_MAX_VOCAB_SIZE) {
    return LLM_SAMPLING_BAD_SIZE;
  }
  if (dtype < LLM_SAMPLING_FLOAT32 || dtype > LLM_SAMPLING_BFLOAT16) return LLM_SAMPLING_BAD_OPTION;
  SampleKernel kernel = nullptr;
  return code_of_cuda(
      find_launch(rows, vocab_size, dtype, true, Calls::kUsual, nullptr, launch, kernel)
  );
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

__attribute__((visibility("default"))) int32_t
llm_sampling_cuda_workspace(int64_t rows, int64_t vocab_size, int32_t dtype, int64_t* bytes) {
  if (bytes == nullptr) return LLM_SAMPLING_NULL_POINTER;
  llm_sampling::Launch found = {};
  const int32_t code = llm_sampling::find_launch_of(rows, vocab_size, dtype, found);
  const bool is_split = code == LLM_SAMPLING_OK && found.is_split;
  *bytes = is_split ? llm_sampling::workspace_bytes(rows, found.blocks) : 0;
  return code;
}

__attribute__((visibility("default"))) int32_t
llm_sampling_cuda_shape(int64_t rows, int64_t vocab_size, int32_t dtype, int32_t shape[3]) {
  if (shape == nullptr) return LLM_SAMPLING_NULL_POINTER;
  llm_sampling::Launch found = {};
  const int32_t code = llm_sampling::find_launch_of(rows, vocab_size, dtype, found);
  shape[0] = found.blocks;
  shape[1] = found.copied ? 1 : 0;
  shape[2] = found.is_split ? 1 : 0;
  return code;
}

__attribute__((visibility("default"))) int32_t llm_sampling_cuda_usable(int32_t device) {
  return llm_sampling::code_of_cuda(llm_sampling::find_usable(device));
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
