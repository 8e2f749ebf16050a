#include "sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace pronghorn {

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t key) {
  auto [c0, c1, c2, c3] = counter;
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{kPhiloxFactors[0]} * c0, p1 = std::uint64_t{kPhiloxFactors[1]} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0, c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1, c3 = static_cast<std::uint32_t>(p0);
    k0 += kPhiloxKeys[0], k1 += kPhiloxKeys[1];
  }
  return {c0, c1, c2, c3};
}

namespace {

i64 arg_max(const float* x, i64 n) { return chosen_kernels().arg_max(x, n); }

double sum_exp(const float* x, i64 n, float shift, float scale) { return chosen_kernels().sum_exp(x, n, shift, scale); }

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kLn2 = 0.6931471805599453;

// Gumbel noise: one word of the generator for each (seed, position, token).
struct Noise {
  std::uint64_t seed;
  std::uint32_t position;

  std::uint32_t word(i64 id) const {
    return philox({static_cast<std::uint32_t>(id / 4), position, 0, 0}, seed)[static_cast<std::size_t>(id % 4)];
  }
  // Of the chunk that begins with this token; see Kernels::noise.
  void words(i64 first, std::uint32_t* words, std::uint32_t* most) const {
    chosen_kernels().noise(seed, position, static_cast<std::uint32_t>(first / 4), words, most);
  }
  static double value(std::uint32_t word) { return -std::log(-std::log((word + 0.5) * 0x1p-32)); }
  // value(word) is less: -log u >= 1 - u > 2^-(k+1) for a word of k leading ones.
  static double bound(std::uint32_t word) { return (std::countl_one(word) + 1) * kLn2; }
};

// A row's largest logits by chunks, most of which nobody needs to look into.
constexpr i64 kChunk = 4 * kNoiseCounters;
struct Chunks {
  Chunks(const float* logits, i64 n, std::vector<float>& room) : n(n), tops(room) {
    tops.clear();
    for (i64 begin = 0; begin < n; begin += kChunk)
      tops.push_back(chosen_kernels().largest(logits + begin, std::min(kChunk, n - begin)));
  }
  float largest(i64 begin) const { return tops[static_cast<std::size_t>(begin / kChunk)]; }
  const i64 n;
  std::vector<float>& tops;
};

// The beginning of the order of tokens, likeliest first and of equals the lowest id: those before token `id` if it
// has the logit `least`, all of at least that if id is the vocabulary's size.
struct Range {
  float least;
  i64 id;
  bool has(float logit, i64 i) const { return logit > least || (logit == least && i < id); }
};

// The arg max of (logit / temperature + noise); of equal scores the lowest id.
struct Race {
  Noise noise;
  double scale;  // 1 / temperature
  i64 winner = -1;
  double best = -std::numeric_limits<double>::infinity();

