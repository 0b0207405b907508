"""One module for each command of ``moe-train``: arguments, one call, output."""
