// Zeroed memory from the operating system: untouched pages cost nothing.
#pragma once
#include <cstddef>
#include <utility>

namespace mill {

template <class T> class Array {
 public:
  explicit Array(size_t count = 0);
  ~Array();
  Array(Array&& other) noexcept : at_(other.at_), bytes_(other.bytes_) { other.at_ = nullptr; }
  Array& operator=(Array&& other) noexcept {
    std::swap(at_, other.at_), std::swap(bytes_, other.bytes_);
    return *this;
  }
  T* get() const { return at_; }

 private:
  T* at_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace mill
