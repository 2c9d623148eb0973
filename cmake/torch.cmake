# Building against torch from its headers alone.

# The version of the torch in the folder `root`: of its own module, or of its headers where these came alone.
function(torch_version root out)
  if(EXISTS ${root}/version.py)
    file(STRINGS ${root}/version.py line REGEX "^__version__ = ")
    string(REGEX REPLACE ".*'([^']+)'.*" "\\1" version "${line}")
  else()
    set(numbers "")
    foreach(part MAJOR MINOR PATCH)
      file(STRINGS ${root}/include/torch/headeronly/version.h line REGEX "define TORCH_VERSION_${part} ")
      string(REGEX REPLACE "[^0-9]*([0-9]+).*" "\\1" number "${line}")
      list(APPEND numbers ${number})
    endforeach()
    string(REPLACE ";" "." version "${numbers}")
  endif()
  set(${out} ${version} PARENT_SCOPE)
endfunction()

# Makes `target` need the named libraries of torch. torch is always imported first, so the loader finds them by name
# among what is loaded, and a path to them would be one more thing to be wrong. On Linux a library of that name without
# contents is enough for this, so other machines' and other versions' libraries need not be here.
function(link_torch target root)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/nothing.cpp "")
    foreach(library ${ARGN})
      add_library(${target}_${library} SHARED ${CMAKE_CURRENT_BINARY_DIR}/nothing.cpp)
      set_target_properties(${target}_${library} PROPERTIES OUTPUT_NAME ${library} LIBRARY_OUTPUT_DIRECTORY
                                                            ${CMAKE_CURRENT_BINARY_DIR}/names)
      target_link_libraries(${target} PRIVATE ${target}_${library})
    endforeach()
    target_link_options(${target} PRIVATE -Wl,--no-as-needed -Wl,-z,now)
  else()
    target_link_directories(${target} PRIVATE ${root}/lib)
    target_link_libraries(${target} PRIVATE ${ARGN})
    set_target_properties(${target} PROPERTIES INSTALL_RPATH "@loader_path/../torch/lib")
  endif()
  set_target_properties(${target} PROPERTIES PREFIX "" BUILD_WITH_INSTALL_RPATH ON)
  if(WIN32)
    set_target_properties(${target} PROPERTIES SUFFIX ".pyd")
  else()
    set_target_properties(${target} PROPERTIES SUFFIX ".abi3.so")
  endif()
endfunction()

# Old symbols in place of new ones, so that a library built here loads on glibc 2.28 and the libstdc++ of GCC 8; and no
# symbol leaves the library but its entries.
function(make_portable target)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    target_sources(${target} PRIVATE ${BATCHNORM_SOURCE}/csrc/portable/symbols.cpp)
    set(script ${BATCHNORM_SOURCE}/csrc/portable/exports.map)
    target_link_options(${target} PRIVATE -Wl,--version-script=${script} $<$<CONFIG:Release>:-s>)
    set_target_properties(${target} PROPERTIES LINK_DEPENDS ${script})
  endif()
endfunction()
