#include "tokenizer.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "ahead.h"

namespace pronghorn {
namespace {

constexpr u64 kMagic = 0x314b4f5448475250;  // "PRGHTOK1", which also says that the bytes' order is ours
constexpr u64 kMost = 1 << 28;              // entries of any table
constexpr std::size_t kLongest = 1 << 28;   // bytes of a text

// The header, and then the sections in this order, without gaps.
struct Header {
  u64 magic, size, checksum;
  u64 n_merges, n_vocabulary, n_tokens, n_added, n_classes, blob, about;
  TokenizerRules rules;
};
static_assert(sizeof(Header) == 104);

u64 mixed(u64 x) {
  x ^= x >> 32;
  x *= 0x9E3779B97F4A7C15;
  return x ^ x >> 29;
}

u64 hash_text(std::string_view text) {
  u64 sum = 0xCBF29CE484222325;
  for (const unsigned char byte : text) sum = (sum ^ byte) * 0x100000001B3;
  return mixed(sum);
}

u64 hash_pair(u32 left, u32 right) { return mixed(u64{left} << 32 | right) * 0xD6E8FEB86659FD93 >> 20; }

template <typename T>
T load(const unsigned char* table, u64 index) {
  T value;
  std::memcpy(&value, table + index * sizeof(T), sizeof(T));
  return value;
}

template <typename T>
void append(std::string& file, const std::vector<T>& values) {
  file.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

[[noreturn]] void refuse(const char* why) { throw std::invalid_argument(why); }

// The length of a character by its first byte.
int width(unsigned char byte) { return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4; }

void append_utf8(std::string& text, u32 point) {  // of GPT-2's alphabet, which ends below 0x800
  if (point < 0x80) {
    text += static_cast<char>(point);
  } else {
    text += static_cast<char>(0xC0 | point >> 6);
    text += static_cast<char>(0x80 | (point & 63));
  }
}

}  // namespace

u64 tokenizer_checksum(const unsigned char* data, std::size_t size) {
  if (size < sizeof(Header)) refuse("shorter than its header");
  return checksum(data + offsetof(Header, n_merges), static_cast<i64>(size - offsetof(Header, n_merges)));
}

std::string build_tokenizer(const TokenizerParts& parts) {
  const u64 n = parts.tokens.size();
  if (parts.in_model.size() != n || parts.bytes.size() != 256 || parts.merges.size() % 3 || parts.added.size() % 2 ||
      n >= kMost || parts.merges.size() >= kMost || parts.added.size() >= kMost || parts.classes.size() >= kMost)
    refuse("a tokenizer's parts do not fit together");
  for (const u32 id : parts.merges)
    if (id >= n) refuse("a merge has no token");
  for (const u32 id : parts.bytes)
    if (id >= n && id != kNoToken) refuse("a byte has no token");

  std::string blob;
  std::vector<u32> places;
  for (const std::string& token : parts.tokens) {
    places.push_back(static_cast<u32>(blob.size()));
    places.push_back(static_cast<u32>(token.size()));
    blob += token;
    if (blob.size() >= kMost) refuse("the tokens are too long");
  }
  std::vector<u32> vocabulary(std::bit_ceil(n * 2 + 1), kNoToken);
  for (u32 id = 0; id < n; id++) {
    if (!parts.in_model[id]) continue;
    u64 slot = hash_text(parts.tokens[id]);
    while (vocabulary[slot & (vocabulary.size() - 1)] != kNoToken) slot++;
    vocabulary[slot & (vocabulary.size() - 1)] = id;
  }
  const u64 slots = std::bit_ceil(parts.merges.size() / 2 + 1);  // at most two thirds are taken
  std::vector<u32> merges(slots * 4, kNoToken);
  for (u32 rank = 0; rank < parts.merges.size() / 3; rank++) {
    const u32* merge = &parts.merges[rank * 3ull];
    u64 slot = hash_pair(merge[0], merge[1]);
    while (merges[(slot & (slots - 1)) * 4] != kNoToken) slot++;
    const u32 entry[] = {merge[0], merge[1], rank, merge[2]};
    std::copy(entry, entry + 4, &merges[(slot & (slots - 1)) * 4]);
  }

  Header header{kMagic,
                0,
                0,
                slots,
                vocabulary.size(),
                n,
                parts.added.size() / 2,
                parts.classes.size(),
                blob.size(),
                parts.about.size(),
                parts.rules};
  std::string file(sizeof header, '\0');
  append(file, merges);
  append(file, vocabulary);
  append(file, places);
  append(file, parts.bytes);
  append(file, parts.added);
  append(file, parts.classes);
  file += blob;
  file += parts.about;
  header.size = file.size();
  std::memcpy(file.data(), &header, sizeof header);
  header.checksum = tokenizer_checksum(reinterpret_cast<const unsigned char*>(file.data()), file.size());
  std::memcpy(file.data(), &header, sizeof header);
  return file;
}

MappedTokenizer::MappedTokenizer(const unsigned char* data, std::size_t size) {
  Header header;
  if (size < sizeof header) refuse("shorter than its header");
  std::memcpy(&header, data, sizeof header);
  if (header.magic != kMagic) refuse("not a tokenizer of this version");
  const u64 counts[] = {header.n_merges,  header.n_vocabulary, header.n_tokens, header.n_added,
                        header.n_classes, header.blob,         header.about};
  for (const u64 count : counts)
    if (count > 2 * kMost) refuse("a count is out of range");
  const u64 sizes[] = {header.n_merges * 16, header.n_vocabulary * 4, header.n_tokens * 8, 1024,
                       header.n_added * 8,   header.n_classes,        header.blob,         header.about};
  const unsigned char* sections[8];
  u64 at = sizeof header;
  for (int i = 0; i < 8; i++) {
    if (sizes[i] > size - at) refuse("cut short");
    sections[i] = data + at;
    at += sizes[i];
  }
  if (at != size || header.size != size) refuse("not of the length that it says");
  if (!std::has_single_bit(header.n_merges) || !std::has_single_bit(header.n_vocabulary))
    refuse("a table's size is no power of two");
  if (header.rules.cut > Cut::cl100k || header.rules.prefix > Prefix::first || header.rules.digits > 1000)
    refuse("unknown rules");
  if (tokenizer_checksum(data, size) != header.checksum) refuse("the checksum differs");

  rules_ = header.rules;
  n_merges_ = static_cast<u32>(header.n_merges), n_vocabulary_ = static_cast<u32>(header.n_vocabulary);
  n_tokens_ = static_cast<u32>(header.n_tokens), n_classes_ = static_cast<u32>(header.n_classes);
  merges_ = sections[0], vocabulary_ = sections[1], tokens_ = sections[2], bytes_ = sections[3];
  classes_ = sections[5];
  blob_ = {reinterpret_cast<const char*>(sections[6]), header.blob};
  about_ = {reinterpret_cast<const char*>(sections[7]), header.about};
  for (u64 i = 0; i < header.n_added; i++) {
    const auto added = load<Added>(sections[4], i);
    const std::string_view text = token(added.id);
    if (text.empty()) refuse("an added token is missing");
    added_[added.normalized != 0][static_cast<unsigned char>(text[0])].push_back(added.id);
  }
  for (auto& pass : added_)
    for (auto& bucket : pass)
      std::sort(bucket.begin(), bucket.end(), [&](u32 a, u32 b) { return token(a).size() > token(b).size(); });
}

std::string_view MappedTokenizer::token(u32 id) const {
  if (id >= n_tokens_) return {};
  const u32 offset = load<u32>(tokens_, id * 2ull), length = load<u32>(tokens_, id * 2ull + 1);
  if (offset > blob_.size() || length == 0) return {};
  return blob_.substr(offset, length);
}

u32 MappedTokenizer::find(std::string_view spelling) const {
  const u64 hash = hash_text(spelling);
  for (u64 probe = 0; probe < n_vocabulary_; probe++) {
    const u32 id = load<u32>(vocabulary_, (hash + probe) & (n_vocabulary_ - 1));
    if (id == kNoToken) break;
    if (token(id) == spelling) return id;
  }
  return kNoToken;
}

MappedTokenizer::Merge MappedTokenizer::merge(u32 left, u32 right) const {
  const u64 hash = hash_pair(left, right);
  for (u64 probe = 0; probe < n_merges_; probe++) {
    const auto merge = load<Merge>(merges_, (hash + probe) & (n_merges_ - 1));
    if (merge.left == kNoToken || (merge.left == left && merge.right == right)) return merge;
  }
  return {0, 0, 0, kNoToken};
}

u32 MappedTokenizer::byte_token(unsigned char byte) const { return load<u32>(bytes_, byte); }

// One text on its way to ids.
class Encoding {
 public:
  Encoding(const MappedTokenizer& tokenizer, std::vector<u32>& ids) : t_(tokenizer), ids_(ids) {}

