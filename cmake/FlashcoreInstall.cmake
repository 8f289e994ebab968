# Installs the library, its headers and a CMake package, under any prefix. In a wheel the prefix is
# the package directory flashcore/, so both have the same layout:
#   lib/libflashcore.so.1   include/flashcore/*.h   lib/cmake/flashcore/flashcoreConfig.cmake
include(CMakePackageConfigHelpers)

# A wheel cannot hold a symbolic link, and a copy would double its size: there the library has the
# one name it is loaded by. find_package needs no other.
if(DEFINED SKBUILD)
  set(_namelink NAMELINK_SKIP)
endif()
install(TARGETS flashcore EXPORT flashcoreTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ${_namelink})

install(FILES
  include/flashcore/dlpack.h include/flashcore/flashcore.h include/flashcore/flashcore.hpp
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/flashcore)

set(_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flashcore)
install(EXPORT flashcoreTargets NAMESPACE flashcore:: DESTINATION ${_package_dir})
configure_package_config_file(cmake/flashcoreConfig.cmake.in
  ${PROJECT_BINARY_DIR}/flashcoreConfig.cmake INSTALL_DESTINATION ${_package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/flashcoreConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flashcoreConfig.cmake
  ${PROJECT_BINARY_DIR}/flashcoreConfigVersion.cmake DESTINATION ${_package_dir})
