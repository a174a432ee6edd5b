// The host half of the CUDA library over a fake runtime, with functions by which a test describes the devices and
// reads what was launched.
#include "../../../csrc/cuda/launch.cu"

namespace llm_sampling {
namespace {

// Stand for the kernels: each has an address of its own.
template <int kNumber>
void kernel(const Plan plan) {
  static_cast<void>(plan);
}
void update_kernel(const LlmSamplingUpdate update) { static_cast<void>(update); }
void list_kernel(const ListPlan plan) { static_cast<void>(plan); }

}  // namespace

// By dtype: in place, copied, split, split for plain calls; then the first three for calls with more results.
constexpr int kKernels = 7;
static const SampleKernel kernels[3][kKernels] = {
    {kernel<0>, kernel<1>, kernel<2>, kernel<3>, kernel<4>, kernel<5>, kernel<6>},
    {kernel<7>, kernel<8>, kernel<9>, kernel<10>, kernel<11>, kernel<12>, kernel<13>},
    {kernel<14>, kernel<15>, kernel<16>, kernel<17>, kernel<18>, kernel<19>, kernel<20>}
};
SampleKernel find_kernel(int32_t dtype, Layout layout, Calls calls) {
  const auto place = static_cast<int>(layout);
  if (calls == Calls::kMore) return kernels[dtype][4 + place];
  return kernels[dtype][place + (layout == Layout::kSplit && calls == Calls::kPlain ? 1 : 0)];
}
UpdateKernel find_update_kernel() { return update_kernel; }
ListKernel find_list_kernel() { return list_kernel; }

}  // namespace llm_sampling

extern "C" {

// Describes the machine; forgets what earlier tests have launched.
void fake_cuda_set(const fake_cuda::Machine* machine) {
  fake_cuda::machine = *machine;
  fake_cuda::launches.clear();
  fake_cuda::occupancy_calls = 0;
}

void fake_cuda_use_device(int32_t index) { fake_cuda::current_device = index; }

int32_t fake_cuda_launches() { return static_cast<int32_t>(fake_cuda::launches.size()); }

int32_t fake_cuda_occupancy_calls() { return fake_cuda::occupancy_calls; }

// Writes blocks, blocks of a cluster, bytes of shared memory and the place of the kernel among those of a launch's dtype.
void fake_cuda_launch(int32_t number, int32_t* values) {
  const fake_cuda::Launch& launch = fake_cuda::launches[static_cast<size_t>(number)];
  values[0] = launch.blocks;
  values[1] = launch.cluster;
  values[2] = launch.shared_bytes;
  for (const auto& of_dtype : llm_sampling::kernels) {
    for (int place = 0; place < llm_sampling::kKernels; ++place) {
      if (reinterpret_cast<const void*>(of_dtype[place]) == launch.kernel) values[3] = place;
    }
  }
}

// How often limits of shared memory were set, and for how many kernels and devices together.
void fake_cuda_limits(int32_t* values) {
  values[0] = values[1] = 0;
  for (const auto& [key, limits] : fake_cuda::limits) {
    values[0] += static_cast<int32_t>(limits.size());
    values[1] += 1;
  }
}

}  // extern "C"
