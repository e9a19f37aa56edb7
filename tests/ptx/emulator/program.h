// A kernel as the interpreter runs it: instructions whose operands are numbers of slots in a warp's register file.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// A program that does what a device would punish, or an instruction that is not known here.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type : uint8_t {
  none, pred, b8, u8, s8, b16, u16, s16, f16, bf16, b32, u32, s32, f32, tf32, f16x2, bf16x2, b64, u64, s64, f64
};  // clang-format off: one line a group
enum class Space : uint8_t { generic, global, shared, local, param };

int bytes_of(Type t);
bool is_signed(Type t);
bool is_float(Type t);
bool type_named(const std::string& word, Type* out);

struct Operand {
  enum Kind : uint8_t { value, sink, vector, address, label };
  Kind kind = value;
  bool negated = false;    // a predicate with an exclamation mark
  int slot = -1;           // of a value, or of an address without its offset
  int64_t offset = 0;      // of an address
  std::vector<int> parts;  // slots of a vector, -1 for a part that is thrown away
  std::string name;        // of a label
};

// What an instruction did over all launches since the counts were last cleared.
struct Counts {
  uint64_t warps = 0, lanes = 0;             // executions, and lanes that took part
  uint64_t requests = 0, bytes = 0;          // memory instructions with a lane that took part; bytes that lanes asked for
  uint64_t sectors = 0;                      // global: 32-byte sectors touched
  uint64_t wavefronts = 0, ideal = 0;        // shared: passes over the banks, and the fewest that the bytes need
};

struct Machine;
struct Warp;
struct Instruction;
using Handler = void (*)(Machine&, Warp&, Instruction&, uint32_t mask);

struct Instruction {
  std::string text;
  std::vector<std::string> words;  // the mnemonic, split at its dots
  std::vector<Operand> operands;
  int guard = -1;  // slot of the predicate that lets lanes take part
  bool guard_negated = false;
  Type type = Type::none, from = Type::none;  // the first and the last type of the mnemonic
  Space space = Space::generic;
  int width = 1;    // elements of a vector access
  int target = -1;  // of a branch
  bool accumulator = false;  // touches a register that some wgmma accumulates in
  Handler run = nullptr;
  Counts counts;

  bool has(const char* word) const;
  // Fault where the mnemonic has a word that is neither a type nor one of these: nothing is skipped in silence.
  void allow(std::initializer_list<const char*> words) const;
  [[noreturn]] void unknown() const { throw Fault("the interpreter does not know: " + text); }
};

// Special registers, in slots of their own that are filled when a block starts.
enum Special { tid_x, ntid_x, ctaid_x, nctaid_x, laneid, warpid, zero_slot, one_slot, specials };

struct Parameter {
  std::string name;
  int offset, size;
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  int slots = specials;
  std::vector<std::pair<int, uint64_t>> constants;  // slot, value in every lane
  uint64_t static_shared = 0, dynamic_at = 0;       // dynamic shared memory starts behind the static one
  uint64_t local_bytes = 0;
};

Program parse(const std::string& text, const std::string& entry);
Handler handler_of(const Instruction& in);  // Fault where the instruction is not known

}  // namespace ptx
