#include "dlpack_order/order.h"

int main(void) { return flashcore_last_error()[0] != 0; }
