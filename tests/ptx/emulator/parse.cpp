// From PTX text to a Program.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "program.h"

namespace ptx {
namespace {

using std::string;
using std::vector;

const std::map<string, Type> kTypes = {
    {"pred", Type::pred}, {"b8", Type::b8},     {"u8", Type::u8},       {"s8", Type::s8},         {"b16", Type::b16},
    {"u16", Type::u16},   {"s16", Type::s16},   {"f16", Type::f16},     {"bf16", Type::bf16},     {"b32", Type::b32},
    {"u32", Type::u32},   {"s32", Type::s32},   {"f32", Type::f32},     {"tf32", Type::tf32},     {"f16x2", Type::f16x2},
    {"b64", Type::b64},   {"u64", Type::u64},   {"s64", Type::s64},     {"f64", Type::f64},       {"bf16x2", Type::bf16x2}};

const std::map<string, Special> kSpecials = {
    {"%tid.x", tid_x},       {"%ntid.x", ntid_x}, {"%ctaid.x", ctaid_x},   {"%nctaid.x", nctaid_x},
    {"%laneid", laneid},     {"%warpid", warpid}, {"%tid.y", zero_slot},   {"%tid.z", zero_slot},
    {"%ctaid.y", zero_slot}, {"%ctaid.z", zero_slot}, {"%ntid.y", one_slot}, {"%ntid.z", one_slot}};

string trim(const string& s) {
  const size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == string::npos ? "" : s.substr(a, b - a + 1);
}

bool starts(const string& s, const char* with) { return s.rfind(with, 0) == 0; }

// At commas outside brackets.
vector<string> split(const string& s) {
  vector<string> out;
  string part;
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == ',' && depth == 0) {
      out.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) out.push_back(trim(part));
  return out;
}

// Without comments, debug sections and line numbers.
string stripped(const string& text) {
  string out;
  bool section = false;
  for (size_t at = 0; at < text.size();) {
    size_t end = text.find('\n', at);
    if (end == string::npos) end = text.size();
    string line = text.substr(at, end - at);
    at = end + 1;
    const size_t comment = line.find("//");
    if (comment != string::npos) line.resize(comment);
    line = trim(line);
    if (starts(line, ".section")) section = true;
    if (section) {
      if (line.find('}') != string::npos) section = false;
      continue;
    }
    if (line.empty() || starts(line, ".loc\t") || starts(line, ".loc ") || starts(line, ".file")) continue;
    out += line + "\n";
  }
  for (size_t a; (a = out.find("/*")) != string::npos;) out.erase(a, out.find("*/", a) - a + 2);
  return out;
}

struct Declaration {  // `.shared .align 16 .b8 name[128]`
  string name;
  uint64_t align = 1, bytes = 0;
};

Declaration declared(const string& text) {
  Declaration d;
  const size_t bracket = text.find('['), aligned = text.find(".align");
  const size_t end = bracket == string::npos ? text.size() : bracket;
  const size_t space = text.find_last_of(" \t\n", end - 1);
  d.name = trim(text.substr(space + 1, end - space - 1));
  uint64_t element = 0;
  for (const auto& [name, type] : kTypes) {
    if (text.find("." + name + " ") != string::npos) element = static_cast<uint64_t>(bytes_of(type));
  }
  if (element == 0) throw Fault("a declaration without a known type: " + text);
  d.align = aligned == string::npos ? element : strtoull(text.c_str() + aligned + 6, nullptr, 0);
  d.bytes = bracket == string::npos ? element : element * strtoull(text.c_str() + bracket + 1, nullptr, 0);
  return d;
}

uint64_t up(uint64_t v, uint64_t to) { return (v + to - 1) / to * to; }

class Parser {
 public:
  Parser(const string& text, const string& entry) : all_(stripped(text)) { program_.name = entry; }

  Program parse() {
    const size_t open = find_entry();
    read_parameters(open);
    const size_t body = all_.find('{', open);
    size_t close = body;
    for (int depth = 0; close < all_.size(); ++close) {
      depth += (all_[close] == '{') - (all_[close] == '}');
      if (depth == 0) break;
    }
    const vector<string> statements = split_body(all_.substr(body + 1, close - body - 1));
    for (const string& s : statements) {
      if (s[0] == '.') declare(s);
    }
    program_.dynamic_at = up(program_.static_shared, 128);
    if (!dynamic_.empty()) symbols_[dynamic_] = program_.dynamic_at;
    for (const string& s : statements) {
      if (s[0] != '.') add(s);
    }
    for (Instruction& in : program_.code) {
      if (in.words[0] != "bra") continue;
      const auto label = labels_.find(in.operands.back().name);
      if (label == labels_.end()) throw Fault("no such label: " + in.text);
      in.target = label->second;
    }
    mark_accumulators();
    return std::move(program_);
  }

