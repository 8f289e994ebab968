// The smallest test harness that says what differed.
//
//     TEST("block_range visits what it must") { CHECK_EQ(f(3), 4); }
//     TEST_MAIN()
#pragma once
#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}
inline int failures = 0;

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline void failed(const char* file, int line, const std::string& what) {
  constexpr int kMostShown = 20;
  if (++failures <= kMostShown) std::printf("%s:%d: %s\n", file, line, what.c_str());
}

template <class A, class B>
std::string differ(const char* text, const A& a, const B& b) {
  std::ostringstream s;
  s << text << ": " << a << " is not " << b;
  return s.str();
}

inline int run() {
  for (const Test& test : tests()) {
    int const before = failures;
    test.body();
    std::printf("%s  %s\n", failures == before ? "ok  " : "FAIL", test.name);
  }
  if (failures) std::printf("%d checks failed\n", failures);
  return failures != 0;
}

}  // namespace check

#define TEST(name) TEST_EXPAND(name, __LINE__)
#define TEST_EXPAND(name, line) TEST_ON_LINE(name, line)
#define TEST_ON_LINE(name, line) TEST_AS(name, test_##line)
#define TEST_AS(name, id)                               \
  static void id();                                     \
  static check::Register const register_##id(name, id); \
  static void id()
#define TEST_MAIN() \
  int main() { return check::run(); }

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) check::failed(__FILE__, __LINE__, #condition); \
  } while (0)
#define CHECK_EQ(a, b)                                                                  \
  do {                                                                                  \
    auto const& check_a = (a);                                                          \
    auto const& check_b = (b);                                                          \
    if (!(check_a == check_b))                                                          \
      check::failed(__FILE__, __LINE__, check::differ(#a " == " #b, check_a, check_b)); \
  } while (0)
// The text must contain the part.
#define CHECK_CONTAINS(text, part)                                                           \
  do {                                                                                       \
    std::string const check_text = (text);                                                   \
    if (check_text.find(part) == std::string::npos)                                          \
      check::failed(__FILE__, __LINE__,                                                      \
                    check::differ("contains", "\"" + check_text + "\"", std::string(part))); \
  } while (0)
