// Sampling: a token is a pure function of (logits, parameters, seed, position, history).
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"

namespace pronghorn {

// Philox4x32-10; of many counters see Kernels::noise.
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t key);

// One request's parameters; engine/sampling.py documents and checks them.
struct Sampling {
  double temperature = 0;  // 0: the largest logit, no noise
  i64 top_k = 0;           // 0: all
  double top_p = 1, min_p = 0;
  float repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  std::uint64_t seed = 0;
  std::vector<std::pair<std::int32_t, float>> logit_bias;
  std::vector<std::int32_t> withheld;  // banned until min_tokens are generated
  i64 min_tokens = 0;
};

// The tokens of a sequence so far; the next one's position is n.
struct History {
  const std::int32_t* ids;
  i64 n_prompt, n;
};

// A bit for each token that may be chosen, the lowest first; tokens past the end may not. No words: all may.
struct Allowed {
  const std::uint32_t* words = nullptr;
  i64 n_words = 0;
  bool has(i64 id) const { return id / 32 < n_words && (words[id / 32] >> (id % 32) & 1); }
};

// The chosen token's id. Throws std::domain_error for logits that are NaN or +inf, or all -inf (all banned).
i64 choose(const Sampling&, const float* logits, i64 vocabulary, const History&, const Allowed& = {});

// (id, natural logarithm of its probability) of the chosen token, then of the n_top likeliest, likeliest first.
std::vector<std::pair<i64, double>> log_probabilities(const float* logits, i64 vocabulary, i64 chosen, i64 n_top);

}  // namespace pronghorn
