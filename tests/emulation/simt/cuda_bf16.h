// Found before the toolkit's file of this name.
#include "simt.hpp"