  void restart() { best = -std::numeric_limits<double>::infinity(); }
  void enter(i64 id, double z, std::uint32_t word) {
    if (z + Noise::bound(word) < best) return;  // two logarithms saved, nearly always
    const double score = z + Noise::value(word);
    if (score > best || (score == best && id < winner)) best = score, winner = id;
  }
  void enter(const float* logits, i64 id) { enter(id, logits[id] * scale, noise.word(id)); }
  // A range of all tokens, once the likeliest has entered. What is done for every token is done in lanes.
  void enter_all(const float* logits, const Chunks& chunks, Range range) {
    std::uint32_t words[kChunk], most[kNoiseLanes];
    for (i64 begin = 0; begin < chunks.n; begin += kChunk) {
      const float top = chunks.largest(begin);
      // Of these, none wins but with 1 - u <= exp(top's z - best), as -log u >= 1 - u; rounding gets a margin.
      const double chance = std::exp(top * scale - best + 1e-9 + 1e-14 * std::abs(best));
      if (top < range.least || chance < 0x1p-33) continue;
      noise.words(begin, words, most);
      const double enough = std::max(0.0, (1 - chance) * 0x1p32 - 1);
      const auto least_word = static_cast<std::uint32_t>(enough);
      for (int lane = 0; lane < kNoiseLanes; ++lane) {
        if (most[lane] < least_word) continue;
        for (int at = lane; at < kChunk; at += kNoiseLanes) {
          const i64 id = begin + 4 * (at % kNoiseCounters) + at / kNoiseCounters;
          if (words[at] >= least_word && id < chunks.n && range.has(logits[id], id))
            enter(id, logits[id] * scale, words[at]);
        }
      }
    }
  }
};

// What needs a vocabulary's room; kept by each thread.
struct Scratch {
  std::vector<float> row, tops;
  std::vector<std::int64_t> seen;  // all zero between calls
  std::vector<std::int32_t> ids;
};

auto larger_first(const float* logits) {
  return
      [logits](std::int32_t a, std::int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
}

// The k largest in descending order; of equal logits the lowest ids.
void largest(const float* logits, const Chunks& chunks, i64 k, std::vector<std::int32_t>& ids) {
  const auto before = larger_first(logits);
  ids.clear();
  for (i64 begin = 0; begin < chunks.n; begin += kChunk) {
    if (static_cast<i64>(ids.size()) == k && !(chunks.largest(begin) > logits[ids.front()])) continue;
    for (i64 i = begin; i < std::min(begin + kChunk, chunks.n); ++i) {
      if (static_cast<i64>(ids.size()) == k) {
        if (!(logits[i] > logits[ids.front()])) continue;
        std::pop_heap(ids.begin(), ids.end(), before);
        ids.pop_back();
      }
      ids.push_back(static_cast<std::int32_t>(i));
      std::push_heap(ids.begin(), ids.end(), before);  // the last of the order is in front
    }
  }
  std::sort_heap(ids.begin(), ids.end(), before);
}

// The mass of a range, where the likeliest token has 1.
double mass_of(const float* logits, const Chunks& chunks, Range range, float top, double scale) {
  double sum = 0;
  for (i64 begin = 0; begin < chunks.n; begin += kChunk) {
    if (chunks.largest(begin) < range.least) continue;
    for (i64 i = begin; i < std::min(begin + kChunk, chunks.n); ++i)
      if (range.has(logits[i], i)) sum += std::exp((logits[i] - top) * scale);
  }
  return sum;
}

void check_id(i64 id, i64 vocabulary) {
  if (id < 0 || id >= vocabulary)
    throw std::domain_error("token id " + std::to_string(id) + " is outside of the vocabulary");
}

// Bias, penalties and what is not allowed, on a copy of the row.
const float* adjusted(const Sampling& p, const float* logits, i64 n, const History& history, const Allowed& allowed,
                      Scratch& scratch) {
  const bool penalties = p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0;
  const bool withhold = history.n - history.n_prompt < p.min_tokens && !p.withheld.empty();
  if (p.logit_bias.empty() && !penalties && !withhold && !allowed.words) return logits;
  scratch.row.assign(logits, logits + n);
  float* row = scratch.row.data();
  for (const auto& [id, bias] : p.logit_bias) check_id(id, n), row[id] += bias;
  if (penalties) {
    constexpr std::int64_t kInOutput = std::int64_t{1} << 32;
    for (i64 i = 0; i < history.n; ++i) check_id(history.ids[i], n);
    scratch.seen.resize(static_cast<std::size_t>(std::max(n, static_cast<i64>(scratch.seen.size()))));
    scratch.ids.clear();
    for (i64 i = 0; i < history.n; ++i) {
      std::int64_t& seen = scratch.seen[static_cast<std::size_t>(history.ids[i])];
      if (!seen) scratch.ids.push_back(history.ids[i]);
      seen += i < history.n_prompt ? 1 : kInOutput;
    }
    for (const std::int32_t id : scratch.ids) {
      const auto count = std::exchange(scratch.seen[static_cast<std::size_t>(id)], 0) / kInOutput;
      row[id] = row[id] > 0 ? row[id] / p.repetition_penalty : row[id] * p.repetition_penalty;
      row[id] -= p.frequency_penalty * static_cast<float>(count);
      if (count) row[id] -= p.presence_penalty;
    }
  }
  if (withhold)
    for (const std::int32_t id : p.withheld) check_id(id, n), row[id] = -kInf;
  if (allowed.words)
    for (i64 i = 0; i < n; ++i)
      if (!allowed.has(i)) row[i] = -kInf;
  return row;
}

void check_finite(const float* logits, i64 n) {
  int bad = 0;
  for (i64 i = 0; i < n; ++i) bad |= !(logits[i] < kInf);
  if (bad) throw std::domain_error("the model's logits are not finite");
}

}  // namespace

i64 choose(const Sampling& p, const float* raw, i64 n, const History& history, const Allowed& allowed) {
  thread_local Scratch scratch;
  const FloatEnvironment environment;
  check_finite(raw, n);
  const float* logits = adjusted(p, raw, n, history, allowed, scratch);
  const i64 first = arg_max(logits, n);
  if (first < 0) throw std::domain_error("the logits with their biases and penalties are not finite");
  const float top = logits[first];
  if (top == -kInf) throw std::domain_error("no token is left to choose from");
  if (!(top < kInf)) throw std::domain_error("the logits with their biases and penalties are not finite");
  if (p.temperature == 0) return first;

  const double scale = 1 / p.temperature;
  const Chunks chunks(logits, n, scratch.tops);
  Race race{{p.seed, static_cast<std::uint32_t>(history.n)}, scale};
  Range range{-std::numeric_limits<float>::max(), n};
  if (p.min_p > 0) range.least = std::min(top, static_cast<float>(top + p.temperature * std::log(p.min_p)));

  if (p.top_k > 0 && p.top_k < n) {
    std::vector<std::int32_t>& ids = scratch.ids;
    largest(logits, chunks, p.top_k, ids);
    double mass = 0, before = 0;
    for (const std::int32_t id : ids) mass += std::exp((logits[id] - top) * scale);
    for (const std::int32_t id : ids) {
      if (!range.has(logits[id], id) || (p.top_p < 1 && before >= p.top_p * mass)) break;
      before += std::exp((logits[id] - top) * scale);
      race.enter(logits, id);
    }
    return race.winner;
  }
  // The winner of all is the winner of the likeliest, if it is one of them. If it is not, they all come before it.
  const double mass = p.top_p < 1 ? p.top_p * sum_exp(logits, n, top, static_cast<float>(scale)) : 0;
  for (;;) {
    race.restart();
    race.enter(logits, first);  // it sets a high bar for the others
    race.enter_all(logits, chunks, range);
    if (p.top_p >= 1 || race.winner == first) return race.winner;
    const Range before{logits[race.winner], race.winner};
    if (mass_of(logits, chunks, before, top, scale) < mass) return race.winner;
    range = before;
  }
}

std::vector<std::pair<i64, double>> log_probabilities(const float* logits, i64 n, i64 chosen, i64 n_top) {
  const FloatEnvironment environment;
  check_finite(logits, n);
  const float top = logits[arg_max(logits, n)];
  if (top == -kInf) throw std::domain_error("the model's logits are not finite");
  const double log_sum = std::log(sum_exp(logits, n, top, 1));
  std::vector<std::pair<i64, double>> result;
  const auto add = [&](i64 id) { result.emplace_back(id, (static_cast<double>(logits[id]) - top) - log_sum); };
  check_id(chosen, n);
  add(chosen);
  std::vector<std::int32_t> ids;
  std::vector<float> tops;
  if (n_top > 0) largest(logits, Chunks(logits, n, tops), n_top, ids);
  for (const std::int32_t id : ids) add(id);
  return result;
}

}  // namespace pronghorn