  // The text between added tokens, which come first of all: those of pass 0 in the text as it is, then those of pass 1
  // in what is left, normalized.
  bool parts(std::string_view text, int pass, bool begins) {
    std::size_t start = 0;
    const auto between = [&](std::size_t end) {
      if (start == end) return true;
      const std::string_view part = text.substr(start, end - start);
      const bool first = begins && start == 0;
      return pass == 0 ? normal(part) && parts(part, 1, first) : words(part, first);
    };
    for (std::size_t at = 0; at < text.size();) {
      u32 found = kNoToken;
      for (const u32 id : t_.added_[pass][static_cast<unsigned char>(text[at])])
        if (text.substr(at).starts_with(t_.token(id))) {
          found = id;
          break;
        }
      if (found == kNoToken) {
        at++;
        continue;
      }
      if (!between(at)) return false;
      ids_.push_back(found);
      start = at += t_.token(found).size();
    }
    return between(text.size());
  }

 private:
  struct Symbol {
    u32 id, previous, next, length;
  };
  struct Candidate {
    u64 order;  // rank, then position
    u32 made;
    bool operator<(const Candidate& other) const { return order > other.order; }
  };
  struct Known {
    u32 text, length, ids, n_ids;
  };
  static constexpr int kNewline = 64, kBlank = 128;  // more bits of a kind
  static constexpr u32 kEnd = 0xFFFFFFFF;

