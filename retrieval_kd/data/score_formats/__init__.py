"""Score files of other tools: one module a layout, `convert` reads and writes them."""