 private:
  void mark_accumulators() {
    std::vector<bool> accumulates(static_cast<size_t>(program_.slots));
    for (const Instruction& in : program_.code) {
      if (in.words[0] != "wgmma" || in.words[1] != "mma_async") continue;
      for (int slot : in.operands[0].parts) accumulates[static_cast<size_t>(slot)] = true;
    }
    for (Instruction& in : program_.code) {
      if (in.words[0] == "wgmma") continue;
      for (const Operand& o : in.operands) {
        if (o.slot >= 0 && accumulates[static_cast<size_t>(o.slot)]) in.accumulator = true;
        for (int part : o.parts) in.accumulator |= part >= 0 && accumulates[static_cast<size_t>(part)];
      }
    }
  }

  // Declarations of shared memory before the entry count for it; returns where its parameters start.
  size_t find_entry() {
    for (size_t at = 0;;) {
      const size_t entry = all_.find(".entry", at);
      if (entry == string::npos) throw Fault("no such entry: " + program_.name);
      const size_t open = std::min(all_.find('(', entry), all_.find('{', entry));
      const string name = trim(all_.substr(entry + 6, open - entry - 6));
      string head = all_.substr(at, entry - at);
      for (size_t semicolon; (semicolon = head.find(';')) != string::npos; head.erase(0, semicolon + 1)) {
        string s = trim(head.substr(0, semicolon));
        const size_t dot = s.find_last_of('\n');
        if (dot != string::npos && s.find(".shared", dot) != string::npos) s = s.substr(dot + 1);
        if (s.find(".shared") != string::npos && s.find('[') != string::npos) declare(s);
      }
      if (name == program_.name) return open;
      size_t close = all_.find('{', open);
      for (int depth = 0; close < all_.size(); ++close) {
        depth += (all_[close] == '{') - (all_[close] == '}');
        if (depth == 0) break;
      }
      at = close + 1;
    }
  }

  void read_parameters(size_t open) {
    if (all_[open] != '(') return;
    for (const string& text : split(all_.substr(open + 1, all_.find(')', open) - open - 1))) {
      Declaration d = declared(text);
      const size_t pointer = text.find(".ptr");  // whose .align is that of what it points to
      if (pointer != string::npos) d.align = d.bytes;
      const int at = static_cast<int>(up(static_cast<uint64_t>(program_.parameter_bytes), d.align));
      program_.parameters.push_back({d.name, at, static_cast<int>(d.bytes)});
      program_.parameter_bytes = at + static_cast<int>(d.bytes);
      symbols_[d.name] = static_cast<uint64_t>(at);
    }
  }

  void declare(const string& text) {
    if (text.find(".shared") != string::npos) {
      const Declaration d = declared(text);
      if (text.find(".extern") != string::npos) {
        dynamic_ = d.name;
        return;
      }
      program_.static_shared = up(program_.static_shared, d.align);
      symbols_[d.name] = program_.static_shared;
      program_.static_shared += d.bytes;
    } else if (starts(text, ".local")) {
      const Declaration d = declared(text);
      program_.local_bytes = up(program_.local_bytes, 16);
      symbols_[d.name] = program_.local_bytes;
      program_.local_bytes += d.bytes;
    } else if (!starts(text, ".reg") && !starts(text, ".pragma")) {
      throw Fault("the interpreter does not know the directive: " + text);
    }
  }

  // Statements end with a semicolon, labels with a colon; braces that open a scope hold nothing that matters.
  vector<string> split_body(const string& body) {
    vector<string> out;
    string part;
    int depth = 0;
    for (char c : body) {
      if (c == '{' && trim(part).empty()) continue;
      if (c == '}' && depth == 0) continue;
      depth += (c == '{') - (c == '}');
      if (c == ';') {
        if (!trim(part).empty()) out.push_back(trim(part));
        part.clear();
      } else if (c == '\n' && !trim(part).empty() && trim(part).back() == ':') {
        out.push_back(trim(part));
        part.clear();
      } else {
        part += c == '\n' ? ' ' : c;
      }
    }
    return out;
  }

  void add(string s) {
    for (;;) {  // labels before an instruction
      size_t i = 0;
      while (i < s.size() && (isalnum(s[i]) || s[i] == '_' || s[i] == '$')) ++i;
      if (i == 0 || i >= s.size() || s[i] != ':' || (i + 1 < s.size() && s[i + 1] == ':')) break;
      labels_[s.substr(0, i)] = static_cast<int>(program_.code.size());
      s = trim(s.substr(i + 1));
      if (s.empty()) return;
    }
    Instruction in;
    in.text = s;
    if (s[0] == '@') {
      const size_t space = s.find_first_of(" \t");
      string guard = s.substr(1, space - 1);
      in.guard_negated = guard[0] == '!';
      in.guard = reg(in.guard_negated ? guard.substr(1) : guard);
      s = trim(s.substr(space));
    }
    const size_t space = s.find_first_of(" \t");
    string word;
    for (char c : s.substr(0, space) + ".") {
      if (c == '.') {
        in.words.push_back(word);
        word.clear();
      } else {
        word += c;
      }
    }
    read_words(in);
    if (space != string::npos) {
      for (const string& o : split(s.substr(space))) in.operands.push_back(operand(o));
    }
    in.run = handler_of(in);
    program_.code.push_back(std::move(in));
  }