  // Whether a text is certain to stay what it is; most are plain.
  bool normal(std::string_view text) const {
    if (!t_.rules_.composed) return true;
    for (std::size_t at = 0; at < text.size(); at += width(static_cast<unsigned char>(text[at]))) {
      const u32 point = point_at(text, at);
      if (point >= 0x80 && (point >= t_.n_classes_ || !(t_.classes_[point] & kComposed))) return false;
    }
    return true;
  }

  static u32 point_at(std::string_view text, std::size_t at) {
    const auto byte = [&](std::size_t i) {
      return at + i < text.size() ? static_cast<u32>(static_cast<unsigned char>(text[at + i])) : 0;
    };
    switch (width(static_cast<unsigned char>(text[at]))) {
      case 1:
        return byte(0);
      case 2:
        return (byte(0) & 31) << 6 | (byte(1) & 63);
      case 3:
        return (byte(0) & 15) << 12 | (byte(1) & 63) << 6 | (byte(2) & 63);
      default:
        return (byte(0) & 7) << 18 | (byte(1) & 63) << 12 | (byte(2) & 63) << 6 | (byte(3) & 63);
    }
  }

  bool words(std::string_view text, bool first) {
    if (t_.rules_.cut == Cut::none) {
      pieces(text, first);
      return true;
    }
    text_ = text;
    kinds_.clear();
    places_.clear();
    for (std::size_t at = 0; at < text.size(); at += width(static_cast<unsigned char>(text[at]))) {
      const u32 point = point_at(text, at);
      if (point >= t_.n_classes_) return false;
      std::uint8_t kind = t_.classes_[point] & 63;
      if (point == '\n' || point == '\r') kind |= kNewline;
      if (point == ' ') kind |= kBlank;
      kinds_.push_back(kind);
      places_.push_back(static_cast<u32>(at));
    }
    places_.push_back(static_cast<u32>(text.size()));
    known_.assign(text.size() > 512 ? 2048 : 0, Known{});
    const u32 n = static_cast<u32>(kinds_.size());
    for (u32 begin = 0; begin < n;) {
      u32 end = n;  // of what the regular expression sees at once
      if (t_.rules_.apart) {
        if (kinds_[begin] & kNumeric) {
          end = begin + 1;
        } else {
          end = begin;
          while (end < n && !(kinds_[end] & kNumeric)) end++;
        }
      }
      while (begin < end) {
        const u32 next = t_.rules_.cut == Cut::gpt2 ? gpt2(begin, end) : cl100k(begin, end);
        if (next == kEnd) return false;
        word(places_[begin], places_[next]);
        begin = next;
      }
    }
    return true;
  }

