#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <memory>
#include <optional>
#include <variant>

#include "bindings.h"
#include "sampling.h"
#include "threads.h"

namespace pronghorn {

namespace {

// The interpreter lock is kept: a step's choices take less time than it would take the engine's thread to get the
// lock back from busy ones (measured: bench/company.py).

// One row of a buffer of float32 [rows, vocabulary].
const float* row_of(const Bytes& logits, i64 row, i64 vocabulary) {
  if (vocabulary < 1 || row < 0 || (row + 1) * vocabulary > logits.size<float>())
    throw std::out_of_range("no such row of logits");
  return logits.data<const float>() + row * vocabulary;
}

// A token to choose, and what that needs of Python's objects.
struct Choice {
  Choice(const Sampling& sampling, const float* logits, i64 vocabulary, nb::handle history, i64 n_prompt,
         nb::handle mask)
      : sampling(sampling), logits(logits), vocabulary(vocabulary), n_prompt(n_prompt), ids(history) {
    if (!mask.is_none()) bits.emplace(mask);
    if (bits && bits->size<std::uint32_t>() < 1) throw std::out_of_range("the mask is empty");
  }
  i64 make() const {
    const Allowed allowed = bits ? Allowed{bits->data<const std::uint32_t>(), bits->size<std::uint32_t>()} : Allowed{};
    return choose(sampling, logits, vocabulary, {ids.data<const std::int32_t>(), n_prompt, ids.size<std::int32_t>()},
                  allowed);
  }
  const Sampling& sampling;
  const float* logits;
  i64 vocabulary, n_prompt;
  Bytes ids;
  std::optional<Bytes> bits;
};

i64 choose_row(const Sampling& sampling, nb::handle logits, i64 row, i64 vocabulary, nb::handle history, i64 n_prompt,
               nb::handle mask) {
  const Bytes values(logits);
  return Choice(sampling, row_of(values, row, vocabulary), vocabulary, history, n_prompt, mask).make();
}

using Logprobs = std::vector<std::pair<i64, double>>;
using Chosen = std::variant<std::pair<i64, Logprobs>, std::string>;

std::vector<Chosen> choose_rows(nb::handle logits, i64 vocabulary, nb::sequence wanted, Pool* pool) {
  const Bytes values(logits);
  std::vector<std::unique_ptr<Choice>> choices;
  std::vector<std::optional<i64>> n_top;
  for (nb::handle item : wanted) {
    const nb::object sampler = item[0];
    const float* row = row_of(values, nb::cast<i64>(item[1]), vocabulary);
    choices.push_back(std::make_unique<Choice>(nb::cast<const Sampling&>(sampler), row, vocabulary, item[2],
                                               nb::cast<i64>(item[3]), item[4]));
    n_top.push_back(nb::cast<std::optional<i64>>(item[5]));
  }
  std::vector<Chosen> chosen(choices.size());
  std::atomic<std::size_t> next{0};  // rows differ in what they cost: who is free takes one
  auto work = [&](int) {
    for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < choices.size();) try {
        const i64 id = choices[i]->make();
        chosen[i] =
            std::pair(id, n_top[i] ? log_probabilities(choices[i]->logits, vocabulary, id, *n_top[i]) : Logprobs{});
      } catch (const std::exception& error) {
        chosen[i] = std::string(error.what());
      }
  };
  if (pool && choices.size() > 1)
    pool->run(work);
  else
    work(0);
  return chosen;
}

Logprobs log_probabilities_of_row(nb::handle logits, i64 row, i64 vocabulary, i64 chosen, i64 n_top) {
  const Bytes values(logits);
  const float* x = row_of(values, row, vocabulary);
  return log_probabilities(x, vocabulary, chosen, n_top);
}

}  // namespace

void bind_sampling(nb::module_& m) {
  using Ids = std::vector<std::int32_t>;
  nb::class_<Sampling>(m, "Sampler")
      .def(
          "__init__",
          [](Sampling* self, double temperature, i64 top_k, double top_p, double min_p, float repetition_penalty,
             float presence_penalty, float frequency_penalty, std::uint64_t seed,
             std::vector<std::pair<std::int32_t, float>> logit_bias, Ids withheld, i64 min_tokens) {
            new (self) Sampling{temperature,
                                top_k,
                                top_p,
                                min_p,
                                repetition_penalty,
                                presence_penalty,
                                frequency_penalty,
                                seed,
                                std::move(logit_bias),
                                std::move(withheld),
                                min_tokens};
          },
          nb::kw_only(), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
          nb::arg("repetition_penalty"), nb::arg("presence_penalty"), nb::arg("frequency_penalty"), nb::arg("seed"),
          nb::arg("logit_bias"), nb::arg("withheld"), nb::arg("min_tokens"))
      .def_ro("temperature", &Sampling::temperature)
      .def_ro("top_k", &Sampling::top_k)
      .def_ro("top_p", &Sampling::top_p)
      .def_ro("min_p", &Sampling::min_p)
      .def_ro("seed", &Sampling::seed)
      .def_prop_ro("plain",
                   [](const Sampling& p) {
                     return p.repetition_penalty == 1 && p.presence_penalty == 0 && p.frequency_penalty == 0 &&
                            p.logit_bias.empty() && p.withheld.empty();
                   })
      .def("choose", &choose_row, nb::arg("logits"), nb::arg("row"), nb::arg("vocabulary"), nb::arg("history"),
           nb::arg("n_prompt"), nb::arg("allowed").none() = nb::none());
  m.def("choose_rows", &choose_rows, nb::arg("logits"), nb::arg("vocabulary"), nb::arg("wanted"),
        nb::arg("pool").none() = nb::none());
  m.def("log_probabilities", &log_probabilities_of_row, nb::arg("logits"), nb::arg("row"), nb::arg("vocabulary"),
        nb::arg("chosen"), nb::arg("n_top"));
  m.def(
      "philox",
      [](std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint64_t key) {
        const auto words = philox({c0, c1, c2, c3}, key);
        return nb::make_tuple(words[0], words[1], words[2], words[3]);
      },
      "Four words of the generator, for tests.");
}

}  // namespace pronghorn