  void read_words(Instruction& in) {
    for (const string& w : in.words) {
      Type t;
      if (type_named(w, &t)) {
        if (in.type == Type::none) in.type = t;
        in.from = t;
      }
      if (w == "v2") in.width = 2;
      if (w == "v4") in.width = 4;
      if (w == "v8") in.width = 8;
      if (w == "global") in.space = Space::global;
      if (w == "shared" || w == "shared::cta") in.space = Space::shared;
      if (w == "local") in.space = Space::local;
      if (w == "param") in.space = Space::param;
    }
  }

  int reg(const string& name) {
    const auto special = kSpecials.find(name);
    if (special != kSpecials.end()) return special->second;
    if (name.find('.') != string::npos) throw Fault("the interpreter does not know the register " + name);
    const auto [at, fresh] = registers_.emplace(name, program_.slots);
    if (fresh) ++program_.slots;
    return at->second;
  }

  int constant(uint64_t v) {
    const auto [at, fresh] = constants_.emplace(v, program_.slots);
    if (fresh) program_.constants.emplace_back(program_.slots++, v);
    return at->second;
  }

  int value(const string& s) {
    if (s[0] == '%') return reg(s);
    if (starts(s, "0f") || starts(s, "0F") || starts(s, "0d") || starts(s, "0D")) {
      return constant(strtoull(s.c_str() + 2, nullptr, 16));
    }
    if (isdigit(s[0]) || s[0] == '-' || s[0] == '+') {
      char* end = nullptr;
      const uint64_t v = s[0] == '-' ? static_cast<uint64_t>(strtoll(s.c_str(), &end, 0)) : strtoull(s.c_str(), &end, 0);
      if (*end != 0 && *end != 'U') throw Fault("the interpreter does not know the constant " + s);
      return constant(v);
    }
    const auto symbol = symbols_.find(s);
    if (symbol == symbols_.end()) throw Fault("the interpreter does not know the symbol " + s);
    return constant(symbol->second);
  }

  Operand operand(string s) {
    Operand o;
    if (s == "_") {
      o.kind = Operand::sink;
    } else if (s[0] == '{') {
      o.kind = Operand::vector;
      for (const string& part : split(s.substr(1, s.rfind('}') - 1))) o.parts.push_back(part == "_" ? -1 : value(part));
    } else if (s[0] == '[') {
      o.kind = Operand::address;
      const string in = trim(s.substr(1, s.rfind(']') - 1));
      const size_t plus = in.find('+', 1);
      if (plus != string::npos) o.offset = strtoll(trim(in.substr(plus + 1)).c_str(), nullptr, 0);
      o.slot = value(trim(in.substr(0, plus)));
    } else if (s.find('|') != string::npos) {
      o.kind = Operand::vector;
      const size_t bar = s.find('|');
      for (const string& part : {trim(s.substr(0, bar)), trim(s.substr(bar + 1))}) {
        o.parts.push_back(part == "_" ? -1 : value(part));
      }
    } else if (s[0] == '!') {
      o.negated = true;
      o.slot = value(s.substr(1));
    } else if (s[0] == '$' && symbols_.find(s) == symbols_.end()) {
      o.kind = Operand::label;
      o.name = s;
    } else {
      o.slot = value(s);
    }
    return o;
  }

  string all_, dynamic_;
  Program program_;
  std::map<string, uint64_t> symbols_;
  std::map<string, int> registers_, labels_;
  std::map<uint64_t, int> constants_;
};

}  // namespace

bool type_named(const string& word, Type* out) {
  const auto at = kTypes.find(word);
  if (at != kTypes.end()) *out = at->second;
  return at != kTypes.end();
}

int bytes_of(Type t) {
  switch (t) {
    case Type::pred: case Type::b8: case Type::u8: case Type::s8: return 1;
    case Type::b16: case Type::u16: case Type::s16: case Type::f16: case Type::bf16: return 2;
    case Type::b64: case Type::u64: case Type::s64: case Type::f64: return 8;
    case Type::none: throw Fault("an instruction without a type");
    default: return 4;
  }
}

bool is_signed(Type t) { return t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64; }
bool is_float(Type t) {
  return t == Type::f16 || t == Type::bf16 || t == Type::f32 || t == Type::f64 || t == Type::tf32 ||
         t == Type::f16x2 || t == Type::bf16x2;
}

bool Instruction::has(const char* word) const { return std::find(words.begin(), words.end(), word) != words.end(); }

void Instruction::allow(std::initializer_list<const char*> known) const {
  for (size_t i = 1; i < words.size(); ++i) {
    Type t;
    const bool listed = std::any_of(known.begin(), known.end(), [&](const char* k) { return words[i] == k; });
    if (!listed && !type_named(words[i], &t)) unknown();
  }
}

Program parse(const string& text, const string& entry) { return Parser(text, entry).parse(); }

}  // namespace ptx
