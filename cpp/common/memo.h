// The last answers of a pure function, for a host path that is asked the same again and again. Not
// shared between threads: make it thread_local.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace flashcore {

// kWords: integers that make up a question.
template <class Answer, size_t kWords>
class Memo {
 public:
  using Question = std::array<int64_t, kWords>;

  template <class F>
  const Answer& get(const Question& question, F answer) {
    uint64_t hash = 0;
    for (int64_t word : question)
      hash = (hash ^ static_cast<uint64_t>(word)) * UINT64_C(0x9E3779B97F4A7C15);
    Entry& entry = entries_[hash >> 60];
    if (!entry.known || entry.question != question) entry = {question, answer(), true};
    return entry.answer;
  }

 private:
  struct Entry {
    Question question{};
    Answer answer{};
    bool known = false;
  };
  std::array<Entry, 16> entries_;
};

}  // namespace flashcore
