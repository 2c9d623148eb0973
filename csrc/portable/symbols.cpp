// Definitions that a library built with a newer compiler would take from a newer libstdc++ or glibc: with these of its
// own, it loads on glibc 2.28 and the libstdc++ of GCC 8 (manylinux_2_28). `exports.map` keeps them inside.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__)
// Members of later versions: constructors without arguments (GLIBCXX_3.4.26), str() && (GLIBCXX_3.4.29).
template class std::basic_stringbuf<char>;
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }  // GLIBCXX_3.4.29
}  // namespace std

// CXXABI_1.3.13: what the destructor of exception_ptr calls. The destructor was a function of the library before, which
// did the same; by its version, the reference can only mean that one.
__asm__(".symver batchnorm_first_destructor, _ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");
extern "C" void batchnorm_first_destructor(void* exception_ptr);
extern "C" void batchnorm_release(void* exception_ptr) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
extern "C" void batchnorm_release(void* exception_ptr) { batchnorm_first_destructor(exception_ptr); }

#if defined(__GLIBC__)
// GLIBC_2.32. libstdc++ counts references without atomic operations where it is true; false is right always.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif
#endif
