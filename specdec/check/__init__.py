"""Is the output what plain decoding writes? Oracles, comparison, and the referee of other engines."""
