# Fails if an object file of kernels.cpp defines a weak symbol (see kernels.cpp for why).
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only -C ${object} OUTPUT_VARIABLE symbols
    COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
  if(weak)
    string(REPLACE ";" "\n" weak "${weak}")
    message(FATAL_ERROR "${object} defines weak symbols:\n${weak}")
  endif()
endforeach()
file(TOUCH ${STAMP})
