"""Networks as pure functions of their parameters; no input or output, no knowledge of data."""
