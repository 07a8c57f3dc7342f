import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is imported; without a GPU kernels run interpreted
