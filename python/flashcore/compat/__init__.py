"""The functions of other libraries, on flashcore: one import line changes, the calls stay."""
