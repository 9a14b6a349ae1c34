"""Pictures and the report of a comparison. Arrays in, arrays or a file out; no torch, no framework."""
