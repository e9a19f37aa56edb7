// What a lane's loads, stores and copies do to memory, and the checks on the way.
#include <algorithm>

#include "machine.h"

namespace ptx {

Space Machine::resolve(Space space, uint64_t& at) const {
  if (space != Space::generic) return space;
  for (const auto& [base, found] : {std::pair{kSharedBase, Space::shared}, std::pair{kLocalBase, Space::local}}) {
    if (at < base || at >= base + (1ull << 30)) continue;
    at -= base;
    return found;
  }
  return Space::global;
}

void Machine::report(Shadow::Finding found, const std::string& verb, const std::string& what, const Warp& w,
                     int lane) const {
  if (found == Shadow::Finding::none) return;
  if (found == Shadow::Finding::race) fault("race: " + verb + " " + what + " without a barrier in between", w, lane);
  fault("two blocks touch the same memory: " + verb + " " + what, w, lane);
}

void Machine::load(Warp& w, int lane, Space space, uint64_t at, int bytes, uint8_t* out) {
  space = resolve(space, at);
  const uint64_t size = static_cast<uint64_t>(bytes);
  if (at % size != 0) fault("misaligned: a load of " + std::to_string(bytes) + " bytes", w, lane);
  if (space == Space::shared) return load_shared(w, 1u << lane, at, bytes, out);
  if (space == Space::local) {
    std::vector<uint8_t>& local = w.local[static_cast<size_t>(lane)];
    if (at + size > local.size()) fault("out of bounds: local memory", w, lane);
    memcpy(out, local.data() + at, size);
    return;
  }
  Allocation* a = global.find(at, bytes);
  if (!a) fault("out of bounds: a load of " + std::to_string(bytes) + " bytes" + global.near(at), w, lane);
  if (launch.races) {
    report(a->shadow.read(at - a->base, bytes, moment(w, 1u << lane), block_start), "reads what another wrote in",
           a->name, w, lane);
  }
  memcpy(out, reinterpret_cast<const void*>(at), size);
}

void Machine::store(Warp& w, int lane, Space space, uint64_t at, int bytes, const uint8_t* in) {
  space = resolve(space, at);
  const uint64_t size = static_cast<uint64_t>(bytes);
  if (at % size != 0) fault("misaligned: a store of " + std::to_string(bytes) + " bytes", w, lane);
  if (space == Space::shared) return store_shared(w, 1u << lane, at, bytes, in);
  if (space == Space::local) {
    std::vector<uint8_t>& local = w.local[static_cast<size_t>(lane)];
    if (at + size > local.size()) fault("out of bounds: local memory", w, lane);
    memcpy(local.data() + at, in, size);
    return;
  }
  Allocation* a = global.find(at, bytes);
  if (!a) fault("out of bounds: a store of " + std::to_string(bytes) + " bytes" + global.near(at), w, lane);
  if (launch.races) {
    const bool same = memcmp(reinterpret_cast<const void*>(at), in, size) == 0;
    report(a->shadow.write(at - a->base, bytes, moment(w, 1u << lane), block_start, same),
           "writes what another touched in", a->name, w, lane);
  }
  memcpy(reinterpret_cast<void*>(at), in, size);
}

void Machine::load_shared(Warp& w, uint32_t lanes, uint64_t at, int bytes, uint8_t* out) {
  const uint64_t size = static_cast<uint64_t>(bytes);
  const int lane = std::countr_zero(lanes);
  if (at % size != 0) fault("misaligned: a load of " + std::to_string(bytes) + " bytes", w, lane);
  if (at + size > shared.bytes.size()) fault("out of bounds: shared memory", w, lane);
  for (uint64_t i = at; i < at + size; ++i) {
    if (shared.content[i] == Content::unwritten) fault("uninitialised shared memory is read", w, lane);
    if (shared.content[i] == Content::arriving) fault("a copy is read before it was waited for", w, lane);
  }
  if (launch.races) {
    report(shared.shadow.read(at, bytes, moment(w, lanes), block_start), "reads what another wrote in", "shared memory",
           w, lane);
  }
  memcpy(out, shared.bytes.data() + at, size);
}

void Machine::store_shared(Warp& w, uint32_t lanes, uint64_t at, int bytes, const uint8_t* in, bool may_repeat) {
  const uint64_t size = static_cast<uint64_t>(bytes);
  const int lane = std::countr_zero(lanes);
  if (at % size != 0) fault("misaligned: a store of " + std::to_string(bytes) + " bytes", w, lane);
  if (at + size > shared.bytes.size()) fault("out of bounds: shared memory", w, lane);
  bool whole = may_repeat;
  for (uint64_t i = at; i < at + size; ++i) {
    if (shared.content[i] == Content::arriving) fault("a copy is overwritten before it was waited for", w, lane);
    whole &= shared.content[i] == Content::written;
  }
  for (const Warp& other : warps) {
    for (const Products& p : other.products) {
      for (const auto& [from, length] : p.reads) {
        if (from < at + size && at < from + static_cast<uint64_t>(length)) {
          fault("shared memory is written while a product that reads it was not waited for", w, lane);
        }
      }
    }
  }
  if (launch.races) {
    const bool same = whole && memcmp(shared.bytes.data() + at, in, size) == 0;
    report(shared.shadow.write(at, bytes, moment(w, lanes), block_start, same), "writes what another touched in",
           "shared memory", w, lane);
  }
  memcpy(shared.bytes.data() + at, in, size);
  std::fill_n(shared.content.begin() + static_cast<int64_t>(at), size, Content::written);
}

// Until it has arrived nobody may touch the target, so what is there becomes rubbish.
void Machine::start_copy(Warp& w, int lane, uint64_t to, uint64_t from, int bytes, int source_bytes) {
  if (source_bytes < 0 || source_bytes > bytes) fault("a copy of more bytes than its size", w, lane);
  const uint64_t size = static_cast<uint64_t>(bytes);
  if (to % size != 0 || (source_bytes > 0 && from % size != 0)) {
    fault("misaligned: a copy of " + std::to_string(bytes) + " bytes", w, lane);
  }
  Copy copy{to, bytes, {}};
  if (source_bytes > 0) {
    Allocation* a = global.find(from, source_bytes);
    if (!a) fault("out of bounds: a copy of " + std::to_string(source_bytes) + " bytes" + global.near(from), w, lane);
    if (launch.races) {
      report(a->shadow.read(from - a->base, source_bytes, moment(w, 1u << lane), block_start),
             "reads what another wrote in", a->name, w, lane);
    }
    memcpy(copy.data, reinterpret_cast<const void*>(from), static_cast<size_t>(source_bytes));
  }
  const std::vector<uint8_t> rubbish(size, 0xA5);
  store_shared(w, 1u << lane, to, bytes, rubbish.data(), false);
  std::fill_n(shared.content.begin() + static_cast<int64_t>(to), size, Content::arriving);
  w.copies[static_cast<size_t>(lane)].open.push_back(copy);
}

void Machine::finish_copies(Warp& w, int lane, size_t keep) {
  std::deque<std::vector<Copy>>& groups = w.copies[static_cast<size_t>(lane)].groups;
  while (groups.size() > keep) {
    for (const Copy& c : groups.front()) {
      const uint64_t size = static_cast<uint64_t>(c.bytes);
      std::fill_n(shared.content.begin() + static_cast<int64_t>(c.to), size, Content::unwritten);
      store_shared(w, 1u << lane, c.to, c.bytes, c.data);
    }
    groups.pop_front();
  }
}

void Machine::count_global(Instruction& in, const uint64_t* at, uint32_t mask, int bytes) const {
  std::vector<uint64_t> sectors;
  each(mask, [&](int l) {
    for (uint64_t s = at[l] / 32; s <= (at[l] + static_cast<uint64_t>(bytes) - 1) / 32; ++s) sectors.push_back(s);
  });
  std::sort(sectors.begin(), sectors.end());
  ++in.counts.requests;
  in.counts.bytes += static_cast<uint64_t>(std::popcount(mask) * bytes);
  in.counts.sectors += static_cast<uint64_t>(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
}

// 32 banks of four bytes.  Accesses of 8 and 16 bytes go by halves and quarters of the warp; different words of one bank
// take one pass each.
void Machine::count_shared(Instruction& in, const uint64_t* at, uint32_t mask, int bytes) const {
  const int together = bytes <= 4 ? 32 : 128 / bytes;
  ++in.counts.requests;
  in.counts.bytes += static_cast<uint64_t>(std::popcount(mask) * bytes);
  for (int first = 0; first < 32; first += together) {
    std::vector<uint64_t> words;
    for (int l = first; l < first + together; ++l) {
      if ((mask >> l & 1) == 0) continue;
      for (int b = 0; b < std::max(bytes, 4); b += 4) words.push_back(at[l] / 4 + static_cast<uint64_t>(b / 4));
    }
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    uint64_t per_bank[32] = {};
    for (uint64_t word : words) ++per_bank[word % 32];
    in.counts.wavefronts += *std::max_element(per_bank, per_bank + 32);
    in.counts.ideal += (words.size() + 31) / 32;
  }
}

}  // namespace ptx
