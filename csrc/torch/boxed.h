// Operators as LibTorch's stable ABI calls them: a function of one struct, whose members are the arguments in order.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace batchnorm {

// One argument on the stack, which becomes whatever member it initializes; once, since tensors change hands.
struct Argument {
  StableIValue value;
  template <class T>
  operator T() const {
    return torch::stable::detail::to<T>(value);
  }
};

template <class Arguments, class Places, class = void>
struct HasMembers : std::false_type {};
template <class Arguments, size_t... place>
struct HasMembers<Arguments, std::index_sequence<place...>,
                  std::void_t<decltype(Arguments{(void(place), Argument{})...})>> : std::true_type {};

// The number of members of a struct: the most that can be initialized.
template <class Arguments, size_t most = 24>
constexpr size_t members_of() {
  if constexpr (HasMembers<Arguments, std::make_index_sequence<most>>::value)
    return most;
  else
    return members_of<Arguments, most - 1>();
}

template <class Arguments, size_t... place>
Arguments unboxed(const StableIValue* stack, std::index_sequence<place...>) {
  return Arguments{Argument{stack[place]}...};
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
