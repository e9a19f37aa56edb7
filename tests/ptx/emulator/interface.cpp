// What Python calls: one launch, the fault that ended it, and the counts of every instruction.
#include "machine.h"

namespace {

std::string g_error;
std::map<std::string, ptx::Program> g_programs;  // parsed once; by entry and text
ptx::Program* g_last = nullptr;

}  // namespace

extern "C" {

struct PtxAllocation {
  uint64_t base, size;
  const char* name;
};

struct PtxLaunch {
  const char *text, *entry;
  const uint8_t* parameters;  // as the device lays them out, or null
  const uint64_t* values;     // else one a parameter, in order
  int64_t count;              // bytes of parameters, or how many values
  uint32_t blocks;
  int32_t threads;
  uint64_t dynamic_shared, seed;
  int32_t last_block_alone, races, counts;
  const PtxAllocation* allocations;
  int32_t allocation_count;
};

const char* ptx_error() { return g_error.c_str(); }

int ptx_run(const PtxLaunch* l) {
  try {
    const std::string key = std::string(l->entry) + "\n" + l->text;
    auto at = g_programs.find(key);
    if (at == g_programs.end()) at = g_programs.emplace(key, ptx::parse(l->text, l->entry)).first;
    ptx::Program& program = at->second;
    g_last = &program;
    ptx::Launch launch;
    launch.blocks = l->blocks, launch.threads = l->threads, launch.dynamic_shared = l->dynamic_shared;
    launch.seed = l->seed, launch.last_block_alone = l->last_block_alone, launch.races = l->races, launch.count = l->counts;
    launch.parameters.assign(static_cast<size_t>(program.parameter_bytes), 0);
    if (l->parameters) {
      if (l->count != program.parameter_bytes) throw ptx::Fault("parameters: " + std::to_string(l->count) + " bytes given, " + std::to_string(program.parameter_bytes) + " expected");
      memcpy(launch.parameters.data(), l->parameters, static_cast<size_t>(l->count));
    } else {
      if (static_cast<size_t>(l->count) > program.parameters.size()) throw ptx::Fault("more values than parameters");
      for (int64_t i = 0; i < l->count; ++i) {
        const ptx::Parameter& p = program.parameters[static_cast<size_t>(i)];
        memcpy(launch.parameters.data() + p.offset, l->values + i, static_cast<size_t>(p.size));
      }
    }
    std::vector<ptx::Allocation> allocations;
    for (int i = 0; i < l->allocation_count; ++i) {
      const PtxAllocation& a = l->allocations[i];
      allocations.push_back({a.base, a.size, a.name, {}});
    }
    ptx::Machine(program, launch, std::move(allocations)).run();
    return 0;
  } catch (const std::exception& e) {
    g_error = e.what();
    return 1;
  }
}

// Of the program that ran last.
int64_t ptx_instructions() { return g_last ? static_cast<int64_t>(g_last->code.size()) : 0; }

// Eight numbers of an instruction, and whether it is one of global or of shared memory; then they are cleared.
const char* ptx_counts(int64_t index, uint64_t* out) {
  ptx::Instruction& in = g_last->code[static_cast<size_t>(index)];
  const ptx::Counts& c = in.counts;
  const uint64_t all[] = {c.warps, c.lanes, c.requests, c.bytes, c.sectors, c.wavefronts, c.ideal};
  memcpy(out, all, sizeof(all));
  in.counts = {};
  return in.text.c_str();
}

}
