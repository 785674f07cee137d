"""Make a torch model 4-bit."""
