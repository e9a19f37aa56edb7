#include "memory.h"

#include <algorithm>

namespace ptx {

bool Shadow::ordered(const Moment& before, const Moment& now) {
  if (before.epoch != now.epoch) return true;
  if (before.warp != now.warp) return false;
  const bool one = (now.lanes & (now.lanes - 1)) == 0;  // a matrix instruction's access belongs to all lanes
  return before.sync < now.sync || (one && (before.lanes & now.lanes) == now.lanes);
}

Shadow::Page& Shadow::page(uint64_t number) {
  if (number != last_number_) {
    std::unique_ptr<Page>& at = pages_[number];
    if (!at) {
      at = std::make_unique<Page>();
      at->records.resize(kPage / 4);
    }
    last_ = at.get();
    last_number_ = number;
  }
  return *last_;
}

void Shadow::refine(Page& page) {
  std::vector<Record> fine(kPage);
  for (uint64_t i = 0; i < kPage; ++i) fine[i] = page.records[i / 4];
  page.records = std::move(fine);
  page.unit = 1;
}

template <class F>
Shadow::Finding Shadow::visit(uint64_t at, int bytes, F f) {
  Finding worst = Finding::none;
  for (const uint64_t end = at + static_cast<uint64_t>(bytes); at < end;) {
    Page& p = page(at / kPage);
    if (p.unit == 4 && (at % 4 != 0 || bytes % 4 != 0)) refine(p);
    const Finding found = f(p.records[at % kPage / static_cast<uint64_t>(p.unit)]);
    if (found != Finding::none) worst = found;
    at += static_cast<uint64_t>(p.unit);
  }
  return worst;
}

static void add(Moment& m, const Moment& now) {
  if (m.epoch == now.epoch && m.warp != now.warp) {
    m.warp = kSeveral;
  } else if (m.epoch == now.epoch && m.sync == now.sync) {
    m.lanes |= now.lanes;
  } else {
    m = now;
  }
  m.order = now.order;
}

Shadow::Finding Shadow::read(uint64_t at, int bytes, const Moment& now, uint32_t block_start) {
  return visit(at, bytes, [&](Record& r) {
    if (r.write.epoch != 0) {
      if (r.write.epoch < block_start) return Finding::other_block;
      if (!ordered(r.write, now)) return Finding::race;
    }
    if (r.read.epoch != 0 && r.read.epoch < block_start) r.other_block_read = true;
    add(r.read, now);
    return Finding::none;
  });
}

Shadow::Finding Shadow::write(uint64_t at, int bytes, const Moment& now, uint32_t block_start, bool same) {
  return visit(at, bytes, [&](Record& r) {
    if (!same) {
      const bool theirs = r.write.epoch != 0 && r.write.epoch < block_start;
      if (theirs || r.other_block_read || (r.read.epoch != 0 && r.read.epoch < block_start)) return Finding::other_block;
      if (r.write.epoch != 0 && !ordered(r.write, now)) return Finding::race;
      if (r.read.epoch != 0 && !ordered(r.read, now)) return Finding::race;
      r.write = now;
    } else {
      add(r.write, now);
    }
    return Finding::none;
  });
}

const Moment& Shadow::last_write(uint64_t at) {
  Page& p = page(at / kPage);
  return p.records[at % kPage / static_cast<uint64_t>(p.unit)].write;
}

Global::Global(std::vector<Allocation> allocations) {
  std::sort(allocations.begin(), allocations.end(), [](const auto& a, const auto& b) { return a.base < b.base; });
  for (Allocation& a : allocations) {
    Allocation* before = allocations_.empty() ? nullptr : &allocations_.back();
    if (before && a.base < before->base + before->size) {  // two arguments that share memory
      before->size = std::max(before->size, a.base + a.size - before->base);
      if (a.name != before->name) before->name += ", " + a.name;
    } else {
      allocations_.push_back(std::move(a));
    }
  }
}

Allocation* Global::find(uint64_t at, int bytes) {
  const auto holds = [&](const Allocation& a) {
    return at >= a.base && at - a.base + static_cast<uint64_t>(bytes) <= a.size;
  };
  if (last_ && holds(*last_)) return last_;
  for (Allocation& a : allocations_) {
    if (holds(a)) return last_ = &a;
  }
  return nullptr;
}

std::string Global::near(uint64_t at) const {
  std::string out;
  for (const Allocation& a : allocations_) {
    const int64_t from = static_cast<int64_t>(at - a.base);
    if (from < -4096 || from > static_cast<int64_t>(a.size) + 4096) continue;
    out += out.empty() ? " near " : " and ";
    out += "byte " + std::to_string(from) + " of the " + std::to_string(a.size) + " of " + a.name;
  }
  return out;
}

void Shared::start(uint64_t size) {
  bytes.assign(size, 0xA5);
  content.assign(size, Content::unwritten);
  shadow.clear();
}

}  // namespace ptx
