# Finds nvcc (a toolkit on the machine, else the one that PyPI's cuda-toolkit[nvcc] installs beside
# the Python that runs the build) and enables CUDA. Sets FLASHCORE_HAS_CUDA.
include(CheckLanguage)
set(FLASHCORE_HAS_CUDA OFF)
string(TOUPPER "${FLASHCORE_CUDA}" _mode)

if(NOT _mode STREQUAL "OFF")
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    find_package(Python3 QUIET COMPONENTS Interpreter)
    if(Python3_EXECUTABLE)
      execute_process(
        COMMAND ${Python3_EXECUTABLE} -c
                "import nvidia.cu13 as m; print(list(m.__path__)[0])"
        OUTPUT_VARIABLE _cu13 OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
    if(_cu13 AND EXISTS "${_cu13}/bin/nvcc")
      set(CMAKE_CUDA_COMPILER "${_cu13}/bin/nvcc")
      # The wheels put the libraries in lib/, nvcc.profile looks in lib64/.
      set(CMAKE_CUDA_FLAGS_INIT "-L${_cu13}/lib")
    endif()
  endif()
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    set(CMAKE_CUDA_ARCHITECTURES 90a-real)  # each backend folder sets its own
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    enable_language(CUDA)
    # The runtime, linked statically. Not find_package(CUDAToolkit): it insists on libcudart.so, which
    # PyPI's toolkit has only under its versioned name.
    set(_root "${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}")
    find_library(FLASHCORE_CUDART cudart_static NO_DEFAULT_PATH REQUIRED
      PATHS "${_root}/lib64" "${_root}/lib" "${_root}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib")
    find_path(FLASHCORE_CUDA_INCLUDE cuda_runtime_api.h NO_DEFAULT_PATH REQUIRED
      PATHS "${_root}/include" "${_root}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/include")
    find_package(Threads REQUIRED)
    add_library(flashcore_cudart INTERFACE)
    target_include_directories(flashcore_cudart SYSTEM INTERFACE "${FLASHCORE_CUDA_INCLUDE}")
    target_link_libraries(flashcore_cudart INTERFACE "${FLASHCORE_CUDART}" Threads::Threads
      ${CMAKE_DL_LIBS} rt)
    set(FLASHCORE_HAS_CUDA ON)
  elseif(_mode STREQUAL "ON")
    message(FATAL_ERROR "FLASHCORE_CUDA=ON but no nvcc was found: install a CUDA 13 toolkit, or "
                        "'pip install cuda-toolkit[nvcc,cccl]==13.0.*' into the build's Python.")
  endif()
endif()
message(STATUS "flashcore: CUDA backends ${FLASHCORE_HAS_CUDA}")
