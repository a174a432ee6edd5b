// Scratch memory of a thread.
#ifndef LLM_SAMPLING_CPU_BUFFER_H_
#define LLM_SAMPLING_CPU_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <memory>

namespace llm_sampling {
namespace {

// Grow-only scratch memory; its contents are uninitialised.
template <typename T>
class Buffer {
 public:
  T* at_least(int64_t size) {
    if (size > size_) {
      data_.reset(new T[static_cast<size_t>(size)]);
      size_ = size;
    }
    return data_.get();
  }
  int64_t size() const { return size_; }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_BUFFER_H_
