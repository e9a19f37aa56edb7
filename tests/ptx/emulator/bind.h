// From an instruction's types to a handler made for them.
#pragma once

#include <type_traits>

#include "floats.h"
#include "machine.h"

namespace ptx {

// Each returns null for an instruction that is another file's; Fault for a variant that is not known.
Handler bind_arithmetic(const Instruction& in);
Handler bind_bits(const Instruction& in);
Handler bind_convert(const Instruction& in);
Handler bind_memory(const Instruction& in);
Handler bind_warp(const Instruction& in);
Handler bind_matrix(const Instruction& in);
Handler bind_wgmma(const Instruction& in);

template <class Op, class T>
void unary(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t* a = plain(w, in, 1);
  each(mask, [&](int l) { d[l] = raw(Op::of(get<T>(a[l]))); });
}

template <class Op, class T>
void binary(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2);
  each(mask, [&](int l) { d[l] = raw(Op::of(get<T>(a[l]), get<T>(b[l]))); });
}

template <class Op, class T>
void ternary(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2), *c = plain(w, in, 3);
  each(mask, [&](int l) { d[l] = raw(Op::of(get<T>(a[l]), get<T>(b[l]), get<T>(c[l]))); });
}

// Calls f with a value of the C++ type that computes this PTX type; b types count as unsigned.
template <class F>
Handler with_integer(const Instruction& in, Type t, F f) {
  switch (t) {
    case Type::b8: case Type::u8: return f(uint8_t{});
    case Type::s8: return f(int8_t{});
    case Type::b16: case Type::u16: return f(uint16_t{});
    case Type::s16: return f(int16_t{});
    case Type::b32: case Type::u32: return f(uint32_t{});
    case Type::s32: return f(int32_t{});
    case Type::b64: case Type::u64: return f(uint64_t{});
    case Type::s64: return f(int64_t{});
    default: in.unknown();
  }
}

template <class F>
Handler with_float(const Instruction& in, Type t, F f) {
  switch (t) {
    case Type::f32: return f(float{});
    case Type::f64: return f(double{});
    case Type::f16: return f(Half{});
    case Type::bf16: return f(Brain{});
    default: in.unknown();
  }
}

}  // namespace ptx
