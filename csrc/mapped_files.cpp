#include "mapped_files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "array.h"

namespace mill {
namespace {

// File systems in memory, and some others, refuse.
bool reads_directly(int handle) {
  const Array<uint8_t> block(MappedFiles::kBlock);
  return pread(handle, block.get(), MappedFiles::kBlock, 0) >= 0;
}

}  // namespace

MappedFiles::~MappedFiles() {
  for (const File& file : files_) close(file.handle);
}

void MappedFiles::look() {
  mappings_.clear();
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    Mapping m{};
    char access[5] = "";
    int path = 0;
    const int fields = std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %4s %" SCNx64 " %*s %" SCNu64 " %n",
                                   &m.begin, &m.end, access, &m.offset, &m.inode, &path);
    if (fields != 5 || std::strcmp(access, "r--s") != 0 || line[path] != '/') continue;
    m.path = line.substr(path);
    mappings_.push_back(std::move(m));
  }
}

MappedFiles::Place MappedFiles::find(const void* at, size_t bytes) {
  const uintptr_t from = uintptr_t(at);
  for (const Mapping& m : mappings_) {
    if (!bytes || from < m.begin || from >= m.end || bytes > m.end - from) continue;
    const int file = open_file(m);
    return file < 0 ? Place{} : Place{file, m.offset + (from - m.begin)};
  }
  return {};
}

int MappedFiles::open_file(const Mapping& m) {
  for (size_t i = 0; i < files_.size(); i++)
    if (files_[i].inode == m.inode && files_[i].path == m.path) return int(i);
  int handle = open(m.path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  bool direct = handle >= 0 && reads_directly(handle);
  if (!direct) {
    if (handle >= 0) close(handle);
    handle = open(m.path.c_str(), O_RDONLY | O_CLOEXEC);
  }
  if (handle < 0) return -1;
  struct stat about;
  if (fstat(handle, &about) != 0 || about.st_ino != m.inode) return close(handle), -1;  // another file by now
  files_.push_back({m.inode, m.path, handle, direct});
  return int(files_.size()) - 1;
}

int MappedFiles::read(int file, uint64_t offset, size_t bytes, size_t wanted, uint8_t* to) const {
  const File& from = files_[file];
  size_t done = 0;
  while (done < wanted) {
    const ssize_t got = pread(from.handle, to + done, bytes - done, off_t(offset + done));
    if (got < 0 && errno != EINTR) return errno;
    if (got == 0) return ENODATA;
    done += size_t(std::max<ssize_t>(got, 0));
  }
  if (!from.direct) posix_fadvise(from.handle, off_t(offset), off_t(bytes), POSIX_FADV_DONTNEED);
  return 0;
}

std::string MappedFiles::describe(int file, int error) const {
  const std::string reason = error == ENODATA ? "it is shorter than when it was opened" : std::strerror(error);
  return "cannot read experts from " + files_[file].path + ": " + reason;
}

}  // namespace mill
