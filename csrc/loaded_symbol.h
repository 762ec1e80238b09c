// A function of a library that this process has loaded, looked up at run time.
//
// For a function that only some builds of torch have. A weak reference does not do: `import torch` keeps its libraries out of the global
// scope (RTLD_LOCAL), and the linker leaves a library out of NEEDED that only a weak reference asks for, so the reference is NULL
// although the function is in memory.
#pragma once

#include <dlfcn.h>
#include <link.h>

#include <string>
#include <vector>

// Address of `name`, or nullptr if no loaded library defines it. Asks every loaded library in turn: the file that holds the function has
// another name in other builds of torch. Loads nothing.
inline void* loaded_symbol(const char* name) {
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  std::vector<std::string> libraries;
  // Only the names are taken here: the loader holds its lock during this walk.
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* list) {
        if (info->dlpi_name && *info->dlpi_name) static_cast<std::vector<std::string>*>(list)->push_back(info->dlpi_name);
        return 0;
      },
      &libraries);
  for (const std::string& library : libraries) {
    void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) continue;
    void* found = dlsym(handle, name);
    dlclose(handle);
    if (found) return found;
  }
  return nullptr;
}
