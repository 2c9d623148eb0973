// Operators as LibTorch's stable ABI calls them: a function of one struct, whose members are the arguments in order.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace batchnorm {

// One argument on the stack, which becomes whatever member it initializes; once, since tensors change hands. One that
// may be absent becomes a std::optional and nothing else: that would take any other kind for what is inside it.
struct Argument {
  StableIValue value;
  template <class T>
  operator T() const {
    return torch::stable::detail::to<T>(value);
  }
};
struct OptionalArgument {
  StableIValue value;
  template <class T>
  operator std::optional<T>() const {
    return torch::stable::detail::to<std::optional<T>>(value);
  }
};

template <class Arguments, class Kinds, class = void>
struct CanHold : std::false_type {};
template <class Arguments, class... Kinds>
struct CanHold<Arguments, std::tuple<Kinds...>, std::void_t<decltype(Arguments{std::declval<Kinds>()...})>>
    : std::true_type {};

// The kinds of the first `count` members, where the one at `optional` is one that may be absent.
template <size_t optional, size_t... place>
std::tuple<std::conditional_t<place == optional, OptionalArgument, Argument>...> kinds(std::index_sequence<place...>);
template <class Arguments, size_t count, size_t optional = count>
constexpr bool can_hold = CanHold<Arguments, decltype(kinds<optional>(std::make_index_sequence<count>()))>::value;

// The number of members of a struct: the most that can be initialized.
template <class Arguments, size_t most = 24>
constexpr size_t members_of() {
  if constexpr (can_hold<Arguments, most>)
    return most;
  else
    return members_of<Arguments, most - 1>();
}

template <class Arguments, size_t... place>
Arguments unboxed(const StableIValue* stack, std::index_sequence<place...>) {
  constexpr size_t count = sizeof...(place);
  return Arguments{std::conditional_t<can_hold<Arguments, count, place>, OptionalArgument, Argument>{stack[place]}...};
}

template <class Result>
void put(StableIValue* stack, const Result& result) {
  stack[0] = torch::stable::detail::from(result);
}
template <class... Results>
void put(StableIValue* stack, const std::tuple<Results...>& results) {
  size_t place = 0;
  std::apply([&](const auto&... result) { ((stack[place++] = torch::stable::detail::from(result)), ...); }, results);
}

template <auto function>
struct Boxed;
template <class Results, class Arguments, Results (*function)(const Arguments&)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t) {
    constexpr size_t count = members_of<Arguments>();
    if (arguments != count)
      throw std::runtime_error("batchnorm: an operator of " + std::to_string(arguments) +
                               " arguments has a kernel of " + std::to_string(count));
    const Arguments given = unboxed<Arguments>(stack, std::make_index_sequence<count>());
    if constexpr (std::is_void_v<Results>)
      function(given);
    else
      put(stack, function(given));
  }
};

}  // namespace batchnorm
