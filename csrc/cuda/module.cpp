// The module gemmascope_fast._C_cuda.  Importing it registers the CUDA kernels (static initialisers in
// ops.cpp) and needs no driver.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) { m.doc() = "CUDA kernels of gemmascope_fast"; }
