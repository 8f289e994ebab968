#include "dlpack_order/order.h"

int main() { return flashcore_last_error()[0] != 0; }
