"""python -m residual_kernels: the command line."""

from residual_kernels.cli import main

if __name__ == "__main__":
    main()
