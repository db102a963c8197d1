"""Is what speculation draws what the model alone would draw?  Exact distributions beside samples."""
