"""Does speculation draw what the model alone would draw?  Exact distributions beside samples."""
