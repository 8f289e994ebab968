/* The three ways a program can meet two dlpack headers. MODE says which; for C and C++. */
#if MODE == 1 /* flashcore.h, then another package's header */
#include "flashcore/flashcore.h"

#include "dlpack_order/dlpack/dlpack.h"
#elif MODE == 2 /* the other way round */
#include "dlpack_order/dlpack/dlpack.h"

#include "flashcore/flashcore.h"
#else /* <dlpack/dlpack.h> is on the include path: flashcore.h must take that one */
#include "flashcore/flashcore.h"
#ifndef OTHER_DLPACK
#error "flashcore.h ignored the dlpack.h of the include path"
#endif
#endif

typedef char tensor_has_the_abi_size[sizeof(DLTensor) == 48 ? 1 : -1];
typedef char device_has_the_abi_size[sizeof(DLDevice) == 8 ? 1 : -1];
typedef char dtype_has_the_abi_size[sizeof(DLDataType) == 4 ? 1 : -1];
