// As much of the CUDA runtime as csrc/cuda/launch.cu calls, for devices that a test describes. Nothing runs: a
// launch is checked against the device as CUDA does it, and recorded.
#ifndef LLM_SAMPLING_FAKE_CUDA_RUNTIME_H_
#define LLM_SAMPLING_FAKE_CUDA_RUNTIME_H_

#include <stddef.h>
#include <stdint.h>

#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidClusterSize = 912
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake_cuda {

// What a test says of all devices.
struct Machine {
  int32_t major, processors, shared_bytes, static_bytes, ptx_version;
  int32_t room;  // the most blocks of a cluster that can be placed; 0: any number
};

struct Launch {
  const void* kernel;
  int32_t blocks, cluster, shared_bytes;
};

inline Machine machine;
inline thread_local int current_device = 0;
inline std::mutex lock;
inline std::map<std::pair<int, const void*>, std::vector<int>>
    limits;  // each that was set, in order
inline std::vector<Launch> launches;
inline int occupancy_calls = 0;

inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  return config.numAttrs > 0 ? config.attrs[0].val.clusterDim.x : 1;
}
inline bool has_room(unsigned cluster) {
  return cluster == 1 || machine.room == 0 || cluster <= static_cast<unsigned>(machine.room);
}

}  // namespace fake_cuda

inline cudaError_t cudaGetDevice(int* index) {
  *index = fake_cuda::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const fake_cuda::Machine& machine = fake_cuda::machine;
  *value = which == cudaDevAttrMultiProcessorCount            ? machine.processors
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? machine.shared_bytes
                                                              : machine.major;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->sharedSizeBytes = static_cast<size_t>(fake_cuda::machine.static_bytes);
  attributes->ptxVersion = fake_cuda::machine.ptx_version;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int value) {
  using namespace fake_cuda;
  if (value + machine.static_bytes > machine.shared_bytes) return cudaErrorInvalidValue;
  {
    const std::lock_guard<std::mutex> guard(lock);
    limits[{current_device, reinterpret_cast<const void*>(kernel)}].push_back(value);
  }
  std::this_thread::yield();  // another thread may set it too before this one launches
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(
    int* clusters,
    Kernel,
    const cudaLaunchConfig_t* config
) {
  const std::lock_guard<std::mutex> guard(fake_cuda::lock);
  ++fake_cuda::occupancy_calls;
  *clusters = fake_cuda::has_room(fake_cuda::cluster_of(*config)) ? 1 : 0;
  return cudaSuccess;
}
template <typename Kernel, typename Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Argument&) {
  using namespace fake_cuda;
  const void* key = reinterpret_cast<const void*>(kernel);
  const unsigned cluster = cluster_of(*config);
  const std::lock_guard<std::mutex> guard(lock);
  const std::vector<int>& set = limits[{current_device, key}];
  const int limit = set.empty() ? 48 * 1024 : set.back();
  if (static_cast<int>(config->dynamicSmemBytes) > limit) return cudaErrorInvalidValue;
  if (cluster > 1 && (machine.major < 9 || machine.ptx_version < 90 || !has_room(cluster))) {
    return cudaErrorInvalidClusterSize;
  }
  launches.push_back(
      {key,
       static_cast<int32_t>(config->gridDim.x * config->gridDim.y),
       static_cast<int32_t>(cluster),
       static_cast<int32_t>(config->dynamicSmemBytes)}
  );
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
    default:
      return "no error";
  }
}

#endif  // LLM_SAMPLING_FAKE_CUDA_RUNTIME_H_
