"""Target native: C++ of our own, compiled on the machine that runs it."""
