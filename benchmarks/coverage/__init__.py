"""Coverage: real, unmodified models of many families, each compiled by fxsplit and compared bit for bit."""