  bool is(u32 i, int kind) const { return kinds_[i] & kind; }
  bool other(u32 i) const { return !is(i, int{kLetter} | int{kNumber} | int{kSpace}); }
  u32 run(u32 i, u32 n, int kind) const {
    while (i < n && is(i, kind)) i++;
    return i;
  }
  u32 run_of_others(u32 i, u32 n) const {
    while (i < n && other(i)) i++;
    return i;
  }
  unsigned char byte(u32 i) const { return static_cast<unsigned char>(text_[places_[i]]); }

  // The end of 's, 't, 're, 've, 'm, 'll or 'd at i; i where there is none.
  u32 contraction(u32 i, u32 n, unsigned char lower) const {
    if (byte(i) != '\'' || i + 1 >= n) return i;
    const unsigned char a = byte(i + 1) | lower;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
    if (i + 2 >= n) return i;
    const unsigned char b = byte(i + 2) | lower;
    return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? i + 3 : i;
  }

  // \s+(?!\S)|\s+ : a run of spaces leaves its last to the word that follows.
  u32 spaces(u32 i, u32 n) const {
    const u32 end = run(i, n, kSpace);
    return end == n || end - i == 1 ? end : end - 1;
  }

  // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  u32 gpt2(u32 i, u32 n) const {
    if (const u32 end = contraction(i, n, 0); end != i) return end;
    const u32 j = is(i, kBlank) && i + 1 < n ? i + 1 : i;
    if (is(j, kLetter)) return run(j, n, kLetter);
    if (is(j, kNumber)) return run(j, n, kNumber);
    if (!is(j, kSpace)) return run_of_others(j, n);
    return spaces(i, n);
  }

  // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+
  // |\s+(?!\S)|\s+
  u32 cl100k(u32 i, u32 n) const {
    // What else than ASCII matches 's without regard to case is the library's to say.
    if (byte(i) == '\'' && i + 1 < n && point_at(text_, places_[i + 1]) == 0x17F) return kEnd;
    if (const u32 end = contraction(i, n, 0x20); end != i) return end;
    const u32 j = is(i, kNewline | int{kLetter} | int{kNumber}) ? i : i + 1;
    if (j < n && is(j, kLetter)) return run(j, n, kLetter);
    if (is(i, kNumber)) return run(i, std::min<u64>(n, u64{i} + t_.rules_.digits), kNumber);
    const u32 k = is(i, kBlank) ? i + 1 : i;
    if (k < n && other(k)) return run(run_of_others(k, n), n, kNewline);
    for (u32 end = run(i, n, kSpace); end > i; end--)
      if (is(end - 1, kNewline)) return end;
    return spaces(i, n);
  }

  // A word of byte-level BPE: text_[begin, end).
  void word(u32 begin, u32 end) {
    const std::string_view word = text_.substr(begin, end - begin);
    Known* known = nullptr;
    if (!known_.empty() && word.size() < 64) {
      known = &known_[hash_text(word) & (known_.size() - 1)];
      if (known->length == word.size() && text_.substr(known->text, known->length) == word) {
        for (u32 i = 0; i < known->n_ids; i++) ids_.push_back(ids_[known->ids + i]);
        return;
      }
    }
    const auto before = ids_.size();
    if (t_.rules_.whole_words_win) {
      spelled_.clear();
      for (const unsigned char byte : word) append_utf8(spelled_, alphabet(byte));
      if (const u32 id = t_.find(spelled_); id != kNoToken) ids_.push_back(id);
    }
    if (ids_.size() == before) {
      symbols_.clear();
      for (const unsigned char byte : word) add_byte(byte);
      merge();
    }
    if (known)
      *known = {begin, static_cast<u32>(word.size()), static_cast<u32>(before), static_cast<u32>(ids_.size() - before)};
  }

