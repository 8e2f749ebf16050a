// A tokenizer as one mapped file, and its encoder: token for token what the `tokenizers` library gives, or nothing.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace pronghorn {

using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr u32 kNoToken = 0xFFFFFFFF;

// How text is cut into words before merging.
enum class Cut : u32 {
  none,    // not at all: SentencePiece, spaces are written as ▁
  gpt2,    // GPT-2's regular expression
  cl100k,  // that of Llama 3 and Qwen 2
};

// Where SentencePiece's text gets a ▁ in front.
enum class Prefix : u32 {
  none,
  every,   // before every part between special tokens
  always,  // the same, where none stands yet
  first,   // before the first of the text, where none stands yet
};

struct TokenizerRules {
  Cut cut{};
  u32 digits{};           // cl100k: the most digits in a word
  u32 apart{};            // every numeric character stands by itself, before anything else
  u32 composed{};         // text must be known to be in NFC already
  u32 whole_words_win{};  // a word that is a token is that token (ignore_merges)
  Prefix prefix{};
};

// What a character is: bits of `classes`.
enum : std::uint8_t { kLetter = 1, kNumber = 2, kSpace = 4, kNumeric = 8, kComposed = 16 };

struct TokenizerParts {
  TokenizerRules rules;
  std::vector<std::string> tokens;     // by id; "" where there is none
  std::vector<std::uint8_t> in_model;  // by id: whether merges may make it; others are found whole only
  std::vector<u32> merges;             // [n, 3] left, right, made; the first goes first
  std::vector<u32> bytes;              // [256] the token of each byte, or kNoToken
  std::vector<u32> added;              // [n, 2] id, and whether it is looked for in normalized text
  std::vector<std::uint8_t> classes;   // by code point; those beyond are unknown
  std::string about;                   // the caller's own
};

// The file's bytes. std::invalid_argument for parts that do not fit together.
std::string build_tokenizer(const TokenizerParts& parts);

// What the header of these bytes should say; for tests, which forge files. At least a header's length.
u64 tokenizer_checksum(const unsigned char* data, std::size_t size);

// The file may hold anything: what is wrong in its header or checksum is refused here, and every index is checked
// where it is used, so that a forged file gives wrong tokens at worst.
class MappedTokenizer {
 public:
  // Reads `data` as long as it lives. std::invalid_argument for what is not such a file, whole.
  MappedTokenizer(const unsigned char* data, std::size_t size);

  std::string_view about() const { return about_; }
  u32 size() const { return n_tokens_; }

  // A token's spelling; no data where there is none.
  std::string_view token(u32 id) const;
  // The model's token of this spelling (added ones are the caller's), or kNoToken.
  u32 find(std::string_view spelling) const;
  // Appends the ids of valid UTF-8; false where equality with the library is not certain.
  bool encode(std::string_view text, std::vector<u32>& ids) const;

 private:
  friend class Encoding;
  struct Merge {
    u32 left, right, rank, made;
  };
  struct Added {
    u32 id, normalized;
  };

  Merge merge(u32 left, u32 right) const;
  u32 byte_token(unsigned char byte) const;

  TokenizerRules rules_;
  u32 n_tokens_{}, n_vocabulary_{}, n_merges_{}, n_classes_{};
  const unsigned char *merges_{}, *vocabulary_{}, *tokens_{}, *bytes_{}, *classes_{};
  std::string_view blob_, about_;
  // The added tokens of each pass by their first byte, the longest first.
  std::array<std::array<std::vector<u32>, 256>, 2> added_;
};

}  // namespace pronghorn
