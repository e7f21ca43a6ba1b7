"""Device words, nothing about any one algorithm. Triton is imported by the modules in here, not by the package."""
