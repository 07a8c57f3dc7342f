from residual_kernels.cli import main

main()
