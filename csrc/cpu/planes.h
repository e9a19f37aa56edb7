// The layout of the planes of nested codes (gemmascope_fast/quant/planes.py), shared by all bodies that
// read them.
#pragma once

#ifdef __CUDACC__
#define GSF_BOTH __host__ __device__
#else
#define GSF_BOTH
#endif

namespace gsf {

// Width of plane p of a code of R bits, and the number of planes: quant.planes.WIDTHS.
GSF_BOTH constexpr int plane_width(int R, int p) {
  return p == 0 ? (R == 1 ? 1 : 2) : p <= 2 ? 1 : p == 3 ? (R == 5 ? 1 : 2) : (R == 7 ? 1 : 2);
}
GSF_BOTH constexpr int plane_count(int R) { return R <= 2 ? 1 : R == 3 ? 2 : R == 4 ? 3 : R <= 6 ? 4 : 5; }
GSF_BOTH constexpr int plane_low(int R, int p) {
  int left = R;
  for (int i = 0; i <= p; ++i) left -= plane_width(R, i);
  return left;
}
static_assert(plane_low(8, 4) == 0 && plane_low(7, 4) == 0 && plane_low(6, 3) == 0 && plane_low(5, 3) == 0 &&
                  plane_low(4, 2) == 0 && plane_low(3, 1) == 0 && plane_low(2, 0) == 0 &&
                  plane_low(1, 0) == 0,
              "the planes of a code hold all its bits");

}  // namespace gsf