  // The printable character that stands for a byte in GPT-2's vocabulary.
  static u32 alphabet(unsigned char byte) {
    if ((byte >= 33 && byte < 127) || (byte >= 161 && byte != 173)) return byte;
    return 256u + (byte < 33 ? byte : byte < 161 ? byte - 127u + 33u : 67u);
  }

  // SentencePiece's: the whole part is one word, a space is ▁.
  void pieces(std::string_view text, bool first) {
    constexpr std::string_view sign = "\xE2\x96\x81";
    const bool marked = text.starts_with(sign) || text.starts_with(' ');
    const Prefix prefix = t_.rules_.prefix;
    symbols_.clear();
    if (prefix == Prefix::every || (!marked && (prefix == Prefix::always || (prefix == Prefix::first && first))))
      character(sign);
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t length = width(static_cast<unsigned char>(text[at]));
      character(text[at] == ' ' ? sign : text.substr(at, length));
      at += length;
    }
    merge();
  }

  void character(std::string_view character) {
    if (const u32 id = t_.find(character); id != kNoToken) {
      add(id, static_cast<u32>(character.size()));
    } else {
      for (const unsigned char byte : character) add_byte(byte);
    }
  }

  void add_byte(unsigned char byte) {  // one that no token stands for is left out, as the library does
    if (const u32 id = t_.byte_token(byte); id != kNoToken) add(id, 1);
  }

  void add(u32 id, u32 length) {
    const u32 n = static_cast<u32>(symbols_.size());
    if (n > 0) symbols_.back().next = n;
    symbols_.push_back({id, n - 1, kEnd, length});  // the first has none before: kEnd
  }

  void consider(u32 left) {
    const u32 right = symbols_[left].next;
    const auto found = t_.merge(symbols_[left].id, symbols_[right].id);
    if (found.made != kNoToken) heap_.push_back({u64{found.rank} << 32 | left, found.made});
  }

  // The best pair first, the leftmost among equals, until none is left. An entry whose symbols have changed is stale,
  // unless they make the same token in another way: so it is in the library, whose answer is ours.
  void merge() {
    heap_.clear();
    for (u32 i = 0; i + 1 < symbols_.size(); i++) consider(i);
    std::make_heap(heap_.begin(), heap_.end());
    while (!heap_.empty()) {
      const Candidate top = heap_.front();
      std::pop_heap(heap_.begin(), heap_.end());
      heap_.pop_back();
      Symbol& left = symbols_[static_cast<u32>(top.order)];
      if (left.length == 0 || left.next == kEnd) continue;
      Symbol& right = symbols_[left.next];
      if (t_.merge(left.id, right.id).made != top.made) continue;
      left.id = top.made, left.length += right.length, left.next = right.next;
      right.length = 0;
      if (left.next != kEnd) symbols_[left.next].previous = static_cast<u32>(top.order);
      for (const u32 i : {left.previous, left.next == kEnd ? kEnd : static_cast<u32>(top.order)}) {
        if (i == kEnd) continue;
        const auto size = heap_.size();
        consider(i);
        if (heap_.size() > size) std::push_heap(heap_.begin(), heap_.end());
      }
    }
    for (u32 i = symbols_.empty() ? kEnd : 0; i != kEnd; i = symbols_[i].next) ids_.push_back(symbols_[i].id);
  }

  const MappedTokenizer& t_;
  std::vector<u32>& ids_;
  std::string_view text_;            // the part at hand
  std::vector<std::uint8_t> kinds_;  // of its characters
  std::vector<u32> places_;          // where they begin, and the end
  std::vector<Known> known_;         // words of this part that were met, by hash
  std::vector<Symbol> symbols_;
  std::vector<Candidate> heap_;
  std::string spelled_;
};

bool MappedTokenizer::encode(std::string_view text, std::vector<u32>& ids) const {
  if (text.size() >= kLongest || !Encoding(*this, ids).parts(text, 0, true)) return false;
  return std::all_of(ids.begin(), ids.end(), [&](u32 id) { return id < n_tokens_; });
}

}  // namespace pronghorn
