// The module gemmascope_fast._C.  Importing it registers the CPU implementations (static initialisers in
// cpu/ops_*.cpp); its own functions give build information and choose the instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/measure_roof.h"
#include "cpu/memory.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of gemmascope_fast";
  m.attr("compiler") = std::string(__VERSION__);
  m.def(
      "isa", [] { return std::string(gsf::isa_name(gsf::current_isa())); },
      "The instruction-set level in use, one of the names that set_isa takes.");
  m.def(
      "advise_large_pages",
      [](uintptr_t address, size_t bytes) {
        gsf::advise_large_pages(reinterpret_cast<void*>(address), bytes);
      },
      "Ask for large pages in this range, and to gather the pages already touched; an advice.");
  m.def(
      "announce_rows",
      [](uintptr_t rows, size_t row_bytes, uintptr_t ids, size_t count) {
        gsf::PageAnnouncer pages;
        const auto* id = reinterpret_cast<const int64_t*>(ids);
        for (size_t i = 0; i < count; ++i) {
          pages.range(reinterpret_cast<const char*>(rows) + id[i] * row_bytes, row_bytes);
        }
      },
      py::call_guard<py::gil_scoped_release>(),
      "Tell the system of rows of a mapped file that are about to be read; ids: int64, ascending.  An "
      "advice.");
  m.def(
      "same_bytes",
      [](uintptr_t a, uintptr_t b, size_t bytes) {
        return std::memcmp(reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), bytes) == 0;
      },
      "Whether two ranges of memory hold the same bytes.");
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < gsf::kIsaCount; ++i) {
      if (gsf::isa_supported(static_cast<gsf::Isa>(i)))
        names.emplace_back(gsf::isa_name(static_cast<gsf::Isa>(i)));
    }
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    for (int i = 0; i < gsf::kIsaCount; ++i) {
      if (name != gsf::isa_name(static_cast<gsf::Isa>(i))) continue;
      if (!gsf::set_isa(static_cast<gsf::Isa>(i)))
        throw py::value_error("isa: this machine does not have " + name);
      return;
    }
    throw py::value_error("isa: expected one of " + gsf::isa_names() + ", got " + name);
  });
  // Rates of single passes on torch's threads; the caller takes the best, because a roof is what is possible.
  m.def("roof_read", &gsf::roof_read_rates, py::arg("bytes"), py::arg("passes"),
        py::call_guard<py::gil_scoped_release>(), "Bytes read per second, [passes].");
  m.def("roof_fma", &gsf::roof_fma_rates, py::arg("passes"), py::call_guard<py::gil_scoped_release>(),
        "fp32 operations per second (a multiply-add is two), [passes].");
  m.def("roof_int8", &gsf::roof_int8_rates, py::arg("passes"), py::call_guard<py::gil_scoped_release>(),
        "Integer operations per second (a multiply-add is two), [passes].");
}
