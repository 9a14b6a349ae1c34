"""Pictures and the report of a comparison, made of arrays without torch or a framework."""
