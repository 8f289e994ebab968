# flashcore_warnings(<target>): warnings and sanitizers for our own C++ code.
function(flashcore_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-psabi>)
  if(FLASHCORE_SANITIZE)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${FLASHCORE_SANITIZE} -fno-sanitize-recover=all
        -fno-omit-frame-pointer>)
    target_link_options(${target} PRIVATE -fsanitize=${FLASHCORE_SANITIZE})
  endif()
endfunction()
