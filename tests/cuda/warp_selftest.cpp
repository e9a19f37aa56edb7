// The emulator itself: a value passed from lane to lane within a warp.  Without the barrier (GSF_NO_BARRIER)
// the race detector must speak, and the result is wrong in at least one order of threads.
#include "cuda/intrin.h"
#include "cuda/launcher.h"

struct Args {
  int* out;  // [kThreads]
};

static void rotate(Args a) {
  using namespace gsf::cuda;
  GSF_SHARED int shared[kThreads];
  shared[thread()] = thread() * 3 + 1;
#ifndef GSF_NO_BARRIER
  sync_warp();
#endif
  a.out[thread()] = shared[(thread() & ~31) + (lane() + 1) % 32];
}

int main(int argc, char** argv) {
  const int order = argc > 1 ? atoi(argv[1]) : 0;
  int out[gsf::cuda::kThreads] = {};
  const gsf::cuda::Launcher launch{static_cast<gsf::host::Order>(order), 12345};
  launch(rotate, 1, Args{out});
  for (int i = 0; i < gsf::cuda::kThreads; ++i) {
    if (out[i] != ((i & ~31) + (i + 1) % 32) * 3 + 1) return 1;
  }
  return 0;
}
