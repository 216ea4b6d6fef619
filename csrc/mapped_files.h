// The files behind mapped memory, and reads from them that leave nothing in the system's cache.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace mill {

struct ReadError : std::runtime_error { using runtime_error::runtime_error; };

class MappedFiles {
 public:
  static constexpr size_t kBlock = 4096;  // what reads past the system's cache are aligned to

  struct Place { int file = -1; uint64_t offset = 0; };  // no file: memory of the process

  MappedFiles() = default;
  ~MappedFiles();
  MappedFiles(const MappedFiles&) = delete;
  MappedFiles& operator=(const MappedFiles&) = delete;

  // Has `find` know what is mapped now, for as long as that stays so.
  void look();
  // Where the bytes come from, if they are mapped read-only and shared from a file that can be opened.
  Place find(const void* at, size_t bytes);
  // Reads from `offset` on, all three in whole blocks; at the end of the file fewer bytes than `wanted` are an
  // error. Returns 0 or an error number. Threads may read at the same time.
  int read(int file, uint64_t offset, size_t bytes, size_t wanted, uint8_t* to) const;
  std::string describe(int file, int error) const;

 private:
  struct Mapping { uintptr_t begin, end; uint64_t offset, inode; std::string path; };
  struct File { uint64_t inode; std::string path; int handle; bool direct; };

  int open_file(const Mapping&);

  std::vector<Mapping> mappings_;
  std::vector<File> files_;
};

}  // namespace mill
