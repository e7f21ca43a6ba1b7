"""`python -m tp_overlap_kernels.bench`."""

import sys

if __name__ == "__main__":
    try:
        from .cli import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("rich", "typer"):
            raise
        sys.exit(f"bench: {missing.name} is not installed. Run: pip install 'tp-overlap-kernels[bench]'")
    app()
