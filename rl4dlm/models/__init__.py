"""What a denoiser is: a stock transformer, its spec, its masks and its vocabulary head."""
