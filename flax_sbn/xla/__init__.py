"""What compilers need: blocks in one operation, a form for each platform, rounding."""
